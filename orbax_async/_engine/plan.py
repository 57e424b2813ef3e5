"""Which process writes and reads which piece of which leaf.

Rules
  I1   Across processes each element of an array is in exactly one write request; on load each
       process reads each piece that its devices need once, however many devices need it.

Theory of operation
  A plan is a pure function of what leaves are: shapes, element sizes, and for each shard of
  the sharding its device, that device's process, and its box. It imports neither asyncio nor
  TensorStore nor jax, so that one process can test the plan of any number of processes.

  Shards with equal boxes are replicas, in the order of their device ids. One replica writes; or,
  with replica-parallel saving, the box is divided along its first axis that the number of
  replicas divides, and each replica writes one part. Every piece of a leaf has the same shape;
  it is a whole number of the leaf's chunks on disk, most often one.

  A load reads regions. A region is the box of one shard; or, where several shards would have to
  read and decode the same chunks, one box around them all, of which each takes its part.

  Requests are put into batches: the unit that is staged, written and committed together. Batches
  keep the order of the requests, prioritized leaves first.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

Box = tuple[tuple[int, int], ...]


class ShardSpec(NamedTuple):
    """One device's part of an array: `box` is (start, stop) for each axis."""

    device_id: int
    process: int
    box: Box


class Planned(Protocol):
    """What a plan asks of a leaf.

    Attributes:
      itemsize: bytes of an element.
      shards: each device's part of it.
      priority: requests of lower numbers go first.
    """

    @property
    def itemsize(self) -> int: ...
    @property
    def shards(self) -> tuple[ShardSpec, ...]: ...
    @property
    def priority(self) -> int: ...


class ReplicaParallel(NamedTuple):
    """How replicas share the writing of what they all hold."""

    min_slice_nbytes: int | None = None
    max_replicas: int | None = None


class WriteRequest(NamedTuple):
    """One piece to write: `box` of leaf `leaf`, held by device `device_id` within `shard_box`."""

    leaf: int
    device_id: int
    shard_box: Box
    box: Box
    nbytes: int
    priority: int


class Region(NamedTuple):
    """A box of a leaf to read once; each part of it goes to the local devices that hold it."""

    box: Box
    parts: tuple[tuple[Box, tuple[int, ...]], ...]
    nbytes: int
    is_empty: bool  # nothing of it is stored


class ChunkGrid(NamedTuple):
    """How an array is stored: its shape, and the smallest piece that is encoded by itself.

    `is_raw` says whether a run of bytes can be read out of the middle of a chunk.
    """

    shape: Sequence[int]
    chunk_shape: Sequence[int]
    is_raw: bool


class ReadRequest(NamedTuple):
    """One region to read of leaf `leaf`."""

    leaf: int
    region: Region
    nbytes: int


def whole(shape: Sequence[int]) -> Box:
    """Returns the box of a whole array."""
    return tuple((0, side) for side in shape)


@functools.lru_cache(maxsize=1024)
def box_shape(box: Box) -> tuple[int, ...]:
    """Returns the shape of a box."""
    return tuple(stop - start for start, stop in box)


def box_nbytes(box: Box, itemsize: int) -> int:
    """Returns the bytes of a box."""
    return math.prod(box_shape(box)) * itemsize


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Returns where a box lies in an array that holds the box around it."""
    pairs = zip(box, outer, strict=True)
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in pairs)


class _Piece(NamedTuple):
    """A part of an array that one process writes from one device's shard."""

    shard: ShardSpec
    box: Box
    shape: tuple[int, ...]
    nbytes: int


@functools.lru_cache(maxsize=1024)  # many leaves of a state are alike
def _pieces(
    shards: tuple[ShardSpec, ...], itemsize: int, policy: ReplicaParallel | None
) -> tuple[_Piece, ...]:
    """Divides an array among the devices that hold it, each element to a single one."""
    replicas: dict[Box, list[ShardSpec]] = {}
    for shard in sorted(shards, key=lambda shard: shard.device_id):
        replicas.setdefault(shard.box, []).append(shard)
    return tuple(
        _Piece(shard, part, box_shape(part), box_nbytes(part, itemsize))
        for box, alike in replicas.items()
        for part, shard in zip(_parts(box, len(alike), itemsize, policy), alike, strict=False)
    )


