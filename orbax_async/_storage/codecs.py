"""How the bytes of a chunk are encoded, and their checksums.

Each encoding has a checksum that every zarr reader verifies (invariant I12). A new one is an entry
of `CODECS` here, and a case of the choice between them in `_engine`.
"""

from __future__ import annotations

import functools
import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Encoding = Literal["stored", "raw", "zstd"]


class Codec(NamedTuple):
    """How an array's document names an encoding."""

    zarr3: tuple[Mapping[str, Any], ...]  # what follows the elements' bytes
    zarr2: Mapping[str, Any]  # zarr v2 has neither a CRC-32C nor a zstd checksum


CODECS: dict[Encoding, Codec] = {
    # One gzip member at level 0, with its CRC-32: small arrays, encoded here, one call each.
    "stored": Codec(({"name": "gzip", "configuration": {"level": 0}},), {"id": "gzip", "level": 0}),
    # The elements followed by a CRC-32C: large arrays, encoded by TensorStore.
    "raw": Codec(({"name": "crc32c"},), {"id": "gzip", "level": 0}),
    # One zstd frame with a content checksum: large arrays that compress.
    "zstd": Codec(
        ({"name": "zstd", "configuration": {"level": 1, "checksum": True}},),
        {"id": "gzip", "level": 1},
    ),
}

CHECKSUM_BLOCK = 4 << 20
_PAGE_NBYTES = 4096
_SAMPLE_NBYTES = 4 << 10  # a piece; twice as much tells no more and takes four times as long
_GZIP = 31  # zlib's window-bits value for a gzip member
_GZIP_OR_ZLIB = 47  # and for either, by its header
_BLOCK_NBYTES = 65535  # the most that a block of bytes as they are holds
# A gzip member without name or time; its only block is the last one, of type 0.
_MEMBER_START = bytes.fromhex("1f8b08000000000000ff01")


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


def inflate(data: bytes | memoryview, nbytes: int) -> bytes:
    """I14: decodes a gzip member or a zlib stream, but no more of it than it should hold.

    Raises ValueError where it is damaged, or holds more.
    """
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        found = stream.decompress(data, nbytes + 1)
    except zlib.error as error:
        raise ValueError(f"checksum or framing error ({error})") from None
    if len(found) > nbytes:
        raise ValueError(f"more than {nbytes} bytes found, {nbytes} expected")
    if not stream.eof:
        raise ValueError("checksum or framing error (it is cut off)")
    return found


def have_checksum(codecs: Sequence[Mapping[str, Any]]) -> bool:
    """Says of codecs of zarr v3 whether one of them finds a flipped bit when it decodes."""
    for codec in codecs:
        settings = codec.get("configuration", {})
        match codec.get("name"):
            case "crc32c" | "gzip":
                return True
            case "zstd" if settings.get("checksum"):
                return True
            case "sharding_indexed" if have_checksum(settings.get("codecs", ())):
                return True
    return False


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
