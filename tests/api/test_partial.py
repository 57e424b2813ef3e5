"""Partial saves: parts that gather, and become one checkpoint or stay what they are."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from parts import BOTH, FIRST, SECOND, Stop, check, gathered, storing

import orbax_async as ocp
from orbax_async import errors, partial
from orbax_async._storage.directory import sizes
from orbax_async._storage.local import LocalDirectory
from orbax_async.handlers.pytree import PyTreeHandler

formats = pytest.mark.parametrize("use_zarr3", [True, False])
stores = pytest.mark.parametrize("use_ocdbt", [True, False])


# What parts become.


@formats
@stores
def test_parts_become_one_checkpoint(use_ocdbt: bool, use_zarr3: bool, tmp_path: Path) -> None:
    """B14.1: nothing is at the path before `finalize`; then it holds what all parts held."""
    path = tmp_path / "c"
    with storing(use_ocdbt, use_zarr3):
        partial.save(path, FIRST, custom_metadata={"a": 1, "k": {"x": 1, "z": [1]}})
        partial.save(path, SECOND, custom_metadata={"a": 2, "k": {"y": None, "z": [2]}})
        partial.save(path, {"last": 1})
        assert os.listdir(tmp_path) == ["c.partial_save"]
        for part in gathered(path):
            assert re.fullmatch(r"c\.partial_save\.pending_\d{19}_[0-9a-f]{32}", part.name)
        assert partial.finalize(path) is None
    assert os.listdir(tmp_path) == ["c"]
    check(ocp.load(path), BOTH | {"last": 1})
    assert ocp.verify(path).is_intact
    about = ocp.metadata(path)
    assert about.custom_metadata == {"a": 2, "k": {"x": 1, "y": None, "z": [2]}}
    assert about.metadata["b"].shape == (3,)


def test_times_are_those_of_the_first_part_and_of_the_end(tmp_path: Path) -> None:
    """A checkpoint was begun with its first part, and committed when it was finalized."""
    partial.save(tmp_path / "c", FIRST)
    partial.save(tmp_path / "c", SECOND)
    parts = [
        json.loads((part / "_CHECKPOINT_METADATA").read_text()) for part in gathered(tmp_path / "c")
    ]
    partial.finalize(tmp_path / "c")
    about = ocp.metadata(tmp_path / "c")
    begun = [part["init_timestamp_nsecs"] for part in parts]
    assert about.init_timestamp_nsecs == begun[0] < begun[1]
    assert about.commit_timestamp_nsecs > max(part["commit_timestamp_nsecs"] for part in parts)


def test_a_part_holds_its_own_data_alone(tmp_path: Path) -> None:
    """B14.3: a part is never copied into a later one, nor changed by it."""
    path = tmp_path / "c"
    partial.save(path, {"large": np.zeros(1 << 18)})
    before = sizes(LocalDirectory(str(gathered(path)[0])))
    partial.save(path, {"small": 1})
    first, second = gathered(path)
    assert sizes(LocalDirectory(str(first))) == before
    assert sum(sizes(LocalDirectory(str(second))).values()) < 10_000
    partial.finalize(path)


def test_sharded_arrays_and_keys_keep_what_they_are(mesh8: Mesh, tmp_path: Path) -> None:
    """Shardings, typed PRNG keys and bfloat16 come back from parts as from one save."""
    sharding = NamedSharding(mesh8, PartitionSpec("x", "y"))
    state = {
        "w": jax.device_put(jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8), sharding),
        "key": jax.random.key(3),
        "np": np.float32(2),
    }
    for name, value in state.items():
        partial.save(tmp_path / "c", {name: value})
    partial.finalize(tmp_path / "c")
    loaded = ocp.load(tmp_path / "c")
    assert loaded["w"].sharding == sharding and loaded["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["w"], state["w"])
    assert jax.random.key_impl(loaded["key"]) == jax.random.key_impl(state["key"])
    assert type(loaded["np"]) is np.float32


LEAVES = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.recursive(
        st.integers(0, 9) | st.text("xyz", max_size=2) | st.just(None),
        lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        max_leaves=6,
    ),
    min_size=1,
    max_size=4,
)


@given(tree=LEAVES, data=st.data())
def test_any_division_of_a_tree_makes_the_same_checkpoint(
    tree: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Leaf by leaf or at once, what is loaded is the same."""
    folder = tmp_path_factory.mktemp("division")
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda each: not each)
    count = data.draw(st.integers(1, 3))
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for path, leaf in flat:
        node = parts[data.draw(st.integers(0, count - 1))]
        for key in path[:-1]:
            node = node.setdefault(key.key, {})
        node[path[-1].key] = leaf
    ocp.save(folder / "whole", tree)
    for part in parts:
        if part:
            partial.save(folder / "parts", part)
    partial.finalize(folder / "parts")
    check(ocp.load(folder / "parts"), ocp.load(folder / "whole"))


