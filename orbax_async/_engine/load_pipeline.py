"""Reading a tree's arrays: to place them on their devices, or to see whether they can be read.

A pipeline owns the only mutable state of a load: its batches, its memory and its budget. A batch
holds its share of the read budget from before it is read until its values are placed.

Memory that stays on the host, as what is loaded, is mapped before anything is read, and takes no
memory until then. Mapping waits for page faults in neighbouring memory, and with it everybody who
waits for the interpreter: the caller's loop, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import anyio
import jax
import numpy as np
import tensorstore as ts

from orbax_async import errors
from orbax_async._engine import loop, plan
from orbax_async._engine.budget import BatchSlots, ByteBudget
from orbax_async._engine.leaf import Piece
from orbax_async._engine.plan import ReadRequest
from orbax_async._engine.transfer import aligned_empty, free_nbytes, lies_on_host, place, send
from orbax_async._storage import zarr
from orbax_async._storage.array_store import ArrayStore, result_of
from orbax_async._trace import Recorder
from orbax_async.options import ArrayOptions
from orbax_async.tree import keypath
from orbax_async.tree.schema import Entry

_Broadcast = ArrayOptions.Loading.LoadAndBroadcastOptions

_VALUE_NBYTES = 64 << 10  # arrays up to this size are read as values, many at once
_PART_NBYTES = 64 << 20  # of a region that several workers read
_BATCH_NBYTES = 64 << 20  # of requests that are read together


@dataclasses.dataclass(eq=False)
class ArrayRead:
    """How arrays are read that are stored alike, and asked for alike.

    Attributes:
      document: the metadata document of their arrays.
      dtype: the dtype to load as.
      regions: what is read of each.
      view_dtype: the dtype that the stored elements stand for, where zarr has none for it.
      sharding: of a jax array; None for a host array.
      device_shardings: single-device shardings by device id, of a jax array on several devices.
      piece_shape: of each piece, where that is not what is stored: zeros fill it up.
      copies: by the id of a device, where its piece is sent from there.
      fills_missing: whether what is missing reads as the array's fill value.
      read_dtype: what to ask TensorStore for: a reinterpreted array is read as it is stored.
      whole: how a small array is decoded that is read as a value; None for others.
      raw: how its chunks lie in the store if they can be read in place; else None.
    """

    document: zarr.ArrayDocument
    dtype: np.dtype[Any]
    regions: Sequence[plan.Region] = ()
    view_dtype: np.dtype[Any] | None = None
    sharding: jax.sharding.Sharding | None = None
    device_shardings: Mapping[int, jax.sharding.Sharding] = dataclasses.field(default_factory=dict)
    piece_shape: tuple[int, ...] | None = None
    copies: Mapping[int, tuple[jax.sharding.Sharding, ...]] = dataclasses.field(
        default_factory=dict
    )
    fills_missing: bool = False

    def __post_init__(self) -> None:
        document = self.document
        self.read_dtype = self.dtype if self.view_dtype is None else document.dtype
        is_small = document.whole is not None and document.whole.nbytes <= _VALUE_NBYTES
        self.whole = document.whole if is_small else None
        self.raw = document.raw if self.read_dtype == document.dtype else None
        self.is_cast = self.view_dtype is not None or self.dtype != document.dtype
        # The key, below the array's own, of a small array's chunk.
        self.only_chunk = zarr.chunk_key("", [0] * len(document.shape), zarr3=document.zarr3)


class _ReadPipeline:
    """Reads arrays, and hands on what was read, batch by batch.

    Args:
      entries: of the leaves, by their index.
      reads: how each of them is read.
      store: where they are.
      read_budget: bytes that may be in flight.
      recorder: counts and times.
    """

    def __init__(
        self,
        entries: Mapping[int, Entry],
        reads: Mapping[int, ArrayRead],
        store: ArrayStore,
        *,
        read_budget: ByteBudget,
        recorder: Recorder,
    ) -> None:
        self._entries = entries
        self._reads = reads
        self._store = store
        self.read_budget = read_budget
        self._recorder = recorder
        self._mapped: dict[int, np.ndarray[Any, Any]] = {}  # by the id of the request
        self._filled: set[int] = set()  # the ids of requests that are read
        requests = [
            ReadRequest(leaf, region, region.nbytes)
            for leaf, read in reads.items()
            for region in read.regions
        ]
        limit = read_budget.limit_nbytes or _BATCH_NBYTES
        self._batches = list(plan.batches(requests, min(limit, _BATCH_NBYTES)))
        # A leaf counts as done with the batch that has the last of it.
        last = {each.leaf: index for index, batch in enumerate(self._batches) for each in batch}
        self._leaf_counts = Counter(last.values())
        self.nbytes = sum([request.nbytes for request in requests])
        self._recorder.add(leaves_planned=len(last), bytes_planned=self.nbytes)

    async def run(self) -> None:
        """Reads everything; the first failure cancels the rest."""
        slots = BatchSlots()

        async def read_batch(index: int, batch: list[ReadRequest]) -> None:
            nbytes = sum([request.nbytes for request in batch])
            async with slots.of(nbytes, len(batch)), self.read_budget.reserve(nbytes):
                for request in batch:
                    if request.nbytes > _PART_NBYTES:
                        await self._read_in_parts(request)
                await loop.to_worker(self._take, index, batch, nbytes)
            self._recorder.add(leaves_written=self._leaf_counts[index], bytes_written=nbytes)

        with errors.ungrouped():
            async with anyio.create_task_group() as group:
                for index, batch in enumerate(self._batches):
                    group.start_soon(read_batch, index, batch)

    def _take(self, index: int, batch: list[ReadRequest], nbytes: int) -> None:
        """Reads a batch, and does with it what the pipeline is for; blocks."""
        raise NotImplementedError

    async def _read_in_parts(self, request: ReadRequest) -> None:
        """Reads a large region on several workers, if it is of those that go straight in place."""
        entry, read = self._entries[request.leaf], self._reads[request.leaf]
        box, target = request.region.box, self._mapped.get(id(request))
        if target is None or read.raw is None or read.fills_missing:
            return
        parts = plan.rows(
            box, read.document.shape, read.raw.chunk_shape, target.itemsize, _PART_NBYTES
        )
        were_read: list[bool] = []

        async def read_part(part: plan.Box) -> None:
            into = target[plan.within(part, box)]
            with _naming(entry):
                were_read.append(await loop.to_worker(self._read_raw, entry.name, read, part, into))

        if len(parts) > 1:
            with errors.ungrouped():
                async with anyio.create_task_group() as group:
                    for part in parts:
                        group.start_soon(read_part, part)
            if all(were_read):
                self._filled.add(id(request))

    def _memory_for(self, request: ReadRequest) -> np.ndarray[Any, Any]:
        mapped = self._mapped.pop(id(request), None)
        if mapped is not None:
            return mapped
        dtype = self._reads[request.leaf].read_dtype
        return aligned_empty(plan.box_shape(request.region.box), dtype)

    def _read(self, batch: list[ReadRequest]) -> list[np.ndarray[Any, Any]]:
        """Reads the regions of a batch: small arrays as values, raw ones in place."""
        values = self._read_values(batch)
        arrays: list[np.ndarray[Any, Any]] = []
        pending: list[tuple[Entry, Any, Any]] = []
        for request in batch:
            entry, read = self._entries[request.leaf], self._reads[request.leaf]
            box = request.region.box
            try:
                if request.region.is_empty or id(request) in self._filled:
                    arrays.append(self._memory_for(request))
                    continue
                value = next(values) if read.whole is not None else None
                if value is not None:
                    arrays.append(_from_value(read, value, box))
                    continue
                if read.whole is not None and not read.fills_missing:
                    raise FileNotFoundError("its data is missing from the checkpoint")
                target = self._memory_for(request)
                if not self._read_raw(entry.name, read, box, target):
                    source = self._store.open_array(
                        entry.name,
                        read.document,
                        read.read_dtype,
                        box,
                        fills_missing=read.fills_missing,
                    )
                    begin = functools.partial(ts.array(target).write, source)
                    pending.append((entry, begin(), begin))
                arrays.append(target)
            except errors.LeafError:  # of another leaf, whose value is read together with this one
                raise
            except Exception as error:  # the quick way to do what `_naming` does
                raise _read_error(entry, error) from error
        for entry, begun, begin in pending:
            with _naming(entry):
                result_of(begun, begin)
        for index, request in enumerate(batch):
            read = self._reads[request.leaf]
            if read.is_cast:
                arrays[index] = _cast(read, arrays[index])
        return arrays

    def _read_values(self, batch: list[ReadRequest]) -> Iterator[bytes | memoryview | None]:
        """Yields the values of small arrays, and keeps none of them."""
        small: list[Entry] = []
        keys: list[str] = []
        for request in batch:
            entry, read = self._entries[request.leaf], self._reads[request.leaf]
            if read.whole is not None and not request.region.is_empty:
                small.append(entry)
                keys.append(f"{entry.name}/{read.only_chunk}" if entry.name else read.only_chunk)
        try:
            values = self._store.read_many(keys) if keys else []
        except Exception as error:
            for entry, key in zip(small, keys, strict=True):
                with _naming(entry):
                    self._store.read_many([key])
            raise _read_error(small[0], error) from error  # it has gone away
        values.reverse()
        while values:
            yield values.pop()

    def _read_raw(
        self, name: str, read: ArrayRead, box: plan.Box, target: np.ndarray[Any, Any]
    ) -> bool:
        """Reads a region without TensorStore where that is possible."""
        raw, direct = read.raw, self._store.direct
        return (
            raw is not None
            and direct is not None
            and (not read.fills_missing or direct.has_region(name, raw, box))
            and direct.read_region(name, raw, box, target)
        )


class LoadPipeline(_ReadPipeline):
    """Reads arrays, and places them on their devices; `broadcast` limits what these send on."""

    def __init__(self, *args: Any, broadcast: _Broadcast, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._broadcast_options = broadcast
        self._broadcasting = threading.Lock()  # on workers: one batch at a time
        self._placed: dict[int, tuple[list[int], list[Piece]]] = {}  # by the index of the batch

    def map_memory(self) -> None:
        """Maps the memory that stays on the host; blocks."""
        for request in itertools.chain.from_iterable(self._batches):
            read = self._reads[request.leaf]
            if read.whole is None and (read.sharding is None or lies_on_host(read.sharding)):
                try:
                    self._mapped[id(request)] = self._memory_for(request)
                except MemoryError as error:
                    raise _read_error(self._entries[request.leaf], error) from error

    @functools.cached_property
    def pieces(self) -> dict[int, list[Piece]]:
        """What was read by leaf: a host array, a jax array on one device, or a leaf's shards."""
        pieces: dict[int, list[Piece]] = {}
        for _, placed in sorted(self._placed.items()):
            for leaf, piece in zip(*placed, strict=True):
                pieces.setdefault(leaf, []).append(piece)
        return pieces

    def _take(self, index: int, batch: list[ReadRequest], nbytes: int) -> None:
        with self._recorder.span("read", nbytes):
            arrays = self._read(batch)
        with self._recorder.span("place", nbytes):
            leaves, pieces, wheres = self._divide(batch, arrays)
            placed = place(pieces, wheres)
        if any([self._reads[leaf].copies for leaf in leaves]):
            self._broadcast(leaves, placed)
        self._placed[index] = leaves, placed

    def _divide(
        self, batch: Sequence[ReadRequest], arrays: Sequence[np.ndarray[Any, Any]]
    ) -> tuple[list[int], list[np.ndarray[Any, Any]], list[jax.sharding.Sharding | None]]:
        """Returns the pieces of what was read: of which leaf each is, itself, and where it goes."""
        leaves: list[int] = []
        pieces: list[np.ndarray[Any, Any]] = []
        wheres: list[jax.sharding.Sharding | None] = []
        for request, array in zip(batch, arrays, strict=True):
            read, region = self._reads[request.leaf], request.region
            if not read.device_shardings and read.piece_shape is None:  # the usual, quick
                leaves.append(request.leaf)
                pieces.append(array)
                wheres.append(read.sharding)
                continue
            for box, devices in region.parts:
                piece = array if box == region.box else array[plan.within(box, region.box)]
                if read.piece_shape is not None:
                    piece = _filled_up(piece, read.piece_shape)
                leaves += [request.leaf] * len(devices)
                pieces += [piece] * len(devices)
                wheres += [read.device_shardings.get(each, read.sharding) for each in devices]
        return leaves, pieces, wheres

    def _broadcast(self, leaves: list[int], pieces: list[Piece]) -> None:
        """Sends pieces on from device to device, some at a time, and adds what arrives."""
        copies: list[_Copy] = []
        for leaf, piece in zip(leaves, pieces, strict=True):
            targets = self._reads[leaf].copies
            if targets:
                (device,) = piece.devices()  # type: ignore[union-attr]
                copies += [_Copy(leaf, piece, where) for where in targets.get(device.id, ())]
        with self._broadcasting:
            limit = self._broadcast_options.broadcast_memory_limit_bytes
            if limit is None:
                share = self._broadcast_options.broadcast_memory_scaling_factor or 1.0
                free = free_nbytes([copy.where for copy in copies])
                limit = sys.maxsize if free is None else int(free * share)
            for group in plan.batches(copies, limit):
                with self._recorder.span("broadcast", sum(copy.nbytes for copy in group)):
                    pieces += send([(copy.piece, copy.where) for copy in group])
                leaves += [copy.leaf for copy in group]


