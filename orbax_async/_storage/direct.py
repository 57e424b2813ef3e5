"""Bytes read straight from files: the values of a local OCDBT database, and ranges of any file.

The database's index says in which file and where each value lies. What is read from there goes into
the reader's own memory without a copy in between, and is verified block by block as it arrives.
"""

from __future__ import annotations

import errno
import functools
import io
import itertools
import json
import os
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorstore as ts

from orbax_async import _names as names
from orbax_async._storage import codecs, zarr
from orbax_async._storage.directory import Capability, Directory

_GAP_NBYTES = 64 << 10  # values closer to each other are read in one go
_RUN_NBYTES = 8 << 20
MAX_VALUE_NBYTES = 64 << 20
"""The most that is read as one value: a document, checksums, a small array."""

_NUMBERED = re.compile("manifest\\.[0-9a-f]{16}")
_MANIFEST, _NODE = bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de")
_HEAD_NBYTES = 18  # of a record that holds nothing
_FIRST_NBYTES = 256 << 10  # of a record are read before it is known how long it is
_MAX_RECORD_NBYTES = 512 << 20
_SMALL_NBYTES = 1024  # as long a CRC-32C is computed here, in less than a call of TensorStore
_SMALL_NODE_NBYTES, _MOST_EXPANSION = 16 << 20, 256  # more times the bytes than keys ever make
_MOST_BITS = 63
_ZSTD = bytes.fromhex("28b52ffd")
_RLE, _COMPRESSED = 1, 2
_MAX_BLOCK_NBYTES = 128 << 10
_HAS_DIGEST = 4
_EMPTY_LAST_BLOCK = bytes.fromhex("010000")

_Located: TypeAlias = tuple[str, int, int]  # a file, an offset in it, and a length
_Branch: TypeAlias = tuple[_Located, str, bytes, int]  # a node, its directory, prefix and height


class Extent(NamedTuple):
    """Where a value lies."""

    path: str
    offset: int
    nbytes: int


class DirectReader:
    """The values of one database as it is now; for one operation, on any thread.

    The directory has `Capability.MAP`. The index is read when a value is asked for first.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    @functools.cached_property
    def _entries(self) -> dict[str, bytes | _Located]:
        """Each value by its key, or where it lies."""
        return _Index(self._directory).entries()

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each value, by key."""
        return {
            key: len(value) if isinstance(value, bytes) else value[2]
            for key, value in self._entries.items()
        }

    def values(self, keys: Sequence[str]) -> list[bytes | memoryview | None]:
        """Returns whole values, None for each key that is absent; neighbours are read together."""
        found = [self._entries.get(key) for key in keys]
        where = [(*value, index) for index, value in enumerate(found) if isinstance(value, tuple)]
        for key, value in zip(keys, found, strict=True):
            if isinstance(value, tuple) and value[2] > MAX_VALUE_NBYTES:
                raise ValueError(
                    f"{value[2]} bytes found in {key}, at most {MAX_VALUE_NBYTES} expected"
                )
        values: list[Any] = found
        where.sort()
        for run in _runs(where):
            path, first, _, _ = run[0]
            end = run[-1][1] + run[-1][2]
            data = bytearray(end - first)
            with open_file(self._directory, path) as file:
                read_into(file, first, memoryview(data))
            view = memoryview(data).toreadonly()
            for _, offset, nbytes, index in run:
                values[index] = view[offset - first : offset - first + nbytes]
        return values

    def has_region(
        self, name: str, layout: zarr.RawLayout, region: Sequence[tuple[int, int]]
    ) -> bool:
        """Says whether every chunk that a region meets is there."""
        return all(
            zarr.chunk_key(name, index, zarr3=layout.zarr3) in self._entries
            for index, _, _ in _parts(region, layout.chunk_shape)
        )

    def read_region(
        self,
        name: str,
        layout: zarr.RawLayout,
        region: Sequence[tuple[int, int]],
        target: np.ndarray[Any, Any],
    ) -> bool:
        """Reads a box of an array whose chunks hold its elements as they are.

        False where only TensorStore verifies the chunks' checksums; the target is untouched then.
        """
        parts = list(_parts(region, layout.chunk_shape))
        chunks = []
        for index, within_chunk, within_target in parts:
            key = zarr.chunk_key(name, index, zarr3=layout.zarr3)
            location = self._entries.get(key)
            if location is None:
                raise FileNotFoundError("its data is missing from the checkpoint")
            sums = None
            if layout.has_crc32c:
                (sums,) = self.values([zarr.checksums_key(name, index)])
            if isinstance(location, bytes) or (layout.has_crc32c and sums is None):
                return False
            chunks.append((Extent(*location), sums, within_chunk, within_target))
        for extent, sums, within_chunk, within_target in chunks:
            into = target[within_target] if within_target else target
            self._read_part(extent, sums, layout, within_chunk, into)
        return True

    def _read_part(
        self,
        extent: Extent,
        sums: Any,
        layout: zarr.RawLayout,
        box: tuple[slice, ...],
        into: np.ndarray[Any, Any],
    ) -> None:
        """Reads a box of one chunk; one that is a single run of bytes straight into place."""
        dtype, chunk_shape = into.dtype, layout.chunk_shape
        nbytes = dtype.itemsize
        for side in chunk_shape:
            nbytes *= side
        if extent.nbytes != nbytes + (4 if layout.has_crc32c else 0):
            raise ValueError(f"{extent.nbytes} bytes found, {nbytes} expected")
        first = last = 0
        for each, side in zip(box, chunk_shape, strict=True):
            first = first * side + each.start
            last = last * side + each.stop - 1
        start, stop = first * dtype.itemsize, (last + 1) * dtype.itemsize
        with open_file(self._directory, extent.path) as file:
            if stop - start != into.nbytes:  # not one run: the whole chunk, and the box out of it
                whole = np.empty(chunk_shape, dtype)
                _read_run(file, extent.offset, (0, nbytes, nbytes), sums, bytes_of(whole))
                into[...] = whole[box]
                return
            run = into if into.flags.c_contiguous else np.empty(into.shape, dtype)
            _read_run(file, extent.offset, (start, stop, nbytes), sums, bytes_of(run))
            if run is not into:
                into[...] = run


