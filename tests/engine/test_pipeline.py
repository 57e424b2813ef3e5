"""Running a plan: budgets that hold, the order of leaves, and how values are captured (I3)."""

from __future__ import annotations

import gzip
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine import leaf as leaves
from orbax_async._engine import load_pipeline, save_pipeline
from orbax_async._engine.leaf import Piece
from orbax_async._storage import codecs
from orbax_async._storage.array_store import ArrayStore
from orbax_async.handlers import pytree, read_plan


class Watched:
    """The pipelines of a test, and the order in which they capture and write leaves."""

    def __init__(self) -> None:
        self.saves: list[save_pipeline.SavePipeline] = []
        self.loads: list[load_pipeline.LoadPipeline] = []
        self.captured: list[str] = []
        self.written: list[str] = []
        self.pieces: dict[str, list[Piece]] = {}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Watches every pipeline of the test from the inside."""
    seen = Watched()

    class Saving(save_pipeline.SavePipeline):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen.saves.append(self)

        def _capture(self, batch: Any, *others: Any) -> Any:
            pieces = super()._capture(batch, *others)
            for leaf, piece in zip(batch.leaves, pieces, strict=True):
                seen.captured.append(leaf.label)
                seen.pieces.setdefault(leaf.label, []).append(piece)
            return list(pieces)

        async def _write(self, store: Any, batch: Any, *others: Any) -> None:
            seen.written += [leaf.label for leaf in batch.leaves]
            await super()._write(store, batch, *others)

    class Loading(load_pipeline.LoadPipeline):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen.loads.append(self)

    monkeypatch.setattr(pytree, "SavePipeline", Saving)
    monkeypatch.setattr(read_plan, "LoadPipeline", Loading)
    return seen


def with_memory(**memory: Any) -> ocp.Context:
    """Returns a context with some memory options."""
    context = ocp.Context()
    for name, value in memory.items():
        setattr(context.memory, name, value)
    return context


def host_state(count: int = 20, nbytes: int = 4000) -> dict[str, np.ndarray[Any, Any]]:
    """Returns NumPy leaves of `nbytes` each."""
    return {f"n{i:02}": np.full(nbytes // 4, i, np.int32) for i in range(count)}


def device_state(count: int = 20, nbytes: int = 4000) -> dict[str, jax.Array]:
    """Returns jax leaves of `nbytes` each."""
    return {f"j{i:02}": jnp.full(nbytes // 4, i, jnp.int32) for i in range(count)}


KINDS = pytest.mark.parametrize("make", [host_state, device_state])


def check(path: Path, state: dict[str, Any]) -> None:
    """Compares what a checkpoint holds with a state."""
    loaded = ocp.load(path)
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert np.array_equal(loaded[key], value), key


# Budgets.


@KINDS
def test_w13_the_write_budget_holds(
    make: Callable[[], dict[str, Any]], tmp_path: Path, watched: Watched
) -> None:
    """The bytes being written never exceed the limit, for NumPy and for jax leaves."""
    state = make()
    with with_memory(write_concurrent_bytes=10_000):
        ocp.save(tmp_path / "checkpoint", state)
    (saving,) = watched.saves
    statistics = saving.write_budget.statistics()
    assert statistics.limit_nbytes == 10_000
    assert statistics.peak_nbytes == 8000  # two leaves of 4000 bytes fit, three do not
    assert statistics.reserved_nbytes == 0
    check(tmp_path / "checkpoint", state)


@KINDS
def test_w13_the_read_budget_holds(
    make: Callable[[], dict[str, Any]], tmp_path: Path, watched: Watched
) -> None:
    """The bytes being read never exceed the limit, for NumPy and for jax leaves."""
    state = make()
    ocp.save(tmp_path / "checkpoint", state)
    with with_memory(read_concurrent_bytes=10_000):
        check(tmp_path / "checkpoint", state)
    (loading,) = watched.loads
    statistics = loading.read_budget.statistics()
    assert statistics.limit_nbytes == 10_000
    assert statistics.peak_nbytes == 8000
    assert statistics.reserved_nbytes == 0


@pytest.mark.parametrize("eager", [True, False])
def test_w14_the_transfer_budget_holds(eager: bool, tmp_path: Path, watched: Watched) -> None:
    """What is captured and not yet written stays under the limit, with no callback needed."""
    state = host_state()
    context = with_memory(transfer_concurrent_bytes=10_000)
    context.asynchronous.staging = "eager" if eager else "lazy"
    with context:
        ocp.save_async(tmp_path / "checkpoint", state).result()
    (saving,) = watched.saves
    statistics = saving.transfer_budget.statistics()
    assert statistics.limit_nbytes == 10_000
    assert statistics.peak_nbytes == 8000
    assert statistics.reserved_nbytes == 0
    check(tmp_path / "checkpoint", state)


def test_views_of_host_memory_need_no_transfer_budget(tmp_path: Path, watched: Watched) -> None:
    """A jax array on CPU is captured as a view, and waits for no budget of copies."""
    state = device_state()
    with with_memory(transfer_concurrent_bytes=1):
        ocp.save(tmp_path / "checkpoint", state)
    (saving,) = watched.saves
    assert saving.transfer_budget.statistics().peak_nbytes == 0
    check(tmp_path / "checkpoint", state)


@KINDS
@pytest.mark.parametrize(
    "option", ["write_concurrent_bytes", "transfer_concurrent_bytes", "read_concurrent_bytes"]
)
def test_w13_a_leaf_above_the_budget_passes_alone(
    option: str, make: Callable[[int, int], dict[str, Any]], tmp_path: Path, watched: Watched
) -> None:
    """A leaf of the size of the limit, and one far above it, are saved and loaded all the same."""
    state = make(3, 40_000) | {"exact": np.zeros(100, np.uint8), "one": np.zeros(1, np.uint8)}
    with with_memory(**{option: 100}):
        ocp.save(tmp_path / "checkpoint", state)
        check(tmp_path / "checkpoint", state)
    (saving,), (loading,) = watched.saves, watched.loads
    peaks = {
        "write_concurrent_bytes": saving.write_budget,
        "transfer_concurrent_bytes": saving.transfer_budget,
        "read_concurrent_bytes": loading.read_budget,
    }
    peak = peaks[option].statistics().peak_nbytes
    # Alone: never two at a time. Views of jax arrays on CPU take no transfer budget.
    is_view = option == "transfer_concurrent_bytes" and make is device_state
    assert peak == (100 if is_view else 40_000)


@pytest.mark.parametrize("option", ["write_concurrent_bytes", "transfer_concurrent_bytes"])
def test_i2_a_failing_save_returns_its_reservations(
    option: str, tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a write fails in the middle, no budget keeps anything, and the error names the leaf."""

    class Values(NamedTuple):
        inner: ts.KvStore

        def __setitem__(self, key: str, value: bytes) -> None:
            if key.startswith("n07/"):
                raise OSError("no more room")
            self.inner[key] = value

    def values(self: ArrayStore, transaction: ts.Transaction) -> Values:
        return Values(original(self, transaction))

    original = ArrayStore.values
    monkeypatch.setattr(ArrayStore, "values", values)
    state = host_state()
    with (
        with_memory(**{option: 4000}),
        pytest.raises(errors.WriteError, match="no more room") as at,
    ):
        ocp.save(tmp_path / "checkpoint", state)
    assert at.value.keypath == "['n07']"
    (saving,) = watched.saves
    assert saving.write_budget.statistics().reserved_nbytes == 0
    assert saving.transfer_budget.statistics().reserved_nbytes == 0
    assert list(tmp_path.iterdir()) == []


