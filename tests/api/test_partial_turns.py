"""Partial saves of several tasks, threads and processes to one path (W10)."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from parts import BOTH, FIRST, SECOND, Stop, another, check, gathered
from watched_directory import Fault, before, on, watched

import orbax_async as ocp
from orbax_async import errors, partial
from orbax_async._commit import sequence, sessions
from orbax_async._storage import local
from orbax_async._storage.directory import Capability
from orbax_async._storage.local import opened_by


async def test_w10_parts_saved_by_concurrent_tasks_all_land(tmp_path: Path) -> None:
    """W10: partial saves to one path from many tasks follow one another; none is lost."""
    path = tmp_path / "c"

    async def add(number: int) -> None:
        await partial.save_async(path, {f"k{number}": np.full(100, number), "e": {}})

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(add, number)
    await partial.finalize_async(path)
    check(ocp.load(path), {f"k{i}": np.full(100, i) for i in range(8)} | {"e": {}})


def test_w10_parts_that_overlap_are_refused_one_of_two(tmp_path: Path) -> None:
    """W10: of two concurrent saves of one key the second is refused, and the first is whole."""
    path = tmp_path / "c"
    with Stop() as stop:
        stop.close()
        first = partial.save_async(path, {"k": np.zeros(1 << 18), "only": 1})
        second = partial.save_async(path, {"k": np.ones(1 << 18), "other": 2})
        third = partial.save_async(path, {"third": 3})
        finalizing = partial.finalize_async(path)
        stop.open()
    assert first.result() is None and third.result() is None
    with pytest.raises(errors.PartialSaveReplacementError, match=r"leaf \['k'\]"):
        second.result()
    finalizing.result()
    check(ocp.load(path), {"k": np.zeros(1 << 18), "only": 1, "third": 3})


def test_w10_parts_saved_by_threads_land_or_are_refused(tmp_path: Path) -> None:
    """W10: each key that several threads save has one winner, whose value is loaded."""
    path = tmp_path / "c"
    won: dict[str, int] = {}

    def add(number: int) -> None:
        for key in range(3):
            try:
                partial.save(path, {f"k{key}": number, f"own{number}_{key}": number})
                won[f"k{key}"] = won.get(f"k{key}", 0) + 100 * number + 1
            except errors.PartialSaveReplacementError:
                partial.save(path, {f"own{number}_{key}": number})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    partial.finalize(path)
    loaded = ocp.load(path)
    for key in range(3):
        assert won.pop(f"k{key}") == 100 * loaded.pop(f"k{key}") + 1
    assert loaded == {f"own{i}_{k}": i for i in range(1, 5) for k in range(3)}


fcntl = pytest.importorskip("fcntl", reason="what these tests lock with")

ANOTHER = """
import sys, orbax_async as ocp
path, number = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for key in range(12):
    ocp.partial.save(path, {f"own{number}_{key}": number})
    try:
        ocp.partial.save(path, {f"k{key}": number})
        print(f"k{key}", flush=True)
    except ocp.errors.PartialSaveReplacementError:
        pass
"""


@pytest.mark.timeout(240)
def test_w10_parts_saved_by_two_processes_land_or_are_refused(tmp_path: Path) -> None:
    """W10: between processes, too, each key has one winner, and no part is lost."""
    children = [another(tmp_path / "c", number, code=ANOTHER) for number in (1, 2)]
    for child in children:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    won = [child.communicate(timeout=200)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(won[0] + won[1]) == sorted(f"k{key}" for key in range(12))
    partial.finalize(tmp_path / "c")
    expected = {f"own{i}_{k}": i for i in (1, 2) for k in range(12)}
    expected |= {key: i for i in (1, 2) for key in won[i - 1]}
    assert ocp.load(tmp_path / "c") == expected


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[int]:
    """Holds the lock of a session with a part, as another process would."""
    partial.save(tmp_path / "c", FIRST)
    descriptor = os.open(tmp_path / "c.partial_save", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("verb", ["save", "finalize"])
def test_w10_a_session_that_another_has_is_waited_for(
    verb: str, locked: int, tmp_path: Path
) -> None:
    """W10: what another process is doing ends first; waiting is bounded by `timeout_secs`."""
    path = tmp_path / "c"
    context = ocp.Context()
    context.asynchronous.timeout_secs = 0.2

    def begin() -> ocp.AsyncResponse[None]:
        saving = verb == "save"
        return partial.save_async(path, SECOND) if saving else partial.finalize_async(path)

    with context:
        late = begin()
    with pytest.raises(errors.OperationTimeoutError):
        late.result()
    assert len(gathered(path)) == 1 and not path.exists()
    waiting = begin()
    with pytest.raises(TimeoutError):
        waiting.result(0.2)
    fcntl.flock(locked, fcntl.LOCK_UN)
    waiting.result(30)
    assert path.exists() == (verb == "finalize")


@pytest.mark.parametrize("limit", ["its own", "of the operation"])
@pytest.mark.parametrize("verb", ["save", "finalize"])
def test_f3_a_wait_for_a_session_ends_and_names_who_has_it(
    verb: str, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting is bounded also without `timeout_secs`, and says what to do."""
    path = tmp_path / "c"
    partial.save(path, FIRST)
    child = another(path, code=HOLDING)
    assert child.stdout is not None
    pid = child.stdout.readline().strip()
    context = ocp.Context()
    if limit == "its own":
        context.asynchronous.timeout_secs = None
        monkeypatch.setattr(sequence, "_CLAIM_LIMIT_SECS", 0.2)
    else:
        context.asynchronous.timeout_secs = 5
        monkeypatch.setattr(sequence, "_CLAIM_SHARE", 0.04)
    act = {"save": lambda: partial.save(path, SECOND), "finalize": lambda: partial.finalize(path)}
    held = rf"has waited for 0\.2 s: .*c\.partial_save is held by process {pid}\. Wait for that"
    with context, pytest.raises(errors.OperationTimeoutError, match=held):
        act[verb]()
    assert child.communicate("", timeout=60)[0] == "" and child.returncode == 0
    partial.finalize(path)
    check(ocp.load(path), {**FIRST, "theirs": 1})