class _Index:
    """Reads the index of a database: a manifest, and below it a B-tree of nodes.

    Each is a record with a checksum, and mostly compressed. TensorStore verifies and decompresses
    records; what they say is read here. I14: memory is taken as far as bytes are really there.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._entries: dict[str, bytes | _Located] = {}
        self._seen: set[_Located] = set()
        self._context = ts.Context()  # whose memory goes with it

    def entries(self) -> dict[str, bytes | _Located]:
        """Reads all of it."""
        try:
            pending = self._root()
            while pending:
                location, base, prefix, height = pending.pop()
                if location in self._seen:
                    raise ValueError("its index is damaged: a node is in it twice")
                self._seen.add(location)
                pending += self._read_node(location, base, prefix, height)
        except IndexError:
            raise ValueError("its index is damaged: a record is cut off") from None
        return self._entries

    def _root(self) -> list[_Branch]:
        """Returns the node at the top, if there is any."""
        fields, is_numbered = self._manifest(names.OCDBT_MANIFEST)
        if is_numbered:  # each version has a manifest of its own, and a number
            entries = [entry.name for entry in self._directory.entries()]
            fields, _ = self._manifest(max(filter(_NUMBERED.fullmatch, entries), default=""))
        files = _files(fields, "")
        (count,) = fields.numbers(1)  # of versions, the last one being the newest
        fields.numbers(count)  # generations
        heights = fields.take(count)
        file, offset, nbytes, keys = fields.numbers(4 * count)[count - 1 :: count] or [0] * 4
        if not keys:
            return []
        base, path = files[file]
        return [((path, offset, nbytes), base, b"", heights[-1])]

    def _manifest(self, name: str) -> tuple[_Fields, bool]:
        """Returns what follows a manifest's settings, and whether others with numbers are newer."""
        fields = _Fields(self._body(name, 0, None, _MANIFEST))
        fields.take(16)  # its name
        kind, _, _, _, compression = fields.numbers(5)
        if kind > 1:
            raise ValueError("its index is of a kind that is not known here")
        if compression:
            fields.take(4)  # its level
        return fields, kind == 1

    def _read_node(
        self, location: _Located, base: str, prefix: bytes, height: int
    ) -> list[_Branch]:
        """Adds the values of a leaf; returns the nodes below another."""
        path, offset, nbytes = location
        fields = _Fields(self._body(path, offset, nbytes, _NODE))
        if fields.take(1)[0] != height:
            raise ValueError("its index is damaged: a node has another height than it should")
        files = _files(fields, base)
        (count,) = fields.numbers(1)
        shared = [0, *fields.numbers(count - 1)][:count]
        lengths = fields.numbers(count)
        common = fields.numbers(count) if height else []
        keys, key = [], b""
        for kept, suffix in zip(shared, fields.pieces(lengths), strict=True):
            key = key[:kept] + suffix
            keys.append(key)
        if height:
            below = zip(*(fields.numbers(count) for _ in range(3)), strict=True)
            return [
                ((files[file][1], offset, nbytes), files[file][0], prefix + key[:kept], height - 1)
                for key, kept, (file, offset, nbytes) in zip(keys, common, below, strict=True)
            ]
        lengths, kinds = fields.numbers(count), fields.take(count)
        elsewhere = kinds.count(1)
        if elsewhere + kinds.count(0) != count:
            raise ValueError("its index is damaged: a value lies nowhere")
        paths = [files[file][1] for file in fields.numbers(elsewhere)]
        offsets = fields.numbers(elsewhere)
        places = zip(paths, offsets, itertools.compress(lengths, kinds), strict=True)
        inside = fields.pieces([0 if kind else n for kind, n in zip(kinds, lengths, strict=True)])
        for key, kind, value in zip(keys, kinds, inside, strict=True):
            self._entries[(prefix + key).decode()] = next(places) if kind else value
        return []

    def _body(self, path: str, offset: int, nbytes: int | None, magic: bytes) -> bytes:
        """Returns what a record holds, once its checksum is verified; None for a whole file."""
        record = self._directory.read(path, offset, min(nbytes or _FIRST_NBYTES, _FIRST_NBYTES))
        if record is None:
            path = (self._directory / path).path
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        length = int.from_bytes(record[4:12], "little")
        is_record = record[:4] == magic and _HEAD_NBYTES <= length <= _MAX_RECORD_NBYTES
        if not is_record or nbytes not in (length, None):
            raise ValueError(f"its index is damaged: no record is at byte {offset} of {path}")
        if length > len(record):
            record = self._directory.read(path, offset, nbytes or length + 1) or b""
        if len(record) != length or not self._has_checksum(record):
            raise ValueError(f"its index is damaged: a checksum does not match in {path}")
        version, compression, body = record[12], record[13], record[14:-4]
        if version != 0 or compression > 1:
            raise ValueError(f"its index is of a kind that is not known here: {path}")
        return self._decompressed(body) if compression else body

    def _has_checksum(self, record: bytes) -> bool:
        """Says whether the CRC-32C at the end of a record is that of what is before."""
        nbytes = len(record) - 4
        if nbytes <= _SMALL_NBYTES:
            table, crc = _crc32c_table(), 0xFFFFFFFF
            for byte in record[:-4]:
                crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
            return (crc ^ 0xFFFFFFFF).to_bytes(4, "little") == record[-4:]
        self._memory["record/c/0"] = record
        document = zarr.array_document((nbytes,), (nbytes,), "uint8", "raw", zarr3=True)
        array = ts.open(
            {"driver": "zarr3", "metadata": json.loads(document)},
            kvstore=self._memory / "record/",
            open=True,
            assume_metadata=True,
            context=self._context,
        ).result()
        try:
            array[:1].read().result()
        except ValueError:
            return False
        return True

    def _decompressed(self, frame: bytes) -> bytes:
        """Decompresses a zstd frame as the only entry of a zip archive, which has a bound.

        The result may have zeros at its end, where the frame does not say how long it is.
        """
        frame, nbytes = _bounded_frame(frame)
        self._memory["zip"] = _zip_archive(frame, nbytes)
        base = {"driver": "memory", "path": "zip"}
        archive = ts.KvStore.open({"driver": "zip", "base": base}, context=self._context).result()
        return archive.read("x").result().value

    @functools.cached_property
    def _memory(self) -> ts.KvStore:
        return ts.KvStore.open("memory://", context=self._context).result()


