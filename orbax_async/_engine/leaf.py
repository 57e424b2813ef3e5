"""The shapes of a leaf on its way out: what it is, a captured piece, a batch to write.

What a batch writes apart from values, keys and documents, is worked out here, once for a plan.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from orbax_async._engine import plan
from orbax_async._engine.plan import Box, ShardSpec, WriteRequest
from orbax_async._storage import codecs, zarr
from orbax_async.tree import keypath, schema
from orbax_async.tree.keypath import KeyPath

Piece = np.ndarray[Any, Any] | jax.Array  # once it is captured, or placed on a device
Small = tuple[int, tuple[int, ...], np.dtype[Any], int]  # the leaf, its shape, dtype and bytes
Mode = Literal["view", "copy", "fetch", "pin"]

_UINT8 = np.dtype(np.uint8)


class Storage(NamedTuple):
    """How an array is divided, captured and stored; arrays that are alike share one.

    Attributes:
      dtype: the dtype on disk.
      cast: the dtype to which values are cast first; None where they stay as they are.
      itemsize: bytes of an element, as it is captured or on disk, whichever are more.
      shards: each device's part of the array.
      write_shape: the shape of the pieces that are written.
      chunk_shape: the shape of chunks; a piece is a whole number of them, most often one.
      mode: how values are captured.
      is_small: whether they may be captured by `copy_small`.
      encoding: how chunks are encoded; None where a sample of the first piece decides.
      min_saving: the share of bytes that compression must then save.
      is_separate: whether replicas write a part each, to a database of their own.
      zarr3: whether it is stored as zarr version 3.
    """

    dtype: np.dtype[Any]
    cast: np.dtype[Any] | None
    itemsize: int
    shards: tuple[ShardSpec, ...]
    write_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    mode: Mode
    is_small: bool
    encoding: codecs.Encoding | None
    min_saving: float
    is_separate: bool
    zarr3: bool

    @property
    def likely_encoding(self) -> codecs.Encoding:
        """How chunks are encoded, or mostly will be: for narrow floats and integers zstd pays."""
        return self.encoding or ("raw" if self.dtype.itemsize > 2 else "zstd")

    def reencodes(self, encoding: codecs.Encoding) -> bool:
        """Says whether an encoding makes other bytes than the array has, which take memory."""
        return not self.zarr3 or encoding != "raw"

    def stored(self, piece: Piece) -> np.ndarray[Any, Any]:
        """Returns a piece as elements of the dtype on disk."""
        array = np.asarray(piece)
        if self.cast is not None:
            with np.errstate(all="ignore"):  # what does not fit becomes what the dtype makes of it
                array = array.astype(self.cast, copy=False)
        return array if array.dtype == self.dtype else array.view(self.dtype)


@dataclasses.dataclass(slots=True)
class Leaf:
    """What is known of a leaf, or of an empty node, apart from its values.

    Attributes:
      keys: where it is in the tree.
      kind: as `schema.Entry.kind`.
      shape: the global shape of its array; None where it is not stored as one.
      dtype: the dtype that its values have on disk, unless they are cast.
      sharding: of a jax array.
      is_mutable: whether the caller could change its array in place.
      prng_impl: of typed PRNG keys, the name of their implementation.
      private: what only we record.
      priority: 0 if it is captured first, and outside of the limit of transfers; else 1, and more
        the longer it may wait.
      name: the name under which it is stored.
      storage: of an array, how it is stored.
    """

    keys: KeyPath
    kind: str
    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] = _UINT8
    sharding: jax.sharding.Sharding | None = None
    is_mutable: bool = False
    prng_impl: str | None = None
    private: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    priority: int = 1
    name: str = dataclasses.field(init=False)
    storage: Storage = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.name = keypath.stored_name(self.keys)

    @property
    def label(self) -> str:
        """Its key path, for messages."""
        return keypath.label(self.keys)

    @property
    def has_value(self) -> bool:
        """Whether it is a leaf, not an empty node."""
        return self.shape is not None or self.kind == schema.STRING

    @property
    def itemsize(self) -> int:
        """Bytes of an element of its array."""
        return self.storage.itemsize

    @property
    def shards(self) -> tuple[ShardSpec, ...]:
        """Each device's part of its array."""
        return self.storage.shards

    def entry(self, write_shape: tuple[int, ...] | None = None) -> schema.Entry:
        """Returns what the tree's document records of it.

        Args:
          write_shape: the shape of the pieces that are written, if that is recorded.
        """
        return schema.Entry(self.keys, self.kind, self.name, write_shape, self.private)

    def document(self, encoding: codecs.Encoding) -> bytes:
        """Returns the metadata document of its array."""
        storage, dtype_name = self.storage, zarr.name_of(self.storage.dtype)
        assert self.shape is not None
        return zarr.array_document(
            self.shape, storage.chunk_shape, dtype_name, encoding, zarr3=storage.zarr3
        )

    @property
    def document_key(self) -> str:
        """The key of that document."""
        return zarr.document_key(self.name, zarr3=self.storage.zarr3)

    def chunk_key(self, index: tuple[int, ...]) -> str:
        """Returns the key of a chunk by its place in the grid of chunks."""
        return zarr.chunk_key(self.name, index, zarr3=self.storage.zarr3)


_BATCH_NBYTES = 128 << 20  # half as much of what is encoded, or within a limit
# The disk gets something to do soon: the first batch is small, and each may be twice as large as
# the one before.
_FIRST_NBYTES = 16 << 20
# Small arrays of which copies are made; of what follows views are taken.
_SMALL_NBYTES_IN_ALL = 16 << 20


