"""Bad input: one clear error, before any work, that harms neither checkpoint nor engine."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import orbax_async as ocp
from orbax_async import errors

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "n": np.arange(4), "step": 7, "name": "run"}


@pytest.fixture(autouse=True)
def the_engine_goes_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checks after each test that a good save and load work."""
    yield
    folder = tmp_path_factory.mktemp("good")
    ocp.save(folder / "checkpoint", {"a": np.arange(3)})
    assert ocp.load(folder / "checkpoint")["a"].tolist() == [0, 1, 2]
    shutil.rmtree(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of STATE."""
    ocp.save(tmp_path / "checkpoint", STATE)
    return tmp_path / "checkpoint"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Leaves that can't be saved.


class Colour(enum.Enum):
    RED = 1


class Point:
    """An object of the user's own that is no pytree."""


UNSUPPORTED: dict[str, Any] = {
    "object": Point(),
    "class": Point,
    "set": {1, 2},
    "Enum": Colour.RED,
    "Path": pathlib.Path("x"),
    "range": range(3),
    "bytearray": bytearray(b"x"),
    "memoryview": memoryview(b"x"),
    "Decimal": decimal.Decimal("1.5"),
    "date": datetime.date(2020, 1, 1),
    "function": len,
    "ShapeDtypeStruct": jax.ShapeDtypeStruct((2,), jnp.float32),
    "placeholder": ...,
    "int beyond uint64": 2**64,
    "int below int64": -(2**63) - 1,
    "array of str": np.array(["a", "b"]),
    "array of bytes": np.array([b"a"]),
    "array of objects": np.array([object()], dtype=object),
    "structured array": np.zeros(2, [("x", "f4")]),
    "datetimes": np.array(["2020-01-01"], "datetime64[D]"),
    "timedeltas": np.zeros(2, "timedelta64[s]"),
    "masked array": np.ma.masked_array([1, 2], mask=[True, False]),
}
if np.dtype(np.longdouble).itemsize > 8:
    UNSUPPORTED["longdouble"] = np.zeros(2, np.longdouble)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_unsupported_leaf_is_named_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    """The error has the key path, what was found, and what to do; nothing is on disk."""
    state = {"good": jnp.zeros(3), "bad": [1, {"leaf": UNSUPPORTED[kind]}]}
    with pytest.raises(errors.UnsupportedLeafError) as caught:
        ocp.save_async(tmp_path / "checkpoint", state)
    assert isinstance(caught.value, ValueError)
    assert caught.value.keypath == "['bad'][1]['leaf']"
    assert "leaf ['bad'][1]['leaf']: " in str(caught.value)
    assert len(str(caught.value)) > len("leaf ['bad'][1]['leaf']: ") + 20
    assert os.listdir(tmp_path) == []


def test_all_unsupported_leaves_are_named_at_once(tmp_path: Path) -> None:
    """One error lists every leaf that can't be saved, by key path and type."""
    state = {"a": Point(), "b": [1, {2}, Colour.RED], "c": jnp.zeros(3), "d": len}
    with pytest.raises(errors.UnsupportedLeafError) as caught:
        ocp.save(tmp_path / "checkpoint", state)
    for text in ("['a']", "Point", "['b'][1]", "set", "['b'][2]", "Colour", "['d']", "builtin"):
        assert text in str(caught.value)
    assert "['c']" not in str(caught.value)
    assert [other.keypath for other in caught.value.others] == ["['b'][1]", "['b'][2]", "['d']"]


def test_a_tracer_is_refused(tmp_path: Path) -> None:
    """A save inside of jit says that it must be outside."""

    def step(x: jax.Array) -> jax.Array:
        ocp.save(tmp_path / "checkpoint", {"x": x})
        return x

    with pytest.raises(errors.UnsupportedLeafError, match=r"\['x'\].*outside of jit"):
        jax.jit(step)(jnp.zeros(3))
    assert os.listdir(tmp_path) == []


def test_a_deleted_array_is_refused(tmp_path: Path) -> None:
    """An array that was donated or deleted before the save is a StagingError of its key path."""
    gone = jnp.zeros(3)
    gone.delete()
    with pytest.raises(
        errors.StagingError, match=r"\['a'\]\[0\].*Array has been deleted"
    ) as caught:
        ocp.save_async(tmp_path / "checkpoint", {"a": [gone]})
    assert isinstance(caught.value, RuntimeError)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("state", [None, {}, [], (), {"a": 1}.__class__()])
def test_an_empty_state_is_refused(state: Any, tmp_path: Path) -> None:
    """There is nothing to save in None or in an empty container."""
    with pytest.raises(errors.UnsupportedLeafError, match=r"must not be None|Found empty item"):
        ocp.save(tmp_path / "checkpoint", state)
    assert os.listdir(tmp_path) == []


def test_string_keys_that_readers_take_for_escapes(tmp_path: Path) -> None:
    """B2.31: a string under a key with `~` is refused by name."""
    with pytest.raises(errors.UnsupportedLeafError, match="'~'") as caught:
        ocp.save(tmp_path / "checkpoint", {"a~b": "text"})
    assert caught.value.keypath == "['a~b']"
    ocp.save(tmp_path / "checkpoint", {"a~b": 1})  # of no matter for an array
    assert ocp.load(tmp_path / "checkpoint") == {"a~b": 1}


@pytest.mark.parametrize(
    "state",
    [
        {"a": jnp.zeros(2), "a/b": jnp.zeros(2)},
        {"..": 1},
        {"a/../b": 1},
        {"/": 1},
        {"_METADATA": 1},
        {"_sharding/x": 1},
        {"array_metadatas/process_0": 1},
    ],
    ids=str,
)
def test_names_that_are_no_file_paths(state: Any, tmp_path: Path) -> None:
    """Without OCDBT a leaf's name is a path: it can't leave, nest, or be a document's."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context, pytest.raises(errors.LeafError, match="use_ocdbt"):
        ocp.save(tmp_path / "checkpoint", state)
    assert os.listdir(tmp_path) == []


# Names and paths.


@pytest.mark.parametrize("name", ["metrics", "AUTO", "_CHECKPOINT_DELETION", "", "a/b", ".", ".."])
def test_a_name_that_no_checkpointable_can_have(name: str, tmp_path: Path) -> None:
    """B8.13: reserved and impossible names are refused by the call."""
    with pytest.raises(ValueError, match=r"reserved|Empty string|can't name"):
        ocp.save_async(tmp_path / "checkpoint", STATE, checkpointable_name=name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint", "x.orbax-checkpoint-tmp"],
)
def test_a_name_that_the_format_uses_itself(name: str, tmp_path: Path) -> None:
    """B8.13: names of the format's own files can't name a checkpointable."""
    with pytest.raises(ValueError, match="format does not use itself"):
        ocp.save_async(tmp_path / "checkpoint", STATE, checkpointable_name=name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [None, 5, b"state", pathlib.Path("state")])
def test_a_name_that_is_no_string(name: Any, tmp_path: Path) -> None:
    """A name of another type is a TypeError that says so."""
    with pytest.raises(TypeError, match="must be a str"):
        ocp.save_async(tmp_path / "checkpoint", STATE, checkpointable_name=name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["metrics", "_CHECKPOINT_DELETION", "", "a/b", 5])
def test_a_name_that_nothing_can_be_loaded_by(name: Any, checkpoint: Path) -> None:
    """Loads and metadata refuse the same names; `AUTO` and None have a meaning of their own."""
    for verb in (ocp.load_async, ocp.metadata):
        with pytest.raises((ValueError, TypeError)):
            verb(checkpoint, checkpointable_name=name)


@pytest.mark.parametrize("name", ["weights", "state ", "STATE"])
def test_a_name_that_is_not_there(name: str, checkpoint: Path) -> None:
    """A missing name is an InvalidLayoutError that lists those that are there."""
    for verb in (ocp.load, ocp.metadata):
        with pytest.raises(errors.InvalidLayoutError) as caught:
            verb(checkpoint, checkpointable_name=name)
        assert isinstance(caught.value.__cause__, FileNotFoundError)
        for text in (name, "'state'", str(checkpoint)):
            assert text in str(caught.value)


def test_no_name_for_a_checkpoint_with_names(checkpoint: Path) -> None:
    """`checkpointable_name=None` is for flat checkpoints, and says which names there are."""
    with pytest.raises(errors.InvalidLayoutError, match="'state'") as caught:
        ocp.load(checkpoint, checkpointable_name=None)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("path", [None, 5, b"/tmp/x", ["/tmp/x"]])
def test_a_path_of_another_type(path: Any) -> None:
    """What is no path is a TypeError that says what was found."""
    for verb in (lambda: ocp.save(path, STATE), lambda: ocp.load(path), lambda: ocp.metadata(path)):
        with pytest.raises(TypeError, match=f"path object, got {type(path).__name__}"):
            verb()


def test_an_empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty path is refused, and is not the working directory."""
    monkeypatch.chdir(tmp_path)
    for verb in (lambda: ocp.save("", STATE), lambda: ocp.load(""), lambda: ocp.metadata("")):
        with pytest.raises(ValueError, match="empty"):
            verb()
    assert os.listdir(tmp_path) == []


def test_storage_that_is_not_there_yet() -> None:
    """Remote storage is refused by name, and is not a local directory called `gs:`."""
    for verb in (lambda: ocp.save("gs://bucket/x", STATE), lambda: ocp.load("s3://bucket/x")):
        with pytest.raises(ValueError, match=r"(gs|s3)://"):
            verb()


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    """What the file system refuses is a CommitError of the place, and nothing is left."""
    with pytest.raises(errors.CommitError, match="File name too long"):
        ocp.save(tmp_path / "checkpoint", STATE, checkpointable_name="x" * 300)
    with pytest.raises(errors.CommitError, match="File name too long"):
        ocp.save(tmp_path / "a" / ("x" * 300), STATE)
    assert os.listdir(tmp_path) == []


# Destinations.


def test_an_existing_destination(checkpoint: Path) -> None:
    """It is refused by the call, names the path and the way out, and stays as it was."""
    before = snapshot(checkpoint)
    with pytest.raises(errors.DestinationExistsError, match="overwrite=True") as caught:
        ocp.save_async(checkpoint, STATE)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FileExistsError)
    assert f"Destination {checkpoint} already exists" in str(caught.value)
    assert snapshot(checkpoint) == before
    assert os.listdir(checkpoint.parent) == ["checkpoint"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    """A path below a file is refused by the call, which names the file."""
    (tmp_path / "file").write_text("text")
    with pytest.raises(errors.CommitError, match=f"{tmp_path / 'file'} is a file") as caught:
        ocp.save_async(tmp_path / "file" / "checkpoint", STATE)
    assert isinstance(caught.value, OSError)
    assert (tmp_path / "file").read_text() == "text"


def test_a_directory_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by the call, which names the directory and says what to do."""
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != str(tmp_path) and access(path, mode)
    )
    with pytest.raises(errors.CommitError, match=r"not writable.*permissions") as caught:
        ocp.save_async(tmp_path / "a" / "checkpoint", STATE)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []


# Paths that hold no checkpoint.


def _missing(path: Path) -> str:
    shutil.rmtree(path)
    return "no such directory"


def _file(path: Path) -> str:
    shutil.rmtree(path)
    path.write_text("text")
    return "is a file"


def _empty(path: Path) -> str:
    shutil.rmtree(path)
    path.mkdir()
    return "none of the files"


def _other(path: Path) -> str:
    shutil.rmtree(path)
    (path / "src").mkdir(parents=True)
    return "'src'"


def _folder_of_checkpoints(path: Path) -> str:
    shutil.copytree(path, path.with_name("copy"))
    shutil.rmtree(path)
    path.mkdir()
    path.with_name("copy").rename(path / "7")
    return "'7'"


def _without_metadata(path: Path) -> str:
    (path / "_CHECKPOINT_METADATA").unlink()
    return "_CHECKPOINT_METADATA is missing"


def _without_tree(path: Path) -> str:
    (path / "state" / "_METADATA").unlink()
    return "_METADATA"


def _without_manifest(path: Path) -> str:
    (path / "state" / "manifest.ocdbt").unlink()
    return "manifest.ocdbt is missing"


def _with_a_broken_manifest(path: Path) -> str:
    (path / "state" / "manifest.ocdbt").write_bytes(b"garbage" * 20)
    return "damaged"


def _with_a_broken_tree(path: Path) -> str:
    (path / "state" / "_METADATA").write_text('{"tree_metadata": ')
    return "_METADATA is damaged"


def _with_another_tree(path: Path) -> str:
    (path / "state" / "_METADATA").write_text(json.dumps({"tree_metadata": {"('a',)": 5}}))
    return "_METADATA is damaged"


def _with_a_tree_that_is_a_list(path: Path) -> str:
    (path / "state" / "_METADATA").write_text("[1, 2]")
    return "_METADATA is damaged"


def _with_a_tree_inside_a_list(path: Path) -> str:
    (path / "state" / "_METADATA").write_text('{"tree_metadata": []}')
    return "_METADATA is damaged"


def _with_broken_shardings(path: Path) -> str:
    (path / "state" / "_sharding").write_text("{")
    return "_sharding is damaged"


def _with_shardings_of_another_form(path: Path) -> str:
    (path / "state" / "_sharding").write_text("[]")
    return "_sharding is damaged"


def _with_a_broken_deletion_record(path: Path) -> str:
    (path / "_CHECKPOINT_DELETION").write_text("{")
    return "_CHECKPOINT_DELETION is damaged"


UNREADABLE = [
    _missing,
    _file,
    _empty,
    _other,
    _folder_of_checkpoints,
    _without_metadata,
    _without_tree,
    _without_manifest,
    _with_a_broken_manifest,
    _with_a_broken_tree,
    _with_another_tree,
    _with_a_tree_that_is_a_list,
    _with_a_tree_inside_a_list,
    _with_broken_shardings,
    _with_shardings_of_another_form,
    _with_a_broken_deletion_record,
]


@pytest.mark.parametrize("damage", UNREADABLE)
def test_what_is_no_whole_checkpoint(damage: Callable[[Path], str], checkpoint: Path) -> None:
    """Loads and metadata say what is wrong, with the path, and change nothing."""
    problem = damage(checkpoint)
    before = snapshot(checkpoint.parent)
    for verb in (ocp.load, ocp.metadata):
        with pytest.raises(errors.InvalidLayoutError) as caught:
            verb(checkpoint)
        assert isinstance(caught.value, ValueError)
        assert problem in str(caught.value)
        assert str(checkpoint) in str(caught.value)
    assert snapshot(checkpoint.parent) == before


def test_an_unfinished_checkpoint(checkpoint: Path) -> None:
    """B8.10: a directory whose name says that it is unfinished is not loaded."""
    for suffix in (".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-1234"):
        unfinished = checkpoint.rename(checkpoint.with_name(f"x{suffix}"))
        for verb in (ocp.load, ocp.metadata):
            with pytest.raises(errors.InvalidLayoutError, match="unfinished"):
                verb(unfinished)
        unfinished.rename(checkpoint)


def test_a_part_of_a_checkpoint(checkpoint: Path) -> None:
    """The directory of a checkpointable is refused, and the error says what to load instead."""
    with pytest.raises(errors.InvalidLayoutError, match="subdirectory") as caught:
        ocp.load(checkpoint / "state")
    assert "checkpointable_name='state'" in str(caught.value)
    assert str(checkpoint) in str(caught.value)


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"custom_metadata": null}'])
def test_b8_12_a_damaged_checkpoint_document_costs_only_what_it_says(
    content: str, checkpoint: Path
) -> None:
    """Without a readable `_CHECKPOINT_METADATA` the state is loaded all the same."""
    (checkpoint / "_CHECKPOINT_METADATA").write_text(content)
    assert ocp.load(checkpoint)["step"] == 7
    found = ocp.metadata(checkpoint)
    assert found.custom_metadata == {}
    assert found.commit_timestamp_nsecs is None
    assert found.metadata["step"] == 0


def test_array_metadata_that_is_damaged(tmp_path: Path) -> None:
    """A load of what may be PRNG keys needs the record of them, and says where it is damaged."""
    for name, value in (("keys", jax.random.key(0)), ("others", jnp.zeros(3))):
        ocp.save(tmp_path / name, {"leaf": value})
        damaged = tmp_path / name / "state" / "array_metadatas" / "process_0"
        damaged.write_text('{"array_metadatas": [[]]}')
    with pytest.raises(errors.InvalidLayoutError, match=r"keys/state.*process_0 is damaged"):
        ocp.load(tmp_path / "keys")
    assert np.array_equal(ocp.load(tmp_path / "others")["leaf"], np.zeros(3))


@pytest.mark.parametrize("sharding", ["", "{}", "[]", '{"sharding_type": "Other"}'])
def test_a_sharding_that_says_nothing_costs_only_itself(sharding: str, checkpoint: Path) -> None:
    """Where the saved sharding can't be had, the array is loaded on one device."""
    (checkpoint / "state" / "_sharding").write_text(json.dumps({"dw==": sharding}))
    loaded = ocp.load(checkpoint)
    assert np.array_equal(loaded["w"], STATE["w"])
    assert loaded["w"].sharding.device_set == {jax.local_devices()[0]}


def test_missing_data_names_its_leaf(checkpoint: Path) -> None:
    """When a data file is gone the error names a leaf or the store, and the path."""
    for file in (checkpoint / "state" / "d").iterdir():
        file.unlink()
    with pytest.raises((errors.ReadError, errors.InvalidLayoutError), match=str(checkpoint)):
        ocp.load(checkpoint)


@pytest.mark.parametrize("use_zarr3", [True, False])
def test_missing_chunks_are_no_zeros(use_zarr3: bool, tmp_path: Path) -> None:
    """An array whose data is gone is a ReadError of its key path, small or large."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = use_zarr3
    state = {"small": np.arange(10), "large": np.arange(100_000.0), "good": 1}
    with context:
        ocp.save(tmp_path / "checkpoint", state)
    for name in ("small", "large"):
        folder = tmp_path / "checkpoint" / "state" / name
        data = folder / "c" if use_zarr3 else folder / "0"
        data.rename(tmp_path / "away")
        with pytest.raises(errors.ReadError, match=r"missing|not found|does not exist") as caught:
            ocp.load(tmp_path / "checkpoint")
        assert caught.value.keypath == f"['{name}']"
        (tmp_path / "away").rename(data)
    assert ocp.load(tmp_path / "checkpoint")["good"] == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"shape": [1]}', '{"shape": [4], "zarr_format": 3}']
)
def test_a_damaged_array_document_names_its_leaf(content: str, tmp_path: Path) -> None:
    """A zarr document that is damaged is a CorruptDataError of its key path."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "checkpoint", {"a": {"b": np.arange(4)}, "c": 1})
    (tmp_path / "checkpoint" / "state" / "a.b" / "zarr.json").write_text(content)
    for verb in (ocp.load, ocp.metadata):
        with pytest.raises(errors.CorruptDataError) as caught:
            verb(tmp_path / "checkpoint")
        assert caught.value.keypath == "['a']['b']"


def test_a_missing_array_document_names_its_leaf(tmp_path: Path) -> None:
    """An array that the tree names and the store lacks is a ReadError of its key path."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "checkpoint", {"a": {"b": np.arange(4)}, "c": 1})
    shutil.rmtree(tmp_path / "checkpoint" / "state" / "a.b")
    for verb in (ocp.load, ocp.metadata):
        with pytest.raises(errors.ReadError, match="missing") as caught:
            verb(tmp_path / "checkpoint")
        assert caught.value.keypath == "['a']['b']"


def test_missing_texts_name_their_leaf(checkpoint: Path) -> None:
    """Without `_strings.json` the first text is named; damage there names the file."""
    (checkpoint / "state" / "_strings.json").write_text("{")
    with pytest.raises(errors.InvalidLayoutError, match=r"_strings.json is damaged"):
        ocp.load(checkpoint)
    (checkpoint / "state" / "_strings.json").unlink()
    with pytest.raises(errors.ReadError, match="text is missing") as caught:
        ocp.load(checkpoint)
    assert caught.value.keypath == "['name']"


# Abstract trees that do not fit.


@pytest.mark.parametrize("leaf", [object(), Point, {1, 2}, len, pathlib.Path("x")])
def test_b3_19_an_abstract_leaf_of_another_kind(leaf: Any, tmp_path: Path) -> None:
    """What nothing can be loaded as is refused by the call, before the path is even looked at."""
    with pytest.raises(errors.AbstractLeafError, match="Unsupported abstract leaf") as caught:
        ocp.load_async(tmp_path / "missing", {"a": [1, leaf]})
    assert isinstance(caught.value, TypeError)
    assert caught.value.keypath == "['a'][1]"


def test_all_abstract_leaves_of_another_kind_are_named_at_once(checkpoint: Path) -> None:
    """One error lists every abstract leaf that can't be asked for."""
    with pytest.raises(errors.AbstractLeafError) as caught:
        ocp.load_async(checkpoint, {"w": object(), "n": np.ndarray, "step": {1}, "name": len})
    for text in ("['w']", "['step']", "['name']"):
        assert text in str(caught.value)
    assert "['n']" not in str(caught.value)


def test_an_abstract_mesh_that_is_not_set(checkpoint: Path) -> None:
    """B3.35: a sharding over an abstract mesh needs that mesh to be set, and says so."""
    sharding = NamedSharding(AbstractMesh((2,), ("model",)), PartitionSpec("model"))
    abstract = dict(STATE, w=jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=sharding))
    with pytest.raises(errors.AbstractLeafError, match="set_mesh") as caught:
        ocp.load_async(checkpoint, abstract)
    assert caught.value.keypath == "['w']"