def test_small_budgets_and_shards_go_together(
    tmp_path: Path, watched: Watched, mesh8: jax.sharding.Mesh
) -> None:
    """Shards of one leaf in many batches still make one leaf, in the count of progress too."""
    sharding = NamedSharding(mesh8, PartitionSpec("x", "y"))
    value = jax.device_put(jnp.arange(64.0 * 32).reshape(64, 32), sharding)
    with with_memory(write_concurrent_bytes=1024, read_concurrent_bytes=1024):
        saving = ocp.save_async(tmp_path / "checkpoint", {"a": value, "b": np.zeros((0, 3))})
        saving.result()
        loading = ocp.load_async(tmp_path / "checkpoint")
        assert np.array_equal(loading.result()["a"], value)
    assert len(watched.written) == 8
    for progress in (saving.progress, loading.progress):
        assert progress.leaves_planned == progress.leaves_written == 2
        assert progress.bytes_planned == progress.bytes_written == value.nbytes
    assert saving.progress.leaves_staged == 2


# Priority.


def test_w14_prioritized_leaves_are_captured_and_written_first(
    tmp_path: Path, watched: Watched
) -> None:
    """`is_prioritized_key_fn` decides the order, and is called once with each jax key path."""
    asked: list[Any] = []

    def is_prioritized(keypath: tuple[Any, ...]) -> bool:
        asked.append(keypath)
        return keypath[0].key == "params"

    state = {"opt": host_state(4), "params": host_state(3), "step": 7, "list": [np.arange(3)]}
    with with_memory(is_prioritized_key_fn=is_prioritized, write_concurrent_bytes=4000):
        ocp.save(tmp_path / "checkpoint", state)
    first = ["['params']['n00']", "['params']['n01']", "['params']['n02']"]
    assert watched.captured[:3] == first
    assert watched.written[:3] == first
    assert len(watched.captured) == len(watched.written) == 9
    assert [jax.tree_util.keystr(path) for path in asked] == [
        "['list'][0]",
        *(f"['opt']['n{i:02}']" for i in range(4)),
        *(f"['params']['n{i:02}']" for i in range(3)),
        "['step']",
    ]
    loaded = ocp.load(tmp_path / "checkpoint")
    assert loaded["step"] == 7
    assert np.array_equal(loaded["params"]["n02"], state["params"]["n02"])


