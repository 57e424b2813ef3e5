"""What lies on disk: looked at, built and damaged by TensorStore and plain files alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts
from seals import unseal


def kvstore(directory: Path, *, context: ts.Context | None = None) -> ts.KvStore:
    """Opens the key-value store of a checkpointable's directory: OCDBT, or plain files."""
    base = f"{directory.absolute().as_uri()}/"
    spec: Any = base
    if (directory / "manifest.ocdbt").exists():
        spec = {"driver": "ocdbt", "base": base}
    return ts.KvStore.open(spec, context=context or ts.Context()).result()


def keys(directory: Path) -> set[str]:
    """Returns every key that is stored."""
    return {key.decode() for key in kvstore(directory).list().result()}


def document(directory: Path, name: str, *, zarr3: bool = True) -> dict[str, Any]:
    """Returns the zarr document of one array."""
    key = f"{name}/" * bool(name) + ("zarr.json" if zarr3 else ".zarray")
    return json.loads(kvstore(directory).read(key).result().value)


def codecs(directory: Path, name: str) -> list[str]:
    """Returns the names of the codecs of one zarr v3 array."""
    return [codec["name"] for codec in document(directory, name)["codecs"]]


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Rewrites a JSON file; `change` edits the document in place or returns another one."""
    unseal(file)
    content = json.loads(file.read_text())
    changed = change(content)
    file.write_text(json.dumps(content if changed is None else changed))


def put(directory: Path, values: Mapping[str, bytes]) -> None:
    """Sets keys of a checkpointable's store."""
    unseal(directory)
    store = kvstore(directory)
    for key, value in values.items():
        store[key] = value


def remove(directory: Path, *names: str) -> None:
    """Deletes keys of a checkpointable's store."""
    unseal(directory)
    store = kvstore(directory)
    for name in names:
        del store[name]


def replace_array(
    directory: Path, name: str, array: Any, metadata: Mapping[str, Any], *, zarr3: bool = True
) -> None:
    """Stores an array again, in the way that a zarr document says."""
    unseal(directory)
    store = kvstore(directory)
    store.delete_range(ts.KvStore.KeyRange(f"{name}/", f"{name}0")).result()
    spec = store.spec().to_json()
    spec["path"] = f"{spec.get('path', '')}{name}/"
    target = ts.open(
        {"driver": "zarr3" if zarr3 else "zarr", "kvstore": spec, "metadata": dict(metadata)},
        create=True,
        dtype=array.dtype,
        shape=array.shape,
    ).result()
    target.write(array).result()


def put_document(directory: Path, name: str, metadata: Mapping[str, Any]) -> None:
    """Stores another zarr v3 document for an array, and leaves its chunks as they are."""
    put(directory, {f"{name}/zarr.json": json.dumps(metadata).encode()})


def value(directory: Path, key: str) -> bytes:
    """Returns one stored value."""
    return bytes(kvstore(directory).read(key).result().value)
