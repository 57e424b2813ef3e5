"""Writing safetensors files by the letter of their format, good ones and bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import orbax_async as ocp

DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
}


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    metadata: dict[str, Any] | None = None,
    *,
    alter: Callable[[dict[str, Any]], object] = lambda header: None,
    gap: int = 0,
) -> Path:
    """Writes one file; `alter` changes its header first, `gap` bytes lie after each tensor."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        content = np.ascontiguousarray(tensor).tobytes()
        header[name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content + b"\xee" * gap
    alter(header)
    return write_raw(path, json.dumps(header).encode(), data)


def write_raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    """Writes one file of a header and data that may be anything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def write_index(folder: Path, weight_map: Mapping[str, str]) -> Path:
    """Writes the index of the files of a folder."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}))
    return path


def layout(name: str = "safetensors", **options: Any) -> ocp.Context:
    """A context of a layout, with options of safetensors files."""
    context = ocp.Context(checkpoint_layout=name)
    for option, value in options.items():
        setattr(context.safetensors, option, value)
    return context
