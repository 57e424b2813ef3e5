"""Running a plan: planned, staged, written on the way out; read, placed on the way in.

A pipeline owns the only mutable state of a transfer: its batches and its budgets. Batches enter
in the order of the plan. A batch holds its share of the transfer budget from before it is
captured until it is written, if capturing takes memory, and its share of the write budget while
it is being written. One task group runs everything: the first failure cancels the rest, and
leaving the group returns every reservation.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import jax
import numpy as np
import tensorstore as ts

from orbax_async import errors
from orbax_async._engine import loop, plan
from orbax_async._engine.budget import ByteBudget
from orbax_async._engine.plan import ReadRequest, WriteRequest
from orbax_async._engine.transfer import Source, Staged, aligned_empty, place
from orbax_async._storage import zarr
from orbax_async._storage.kvstore import ArrayStore
from orbax_async._trace import Recorder

__all__ = ["LoadPipeline", "ReadableLeaf", "SavePipeline", "WritableLeaf"]

_BATCH_NBYTES = 64 << 20
_BATCHES_IN_FLIGHT = 3
_STORED_NBYTES = 64 << 10  # pieces up to this size are encoded here, without opening an array


def _batch_nbytes(*limits: int | None) -> int:
    return min([_BATCH_NBYTES, *(limit for limit in limits if limit is not None)])


@dataclasses.dataclass
class WritableLeaf:
    """A leaf on its way out.

    Attributes:
      label: its key path, for messages.
      name: its stored name.
      source: where its values are.
      shape: its global shape.
      chunk_shape: the shape of its pieces.
      dtype: its dtype on disk.
      may_compress: whether zstd may be used at all.
      min_saving: the share of bytes that compression must save; below it, elements lie raw.
      encoding: how it is stored; decided when its first piece is captured, unless given.
    """

    label: str
    name: str
    source: Source
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    may_compress: bool
    min_saving: float
    encoding: zarr.Encoding | None = None

    def decide_encoding(self, sample: np.ndarray[Any, Any] | None) -> None:
        """Chooses how to store the leaf; `sample` is its first piece, if it is at hand."""
        nbytes = int(np.prod(self.chunk_shape)) * self.dtype.itemsize
        if self.encoding is not None:
            return
        if nbytes <= _STORED_NBYTES:
            self.encoding = "stored"
        elif not self.may_compress:
            self.encoding = "raw"
        elif self.min_saving <= 0:
            self.encoding = "zstd"
        elif sample is None:
            # No process may look at its own values here, for all must choose alike. Narrow floats
            # and integers are where zstd usually pays.
            self.encoding = "raw" if self.dtype.itemsize > 2 else "zstd"
        else:
            saving = zarr.compression_saving(np.ascontiguousarray(sample))
            self.encoding = "zstd" if saving >= self.min_saving else "raw"

    def document(self, *, zarr3: bool) -> bytes:
        """Returns the array's metadata document."""
        assert self.encoding is not None
        return zarr.array_document(
            self.shape, self.chunk_shape, self.dtype.name, self.encoding, zarr3=zarr3
        )


