"""Which process writes and reads which piece of which leaf.

Rules
  I1   Across processes each element of an array is in exactly one write request; on load each
       process reads each piece that its devices need once, however many devices need it.

Theory of operation
  A plan is a pure function of leaf specifications: shapes, element sizes, and for each shard of
  the sharding its device, that device's process, and its box. It imports neither asyncio nor
  TensorStore nor jax, so that one process can test the plan of any number of processes.

  Shards with equal boxes are replicas, in the order of their device ids. One replica writes; or,
  with replica-parallel saving, the box is divided along its first axis that the number of
  replicas divides, and each replica writes one part. Every piece of a leaf has the same shape,
  which is then the leaf's chunk shape on disk.

  Requests are put into batches: the unit that is staged, written and committed together. Batches
  keep the order of the requests, prioritized leaves first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

__all__ = [
    "LeafSpec",
    "ReadRequest",
    "ReplicaParallel",
    "ShardSpec",
    "WriteRequest",
    "batches",
    "box_nbytes",
    "box_shape",
    "plan_reads",
    "plan_writes",
    "whole",
]

Box = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ShardSpec:
    """One device's part of an array: `box` is (start, stop) for each axis."""

    device_id: int
    process: int
    box: Box


@dataclasses.dataclass(frozen=True, slots=True)
class LeafSpec:
    """What a plan knows of a leaf; `index` is its place among the leaves."""

    index: int
    shape: tuple[int, ...]
    itemsize: int
    shards: tuple[ShardSpec, ...]
    is_prioritized: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaParallel:
    """How replicas share the writing of what they all hold."""

    min_slice_nbytes: int | None = None
    max_replicas: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class WriteRequest:
    """One piece to write: `box` of leaf `leaf`, held by device `device_id` within `shard_box`."""

    leaf: int
    device_id: int
    shard_box: Box
    box: Box
    nbytes: int
    priority: int


@dataclasses.dataclass(frozen=True, slots=True)
class ReadRequest:
    """One piece to read once, for every local device in `device_ids`."""

    leaf: int
    box: Box
    device_ids: tuple[int, ...]
    nbytes: int


def whole(shape: Sequence[int]) -> Box:
    """Returns the box of a whole array."""
    return tuple((0, side) for side in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Returns the shape of a box."""
    return tuple(stop - start for start, stop in box)


def box_nbytes(box: Box, itemsize: int) -> int:
    """Returns the bytes of a box."""
    return math.prod(box_shape(box)) * itemsize


def _replicas(leaf: LeafSpec) -> Iterator[tuple[Box, list[ShardSpec]]]:
    if len(leaf.shards) == 1:  # most leaves of most states
        yield leaf.shards[0].box, list(leaf.shards)
        return
    groups: dict[Box, list[ShardSpec]] = {}
    for shard in sorted(leaf.shards, key=lambda shard: shard.device_id):
        groups.setdefault(shard.box, []).append(shard)
    yield from groups.items()


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


def write_shape(leaf: LeafSpec, policy: ReplicaParallel | None) -> tuple[int, ...]:
    """Returns the shape of every piece that is written of a leaf."""
    for box, replicas in _replicas(leaf):
        return box_shape(_parts(box, len(replicas), leaf.itemsize, policy)[0])
    return leaf.shape


def plan_writes(
    leaves: Iterable[LeafSpec], *, process: int, policy: ReplicaParallel | None = None
) -> list[WriteRequest]:
    """Returns what `process` writes, prioritized leaves first, else in the order of the leaves."""
    requests: list[WriteRequest] = []
    for leaf in leaves:
        if 0 in leaf.shape:
            continue
        for box, replicas in _replicas(leaf):
            parts = _parts(box, len(replicas), leaf.itemsize, policy)
            requests.extend(
                WriteRequest(
                    leaf=leaf.index,
                    device_id=shard.device_id,
                    shard_box=box,
                    box=part,
                    nbytes=box_nbytes(part, leaf.itemsize),
                    priority=0 if leaf.is_prioritized else 1,
                )
                for part, shard in zip(parts, replicas, strict=False)
                if shard.process == process
            )
    requests.sort(key=lambda request: request.priority)
    return requests


def plan_reads(leaves: Iterable[LeafSpec], *, process: int) -> list[ReadRequest]:
    """Returns what `process` reads for its own devices."""
    return [
        ReadRequest(
            leaf=leaf.index,
            box=box,
            device_ids=device_ids,
            nbytes=box_nbytes(box, leaf.itemsize),
        )
        for leaf in leaves
        for box, replicas in _replicas(leaf)
        if (device_ids := tuple(s.device_id for s in replicas if s.process == process))
    ]


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=_Sized)


def batches(requests: Iterable[S], target_nbytes: int, max_count: int = 4096) -> Iterator[list[S]]:
    """Groups requests in order; a batch exceeds `target_nbytes` only as a single request."""
    batch: list[S] = []
    nbytes = 0
    for request in requests:
        if batch and (nbytes + request.nbytes > target_nbytes or len(batch) == max_count):
            yield batch
            batch, nbytes = [], 0
        batch.append(request)
        nbytes += request.nbytes
    if batch:
        yield batch
