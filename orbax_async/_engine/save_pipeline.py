"""Writing a tree's arrays: planned, staged, written.

A pipeline owns the only mutable state of a save: its batches and its budgets. Batches enter in
the order of the plan. A batch holds its share of the transfer budget from before it is captured
until it is written, if capturing takes memory, and its share of the write budget while it is being
written. One task group runs everything: the first failure cancels the rest, and leaving the group
returns every reservation.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import anyio
import jax
import numpy as np
import tensorstore as ts

from orbax_async import errors
from orbax_async._engine import loop, plan
from orbax_async._engine.budget import BatchSlots, ByteBudget
from orbax_async._engine.plan import WriteRequest
from orbax_async._engine.status import Reporter
from orbax_async._engine.transfer import Mode, Piece, capture, give_back_freed
from orbax_async._storage import codecs, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._trace import Recorder
from orbax_async.tree import keypath
from orbax_async.tree.keypath import KeyPath

__all__ = ["SavePipeline", "WritableLeaf", "WriteForm", "WritePlan", "encoding_of"]

# The disk gets something to do soon: the first batch is small, and each may be twice as large as
# the one before; as soon as one is written, the disk is told to begin with it.
_FIRST_NBYTES = 16 << 20
_WRITTEN_BACK_NBYTES = 8 << 20  # in a smaller batch there is little to begin with
_GIVEN_BACK_NBYTES = 8 << 20  # encoded in one batch: what was freed is given back after it
# What is encoded at a time: what comes of it takes memory, and each 64 MiB of it a core.
_ENCODED_NBYTES = max(2, min(3, os.cpu_count() or 2)) * (64 << 20)
# Batches that workers fill at a time. Each asks for the GIL all the while, and beside a program in
# Python they wait for each other too; a large machine may write faster than one worker fills.
_FILLED_AT_ONCE = max(1, min(4, (os.cpu_count() or 1) // 4))
_STORED_NBYTES = 64 << 10  # pieces up to this size are encoded here, without opening an array


class WriteForm(NamedTuple):
    """How leaves that are alike are captured and stored.

    Attributes:
      shape: the global shape.
      chunk_shape: the shape of chunks; a piece is a whole number of them, most often one.
      dtype: the dtype on disk.
      cast: the dtype to which values are cast; None where they stay as they are.
      mode: how values are captured.
      has_one_shard: whether the array is a single one, to be captured without looking for a shard.
      encoding: how it is stored; None where a leaf's first piece decides.
      min_saving: the share of bytes that compression must then save.
    """

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    cast: np.dtype[Any] | None
    mode: Mode
    has_one_shard: bool
    encoding: codecs.Encoding | None
    min_saving: float

    def stored(self, piece: Piece) -> np.ndarray[Any, Any]:
        """Returns a piece as elements of the dtype on disk."""
        array = np.asarray(piece)
        if self.cast is not None:
            with np.errstate(all="ignore"):  # what does not fit becomes what the dtype makes of it
                array = array.astype(self.cast, copy=False)
        return array if array.dtype == self.dtype else array.view(self.dtype)

    def document(self, encoding: codecs.Encoding, *, zarr3: bool) -> bytes:
        """Returns the array's metadata document."""
        dtype_name = zarr.name_of(self.dtype)
        return zarr.array_document(self.shape, self.chunk_shape, dtype_name, encoding, zarr3=zarr3)


class WritableLeaf(NamedTuple):
    """A leaf on its way out: where it is in the tree and in storage, and how it is written."""

    keys: KeyPath
    name: str
    form: WriteForm

    @property
    def label(self) -> str:
        """Its key path, for messages."""
        return keypath.label(self.keys)


def encoding_of(
    chunk_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    may_compress: bool,
    min_saving: float,
    may_sample: bool,
) -> codecs.Encoding | None:
    """Returns how an array is stored; None where a sample of its values decides."""
    if math.prod(chunk_shape) * dtype.itemsize <= _STORED_NBYTES:
        return "stored"
    if not may_compress:
        return "raw"
    if min_saving <= 0:
        return "zstd"
    if may_sample:
        return None
    # Of several processes none may look at its own values, for all must choose alike.
    return _likely_encoding(dtype)


def _likely_encoding(dtype: np.dtype[Any]) -> codecs.Encoding:
    """Says how arrays of a dtype are mostly stored: for narrow floats and integers zstd pays."""
    return "raw" if dtype.itemsize > 2 else "zstd"