class SavePipeline:
    """Captures and writes the requests of one save.

    Tier 1 ends when `staged` is set, tier 2 when `run` returns.
    """

    def __init__(
        self,
        leaves: Sequence[WritableLeaf],
        requests: Sequence[WriteRequest],
        *,
        writes_documents: bool,
        may_sample: bool,
        zarr3: bool,
        write_limit: int | None,
        transfer_limit: int | None,
        recorder: Recorder,
    ) -> None:
        self.staged = anyio.Event()
        self.write_budget = ByteBudget(write_limit)
        self.transfer_budget = ByteBudget(transfer_limit)
        # Only a limit calls for it: the caller may be waiting, and both compete for the GIL.
        self._writes_while_staging = transfer_limit is not None
        self._leaves = leaves
        self._zarr3 = zarr3
        self._may_sample = may_sample
        self._recorder = recorder
        self._slots = anyio.Semaphore(_BATCHES_IN_FLIGHT)
        self._batches = list(plan.batches(requests, _batch_nbytes(write_limit, transfer_limit)))
        self._pieces_unstaged = Counter(request.leaf for request in requests)
        self._pieces_unwritten = self._pieces_unstaged.copy()
        # Leaves whose document is still to be written by this process. Those of which it writes no
        # piece follow in a last batch of documents alone.
        self._undocumented = set(range(len(leaves))) if writes_documents else set()
        self._without_pieces = sorted(self._undocumented - self._pieces_unstaged.keys())
        if self._without_pieces:
            self._batches.append([])
        self._deciding = threading.Lock()
        recorder.add(
            leaves_planned=len(self._pieces_unstaged) + len(self._without_pieces),
            bytes_planned=sum(request.nbytes for request in requests),
        )

    async def run(self, open_store: Callable[[], Any]) -> None:
        """Runs to the end; `open_store` awaits the directory and returns its `ArrayStore`."""
        store_ready = anyio.Event()
        store: list[ArrayStore] = []

        async def prepare_store() -> None:
            store.append(await open_store())
            store_ready.set()

        async def write_batch(batch: list[WriteRequest], pieces: list[Staged], held: int) -> None:
            try:
                await store_ready.wait()
                if not self._writes_while_staging:
                    await self.staged.wait()
                nbytes = sum(request.nbytes for request in batch)
                async with self._slots, self.write_budget.reserve(nbytes):
                    with self._recorder.span("write", nbytes):
                        await self._write(store[0], batch, pieces)
            finally:
                pieces.clear()
                self.transfer_budget.release(held)

        try:
            with errors.ungrouped():
                async with anyio.create_task_group() as group:
                    group.start_soon(prepare_store)
                    for batch in self._batches:
                        held = self._staging_nbytes(batch)
                        await self.transfer_budget.acquire(held)
                        try:
                            pieces = await loop.to_worker(self._capture, batch)
                        except BaseException:
                            self.transfer_budget.release(held)
                            raise
                        group.start_soon(write_batch, batch, pieces, held)
                    self._recorder.enter("staged")
                    self.staged.set()
        finally:
            self.staged.set()
        self._recorder.enter("written")

    def _documents_alone(self, batch: list[WriteRequest]) -> int:
        return 0 if batch else len(self._without_pieces)

    def _staging_nbytes(self, batch: list[WriteRequest]) -> int:
        # Prioritized leaves, which come first, are outside of the limit.
        return sum(r.nbytes for r in batch if r.priority and self._leaves[r.leaf].source.copies)

    def _capture(self, batch: list[WriteRequest]) -> list[Staged]:
        """I3: takes the values of a batch; runs on a worker, in the order of the plan."""
        nbytes = sum(request.nbytes for request in batch)
        pieces = []
        with (
            self._recorder.span("stage", nbytes),
            jax.transfer_guard("allow"),
            jax.enable_x64(True),
        ):
            for request in batch:
                leaf = self._leaves[request.leaf]
                try:
                    staged = leaf.source.capture(request.device_id, request.shard_box, request.box)
                except Exception as error:
                    raise errors.StagingError(leaf.label, f"cannot be captured: {error}") from error
                pieces.append(staged)
        self._recorder.add(
            leaves_staged=_count_off(self._pieces_unstaged, batch) + self._documents_alone(batch),
            bytes_staged=nbytes,
        )
        return pieces

    async def _write(
        self, store: ArrayStore, batch: list[WriteRequest], pieces: list[Staged]
    ) -> None:
        try:
            transaction, pending = await loop.to_worker(self._fill, store, batch, pieces)
            with anyio.CancelScope(shield=True):
                # Not to be abandoned: the files below must not change once they are removed.
                await transaction.commit_async()
        except errors.LeafError:
            raise
        except Exception as error:
            raise self._write_error(batch, error) from error
        del pending
        self._recorder.add(
            leaves_written=_count_off(self._pieces_unwritten, batch) + self._documents_alone(batch),
            bytes_written=sum(request.nbytes for request in batch),
        )

    def _fill(
        self, store: ArrayStore, batch: list[WriteRequest], pieces: list[Staged]
    ) -> tuple[ts.Transaction, list[ts.WriteFutures]]:
        """Puts a batch into a transaction: small pieces as encoded values, large by reference."""
        transaction = store.begin()
        values: dict[str, bytes] = {}
        pending: list[ts.WriteFutures] = []
        for request, staged in zip(batch, pieces, strict=True):
            leaf = self._leaves[request.leaf]
            try:
                array = staged.fetch()
                if array.dtype != leaf.dtype:
                    array = array.view(leaf.dtype)
                self._document(request.leaf, array if self._may_sample else None, values)
                if leaf.encoding == "stored":
                    index = [
                        start // side
                        for (start, _), side in zip(request.box, leaf.chunk_shape, strict=True)
                    ]
                    key = zarr.chunk_key(leaf.name, index, zarr3=self._zarr3)
                    values[key] = zarr.encode_stored(array)
                else:
                    document = leaf.document(zarr3=self._zarr3)
                    pending.append(
                        store.put_chunk(transaction, leaf.name, document, request.box, array)
                    )
            except Exception as error:
                raise errors.WriteError(leaf.label, f"cannot be written: {error}") from error
        for leaf_index in () if batch else self._without_pieces:
            self._document(leaf_index, None, values)
        store.put(transaction, values)
        return transaction, pending

    def _document(
        self, index: int, sample: np.ndarray[Any, Any] | None, values: dict[str, bytes]
    ) -> None:
        """Decides once how a leaf is stored, and adds its document where it is still to be written.

        Pieces of one leaf may be in several batches, which are filled on several workers.
        """
        leaf = self._leaves[index]
        with self._deciding:
            leaf.decide_encoding(sample)
            if index in self._undocumented:
                self._undocumented.discard(index)
                key = zarr.document_key(leaf.name, zarr3=self._zarr3)
                values[key] = leaf.document(zarr3=self._zarr3)

    def _write_error(self, batch: list[WriteRequest], error: Exception) -> errors.WriteError:
        labels = [self._leaves[request.leaf].label for request in batch]
        others = f" (or one of the {len(labels) - 1} others written with it)" if labels[1:] else ""
        return errors.WriteError(labels[0] if labels else "", f"cannot be written{others}: {error}")