class WriteBatch:
    """Pieces that are captured, written and committed together.

    Args:
      leaves: every leaf that is stored as an array.
      requests: the pieces.
      first_of: the leaves whose metadata documents are written with them.
      leaf_count: of how many leaves nothing follows.
      small_nbytes: the most bytes of small arrays to copy; see `copy_small`.

    Attributes:
      requests: in the order of the plan.
      leaves: of each piece, the leaf.
      keys: of each piece, the key of its chunk; None where it is several chunks.
      documents: by key, the metadata documents.
      undecided: the leaves whose document depends on a sample.
      small: the pieces that are captured by `copy_small`.
      leaf_count: of how many leaves nothing follows.
      nbytes: the bytes of all pieces.
      staging_nbytes: the bytes of those that take memory to capture, and are not prioritized.
      is_separate: whether it is written to the database of what replicas share.
      is_delayed: whether it is captured after the caller goes on.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        requests: Sequence[WriteRequest],
        first_of: Sequence[Leaf],
        *,
        leaf_count: int,
        small_nbytes: int = 0,
    ) -> None:
        self.requests = requests
        self.leaves = [leaves[request.leaf] for request in requests]
        pairs = list(zip(requests, self.leaves, strict=True))
        self.keys = [_only_key(leaf, request.box) for request, leaf in pairs]
        self.documents: dict[str, bytes] = {}
        self.undecided: list[Leaf] = []
        for leaf in first_of:
            if leaf.storage.encoding is None:
                self.undecided.append(leaf)
            else:
                self.documents[leaf.document_key] = leaf.document(leaf.storage.encoding)
        self.small = _small_ones(pairs, small_nbytes)
        self.leaf_count = leaf_count
        self.nbytes = sum(request.nbytes for request in requests)
        self.staging_nbytes = sum(
            request.nbytes
            for request, leaf in pairs
            if request.priority and leaf.storage.mode != "view"
        )
        self.is_separate = any(leaf.storage.is_separate for leaf in self.leaves[:1])
        self.is_delayed = False


def _only_key(leaf: Leaf, box: Box) -> str | None:
    index = _only_index(box, leaf.storage.chunk_shape)
    return None if index is None else leaf.chunk_key(index)


@functools.lru_cache(maxsize=1024)
def _only_index(box: Box, chunk_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns where a piece lies in the grid of chunks; None where it is several of them."""
    if plan.box_shape(box) != chunk_shape:
        return None
    return tuple(start // side for (start, _), side in zip(box, chunk_shape, strict=True))


def _small_ones(pairs: Iterable[tuple[WriteRequest, Leaf]], most_nbytes: int) -> list[Small]:
    found: list[Small] = []
    for request, leaf in pairs:
        if leaf.storage.is_small and leaf.shape is not None:
            nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
            most_nbytes -= nbytes
            if most_nbytes < 0:
                break
            found.append((request.leaf, leaf.shape, leaf.dtype, nbytes))
    return found


def write_batches(
    leaves: Sequence[Leaf],
    requests: Sequence[WriteRequest],
    *,
    limit_nbytes: int | None = None,
    may_delay: bool = False,
    writes_documents: bool = True,
) -> list[WriteBatch]:
    """Divides what this process writes into batches, prioritized leaves first.

    A batch holds only so many bytes, unless a single piece is larger. Pieces that are likely to
    be re-encoded count twice, but within a limit all count alike, and batches are smaller.

    Args:
      leaves: every leaf that is stored as an array.
      requests: the pieces that this process writes, in order.
      limit_nbytes: the smallest of the save's budgets; None where none has a limit.
      may_delay: whether the caller goes on before leaves of low priority are captured.
      writes_documents: whether this process writes the metadata documents of arrays.
    """
    is_limited = limit_nbytes is not None
    target_nbytes = _BATCH_NBYTES if limit_nbytes is None else min(_BATCH_NBYTES // 2, limit_nbytes)

    def weight(request: WriteRequest) -> int:
        storage = leaves[request.leaf].storage
        is_twice = not is_limited and storage.reencodes(storage.likely_encoding)
        return request.nbytes * (2 if is_twice else 1)

    def goes_to(request: WriteRequest) -> bool:
        return leaves[request.leaf].storage.is_separate

    # Each kind in a row, so that there are few batches.
    in_order = sorted(requests, key=lambda request: (request.priority, goes_to(request)))
    kinds = itertools.groupby(in_order, lambda request: (goes_to(request), request.priority > 1))
    left = Counter(request.leaf for request in requests)
    undocumented = set(range(len(leaves))) if writes_documents else set()
    room = 0 if is_limited else _SMALL_NBYTES_IN_ALL
    batches: list[WriteBatch] = []
    for (_, is_low), alike in kinds:
        first_nbytes = None if batches else _FIRST_NBYTES
        for group in plan.batches(alike, target_nbytes, first_nbytes=first_nbytes, weigh=weight):
            here = Counter(request.leaf for request in group)
            left.subtract(here)
            batch = WriteBatch(
                leaves,
                group,
                [leaves[leaf] for leaf in here if leaf in undocumented],
                leaf_count=sum(not left[leaf] for leaf in here),
                small_nbytes=room,
            )
            batch.is_delayed = is_low and may_delay
            undocumented.difference_update(here)
            room -= sum(nbytes for *_, nbytes in batch.small)
            batches.append(batch)
    if undocumented:  # of leaves of which this process writes no piece
        rest = [leaves[leaf] for leaf in sorted(undocumented)]
        batches.append(WriteBatch(leaves, [], rest, leaf_count=len(rest)))
    return batches