class _Copy(NamedTuple):
    """A piece to send to another device."""

    leaf: int
    piece: Any
    where: jax.sharding.Sharding

    @property
    def nbytes(self) -> int:
        return int(self.piece.nbytes)


class VerifyPipeline(_ReadPipeline):
    """Reads arrays to see whether they can be read, and checks every checksum that there is.

    Attributes:
      damaged: after `run`, by leaf the first error that was met there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.damaged: dict[int, errors.LeafError] = {}

    def _take(self, index: int, batch: list[ReadRequest], nbytes: int) -> None:
        with self._recorder.span("verify", nbytes):
            try:
                self._check(batch)
            except errors.LeafError:  # of one of them; the others have not all been read
                for request in batch:
                    try:
                        self._check([request])
                    except errors.LeafError as error:
                        self.damaged.setdefault(request.leaf, error)

    def _check(self, batch: list[ReadRequest]) -> None:
        arrays = self._read(batch)
        # What was read by its blocks has one more checksum, which only TensorStore computes.
        for request, array in zip(batch, arrays, strict=True):
            entry, read = self._entries[request.leaf], self._reads[request.leaf]
            if read.whole is None and read.raw is not None and read.raw.has_crc32c:
                with _naming(entry):
                    box = request.region.box
                    source = self._store.open_array(entry.name, read.document, box=box)
                    begin = functools.partial(ts.array(array).write, source)
                    result_of(begin(), begin)


def _from_value(read: ArrayRead, data: bytes | memoryview, box: plan.Box) -> np.ndarray[Any, Any]:
    """Decodes an array; what stays on the host is the caller's own to change."""
    assert read.whole is not None
    array = zarr.decode_whole(read.whole, data)
    if plan.box_shape(box) != read.document.shape:
        array = array[_slices(box)]
    return array if read.sharding is not None else array.copy()