class WriteBatch:
    """Requests that are captured, written and committed together.

    Attributes:
      requests: in the order of the plan.
      nbytes: the bytes of all of them.
      staging_nbytes: the bytes of those that take memory to capture, and are not prioritized.
      encoded_nbytes: the bytes of those of which others are made, whatever a sample says.
      sampled: those of which a sample decides that.
      keys: of each request, the key of its chunk; None where its piece is several chunks.
      documents: by key, the documents of leaves that have their first piece here.
      sampled_of: such leaves whose document depends on a sample.
      whole_count: how many leaves are here with all that this process writes of them.
      shares: of the others, how many pieces.
      is_separate: whether it is written to the database of what replicas share.
      is_delayed: whether the caller need not wait until it is captured.
    """

    def __init__(
        self,
        requests: list[WriteRequest],
        first_of: Sequence[int],
        leaves: Sequence[WritableLeaf],
        pieces: Counter[int],
        *,
        zarr3: bool,
        is_separate: bool = False,
    ) -> None:
        self.requests = requests
        self.is_separate = is_separate
        self.is_delayed = bool(requests) and requests[0].priority > 1
        self.nbytes = sum(request.nbytes for request in requests)
        self.staging_nbytes = sum(
            request.nbytes
            for request in requests
            if request.priority and leaves[request.leaf].form.mode != "view"
        )
        self.encoded_nbytes = 0
        self.sampled: list[WriteRequest] = []
        for request in requests:
            encoding = leaves[request.leaf].form.encoding
            if zarr3 and encoding is None:
                self.sampled.append(request)
            elif not zarr3 or encoding != "raw":
                self.encoded_nbytes += request.nbytes
        self.keys = [_only_key(leaves[request.leaf], request.box, zarr3) for request in requests]
        self.documents: dict[str, bytes] = {}
        self.sampled_of: list[int] = []
        for index in first_of:
            leaf = leaves[index]
            if leaf.form.encoding is None:
                self.sampled_of.append(index)
            else:
                key = zarr.document_key(leaf.name, zarr3=zarr3)
                self.documents[key] = leaf.form.document(leaf.form.encoding, zarr3=zarr3)
        here = Counter(request.leaf for request in requests)
        self.shares = {leaf: count for leaf, count in here.items() if count < pieces[leaf]}
        self.whole_count = len(here) - len(self.shares) if requests else len(first_of)


def _only_key(leaf: WritableLeaf, box: plan.Box, zarr3: bool) -> str | None:
    index = _only_index(box, leaf.form.chunk_shape)
    return None if index is None else zarr.chunk_key(leaf.name, index, zarr3=zarr3)


