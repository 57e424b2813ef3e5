"""The plan (I1): who writes and reads which piece, for any number of devices and processes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from orbax_async._engine import plan, transfer


class Spec(NamedTuple):
    """What a plan asks of a leaf, and the shape that tests compare with."""

    shape: tuple[int, ...]
    itemsize: int
    shards: tuple[plan.ShardSpec, ...]
    priority: int = 1

    def write_shape(self, policy: plan.ReplicaParallel | None) -> tuple[int, ...]:
        return plan.write_shape(self.shards, self.itemsize, policy)


@st.composite
def topologies(draw: st.DrawFn) -> tuple[Spec, int]:
    """Draws an array, divided and replicated over a mesh of devices that some processes own."""
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    # Each mesh axis divides one axis of the array, or replicates it.
    rank = draw(st.integers(0, 3))
    divides = [draw(st.none() | st.integers(0, rank - 1)) if rank else None for _ in mesh]
    pieces = [
        math.prod(n for n, at in zip(mesh, divides, strict=True) if at == axis)
        for axis in range(rank)
    ]
    sides = [draw(st.integers(0, 9)) for _ in range(rank)]
    shape = tuple(side * count for side, count in zip(sides, pieces, strict=True))
    processes = draw(st.integers(1, 4))
    ids = draw(st.permutations(range(math.prod(mesh))))
    shards = []
    for device, where in zip(ids, itertools.product(*map(range, mesh)), strict=True):
        at = [0] * rank
        for coordinate, count, axis in zip(where, mesh, divides, strict=True):
            if axis is not None:
                at[axis] = at[axis] * count + coordinate
        box = tuple((i * side, (i + 1) * side) for i, side in zip(at, sides, strict=True))
        shards.append(plan.ShardSpec(device, draw(st.integers(0, processes - 1)), box))
    leaf = Spec(shape, draw(st.sampled_from([1, 2, 4, 8])), tuple(shards))
    return leaf, processes


POLICIES = st.none() | st.builds(
    plan.ReplicaParallel,
    min_slice_nbytes=st.none() | st.integers(1, 64),
    max_replicas=st.none() | st.integers(1, 9),
)


def slices(box: plan.Box) -> tuple[slice, ...]:
    """Returns the slices of a box."""
    return tuple(slice(*side) for side in box)


@settings(max_examples=max(200, settings().max_examples))
@given(topology=topologies(), policy=POLICIES)
def test_i1_each_element_is_written_once(
    topology: tuple[Spec, int], policy: plan.ReplicaParallel | None
) -> None:
    """Over all processes, the write requests of a leaf cover it without gap or overlap."""
    leaf, processes = topology
    written = np.zeros(leaf.shape, int)
    for process in range(processes):
        for request in plan.plan_writes([leaf], process=process, policy=policy):
            written[slices(request.box)] += 1
            assert request.nbytes == written[slices(request.box)].size * leaf.itemsize
    assert (written == 1).all()


@settings(max_examples=max(200, settings().max_examples))
@given(topology=topologies(), policy=POLICIES)
def test_i1_a_piece_is_written_by_a_process_that_holds_it(
    topology: tuple[Spec, int], policy: plan.ReplicaParallel | None
) -> None:
    """Each request names a device of the process that plans, and lies within that device's box."""
    leaf, processes = topology
    shards = {shard.device_id: shard for shard in leaf.shards}
    for process in range(processes):
        for request in plan.plan_writes([leaf], process=process, policy=policy):
            shard = shards[request.device_id]
            assert shard.process == process
            assert shard.box == request.shard_box
            for (start, stop), (first, last) in zip(request.box, shard.box, strict=True):
                assert first <= start < stop <= last


@settings(max_examples=max(200, settings().max_examples))
@given(topology=topologies(), policy=POLICIES)
def test_i1_pieces_are_whole_chunks(
    topology: tuple[Spec, int], policy: plan.ReplicaParallel | None
) -> None:
    """All pieces of a leaf have the shape that is its chunk shape, and lie on that grid."""
    leaf, processes = topology
    shape = leaf.write_shape(policy)
    for process in range(processes):
        for request in plan.plan_writes([leaf], process=process, policy=policy):
            assert plan.box_shape(request.box) == shape
            assert all(
                start % side == 0 for (start, _), side in zip(request.box, shape, strict=True)
            )


@settings(max_examples=max(200, settings().max_examples))
@given(topology=topologies())
def test_i1_each_process_reads_once_what_its_devices_need(
    topology: tuple[Spec, int],
) -> None:
    """A process reads each box of its devices once, for all of them, and nothing else."""
    leaf, processes = topology
    for process in range(processes):
        regions = _regions(leaf, process, chunk_shape=[1] * len(leaf.shape))
        assert max(Counter(region.box for region in regions).values(), default=0) <= 1
        assert all(region.parts == ((region.box, region.parts[0][1]),) for region in regions)
        served = {device: region.box for region in regions for device in region.parts[0][1]}
        assert served == {s.device_id: s.box for s in leaf.shards if s.process == process}
        assert sum(len(region.parts[0][1]) for region in regions) == len(served)
        for region in regions:
            assert region.nbytes == plan.box_nbytes(region.box, leaf.itemsize)


