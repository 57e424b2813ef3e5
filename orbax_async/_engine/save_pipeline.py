"""Writing a tree's arrays: planned, staged, written.

A pipeline owns the only mutable state of a save: its batches and its budgets. Batches enter in
the order of the plan. A batch holds its share of the transfer budget from before it is captured
until it is written, if capturing takes memory, and its share of the write budget while it is being
written. One task group runs everything: the first failure cancels the rest, and leaving the group
returns every reservation.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import jax
import numpy as np
import tensorstore as ts

from orbax_async import errors
from orbax_async._engine import loop, plan
from orbax_async._engine.budget import BatchSlots, ByteBudget
from orbax_async._engine.plan import WriteRequest
from orbax_async._engine.transfer import Mode, Piece, capture
from orbax_async._storage import zarr
from orbax_async._storage.kvstore import ArrayStore
from orbax_async._trace import Recorder

__all__ = ["SavePipeline", "WritableLeaf", "WritePlan", "encoding_of"]

_LARGE_NBYTES = 16 << 20  # batches from this size on begin to be synced at once
_STORED_NBYTES = 64 << 10  # pieces up to this size are encoded here, without opening an array


@dataclasses.dataclass(slots=True)
class WritableLeaf:
    """A leaf on its way out, apart from its values.

    Attributes:
      label: its key path, for messages.
      name: its stored name.
      shape: its global shape.
      chunk_shape: the shape of its pieces.
      dtype: its dtype on disk.
      mode: how its values are captured.
      has_one_shard: whether its array is a single one, to be captured without looking for a shard.
      encoding: how it is stored; None where its first piece decides.
      min_saving: the share of bytes that compression must then save.
    """

    label: str
    name: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    mode: Mode
    has_one_shard: bool
    encoding: zarr.Encoding | None
    min_saving: float

    def document(self, encoding: zarr.Encoding, *, zarr3: bool) -> bytes:
        """Returns the array's metadata document."""
        return zarr.array_document(
            self.shape, self.chunk_shape, self.dtype.name, encoding, zarr3=zarr3
        )


def encoding_of(
    chunk_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    may_compress: bool,
    min_saving: float,
    may_sample: bool,
) -> zarr.Encoding | None:
    """Returns how an array is stored; None where a sample of its values decides."""
    if math.prod(chunk_shape) * dtype.itemsize <= _STORED_NBYTES:
        return "stored"
    if not may_compress:
        return "raw"
    if min_saving <= 0:
        return "zstd"
    if may_sample:
        return None
    # Of several processes none may look at its own values, for all must choose alike. Narrow floats
    # and integers are where zstd usually pays.
    return "raw" if dtype.itemsize > 2 else "zstd"


class WriteBatch:
    """Requests that are captured, written and committed together.

    Attributes:
      requests: in the order of the plan.
      nbytes: the bytes of all of them.
      staging_nbytes: the bytes of those that take memory to capture, and are not prioritized.
      keys: of each request, the key of its chunk.
      first_of: the leaves that have their first piece here, whose documents go with it.
    """

    def __init__(
        self,
        requests: list[WriteRequest],
        leaves: Sequence[WritableLeaf],
        first_of: list[int],
        *,
        zarr3: bool,
    ) -> None:
        self.requests = requests
        self.first_of = first_of
        self.nbytes = sum(request.nbytes for request in requests)
        self.staging_nbytes = sum(
            request.nbytes
            for request in requests
            if request.priority and leaves[request.leaf].mode != "view"
        )
        self.keys = []
        for request in requests:
            leaf = leaves[request.leaf]
            index = _chunk_index(leaf, request.box)
            self.keys.append(zarr.chunk_key(leaf.name, index, zarr3=zarr3))


