"""Partial saves that die, or whose file system fails: no part is lost (I4, I5)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listing import comes_to_hold
from parts import BOTH, FIRST, SECOND, another, check, gathered, storing
from watched_directory import CHANGES, Call, Fault, Log, on, watched

import orbax_async as ocp
from orbax_async import errors, partial
from orbax_async._commit import leftovers, sessions
from orbax_async._storage import local
from orbax_async._storage.directory import Capability
from orbax_async._storage.local import LocalDirectory, opened_by

stores = pytest.mark.parametrize("use_ocdbt", [True, False])


def snapshots(folder: Path, action: Callable[[], None]) -> list[Path]:
    """Copies what is on disk before the first and after each change of it, as a kill leaves it."""
    taken: list[Path] = []

    def copy() -> None:
        taken.append(folder / "snapshots" / str(len(taken)))
        shutil.copytree(folder / "run", taken[-1])

    def watcher(call: Call, proceed: Callable[[], Any]) -> Any:
        result = proceed()
        if call.verb in CHANGES:
            copy()
        return result

    copy()
    with opened_by(watched(watcher)):
        action()
    return taken


def loaded_after_a_crash(path: Path) -> Any:
    """Finalizes what a dead process has left, if it is not, and loads it."""
    if not path.exists():
        with pytest.raises(errors.InvalidLayoutError):
            ocp.load(path)
        partial.finalize(path)
    assert ocp.verify(path).is_intact
    return ocp.load(path)


@stores
@pytest.mark.leaves_temporaries
def test_i4_a_part_is_there_or_not_whenever_its_save_dies(use_ocdbt: bool, tmp_path: Path) -> None:
    """I4: at each point of a partial save the earlier parts are whole, and it is all or nothing."""
    with storing(use_ocdbt):
        partial.save(tmp_path / "run" / "c", FIRST)
        taken = snapshots(tmp_path, lambda: partial.save(tmp_path / "run" / "c", SECOND))
        found = [len(loaded_after_a_crash(each / "c")) for each in taken]
    before, after = len(FIRST), len(BOTH)
    assert len(taken) > 5 and set(found) == {before, after} and found == sorted(found)
    for each in taken:
        check(ocp.load(each / "c"), FIRST if len(ocp.load(each / "c")) == before else BOTH)


@stores
@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.leaves_temporaries
def test_i4_no_part_is_lost_whenever_a_finalization_dies(
    use_ocdbt: bool, can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: at each point of `finalize` there is the checkpoint, or parts that can be finalized."""
    if not can_exchange:
        monkeypatch.setattr(local, "_renameat2", lambda: None)
    with storing(use_ocdbt):
        partial.save(tmp_path / "run" / "c", FIRST)
        partial.save(tmp_path / "run" / "c", SECOND)
        taken = snapshots(tmp_path, lambda: partial.finalize(tmp_path / "run" / "c"))
        finished = [(each / "c").exists() for each in taken]
        assert len(taken) > 8 and finished == sorted(finished) and len(set(finished)) == 2
        for each in taken:
            check(loaded_after_a_crash(each / "c"), BOTH)
            leftovers.sweep(str(each))
            comes_to_hold(each, "c")  # the sweep after the finalization may be at it, too


@pytest.mark.leaves_temporaries
def test_i4_a_dead_finalization_can_be_added_to(tmp_path: Path) -> None:
    """I4: what a finalization has left takes new parts, and refuses those that it has."""
    partial.save(tmp_path / "run" / "c", FIRST)
    taken = snapshots(tmp_path, lambda: partial.finalize(tmp_path / "run" / "c"))
    unfinished = [each / "c" for each in taken if not (each / "c").exists()]
    assert any(
        not gathered(path) or (path.parent / "c.partial_save/state").exists() for path in unfinished
    )
    for path in unfinished:
        with pytest.raises(errors.PartialSaveReplacementError):
            partial.save(path, {"a": 0})
        partial.save(path, SECOND)
        check(loaded_after_a_crash(path), BOTH)


