"""Partial saves that die, or whose file system fails: no part is lost (I4, I5)."""

from __future__ import annotations

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
from parts import BOTH, FIRST, SECOND, another, check, gathered, storing

import orbax_async as ocp
from orbax_async import errors, partial
from orbax_async._commit import atomicity, session
from orbax_async._storage import files

stores = pytest.mark.parametrize("use_ocdbt", [True, False])

Snapshots = Callable[[Callable[[], None]], list[Path]]


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    """Copies what is on disk before the first and after each change of it, as a kill leaves it."""

    def take(action: Callable[[], None]) -> list[Path]:
        taken: list[Path] = []

        def copy() -> None:
            taken.append(tmp_path / "snapshots" / str(len(taken)))
            shutil.copytree(tmp_path / "run", taken[-1])

        def recording(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)
                copy()
                return result

            return called

        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "rename"),
                (os, "link"),
                (atomicity, "_exchange"),
                (files, "write_bytes"),
                (os, "unlink"),
            ):
                patch.setattr(owner, name, recording(getattr(owner, name)))
            copy()
            action()
        return taken

    return take


def loaded_after_a_crash(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Finalizes what a dead process has left, if it is not, and loads it."""
    with monkeypatch.context() as patch:
        patch.setattr(atomicity, "_is_abandoned", lambda *_: True)
        if not path.exists():
            with pytest.raises(errors.InvalidLayoutError):
                ocp.load(path)
            partial.finalize(path)
    assert ocp.verify(path).is_intact
    return ocp.load(path)


@stores
@pytest.mark.leaves_temporaries
def test_i4_a_part_is_there_or_not_whenever_its_save_dies(
    use_ocdbt: bool, tmp_path: Path, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: at each point of a partial save the earlier parts are whole, and it is all or nothing."""
    with storing(use_ocdbt):
        partial.save(tmp_path / "run" / "c", FIRST)
        taken = snapshots(lambda: partial.save(tmp_path / "run" / "c", SECOND))
        found = [len(loaded_after_a_crash(each / "c", monkeypatch)) for each in taken]
    before, after = len(FIRST), len(BOTH)
    assert len(taken) > 5 and set(found) == {before, after} and found == sorted(found)
    for each in taken:
        check(ocp.load(each / "c"), FIRST if len(ocp.load(each / "c")) == before else BOTH)


@stores
@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.leaves_temporaries
def test_i4_no_part_is_lost_whenever_a_finalization_dies(
    use_ocdbt: bool,
    can_exchange: bool,
    tmp_path: Path,
    snapshots: Snapshots,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """I4: at each point of `finalize` there is the checkpoint, or parts that can be finalized."""
    if not can_exchange:
        monkeypatch.setattr(atomicity, "_exchange", lambda *_: False)
    with storing(use_ocdbt):
        partial.save(tmp_path / "run" / "c", FIRST)
        partial.save(tmp_path / "run" / "c", SECOND)
        taken = snapshots(lambda: partial.finalize(tmp_path / "run" / "c"))
        finished = [(each / "c").exists() for each in taken]
        assert len(taken) > 8 and finished == sorted(finished) and len(set(finished)) == 2
        for each in taken:
            check(loaded_after_a_crash(each / "c", monkeypatch), BOTH)
            with monkeypatch.context() as patch:
                patch.setattr(atomicity, "_is_abandoned", lambda *_: True)
                atomicity.sweep(str(each))
            assert os.listdir(each) == ["c"]


@pytest.mark.leaves_temporaries
def test_i4_a_dead_finalization_can_be_added_to(
    tmp_path: Path, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: what a finalization has left takes new parts, and refuses those that it has."""
    partial.save(tmp_path / "run" / "c", FIRST)
    taken = snapshots(lambda: partial.finalize(tmp_path / "run" / "c"))
    unfinished = [each / "c" for each in taken if not (each / "c").exists()]
    assert any(
        not gathered(path) or (path.parent / "c.partial_save/state").exists() for path in unfinished
    )
    for path in unfinished:
        with monkeypatch.context() as patch:
            patch.setattr(atomicity, "_is_abandoned", lambda *_: True)
            with pytest.raises(errors.PartialSaveReplacementError):
                partial.save(path, {"a": 0})
            partial.save(path, SECOND)
        check(loaded_after_a_crash(path, monkeypatch), BOTH)


KILLED = """
import os, signal, sys
import numpy as np
import orbax_async as ocp
from orbax_async._commit import atomicity, session
from orbax_async._storage import files

path, point = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if point == "writing":
    files.walk = die
    ocp.partial.save(path, {"b": np.arange(3.0)})
elif point == "adding":
    session.Session.release = die
    ocp.partial.save(path, {"b": np.arange(3.0)})
elif point == "linking":
    os.link = die
elif point == "between":
    find = session.find_additions
    session.find_additions = lambda each: die() if "orbax-checkpoint-tmp" in each else find(each)
elif point == "finished":
    atomicity.discard = die
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


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_i5_a_part_is_durable_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5: what is in a part is synced before its rename, and the names above it after that."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recording_rename(source: Any, target: Any) -> None:
        rename(source, target)
        if "pending" in os.path.basename(target):
            events.append("added")

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    partial.save(tmp_path / "c", FIRST)
    part = gathered(tmp_path / "c")[0]
    at = events.index("added")
    temporary = next(each for each in events if each.endswith("-new"))
    inside = {temporary + str(each)[len(str(part)) :] for each in (part, *part.rglob("*"))}
    assert set(events[:at]) == inside
    assert events[at + 1 :] == [str(tmp_path / "c.partial_save"), str(tmp_path)]


def test_a_part_that_can_not_be_added_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync that fails after the rename takes the part back; the others stay."""
    partial.save(tmp_path / "c", FIRST)

    def failing(path: str) -> None:
        raise OSError(5, "Input/output error", path)

    with monkeypatch.context() as patch:
        fsync_directory = files.fsync_directory
        is_session = str(tmp_path / "c.partial_save").__eq__
        patch.setattr(
            files,
            "fsync_directory",
            lambda path: failing(path) if is_session(path) else fsync_directory(path),
        )
        with pytest.raises(errors.CommitError, match="cannot add to"):
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


def test_a_finalization_that_fails_leaves_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B14.7: when the last rename fails, the parts are as they were."""
    path = tmp_path / "c"
    partial.save(path, FIRST)
    before = gathered(path)
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if os.fspath(target) == str(path):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(errors.CommitError, match="No space left"):
            partial.finalize(path)
    assert gathered(path) == before and os.listdir(tmp_path) == ["c.partial_save"]
    partial.finalize(path)
    check(ocp.load(path), FIRST)


def test_parts_stay_in_order_when_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later metadata is right even if the system's time has been set back."""
    path = tmp_path / "c"
    partial.save(path, {"a": 1}, custom_metadata={"which": "first"})
    monkeypatch.setattr(session.time, "time_ns", lambda: 1)
    partial.save(path, {"b": 1}, custom_metadata={"which": "second"})
    partial.finalize(path)
    assert ocp.metadata(path).custom_metadata == {"which": "second"}


def test_a_number_in_the_path_is_no_time() -> None:
    """What a dead finalization has left bears no time, whatever its folder is called."""
    assert session._nsecs("/runs_99999999999999999999_x/c.partial_save") == 0
    assert session._nsecs("/a_9_b/c.partial_save/c.partial_save.pending_7_0") == 7
