"""The public names: each says what it is, and both doors of a verb are alike."""

from __future__ import annotations

import concurrent.futures
import errno
import importlib
import inspect
import operator
import pickle
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1

import orbax_async as ocp
from orbax_async import errors


@pytest.mark.parametrize(
    "verb",
    [
        *("save", "load", "save_checkpointables", "load_checkpointables", "delete"),
        *("partial.save", "partial.finalize"),
    ],
)
def test_both_doors_of_a_verb_take_the_same(verb: str) -> None:
    """`save` and `save_async`, and so on, differ in nothing but what they return."""
    blocking = inspect.signature(operator.attrgetter(verb)(ocp)).parameters
    awaitable = inspect.signature(operator.attrgetter(f"{verb}_async")(ocp)).parameters
    assert list(blocking.values()) == list(awaitable.values())


def test_checkpoint_metadata_is_that_of_orbax() -> None:
    """Its properties are read-only, and it is subscriptable."""
    found = ocp.CheckpointMetadata[dict](epath.Path("/x"), metadata={"a": 1})
    for name, value in vars(v1.CheckpointMetadata).items():
        if isinstance(value, property):
            before = getattr(found, name)
            with pytest.raises(AttributeError):
                setattr(found, name, {})
            assert getattr(found, name) is before
    assert found.commit_timestamp is None


def test_the_placeholder_is_the_ellipsis() -> None:
    """`PLACEHOLDER` is `...` in both libraries."""
    assert ocp.PLACEHOLDER is v1.PLACEHOLDER is ...


# Errors.

# What Orbax raises in the same place, so that `except` clauses keep working.
BUILTINS = {
    "AbstractLeafError": TypeError,
    "BarrierTimeoutError": TimeoutError,
    "ClosedError": RuntimeError,
    "CommitError": OSError,
    "CorruptDataError": OSError,
    "DeletionInProgressError": RuntimeError,
    "DeletionRecoveryError": (ValueError, RuntimeError),
    "DestinationExistsError": (ValueError, FileExistsError),
    "DtypeMismatchError": ValueError,
    "DuplicateLeafError": ValueError,
    "HandlerError": (TypeError, ValueError),
    "InvalidLayoutError": ValueError,
    "LoopError": RuntimeError,
    "MissingAbstractError": ValueError,
    "MultihostError": RuntimeError,
    "NotACheckpointError": (ValueError, NotADirectoryError),
    "NoPartialSaveError": FileNotFoundError,
    "NotJsonError": (TypeError, ValueError),
    "NothingToDeleteError": FileNotFoundError,
    "OperationCancelledError": concurrent.futures.CancelledError,
    "OperationTimeoutError": TimeoutError,
    "PartialSaveError": (),
    "PartialSaveReplacementError": errors.PartialSaveError,
    "ReadError": OSError,
    "SaveInProgressError": ValueError,
    "ShapeMismatchError": ValueError,
    "ShardingMismatchError": ValueError,
    "StagingError": RuntimeError,
    "StepAlreadyExistsError": (ValueError, FileExistsError),
    "StepNotFoundError": (ValueError, FileNotFoundError),
    "TreeMismatchError": ValueError,
    "UnknownCheckpointableError": KeyError,
    "UnknownTensorError": (ValueError, KeyError),
    "UnreadableError": (ValueError, OSError),
    "UnsupportedLeafError": ValueError,
    "UnsupportedOptionError": NotImplementedError,
    "WriteError": OSError,
}


def test_errors_are_one_tree_with_the_builtins_of_orbax() -> None:
    """Every error is a CheckpointError, and the builtin that Orbax raises in its place."""
    classes = {
        name: each
        for name, each in vars(errors).items()
        if inspect.isclass(each) and issubclass(each, BaseException)
    }
    for name, each in classes.items():
        assert issubclass(each, errors.CheckpointError), name
        expected = BUILTINS.get(name, ())
        for builtin in expected if isinstance(expected, tuple) else (expected,):
            assert issubclass(each, builtin), name
        assert issubclass(each, Exception)
    assert classes.keys() == BUILTINS.keys() | {"CheckpointError", "LeafError"}
    assert issubclass(errors.InvalidLayoutError, v1.errors.InvalidLayoutError.__bases__)


def test_the_docstring_draws_the_tree_of_errors() -> None:
    """The drawing at the top of the module has every class, below its own parent."""
    assert errors.__doc__ is not None
    drawn: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        words = line.split()
        if not words or not (words[0].endswith("Error")) or not line.startswith("    "):
            continue
        indent = len(line) - len(line.lstrip())
        above = [each for each in above if each[0] < indent]
        drawn[words[0]] = above[-1][1] if above else None
        above.append((indent, words[0]))
    for name, parent in drawn.items():
        each = getattr(errors, name)
        assert each.__bases__[0].__name__ == (parent or "Exception"), name
    assert drawn.keys() == BUILTINS.keys() | {"CheckpointError", "LeafError"}


def test_leaf_errors_carry_their_key_path() -> None:
    """I9: the message begins with the key path, a bare leaf is the root, and the rest is there."""
    error = errors.WriteError("['a'][0]", "no room")
    assert (error.keypath, str(error), error.others) == ("['a'][0]", "leaf ['a'][0]: no room", ())
    assert str(errors.ReadError("", "gone")) == "leaf <root>: gone"