def _parts(
    box: Box, replica_count: int, itemsize: int, policy: ReplicaParallel | None
) -> list[Box]:
    """Divides a box among replicas; a single part where the policy or the shape forbids it."""
    if policy is None:
        return [box]
    count = min(replica_count, policy.max_replicas or replica_count)
    if count < 2:
        return [box]
    for axis, (start, stop) in enumerate(box):
        side, rest = divmod(stop - start, count)
        if side and not rest:
            parts = [
                (*box[:axis], (start + i * side, start + (i + 1) * side), *box[axis + 1 :])
                for i in range(count)
            ]
            too_small = (
                policy.min_slice_nbytes is not None
                and box_nbytes(parts[0], itemsize) < policy.min_slice_nbytes
            )
            return [box] if too_small else parts
    return [box]


def write_shape(
    shards: tuple[ShardSpec, ...], itemsize: int, policy: ReplicaParallel | None
) -> tuple[int, ...]:
    """Returns the shape of every piece that is written of an array."""
    return _pieces(shards, itemsize, policy)[0].shape


@functools.lru_cache(maxsize=1024)
def chunk_shape(
    shape: tuple[int, ...],
    write_shape: tuple[int, ...],
    *,
    max_count: int | None,
    axes: tuple[int, ...] = (),
) -> tuple[int, ...]:
    """Returns the shape of the chunks into which each piece is divided: the one Orbax chooses.

    A chunk has one element along each of `axes`. While it has too many, the longest axis that is
    divided already, into pieces or chunks, goes down to its next divisor; axes that are not
    divided follow when those are.

    Args:
      shape: of the array.
      write_shape: of its pieces.
      max_count: the most elements of a chunk, one at least; None for no limit.
      axes: see above.
    """
    largest = [max(1, side) for side in write_shape]
    sides = list(largest)
    divided = [side != whole for side, whole in zip(sides, shape, strict=True)]
    for axis in axes:
        divided[axis] |= sides[axis] > 1
        sides[axis] = 1
    while max_count is not None and math.prod(sides) > max_count:
        longest = max(range(len(sides)), key=lambda axis: (divided[axis], sides[axis], -axis))
        if divided[longest] and sides[longest] > 1:
            lower = _proper_divisors(largest[longest])
            sides[longest] = max(side for side in lower if side < sides[longest])
        else:
            divided = [True] * len(sides)
    return tuple(sides)


