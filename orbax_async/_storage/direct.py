"""Bytes read straight from files: the values of a local OCDBT database, and ranges of any file.

TensorStore decodes the database's index, which carries checksums of its own; the index says in
which file and where each value lies. What is read from there goes into the reader's own memory
without a copy in between, and is verified block by block as it arrives.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from orbax_async._storage import codecs, zarr
from orbax_async._storage.directory import Capability, Directory

_GAP_NBYTES = 64 << 10  # values closer to each other are read in one go
_RUN_NBYTES = 8 << 20


class Extent(NamedTuple):
    """Where a value lies."""

    path: str
    offset: int
    nbytes: int


class DirectReader:
    """The values of one database as it is now; for one operation, on any thread.

    The directory has `Capability.MAP`. TensorStore starts to read the index, beside what else there
    is to do until a value is asked for. What keeps the index from being read is raised then.

    Raises:
      ValueError: the index is damaged, or of a kind that TensorStore alone reads.
      FileNotFoundError: the index is not all there.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._base = ts.KvStore.open(
            directory.kvstore(), context=ts.Context({"file_io_concurrency": {"limit": 1}})
        ).result()
        self._root: Any = None
        with contextlib.suppress(Exception):
            self._root = self._read_root()

    def _read_root(self) -> Any:
        versions = ts.ocdbt.dump(self._base).result()["versions"]
        location = versions[-1]["root"].get("location") if versions else None
        return ts.ocdbt.dump(self._base, location) if location else None

    @functools.cached_property
    def _entries(self) -> dict[str, bytes | str]:
        found: dict[str, bytes | str] = {}
        node, prefix = self._root or self._read_root(), b""
        below: list[tuple[str, bytes]] = []
        while node is not None:
            entries = node.result()["entries"]
            if entries and "location" in entries[0]:
                below += [
                    (entry["location"], prefix + entry["subtree_common_prefix"])
                    for entry in entries
                ]
            else:
                found |= {
                    (prefix + entry["key"]).decode(): entry["inline_value"]
                    if "inline_value" in entry
                    else entry["indirect_value"]
                    for entry in entries
                }
            location, prefix = below.pop() if below else (None, b"")
            node = ts.ocdbt.dump(self._base, location) if location else None
        self._root = None
        return found

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each value, by key."""
        return {
            key: len(value) if isinstance(value, bytes) else _extent(value).nbytes
            for key, value in self._entries.items()
        }

    def values(self, keys: Sequence[str]) -> list[bytes | memoryview | None]:
        """Returns whole values, None for each key that is absent; neighbours are read together."""
        found = [self._entries.get(key) for key in keys]
        where = [
            (*_located(value), index) for index, value in enumerate(found) if isinstance(value, str)
        ]
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

        Args:
          name: the array's stored name.
          layout: how it lies in its chunks.
          region: the box, start and stop for each axis.
          target: an array of the box's shape and the stored dtype, in C order.

        Returns:
          False where the chunks' checksums are of a kind that only TensorStore verifies; the
          target is then untouched.

        Raises:
          FileNotFoundError: a chunk is missing.
          ValueError: bytes do not match their checksum, or are too few.
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
            chunks.append((_extent(location), sums, within_chunk, within_target))
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


def _read_run(
    file: io.RawIOBase, offset: int, run: tuple[int, int, int], sums: Any, into: memoryview
) -> None:
    """I12: reads a run of a chunk's bytes, whole checksum blocks at a time.

    Args:
      file: where the chunk lies.
      offset: of its first byte.
      run: the first byte to read, the one after the last, and how many the chunk has.
      sums: the checksums of its blocks, None where it has none.
      into: as long as the run.
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
        count = file.readinto(into[done:])
        if not count:
            raise ValueError(f"{done} bytes found, {len(into)} expected")
        done += count


def _extent(location: str) -> Extent:
    return Extent(*_located(location))


def _located(location: str) -> tuple[str, int, int]:
    """Reads `value:<directory>:<file>:<offset>:<nbytes>`, as TensorStore writes a location."""
    _, base, path, offset, nbytes = location.split(":")
    return _file(base, path), int(offset), int(nbytes)


@functools.lru_cache(maxsize=256)
def _file(base: str, path: str) -> str:
    """I14: returns a file's name below the database."""
    name = urllib.parse.unquote(base) + urllib.parse.unquote(path)
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"its index names a file outside of it: {name}")
    return name


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
