"""Storage that fails while it is read or deleted: every call of it, with every verb (F23)."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from watched_directory import Call, Fault, Log, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.local import opened_by

VERBS: dict[str, Callable[[Path], Any]] = {
    "load": ocp.load,
    "load_checkpointables": ocp.load_checkpointables,
    "metadata": ocp.metadata,
    "checkpointables_metadata": ocp.checkpointables_metadata,
    "verify": ocp.verify,
    "delete": ocp.delete,
    "delete one": lambda path: ocp.delete(path, checkpointable_name="other"),
}


def may_fail(call: Call) -> bool:
    """Says whether a call asks the storage for anything."""
    return call.verb != "kvstore"


def save(path: Path, **options: Any) -> None:
    """Saves two trees with leaves of all kinds, and their documents."""
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    state = {"a": jnp.arange(6.0), "b": np.arange(1000), "n": 3, "s": "text"}
    with context:
        ocp.save_checkpointables(path, {"state": state, "other": {"k": np.arange(3, dtype="u4")}})


@pytest.mark.leaves_temporaries
@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("verb", VERBS)
def test_every_failure_is_an_error_of_ours(verb: str, use_ocdbt: bool, tmp_path: Path) -> None:
    """F23: it names a path and the cause, which hangs on it; nothing untyped comes through."""
    save(tmp_path / "whole", use_ocdbt=use_ocdbt)
    path = tmp_path / "c"
    shutil.copytree(tmp_path / "whole", path)
    with opened_by(watched(log := Log())):
        VERBS[verb](path)
    calls = [call for call in log.calls if may_fail(call)]
    assert calls
    for nth in range(1, len(calls) + 1):
        if verb.startswith("delete"):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(tmp_path / "whole", path)
        fault = Fault([errno.EACCES, errno.EIO][nth % 2], may_fail, nth=nth)
        with opened_by(watched(fault)):
            try:
                found = VERBS[verb](path)
            except errors.CheckpointError as error:
                assert str(path) in errors.with_notes(error), nth
                assert isinstance(error, OSError), (nth, error)
                assert isinstance(error.__cause__, OSError), (nth, error)
            else:  # what failed was not needed, or is in the report
                if verb == "verify" and not found.is_intact:
                    assert str(path) in str(found)
    if not verb.startswith("delete"):
        assert ocp.verify(path).is_intact
        assert ocp.load(path)["n"] == 3


@pytest.mark.parametrize("verb", ["load", "metadata", "verify"])
def test_files_of_tensors_fail_alike(verb: str, tmp_path: Path) -> None:
    """F23: each call of the layout of safetensors files."""
    save_file({"w": np.arange(4)}, tmp_path / "m.safetensors")
    with ocp.Context(checkpoint_layout="safetensors"):
        with opened_by(watched(log := Log())):
            VERBS[verb](tmp_path)
        for nth in range(1, len(log.calls) + 1):
            with opened_by(watched(Fault(errno.EIO, may_fail, nth=nth))):
                try:
                    found = VERBS[verb](tmp_path)
                except errors.CheckpointError as error:
                    assert isinstance(error, OSError), (nth, error)
                    assert str(tmp_path) in str(error)
                else:
                    assert verb != "verify" or found.is_intact or str(tmp_path) in str(found)


def test_what_can_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    """F34: the hint of a file that may not be read says so, and not that it is to be copied."""
    save(tmp_path / "c")
    document = tmp_path / "c" / "state" / "_sharding"
    with opened_by(watched(Fault(errno.EACCES, lambda call: call.path == str(document)))):
        (found,) = ocp.verify(tmp_path / "c").damage
    assert (found.path, found.checkpointable) == (str(document), "state")
    assert "Permission denied" in found.problem
    assert "may read it" in f"{found.problem} {found.hint}"
    assert "Copy" not in found.hint
