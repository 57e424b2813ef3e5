"""Bad input: one clear error, before any work, that harms neither checkpoint nor engine."""

from __future__ import annotations

import datetime
import decimal
import enum
import os
import pathlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import refusals
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from refusals import STATE, snapshot
from watched_directory import instead, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.local import opened_by

checkpoint = refusals.checkpoint
the_engine_goes_on = refusals.the_engine_goes_on


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


def test_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    """It is refused by the call, which names the directory and says what to do."""
    unwritable = instead(on("is_writable", path=str(tmp_path)), False)
    with (
        opened_by(watched(unwritable)),
        pytest.raises(errors.CommitError, match=r"not writable.*permissions") as caught,
    ):
        ocp.save_async(tmp_path / "a" / "checkpoint", STATE)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []


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
