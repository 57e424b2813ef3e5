"""Partial saves that one library begins and the other goes on with, and finalizes."""

from __future__ import annotations

import collections
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1
from watched_directory import before, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.local import opened_by

LIBRARIES: dict[str, ModuleType] = {"ours": ocp, "orbax": v1}
OTHERS = pytest.mark.parametrize(
    ("first", "second", "last"),
    [
        ("ours", "orbax", "ours"),
        ("ours", "orbax", "orbax"),
        ("ours", "ours", "orbax"),
        ("orbax", "ours", "orbax"),
        ("orbax", "ours", "ours"),
        ("orbax", "orbax", "ours"),
    ],
)


def storing(library: ModuleType, use_ocdbt: bool, use_zarr3: bool = True) -> Any:
    """Returns a library's context that stores arrays in a certain format."""
    context = library.Context()
    context.array.saving.use_ocdbt = use_ocdbt
    context.array.saving.use_zarr3 = use_zarr3
    return context


def entries(folder: Path) -> list[str]:
    """Returns the files below a folder, without the names that are different each time."""
    found = set()
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if "d" not in parts and file.is_file():
            names = ["pending" if ".pending" in each else each for each in parts]
            names = ["part" if each.startswith("ocdbt.process_0") else each for each in names]
            found.add("/".join(names))
    return sorted(found)