KILLED = """
import os, signal, sys
import numpy as np
import orbax_async as ocp
from orbax_async._storage.local import opened_by
from watched_directory import before, on, watched

path, point = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
moments = {
    "writing": on("sync"),
    "adding": lambda call: call.verb == "sync" and call.path == os.path.dirname(path),
    "linking": on("link"),
    "between": on("rename", path=path),
    "finished": on("remove"),
}
with opened_by(watched(before(moments[point], die))):
    if point in ("writing", "adding"):
        ocp.partial.save(path, {"b": np.arange(3.0)})
    ocp.partial.finalize(path)
"""


@pytest.mark.parametrize("point", ["writing", "adding", "linking", "between", "finished"])
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_process_loses_nothing_and_is_in_nobody_s_way(point: str, tmp_path: Path) -> None:
    """Killed in a partial save or a finalization: the parts go on, and the rest is swept."""
    path = tmp_path / "c"
    partial.save(path, {"a": np.arange(4)})
    child = another(path, point, code=KILLED)
    child.communicate(timeout=100)
    assert child.returncode == -signal.SIGKILL
    expected: dict[str, Any] = {"a": np.arange(4)}
    if point == "adding":
        expected["b"] = np.arange(3.0)
    if point != "finished":
        assert not path.exists()
        partial.save(path, {"late": 1})
        partial.finalize(path)
        expected["late"] = 1
    check(ocp.load(path), expected)
    ocp.save(tmp_path / "next", {"x": 1})  # its sweep is looked for by the watcher of leftovers
    for _ in range(500):
        if sorted(os.listdir(tmp_path)) == ["c", "next"]:
            break
        threading.Event().wait(0.01)
    assert sorted(os.listdir(tmp_path)) == ["c", "next"]


def test_i5_a_part_is_durable_before_it_counts(tmp_path: Path) -> None:
    """I5: what is in a part is synced before its rename, and the names above it after that."""
    with opened_by(watched(log := Log())):
        partial.save(tmp_path / "c", FIRST)
    part = gathered(tmp_path / "c")[0]
    (added,) = log.of("rename")
    assert added.target == str(part)
    at = log.calls.index(added)
    synced = [call.path for call in log.calls[:at] if call.verb == "sync"]
    assert set(synced) == {
        added.path + str(each)[len(str(part)) :] for each in (part, *part.rglob("*"))
    }
    after = [call.path for call in log.calls[at:] if call.verb == "sync"]
    assert after == [str(tmp_path / "c.partial_save"), str(tmp_path)]


def test_a_part_that_can_not_be_added_is_removed(tmp_path: Path) -> None:
    """A sync that fails after the rename takes the part back; the others stay."""
    partial.save(tmp_path / "c", FIRST)
    fault = Fault(errno.EIO, on("sync", path=str(tmp_path / "c.partial_save")), times=None)
    with opened_by(watched(fault)), pytest.raises(errors.CommitError, match="cannot add to"):
        partial.save(tmp_path / "c", SECOND)
    assert len(gathered(tmp_path / "c")) == 1
    partial.finalize(tmp_path / "c")
    check(ocp.load(tmp_path / "c"), FIRST)


