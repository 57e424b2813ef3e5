"""What can not be added or finalized: refused by name, and nothing is lost."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from parts import BOTH, FIRST, SECOND, check, gathered, storing
from watched_directory import Log, watched

import orbax_async as ocp
from orbax_async import errors, partial
from orbax_async._storage.local import opened_by

stores = pytest.mark.parametrize("use_ocdbt", [True, False])

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
    ({"l": {"x": 3}}, ["['l']['x']"]),
    ({"n": [{}, 3]}, ["['n'][0]", "['n'][1]"]),
    ([3], ["[0]"]),
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
    tmp_path: Path,
) -> None:
    """W27: what can't hold parts is refused by name, and left alone."""
    (tmp_path / "c.partial_save").write_text("mine")
    log = Log()
    with (
        opened_by(watched(log)),
        pytest.raises(errors.CommitError, match=r"c\.partial_save: it is a file"),
    ):
        partial.save(tmp_path / "c", FIRST)
    assert not log.of("kvstore", "walk", "sync")  # neither values nor documents
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


def test_a_part_without_its_document_is_not_dropped(tmp_path: Path) -> None:
    """A part of which nobody can say what it holds is named, and stays."""
    path = tmp_path / "c"
    partial.save(path, {"a": 1})
    partial.save(path, {"b": 2})
    document = gathered(path)[0] / "state" / "_METADATA"
    document.rename(tmp_path / "aside")
    for act in (lambda: partial.save(path, {"c": 3}), lambda: partial.finalize(path)):
        with pytest.raises(errors.InvalidLayoutError, match=re.escape(f"{document} is missing")):
            act()
    (tmp_path / "aside").rename(document)
    partial.finalize(path)
    check(ocp.load(path), {"a": 1, "b": 2})


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