def test_a_group_of_errors_becomes_the_first_leaf_error() -> None:
    """No exception group reaches a caller; the other leaves hang on the first."""
    first, second = errors.WriteError("a", "1"), errors.ReadError("b", "2")
    group = ExceptionGroup("all", [OSError("x"), ExceptionGroup("inner", [first, second])])
    with pytest.raises(errors.WriteError) as caught, errors.ungrouped():
        raise group
    assert caught.value is first
    assert first.others == (second,)
    with pytest.raises(OSError, match="alone"), errors.ungrouped():
        raise ExceptionGroup("all", [OSError("alone")])


def test_an_os_error_is_reported_as_one_of_ours() -> None:
    """The message names the problem, the cause, the file once, and what to do; ours pass."""
    reported_as = errors.reported_as
    with (
        pytest.raises(errors.CommitError) as caught,
        reported_as(errors.CommitError, "cannot publish /run/5", "Make room."),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/run/5.tmp/d/0")
    assert str(caught.value) == (
        "cannot publish /run/5: No space left on device (/run/5.tmp/d/0). Make room."
    )
    assert isinstance(caught.value.__cause__, OSError)
    for raised, message in {
        OSError(
            errno.EACCES, "Permission denied", "/run/5"
        ): "cannot open /run/5: Permission denied",
        OSError("as it is"): "cannot open /run/5: as it is",
    }.items():
        with (
            pytest.raises(errors.InvalidLayoutError, match=f"^{message}$"),
            reported_as(errors.InvalidLayoutError, "cannot open /run/5"),
        ):
            raise raised
    own = errors.DestinationExistsError("there already")
    with (
        pytest.raises(errors.DestinationExistsError) as caught_own,
        reported_as(errors.CommitError, "cannot publish"),
    ):
        raise own
    assert caught_own.value is own


# Documentation.


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yields each public name of the public modules, and the public members of classes."""
    modules = [ocp] + [
        importlib.import_module(f"orbax_async.{found.name}")
        for found in pkgutil.iter_modules(ocp.__path__)
        if not found.name.startswith("_")
    ]
    for module in modules:
        yield module.__name__, module
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("numpy"):
                continue  # documented elsewhere
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            if not inspect.isclass(value) or not value.__module__.startswith("orbax_async"):
                continue
            for member, inner in vars(value).items():
                is_callable = inspect.isfunction(inner) or isinstance(
                    inner, (property, classmethod)
                )
                if is_callable and not member.startswith("_"):
                    yield f"{module.__name__}.{name}.{member}", inner


PUBLIC = dict(public_objects())


def test_every_public_object_was_found() -> None:
    """The walk above reaches functions, classes, methods and properties."""
    assert {
        "orbax_async.save",
        "orbax_async.AsyncResponse.cancel",
        "orbax_async.AsyncResponse.progress",
        "orbax_async.errors.LeafError",
        "orbax_async.options.MemoryOptions",
    } <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_object_has_a_docstring(name: str) -> None:
    """Each begins with one full sentence on a line of its own."""
    value = PUBLIC[name]
    value = getattr(value, "__func__", value)
    text = value.__doc__
    assert text, name
    first = text.strip().split("\n\n")[0]
    assert first.endswith((".", "::")), first
    assert not text.startswith(f"{name.rsplit('.', 1)[-1]}("), "a generated docstring"


def test_metadata_describes_a_checkpoint(tmp_path: Path) -> None:
    """B7.6: times are integers in order, as UTC datetimes too; custom metadata is a dict."""
    ocp.save(tmp_path / "one", {"a": np.arange(3)})
    found = ocp.metadata(tmp_path / "one", "state")
    assert found.custom_metadata == {}
    assert found.path == epath.Path(tmp_path / "one")
    assert isinstance(found.init_timestamp_nsecs, int)
    assert isinstance(found.commit_timestamp_nsecs, int)
    assert found.init_timestamp_nsecs < found.commit_timestamp_nsecs
    assert found.commit_timestamp is not None
    assert found.commit_timestamp.utcoffset() is not None
    assert found.commit_timestamp.timestamp() == pytest.approx(found.commit_timestamp_nsecs / 1e9)
    ocp.save(tmp_path / "two", {"a": 1}, custom_metadata={"run": [1, {"x": None}], "t": (1, 2)})
    assert ocp.metadata(tmp_path / "two").custom_metadata == {"run": [1, {"x": None}], "t": [1, 2]}
    assert str(tmp_path / "one") in repr(found)


def test_metadata_is_an_abstract_tree(tmp_path: Path) -> None:
    """B3.32: what `metadata` returns loads the checkpoint, whole or as its tree."""
    state = {"a": np.arange(3), "b": [1.5, "text", None, {}], "c": True}
    ocp.save(tmp_path / "checkpoint", state)
    found = ocp.metadata(tmp_path / "checkpoint")
    for abstract in (found, found.metadata, ocp.CheckpointMetadata("x", metadata=found.metadata)):
        loaded = ocp.load(tmp_path / "checkpoint", abstract)
        assert loaded["a"].tolist() == [0, 1, 2]
        assert loaded["b"] == state["b"]
        assert loaded["c"] is True


def test_errors_can_be_pickled() -> None:
    """An error crosses a process boundary with what it says."""
    for error in (
        errors.InvalidLayoutError("text"),
        errors.WriteError("['a']", "no room"),
        errors.TreeMismatchError("text", ("one", "two")),
        errors.BarrierTimeoutError("text", (1, 2)),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
