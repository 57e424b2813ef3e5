"""Partial saves: parts that gather, and become one checkpoint or stay what they are."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from parts import BOTH, FIRST, SECOND, Held, check, gathered, storing

import orbax_async as ocp
from orbax_async import errors, partial
from orbax_async._storage import files

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
    before = files.sizes(str(gathered(path)[0]))
    partial.save(path, {"small": 1})
    first, second = gathered(path)
    assert files.sizes(str(first)) == before
    assert sum(files.sizes(str(second)).values()) < 10_000
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


# What can't be added.

REPLACEMENTS = [
    ({"a": 0}, ["['a']"]),
    ({"a": {"below": 0}}, ["['a']['below']"]),
    ({"n": 0}, ["['n']"]),
    ({"n": {"x": {"below": 0}}}, ["['n']['x']['below']"]),
    ({"l": [3]}, ["['l'][0]"]),
    ({"l": [None, None, 3]}, ["['l'][0]", "['l'][1]"]),
    ({"none": 1}, ["['none']"]),
    ({"a": None}, ["['a']"]),
    ({"e": {"below": 1}}, ["['e']['below']"]),
    ({"e": []}, ["['e']"]),
    (7, [""]),
    ({"new": 1, "a": 0, "n": {"new": 1, "x": 0}}, ["['a']", "['n']['x']"]),
]


@pytest.mark.parametrize(("state", "keypaths"), REPLACEMENTS)
def test_what_is_saved_can_not_be_replaced(state: Any, keypaths: list[str], tmp_path: Path) -> None:
    """B14.2: all that would be replaced is named by the call, and nothing is changed."""
    path = tmp_path / "c"
    partial.save(path, FIRST)
    with pytest.raises(errors.PartialSaveReplacementError, match="not support REPLACEMENT") as at:
        partial.save_async(path, state)
    assert [each.keypath for each in (at.value, *at.value.others)] == keypaths
    assert len(gathered(path)) == 1
    partial.save(path, SECOND)
    partial.finalize(path)
    check(ocp.load(path), BOTH)


def test_a_bare_leaf_is_a_whole_tree(tmp_path: Path) -> None:
    """Nothing can be added to a leaf without a key."""
    partial.save(tmp_path / "c", np.arange(3))
    for state in (1, {"a": 1}):
        with pytest.raises(errors.PartialSaveReplacementError):
            partial.save(tmp_path / "c", state)
    partial.finalize(tmp_path / "c")
    assert ocp.load(tmp_path / "c").tolist() == [0, 1, 2]


def test_an_empty_node_adds_nothing_to_what_is_there(tmp_path: Path) -> None:
    """The same empty node, or one where there is more, is no replacement, as in Orbax."""
    path = tmp_path / "c"
    for state in (FIRST, {"e": {}, "none": None}, {"n": {}}, {"l": None}, {"n": {"y": 2}}):
        partial.save(path, state)
    partial.finalize(path)
    check(ocp.load(path), {**FIRST, "n": {"x": 1.5, "y": 2}})


def test_two_leaves_of_one_stored_name_are_refused(tmp_path: Path) -> None:
    """W11: keys that the format would confuse are told apart between parts, too."""
    partial.save(tmp_path / "c", {"a": {"b": 1}})
    with pytest.raises(errors.DuplicateLeafError, match=r"leaf \['a.b'\].*\['a'\]\['b'\]"):
        partial.save(tmp_path / "c", {"a.b": 2})
    partial.finalize(tmp_path / "c")
    assert ocp.load(tmp_path / "c") == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("use_ocdbt", "first", "second"),
    [
        (True, {"a": "x"}, {"a/b": "y"}),
        (True, {"a/b": "y"}, {"a": "x"}),
        (False, {"a": 1}, {"a/c": 2}),
        (False, {"a/0": 2}, {"a": np.arange(3)}),
    ],
)
def test_a_leaf_that_would_lie_inside_another_is_refused(
    use_ocdbt: bool, first: Any, second: Any, tmp_path: Path
) -> None:
    """W11: where a `/` in a name makes folders, a part can't hide or break an earlier one."""
    path = tmp_path / "c"
    with storing(use_ocdbt):
        partial.save(path, first)
        with pytest.raises(errors.DuplicateLeafError, match="neither can lie in the other"):
            partial.save_async(path, second)
        partial.save(path, {"other": {"a/b": 3, "c/d": "e"}})
        partial.finalize(path)
    check(ocp.load(path), first | {"other": {"a/b": 3, "c/d": "e"}})


def test_leaves_named_like_databases_are_data(tmp_path: Path) -> None:
    """Without OCDBT, a leaf whose directory has a name of OCDBT's is finalized as what it is."""
    state = {"ocdbt": {"process_0": np.arange(3)}, "manifest": {"ocdbt": 1}, "d": 2}
    with storing(use_ocdbt=False):
        partial.save(tmp_path / "c", state)
        partial.finalize(tmp_path / "c")
    check(ocp.load(tmp_path / "c"), state)