class Pair(NamedTuple):
    """A container with a type to keep."""

    x: Any
    y: Any


def test_rich_types_of_all_parts_are_kept(tmp_path: Path) -> None:
    """Containers that several parts fill are put together with their types."""
    context = ocp.Context()
    context.pytree.saving.pytree_metadata_options.support_rich_types = True
    with context:
        partial.save(tmp_path / "c", {"t": (1, 2), "both": Pair({"a": 1}, [{"a": 1}])})
        partial.save(tmp_path / "c", {"u": Pair(3, 4), "both": Pair({"b": 2}, [{}, {"b": 2}])})
        partial.finalize(tmp_path / "c")
        loaded = ocp.load(tmp_path / "c")
    assert loaded["t"] == (1, 2) and loaded["u"] == Pair(3, 4)
    assert loaded["both"] == Pair({"a": 1, "b": 2}, [{"a": 1}, {"b": 2}])
    assert [type(loaded[key]) for key in ("t", "u", "both")] == [tuple, Pair, Pair]


class Nothing(NamedTuple):
    """A container with a type and nothing in it, as optax has many."""


def test_rich_types_of_empty_containers_and_odd_keys_are_kept(tmp_path: Path) -> None:
    """An empty named tuple in two parts is the same; a key named as the format's is a key."""
    context = ocp.Context()
    context.pytree.saving.pytree_metadata_options.support_rich_types = True
    with context:
        partial.save(tmp_path / "c", {"e": Nothing(), "d": {"category": 1}, "t": (1,)})
        partial.save(tmp_path / "c", {"e": Nothing(), "d": {"clazz": 2}})
        partial.finalize(tmp_path / "c")
        loaded = ocp.load(tmp_path / "c")
    assert loaded["t"] == (1,) and loaded["d"] == {"category": 1, "clazz": 2}
    assert isinstance(loaded["e"], tuple) and loaded["e"] == ()