HOLDING = """
import os, sys
import orbax_async as ocp
from orbax_async._storage.local import opened_by
from watched_directory import before, on, watched

def wait():
    print(os.getpid(), flush=True)
    sys.stdin.read()

with opened_by(watched(before(on("rename"), wait))):
    ocp.partial.save(sys.argv[1], {"theirs": 1})
"""


def test_w10_what_was_finalized_meanwhile_takes_no_parts(locked: int, tmp_path: Path) -> None:
    """W10: who has waited for a finalization is refused, and its part is not lost silently."""
    path = tmp_path / "c"
    response = partial.save_async(path, SECOND)
    ocp.save(path, FIRST)
    fcntl.flock(locked, fcntl.LOCK_UN)
    with pytest.raises(errors.DestinationExistsError, match="Finalized checkpoint"):
        response.result()


@pytest.mark.parametrize(
    ("verb", "owner", "step"),
    [("save", sessions.Session, "_make"), ("finalize", sessions, "find_parts")],
)
def test_w10_what_is_finalized_in_between_takes_no_parts(
    verb: str, owner: Any, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W10: a session that another process finalizes between two looks is not begun anew."""
    path = tmp_path / "c"
    for each in (path, tmp_path / "other"):
        partial.save(each, FIRST)
    partial.finalize(tmp_path / "other")
    function = getattr(owner, step)

    def late(argument: Any) -> Any:
        if not path.exists():
            shutil.rmtree(tmp_path / "c.partial_save")
            (tmp_path / "other").rename(path)
        return function(argument)

    monkeypatch.setattr(owner, step, late)
    act = {"save": lambda: partial.save(path, SECOND), "finalize": lambda: partial.finalize(path)}
    with pytest.raises(errors.DestinationExistsError, match="Finalized checkpoint"):
        act[verb]()
    assert os.listdir(tmp_path) == ["c"]
    check(ocp.load(path), FIRST)


def test_w10_who_gives_up_waiting_leaves_the_session_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W10: a session that this process has made, and another has locked first, is not removed."""
    path = tmp_path / "c"
    make = sessions.Session._make
    others: list[int] = []

    def locked_by_another(self: sessions.Session) -> None:
        make(self)
        if not others:
            others.append(os.open(self.directory.path, os.O_RDONLY))
            fcntl.flock(others[0], fcntl.LOCK_EX)

    monkeypatch.setattr(sessions.Session, "_make", locked_by_another)
    context = ocp.Context()
    context.asynchronous.timeout_secs = 0.2
    with context, pytest.raises(errors.OperationTimeoutError):
        partial.save(path, FIRST)
    assert os.listdir(tmp_path) == ["c.partial_save"]
    os.close(others[0])
    partial.save(path, SECOND)
    partial.finalize(path)
    check(ocp.load(path), SECOND)


@pytest.mark.parametrize(
    "opener",
    [
        watched(Fault(errno.ENOTSUP, on("lock"), times=None)),
        watched(lacking=[Capability.LOCK]),
    ],
    ids=["it turns out", "it is known"],
)
def test_file_systems_without_locks_will_do(opener: Any, tmp_path: Path) -> None:
    """Where a directory can't be locked, parts are saved all the same."""
    with opened_by(opener):
        partial.save(tmp_path / "c", FIRST)
        partial.save(tmp_path / "c", SECOND)
        partial.finalize(tmp_path / "c")
        check(ocp.load(tmp_path / "c"), BOTH)


def test_without_locks_a_session_is_removed_by_who_made_it(tmp_path: Path) -> None:
    """Where two have the session at once, one that fails leaves it to the other."""
    with opened_by(watched(lacking=[Capability.LOCK])):
        first, second = (sessions.Session(str(tmp_path / "c")) for _ in range(2))
        assert first.claim(create=True) is None
        assert second.claim(create=True) is None
    second.abandon()
    assert os.listdir(tmp_path) == ["c.partial_save"]
    first.abandon()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_is_added_without_a_lock_is_not_lost(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that comes in the very last moment, as of Orbax, makes `finalize` give up."""
    path = tmp_path / "c"
    partial.save(tmp_path / "late", SECOND)
    partial.save(path, FIRST)
    late = gathered(tmp_path / "late")[0]

    def add() -> None:
        if late.exists():
            late.rename(tmp_path / "c.partial_save" / "c.partial_save.pending_9_0")

    if not can_exchange:
        monkeypatch.setattr(local, "_renameat2", lambda: None)
    told = pytest.raises(errors.CommitError, match="added to while it was being finalized")
    with opened_by(watched(before(on("exchange", "rename"), add))), told:
        partial.finalize(path)
    assert not path.exists() and len(gathered(path)) == 2
    partial.finalize(path)
    check(ocp.load(path), BOTH)