@dataclasses.dataclass
class ReadableLeaf:
    """A leaf on its way in.

    Attributes:
      label: its key path, for messages.
      name: its stored name.
      document: its array's metadata document.
      dtype: the dtype to load as.
      view_dtype: the dtype that the stored elements stand for, where zarr has none for it.
      device_shardings: single-device shardings by device id; empty for a host array.
    """

    label: str
    name: str
    document: dict[str, Any]
    dtype: np.dtype[Any]
    view_dtype: np.dtype[Any] | None
    device_shardings: dict[int, jax.sharding.Sharding]


class LoadPipeline:
    """Reads and places the requests of one load.

    After `run`, `pieces` holds by leaf its host array, or its shards in the order of the plan.
    """

    def __init__(
        self,
        leaves: dict[int, ReadableLeaf],
        requests: Sequence[ReadRequest],
        store: ArrayStore,
        *,
        read_limit: int | None,
        recorder: Recorder,
    ) -> None:
        self.pieces: dict[int, list[np.ndarray[Any, Any] | jax.Array]] = {
            index: [] for index in leaves
        }
        self.read_budget = ByteBudget(read_limit)
        self._leaves = leaves
        self._store = store
        self._recorder = recorder
        self._slots = anyio.Semaphore(_BATCHES_IN_FLIGHT)
        self._batches = list(plan.batches(requests, _batch_nbytes(read_limit)))
        self._pieces_unread = Counter(request.leaf for request in requests)
        recorder.add(
            leaves_planned=len(self._pieces_unread),
            bytes_planned=sum(request.nbytes for request in requests),
        )

    async def run(self) -> None:
        """Reads everything; the first failure cancels the rest."""
        results: list[list[list[np.ndarray[Any, Any] | jax.Array]]] = [[] for _ in self._batches]

        async def read_batch(index: int) -> None:
            batch = self._batches[index]
            nbytes = sum(request.nbytes for request in batch)
            async with self._slots, self.read_budget.reserve(nbytes):
                results[index] = await loop.to_worker(self._read_and_place, batch)
            self._recorder.add(
                leaves_written=_count_off(self._pieces_unread, batch), bytes_written=nbytes
            )

        with errors.ungrouped():
            async with anyio.create_task_group() as group:
                for index in range(len(self._batches)):
                    group.start_soon(read_batch, index)
        for batch, shards in zip(self._batches, results, strict=True):
            for request, of_request in zip(batch, shards, strict=True):
                self.pieces[request.leaf].extend(of_request)

    def _read_and_place(
        self, batch: list[ReadRequest]
    ) -> list[list[np.ndarray[Any, Any] | jax.Array]]:
        nbytes = sum(request.nbytes for request in batch)
        with self._recorder.span("read", nbytes):
            arrays = self._read(batch)
        to_place: list[np.ndarray[Any, Any]] = []
        targets: list[jax.sharding.Sharding] = []
        for request, array in zip(batch, arrays, strict=True):
            shardings = self._leaves[request.leaf].device_shardings
            to_place += [array for _ in request.device_ids if shardings]
            targets += [shardings[device] for device in request.device_ids if shardings]
        with self._recorder.span("place", nbytes):
            placed = iter(place(to_place, targets) if to_place else ())
        result: list[list[np.ndarray[Any, Any] | jax.Array]] = []
        for request, array in zip(batch, arrays, strict=True):
            if self._leaves[request.leaf].device_shardings:
                result.append([next(placed) for _ in request.device_ids])
            else:
                result.append([array])
        return result

    def _read(self, batch: list[ReadRequest]) -> list[np.ndarray[Any, Any]]:
        """Reads the pieces of a batch: small plain arrays as values, the rest by TensorStore."""
        leaves = [self._leaves[request.leaf] for request in batch]
        is_small = [
            request.nbytes <= _STORED_NBYTES
            and 0 not in leaf.document["shape"]
            and zarr.is_whole_and_plain(leaf.document)
            for request, leaf in zip(batch, leaves, strict=True)
        ]
        keys = [
            zarr.chunk_key(leaf.name, [0] * len(leaf.document["shape"]), zarr3=self._store.zarr3)
            for leaf, small in zip(leaves, is_small, strict=True)
            if small
        ]
        unique = list(dict.fromkeys(keys))
        found = dict(zip(unique, self._store.read_many(unique), strict=True))
        values = iter([found[key] for key in keys])
        arrays: list[np.ndarray[Any, Any]] = []
        pending: list[tuple[ReadableLeaf, Any]] = []
        for request, leaf, small in zip(batch, leaves, is_small, strict=True):
            with _reading(leaf):
                if small:
                    data = next(values)
                    if data is None:
                        raise FileNotFoundError("its data is missing from the checkpoint")
                    whole = zarr.decode_whole(leaf.document, data)
                    arrays.append(_finish(whole[_slices(request.box)], leaf))
                elif request.nbytes == 0:
                    arrays.append(aligned_empty(plan.box_shape(request.box), leaf.dtype))
                else:
                    target = aligned_empty(plan.box_shape(request.box), _read_dtype(leaf))
                    source = self._store.open_array(leaf.name, leaf.document, _read_dtype(leaf))
                    done = ts.array(target).write(source[_slices(request.box)])
                    pending.append((leaf, done))
                    arrays.append(target)
        for leaf, done in pending:
            with _reading(leaf):
                done.result()
        return [
            array if small or array.dtype == leaf.dtype else _finish(array, leaf)
            for array, leaf, small in zip(arrays, leaves, is_small, strict=True)
        ]


