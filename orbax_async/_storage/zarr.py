"""zarr arrays: their metadata documents, chunk keys, codecs and small chunks.

Three encodings, all with a checksum that every zarr reader verifies (invariant I12):

    stored   one gzip member at level 0 (CRC-32): small arrays, encoded here, one call each
    raw      the elements followed by a CRC-32C: large arrays, encoded by TensorStore
    zstd     one zstd frame with a content checksum: large arrays that compress

zarr v2 has neither a CRC-32C nor a zstd checksum; its large arrays are gzip members too.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import struct
import zlib
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

__all__ = [
    "CHECKSUM_BLOCK",
    "Encoding",
    "RawLayout",
    "WholeLayout",
    "array_document",
    "array_of",
    "block_checksums",
    "checksum",
    "checksums_key",
    "chunk_key",
    "compression_saving",
    "decode_whole",
    "document_key",
    "dtype_named",
    "encode_stored",
    "has_checksum",
    "is_storable",
    "name_of",
    "parse_document",
    "plain_document",
    "raw_layout",
    "whole_layout",
]

Encoding = Literal["stored", "raw", "zstd"]
CHECKSUM_BLOCK = 4 << 20
_PAGE_NBYTES = 4096
_SAMPLE_NBYTES = 4 << 10  # a piece; twice as much tells no more and takes four times as long
_CHECKSUMS = ".checksums"
_GZIP = 31  # zlib's window-bits value for a gzip member
_BLOCK_NBYTES = 65535  # the most that a block of bytes as they are holds
# A gzip member without name or time; its only block is the last one, of type 0.
_MEMBER_START = bytes.fromhex("1f8b08000000000000ff01")

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
    """Returns the dtype for a zarr v3 data type, or for a name of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


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
    encoding: Encoding,
    *,
    zarr3: bool,
) -> bytes:
    """Returns the metadata document of an array, as the bytes to store."""
    dtype = dtype_named(dtype_name)
    chunk_shape = tuple(max(1, side) for side in chunk_shape)
    if not zarr3:
        compressor = {"id": "gzip", "level": 1 if encoding == "zstd" else 0}
        standard = dtype.kind in "biufc" and dtype.name not in ml_dtypes.__all__
        document: dict[str, Any] = {
            "chunks": chunk_shape,
            "compressor": compressor,
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
        tail: dict[Encoding, dict[str, Any]] = {
            "stored": {"name": "gzip", "configuration": {"level": 0}},
            "raw": {"name": "crc32c"},
            "zstd": {"name": "zstd", "configuration": {"level": 1, "checksum": True}},
        }
        document = {
            "chunk_grid": {"configuration": {"chunk_shape": chunk_shape}, "name": "regular"},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [to_bytes, tail[encoding]],
            "data_type": dtype.name,
            "fill_value": _fill_value(dtype),
            "node_type": "array",
            "shape": shape,
            "zarr_format": 3,
        }
    return json.dumps(document, separators=(",", ":")).encode()


@functools.lru_cache(maxsize=4096)
def plain_document(shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Describes an array whose elements lie somewhere in one piece, as they are."""
    chunk_shape = tuple(max(1, side) for side in shape)
    return {
        "chunk_grid": {"configuration": {"chunk_shape": chunk_shape}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes"}],
        "data_type": dtype.name,
        "shape": shape,
        "zarr_format": 3,
    }


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


_NEEDED = {
    2: {"shape", "chunks", "dtype", "compressor", "order"},
    3: {"shape", "chunk_grid", "chunk_key_encoding", "codecs", "data_type"},
}


def parse_document(data: bytes) -> dict[str, Any]:
    """Returns an array's metadata document as a mapping; raises ValueError where it is none."""
    document = json.loads(data)
    version = document.get("zarr_format") if isinstance(document, dict) else None
    needed = _NEEDED.get(version) if isinstance(version, int) else None
    if needed is None or not needed <= document.keys():
        raise ValueError("it is no zarr array document")
    try:
        stored_dtype(document)
    except TypeError as error:
        raise ValueError(f"its data type is unknown: {error}") from None
    return dict(document)


def stored_dtype(document: Mapping[str, Any]) -> np.dtype[Any]:
    """Returns the dtype that a document of either zarr version declares, in native byte order."""
    dtype = dtype_named(document["data_type" if document["zarr_format"] == 3 else "dtype"])
    return dtype.newbyteorder("=")


def chunk_shape(document: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the shape of the smallest piece that can be read alone."""
    if document["zarr_format"] == 2:
        return tuple(document["chunks"])
    shape = document["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = document.get("codecs", ())
    while shards := [codec for codec in codecs if codec.get("name") == "sharding_indexed"]:
        shape = shards[0]["configuration"]["chunk_shape"]
        codecs = shards[0]["configuration"].get("codecs", ())  # shards may be nested
    return tuple(shape)


def checksums_key(name: str, index: Sequence[int]) -> str:
    """Returns the key of a raw chunk's `block_checksums`, which zarr readers pass over."""
    return (f"{name}/" if name else "") + f"{_CHECKSUMS}/" + ".".join(map(str, index))


def block_checksums(array: np.ndarray[Any, Any]) -> bytes:
    """Returns the `checksum` of each block of `CHECKSUM_BLOCK` bytes, as little-endian uint32.

    The chunk's own CRC-32C needs the whole chunk, and a library that computes it; these let a
    reader verify any range with what Python has, as fast as it reads.
    """
    data: Any = array.reshape(-1).view(np.uint8)
    sums, rest = _page_sums(data)
    # Half a block at a time: zlib lets go of the GIL for more than 5 KiB, and where a program that
    # computes wants it too, each time to get it back takes much longer than the sum.
    half = CHECKSUM_BLOCK // _PAGE_NBYTES // 2
    halves = [sums[start : start + half] for start in range(0, len(sums), half)]
    pairs = itertools.zip_longest(halves[::2], halves[1::2], fillvalue=b"")
    found = [zlib.crc32(second, zlib.crc32(first)) for first, second in pairs]
    if rest.size:
        whole = found.pop() if len(sums) % (2 * half) else 0
        found.append(zlib.crc32(rest, whole))
    return np.array(found, "<u4").tobytes()


def checksum(data: Any) -> int:
    """Returns the CRC-32 of the sums, modulo 2**64, of the 64-bit words of each 4 KiB of `data`.

    A sum costs a sixth of a CRC, and a flipped bit, or anything else that changes a single word,
    always changes it; the CRC tells when whole pages change places. What is left over at the end
    goes into the CRC as it is.
    """
    sums, rest = _page_sums(np.frombuffer(data, np.uint8))
    return zlib.crc32(rest, zlib.crc32(sums))


def _page_sums(data: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Returns the sum of each whole page, and the bytes after the last of them."""
    whole = data.size - data.size % _PAGE_NBYTES
    words = data[:whole].view("<u8").reshape(-1, _PAGE_NBYTES // 8)
    return words.sum(1, np.uint64), data[whole:]


def encode_stored(array: np.ndarray[Any, Any]) -> bytes:
    """Encodes a whole small chunk: C order, little endian, one gzip member at level 0.

    The member (RFC 1952) is put together here, of one block of bytes as they are (RFC 1951) and
    their CRC-32 in pieces for which zlib does not let go of the GIL: beside a program that computes
    in Python, to get it back takes a thousand times as long as to encode.
    """
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    data = array.tobytes()
    if len(data) > _BLOCK_NBYTES:
        return zlib.compress(data, 0, wbits=_GZIP)
    nbytes, crc = len(data), zlib.crc32(data[:_PAGE_NBYTES])
    for start in range(_PAGE_NBYTES, nbytes, _PAGE_NBYTES):
        crc = zlib.crc32(data[start : start + _PAGE_NBYTES], crc)
    return _member(nbytes).pack(_MEMBER_START, nbytes, nbytes ^ 0xFFFF, data, crc, nbytes)


@functools.lru_cache(maxsize=1024)
def _member(nbytes: int) -> struct.Struct:
    """Returns a gzip member's parts: its start, its block's length, that inverted, and the bytes.

    Behind those come their CRC-32 and their length.
    """
    return struct.Struct(f"<{len(_MEMBER_START)}sHH{nbytes}sII")


def has_checksum(document: Mapping[str, Any]) -> bool:
    """Says whether a flipped bit of an array's elements is found when they are read."""
    if document["zarr_format"] == 2:
        return (document["compressor"] or {}).get("id") in ("gzip", "zlib")
    return _have_checksum(document["codecs"])


def _have_checksum(codecs: Sequence[Mapping[str, Any]]) -> bool:
    for codec in codecs:
        settings = codec.get("configuration", {})
        if codec.get("name") in ("crc32c", "gzip"):
            return True
        if codec.get("name") == "zstd" and settings.get("checksum"):
            return True
        if codec.get("name") == "sharding_indexed" and _have_checksum(settings.get("codecs", ())):
            return True
    return False


class WholeLayout(NamedTuple):
    """How a small array lies in a single value that `decode_whole` reads without TensorStore."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    is_compressed: bool


def whole_layout(document: Mapping[str, Any]) -> WholeLayout | None:
    """Returns how an array lies in one value; None where it is in several, or not plain."""
    shape = tuple(document["shape"])
    if document["zarr_format"] == 2:
        compressor = document["compressor"]
        is_plain = _is_plain_v2(document) and (
            compressor is None or compressor["id"] in ("gzip", "zlib")
        )
        is_compressed = compressor is not None
    else:
        tail = [codec.get("name") for codec in document["codecs"][1:]]
        is_plain = _is_plain_v3(document) and tail in ([], ["gzip"])
        is_compressed = bool(tail)
    if not is_plain or chunk_shape(document) != tuple(max(1, side) for side in shape):
        return None
    dtype = stored_dtype(document)
    return WholeLayout(shape, dtype, math.prod(shape) * dtype.itemsize, is_compressed)


class RawLayout(NamedTuple):
    """How an array lies in chunks that hold its elements as they are.

    Attributes:
      chunk_shape: of each chunk; the last ones may reach over the array's edge.
      has_crc32c: whether the elements are followed by their CRC-32C.
      zarr3: which version's keys the chunks have.
    """

    chunk_shape: tuple[int, ...]
    has_crc32c: bool
    zarr3: bool


def raw_layout(document: Mapping[str, Any]) -> RawLayout | None:
    """Returns how an array lies in its chunks; None where they are encoded in any way."""
    if document["zarr_format"] == 2:
        is_raw = document["compressor"] is None and _is_plain_v2(document)
        return RawLayout(chunk_shape(document), False, False) if is_raw else None
    codecs = document["codecs"]
    if not _is_plain_v3(document) or [codec.get("name") for codec in codecs[1:]] not in (
        [],
        ["crc32c"],
    ):
        return None
    return RawLayout(chunk_shape(document), len(codecs) == 2, True)


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
        try:
            data = zlib.decompress(data, 47, layout.nbytes or 1)  # a gzip or a zlib header
        except zlib.error as error:
            raise ValueError(f"checksum or framing error ({error})") from None
    if len(data) != layout.nbytes:
        raise ValueError(f"{len(data)} bytes found, {layout.nbytes} expected")
    return np.ndarray(layout.shape, layout.dtype, data)


def compression_saving(array: np.ndarray[Any, Any]) -> float:
    """Estimates the share of bytes that compression would save, from three pieces of an array.

    Deflate at its fastest stands in for zstd: both find the same redundancy in weights, the skew
    of the exponent bytes, to within a few per cent.
    """
    flat = array.reshape(-1).view(np.uint8)
    last = max(0, flat.size - _SAMPLE_NBYTES)
    starts = dict.fromkeys((last // 6, last // 2, last * 5 // 6))  # one, of a small array
    sample = b"".join(flat[start : start + _SAMPLE_NBYTES].tobytes() for start in starts)
    return 1 - len(zlib.compress(sample, 1)) / len(sample) if sample else 0.0