def _cast(read: ArrayRead, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns what was read in the leaf's own dtype."""
    if read.view_dtype is not None:
        array = array.view(read.view_dtype)
    if array.dtype == read.dtype:
        return array
    target = aligned_empty(array.shape, read.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        target[...] = array.astype(read.dtype)
    return target


def _filled_up(array: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Returns an array with zeros after what it has on each axis."""
    if shape == array.shape:
        return array
    target = aligned_empty(shape, array.dtype)
    target[...] = np.zeros((), array.dtype)
    target[tuple(map(slice, array.shape))] = array
    return target


def _slices(box: plan.Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


_DAMAGE = (
    *("DATA_LOSS", "CRC", "crc", "checksum", "OUT_OF_RANGE", "bytes found", "Digest"),
    "Not enough data",
    "inflate",
    "decompress",
)


@contextlib.contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """Makes the error of a leaf of what leaves the block."""
    try:
        yield
    except Exception as error:
        raise _read_error(entry, error) from error


def _read_error(entry: Entry, error: Exception) -> errors.LeafError:
    """Makes the error of a leaf that can't be read; damage is told from what may pass."""
    label = keypath.label(entry.keys)
    text = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    if any(sign in text for sign in _DAMAGE):
        return errors.CorruptDataError(
            label,
            f"its stored data is damaged: {text}. Load another checkpoint, or copy this one "
            "again from its source.",
        )
    return errors.ReadError(label, f"cannot be read: {text}")