class _Fields:
    """Reads the fields of a record, one after the other; what is not there is an IndexError."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, nbytes: int) -> bytes:
        """Returns some bytes."""
        end = self._at + nbytes
        if end > len(self._data):
            raise IndexError
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def pieces(self, lengths: Sequence[int]) -> list[bytes]:
        """Returns bytes of these lengths."""
        data, end, found = self._data, self._at, []
        for length in lengths:
            start, end = end, end + length
            found.append(data[start:end])
        if end > len(data):
            raise IndexError
        self._at = end
        return found

    def numbers(self, count: int) -> list[int]:
        """Returns numbers, each of seven bits a byte, the lowest first."""
        data, at = self._data, self._at
        if count > len(data) - at:
            raise IndexError
        short = data[at : at + max(count, 0)]
        if not short or max(short) < 128:
            self._at = at + len(short)
            return list(short)
        found = []
        for _ in range(count):
            value, shift = data[at] & 127, 0
            while data[at] > 127:
                at += 1
                shift += 7
                value |= (data[at] & 127) << shift
                if shift > _MOST_BITS:
                    raise IndexError
            at += 1
            found.append(value)
        self._at = at
        return found


def _files(fields: _Fields, base: str) -> list[tuple[str, str]]:
    """I14: reads a table of files below the database: of each its directory and its path."""
    (count,) = fields.numbers(1)
    shared = [0, *fields.numbers(count - 1)][:count]
    lengths, bases = fields.numbers(count), fields.numbers(count)
    files, path = [], b""
    for kept, suffix, of_base in zip(shared, fields.pieces(lengths), bases, strict=True):
        path = path[:kept] + suffix
        name = base + path.decode()
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"its index names a file outside of it: {name}")
        files.append((base + path[:of_base].decode(), name))
    return files


def _bounded_frame(frame: bytes) -> tuple[bytes, int]:
    """I14: returns a zstd frame (RFC 8878), and how many bytes to decompress of it.

    A frame that says how long it is stays as it is. Of another the blocks bound it; zeros are put
    after the last one, so that there is as much as the bound.
    """
    stored_nbytes, descriptor = len(frame), frame[4]
    is_single = descriptor >> 5 & 1
    size_nbytes = (is_single, 2, 4, 8)[descriptor >> 6]
    if frame[:4] != _ZSTD or descriptor & 3:
        raise ValueError("its index is damaged: a node is no zstd frame")
    at = 6 - is_single
    if size_nbytes:
        nbytes = int.from_bytes(frame[at : at + size_nbytes], "little")
        nbytes += 256 if size_nbytes == 2 else 0
    else:
        frame, nbytes = _filled_frame(frame)
    if nbytes > max(_SMALL_NODE_NBYTES, _MOST_EXPANSION * stored_nbytes):
        raise ValueError(f"its index is damaged: {nbytes} bytes in a node of {stored_nbytes}")
    return frame, nbytes


def _filled_frame(frame: bytes) -> tuple[bytes, int]:
    """Returns a frame with as many zeros behind its blocks as they may hold, and that number."""
    descriptor, window = frame[4], frame[5]
    longest = min(_MAX_BLOCK_NBYTES, (8 + (window & 7)) << 7 + (window >> 3))
    at, nbytes, is_last = 6, 0, 0
    while not is_last:
        last, header = at, int.from_bytes(frame[at : at + 3], "little")
        is_last, kind, size = header & 1, header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == _RLE else size)
        nbytes += longest if kind == _COMPRESSED else min(size, longest)
        if at > len(frame):
            raise IndexError
    zeros = (_RLE << 1 | longest << 3).to_bytes(3, "little") + b"\0"
    parts = [
        *(_ZSTD, bytes([descriptor & ~_HAS_DIGEST, window])),
        *(frame[6:last], bytes([frame[last] & ~1]), frame[last + 1 : at]),
        *(zeros * -(-nbytes // longest), _EMPTY_LAST_BLOCK),
    ]
    return b"".join(parts), nbytes


def _zip_archive(frame: bytes, nbytes: int) -> bytes:
    """Returns a zip archive of one zstd frame, the entry `x`."""
    method, name = 93, b"x"
    sizes = struct.pack("<2L", len(frame), nbytes)
    about = struct.pack("<2H8x", 0, method) + sizes
    local = b"PK\3\4" + struct.pack("<H", 63) + about + struct.pack("<2H", len(name), 0) + name
    entry = b"PK\1\2" + struct.pack("<2H", 63, 63) + about
    entry += struct.pack("<H16x", len(name)) + name
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, len(entry), len(local) + len(frame), 0)
    return b"".join([local, frame, entry, end])


@functools.cache
def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [each >> 1 ^ (0x82F63B78 if each & 1 else 0) for each in table]
    return table


def _read_run(
    file: io.RawIOBase, offset: int, run: tuple[int, int, int], sums: Any, into: memoryview
) -> None:
    """I12: reads a run of a chunk's bytes, whole checksum blocks at a time.

    A run is its first byte, the one after its last, and the number of bytes that the chunk has.
    """
    start, stop, nbytes = run
    if sums is None:
        read_into(file, offset + start, into)
        return
    block = codecs.CHECKSUM_BLOCK
    expected = np.frombuffer(sums, "<u4")
    for index in range(start // block, -(-stop // block)):
        first, last = index * block, min((index + 1) * block, nbytes)
        is_inside = start <= first and last <= stop
        data = (
            into[first - start : last - start] if is_inside else memoryview(bytearray(last - first))
        )
        read_into(file, offset + first, data)
        if codecs.checksum(data) != expected[index]:
            raise ValueError(f"bytes {first} to {last} of a chunk do not match their checksum")
        if not is_inside:
            low, high = max(first, start), min(last, stop)
            into[low - start : high - start] = data[low - first : high - first]


def open_file(directory: Directory, name: str) -> io.RawIOBase:
    """Opens a file for `read_into`; a local one without a copy in between."""
    if directory.can(Capability.MAP):
        return open((directory / name).path, "rb", buffering=0)
    return _Ranges(directory, name)


class _Ranges(io.RawIOBase):
    """A file of which each read is a request for a range."""

    def __init__(self, directory: Directory, name: str) -> None:
        self._directory = directory
        self._name = name
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._at = offset
        return offset

    def readinto(self, into: Any) -> int:
        data = self._directory.read(self._name, self._at, len(into))
        if data is None:
            path = (self._directory / self._name).path
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_into(file: io.RawIOBase, offset: int, into: memoryview) -> None:
    """Reads as many bytes as fit; raises ValueError where the file ends before."""
    file.seek(offset)
    done = 0
    while done < len(into):
        try:
            count = file.readinto(into[done:])
        except OSError as error:
            error.filename = error.filename or getattr(file, "name", None)
            raise
        if not count:
            raise ValueError(f"{done} bytes found, {len(into)} expected")
        done += count


def _runs(where: list[tuple[str, int, int, int]]) -> Iterable[list[tuple[str, int, int, int]]]:
    """Groups sorted extents of one file that lie close to each other."""
    run: list[tuple[str, int, int, int]] = []
    end = 0
    for each in where:
        path, offset, nbytes, _ = each
        if run and (
            path != run[0][0]
            or offset > end + _GAP_NBYTES
            or offset + nbytes > run[0][1] + _RUN_NBYTES
        ):
            yield run
            run = []
        run.append(each)
        end = offset + nbytes
    if run:
        yield run


def _parts(
    region: Sequence[tuple[int, int]], chunk_shape: Sequence[int]
) -> Iterable[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
    """Yields each chunk that a region meets: its index, and the overlap within both."""
    axes = []
    for (start, stop), side in zip(region, chunk_shape, strict=True):
        axis = []
        for index in range(start // side, -(-stop // side)):
            low, high = max(start, index * side), min(stop, (index + 1) * side)
            within_chunk = slice(low - index * side, high - index * side)
            axis.append((index, within_chunk, slice(low - start, high - start)))
        axes.append(axis)
    for combined in itertools.product(*axes):
        yield (
            tuple(index for index, _, _ in combined),
            tuple(within for _, within, _ in combined),
            tuple(within for _, _, within in combined),
        )


def bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """Returns the bytes of an array that lies in C order."""
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)