@functools.lru_cache(maxsize=64)
def _proper_divisors(number: int) -> set[int]:
    """Returns the divisors of a number that are less than itself."""
    low = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return {*low, *(number // each for each in low)} - {number}


def plan_writes(
    leaves: Iterable[Planned], *, process: int, policy: ReplicaParallel | None = None
) -> list[WriteRequest]:
    """Returns what `process` writes, by priority, and else in the order of the leaves."""
    requests = [
        WriteRequest(
            index,
            piece.shard.device_id,
            piece.shard.box,
            piece.box,
            piece.nbytes,
            leaf.priority,
        )
        for index, leaf in enumerate(leaves)
        for piece in _pieces(leaf.shards, leaf.itemsize, policy)
        if piece.nbytes and piece.shard.process == process
    ]
    requests.sort(key=lambda request: request.priority)
    return requests


def read_regions(
    shards: Sequence[ShardSpec],
    itemsize: int,
    grid: ChunkGrid,
    *,
    process: int,
    is_tight: bool = False,
) -> tuple[Region, ...]:
    """Returns what a process reads of a leaf for its own devices.

    Args:
      shards: of the sharding to load to, over all processes.
      itemsize: bytes of an element.
      grid: how the array is stored.
      process: whose devices.
      is_tight: whether nothing may be read that no device needs.
    """
    boxes: dict[Box, tuple[int, ...]] = {}
    for shard in sorted(shards, key=lambda shard: shard.device_id):
        if shard.process == process:
            boxes[shard.box] = (*boxes.get(shard.box, ()), shard.device_id)
    parts = tuple(boxes.items())
    regions = tuple(_region(part[0], (part,), itemsize) for part in parts)
    if len(parts) < 2 or all(_is_separate(box, grid) for box in boxes):
        return regions
    # Several would have to read, and decode, the same chunks.
    box = tuple(
        (min(start for start, _ in axis), max(stop for _, stop in axis))
        for axis in zip(*boxes, strict=True)
    )
    around = _region(box, parts, itemsize)
    if is_tight and around.nbytes > sum(region.nbytes for region in regions):
        return regions
    return (around,)


def _region(box: Box, parts: tuple[tuple[Box, tuple[int, ...]], ...], itemsize: int) -> Region:
    nbytes = box_nbytes(box, itemsize)
    return Region(box, parts, nbytes, is_empty=not nbytes)


def _is_separate(box: Box, grid: ChunkGrid) -> bool:
    """Says whether a box shares no bytes that have to be read together with other boxes."""
    shape, chunk_shape, is_raw = grid
    cut = [
        axis
        for axis, (start, stop) in enumerate(box)
        if start % chunk_shape[axis] or (stop % chunk_shape[axis] and stop != shape[axis])
    ]
    if not cut:
        return True
    if not is_raw or len(cut) > 1:
        return False
    # Rows of a raw chunk are one run of bytes, unless it reaches over the edge of the array.
    (axis,) = cut
    pairs = zip(shape[axis + 1 :], chunk_shape[axis + 1 :], strict=True)
    return math.prod(chunk_shape[:axis]) == 1 and not any(side % piece for side, piece in pairs)


def rows(
    box: Box, shape: Sequence[int], chunk_shape: Sequence[int], itemsize: int, target_nbytes: int
) -> list[Box]:
    """Divides a box of an array whose chunks are raw into parts that several can read.

    Each is one run of bytes in each chunk that it meets. Where there are no such runs, or what lies
    between them would be read more than once, the box stays whole.
    """
    axis = next((axis for axis, (start, stop) in enumerate(box) if stop - start > 1), None)
    if axis is None:
        return [box]
    inner = slice(axis + 1, None)
    if (
        math.prod(chunk_shape[:axis]) != 1
        or tuple(chunk_shape)[inner] != tuple(shape)[inner]
        or box[inner] != whole(shape)[inner]
    ):
        return [box]
    start, stop = box[axis]
    step = max(1, target_nbytes * (stop - start) // box_nbytes(box, itemsize))
    return [
        (*box[:axis], (at, min(at + step, stop)), *box[inner]) for at in range(start, stop, step)
    ]


def chunk_regions(
    shape: Sequence[int], chunk_shape: Sequence[int], itemsize: int, target_nbytes: int
) -> Iterator[Region]:
    """Divides an array along its chunks, into regions of one chunk or of few small ones."""
    sides = [max(1, side) for side in chunk_shape]
    for axis in reversed(range(len(sides))):
        room = target_nbytes // (math.prod(sides) * itemsize)
        sides[axis] = min(sides[axis] * max(1, room), max(sides[axis], shape[axis]))
    axes = [
        [(start, min(start + piece, side)) for start in range(0, side, piece)]
        for side, piece in zip(shape, sides, strict=True)
    ]
    for box in itertools.product(*axes):
        yield _region(box, ((box, ()),), itemsize)


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=_Sized)


def batches(
    requests: Iterable[S],
    target_nbytes: int,
    max_count: int = 4096,
    *,
    first_nbytes: int | None = None,
    weigh: Callable[[S], int] = operator.attrgetter("nbytes"),
) -> Iterator[list[S]]:
    """Groups requests in order; a batch exceeds `target_nbytes` only as a single request.

    Args:
      requests: what to group.
      target_nbytes: the most that a batch weighs.
      max_count: the most requests of a batch.
      first_nbytes: the most that the first batch weighs, if that is less; each may weigh twice as
        much as the one before.
      weigh: what a request counts for; its bytes, unless it takes more than those.
    """
    batch: list[S] = []
    weight, most = 0, min(target_nbytes, first_nbytes or target_nbytes)
    for request in requests:
        own = weigh(request)
        if batch and (weight + own > most or len(batch) == max_count):
            yield batch
            batch, weight, most = [], 0, min(target_nbytes, 2 * most)
        batch.append(request)
        weight += own
    if batch:
        yield batch