@OTHERS
@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("use_zarr3", [True, False])
def test_either_library_goes_on_with_the_other_s_parts(
    first: str,
    second: str,
    last: str,
    use_ocdbt: bool,
    use_zarr3: bool,
    mesh8: Mesh,
    tmp_path: Path,
) -> None:
    """Whoever saves, and whoever finalizes: both load the same whole, bit for bit."""
    sharded = NamedSharding(mesh8, PartitionSpec("x", "y"))
    one = {
        "w": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharded),
        "n": {"x": np.arange(3)},
        "s": "text",
        "e": {},
        "key": jax.random.key(1),
    }
    two = {"b": jnp.arange(40, dtype=jnp.bfloat16), "n": {"y": 2.5, "z": None}, "i": 7}
    whole = {**one, **two, "n": {"x": np.arange(3), "y": 2.5, "z": None}}
    for name, state, metadata in (
        (first, one, {"a": 1, "k": {"x": 1}, "l": [1]}),
        (second, two, {"a": 2, "k": {"y": {}}, "l": [2]}),
    ):
        library = LIBRARIES[name]
        with storing(library, use_ocdbt, use_zarr3):
            library.partial.save(tmp_path / "c", state, custom_metadata=metadata)
    with storing(LIBRARIES[last], use_ocdbt, use_zarr3):
        LIBRARIES[last].partial.finalize(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    for library in LIBRARIES.values():
        abstract = library.metadata(tmp_path / "c").metadata if library is v1 else None
        assert_same(library.load(tmp_path / "c", abstract), whole)
        about = library.metadata(tmp_path / "c")
        assert about.custom_metadata == {"a": 2, "k": {"x": 1, "y": {}}, "l": [2]}
        found = library.load_checkpointables(tmp_path / "c")
        assert found.keys() == {"state"} and found["state"]["i"] == 7
    assert ocp.verify(tmp_path / "c").is_intact


@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_both_have_the_same_files(use_ocdbt: bool, tmp_path: Path) -> None:
    """Before and after `finalize` there are the same names, apart from data files."""
    listings: dict[str, list[list[str]]] = {}
    for name, library in LIBRARIES.items():
        path = tmp_path / name / "c"
        path.parent.mkdir()
        with storing(library, use_ocdbt):
            library.partial.save(path, {"a": jnp.arange(3), "s": "text"})
            library.partial.save(path, {"b": np.arange(3)})
            before = entries(path.parent)
            library.partial.finalize(path)
        listings[name] = [before, entries(path.parent)]
    assert listings["ours"] == listings["orbax"]


@pytest.mark.parametrize(("first", "second"), [("ours", "orbax"), ("orbax", "ours")])
@pytest.mark.parametrize("state", [{"a": 0}, {"a": {"x": 0}}, {"n": 0}, {"l": [3]}, {"none": 1}])
def test_b14_2_neither_replaces_the_other_s_parts(
    first: str, second: str, state: Any, tmp_path: Path
) -> None:
    """B14.2: what one library has saved the other refuses to replace, and adds to."""
    saved = {"a": 1, "n": {"x": 1}, "l": [1, 2], "none": None}
    LIBRARIES[first].partial.save(tmp_path / "c", saved)
    with pytest.raises(Exception, match="not support REPLACEMENT") as caught:
        LIBRARIES[second].partial.save(tmp_path / "c", state)
    assert type(caught.value).__name__ == "PartialSaveReplacementError"
    remove_leftover(tmp_path)
    LIBRARIES[second].partial.save(tmp_path / "c", {"new": 1})
    LIBRARIES[first].partial.finalize(tmp_path / "c")
    for library in LIBRARIES.values():
        assert library.load(tmp_path / "c") == saved | {"new": 1}


def remove_leftover(folder: Path) -> None:
    """Removes what a failed save of Orbax leaves (W28)."""
    for name in ("state", ""):
        path = folder / "c.partial_save.orbax-checkpoint-tmp" / name
        if path.exists():
            path.rmdir()


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_both_refuse_the_same_paths(library: ModuleType, tmp_path: Path) -> None:
    """B14.6, B14.8, B14.9: no session, a finished checkpoint, parts alone, commits in place."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        library.partial.finalize(tmp_path / "c")
    library.partial.save(tmp_path / "c", {"a": 1})
    assert not library.is_orbax_checkpoint(tmp_path / "c")
    for path in (tmp_path / "c", tmp_path / "c.partial_save"):
        with pytest.raises(ValueError, match="Could not recognize"):
            library.load(path)
    library.partial.finalize(tmp_path / "c.partial_save")
    for verb in (library.partial.finalize, lambda path: library.partial.save(path, {"b": 1})):
        with pytest.raises(FileExistsError, match="Finalized checkpoint already exists"):
            verb(tmp_path / "c")
    context = library.Context()
    context.atomicity.mode = library.options.AtomicityMode.COMMIT_FILE
    with context, pytest.raises(ValueError, match="not supported"):
        library.partial.save(tmp_path / "d", {"a": 1})


@pytest.mark.parametrize("then", [{}, {"b": np.arange(4)}], ids=["as it is", "added to"])
def test_orbax_finalizes_what_a_dead_finalization_has_left(
    then: dict[str, Any], tmp_path: Path
) -> None:
    """A session that already is the whole checkpoint is finished, or added to, by Orbax too."""

    def copy() -> None:  # as if killed before the last rename
        shutil.copytree(tmp_path / "c.partial_save", tmp_path / "dead" / "c.partial_save")

    ocp.partial.save(tmp_path / "c", {"a": jnp.arange(3), "n": {"x": 1}})
    with opened_by(watched(before(on("rename", path=str(tmp_path / "c")), copy))):
        ocp.partial.finalize(tmp_path / "c")
    assert (tmp_path / "dead" / "c.partial_save" / "state" / "manifest.ocdbt").exists()
    if then:
        v1.partial.save(tmp_path / "dead" / "c", then)
    v1.partial.finalize(tmp_path / "dead" / "c")
    assert_same(ocp.load(tmp_path / "dead" / "c"), {"a": jnp.arange(3), "n": {"x": 1}} | then)


def test_strings_in_two_parts_break_orbax_and_not_us(tmp_path: Path) -> None:
    """Orbax can't finalize two parts with strings, even of its own; we can."""
    v1.partial.save(tmp_path / "c", {"a": jnp.arange(3), "s": "one"})
    v1.partial.save(tmp_path / "c", {"b": jnp.arange(4), "t": "two"})
    shutil.copytree(tmp_path / "c.partial_save", tmp_path / "copy" / "c.partial_save")
    with pytest.raises(FileExistsError, match=r"_strings\.json"):
        v1.partial.finalize(tmp_path / "c")
    ocp.partial.finalize(tmp_path / "copy" / "c")
    whole = {"a": jnp.arange(3), "b": jnp.arange(4), "s": "one", "t": "two"}
    for library in LIBRARIES.values():
        assert_same(library.load(tmp_path / "copy" / "c"), whole)


def test_orbax_reads_rich_types_of_several_parts(tmp_path: Path) -> None:
    """Orbax keeps the types of the last part alone; of ours it reads all."""
    pair = collections.namedtuple("pair", "x y")
    context = ocp.Context()
    context.pytree.saving.pytree_metadata_options.support_rich_types = True
    with context:
        ocp.partial.save(tmp_path / "c", {"t": (1, 2)})
        ocp.partial.save(tmp_path / "c", {"u": pair(3, 4)})
        ocp.partial.finalize(tmp_path / "c")
    theirs = v1.Context()
    options = type(theirs.pytree.saving.pytree_metadata_options)(support_rich_types=True)
    theirs.pytree.saving.pytree_metadata_options = options
    with theirs:
        loaded = v1.load(tmp_path / "c")
    assert loaded["t"] == (1, 2) and loaded["u"]._asdict() == {"x": 3, "y": 4}


def test_an_empty_node_over_a_leaf_loses_it_in_orbax_and_not_here(tmp_path: Path) -> None:
    """Orbax takes `None` in place of a saved leaf, whose value is then gone; we refuse it."""
    for name, library in LIBRARIES.items():
        library.partial.save(tmp_path / name, {"l": [1, 2]})
    v1.partial.save(tmp_path / "orbax", {"l": [None, None, 3]})
    v1.partial.finalize(tmp_path / "orbax")
    assert v1.load(tmp_path / "orbax") == {"l": [None, None, 3]}
    with pytest.raises(errors.PartialSaveReplacementError):
        ocp.partial.save(tmp_path / "ours", {"l": [None, None, 3]})


def test_both_name_their_parts_alike(tmp_path: Path) -> None:
    """The commit marker of a part names the session, and the handler of the whole is a pytree's."""
    ocp.partial.save(tmp_path / "c", {"a": 1})
    session = tmp_path / "c.partial_save"
    (part,) = session.iterdir()
    assert (part / "commit_success.txt").read_text().endswith(f" to {session}")
    ocp.partial.finalize(tmp_path / "c")
    document = json.loads((tmp_path / "c" / "_CHECKPOINT_METADATA").read_text())
    assert document["item_handlers"]["state"].endswith("PyTreeHandler")
    sentence, *_ = (tmp_path / "c" / "commit_success.txt").read_text().splitlines()
    assert sentence.endswith(f" to {tmp_path / 'c'}")
