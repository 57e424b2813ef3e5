"""How safetensors files are read: off the loop, within the budget, each byte once."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import jax.numpy as jnp
import numpy as np
import operations
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tensor_files import layout, write
from tensors import LARGE, TENSORS, load, same, sds

import orbax_async as ocp
from orbax_async._engine import load_pipeline, plan
from orbax_async._storage import safetensors, zarr
from orbax_async._storage.local import LocalDirectory


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where each read of tensors begins, and how many bytes it asks for."""
    seen: list[tuple[int, int]] = []
    original = safetensors.read_into

    def read_into(file: Any, offset: int, into: memoryview) -> None:
        seen.append((offset, len(into)))
        original(file, offset, into)

    monkeypatch.setattr(safetensors, "read_into", read_into)
    return seen


# How it is read.


async def test_loading_does_not_block_the_loop(tmp_path: Path) -> None:
    """Awaited from a running loop, which goes on meanwhile; nothing of it blocks."""
    path = write(tmp_path / "m.safetensors", {f"w{i}": LARGE for i in range(4)} | TENSORS)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await anyio.lowlevel.checkpoint()
            ticks += 1

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        with layout():
            loaded = await ocp.load_async(path)
            assert (await ocp.verify_async(path)).is_intact
        group.cancel_scope.cancel()
    assert ticks
    assert same(loaded, {f"w{i}": LARGE for i in range(4)} | TENSORS)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_w13_reads_keep_to_the_budget(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more bytes are in flight than the limit, what is cast counted twice over."""
    begun = operations.noted(monkeypatch)
    tensors = {f"w{index}": LARGE[:64] + index for index in range(12)}
    path = write(tmp_path / "m.safetensors", tensors)
    context = layout()
    context.memory.read_concurrent_bytes = limit = 500_000
    abstract = {name: sds(array, dtype) for name, array in tensors.items()}
    loaded = load(path, abstract, context=context)
    assert same(loaded, {name: each.astype(dtype or each.dtype) for name, each in tensors.items()})
    statistics = begun[-1].read_budget.statistics()
    nbytes = LARGE[:64].size * (4 if dtype is None else 4 + 2)
    assert statistics.peak_nbytes == limit // nbytes * nbytes
    assert statistics.reserved_nbytes == 0


def test_large_tensors_are_read_into_memory_that_jax_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the file and every replica of a jax array on CPU there is one buffer, and no copy."""
    blocks: list[np.ndarray[Any, Any]] = []
    original = load_pipeline.aligned_empty

    def aligned_empty(shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
        blocks.append(original(shape, dtype))
        return blocks[-1]

    monkeypatch.setattr(load_pipeline, "aligned_empty", aligned_empty)
    path = write(tmp_path / "m.safetensors", {"pad": np.zeros(3, np.int8), "w": LARGE})
    loaded = load(path, {"w": sds(LARGE)})["w"]
    (block,) = blocks
    address = block.__array_interface__["data"][0]
    assert address % 64 == 0
    for shard in loaded.addressable_shards:
        assert shard.data.unsafe_buffer_pointer() == address
    assert load(path)["w"].__array_interface__["data"][0] % 64 == 0


@pytest.mark.parametrize("spec", [("x",), ("x", "y"), (None, "x"), ("y", "x"), ()])
def test_i1_each_byte_is_read_once(
    spec: tuple[str | None, ...], tmp_path: Path, mesh8: Mesh, reads: list[tuple[int, int]]
) -> None:
    """However eight devices divide a tensor, its bytes are read once, and no others."""
    tensors = {"before": LARGE + 1, "w": LARGE, "after": LARGE + 2}
    path = write(tmp_path / "m.safetensors", tensors)
    sharding = NamedSharding(mesh8, P(*spec))
    loaded = load(path, {"w": sds(LARGE, sharding=sharding)})["w"]
    assert loaded.sharding == sharding
    assert np.array_equal(loaded, LARGE)
    assert sum(nbytes for _, nbytes in reads) == LARGE.nbytes


def test_only_what_is_asked_for_is_read(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    """Of many tensors two are wanted; neighbours come in one read, others are left alone."""
    tensors = {f"w{index:02}": np.full(1000, index, np.int32) for index in range(50)}
    path = write(tmp_path / "m.safetensors", tensors)
    assert load(path, select=["w07", "w40"]).keys() == {"w07", "w40"}
    assert [nbytes for _, nbytes in reads] == [4000, 4000]
    reads.clear()
    assert same(load(path), tensors)
    assert len(reads) == 1


def reader(
    path: Path, ratio: float | None = None, chunk: int | None = None
) -> safetensors.TensorReader:
    """What reads the tensors of a file, under options."""
    contents = safetensors.read_headers(LocalDirectory(str(path)))
    return safetensors.TensorReader(
        contents.directory, contents.tensors, max_over_read_ratio=ratio, read_chunk_nbytes=chunk
    )


def box_of(
    each: safetensors.TensorReader, array: np.ndarray[Any, Any], box: plan.Box
) -> np.ndarray[Any, Any]:
    """A box of the tensor `w`, read out of its file."""
    target = np.full(plan.box_shape(box), 77, array.dtype)
    raw = zarr.plain_document(array.shape, array.dtype).raw
    assert raw is not None
    assert each.read_region("w", raw, box, target)
    return target


@pytest.mark.parametrize(
    ("ratio", "chunk", "read", "count"),
    [
        (1.0, None, 64 * 16, 64),  # the runs alone
        (2.4, None, 64 * 16, 64),
        (2.5, None, 32 * (64 + 16), 32),  # two runs, and what is between them
        (4.0, None, 63 * 64 + 16, 1),
        (None, None, 63 * 64 + 16, 1),  # small gaps
        (None, 256, 16 * (3 * 64 + 16), 16),  # four runs at a time
        (1.0, 10, 64 * 16, 128),  # each run in two reads
    ],
)
def test_options_of_reading_columns(
    ratio: float | None,
    chunk: int | None,
    read: int,
    count: int,
    tmp_path: Path,
    reads: list[tuple[int, int]],
) -> None:
    """`max_over_read_ratio` bounds what is read in vain, and `read_chunk_bytes` each read."""
    array = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    path = write(tmp_path / "m.safetensors", {"w": array})
    box = ((0, 64), (4, 8))
    assert np.array_equal(box_of(reader(path, ratio, chunk), array, box), array[:, 4:8])
    assert (sum(nbytes for _, nbytes in reads), len(reads)) == (read, count)
    assert max(nbytes for _, nbytes in reads) <= (chunk or read)


def test_options_act_through_the_context(
    tmp_path: Path, reads: list[tuple[int, int]], mesh8: Mesh
) -> None:
    """The same, from `context.safetensors` on, for tensors apart from each other."""
    tensors = {f"w{index}": np.full(100, index, np.int8) for index in range(10)}
    path = write(tmp_path / "m.safetensors", tensors, gap=100)
    for options, expected in (
        ({}, [1900]),
        ({"max_over_read_ratio": 1.5}, [300] * 5),
        ({"max_over_read_ratio": 1.0}, [100] * 10),
        ({"read_chunk_bytes": 1000}, [900, 900]),
        ({"read_chunk_bytes": 60}, [60, 40] * 10),
    ):
        reads.clear()
        assert same(load(path, context=layout(**options)), tensors)
        assert [nbytes for _, nbytes in reads] == expected, options


@pytest.mark.parametrize("chunk", [None, 64 << 20])
def test_w13_many_short_runs_take_little_memory_beside_their_target(
    chunk: int | None, tmp_path: Path
) -> None:
    """A column of one element a row: what no budget counts is small."""
    array = np.arange(400_000, dtype=np.int32).reshape(200_000, 2)
    each = reader(write(tmp_path / "m.safetensors", {"w": array}), chunk=chunk)
    tracemalloc.start()
    try:
        column = box_of(each, array, ((0, 200_000), (1, 2)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(column, array[:, 1:])
    assert peak < column.nbytes + (4 << 20)


def test_large_gaps_are_not_read(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    """A column of a wide matrix is read run by run."""
    array = np.arange(8 * 8192, dtype=np.float32).reshape(8, 8192)
    path = write(tmp_path / "m.safetensors", {"w": array})
    assert np.array_equal(box_of(reader(path), array, ((0, 8), (3, 5))), array[:, 3:5])
    assert [nbytes for _, nbytes in reads] == [8] * 8


def test_devices_that_are_apart_read_apart() -> None:
    """What lies between the shards of one process is not read where reading has to be tight."""
    boxes = (((0, 4), (0, 2)), ((0, 4), (6, 8)))
    shards = [plan.ShardSpec(index, 0, box) for index, box in enumerate(boxes)]

    def regions(is_tight: bool) -> list[plan.Box]:
        found = plan.read_regions(
            shards,
            4,
            plan.ChunkGrid((4, 8), (4, 8), True),
            process=0,
            is_tight=is_tight,
        )
        return [region.box for region in found]

    assert regions(True) == list(boxes)
    assert regions(False) == [((0, 4), (0, 8))]


@given(data=st.data())
def test_any_box_of_any_tensor(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is asked of a tensor, under whatever options, is what slicing it gives."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    array = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    ends = [st.tuples(st.integers(0, side - 1), st.integers(1, side)) for side in shape]
    drawn = [data.draw(each) for each in ends]
    box = tuple((min(start, stop - 1), stop) for start, stop in drawn)
    ratio = data.draw(st.none() | st.floats(1, 8))
    chunk = data.draw(st.none() | st.integers(1, 40))
    path = write(tmp_path_factory.getbasetemp() / "any.safetensors", {"w": array})
    expected = array[tuple(slice(start, stop) for start, stop in box)]
    assert np.array_equal(box_of(reader(path, ratio, chunk), array, box), expected)
