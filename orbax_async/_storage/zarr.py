"""zarr arrays: their metadata documents, their keys, and how they lie in their chunks."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from orbax_async._storage import codecs

_CHECKSUMS = ".checksums"
LARGE_NBYTES = 1 << 30
"""Of an array of more than these it is looked whether so much can be there at all."""
_MOST_ENCODED, _MOST_FRAMING = 2, 1 << 20  # times its bytes, and bytes more, of any encoding
_LARGEST_NBYTES = 64 << 20  # of a chunk that reaches beyond its whole array
_MAX_ELEMENTS = 1 << 58  # of 16 bytes each, as far as an address reaches

# Elements narrower than a byte, or of types of our own making, that zarr stores by name.
_STORABLE = frozenset(
    (
        *("bool", "complex64", "complex128", "bfloat16", "float16", "float32", "float64"),
        *("int2", "int4", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
        *("float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
)


def is_storable(dtype: np.dtype[Any]) -> bool:
    """Says whether zarr has a data type for `dtype`."""
    return dtype.name in _STORABLE


@functools.cache
def dtype_named(name: str) -> np.dtype[Any]:
    """Returns the dtype for a zarr v3 data type, or for a name of ml_dtypes.

    I14: bytes of a file never become pointers; what is no type of numbers is a TypeError.
    """
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    if dtype.kind not in "biufcV" or dtype.type is np.void:
        raise TypeError(f"{name!r} is no type of numbers")
    return dtype


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Returns the name of a dtype, which NumPy puts together anew each time, in about 3 us."""
    return dtype.name