def test_w14_prioritized_leaves_are_outside_of_the_transfer_budget(
    tmp_path: Path, watched: Watched
) -> None:
    """Only what is not prioritized counts against the limit of transfers."""
    state = host_state(5) | {"first": np.zeros(50_000, np.uint8)}
    context = with_memory(
        is_prioritized_key_fn=lambda keypath: keypath[0].key == "first",
        transfer_concurrent_bytes=5000,
    )
    with context:
        ocp.save(tmp_path / "checkpoint", state)
    assert watched.captured[0] == "['first']"
    (saving,) = watched.saves
    assert saving.transfer_budget.statistics().peak_nbytes == 4000
    check(tmp_path / "checkpoint", state)


def test_w14_a_failing_priority_function_fails_the_save(tmp_path: Path) -> None:
    """What the function raises is not swallowed, and nothing is left behind."""

    def broken(keypath: tuple[Any, ...]) -> bool:
        raise KeyError("broken")

    with with_memory(is_prioritized_key_fn=broken), pytest.raises(KeyError, match="broken"):
        ocp.save(tmp_path / "checkpoint", {"a": 1})
    assert list(tmp_path.iterdir()) == []


# Capture.


def test_i3_numpy_leaves_are_copied(tmp_path: Path, watched: Watched) -> None:
    """A NumPy leaf that is changed once it is captured is saved as it was."""
    value = np.arange(10_000)
    expected = value.copy()
    context = ocp.Context()
    with context:
        response = ocp.save_async(tmp_path / "checkpoint", {"a": value})
    value[:] = -1
    response.result()
    assert np.array_equal(ocp.load(tmp_path / "checkpoint")["a"], expected)


def test_host_arrays_are_shared_where_the_caller_says_so(tmp_path: Path, watched: Watched) -> None:
    """`deepcopy_host_arrays=False` captures the caller's own memory, and needs no budget."""
    value = np.arange(10_000)
    with with_memory(deepcopy_host_arrays=False, transfer_concurrent_bytes=1):
        ocp.save(tmp_path / "checkpoint", {"a": value})
    (staged,) = watched.pieces["['a']"]
    assert np.shares_memory(np.asarray(staged), value)
    assert watched.saves[0].transfer_budget.statistics().peak_nbytes == 0
    check(tmp_path / "checkpoint", {"a": value})


