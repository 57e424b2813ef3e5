"""Safetensors files: their headers, and their tensors, read straight from them.

A file is the length of its header, eight bytes, little endian; the header, JSON that says of each
tensor its dtype, its shape, and where after the header its bytes begin and end; and those bytes,
in C order and little endian, without any checksum. A model may be divided over several files of one
directory; then an index, if there is one, says which file holds which tensor.
"""

from __future__ import annotations

import collections
import errno
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._storage import zarr
from orbax_async._storage.direct import Extent, bytes_of, open_file, read_into
from orbax_async._storage.directory import Directory, damage_in, read_json

_LENGTH_NBYTES = 8
_HEADER_NBYTES = 100_000_000  # the most that other readers accept, too
_GAP_NBYTES = 16 << 10  # to read on over a gap costs less, up to here, than to begin again
_SPAN_NBYTES = 256 << 10  # of memory for what is read together, which no budget counts
_SPAN_PIECES = 4096

_DTYPES = {
    name: zarr.dtype_named(dtype)
    for name, dtype in {
        **{"BOOL": "bool", "C64": "complex64", "BF16": "bfloat16"},
        **{"F16": "float16", "F32": "float32", "F64": "float64"},
        **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
        **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
        **{"F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz"},
        **{"F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
        "F8_E8M0": "float8_e8m0fnu",
    }.items()
}


class Tensor(NamedTuple):
    """One tensor, and where its bytes lie."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    extent: Extent


class Contents(NamedTuple):
    """What lies in files of a directory: tensors by name, and texts that were saved beside them."""

    directory: Directory
    files: list[str]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def find(at: Directory) -> list[str]:
    """Returns the paths of the safetensors files at a path: itself, or those in the directory."""
    directory, files = _find(at)
    return [(directory / name).path for name in files]


def _find(at: Directory) -> tuple[Directory, list[str]]:
    status = at.status(follow_links=True)
    if status is not None and status.kind == "file":
        return at.parent, [at.name] if at.name.endswith(names.SAFETENSORS) else []
    # A link to nothing is a part that is missing, as the opening of it will say.
    return at, [
        name
        for name, is_directory in at.entries()
        if name.endswith(names.SAFETENSORS) and not is_directory
    ]


def read_headers(at: Directory) -> Contents:
    """Reads and checks what the files at a path say that they hold; blocks."""
    directory, files = _find(at)
    contents = Contents(directory, files, {}, {})
    if not files:
        raise errors.InvalidLayoutError(f"{at.path} holds no {names.SAFETENSORS} files")
    index = _read_index(at)
    for file in files:
        tensors, metadata = _read_header(directory, file)
        contents.metadata.update(metadata)
        for tensor in tensors:
            other = contents.tensors.setdefault(tensor.name, tensor)
            if other is tensor:
                continue
            if index.get(tensor.name) == file:
                contents.tensors[tensor.name] = tensor
            elif tensor.name not in index:
                raise errors.InvalidLayoutError(
                    f"Duplicate tensor {tensor.name!r} found in multiple files: "
                    f"{(directory / other.extent.path).path} and {(directory / file).path}. Move "
                    "away the file that does not belong here, or load one by its own path."
                )
    for name, file in index.items():
        found = contents.tensors.get(name)
        if found is None or found.extent.path != file:
            what = (
                f"has no tensor {name!r}"
                if file in files
                else f"is missing, and with it the tensor {name!r}"
            )
            raise errors.InvalidLayoutError(
                f"{(directory / file).path} {what}, which the index of the files says it holds"
            )
    return contents


def find_damage(at: Directory) -> list[tuple[str, Exception]]:
    """Returns what keeps the headers at a path from being read: by file, or else by the path."""
    damage: list[tuple[str, Exception]] = []
    directory, files = _find(at)
    for file in files:
        try:
            _read_header(directory, file)
        except (errors.InvalidLayoutError, OSError) as error:
            damage.append(((directory / file).path, error))
    if not damage:
        try:
            read_headers(at)
        except errors.InvalidLayoutError as error:
            damage.append((at.path, error))
    return damage


def _read_index(at: Directory) -> dict[str, str]:
    """Returns which file holds which tensor, where a directory has an index."""
    merged: dict[str, str] = {}
    for name, _ in at.entries():
        if name.endswith(names.SAFETENSORS_INDEX):
            with damage_in((at / name).path):
                found = read_json(at, name)["weight_map"]
                merged |= {tensor: found[tensor].rpartition("/")[2] for tensor in found}
    return merged


def _read_header(directory: Directory, file: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Returns the tensors of one file in the order of its header, and its metadata."""
    path = (directory / file).path
    status = directory.status(file, follow_links=True)
    size = _LENGTH_NBYTES if status is None else status.nbytes
    if size < _LENGTH_NBYTES:  # a pipe has none, and would be waited for
        raise _damaged(path, f"it has {size} bytes, fewer than the length of its header takes")
    length = directory.read(file, 0, _LENGTH_NBYTES)
    if status is None or length is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    start = _LENGTH_NBYTES + int.from_bytes(length, "little")
    if start > min(size, _LENGTH_NBYTES + _HEADER_NBYTES):
        raise _damaged(path, f"it has {size} bytes; its header should end at byte {start}")
    data = directory.read(file, _LENGTH_NBYTES, start - _LENGTH_NBYTES)
    try:
        header = json.loads(data or b"", object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header can't be read: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}, not a dict")
    metadata = header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        try:
            tensors.append(_tensor(name, entry, file, start, size))
        except ValueError as error:
            raise _damaged(path, f"tensor {name!r}: {error}") from None
    by_place = sorted(
        (tensor for tensor in tensors if tensor.extent.nbytes), key=lambda each: each.extent
    )
    for before, after in itertools.pairwise(by_place):
        if before.extent.offset + before.extent.nbytes > after.extent.offset:
            raise _damaged(path, f"the tensors {before.name!r} and {after.name!r} overlap")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _tensor(name: str, entry: Any, file: str, start: int, size: int) -> Tensor:
    """Reads a tensor's entry; raises ValueError where it is not what it should be."""
    try:
        kind, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_sound = isinstance(shape, list) and all(
            type(each) is int and each >= 0 for each in (*shape, first, end - first)
        )
    except (TypeError, KeyError, ValueError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{json.dumps(entry):.200} is no dtype, shape and data_offsets")
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise ValueError(f"its dtype {kind!r} is unknown; known are {', '.join(_DTYPES)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - first != nbytes:
        raise ValueError(f"{kind}{shape} takes {nbytes} bytes, and it has {end - first}")
    if start + end > size:
        raise ValueError(
            f"it should end at byte {start + end}, and the file is truncated at {size}"
        )
    return Tensor(name, dtype, tuple(shape), Extent(file, start + first, nbytes))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"it has two entries {counts.most_common(1)[0][0]!r}")
    return found


def _damaged(file: str, problem: str) -> errors.InvalidLayoutError:
    return errors.InvalidLayoutError.of_file(f"{file}: {problem}", file)


class TensorReader:
    """Reads tensors as a `DirectReader` reads arrays; for one operation, on any thread."""

    def __init__(
        self,
        directory: Directory,
        tensors: Mapping[str, Tensor],
        *,
        max_over_read_ratio: float | None = None,
        read_chunk_nbytes: int | None = None,
    ) -> None:
        self._directory = directory
        self._tensors = tensors
        self._keys = {
            zarr.chunk_key(name, [0] * len(tensor.shape), zarr3=True): tensor
            for name, tensor in tensors.items()
        }
        self._ratio = max_over_read_ratio
        self._chunk_nbytes = read_chunk_nbytes

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each tensor, by the key of its only chunk."""
        return {key: tensor.extent.nbytes for key, tensor in self._keys.items()}

    def values(self, keys: Sequence[str]) -> list[bytes | memoryview | None]:
        """Returns the bytes of whole tensors; neighbours are read together."""
        wanted = sorted((self._keys[key].extent, index) for index, key in enumerate(keys))
        values = [memoryview(b"")] * len(keys)
        for name, of_file in itertools.groupby(wanted, key=lambda each: each[0].path):
            pieces = []
            for extent, index in of_file:
                values[index] = memoryview(bytearray(extent.nbytes))
                pieces.append((extent.offset, values[index]))
            self._read(name, pieces)
        return list(values)

    def has_region(
        self, name: str, layout: zarr.RawLayout, region: Sequence[tuple[int, int]]
    ) -> bool:
        """Says that a region is there, as the header has been checked."""
        return True

    def read_region(
        self,
        name: str,
        layout: zarr.RawLayout,
        region: Sequence[tuple[int, int]],
        target: np.ndarray[Any, Any],
    ) -> bool:
        """Reads a box of a tensor into an array of its shape and dtype, in C order."""
        tensor, into = self._tensors[name], bytes_of(target)
        offsets, nbytes = _runs(tensor, region)
        places = range(0, len(into), nbytes)
        pieces = (
            (offset, into[at : at + nbytes]) for offset, at in zip(offsets, places, strict=True)
        )
        self._read(tensor.extent.path, pieces)
        return True

    def _read(self, name: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Reads pieces of a file, in the order in which they lie there, each into its place."""
        with open_file(self._directory, name) as file:
            for span in self._spans(pieces):
                first, into = span[0]
                if len(span) == 1:
                    step = self._chunk_nbytes or len(into)
                    for start in range(0, len(into), step):
                        read_into(file, first + start, into[start : start + step])
                    continue
                last, end = span[-1]
                data = memoryview(bytearray(last + len(end) - first))
                read_into(file, first, data)
                for offset, into in span:
                    into[:] = data[offset - first : offset - first + len(into)]

    def _spans(
        self, pieces: Iterable[tuple[int, memoryview]]
    ) -> Iterator[list[tuple[int, memoryview]]]:
        """Groups pieces that are read together."""
        limit = min(self._chunk_nbytes or _SPAN_NBYTES, _SPAN_NBYTES)
        span: list[tuple[int, memoryview]] = []
        needed = end = 0
        for offset, into in pieces:
            if span:
                nbytes = offset + len(into) - span[0][0]
                is_near = (
                    offset - end <= _GAP_NBYTES
                    if self._ratio is None
                    else nbytes <= self._ratio * (needed + len(into))
                )
                if not is_near or nbytes > limit or len(span) == _SPAN_PIECES:
                    yield span
                    span, needed = [], 0
            span.append((offset, into))
            needed += len(into)
            end = offset + len(into)
        if span:
            yield span


def _runs(tensor: Tensor, region: Sequence[tuple[int, int]]) -> tuple[Iterable[int], int]:
    """Returns where the runs of bytes that make up a box begin in the file, and their length."""
    nbytes = stride = tensor.dtype.itemsize
    first, steps = tensor.extent.offset, []
    is_run = True  # whether the axes that are yet to come divide what is one run so far
    for (start, stop), side in zip(reversed(region), reversed(tensor.shape), strict=True):
        if is_run:
            first += start * stride
            nbytes = (stop - start) * stride
        else:
            steps.append(range(start * stride, stop * stride, stride))
        is_run = is_run and (start, stop) == (0, side)
        stride *= side
    starts: Iterable[int] = [first]
    for each in reversed(steps):
        starts = _stepped(starts, each)
    return starts, nbytes


def _stepped(starts: Iterable[int], steps: range) -> Iterator[int]:
    # One after the other: there may be as many runs as the tensor has elements.
    return (start + step for start in starts for step in steps)