@functools.lru_cache(maxsize=1024)
def _only_index(box: plan.Box, chunk_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns where a piece lies in the grid of chunks; None where it is several of them."""
    if plan.box_shape(box) != chunk_shape:
        return None
    return tuple(start // side for (start, _), side in zip(box, chunk_shape, strict=True))


def _chunks(
    form: WriteForm, box: plan.Box, piece: np.ndarray[Any, Any]
) -> Iterator[tuple[list[int], np.ndarray[Any, Any]]]:
    """Yields the chunks of a piece: where each lies in the grid of chunks, and its elements."""
    sides = form.chunk_shape
    grid = [
        range(start // side, stop // side) for (start, stop), side in zip(box, sides, strict=True)
    ]
    for index in itertools.product(*grid):
        within = tuple(
            slice(at * side - start, (at + 1) * side - start)
            for at, side, (start, _) in zip(index, sides, box, strict=True)
        )
        yield list(index), piece[within]


class WritePlan:
    """What this process writes of a tree: all that depends on structure and options alone.

    Args:
      leaves: every leaf that is stored as an array.
      requests: the pieces that this process writes, in order.
      batch_nbytes: how many bytes a batch holds, unless a single piece is larger; half as many of
        what is encoded, or likely to be, unless budgets limit what that takes.
      is_limited: whether there are budgets: all bytes count alike then.
      writes_documents: whether this process writes the arrays' metadata documents.
      zarr3: which version of zarr.
      separate: the leaves that go to a database of their own.
    """

    def __init__(
        self,
        leaves: Sequence[WritableLeaf],
        requests: Sequence[WriteRequest],
        *,
        batch_nbytes: int,
        is_limited: bool,
        writes_documents: bool,
        zarr3: bool,
        separate: Collection[int] = (),
    ) -> None:
        self.leaves = leaves
        self.zarr3 = zarr3
        self._is_limited = is_limited
        self.pieces = Counter(request.leaf for request in requests)
        # Leaves whose document is still to be put into a batch. Those of which this process writes
        # no piece follow in a last batch of documents alone.
        undocumented = set(range(len(leaves))) if writes_documents else set()
        self.batches: list[WriteBatch] = []
        kinds = itertools.groupby(requests, lambda each: (each.leaf in separate, each.priority > 1))
        for (is_separate, _), alike in kinds:
            first_nbytes = None if self.batches else _FIRST_NBYTES
            for batch in plan.batches(
                alike, batch_nbytes, first_nbytes=first_nbytes, weigh=self._weight
            ):
                here = dict.fromkeys(request.leaf for request in batch)
                first_of = [leaf for leaf in here if leaf in undocumented]
                undocumented.difference_update(first_of)
                self.batches.append(
                    WriteBatch(
                        batch,
                        first_of,
                        leaves,
                        self.pieces,
                        zarr3=zarr3,
                        is_separate=is_separate,
                    )
                )
        if undocumented:
            last = WriteBatch([], sorted(undocumented), leaves, self.pieces, zarr3=zarr3)
            self.batches.append(last)
        self.leaf_count = len(self.pieces) + len(undocumented)
        self.nbytes = sum(batch.nbytes for batch in self.batches)
        shared = {leaf for batch in self.batches for leaf in batch.shares}
        self.shared_pieces = {leaf: self.pieces[leaf] for leaf in shared}
        self.kinds = sorted({False, *(batch.is_separate for batch in self.batches)})

    def _weight(self, request: WriteRequest) -> int:
        """Returns the bytes of a request, twice unless it is written from where it is."""
        if self._is_limited:
            return request.nbytes
        likely = _likely_encoding(self.leaves[request.leaf].form.dtype)
        return request.nbytes * (2 if self.is_encoded(request.leaf, likely) else 1)

    def is_encoded(self, leaf: int, encoding: codecs.Encoding | None) -> bool:
        """Says whether other bytes are made of a leaf, which take memory, than it has.

        Args:
          leaf: which one.
          encoding: how it is stored if its form leaves that open.
        """
        return not self.zarr3 or (self.leaves[leaf].form.encoding or encoding) != "raw"


class SavePipeline:
    """Captures and writes the arrays of one save.

    Tier 1 ends when `staged` is set, tier 2 when `run` returns. `let_go` is set when all is
    captured for which the caller has to wait: everything but what is, and may be, delayed.
    """

    def __init__(
        self,
        write_plan: WritePlan,
        arrays: Sequence[Piece],
        *,
        write_budget: ByteBudget,
        transfer_budget: ByteBudget,
        recorder: Recorder,
        reporter: Reporter | None = None,
        may_delay: bool = False,
    ) -> None:
        self.staged = anyio.Event()
        self.let_go = anyio.Event()
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
        self._reporter = reporter
        self._undelayed = len(write_plan.batches)
        if may_delay:
            self._undelayed = sum(not batch.is_delayed for batch in write_plan.batches)
        self._slots = BatchSlots()
        self._filling_slots = anyio.Semaphore(_FILLED_AT_ONCE)
        self._encoding_budget = ByteBudget(_ENCODED_NBYTES)
        self._pieces_unstaged = write_plan.shared_pieces.copy()
        self._pieces_unwritten = write_plan.shared_pieces.copy()
        self._sampled: dict[int, codecs.Encoding] = {}
        self._to_write_back: set[ArrayStore] = set()
        self._is_starting_writeback = False
        recorder.add(leaves_planned=write_plan.leaf_count, bytes_planned=write_plan.nbytes)

    async def run(self, open_store: Callable[[bool], Any]) -> None:
        """Runs to the end.

        Args:
          open_store: awaits the directory, and returns the `ArrayStore` of everything else, or of
            what is separate.
        """
        stores_ready = anyio.Event()
        stores: dict[bool, ArrayStore] = {}

        async def prepare_stores() -> None:
            for is_separate in self._plan.kinds:
                stores[is_separate] = await open_store(is_separate)
            stores_ready.set()

        async def write_batch(batch: WriteBatch, pieces: list[Piece]) -> None:
            async with contextlib.AsyncExitStack() as filling:
                try:
                    await stores_ready.wait()
                    store = stores[batch.is_separate]
                    if not self._writes_while_staging:
                        await self.staged.wait()
                    async with (
                        self._slots.of(batch.nbytes, len(batch.requests)),
                        self.write_budget.reserve(batch.nbytes),
                    ):
                        await self._tell("start", batch)
                        with self._recorder.span("write", batch.nbytes):
                            await self._write(store, batch, pieces, filling)
                        await self._tell("end", batch)
                finally:
                    pieces.clear()
                    self.transfer_budget.release(batch.staging_nbytes)
                if batch.nbytes >= _WRITTEN_BACK_NBYTES:
                    await self._start_writeback(store)

        try:
            with errors.ungrouped():
                async with anyio.create_task_group() as group:
                    group.start_soon(prepare_stores)
                    for is_delayed, batches in self._together():
                        if is_delayed:
                            self.let_go.set()
                        nbytes = sum(batch.staging_nbytes for batch in batches)
                        await self.transfer_budget.acquire(nbytes)
                        try:
                            captured = await loop.to_worker(self._capture_all, batches)
                        except BaseException:
                            self.transfer_budget.release(nbytes)
                            raise
                        for batch in batches:
                            group.start_soon(write_batch, batch, captured.pop(0))
                    self._arrays = ()  # all is captured: nothing here keeps the caller's arrays
                    self._recorder.enter("staged")
                    self.let_go.set()
                    self.staged.set()
        finally:
            self.staged.set()
            self.let_go.set()
        self._recorder.enter("written")

    async def _tell(self, event: Literal["start", "end"], batch: WriteBatch) -> None:
        if self._reporter is not None:
            tell = self._reporter.start if event == "start" else self._reporter.end
            await loop.to_worker(tell, "write", [request.leaf for request in batch.requests])

    def _together(self) -> Iterator[tuple[bool, list[WriteBatch]]]:
        """Yields the batches that one call captures, and whether the caller need not wait for them.

        Where it takes memory each is captured by itself, when the budget has room; views are not
        worth the caller's time for more than one way to a worker and back.
        """
        batches = enumerate(self._plan.batches, 1)
        kinds = itertools.groupby(
            batches, lambda each: (each[0] > self._undelayed, each[1].staging_nbytes and each[0])
        )
        for (is_delayed, _), alike in kinds:
            yield is_delayed, [batch for _, batch in alike]

    def _capture_all(self, batches: Sequence[WriteBatch]) -> list[list[Piece]]:
        return [self._capture(batch) for batch in batches]

    def _capture(self, batch: WriteBatch) -> list[Piece]:
        """I3: takes the values of a batch; runs on a worker, in the order of the plan."""
        pieces = []
        with (
            self._recorder.span("stage", batch.nbytes),
            jax.transfer_guard("allow"),
            jax.enable_x64(True),
        ):
            for request in loop.sliced(batch.requests):
                leaf = self._leaves[request.leaf]
                if self._reporter is not None:
                    self._reporter.start("transfer", [request.leaf])
                try:
                    piece = capture(
                        self._arrays[request.leaf],
                        leaf.form.mode,
                        device_id=None if leaf.form.has_one_shard else request.device_id,
                        shard_box=request.shard_box,
                        box=request.box,
                    )
                except Exception as error:
                    raise errors.StagingError(leaf.label, f"cannot be captured: {error}") from error
                pieces.append(piece)
                if self._reporter is not None:
                    jax.block_until_ready(piece)
                    self._reporter.end("transfer", [request.leaf])
        self._recorder.add(
            leaves_staged=count_off(self._pieces_unstaged, batch), bytes_staged=batch.nbytes
        )
        return pieces

    async def _write(
        self,
        store: ArrayStore,
        batch: WriteBatch,
        pieces: list[Piece],
        filling: contextlib.AsyncExitStack,
    ) -> None:
        """Writes a batch, and keeps others from being filled until `filling` is closed.

        That is as soon as it is filled itself. Beside a program that computes in Python it is up to
        the caller: of threads that ask for the GIL by turns the program sees less.
        """
        try:
            await filling.enter_async_context(self._filling_slots)
            transaction, pending, is_contested = await loop.to_worker(
                self._fill, store, batch, pieces
            )
            if not is_contested:
                await filling.aclose()
            nbytes = self._encoded_nbytes(batch)
            budget = self._encoding_budget
            async with budget.reserve(nbytes) if nbytes else contextlib.nullcontext():
                with anyio.CancelScope(shield=True):
                    # Not to be abandoned: the files below must not change once they are removed.
                    # To wait for it begins the commit, without the GIL that commit_async holds.
                    await transaction.future
                del pending
                if nbytes >= _GIVEN_BACK_NBYTES:
                    await loop.to_worker(give_back_freed)
        except errors.LeafError:
            raise
        except Exception as error:
            raise self._write_error(batch, error) from error
        self._recorder.add(
            leaves_written=count_off(self._pieces_unwritten, batch), bytes_written=batch.nbytes
        )

    def _encoded_nbytes(self, batch: WriteBatch) -> int:
        """Returns of how many bytes of a batch others are made."""
        return batch.encoded_nbytes + sum(
            request.nbytes
            for request in batch.sampled
            if self._plan.is_encoded(request.leaf, self._sampled.get(request.leaf))
        )

    async def _start_writeback(self, store: ArrayStore) -> None:
        """Has the disk begin with what is written to a store, on one worker at a time.

        A disk with much to do may keep that one waiting.
        """
        self._to_write_back.add(store)
        if self._is_starting_writeback:
            return
        self._is_starting_writeback = True
        try:
            with self._recorder.span("writeback"):
                while self._to_write_back:
                    await loop.to_worker(self._to_write_back.pop().start_writeback)
        finally:
            self._is_starting_writeback = False

    def _fill(
        self, store: ArrayStore, batch: WriteBatch, pieces: list[Piece]
    ) -> tuple[ts.Transaction, list[ts.Future[None]], bool]:
        """Puts a batch into a transaction: small pieces as encoded values, large by reference.

        Returns it, what its end is to be awaited with, and whether the GIL was contested.
        """
        # What a device still sends is not what the stint waits for; to ask NumPy arrays takes long.
        jax.block_until_ready([piece for piece in pieces if not isinstance(piece, np.ndarray)])
        stint = loop.Stint()
        transaction = store.begin()
        is_read_directly = store.is_ocdbt and self._plan.zarr3
        values = store.values(transaction)
        pending: list[ts.Future[None]] = []
        described = zip(batch.requests, batch.keys, pieces, strict=True)
        for request, key, piece in loop.sliced(described, may_rest=self._may_rest):
            leaf = self._leaves[request.leaf]
            try:
                array = leaf.form.stored(piece)
                encoding = leaf.form.encoding or self._encoding(request.leaf, array)
                if encoding == "stored" and key is not None:
                    values[key] = codecs.encode_stored(array)
                    continue
                if encoding == "stored":
                    for index, chunk in _chunks(leaf.form, request.box, array):
                        chunk_key = zarr.chunk_key(leaf.name, index, zarr3=self._plan.zarr3)
                        values[chunk_key] = codecs.encode_stored(chunk)
                    continue
                document = leaf.form.document(encoding, zarr3=self._plan.zarr3)
                pending.append(
                    store.put_chunk(transaction, leaf.name, document, request.box, array)
                )
                if encoding == "raw" and is_read_directly:
                    for index, chunk in _chunks(leaf.form, request.box, array):
                        whole = np.ascontiguousarray(chunk) if key is None else chunk
                        if whole.flags.c_contiguous:  # not worth a copy of all of it
                            sums = codecs.block_checksums(whole)
                            values[zarr.checksums_key(leaf.name, index)] = sums
            except Exception as error:
                raise errors.WriteError(leaf.label, f"cannot be written: {error}") from error
        for first in batch.sampled_of:
            leaf = self._leaves[first]
            key = zarr.document_key(leaf.name, zarr3=self._plan.zarr3)
            values[key] = leaf.form.document(self._encoding(first, None), zarr3=self._plan.zarr3)
        for key, document in loop.sliced(batch.documents.items(), may_rest=self._may_rest):
            values[key] = document
        return transaction, pending, stint.was_contested()

    def _may_rest(self) -> bool:
        return not self._recorder.is_waited_for

    def _encoding(self, index: int, array: np.ndarray[Any, Any] | None) -> codecs.Encoding:
        """Decides once how a leaf is stored, by the first of its pieces that gets here.

        Pieces of one leaf may be in several batches, which are filled on several workers.
        """
        found = self._sampled.get(index)
        if found is None:
            saving = 0.0 if array is None else codecs.compression_saving(array)
            sampled: codecs.Encoding = (
                "zstd" if saving >= self._leaves[index].form.min_saving else "raw"
            )
            found = self._sampled.setdefault(index, sampled)
        return found

    def _write_error(self, batch: WriteBatch, error: Exception) -> errors.WriteError:
        labels = [self._leaves[request.leaf].label for request in batch.requests]
        others = f" (or one of the {len(labels) - 1} others written with it)" if labels[1:] else ""
        return errors.WriteError(labels[0] if labels else "", f"cannot be written{others}: {error}")


def count_off(left: dict[int, int], batch: WriteBatch) -> int:
    """Counts the pieces of a batch as done; returns how many leaves have none left."""
    for leaf, count in batch.shares.items():
        left[leaf] -= count
    return batch.whole_count + sum(left[leaf] == 0 for leaf in batch.shares)