def test_i3_a_view_keeps_a_donated_buffer(tmp_path: Path, watched: Watched) -> None:
    """A jax array is captured without a copy, and survives donation, deletion and its own end."""
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    value, other = jnp.arange(10_000.0), jnp.arange(10_000.0) + 1
    address = value.unsafe_buffer_pointer()
    with ocp.Context():
        response = ocp.save_async(tmp_path / "checkpoint", {"a": value, "b": other})
    update(value).block_until_ready()
    other.delete()
    del value, other
    response.result()
    (staged,) = watched.pieces["['a']"]
    assert np.asarray(staged).ctypes.data == address
    loaded = ocp.load(tmp_path / "checkpoint")
    assert np.array_equal(loaded["a"], np.arange(10_000.0))
    assert np.array_equal(loaded["b"], np.arange(10_000.0) + 1)


def test_the_caller_is_released_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save is staged as soon as all is captured, views and copies alike, whatever comes of it."""

    async def refuse(*_: Any) -> None:
        raise RuntimeError("not written")

    monkeypatch.setattr(pytree.TreeWriter, "run", refuse)
    for name, leaf in {"views": jnp.ones(3), "copies": np.ones(3)}.items():
        response = ocp.save_async(tmp_path / name, {"a": leaf, "b": 1.5})
        response.wait_staged(timeout=0)
        with pytest.raises(RuntimeError, match="not written"):
            response.result()


def test_i3_a_tree_within_another_handler_lets_nobody_go(tmp_path: Path) -> None:
    """A handler that saves a tree first, and captures more after it, is waited for to the end."""
    noted: list[str] = []

    class Noted:
        def __init__(self, note: str) -> None:
            self.note = note

    class NotedHandler(pytree.PyTreeHandler):
        async def save(self, directory: Any, checkpointable: Any) -> Any:
            second = await super().save(directory, {"a": jnp.ones(3)})
            await anyio.sleep(0.05)
            noted.append(checkpointable.note)
            return second

        def is_handleable(self, checkpointable: Any) -> bool:
            return isinstance(checkpointable, Noted)

    context, value = ocp.Context(), Noted("before")
    context.checkpointables.registry = ocp.handlers.local_registry().add(NotedHandler)
    with context:
        response = ocp.save_checkpointables_async(tmp_path / "checkpoint", {"it": value})
    value.note = "after"
    response.result()
    assert noted == ["before"]


@pytest.mark.parametrize("spec", [PartitionSpec("x", "y"), PartitionSpec("x"), PartitionSpec()])
def test_i3_pinned_host_transfers(
    spec: PartitionSpec, tmp_path: Path, watched: Watched, mesh8: jax.sharding.Mesh
) -> None:
    """With `enable_pinned_host_transfer` each piece goes to pinned memory of its own device."""
    value = jax.device_put(jnp.arange(64.0 * 32).reshape(64, 32), NamedSharding(mesh8, spec))
    expected = np.array(value)
    context = ocp.Context()
    context.array.saving.enable_pinned_host_transfer = True
    with context:
        response = ocp.save_async(tmp_path / "checkpoint", {"a": value})
    pieces = watched.pieces["['a']"]
    assert len(pieces) == 8
    assert all(isinstance(piece, jax.Array) for piece in pieces)
    assert {piece.sharding.memory_kind for piece in pieces} == {"pinned_host"}
    assert len({piece.device for piece in pieces}) == 8
    value.delete()
    response.result()
    loaded = ocp.load(tmp_path / "checkpoint")["a"]
    assert np.array_equal(loaded, expected)
    assert loaded.sharding.is_equivalent_to(NamedSharding(mesh8, spec), 2)


def test_pinned_host_transfers_take_transfer_budget(tmp_path: Path, watched: Watched) -> None:
    """A transfer to pinned memory is a copy, and counts against the limit of transfers."""
    context = with_memory(transfer_concurrent_bytes=10_000)
    context.array.saving.enable_pinned_host_transfer = True
    state = device_state()
    with context:
        ocp.save(tmp_path / "checkpoint", state)
    assert watched.saves[0].transfer_budget.statistics().peak_nbytes == 8000
    check(tmp_path / "checkpoint", state)


def test_no_host_copy_stays_on_the_callers_arrays(tmp_path: Path, mesh8: jax.sharding.Mesh) -> None:
    """A save leaves the caller's arrays as they were: none of them keeps a cached host value."""
    sharded = jax.device_put(jnp.arange(64.0), NamedSharding(mesh8, PartitionSpec("x")))
    single = jnp.arange(64.0)
    ocp.save(tmp_path / "checkpoint", {"a": sharded, "b": single})
    for array in (sharded, *(shard.data for shard in sharded.addressable_shards)):
        assert getattr(array, "_npy_value", None) is None


