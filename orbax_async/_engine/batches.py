"""Batches of a save: pieces that are captured, written and committed together.

What a batch writes apart from values, keys and documents, is worked out here, once for a plan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from orbax_async._engine import plan
from orbax_async._engine.capture import Small
from orbax_async._engine.leaf import Leaf
from orbax_async._engine.plan import Box, WriteRequest

__all__ = ["WriteBatch", "write_batches"]

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