@settings(max_examples=max(200, settings().max_examples))
@given(topology=topologies(), data=st.data())
def test_i1_no_stored_chunk_is_decoded_twice(
    topology: tuple[Spec, int], data: st.DataObject
) -> None:
    """However arrays are divided in storage, no two regions share bytes of an encoded chunk."""
    leaf, processes = topology
    chunk_shape = [data.draw(st.integers(1, max(1, side))) for side in leaf.shape]
    is_raw = data.draw(st.booleans())
    for process in range(processes):
        regions = _regions(leaf, process, chunk_shape=chunk_shape, is_raw=is_raw)
        served = {d: box for r in regions for box, devices in r.parts for d in devices}
        assert served == {s.device_id: s.box for s in leaf.shards if s.process == process}
        read: Counter[Any] = Counter()
        for region in regions:
            for index in itertools.product(
                *(
                    range(start // side, -(-stop // side))
                    for (start, stop), side in zip(region.box, chunk_shape, strict=True)
                )
            ):
                read.update(_bytes_read(region.box, index, leaf.shape, chunk_shape, is_raw))
        assert max(read.values(), default=0) <= 1


def _bytes_read(
    box: Any, index: tuple[int, ...], shape: Any, chunk_shape: Any, is_raw: bool
) -> Iterator[tuple[Any, int]]:
    """Yields what of a chunk has to be read for a box: a run of a raw one, else all of it."""
    sides = list(zip(index, chunk_shape, strict=True))
    elements = np.arange(math.prod(chunk_shape)).reshape(chunk_shape)
    within = tuple(
        slice(max(start - i * side, 0), min(stop - i * side, side))
        for (start, stop), (i, side) in zip(box, sides, strict=True)
    )
    run = elements[within].reshape(-1)
    is_run = is_raw and run.size and run[-1] - run[0] + 1 == run.size
    yield from ((index, int(each)) for each in (run if is_run else elements.reshape(-1)))


def _regions(
    leaf: Spec, process: int, *, chunk_shape: Any, is_raw: bool = False
) -> tuple[plan.Region, ...]:
    return plan.read_regions(
        leaf.shards,
        leaf.itemsize,
        plan.ChunkGrid(leaf.shape, chunk_shape, is_raw),
        process=process,
    )


@settings(max_examples=max(200, settings().max_examples))
@given(topology=topologies(), policy=POLICIES)
def test_i1_all_processes_agree_without_talking(
    topology: tuple[Spec, int], policy: plan.ReplicaParallel | None
) -> None:
    """The plan depends on the specification alone, not on the order of its shards."""
    leaf, processes = topology
    shuffled = Spec(leaf.shape, leaf.itemsize, leaf.shards[::-1])
    for process in range(processes):
        one = plan.plan_writes([leaf], process=process, policy=policy)
        other = plan.plan_writes([shuffled], process=process, policy=policy)
        assert sorted(one, key=repr) == sorted(other, key=repr)


def test_the_work_of_replicas_is_shared_among_processes() -> None:
    """With replica-parallel saving every process that holds a replica writes an equal part."""
    shards = tuple(plan.ShardSpec(device, device // 2, ((0, 8),)) for device in range(8))
    leaf = Spec((8,), 4, shards)
    shares = [
        sum(r.nbytes for r in plan.plan_writes([leaf], process=p, policy=plan.ReplicaParallel()))
        for p in range(4)
    ]
    assert shares == [8, 8, 8, 8]
    alone = [len(plan.plan_writes([leaf], process=p)) for p in range(4)]
    assert alone == [1, 0, 0, 0]


# The shape of a piece and how many there are, by partition spec, for an array of [64, 32] (or as
# given) on a mesh of 4x2: what stock Orbax writes.
SHARED = plan.ReplicaParallel()
TWO = plan.ReplicaParallel(max_replicas=2)
TABLE = [
    (("x", "y"), (64, 32), SHARED, (16, 16), 8),
    (("x", "y"), (64, 32), None, (16, 16), 8),
    (("x", "y"), (64, 32), TWO, (16, 16), 8),
    (("x",), (64, 32), SHARED, (8, 32), 8),
    (("x",), (64, 32), None, (16, 32), 4),
    (("x",), (64, 32), TWO, (8, 32), 8),
    ((), (64, 32), SHARED, (8, 32), 8),
    ((), (64, 32), None, (64, 32), 1),
    ((), (64, 32), TWO, (32, 32), 2),
    ((), (7, 5), SHARED, (7, 5), 1),
    ((), (7, 5), TWO, (7, 5), 1),
    ((), (), SHARED, (), 1),
    ((), (16, 3), SHARED, (2, 3), 8),
    ((), (3, 16), SHARED, (3, 2), 8),
    ((), (64, 32), plan.ReplicaParallel(min_slice_nbytes=8 * 32 * 4), (8, 32), 8),
    ((), (64, 32), plan.ReplicaParallel(min_slice_nbytes=8 * 32 * 4 + 1), (64, 32), 1),
]


@pytest.mark.parametrize(("spec", "shape", "policy", "piece", "count"), TABLE)
def test_b5_6_replica_parallel_pieces_are_those_of_orbax(
    spec: tuple[str, ...],
    shape: tuple[int, ...],
    policy: plan.ReplicaParallel | None,
    piece: tuple[int, ...],
    count: int,
    mesh8: jax.sharding.Mesh,
) -> None:
    """Replicas divide the first axis that their number divides, as far as the options allow."""
    sharding = NamedSharding(mesh8, PartitionSpec(*spec))
    leaf = Spec(shape, 4, transfer.shards_of(sharding, shape))
    assert leaf.write_shape(policy) == piece
    assert len(plan.plan_writes([leaf], process=0, policy=policy)) == count


def test_a_leaf_without_elements_has_nothing_to_write() -> None:
    """A zero-size leaf has no write request, but its devices still get their empty arrays."""
    leaf = Spec((0, 3), 4, (plan.ShardSpec(0, 0, ((0, 0), (0, 3))),))
    assert plan.plan_writes([leaf], process=0) == []
    assert [r.nbytes for r in _regions(leaf, 0, chunk_shape=(1, 3))] == [0]


def test_w14_prioritized_leaves_are_planned_first() -> None:
    """Prioritized leaves come first; within both groups the order of the leaves stays."""
    shard = (plan.ShardSpec(0, 0, ((0, 4),)),)
    specs = [Spec((4,), 4, shard, priority) for priority in (1, 1, 0, 1, 0)]
    requests = plan.plan_writes(specs, process=0)
    assert [request.leaf for request in requests] == [2, 4, 0, 1, 3]


def _requests(sizes: list[int]) -> list[plan.ReadRequest]:
    return [
        plan.ReadRequest(i, plan.Region(((0, size),), (), size, not size), size)
        for i, size in enumerate(sizes)
    ]


@given(
    sizes=st.lists(st.integers(0, 200)), target=st.integers(1, 300), max_count=st.integers(1, 10)
)
def test_batches_keep_order_and_size(sizes: list[int], target: int, max_count: int) -> None:
    """Batches hold every request in order, and exceed the target only as a single request."""
    requests = _requests(sizes)
    batches = list(plan.batches(requests, target, max_count))
    assert [request for batch in batches for request in batch] == requests
    for batch in batches:
        assert 1 <= len(batch) <= max_count
        assert len(batch) == 1 or sum(request.nbytes for request in batch) <= target


def test_batches_are_as_full_as_they_can_be() -> None:
    """A batch ends only where the next request would not fit."""
    batches = plan.batches(_requests([40, 40, 40, 200, 10, 90, 1]), 100)
    assert [[request.nbytes for request in batch] for batch in batches] == [
        [40, 40],
        [40],
        [200],
        [10, 90],
        [1],
    ]


def test_a_batch_counts_what_its_requests_weigh() -> None:
    """What takes more memory than its bytes fills a batch sooner."""
    batches = plan.batches(
        _requests([40, 40, 40, 10, 10]), 100, weigh=lambda each: each.nbytes * (1 + each.leaf // 2)
    )
    assert [[request.leaf for request in batch] for batch in batches] == [[0, 1], [2, 3], [4]]


def test_the_first_batches_may_be_small() -> None:
    """The first batch is as small as is said, and each weighs at most twice the one before."""
    batches = plan.batches(_requests([10] * 20), 80, first_nbytes=20)
    assert [len(batch) for batch in batches] == [2, 4, 8, 6]


@pytest.mark.parametrize(
    ("box", "shape", "chunk_shape", "parts"),
    [
        (((0, 10),), (10,), (10,), [((0, 4),), ((4, 8),), ((8, 10),)]),
        (((2, 7),), (10,), (5,), [((2, 6),), ((6, 7),)]),
        (((0, 1), (0, 6)), (1, 6), (1, 6), [((0, 1), (0, 4)), ((0, 1), (4, 6))]),
        (((0, 3), (0, 3)), (3, 3), (2, 3), [((at, at + 1), (0, 3)) for at in range(3)]),
        # Columns lie in other chunks, or outside the box; rows lie among those of other chunks.
        (((0, 3), (0, 4)), (3, 4), (3, 2), None),
        (((0, 3), (0, 2)), (3, 4), (3, 4), None),
        (((1, 2), (0, 6)), (2, 6), (2, 6), None),
        (((0, 1), (3, 4)), (1, 6), (1, 6), None),
        ((), (), (), None),
    ],
)
def test_rows(box: Any, shape: Any, chunk_shape: Any, parts: Any) -> None:
    """Parts of at most four bytes, or of one row; whole where they are no runs of their own."""
    assert plan.rows(box, shape, chunk_shape, 1, 4) == (parts or [box])