def test_a_capture_that_fails_names_its_leaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I9: a value that can't be captured is a StagingError of its key path; nothing is written."""

    def fail(array: Piece, *args: Any, **kwargs: Any) -> Piece:
        if isinstance(array, np.ndarray):
            raise MemoryError("too large")
        return original(array, *args, **kwargs)

    original = save_pipeline.capture
    monkeypatch.setattr(save_pipeline, "capture", fail)
    with pytest.raises(errors.StagingError, match=r"\['a'\]\[1\].*too large") as caught:
        ocp.save(tmp_path / "checkpoint", {"a": [jnp.zeros((1, 3)), np.zeros(3)]})
    assert caught.value.keypath == "['a'][1]"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("compressed", "together"), [(True, 2), (False, 3)])
def test_as_many_batches_are_encoded_at_a_time_as_there_are_cores(
    compressed: bool, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is encoded takes memory, so a third batch waits; what is stored as it is does not."""
    under_way, peak = 0, 0

    class Transaction(NamedTuple):
        inner: ts.Transaction

        @property
        async def future(self) -> None:
            nonlocal under_way, peak
            under_way += 1
            peak = max(peak, under_way)
            await anyio.sleep(0.2)  # for another batch to come along
            await self.inner.future
            under_way -= 1

    def fill(pipeline: Any, store: Any, batch: Any, pieces: Any) -> Any:
        transaction, *others = original(pipeline, store, batch, pieces)
        return Transaction(transaction), *others

    original = save_pipeline.SavePipeline._fill
    monkeypatch.setattr(save_pipeline.SavePipeline, "_fill", fill)
    monkeypatch.setattr(save_pipeline, "_ENCODED_NBYTES", 1 << 19)
    monkeypatch.setattr(leaves, "_BATCH_NBYTES", 1 << 18)
    context = ocp.Context()
    context.array.saving.use_compression = compressed
    context.array.saving.compression_min_saving = 0
    with context:
        ocp.save(tmp_path / "checkpoint", [np.full(1 << 16, i, np.float32) for i in range(6)])
    assert peak == together


@pytest.mark.parametrize(
    ("options", "dtype", "counts"),
    [
        ({}, "float32", [4, 4]),
        ({}, "bfloat16", [2, 2, 2, 2]),
        ({"use_compression": False}, "bfloat16", [4, 4]),
        ({"compression_min_saving": 0}, "float32", [2, 2, 2, 2]),
        ({"use_compression": False, "use_zarr3": False}, "float32", [2, 2, 2, 2]),
        ({"write_concurrent_bytes": 1 << 21}, "float32", [2, 2, 2, 2]),
        ({"write_concurrent_bytes": 1 << 18}, "float32", [1] * 8),
    ],
)
def test_batches_are_smaller_where_they_take_memory(
    options: dict[str, Any],
    dtype: str,
    counts: list[int],
    tmp_path: Path,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is likely to be encoded counts twice, and within a limit batches are half as large."""
    monkeypatch.setattr(leaves, "_BATCH_NBYTES", 1 << 20)
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.memory if "bytes" in name else context.array.saving, name, value)
    side = (1 << 18) // jnp.dtype(dtype).itemsize
    with context:
        ocp.save(tmp_path / "checkpoint", [jnp.full(side, i, dtype) for i in range(8)])
    (pipeline,) = watched.saves
    assert [len(batch.requests) for batch in pipeline._batches] == counts