def test_rich_types_that_do_not_fit_together_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A container that is a tuple here and a list there is loaded as a list; a line says so."""
    context = ocp.Context()
    context.pytree.saving.pytree_metadata_options.support_rich_types = True
    with context:
        partial.save(tmp_path / "c", {"t": ({"a": 1},)})
        partial.save(tmp_path / "c", {"t": [{"b": 1}]})
        partial.finalize(tmp_path / "c")
        assert ocp.load(tmp_path / "c") == {"t": [{"a": 1, "b": 1}]}
    assert "do not fit together" in caplog.text


# Options.


def test_in_place_commits_can_not_gather_parts(tmp_path: Path) -> None:
    """B14.9: `COMMIT_FILE` is refused by the call, and reads what is finalized."""
    context = ocp.Context()
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    with context, pytest.raises(ValueError, match="commit_file"):
        partial.save_async(tmp_path / "c", FIRST)
    partial.save(tmp_path / "c", FIRST)
    with context:
        partial.finalize(tmp_path / "c")
        check(ocp.load(tmp_path / "c"), FIRST)


def test_the_finished_checkpoint_has_the_mode_that_is_asked_for(tmp_path: Path) -> None:
    """`path_permission_mode` holds for the checkpoint's directory, when it is finalized."""
    context = ocp.Context()
    context.file.path_permission_mode = 0o710
    with context:
        partial.save(tmp_path / "c", FIRST)
        partial.finalize(tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o710


def test_the_callback_comes_when_there_is_a_checkpoint(tmp_path: Path) -> None:
    """`post_finalization_callback` is called once, after `finalize`."""
    seen: list[bool] = []
    context = ocp.Context()
    context.asynchronous.post_finalization_callback = lambda: seen.append(
        ocp.is_orbax_checkpoint(tmp_path / "c")
    )
    with context:
        partial.save(tmp_path / "c", FIRST)
        partial.save(tmp_path / "c", SECOND)
        assert seen == []
        partial.finalize(tmp_path / "c")
    assert seen == [True]


def test_the_first_look_can_be_skipped(tmp_path: Path) -> None:
    """`skip_sync_file_validations` leaves the errors to the response."""
    context = ocp.Context()
    context.file.skip_sync_file_validations = True
    partial.save(tmp_path / "c", FIRST)
    with context:
        response = partial.save_async(tmp_path / "c", {"a": 1})
    with pytest.raises(errors.PartialSaveReplacementError):
        response.result()
    assert len(gathered(tmp_path / "c")) == 1


def test_parts_keep_to_the_limits_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of writes holds for parts, and is returned."""
    begun = operations.noted(monkeypatch)
    context = ocp.Context()
    context.memory.write_concurrent_bytes = 150_000
    state = {f"w{i}": np.full(1 << 14, i, np.float32) for i in range(6)}
    with context:
        partial.save(tmp_path / "c", state)
    statistics = begun[0].write_budget.statistics()
    assert statistics.peak_nbytes == 2 << 16  # of 64 KiB two fit, and three do not
    assert statistics.reserved_nbytes == 0
    partial.finalize(tmp_path / "c")
    check(ocp.load(tmp_path / "c"), state)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    """What needs Pathways is refused by both verbs, by its name."""
    partial.save(tmp_path / "c", FIRST)
    context = ocp.Context()
    context.pathways.checkpointing_impl = ocp.options.CheckpointingImpl.PERSISTENCE
    for verb in (partial.finalize, lambda path: partial.save(path, SECOND)):
        with context, pytest.raises(errors.UnsupportedOptionError, match="pathways"):
            verb(tmp_path / "c")


def test_folders_of_shared_writes_are_merged(mesh8: Mesh, tmp_path: Path) -> None:
    """`enable_replica_parallel_separate_folder` divides a part, and `finalize` merges it."""
    context = ocp.Context()
    context.array.saving.enable_replica_parallel_separate_folder = True
    context.array.saving.use_replica_parallel = True
    replicated = NamedSharding(mesh8, PartitionSpec("x"))
    state = {"r": jax.device_put(jnp.arange(64.0), replicated), "n": np.arange(4)}
    with context:
        partial.save(tmp_path / "c", state)
        parts = {each.name for each in (gathered(tmp_path / "c")[0] / "state").iterdir()}
        partial.finalize(tmp_path / "c")
    assert {"ocdbt.process_0", "ocdbt.process_replica_0"} <= parts
    check(ocp.load(tmp_path / "c"), state)


# Two tiers.


async def test_responses_are_those_of_saves(tmp_path: Path) -> None:
    """Staged, awaited, and counted; what is mutated after `staged` is not what is written (I3)."""
    state = {"w": np.arange(1 << 16)}
    response = partial.save_async(tmp_path / "c", state)
    assert isinstance(response, ocp.AsyncResponse)
    await response.staged()
    state["w"][:] = 0
    assert await response is None
    assert response.progress.phase == "committed"
    assert response.progress.bytes_written == state["w"].nbytes
    finalizing = partial.finalize_async(tmp_path / "c")
    assert await finalizing is None and finalizing.done()
    check(ocp.load(tmp_path / "c"), {"w": np.arange(1 << 16)})


async def test_a_cancelled_part_leaves_the_others(tmp_path: Path) -> None:
    """A cancel before the commit removes the part alone, and the session if it was the first."""
    path = tmp_path / "c"
    for parts in (0, 1):
        with Stop() as stop:
            stop.close()
            response = partial.save_async(path, {f"k{parts}": 1})
        await anyio.to_thread.run_sync(stop.reached.wait)
        assert response.cancel()
        stop.open()
        with pytest.raises(errors.OperationCancelledError):
            await response
        assert len(gathered(path)) == parts
        assert path.with_name("c.partial_save").exists() == bool(parts)
        await partial.save_async(path, {f"k{parts}": 2})
    await partial.finalize_async(path)
    check(ocp.load(path), {"k0": 2, "k1": 2})


async def test_a_cancelled_finalization_leaves_the_parts(tmp_path: Path) -> None:
    """Parts can be added to and finalized after a finalization was given up."""
    path = tmp_path / "c"
    await partial.save_async(path, FIRST)
    before = gathered(path)
    with Stop() as stop:
        stop.close()
        response = partial.finalize_async(path)
    await anyio.to_thread.run_sync(stop.reached.wait)
    assert response.cancel()
    stop.open()
    with pytest.raises(errors.OperationCancelledError):
        await response
    assert gathered(path) == before and not path.exists()
    await partial.save_async(path, SECOND)
    await partial.finalize_async(path)
    check(ocp.load(path), BOTH)


def test_lazy_staging_leaves_the_values_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`staging = 'lazy'` holds for parts: the call returns before anything is captured."""
    may_capture = threading.Event()
    original = PyTreeHandler.save

    async def held(self: PyTreeHandler, *args: Any) -> Any:
        while not may_capture.is_set():  # noqa: ASYNC110 - set from another thread
            await anyio.sleep(0.002)
        return await original(self, *args)

    monkeypatch.setattr(PyTreeHandler, "save", held)
    context = ocp.Context()
    context.asynchronous.staging = "lazy"
    value = np.zeros(100)
    with context:
        response = partial.save_async(tmp_path / "c", {"w": value})
    value[:] = 1  # still the caller's to change
    may_capture.set()
    response.wait_staged(30)
    value[:] = 2
    response.result(30)
    partial.finalize(tmp_path / "c")
    check(ocp.load(tmp_path / "c"), {"w": np.ones(100)})
