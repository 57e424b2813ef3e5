"""Reading a tree's arrays: read, placed on their devices.

A pipeline owns the only mutable state of a load: its batches, its memory and its budget. A batch
holds its share of the read budget from before it is read until its values are placed.

Memory that stays on the host, as what is loaded, is mapped before anything is read, and takes no
memory until then. Mapping waits for page faults in neighbouring memory, and with it everybody who
waits for the interpreter: the caller's loop, too.
"""

from __future__ import annotations

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
from orbax_async._engine.plan import ReadRequest
from orbax_async._engine.transfer import (
    Piece,
    aligned_empty,
    free_nbytes,
    lies_on_host,
    place,
    send,
)
from orbax_async._storage import zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._trace import Recorder
from orbax_async.tree import keypath
from orbax_async.tree.schema import Entry

__all__ = ["LoadPipeline", "Placed", "ReadForm", "read_error"]

_VALUE_NBYTES = 64 << 10  # arrays up to this size are read as values, many at once
_PART_NBYTES = 64 << 20  # of a region that several workers read


class ReadForm:
    """How leaves that are stored alike, and asked for alike, are read.

    Args:
      document: the metadata document of their arrays.
      dtype: the dtype to load as.
      view_dtype: the dtype that the stored elements stand for, where zarr has none for it.
      sharding: of a jax array; None for a host array.
      device_shardings: single-device shardings by device id, of a jax array on several devices.
      piece_shape: of each piece, where that is not what is stored: zeros fill it up.
      copies: by the id of a device, where its piece is sent from there.
      fills_missing: whether what is missing reads as the array's fill value.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        dtype: np.dtype[Any],
        view_dtype: np.dtype[Any] | None,
        sharding: jax.sharding.Sharding | None,
        device_shardings: Mapping[int, jax.sharding.Sharding],
        *,
        piece_shape: tuple[int, ...] | None = None,
        copies: Mapping[int, tuple[jax.sharding.Sharding, ...]] | None = None,
        fills_missing: bool = False,
    ) -> None:
        self.document = document
        self.shape = tuple(document["shape"])
        self.dtype = dtype
        self.view_dtype = view_dtype
        self.sharding = sharding
        self.device_shardings = device_shardings
        self.piece_shape = piece_shape
        self.copies = copies or {}
        self.fills_missing = fills_missing
        stored = zarr.stored_dtype(document)
        # The dtype to ask TensorStore for: a reinterpreted array is read as it is stored.
        self.read_dtype = dtype if view_dtype is None else stored
        whole = zarr.whole_layout(document)
        self.whole = whole if whole is not None and whole.nbytes <= _VALUE_NBYTES else None
        self.raw = zarr.raw_layout(document) if self.read_dtype == stored else None
        if self.whole is not None:
            self.whole_key = zarr.chunk_key(
                "", [0] * len(self.shape), zarr3=document["zarr_format"] == 3
            )


class Placed(NamedTuple):
    """Pieces where they belong, and the leaf of each."""

    leaves: list[int]
    pieces: list[Piece]


class _Copy(NamedTuple):
    """A piece to send to another device."""

    leaf: int
    piece: Any
    where: jax.sharding.Sharding

    @property
    def nbytes(self) -> int:
        return int(self.piece.nbytes)


def _device_id(piece: Any) -> int:
    (device,) = piece.devices()
    return int(device.id)


class LoadPipeline:
    """Reads and places the requests of one load.

    Args:
      entries: of the leaves, by their index.
      forms: how each of them is read.
      requests: what to read of them.
      store: where they are.
      batch_nbytes: of requests that are read together.
      read_budget: bytes that may be in flight.
      recorder: counts and times.
      broadcast_nbytes: the most bytes that are sent from device to device at a time; None for a
        share of the memory that is free there.
      broadcast_share: that share.
    """

    def __init__(
        self,
        entries: Mapping[int, Entry],
        forms: Mapping[int, ReadForm],
        requests: Sequence[ReadRequest],
        store: ArrayStore,
        *,
        batch_nbytes: int,
        read_budget: ByteBudget,
        recorder: Recorder,
        broadcast_nbytes: int | None = None,
        broadcast_share: float = 1.0,
    ) -> None:
        self._entries = entries
        self._forms = forms
        self._store = store
        self.read_budget = read_budget
        self._recorder = recorder
        self._broadcast_nbytes = broadcast_nbytes
        self._broadcast_share = broadcast_share
        self._broadcasting = threading.Lock()  # on workers: one batch at a time
        self._mapped: dict[int, np.ndarray[Any, Any]] = {}  # by the id of the request
        self._filled: set[int] = set()  # the ids of requests that are read
        self._slots = BatchSlots()
        self._batches = list(plan.batches(requests, batch_nbytes))
        self._results: dict[int, Placed] = {}  # by the index of the batch
        self._requests_left = dict(Counter(request.leaf for request in requests))
        recorder.add(
            leaves_planned=len(self._requests_left),
            bytes_planned=sum(request.nbytes for request in requests),
        )

    def map_memory(self) -> None:
        """Maps the memory that stays on the host; blocks."""
        for request in itertools.chain.from_iterable(self._batches):
            form = self._forms[request.leaf]
            if form.whole is None and (form.sharding is None or lies_on_host(form.sharding)):
                self._mapped[id(request)] = self._memory_for(request)

    async def run(self) -> None:
        """Reads everything; the first failure cancels the rest."""

        async def read_batch(index: int) -> None:
            batch = self._batches[index]
            nbytes = sum(request.nbytes for request in batch)
            async with self._slots.of(nbytes, len(batch)), self.read_budget.reserve(nbytes):
                for request in batch:
                    if request.nbytes > _PART_NBYTES:
                        await self._read_in_parts(request)
                self._results[index] = await loop.to_worker(self._read_and_place, batch, nbytes)
            self._recorder.add(
                leaves_written=_count_off(self._requests_left, batch), bytes_written=nbytes
            )

        with errors.ungrouped():
            async with anyio.create_task_group() as group:
                for index in range(len(self._batches)):
                    group.start_soon(read_batch, index)

    async def _read_in_parts(self, request: ReadRequest) -> None:
        """Reads a large region on several workers, if it is of those that go straight in place."""
        entry, form = self._entries[request.leaf], self._forms[request.leaf]
        box, target = request.region.box, self._mapped.get(id(request))
        if target is None or form.raw is None or form.fills_missing:
            return
        parts = plan.rows(box, form.shape, form.raw.chunk_shape, target.itemsize, _PART_NBYTES)
        were_read: list[bool] = []

        async def read(part: plan.Box) -> None:
            into = target[_within(part, box)]
            try:
                were_read.append(await loop.to_worker(self._read_raw, entry.name, form, part, into))
            except Exception as error:
                raise read_error(entry, error) from error

        if len(parts) > 1:
            with errors.ungrouped():
                async with anyio.create_task_group() as group:
                    for part in parts:
                        group.start_soon(read, part)
            if all(were_read):
                self._filled.add(id(request))

    def pieces_of(self, leaf: int) -> list[Piece]:
        """Returns what was read: a host array, a jax array on one device, or a leaf's shards."""
        first, more = self._pieces
        return [first[leaf], *more.get(leaf, ())] if leaf in first else []

    @functools.cached_property
    def _pieces(self) -> tuple[dict[int, Piece], dict[int, list[Piece]]]:
        """By leaf, the first piece and, of few leaves, more."""
        first: dict[int, Piece] = {}
        more: dict[int, list[Piece]] = {}
        for _, placed in sorted(self._results.items()):
            for leaf, piece in zip(*placed, strict=True):
                if first.setdefault(leaf, piece) is not piece:
                    more.setdefault(leaf, []).append(piece)
        return first, more

    def _memory_for(self, request: ReadRequest) -> np.ndarray[Any, Any]:
        mapped = self._mapped.pop(id(request), None)
        if mapped is not None:
            return mapped
        form = self._forms[request.leaf]
        return aligned_empty(plan.box_shape(request.region.box), form.read_dtype)

    def _read_and_place(self, batch: list[ReadRequest], nbytes: int) -> Placed:
        with self._recorder.span("read", nbytes):
            arrays = self._read(batch)
        with self._recorder.span("place", nbytes):
            leaves, pieces, wheres = self._targets(batch, arrays)
            placed = Placed(leaves, place(pieces, wheres))
        if any(self._forms[leaf].copies for leaf in leaves):
            self._broadcast(placed)
        return placed

    def _broadcast(self, placed: Placed) -> None:
        """Sends pieces on from device to device, some at a time, and adds what arrives."""
        copies: list[_Copy] = []
        for leaf, piece in zip(*placed, strict=True):
            targets = self._forms[leaf].copies
            wheres = targets.get(_device_id(piece), ()) if targets else ()
            copies += [_Copy(leaf, piece, where) for where in wheres]
        with self._broadcasting:
            limit = self._limit_of_broadcasts(copies)
            for group in plan.batches(copies, limit):
                with self._recorder.span("broadcast", sum(copy.nbytes for copy in group)):
                    placed.pieces.extend(send([(copy.piece, copy.where) for copy in group]))
                placed.leaves.extend(copy.leaf for copy in group)

    def _limit_of_broadcasts(self, copies: Sequence[_Copy]) -> int:
        if self._broadcast_nbytes is not None:
            return self._broadcast_nbytes
        free = free_nbytes([copy.where for copy in copies])
        return sys.maxsize if free is None else int(free * self._broadcast_share)

    def _targets(
        self, batch: Sequence[ReadRequest], arrays: Sequence[np.ndarray[Any, Any]]
    ) -> tuple[list[int], list[np.ndarray[Any, Any]], list[jax.sharding.Sharding | None]]:
        """Returns the pieces of what was read: of which leaf each is, itself, and where it goes."""
        leaves: list[int] = []
        pieces: list[np.ndarray[Any, Any]] = []
        wheres: list[jax.sharding.Sharding | None] = []
        for request, array in zip(batch, arrays, strict=True):
            form, region = self._forms[request.leaf], request.region
            if not form.device_shardings:
                leaves.append(request.leaf)
                pieces.append(_filled_up(array, form.piece_shape))
                wheres.append(form.sharding)
                continue
            for box, devices in region.parts:
                piece = array if box == region.box else array[_within(box, region.box)]
                leaves += [request.leaf] * len(devices)
                pieces += [_filled_up(piece, form.piece_shape)] * len(devices)
                wheres += [form.device_shardings[device] for device in devices]
        return leaves, pieces, wheres

    def _read(self, batch: list[ReadRequest]) -> list[np.ndarray[Any, Any]]:
        """Reads the regions of a batch: small arrays as values, raw ones in place."""
        values = self._read_values(batch)
        arrays: list[np.ndarray[Any, Any]] = []
        pending: list[tuple[Entry, Any]] = []
        for request in batch:
            entry, form = self._entries[request.leaf], self._forms[request.leaf]
            box = request.region.box
            try:
                if request.region.is_empty or id(request) in self._filled:
                    arrays.append(self._memory_for(request))
                    continue
                value = next(values) if form.whole is not None else None
                if value is not None:
                    arrays.append(_from_value(form, value, box))
                    continue
                if form.whole is not None and not form.fills_missing:
                    raise FileNotFoundError("its data is missing from the checkpoint")
                target = self._memory_for(request)
                if not self._read_raw(entry.name, form, box, target):
                    source = self._store.open_array(
                        entry.name,
                        form.document,
                        form.read_dtype,
                        fills_missing=form.fills_missing,
                    )
                    pending.append((entry, ts.array(target).write(source[_slices(box)])))
                arrays.append(target)
            except Exception as error:
                raise read_error(entry, error) from error
        for entry, done in pending:
            try:
                done.result()
            except Exception as error:
                raise read_error(entry, error) from error
        return [
            _as_asked(self._forms[request.leaf], array)
            for request, array in zip(batch, arrays, strict=True)
        ]

    def _read_values(self, batch: list[ReadRequest]) -> Iterator[bytes | memoryview | None]:
        small: list[Entry] = []
        keys: list[str] = []
        for request in batch:
            entry, form = self._entries[request.leaf], self._forms[request.leaf]
            if form.whole is not None and not request.region.is_empty:
                small.append(entry)
                keys.append(f"{entry.name}/{form.whole_key}" if entry.name else form.whole_key)
        try:
            values = self._store.read_many(keys) if keys else []
        except Exception as error:
            for entry, key in zip(small, keys, strict=True):
                try:
                    self._store.read_many([key])
                except Exception as of_leaf:
                    raise read_error(entry, of_leaf) from of_leaf
            raise read_error(small[0], error) from error  # it has gone away
        return _drained(values)

    def _read_raw(
        self, name: str, form: ReadForm, box: plan.Box, target: np.ndarray[Any, Any]
    ) -> bool:
        """Reads a region without TensorStore where that is possible."""
        raw, direct = form.raw, self._store.direct
        return (
            raw is not None
            and direct is not None
            and (not form.fills_missing or direct.has_region(name, raw, box))
            and direct.read_region(name, raw, box, target)
        )