def test_batches_of_small_pieces_take_little_memory(
    tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is encoded here, up to 64 KiB each, counts twice too, and is written batch by batch."""
    monkeypatch.setattr(leaves, "_BATCH_NBYTES", 1 << 20)
    ocp.save(tmp_path / "checkpoint", [jnp.full(1 << 14, i, jnp.float32) for i in range(16)])
    (pipeline,) = watched.saves
    assert [len(batch.requests) for batch in pipeline._batches] == [8, 8]
    batch = pipeline._batches[0]
    assert pipeline._slots.of(batch.nbytes, 8) is pipeline._slots.of(8, 8)
    # All of it is encoded, one batch at a time.
    assert pipeline._encoding_budget.statistics().peak_nbytes == batch.nbytes


def test_the_disk_gets_something_to_do_soon(
    tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch is small, the next twice as large at most; small saves leave it alone."""
    told: list[str] = []

    def tell(store: ArrayStore) -> None:
        told.append(store.directory)
        original(store)

    original = ArrayStore.start_writeback
    monkeypatch.setattr(ArrayStore, "start_writeback", tell)
    monkeypatch.setattr(leaves, "_FIRST_NBYTES", 1 << 18)
    state = [np.full(1 << 15, i, np.float32) for i in range(30)]
    ocp.save(tmp_path / "small", state)
    assert not told
    monkeypatch.setattr(save_pipeline, "_WRITTEN_BACK_NBYTES", 1 << 18)
    ocp.save(tmp_path / "checkpoint", state)
    assert [len(batch.requests) for batch in watched.saves[1]._batches] == [2, 4, 8, 16]
    assert told


def test_one_worker_at_a_time_waits_for_a_busy_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written while the disk is being told is told of afterwards; nothing is forgotten."""
    now, most, seen = 0, 0, set[str]()

    def tell(store: ArrayStore) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        seen.update(os.listdir(os.path.join(store.directory.path, "d")))
        time.sleep(0.05)  # for another batch to come along
        now -= 1

    monkeypatch.setattr(ArrayStore, "start_writeback", tell)
    monkeypatch.setattr(save_pipeline, "_WRITTEN_BACK_NBYTES", 0)
    monkeypatch.setattr(leaves, "_BATCH_NBYTES", 1 << 18)
    ocp.save(tmp_path / "checkpoint", [jnp.full(1 << 16, i, jnp.float32) for i in range(6)])
    assert most == 1
    assert seen >= set(os.listdir(tmp_path / "checkpoint" / "state" / "d"))


@pytest.mark.parametrize("kind", ["weights", "bfloat16", "moments", "sparse", "tokens"])
def test_a_sample_tells_what_compression_saves(kind: str) -> None:
    """What a sample says of an array is what deflate saves of all of it, to two per cent."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(1 << 20, np.float32)
    array = {
        "weights": normal * 0.02,
        "bfloat16": normal.astype(jnp.bfloat16),
        "moments": normal**2 * 1e-6,
        "sparse": normal * (rng.random(normal.size) < 0.5),
        "tokens": rng.integers(0, 50_000, normal.size, dtype=np.int32),
    }[kind]
    whole = 1 - len(zlib.compress(array.tobytes(), 1)) / array.nbytes
    assert codecs.compression_saving(array) == pytest.approx(whole, abs=0.02)


@given(st.one_of(st.binary(max_size=64), st.sampled_from([4095, 4096, 4097, 65535, 65536])))
def test_what_is_stored_is_a_gzip_member(content: bytes | int) -> None:
    """Any reader of gzip finds the bytes of a small array again, and one flipped bit of them."""
    if isinstance(content, int):
        content = np.random.default_rng(content).bytes(content)
    member = codecs.encode_stored(np.frombuffer(content, np.uint8))
    assert gzip.decompress(member) == content
    if content:
        damaged = bytearray(member)
        damaged[-9] ^= 1  # the last byte before the CRC-32 and the length
        with pytest.raises(gzip.BadGzipFile, match="CRC"):
            gzip.decompress(damaged)
