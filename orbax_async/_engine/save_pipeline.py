"""Writing a tree's arrays: captured, written.

A pipeline owns the only mutable state of a save: its batches and its budgets. Batches are captured
in the order of the plan, at once where nothing limits copies, and else one by one, while others are
written. A batch holds its share of the transfer budget from before it is captured until it is
written, if capturing takes memory, and its share of the write budget while it is being written. One
task group runs all that is written: the first failure cancels the rest, and leaving the group
returns every reservation.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import anyio
import jax
import numpy as np
import tensorstore as ts

from orbax_async import errors
from orbax_async._engine import gil, loop, plan
from orbax_async._engine.budget import BatchSlots, ByteBudget
from orbax_async._engine.leaf import Leaf, Piece, WriteBatch
from orbax_async._engine.transfer import capture, copy_small, give_back_freed
from orbax_async._storage import codecs, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._trace import Recorder

Event = Literal["transfer_start", "transfer_end", "write_start", "write_end"]

_WRITTEN_BACK_NBYTES = 8 << 20  # in a smaller batch there is little for the disk to begin with
# What was freed is given back after a batch of which so much is re-encoded, or of so many pieces.
_GIVEN_BACK_NBYTES, _GIVEN_BACK_PIECES = 8 << 20, 4096
# What is re-encoded at a time: what comes of it takes memory, and each 64 MiB of it a core.
_ENCODED_NBYTES = max(2, min(3, os.cpu_count() or 2)) * (64 << 20)
# Batches that workers fill at a time. Each wants the interpreter lock all the while; a large
# machine may write faster than one worker fills.
_FILLED_AT_ONCE = max(1, min(4, (os.cpu_count() or 1) // 4))


class SavePipeline:
    """Captures and writes the arrays of one save.

    Phase 1 ends when `staged` is set, phase 2 when `run` returns. `released` is set when all is
    captured for which the caller has to wait: everything but what is delayed.

    Args:
      batches: what to write.
      arrays: the arrays of all leaves.
      write_budget: bytes that are being written.
      transfer_budget: bytes that were copied and are not written yet.
      recorder: counts and times.
      report: is told when pieces of leaves begin to be captured or written, and when they are;
        it may block, and what it raises fails the save.
    """

    def __init__(
        self,
        batches: Sequence[WriteBatch],
        arrays: Sequence[Piece],
        *,
        write_budget: ByteBudget,
        transfer_budget: ByteBudget,
        recorder: Recorder,
        report: Callable[[Event, Sequence[int]], None] | None = None,
    ) -> None:
        self.staged = anyio.Event()
        self.released = anyio.Event()
        self.write_budget = write_budget
        self.transfer_budget = transfer_budget
        self._batches = batches
        self._arrays = arrays
        self._recorder = recorder
        self._report = report
        self._uncaptured = collections.deque(_together(batches))
        self._captured: collections.deque[tuple[WriteBatch, list[Piece]]] = collections.deque()
        self._stores: dict[bool, ArrayStore] = {}
        self._stores_are_open = anyio.Event()
        self._slots = BatchSlots()
        self._filling = anyio.Semaphore(_FILLED_AT_ONCE)
        self._encoding_budget = ByteBudget(_ENCODED_NBYTES)
        self._sampled: dict[str, codecs.Encoding] = {}
        self._starting_writeback = anyio.Semaphore(1)
        nbytes = sum(batch.nbytes for batch in batches)
        count = sum(batch.leaf_count for batch in batches)
        recorder.add(leaves_planned=count, bytes_planned=nbytes)

    async def capture(self) -> None:
        """Captures what waits for nothing: everything, unless copies are limited."""
        is_limited = self.transfer_budget.limit_nbytes is not None
        while self._uncaptured:
            first = self._uncaptured[0][0]
            if first.is_delayed or (is_limited and first.staging_nbytes):
                break
            await self._capture_next()

    async def run(self, open_store: Callable[[bool], Awaitable[ArrayStore]]) -> None:
        """Captures the rest, writes everything, and runs to the end.

        Args:
          open_store: opens the store of everything else, or that of what is separate.
        """
        try:
            with errors.ungrouped():
                async with anyio.create_task_group() as group:
                    group.start_soon(self._open_stores, open_store)
                    while self._uncaptured:
                        self._start_writing(group)
                        await self._capture_next()
                    # A caller who was just released has the interpreter meanwhile.
                    await self._stores_are_open.wait()
                    self._start_writing(group)
        finally:
            for batch, _ in self._captured:  # I2: what is not written any more
                self.transfer_budget.release(batch.staging_nbytes)
            self._captured.clear()
            self.released.set()
            self.staged.set()
        self._recorder.enter("written")

    def _start_writing(self, group: anyio.abc.TaskGroup) -> None:
        while self._captured:
            group.start_soon(self._write_captured, *self._captured.popleft())

    async def _open_stores(self, open_store: Callable[[bool], Awaitable[ArrayStore]]) -> None:
        for is_separate in sorted({False, *(batch.is_separate for batch in self._batches)}):
            self._stores[is_separate] = await open_store(is_separate)
        self._stores_are_open.set()

    # Capturing.

    async def _capture_next(self) -> None:
        batches = self._uncaptured.popleft()
        if batches[0].is_delayed:
            self.released.set()
        nbytes = sum(batch.staging_nbytes for batch in batches)
        await self.transfer_budget.acquire(nbytes)
        try:
            captured = await loop.to_worker(self._capture_some, batches)
        except BaseException:
            self.transfer_budget.release(nbytes)
            raise
        self._captured += zip(batches, captured, strict=True)
        if not self._uncaptured:
            self._arrays = ()  # nothing here keeps the caller's arrays
            self._recorder.enter("staged")
            self.released.set()
            self.staged.set()

    def _capture_some(self, batches: Sequence[WriteBatch]) -> list[list[Piece]]:
        """I3: takes the values of some batches; runs on a worker, in the order of the plan."""
        nbytes = sum(batch.nbytes for batch in batches)
        with (
            self._recorder.span("stage", nbytes),
            jax.transfer_guard("allow"),
            jax.enable_x64(True),
        ):
            small = [] if self._report else [each for batch in batches for each in batch.small]
            copies = copy_small(self._arrays, small)
            captured = [self._capture(batch, copies) for batch in batches]
        leaf_count = sum(batch.leaf_count for batch in batches)
        self._recorder.add(leaves_staged=leaf_count, bytes_staged=nbytes)
        return captured

    def _capture(self, batch: WriteBatch, copies: Mapping[int, Piece]) -> list[Piece]:
        report = self._report
        pieces: list[Any] = [copies.get(request.leaf) for request in batch.requests]
        others = [place for place, piece in enumerate(pieces) if piece is None]
        for place in gil.sliced(others):
            request, leaf = batch.requests[place], batch.leaves[place]
            if report is not None:
                report("transfer_start", [request.leaf])
            try:
                pieces[place] = capture(self._arrays[request.leaf], leaf.storage, request)
            except Exception as error:
                raise errors.StagingError(leaf.label, f"cannot be captured: {error}") from error
            if report is not None:
                jax.block_until_ready(pieces[place])
                report("transfer_end", [request.leaf])
        return pieces

    # Writing.

    async def _write_captured(self, batch: WriteBatch, pieces: list[Piece]) -> None:
        """Writes a batch when its turn has come, and lets go of what it was captured in."""
        try:
            await self._stores_are_open.wait()
            store = self._stores[batch.is_separate]
            async with (
                self._slots.of(batch.nbytes, len(batch.requests)),
                self.write_budget.reserve(batch.nbytes),
            ):
                await self._tell("write_start", batch)
                with self._recorder.span("write", batch.nbytes):
                    await self._write(store, batch, pieces)
                await self._tell("write_end", batch)
        finally:
            pieces.clear()
            self.transfer_budget.release(batch.staging_nbytes)
        if batch.nbytes >= _WRITTEN_BACK_NBYTES:
            # A disk with much to do may keep whoever tells it waiting: one worker at a time.
            async with self._starting_writeback:
                with self._recorder.span("writeback"):
                    await loop.to_worker(store.start_writeback)

    async def _tell(self, event: Event, batch: WriteBatch) -> None:
        if self._report is not None:
            leaves = [request.leaf for request in batch.requests]
            await loop.to_worker(self._report, event, leaves)

    async def _write(self, store: ArrayStore, batch: WriteBatch, pieces: list[Piece]) -> None:
        try:
            async with self._filling:
                filled = await loop.to_worker(self._fill, store, batch, pieces)
            transaction, pending, encoded_nbytes = filled
            async with self._encoding_budget.reserve(encoded_nbytes):
                with anyio.CancelScope(shield=True):
                    # Not to be abandoned: the files below must not change once they are removed.
                    # To wait for it begins the commit, without the lock that commit_async holds.
                    await transaction.future
                del filled, pending
                is_much = encoded_nbytes >= _GIVEN_BACK_NBYTES
                if is_much or len(batch.requests) >= _GIVEN_BACK_PIECES:
                    await loop.to_worker(give_back_freed)
        except errors.LeafError:
            raise
        except Exception as error:
            raise self._write_error(batch, error) from error
        self._recorder.add(leaves_written=batch.leaf_count, bytes_written=batch.nbytes)

    def _write_error(self, batch: WriteBatch, error: Exception) -> errors.WriteError:
        labels = [leaf.label for leaf in batch.leaves]
        others = f" (or one of the {len(labels) - 1} others written with it)" if labels[1:] else ""
        return errors.WriteError(labels[0] if labels else "", f"cannot be written{others}: {error}")

    def _fill(
        self, store: ArrayStore, batch: WriteBatch, pieces: list[Piece]
    ) -> tuple[ts.Transaction, list[ts.Future[None]], int]:
        """Puts a batch into a transaction: small pieces as encoded values, large by reference.

        Returns it, what its end is to be awaited with, and the bytes that are re-encoded.
        """
        transaction = store.begin()
        values = store.values(transaction)
        pending: list[ts.Future[None]] = []
        encoded_nbytes = 0
        described = zip(batch.requests, batch.leaves, batch.keys, pieces, strict=True)
        for request, leaf, key, piece in gil.sliced(described):
            try:
                array = leaf.storage.stored(piece)
                encoding = leaf.storage.encoding or self._encoding(leaf, array)
                if leaf.storage.reencodes(encoding):
                    encoded_nbytes += request.nbytes
                if encoding != "stored":
                    document = leaf.document(encoding)
                    pending.append(
                        store.put_chunk(transaction, leaf.name, document, request.box, array)
                    )
                    if encoding == "raw" and store.is_ocdbt and store.zarr3:  # read directly
                        for index, chunk in _chunks(leaf, request.box, array):
                            _put_checksums(values, leaf, index, chunk, may_copy=key is None)
                elif key is not None:
                    values[key] = codecs.encode_stored(array)
                else:
                    for index, chunk in _chunks(leaf, request.box, array):
                        values[leaf.chunk_key(index)] = codecs.encode_stored(chunk)
            except Exception as error:
                raise errors.WriteError(leaf.label, f"cannot be written: {error}") from error
        for leaf in batch.undecided:
            values[leaf.document_key] = leaf.document(self._encoding(leaf, None))
        for key, document in gil.sliced(batch.documents.items()):
            values[key] = document
        return transaction, pending, encoded_nbytes

    def _encoding(self, leaf: Leaf, array: np.ndarray[Any, Any] | None) -> codecs.Encoding:
        """Decides once how a leaf is encoded, by the first of its pieces that gets here.

        Pieces of one leaf may be in several batches, which are filled on several workers.
        """
        found = self._sampled.get(leaf.name)
        if found is None:
            saving = 0.0 if array is None else codecs.compression_saving(array)
            is_worth_it = saving >= leaf.storage.min_saving
            found = self._sampled.setdefault(leaf.name, "zstd" if is_worth_it else "raw")
        return found


def _together(batches: Sequence[WriteBatch]) -> Iterator[list[WriteBatch]]:
    """Yields batches that one call captures.

    Where it takes memory each is captured by itself, when the budget has room; views are not
    worth the caller's time for more than one way to a worker and back.
    """

    def kind(numbered: tuple[int, WriteBatch]) -> tuple[bool, int]:
        number, batch = numbered
        return batch.is_delayed, number if batch.staging_nbytes else 0

    for _, alike in itertools.groupby(enumerate(batches, 1), kind):
        yield [batch for _, batch in alike]


def _chunks(
    leaf: Leaf, box: plan.Box, piece: np.ndarray[Any, Any]
) -> Iterator[tuple[tuple[int, ...], np.ndarray[Any, Any]]]:
    """Yields the chunks of a piece: where each lies in the grid of chunks, and its elements."""
    sides = leaf.storage.chunk_shape
    grid = [
        range(start // side, stop // side) for (start, stop), side in zip(box, sides, strict=True)
    ]
    for index in itertools.product(*grid):
        chunk_box = tuple(
            (at * side, (at + 1) * side) for at, side in zip(index, sides, strict=True)
        )
        yield index, piece[plan.within(chunk_box, box)]


def _put_checksums(
    values: ts.KvStore,
    leaf: Leaf,
    index: tuple[int, ...],
    chunk: np.ndarray[Any, Any],
    *,
    may_copy: bool,
) -> None:
    """Adds the checksums of a chunk's blocks, with which loads read it without TensorStore."""
    whole = np.ascontiguousarray(chunk) if may_copy else chunk
    if whole.flags.c_contiguous:  # not worth a copy of a whole piece
        values[zarr.checksums_key(leaf.name, index)] = codecs.block_checksums(whole)
