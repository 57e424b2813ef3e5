"""Storage that fails in a save: each call of each verb ends well, or as an error of ours (F23).

`tests/api/test_unreadable.py` does the same with the verbs that read and delete.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from watched_directory import Call, Fault, Log, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.local import opened_by

OLD: dict[str, Any] = {"a": jnp.arange(4.0), "n": 1, "s": "old"}
NEW: dict[str, Any] = {"a": jnp.arange(6.0), "b": np.arange(1000), "n": 2, "s": "new"}
CODES = (errno.EACCES, errno.EIO, errno.ENOSPC, errno.EMFILE)


class Sweep(NamedTuple):
    """One verb, how its path is prepared, and whether what it has made is whole."""

    act: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda path: None
    in_place: bool = False


def save_old(path: Path) -> None:
    """Saves the checkpoint that a verb replaces."""
    ocp.save(path, OLD)


def save_several(path: Path) -> None:
    """Saves a state and something else."""
    ocp.save_checkpointables(path, {"state": NEW, "config": {"rate": 0.1}})


def save_part(path: Path) -> None:
    """Saves the rest of the state."""
    ocp.partial.save(path, {"n": 2, "s": "new"})


def save_first_part(path: Path) -> None:
    """Saves a part of the state."""
    ocp.partial.save(path, {"a": NEW["a"], "b": NEW["b"]})


def save_both_parts(path: Path) -> None:
    """Saves all that is then finalized."""
    save_first_part(path)
    save_part(path)


def overwrite(path: Path) -> None:
    """Saves in place of what is there."""
    ocp.save(path, NEW, overwrite=True)


SWEEPS = {
    "save": Sweep(lambda path: ocp.save(path, NEW)),
    "save several": Sweep(save_several),
    "overwrite": Sweep(overwrite, save_old),
    "save in place": Sweep(lambda path: ocp.save(path, NEW), in_place=True),
    "overwrite in place": Sweep(overwrite, save_old, in_place=True),
    "save a part": Sweep(save_first_part),
    "save another part": Sweep(save_part, save_first_part),
    "finalize": Sweep(ocp.partial.finalize, save_both_parts),
}


def may_fail(call: Call) -> bool:
    """Says whether a call asks the storage for anything."""
    return call.verb != "kvstore"


def whole(path: Path) -> str | None:
    """Says which of the two states lies at a path; None for nothing."""
    if not path.exists():
        return None
    assert ocp.verify(path).is_intact
    found = ocp.load(path)
    wanted = NEW if found["s"] == "new" else OLD
    assert np.array_equal(found["a"], wanted["a"])
    assert found["n"] == wanted["n"]
    return str(found["s"])


@pytest.mark.leaves_temporaries
@pytest.mark.parametrize("name", SWEEPS)
def test_a_save_that_fails_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    """F23, I4: it names a path and the cause; the old checkpoint stays, and the next verb works."""
    sweep = SWEEPS[name]
    context = ocp.Context()
    context.atomicity.mode = "commit_file" if sweep.in_place else "auto"
    with context:
        sweep.prepare(tmp_path / "first" / "c")
        with opened_by(watched(log := Log())):
            sweep.act(tmp_path / "first" / "c")
        count = len([call for call in log.calls if may_fail(call)])
        assert count > 5
        for nth in range(1, count + 1):
            check_one(sweep, tmp_path / str(nth) / "c", nth, name)


def check_one(sweep: Sweep, path: Path, nth: int, name: str) -> None:
    """Has one call fail, and looks at what is told and at what is left."""
    sweep.prepare(path)
    before = whole(path)
    code = CODES[nth % len(CODES)]
    failure: BaseException | None = None
    with opened_by(watched(Fault(code, may_fail, nth=nth))):
        try:
            sweep.act(path)
        except Exception as error:
            failure = error
    case = f"{name}: {errno.errorcode[code]} at call {nth}: {failure!r}"
    if failure is not None:
        assert isinstance(failure, errors.CheckpointError), case
        told = errors.with_notes(failure)
        assert str(path.parent) in told, case
        assert os.strerror(code) in told, case
    after = whole(path)
    if failure is not None:
        assert after in (before, "new"), case
    if failure is not None and after == before:
        sweep.act(path)
    if "part" in name:
        if name == "save a part":
            save_part(path)
        ocp.partial.finalize(path)
    assert whole(path) == "new", case
    overwrite(path)
    assert sorted(os.listdir(path.parent)) == ["c"], case
    shutil.rmtree(path.parent)