def _drained(values: list[Any]) -> Iterator[Any]:
    """Yields values and keeps none of them."""
    values.reverse()
    while values:
        yield values.pop()


def _from_value(form: ReadForm, data: bytes | memoryview, box: plan.Box) -> np.ndarray[Any, Any]:
    """Decodes an array; what stays on the host is the caller's own to change."""
    assert form.whole is not None
    array = zarr.decode_whole(form.whole, data)
    if plan.box_shape(box) != form.shape:
        array = array[_slices(box)]
    return array if form.sharding is not None else array.copy()


def _as_asked(form: ReadForm, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns what was read in the leaf's own dtype."""
    if form.view_dtype is not None:
        array = array.view(form.view_dtype)
    if array.dtype == form.dtype:
        return array
    target = aligned_empty(array.shape, form.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        target[...] = array.astype(form.dtype)
    return target


def _filled_up(array: np.ndarray[Any, Any], shape: tuple[int, ...] | None) -> np.ndarray[Any, Any]:
    """Returns an array with zeros after what it has on each axis."""
    if shape is None or shape == array.shape:
        return array
    target = aligned_empty(shape, array.dtype)
    target[...] = np.zeros((), array.dtype)
    target[tuple(map(slice, array.shape))] = array
    return target


def _count_off(left: dict[int, int], batch: Sequence[ReadRequest]) -> int:
    """Counts the requests of a batch as done; returns how many leaves have none left."""
    done = 0
    for request in batch:
        left[request.leaf] -= 1
        done += not left[request.leaf]
    return done


def _slices(box: plan.Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _within(box: plan.Box, outer: plan.Box) -> tuple[slice, ...]:
    pairs = zip(box, outer, strict=True)
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in pairs)


_DAMAGE = (
    *("DATA_LOSS", "CRC", "crc", "checksum", "OUT_OF_RANGE", "bytes found", "Digest"),
    "Not enough data",
    "inflate",
    "decompress",
)


def read_error(entry: Entry, error: Exception) -> errors.LeafError:
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