def test_names_with_slashes_that_lie_beside_each_other_are_added(tmp_path: Path) -> None:
    """What a database, or another document, can tell apart is no duplicate."""
    path = tmp_path / "c"
    parts: list[dict[str, Any]] = [{"a": 1}, {"a/b": 2}, {"a/b/c": "text"}, {"a/b/d": "more"}]
    for part in parts:
        partial.save(path, part)
    partial.finalize(path)
    check(ocp.load(path), {key: value for part in parts for key, value in part.items()})


@pytest.mark.parametrize("option", ["use_ocdbt", "use_zarr3"])
def test_parts_of_different_formats_are_refused(option: str, tmp_path: Path) -> None:
    """B14.10: what could not be loaded in the end is refused by the call that begins it."""
    path = tmp_path / "c"
    partial.save(path, FIRST)
    with storing(**{option: False}):
        with pytest.raises(errors.PartialSaveError, match=f"{option} = True"):
            partial.save(path, SECOND)
        shutil.move(gathered(path)[0], tmp_path / "aside")
        partial.save(path, SECOND)
        shutil.move(tmp_path / "aside", gathered(path)[0].with_name("x.pending_1_0"))
    with pytest.raises(errors.PartialSaveError, match="use_ocdbt and use_zarr3"):
        partial.finalize(path)
    assert len(gathered(path)) == 2 and not path.exists()


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (errors.UnsupportedLeafError, ({},)),
        (errors.UnsupportedLeafError, (None,)),
        (errors.UnsupportedLeafError, ({"a": object()},)),
    ],
)
def test_bad_states_are_refused_by_the_call(
    error: type[Exception], arguments: tuple[Any, ...], tmp_path: Path
) -> None:
    """B14.4: nothing is left on disk by what can't be saved."""
    with pytest.raises(error):
        partial.save_async(tmp_path / "c", *arguments)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("custom_metadata", [[1], {"x": object()}, {1: 2}])
def test_bad_custom_metadata_is_refused_by_the_call(custom_metadata: Any, tmp_path: Path) -> None:
    """W27: what is no dict of JSON values is found before anything is written."""
    with pytest.raises((ValueError, TypeError), match="custom_metadata"):
        partial.save_async(tmp_path / "c", {"a": 1}, custom_metadata=custom_metadata)
    assert not os.listdir(tmp_path)


def test_a_finished_checkpoint_takes_no_parts(tmp_path: Path) -> None:
    """B14.6: both verbs refuse a path at which there is something."""
    path = tmp_path / "c"
    partial.save(path, FIRST)
    ocp.save(path, {"other": 1})
    for verb in (partial.finalize_async, lambda each: partial.save_async(each, SECOND)):
        with pytest.raises(FileExistsError, match="Finalized checkpoint already exists"):
            verb(path)
    assert ocp.load(path) == {"other": 1}
    ocp.delete(path)
    partial.finalize(path)
    check(ocp.load(path), FIRST)