MISMATCHES: dict[str, tuple[Any, list[str]]] = {
    "missing": (
        {"w": ..., "n": ...},
        ["['step']: in the checkpoint", "['name']: in the checkpoint"],
    ),
    "extra": (dict(STATE, more=1, other=2), ["['more']: asked for", "['other']: asked for"]),
    "renamed": (
        {"v": 1, "n": ..., "step": ..., "name": ...},
        ["['v']: asked for", "['w']: in the checkpoint"],
    ),
    "subtree for a leaf": (dict(STATE, w={"a": 1}), ["['w']['a']: asked for", "['w']: in the"]),
    "list for a dict": ([1, 2, 3], ["[0]: asked for", "['w']: in the checkpoint"]),
    "leaf for the root": (np.ndarray, ["<root>: asked for", "['w']: in the checkpoint"]),
    "empty": ({}, ["['w']: in the checkpoint", "['step']: in the checkpoint"]),
    "empty for a leaf": (dict(STATE, w={}), ["['w']: the checkpoint holds a leaf"]),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_b3_40_trees_that_differ(kind: str, checkpoint: Path) -> None:
    """One error lists every difference by key path, in its message and as an attribute."""
    abstract, expected = MISMATCHES[kind]
    with pytest.raises(errors.TreeMismatchError) as caught:
        ocp.load(checkpoint, abstract)
    assert isinstance(caught.value, ValueError)
    assert str(checkpoint) in str(caught.value)
    for text in expected:
        assert text in str(caught.value)
        assert any(line.startswith(text) for line in caught.value.mismatches)


def test_all_wrong_shapes_are_named_at_once(checkpoint: Path) -> None:
    """B3.31: one error lists every leaf of another shape, with both shapes."""
    abstract = {
        "w": jax.ShapeDtypeStruct((3, 2), jnp.float32),
        "n": np.zeros(5),
        "step": jax.ShapeDtypeStruct((1,), jnp.int32),
        "name": str,
    }
    with pytest.raises(errors.ShapeMismatchError) as caught:
        ocp.load(checkpoint, abstract)
    assert isinstance(caught.value, ValueError)
    for text in ("['w']", "(3, 2)", "(2, 3)", "['n']", "(5,)", "(4,)", "['step']", "(1,)", "()"):
        assert text in str(caught.value)
    assert len(caught.value.others) == 2


def test_wrong_kinds_are_named_by_key_path(checkpoint: Path) -> None:
    """B3.13-B3.15: a scalar of an array, a text of an array, and a number of a text."""
    cases: dict[str, tuple[Any, type[Exception]]] = {
        "w": (int, errors.ShapeMismatchError),
        "n": (str, errors.DtypeMismatchError),
        "step": (bytes, errors.DtypeMismatchError),
        "name": (int, errors.DtypeMismatchError),
    }
    for key, (leaf, error) in cases.items():
        with pytest.raises(error) as caught:
            ocp.load(checkpoint, dict.fromkeys(STATE, ...) | {key: leaf})
        assert isinstance(caught.value, errors.LeafError)
        assert caught.value.keypath == f"['{key}']"


def test_keys_of_another_implementation(tmp_path: Path) -> None:
    """PRNG keys are never taken for keys of another implementation."""
    ocp.save(tmp_path / "checkpoint", {"key": jax.random.key(0, impl="threefry2x32")})
    other = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    with pytest.raises((errors.ShapeMismatchError, errors.DtypeMismatchError)) as caught:
        ocp.load(tmp_path / "checkpoint", {"key": other})
    assert caught.value.keypath == "['key']"


# Options.


def test_an_option_without_effect_starts_nothing(tmp_path: Path) -> None:
    """An option without effect is refused by its path, before anything is written."""
    context = ocp.Context()
    context.pathways.checkpointing_impl = ocp.options.CheckpointingImpl.PERSISTENCE
    context.safetensors.ignore_load_sharding = True
    with context, pytest.raises(errors.UnsupportedOptionError) as caught:
        ocp.save_async(tmp_path / "checkpoint", STATE)
    assert isinstance(caught.value, NotImplementedError)
    assert "pathways.checkpointing_impl" in str(caught.value)
    assert "safetensors.ignore_load_sharding" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_process_that_is_not_there(tmp_path: Path) -> None:
    """W32: a primary host that does not exist is an error at once, and no wait of minutes."""
    context = ocp.Context()
    context.multiprocessing.primary_host = 3
    with context, pytest.raises(errors.MultihostError, match="primary_host is 3"):
        ocp.save_async(tmp_path / "checkpoint", STATE)
    context = ocp.Context()
    context.multiprocessing.active_processes = {1, 2}
    with context, pytest.raises(errors.MultihostError, match=r"process 0 is not in"):
        ocp.save_async(tmp_path / "checkpoint", STATE)
    assert os.listdir(tmp_path) == []


# The limits of what is accepted.


def test_the_widest_values_that_are_accepted(tmp_path: Path) -> None:
    """The neighbours of what is refused come back as they were."""
    state = {
        "ints": [2**64 - 1, 2**63, -(2**63), 0],
        "floats": [float("inf"), -float("inf"), sys.float_info.max, 5e-324],
        "text": ["", "\n\"'\\", "\u00fc\U0001f600", "a" * 100_000],
        "unmasked": np.ma.masked_array([1, 2]),
        "narrow": np.arange(4).astype(ml_dtypes.int4),
    }
    ocp.save(tmp_path / "checkpoint", state)
    loaded = ocp.load(tmp_path / "checkpoint")
    assert loaded["ints"] == state["ints"]
    assert loaded["floats"] == state["floats"]
    assert loaded["text"] == state["text"]
    assert loaded["unmasked"].tolist() == [1, 2]
    assert loaded["narrow"].dtype == ml_dtypes.int4


def test_a_handler_validates_without_saving_or_loading() -> None:
    """Both checks of `PyTreeHandler` pass good trees and name the leaf of bad ones."""
    handler = ocp.handlers.PyTreeHandler()
    handler.validate_leaves_handleable({"a": np.ones(2), "b": "text"})
    handler.validate_abstract_leaves_handleable({"a": np.ndarray, "b": str, "c": ...})
    with pytest.raises(errors.UnsupportedLeafError, match=r"\['bad'\]"):
        handler.validate_leaves_handleable({"bad": object()})
    with pytest.raises(errors.AbstractLeafError, match=r"\['bad'\]"):
        handler.validate_abstract_leaves_handleable({"bad": object()})