def _fill_value(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return False
    if dtype.kind == "c":
        return [0.0, 0.0]
    return 0 if dtype.kind in "iu" or dtype.name.startswith(("int", "uint")) else 0.0


def document_key(name: str, *, zarr3: bool) -> str:
    """Returns the key of an array's metadata document; an empty name has no prefix."""
    return (f"{name}/" if name else "") + ("zarr.json" if zarr3 else ".zarray")


def chunk_key(name: str, index: Sequence[int], *, zarr3: bool) -> str:
    """Returns the key of one chunk by its position in the chunk grid."""
    prefix = f"{name}/" if name else ""
    if zarr3:
        return prefix + "/".join(["c", *map(str, index)])
    return prefix + (".".join(map(str, index)) or "0")


@functools.lru_cache(maxsize=4096)
def array_document(
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    dtype_name: str,
    encoding: codecs.Encoding,
    *,
    zarr3: bool,
) -> bytes:
    """Returns the metadata document of an array, as the bytes to store."""
    dtype = dtype_named(dtype_name)
    chunk_shape = tuple(max(1, side) for side in chunk_shape)
    if not zarr3:
        standard = dtype.kind in "biufc" and dtype.name not in ml_dtypes.__all__
        document: dict[str, Any] = {
            "chunks": chunk_shape,
            "compressor": codecs.CODECS[encoding].zarr2,
            "dimension_separator": ".",
            "dtype": dtype.newbyteorder("<").str if standard else dtype.name,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": shape,
            "zarr_format": 2,
        }
    else:
        to_bytes: dict[str, Any] = {"name": "bytes"}
        if dtype.itemsize > 1:
            to_bytes["configuration"] = {"endian": "little"}
        document = {
            "chunk_grid": {"configuration": {"chunk_shape": chunk_shape}, "name": "regular"},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [to_bytes, *codecs.CODECS[encoding].zarr3],
            "data_type": dtype.name,
            "fill_value": _fill_value(dtype),
            "node_type": "array",
            "shape": shape,
            "zarr_format": 3,
        }
    return json.dumps(document, separators=(",", ":")).encode()


_KEY_V2 = re.compile(r"\.z\w+|\d+([./]\d+)*")
_KEY_V3 = re.compile(rf"zarr\.json|c(/\d+)*|{re.escape(_CHECKSUMS)}/[\d.]*")


def array_of(key: str, array_names: Container[str], *, zarr3: bool) -> str | None:
    """Returns which of some arrays a key belongs to; None for a key of none of them."""
    rest = _KEY_V3 if zarr3 else _KEY_V2
    end = len(key)
    while end >= 0:
        end = key.rfind("/", 0, end)
        name = key[: max(end, 0)]
        if name in array_names and rest.fullmatch(key, end + 1):
            return name
    return None


class WholeLayout(NamedTuple):
    """How a small array lies in a single value that `decode_whole` reads without TensorStore."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    is_compressed: bool


class RawLayout(NamedTuple):
    """How an array lies in chunks that hold its elements as they are."""

    chunk_shape: tuple[int, ...]  # the last ones may reach over the array's edge
    has_crc32c: bool  # after the elements
    zarr3: bool


class ArrayDocument(NamedTuple):
    """What the metadata document of an array says."""

    content: Mapping[str, Any]
    zarr3: bool
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # in native byte order
    nbytes: int  # of all elements
    stored_shape: tuple[int, ...]  # of what is stored as one value: a chunk, or a shard of several
    chunk_shape: tuple[int, ...]  # of the smallest piece that can be read alone
    has_checksum: bool  # which finds a flipped bit when an element is read
    whole: WholeLayout | None  # None where the array is in several values, or not plain
    raw: RawLayout | None  # None where its chunks are encoded in any way


_NEEDED = {
    2: {"shape", "chunks", "dtype", "compressor", "order"},
    3: {"shape", "chunk_grid", "chunk_key_encoding", "codecs", "data_type"},
}
_KEPT_NBYTES = 4096  # of a document that is kept once it is parsed; most trees have few different


def parse_document(data: bytes) -> ArrayDocument:
    """Understands an array's metadata document; raises ValueError where it is none."""
    return _parsed(data) if len(data) <= _KEPT_NBYTES else _parsed.__wrapped__(data)


@functools.lru_cache(maxsize=1024)
def _parsed(data: bytes) -> ArrayDocument:
    try:
        document = json.loads(data)
        version = document.get("zarr_format") if isinstance(document, dict) else None
        needed = _NEEDED.get(version) if isinstance(version, int) else None
        if needed is None or not needed <= document.keys():
            raise ValueError("it is no zarr array document")
        return _understood(document)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it has another form than it should: {error}") from None


def _understood(document: Mapping[str, Any]) -> ArrayDocument:
    zarr3 = document["zarr_format"] == 3
    stored_shape, chunk_shape = _chunk_shapes(document)
    _check_grid(document["shape"], stored_shape)
    _check_grid(document["shape"], chunk_shape)
    shape = tuple(document["shape"])
    dtype = dtype_named(document["data_type" if zarr3 else "dtype"])
    if not is_storable(dtype):
        raise TypeError(f"{dtype.name} is no data type of zarr")
    dtype = dtype.newbyteorder("=")
    if zarr3:
        is_plain = _is_plain_v3(document)
        tail = [codec.get("name") for codec in document["codecs"][1:]]
        has_checksum = codecs.have_checksum(document["codecs"])
    else:
        is_plain = _is_plain_v2(document)
        compressor = document["compressor"]
        has_checksum = compressor is not None and compressor["id"] in ("gzip", "zlib")
        tail = [] if compressor is None else ["gzip" if has_checksum else "other"]
    raw = whole = None
    nbytes = math.prod(shape) * dtype.itemsize
    if math.prod(stored_shape) * dtype.itemsize > max(nbytes, _LARGEST_NBYTES):
        raise ValueError(f"its chunks of {list(stored_shape)!r:.60} are larger than all of it")
    if is_plain and tail in ([], ["crc32c"]):
        raw = RawLayout(chunk_shape, bool(tail), zarr3)
    if is_plain and tail in ([], ["gzip"]) and chunk_shape == tuple(max(1, each) for each in shape):
        whole = WholeLayout(shape, dtype, nbytes, bool(tail))
    return ArrayDocument(
        *(document, zarr3, shape, dtype, nbytes),
        *(stored_shape, chunk_shape, has_checksum, whole, raw),
    )


def stored_chunks(
    document: ArrayDocument, name: str, box: Sequence[tuple[int, int]]
) -> tuple[Iterator[str], int]:
    """Returns the keys of the chunks that a box meets, and the most bytes that one may have."""
    prefix, separator = [], document.content.get("dimension_separator", ".")
    if document.zarr3:
        keys = document.content["chunk_key_encoding"]
        is_default = keys["name"] == "default"
        prefix = ["c"] if is_default else []
        separator = keys.get("configuration", {}).get("separator", "/" if is_default else ".")
    axes = zip(box, document.stored_shape, strict=True)
    ranges = [range(low // side, -(-high // side)) for (low, high), side in axes]
    below = f"{name}/" if name else ""
    found = (
        below + (separator.join([*prefix, *map(str, index)]) or "0")
        for index in itertools.product(*ranges)
    )
    return found, _MOST_ENCODED * math.prod(
        document.stored_shape
    ) * document.dtype.itemsize + _MOST_FRAMING


def _chunk_shapes(document: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Returns the shape of what is stored as one value, and of what in it can be read alone."""
    if document["zarr_format"] == 2:
        return [tuple(document["chunks"])] * 2
    stored = shape = document["chunk_grid"]["configuration"]["chunk_shape"]
    found = document.get("codecs", ())
    while shards := [codec for codec in found if codec.get("name") == "sharding_indexed"]:
        shape = shards[0]["configuration"]["chunk_shape"]
        found = shards[0]["configuration"].get("codecs", ())  # shards may be nested
    return [tuple(stored), tuple(shape)]


def _check_grid(shape: Any, chunk: tuple[Any, ...]) -> None:
    if not isinstance(shape, (list, tuple)) or len(shape) != len(chunk):
        raise ValueError(f"its shape {shape} and that of its chunks {list(chunk)} do not fit")
    for side, piece in zip(shape, chunk, strict=True):
        if type(side) is not int or type(piece) is not int or side < 0 or piece < 1:
            raise ValueError(f"its shape {shape}, in chunks of {list(chunk)}, is none")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise ValueError(f"its shape {shape} has more elements than any array")


@functools.lru_cache(maxsize=4096)
def plain_document(shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayDocument:
    """Describes an array whose elements lie somewhere in one piece, as they are."""
    chunk_shape = tuple(max(1, side) for side in shape)
    content = {
        "chunk_grid": {"configuration": {"chunk_shape": chunk_shape}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes"}],
        "data_type": dtype.name,
        "shape": shape,
        "zarr_format": 3,
    }
    return _understood(content)


def checksums_key(name: str, index: Sequence[int]) -> str:
    """Returns the key of a raw chunk's `block_checksums`, which zarr readers pass over."""
    return (f"{name}/" if name else "") + f"{_CHECKSUMS}/" + ".".join(map(str, index))


def _is_plain_v2(document: Mapping[str, Any]) -> bool:
    return bool(
        document["dtype"][0] != ">"
        and document["order"] == "C"
        and document.get("dimension_separator", ".") == "."
        and not document.get("filters")
    )


def _is_plain_v3(document: Mapping[str, Any]) -> bool:
    keys = document["chunk_key_encoding"]
    head = document["codecs"][0] if document["codecs"] else {}
    return bool(
        keys["name"] == "default"
        and keys.get("configuration", {}).get("separator", "/") == "/"
        and head.get("name") == "bytes"
        and head.get("configuration", {}).get("endian", "little") == "little"
        and not document.get("storage_transformers")
    )


def decode_whole(layout: WholeLayout, data: bytes | memoryview) -> np.ndarray[Any, Any]:
    """Decodes an array that is one value; raises ValueError where its bytes are damaged."""
    if layout.is_compressed:
        data = codecs.inflate(data, layout.nbytes)
    if len(data) != layout.nbytes:
        raise ValueError(f"{len(data)} bytes found, {layout.nbytes} expected")
    return np.ndarray(layout.shape, layout.dtype, data)