def _chunk_index(leaf: WritableLeaf, box: plan.Box) -> list[int]:
    return [start // side for (start, _), side in zip(box, leaf.chunk_shape, strict=True)]


class WritePlan:
    """What this process writes of a tree: all that depends on structure and options alone.

    Args:
      leaves: every leaf that is stored as an array.
      requests: the pieces that this process writes, in order.
      batch_nbytes: how many bytes a batch holds, unless a single piece is larger.
      writes_documents: whether this process writes the arrays' metadata documents.
      zarr3: which version of zarr.
    """

    def __init__(
        self,
        leaves: Sequence[WritableLeaf],
        requests: Sequence[WriteRequest],
        *,
        batch_nbytes: int,
        writes_documents: bool,
        zarr3: bool,
    ) -> None:
        self.leaves = leaves
        self.zarr3 = zarr3
        self.pieces = Counter(request.leaf for request in requests)
        # Leaves whose document is still to be put into a batch. Those of which this process writes
        # no piece follow in a last batch of documents alone.
        undocumented = set(range(len(leaves))) if writes_documents else set()
        self.batches = []
        for batch in plan.batches(requests, batch_nbytes):
            here = dict.fromkeys(request.leaf for request in batch)
            first_of = [leaf for leaf in here if leaf in undocumented]
            undocumented.difference_update(first_of)
            self.batches.append(WriteBatch(batch, leaves, first_of, zarr3=zarr3))
        if undocumented:
            self.batches.append(WriteBatch([], leaves, sorted(undocumented), zarr3=zarr3))
        self.leaf_count = len(self.pieces) + len(undocumented)
        self.nbytes = sum(batch.nbytes for batch in self.batches)


class SavePipeline:
    """Captures and writes the arrays of one save.

    Tier 1 ends when `staged` is set, tier 2 when `run` returns.
    """

    def __init__(
        self,
        write_plan: WritePlan,
        arrays: Sequence[Piece],
        *,
        write_budget: ByteBudget,
        transfer_budget: ByteBudget,
        recorder: Recorder,
    ) -> None:
        self.staged = anyio.Event()
        self._plan = write_plan
        self._leaves = write_plan.leaves
        self._arrays = arrays
        self.write_budget = write_budget
        self.transfer_budget = transfer_budget
        # Only a limit calls for it: the caller may be waiting, and both compete for the GIL.
        self._writes_while_staging = transfer_budget.has_limit and any(
            batch.staging_nbytes for batch in write_plan.batches
        )
        self._recorder = recorder
        self._slots = BatchSlots()
        self._pieces_unstaged = write_plan.pieces.copy()
        self._pieces_unwritten = write_plan.pieces.copy()
        self._sampled: dict[int, zarr.Encoding] = {}
        recorder.add(leaves_planned=write_plan.leaf_count, bytes_planned=write_plan.nbytes)

    async def run(self, open_store: Callable[[], Any]) -> None:
        """Runs to the end; `open_store` awaits the directory and returns its `ArrayStore`."""
        store_ready = anyio.Event()
        store: list[ArrayStore] = []

        async def prepare_store() -> None:
            store.append(await open_store())
            store_ready.set()

        async def write_batch(batch: WriteBatch, pieces: list[Piece]) -> None:
            try:
                await store_ready.wait()
                if not self._writes_while_staging:
                    await self.staged.wait()
                async with (
                    self._slots.of(batch.nbytes, len(batch.requests)),
                    self.write_budget.reserve(batch.nbytes),
                ):
                    with self._recorder.span("write", batch.nbytes):
                        await self._write(store[0], batch, pieces)
            finally:
                pieces.clear()
                self.transfer_budget.release(batch.staging_nbytes)

        try:
            with errors.ungrouped():
                async with anyio.create_task_group() as group:
                    group.start_soon(prepare_store)
                    for batch in self._plan.batches:
                        await self.transfer_budget.acquire(batch.staging_nbytes)
                        try:
                            pieces = await loop.to_worker(self._capture, batch)
                        except BaseException:
                            self.transfer_budget.release(batch.staging_nbytes)
                            raise
                        group.start_soon(write_batch, batch, pieces)
                    self._arrays = ()  # all is captured: nothing here keeps the caller's arrays
                    self._recorder.enter("staged")
                    self.staged.set()
        finally:
            self.staged.set()
        self._recorder.enter("written")

    def _capture(self, batch: WriteBatch) -> list[Piece]:
        """I3: takes the values of a batch; runs on a worker, in the order of the plan."""
        pieces = []
        with (
            self._recorder.span("stage", batch.nbytes),
            jax.transfer_guard("allow"),
            jax.enable_x64(True),
        ):
            for request in batch.requests:
                leaf = self._leaves[request.leaf]
                try:
                    piece = capture(
                        self._arrays[request.leaf],
                        leaf.mode,
                        device_id=None if leaf.has_one_shard else request.device_id,
                        shard_box=request.shard_box,
                        box=request.box,
                    )
                except Exception as error:
                    raise errors.StagingError(leaf.label, f"cannot be captured: {error}") from error
                pieces.append(piece)
        self._recorder.add(
            leaves_staged=count_off(self._pieces_unstaged, batch), bytes_staged=batch.nbytes
        )
        return pieces

    async def _write(self, store: ArrayStore, batch: WriteBatch, pieces: list[Piece]) -> None:
        try:
            transaction, pending = await loop.to_worker(self._fill, store, batch, pieces)
            with anyio.CancelScope(shield=True):
                # Not to be abandoned: the files below must not change once they are removed.
                await transaction.commit_async()
            del pending
            if batch.nbytes >= _LARGE_NBYTES:
                with self._recorder.span("sync", batch.nbytes):
                    await loop.to_worker(store.sync_large)
        except errors.LeafError:
            raise
        except Exception as error:
            raise self._write_error(batch, error) from error
        self._recorder.add(
            leaves_written=count_off(self._pieces_unwritten, batch), bytes_written=batch.nbytes
        )

    def _fill(
        self, store: ArrayStore, batch: WriteBatch, pieces: list[Piece]
    ) -> tuple[ts.Transaction, list[ts.WriteFutures]]:
        """Puts a batch into a transaction: small pieces as encoded values, large by reference."""
        transaction = store.begin()
        is_read_directly = store.is_ocdbt and self._plan.zarr3
        values: dict[str, bytes] = {}
        pending: list[ts.WriteFutures] = []
        for request, key, piece in zip(batch.requests, batch.keys, pieces, strict=True):
            leaf = self._leaves[request.leaf]
            try:
                array = np.asarray(piece)
                if array.dtype != leaf.dtype:
                    array = array.view(leaf.dtype)
                encoding = leaf.encoding or self._encoding(request.leaf, array)
                if encoding == "stored":
                    values[key] = zarr.encode_stored(array)
                    continue
                document = leaf.document(encoding, zarr3=self._plan.zarr3)
                pending.append(
                    store.put_chunk(transaction, leaf.name, document, request.box, array)
                )
                if encoding == "raw" and is_read_directly and array.flags.c_contiguous:
                    index = _chunk_index(leaf, request.box)
                    values[zarr.checksums_key(leaf.name, index)] = zarr.block_checksums(array)
            except Exception as error:
                raise errors.WriteError(leaf.label, f"cannot be written: {error}") from error
        for first in batch.first_of:
            leaf = self._leaves[first]
            encoding = leaf.encoding or self._encoding(first, None)
            key = zarr.document_key(leaf.name, zarr3=self._plan.zarr3)
            values[key] = leaf.document(encoding, zarr3=self._plan.zarr3)
        store.put(transaction, values)
        return transaction, pending

    def _encoding(self, index: int, array: np.ndarray[Any, Any] | None) -> zarr.Encoding:
        """Decides once how a leaf is stored, by the first of its pieces that gets here.

        Pieces of one leaf may be in several batches, which are filled on several workers.
        """
        found = self._sampled.get(index)
        if found is None:
            saving = 0.0 if array is None else zarr.compression_saving(array)
            sampled: zarr.Encoding = "zstd" if saving >= self._leaves[index].min_saving else "raw"
            found = self._sampled.setdefault(index, sampled)
        return found

    def _write_error(self, batch: WriteBatch, error: Exception) -> errors.WriteError:
        labels = [self._leaves[request.leaf].label for request in batch.requests]
        others = f" (or one of the {len(labels) - 1} others written with it)" if labels[1:] else ""
        return errors.WriteError(labels[0] if labels else "", f"cannot be written{others}: {error}")


def count_off(left: Counter[int], batch: WriteBatch) -> int:
    """Counts the pieces of a batch as done; returns how many leaves have none left."""
    if not batch.requests:
        return len(batch.first_of)
    left.subtract(request.leaf for request in batch.requests)
    return sum(left[leaf] == 0 for leaf in {request.leaf for request in batch.requests})