def test_files_that_can_not_be_linked_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems without second names get copies; the parts go away all the same."""

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    partial.save(tmp_path / "c", FIRST)
    partial.save(tmp_path / "c", SECOND)
    partial.finalize(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    check(ocp.load(tmp_path / "c"), BOTH)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_finalization_that_fails_leaves_the_parts(can_exchange: bool, tmp_path: Path) -> None:
    """B14.7: when the last rename fails, the parts are as they were."""
    lacking = [] if can_exchange else [Capability.EXCHANGE]
    path = tmp_path / "c"
    partial.save(path, FIRST)
    before = gathered(path)
    fault = Fault(errno.ENOSPC, on("rename", path=str(path)))
    watching = watched(fault, lacking=lacking)
    with opened_by(watching), pytest.raises(errors.CommitError, match="No space left"):
        partial.finalize(path)
    assert gathered(path) == before and os.listdir(tmp_path) == ["c.partial_save"]
    partial.finalize(path)
    check(ocp.load(path), FIRST)


# F3: whatever fails, the next one need not wait.

FAILING = {
    verb: on(verb)
    for verb in ("make", "write", "sync", "rename", "exchange", "link", "lock", "walk")
}


@pytest.mark.parametrize("verb", ["save", "finalize"])
@pytest.mark.parametrize("failing", FAILING.values(), ids=FAILING)
@pytest.mark.leaves_temporaries
def test_f3_a_partial_save_that_fails_holds_nothing(
    failing: Callable[[Call], bool], verb: str, tmp_path: Path
) -> None:
    """Whichever call fails, and with it what would clean up: the parts are as they were."""
    path = tmp_path / "c"
    for nth in itertools.count(1):
        partial.save(path, FIRST)
        cleaning = Fault(errno.EPERM, on("remove"), times=None)
        with opened_by(watched(Fault(errno.EIO, failing, nth=nth), cleaning)):
            try:
                partial.save(path, SECOND) if verb == "save" else partial.finalize(path)
            except errors.CommitError:
                is_failed = True
            else:
                is_failed = False
        if not path.exists():
            partial.finalize(path)
        check(ocp.load(path), BOTH if verb == "save" and not is_failed else FIRST)
        ocp.delete(path)
        if not is_failed:
            break


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("failures", [2, 3, 9])
@pytest.mark.leaves_temporaries
def test_f26_a_finalization_that_fails_several_times_loses_no_part(
    failures: int, can_exchange: bool, tmp_path: Path
) -> None:
    """Names can't be changed, nor changed back: what lies there then is swept, and finalized."""
    lacking = [] if can_exchange else [Capability.EXCHANGE]
    path = tmp_path / "c"
    for nth in itertools.count(1):
        partial.save(path, FIRST)
        partial.save(path, SECOND)
        fault = Fault(errno.EIO, on("rename", "exchange"), nth=nth, times=failures)
        with opened_by(watched(fault, lacking=lacking)), contextlib.suppress(errors.CommitError):
            partial.finalize(path)
        has_failed = fault.left != failures
        leftovers.sweep(str(tmp_path))
        if not path.exists():
            partial.finalize(path)
        check(ocp.load(path), BOTH)
        ocp.delete(path)
        if not has_failed:
            break
    assert nth > 2


def test_f3_a_finalization_whose_clean_up_fails_holds_nothing(tmp_path: Path) -> None:
    """A stray directory is refused, and what was written can't be removed: it can be repeated."""
    path = tmp_path / "c"
    partial.save(path, FIRST)
    (tmp_path / "c.partial_save" / "stray").mkdir()
    refused = pytest.raises(errors.PartialSaveError, match="stray")
    with opened_by(watched(Fault(errno.EPERM, on("remove"), times=None))), refused:
        partial.finalize(path)
    (tmp_path / "c.partial_save" / "stray").rmdir()
    partial.save(path, SECOND)
    partial.finalize(path)
    check(ocp.load(path), BOTH)
    comes_to_hold(tmp_path, "c")


def test_parts_stay_in_order_when_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later metadata is right even if the system's time has been set back."""
    path = tmp_path / "c"
    partial.save(path, {"a": 1}, custom_metadata={"which": "first"})
    monkeypatch.setattr(sessions.time, "time_ns", lambda: 1)
    partial.save(path, {"b": 1}, custom_metadata={"which": "second"})
    partial.finalize(path)
    assert ocp.metadata(path).custom_metadata == {"which": "second"}


def test_a_number_in_the_path_is_no_time() -> None:
    """What a dead finalization has left bears no time, whatever its folder is called."""
    for path, nsecs in (
        ("/runs_99999999999999999999_x/c.partial_save", 0),
        ("/a_9_b/c.partial_save/c.partial_save.pending_7_0", 7),
    ):
        assert sessions._nsecs(LocalDirectory(path)) == nsecs