def test_there_must_be_something_to_finalize(tmp_path: Path) -> None:
    """B14.6: no session, and an empty one, are a FileNotFoundError."""
    with pytest.raises(FileNotFoundError, match=r"c\.partial_save does not exist"):
        partial.finalize(tmp_path / "c")
    (tmp_path / "c.partial_save").mkdir()
    with pytest.raises(errors.NoPartialSaveError):
        partial.finalize(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c.partial_save"]


def test_a_file_in_the_place_of_the_parts_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W27: what can't hold parts is refused by name, and left alone."""
    (tmp_path / "c.partial_save").write_text("mine")
    monkeypatch.setattr(files, "walk", None)  # what is written would be synced
    with pytest.raises(errors.CommitError, match=r"c\.partial_save: it is a file"):
        partial.save(tmp_path / "c", FIRST)
    assert (tmp_path / "c.partial_save").read_text() == "mine"


def test_the_directory_of_the_parts_may_be_named(tmp_path: Path) -> None:
    """B14.6: `finalize` takes `c` and `c.partial_save` alike."""
    partial.save(tmp_path / "c", FIRST)
    partial.finalize(tmp_path / "c.partial_save")
    check(ocp.load(tmp_path / "c"), FIRST)


def test_parts_are_no_checkpoint_yet(tmp_path: Path) -> None:
    """B14.8: readers say that the parts have to be finalized."""
    path = tmp_path / "c"
    partial.save(path, FIRST)
    for each in (path, tmp_path / "c.partial_save"):
        assert not ocp.is_orbax_checkpoint(each)
        for read in (ocp.load, ocp.metadata, ocp.verify):
            with pytest.raises(errors.InvalidLayoutError, match=r"partial saves.*finalize"):
                read(each)


@pytest.mark.parametrize("name", ["_METADATA", "_sharding", "array_metadatas/process_0"])
def test_a_damaged_part_is_named(name: str, tmp_path: Path) -> None:
    """A document that is cut short is reported by its file, and no part is lost."""
    path = tmp_path / "c"
    partial.save(path, {"a": jnp.arange(3)})
    partial.save(path, {"b": jnp.arange(3)})
    file = gathered(path)[0] / "state" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(errors.InvalidLayoutError, match=re.escape(f"{file} is damaged")):
        partial.finalize(path)
    file.write_bytes(whole)
    partial.finalize(path)
    check(ocp.load(path), {"a": np.arange(3), "b": np.arange(3)})


@pytest.mark.parametrize("place", ["part", "session"])
def test_what_no_partial_save_writes_is_not_dropped(place: str, tmp_path: Path) -> None:
    """Something else in a part, or beside the parts, is named, and not removed with them."""
    path = tmp_path / "c"
    partial.save(path, FIRST)
    part = gathered(path)[0]
    other = (part if place == "part" else part.parent) / "other"
    other.mkdir()
    with pytest.raises(errors.PartialSaveError, match=r"\['other'\]"):
        partial.finalize(path)
    assert os.listdir(tmp_path) == ["c.partial_save"]
    other.rename(tmp_path / "other")
    partial.finalize(path)
    check(ocp.load(path), FIRST)


@stores
def test_a_part_whose_data_is_gone_is_found_out(use_ocdbt: bool, tmp_path: Path) -> None:
    """`enable_post_merge_validation` finds an array that is described and not there."""
    path = tmp_path / "c"
    with storing(use_ocdbt):
        partial.save(path, {"a": np.arange(3)})
        partial.save(path, {"b": np.arange(3)})
        data = "ocdbt.process_0" if use_ocdbt else "a"
        shutil.rmtree(gathered(path)[0] / "state" / data)
        with pytest.raises(errors.WriteError, match=r"leaf \['a'\]: a/zarr.json is missing"):
            partial.finalize(path)
        assert len(gathered(path)) == 2
        context = storing(use_ocdbt)
        context.array.saving.enable_post_merge_validation = False
        with context:
            partial.finalize(path)
    assert ocp.load(path, {"b": np.empty(3, int), "a": ...})["b"].tolist() == [0, 1, 2]


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


def test_parts_keep_to_the_limits_of_memory(tmp_path: Path) -> None:
    """A budget of writes holds for parts; leaves above it go alone."""
    context = ocp.Context()
    context.memory.write_concurrent_bytes = 1 << 16
    state = {f"w{i}": np.full(1 << 14, i, np.float32) for i in range(6)}
    with context:
        partial.save(tmp_path / "c", state)
        partial.finalize(tmp_path / "c")
    check(ocp.load(tmp_path / "c"), state)


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


async def test_a_cancelled_part_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel before the commit removes the part alone, and the session if it was the first."""
    path = tmp_path / "c"
    held = Held(monkeypatch)
    for parts in (0, 1):
        held.close()
        response = partial.save_async(path, {f"k{parts}": 1})
        await anyio.to_thread.run_sync(held.reached.wait)
        assert response.cancel()
        held.open()
        with pytest.raises(errors.OperationCancelledError):
            await response
        assert len(gathered(path)) == parts
        assert path.with_name("c.partial_save").exists() == bool(parts)
        await partial.save_async(path, {f"k{parts}": 2})
    await partial.finalize_async(path)
    check(ocp.load(path), {"k0": 2, "k1": 2})


async def test_a_cancelled_finalization_leaves_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts can be added to and finalized after a finalization was given up."""
    path = tmp_path / "c"
    await partial.save_async(path, FIRST)
    before = gathered(path)
    held = Held(monkeypatch)
    held.close()
    response = partial.finalize_async(path)
    await anyio.to_thread.run_sync(held.reached.wait)
    assert response.cancel()
    held.open()
    with pytest.raises(errors.OperationCancelledError):
        await response
    assert gathered(path) == before and not path.exists()
    await partial.save_async(path, SECOND)
    await partial.finalize_async(path)
    check(ocp.load(path), BOTH)


def test_lazy_staging_returns_at_once(tmp_path: Path) -> None:
    """`staging = 'lazy'` holds for parts."""
    context = ocp.Context()
    context.asynchronous.staging = "lazy"
    with context:
        response = partial.save_async(tmp_path / "c", {"w": jnp.arange(100)})
        response.wait_staged(30)
        response.result(30)
        partial.finalize(tmp_path / "c")
    check(ocp.load(tmp_path / "c"), {"w": np.arange(100)})