def _count_off(left: Counter[int], batch: Sequence[WriteRequest | ReadRequest]) -> int:
    """Counts the pieces of a batch as done; returns how many leaves have none left."""
    left.subtract(request.leaf for request in batch)
    return sum(left[leaf] == 0 for leaf in {request.leaf for request in batch})


def _slices(box: plan.Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _read_dtype(leaf: ReadableLeaf) -> np.dtype[Any]:
    """The dtype to ask TensorStore for: a reinterpreted array is read as it is stored."""
    return leaf.dtype if leaf.view_dtype is None else zarr.stored_dtype(leaf.document)


def _finish(array: np.ndarray[Any, Any], leaf: ReadableLeaf) -> np.ndarray[Any, Any]:
    """Returns an owned, aligned array of the leaf's dtype."""
    if leaf.view_dtype is not None:
        array = array.view(leaf.view_dtype)
    target = aligned_empty(array.shape, leaf.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        target[...] = array.astype(leaf.dtype, copy=False)
    return target


_DAMAGE = (
    *("DATA_LOSS", "CRC", "crc", "checksum", "OUT_OF_RANGE", "bytes found", "Digest"),
    "inflate",
    "decompress",
)


@contextmanager
def _reading(leaf: ReadableLeaf) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
        if any(sign in text for sign in _DAMAGE):
            raise errors.CorruptDataError(
                leaf.label,
                f"its stored data is damaged: {text}. Load another checkpoint, or copy this one "
                "again from its source.",
            ) from error
        raise errors.ReadError(leaf.label, f"cannot be read: {text}") from error
