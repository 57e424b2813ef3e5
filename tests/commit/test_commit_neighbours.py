"""Committing beside others: what the dead have left is put back or swept."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listing import comes_to_hold, entries
from watched_directory import Fault, Held, Log, before, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._commit import leftovers, sequence
from orbax_async._commit.commits import MarkerCommit
from orbax_async._engine import loop
from orbax_async._layouts import reader
from orbax_async._storage.directory import Capability
from orbax_async._storage.local import LocalDirectory, opened_by
from orbax_async.tree import schema


def save_and_sweep(final: Path, state: Any) -> None:
    """Saves, and waits for the sweep that follows, so that it does not meet what a test makes."""
    ocp.save(final, state)
    while any(each.label == "sweep" for each in list(loop._current().running)):
        time.sleep(0.001)


# Leftovers: recovering and sweeping.


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owned(final: Path, use: str, *, pid: int, host: str | None = None, started: int = 1) -> Path:
    """Returns a temporary name of some owner of the version before, who holds no lock."""
    host = leftovers._host_before() if host is None else host
    return final.with_name(f"{final.name}.orbax-checkpoint-tmp-{host}-{pid}-{started}-0-{use}")


def test_i4_an_interrupted_overwrite_is_put_back_by_a_reader(tmp_path: Path, dead_pid: int) -> None:
    """A checkpoint that a dead process had set aside returns to its place, and loads."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    assert ocp.load(final) == {"a": 1}
    assert entries(tmp_path) == ["checkpoint"]


def test_i4_an_interrupted_overwrite_is_put_back_by_a_save(tmp_path: Path, dead_pid: int) -> None:
    """A save sees the checkpoint that was set aside, and refuses or replaces it."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    with pytest.raises(errors.DestinationExistsError):
        ocp.save(final, {"a": 2})
    assert ocp.load(final) == {"a": 1}
    final.rename(owned(final, "old", pid=dead_pid))
    ocp.save(final, {"a": 2}, overwrite=True)
    assert ocp.load(final) == {"a": 2}
    assert entries(tmp_path) == ["checkpoint"]


def test_i4_two_readers_put_back_the_same_checkpoint(
    tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader whose rename comes second finds what the first one has put in place."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    aside = final.rename(owned(final, "old", pid=dead_pid))
    rename = os.rename

    def come_second(source: Any, target: Any) -> None:
        if source == str(aside):
            rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", come_second)
    assert ocp.load(final) == {"a": 1}
    assert entries(tmp_path) == ["checkpoint"]


def test_i4_what_is_read_across_an_overwrite_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that begins with the old checkpoint and ends with the new one gives no mixture."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"s": "old", "a": 1})
    original, seen = schema.load_strings, []

    def load_strings(data: bytes, wanted: Any) -> dict[str, str]:
        seen.append(original(data, wanted))
        if len(seen) == 1:  # the text is the old one's; now the arrays become the new one's
            writer = threading.Thread(
                target=ocp.save, args=(final, {"s": "new", "a": 2}), kwargs={"overwrite": True}
            )
            writer.start()
            writer.join()
        return dict(seen[-1])

    monkeypatch.setattr(schema, "load_strings", load_strings)
    assert ocp.load(final) == {"s": "new", "a": 2}
    assert [each["s"] for each in seen] == ["old", "new"]


def test_f24_what_a_living_writer_sets_aside_is_put_back_at_once_and_set_aside_again(
    tmp_path: Path,
) -> None:
    """Whoever owns it: nobody waits between the two renames, and the overwrite goes on."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    loaded: list[Any] = []

    def look() -> None:
        if len(loaded) < 3:
            loaded.append(ocp.load(final))

    from_here = on("rename", path=f"{final}.orbax-checkpoint-tmp-*-new")
    log = Log()
    watching = watched(log, before(from_here, look), lacking=[Capability.EXCHANGE])
    with opened_by(watching):
        ocp.save(final, {"a": 2}, overwrite=True)
    assert loaded == [{"a": 1}] * 3
    set_aside = [call for call in log.of("rename") if str(call.target).endswith("-old")]
    assert len(set_aside) == 4
    assert ocp.load(final) == {"a": 2}
    assert entries(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("is_held", [True, False])
def test_i4_a_reader_that_can_not_put_back_says_so_or_waits_in_bounds(
    is_held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who may not rename waits a little for a writer that is at it, and else says why."""
    monkeypatch.setattr(reader, "_LOOKS", 2)
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    aside = Path(leftovers.temporary_path(str(final), "old"))
    final.rename(aside)
    held = leftovers.hold(LocalDirectory(str(aside))) if is_held else None
    told = pytest.raises(errors.InvalidLayoutError, match=str(final))
    if not is_held:
        told = pytest.raises(errors.CommitError, match="can't be renamed back: Read-only")
    with opened_by(watched(Fault(errno.EROFS, on("rename"), times=None))), told:
        ocp.load(final)
    if held is not None:
        held.release()
    assert ocp.load(final) == {"a": 1}


def test_i4_of_two_that_were_set_aside_the_later_one_comes_back(tmp_path: Path) -> None:
    """A process died before it removed what it had replaced, and the next one between renames."""
    final = tmp_path / "checkpoint"
    for serial in (1, 2):
        save_and_sweep(tmp_path / str(serial), {"a": serial})
    for serial in (2, 1):
        aside = leftovers.temporary_path(str(final), "old")
        (tmp_path / str(serial)).rename(aside)
    assert ocp.load(final) == {"a": 2}
    assert leftovers.sweep(str(tmp_path)) != []
    assert ocp.load(final) == {"a": 2}


def test_i4_what_is_deleted_does_not_come_back(tmp_path: Path) -> None:
    """What was replaced, and is not removed yet, does not take the place of what is deleted."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    shutil.copytree(final, leftovers.temporary_path(str(final), "old"))
    ocp.delete(final)
    assert entries(tmp_path) == []


def test_an_aside_is_not_put_back_over_a_checkpoint(tmp_path: Path, dead_pid: int) -> None:
    """What was set aside is only a leftover where its place is taken."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    shutil.copytree(owned(final, "old", pid=dead_pid), final)
    assert leftovers.settle(str(final)) is False
    assert leftovers.sweep(str(tmp_path)) == [str(owned(final, "old", pid=dead_pid))]
    assert entries(tmp_path) == ["checkpoint"]


@pytest.mark.leaves_temporaries
def test_a_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path: Path, dead_pid: int) -> None:
    """Leftovers of dead processes go; those of the living, of other hosts, and all else stay."""
    final = tmp_path / "checkpoint"
    dead = owned(final, "new", pid=dead_pid)
    reused = owned(final, "new", pid=os.getpid(), started=1)  # our number, an earlier process
    long_ago = owned(final, "new", pid=1, host="0123abcd")
    let_go = Path(leftovers.temporary_path(str(final)))
    held = [Path(leftovers.temporary_path(str(final), use)) for use in ("new", "old")]
    kept = [
        *held,
        owned(final, "new", pid=1, host="89ef0123"),
        owned(final, "new", pid=os.getpid(), started=0),  # who could not say when it began
        tmp_path / "notes",
        tmp_path / "checkpoint.orbax-checkpoint-tmp",  # of stock Orbax
        tmp_path / "my.orbax-checkpoint-tmp-backup",
        tmp_path / f"{dead.name}.bak",
        tmp_path / "new",
    ]
    gone = [dead, reused, long_ago, let_go]
    for path in (*gone, *kept):
        (path / "state").mkdir(parents=True)
        (path / "state" / "data").write_text("data")
    final.mkdir()  # else what is set aside would be put there
    locks = [leftovers.hold(LocalDirectory(str(path))) for path in held]
    day_before_yesterday = time.time() - 2 * 24 * 3600
    for path in (long_ago, long_ago / "state", long_ago / "state" / "data"):
        os.utime(path, (day_before_yesterday, day_before_yesterday))
    assert sorted(leftovers.sweep(str(tmp_path))) == sorted(map(str, gone))
    assert entries(tmp_path) == sorted([*(path.name for path in kept), "checkpoint"])
    assert all((path / "state" / "data").read_text() == "data" for path in kept)
    for lock in locks:
        assert lock is not None
        lock.release()


def test_one_that_can_not_be_removed_keeps_no_other(tmp_path: Path, dead_pid: int) -> None:
    """A sweep goes on after a failure, and tells of it."""
    paths = [owned(tmp_path / name, "new", pid=dead_pid) for name in "ab"]
    for path in paths:
        path.mkdir()
    with opened_by(watched(Fault(errno.EPERM, on("rename")))):
        assert leftovers.sweep(str(tmp_path)) == [str(paths[1])]
    assert leftovers.sweep(str(tmp_path)) == [str(paths[0])]


# F24: who is alive, in another namespace, on another machine, and where nothing can be locked.

BESIDE = """
import os, sys
import numpy as np
import orbax_async as ocp
from orbax_async._commit import sequence

path, mode, overwrite, then = sys.argv[1:]

def stop(self):
    print("here", os.getpid(), flush=True)
    if then == "dies":
        os._exit(9)
    sys.stdin.readline()
    return make_durable(self)

make_durable = sequence.Save._make_durable
sequence.Save._make_durable = stop
context = ocp.Context()
context.atomicity.mode = mode
with context:
    ocp.save(path, {"w": np.arange(4)}, overwrite=overwrite == "overwrite")
"""


def in_another_namespace(*arguments: object) -> subprocess.Popen[str]:
    """Starts a save in another pid namespace, which stops before it syncs, or dies there."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no other pid namespace can be made")
    return subprocess.Popen(
        [*command, sys.executable, "-c", BESIDE, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(ocp.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def mode_of(mode: str) -> ocp.Context:
    """Returns a context of a mode."""
    context = ocp.Context()
    context.atomicity.mode = mode  # type: ignore[assignment]
    return context


modes = pytest.mark.parametrize("mode", ["atomic_rename", "commit_file"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs pid namespaces")
@modes
@pytest.mark.parametrize("what", ["overwrite", "first"])
def test_f24_who_restarts_in_another_pid_namespace_goes_on_at_once(
    what: str, mode: str, tmp_path: Path
) -> None:
    """As in a pod whose container was killed: the old one loads, and the path can be saved to."""
    final = tmp_path / "c"
    if what == "overwrite":
        ocp.save(final, {"w": np.arange(3)})
    child = in_another_namespace(final, mode, what, "dies")
    assert child.communicate(timeout=60)[0] == "here 1\n"
    with mode_of(mode):
        if what == "overwrite":
            assert ocp.load(final)["w"].tolist() == [0, 1, 2]
        ocp.save(final, {"w": np.arange(5)}, overwrite=what == "overwrite")
        assert ocp.load(final)["w"].tolist() == [0, 1, 2, 3, 4]
    comes_to_hold(tmp_path, "c")


@pytest.mark.skipif(sys.platform != "linux", reason="needs pid namespaces")
@modes
@pytest.mark.parametrize("what", ["overwrite", "first"])
def test_f24_who_lives_in_another_pid_namespace_is_left_alone(
    what: str, mode: str, tmp_path: Path
) -> None:
    """It goes on, is not swept, and hides nothing meanwhile."""
    final = tmp_path / "c"
    if what == "overwrite":
        ocp.save(final, {"w": np.arange(3)})
    child = in_another_namespace(final, mode, what, "waits")
    assert child.stdout is not None
    assert child.stdout.readline() == "here 1\n"
    assert leftovers.sweep(str(tmp_path)) == []
    with mode_of(mode):
        if what == "overwrite":
            assert ocp.load(final)["w"].tolist() == [0, 1, 2]
        elif mode == "commit_file":
            with pytest.raises(errors.DestinationExistsError, match="being written"):
                ocp.save(final, {"w": np.arange(5)}, overwrite=True)
    child.communicate("go on\n", timeout=60)
    assert child.returncode == 0
    assert ocp.load(final)["w"].tolist() == [0, 1, 2, 3]
    assert entries(tmp_path) == ["c"]


def begun_elsewhere(final: Path, monkeypatch: pytest.MonkeyPatch) -> MarkerCommit:
    """Begins a save in place as on another machine, which then says nothing any more."""
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "_machine", lambda: "0123abcd")
        commit = MarkerCommit(LocalDirectory(str(final)))
        commit.begin(["state"], mode=None)
    commit.release()
    return commit


def test_f24_an_owner_on_another_machine_is_dead_after_two_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock of the file system; until then the path is refused with what to do."""
    final = tmp_path / "c"
    commit = begun_elsewhere(final, monkeypatch)
    with mode_of("commit_file"):
        for secs, is_alive in ((0, True), (100, True), (130, False)):
            os.utime(final, (time.time() - secs,) * 2)
            if is_alive:
                with pytest.raises(errors.DestinationExistsError, match=r"two minutes\. Wait"):
                    ocp.save(final, {"w": np.arange(5)}, overwrite=True)
        ocp.save(final, {"w": np.arange(5)}, overwrite=True)
        assert ocp.load(final)["w"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(errors.CommitError, match="taken it for dead"):
        commit.renew()
    commit.undo()
    assert ocp.load(final)["w"].tolist() == [0, 1, 2, 3, 4]


@modes
def test_f24_a_save_under_way_shows_that_it_is_alive(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that writes nothing for long: so nobody on another machine takes it for dead."""
    monkeypatch.setattr(sequence, "_RENEW_SECS", 0.01)
    held, log = Held(on("sync")), Log()
    with mode_of(mode), opened_by(watched(log, held)):
        response = ocp.save_async(tmp_path / "c", {"w": np.arange(3)})
    assert held.is_reached.wait(30)
    (directory,) = tmp_path.iterdir()
    os.utime(directory, (0, 0))
    while directory.stat().st_mtime < time.time() - 60:
        time.sleep(0.005)
    held.is_released.set()
    response.result()
    assert {call.path for call in log.of("touch")} == {str(directory)}


class Slow:
    """Saves itself, and takes long when its directory is there."""

    def __init__(self) -> None:
        self.is_writing = threading.Event()

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Awaitable[None]:
        async def write() -> None:
            await directory.await_creation()
            self.is_writing.set()
            await asyncio.sleep(60)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        raise NotImplementedError


@modes
def test_f24_a_save_that_was_taken_for_dead_ends_soon(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was paused, and whose directory is another's or gone, publishes nothing."""
    monkeypatch.setattr(sequence, "_RENEW_SECS", 0.01)
    slow = Slow()
    with mode_of(mode):
        response = ocp.save_checkpointables_async(tmp_path / "c", {"slow": slow})
    assert slow.is_writing.wait(30)
    (found,) = tmp_path.glob("c*/slow")
    found.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(errors.CommitError, match="taken it for dead"):
        response.result(30)
    shutil.rmtree(tmp_path / "elsewhere")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("way", ["cannot", "fails"])
def test_f24_where_nothing_can_be_locked_silence_tells(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves work, and what is silent for two minutes is swept, of this process, too."""
    fault = Fault(errno.ENOTSUP, on("lock"), times=None)
    opener = watched(fault) if way == "fails" else watched(lacking=[Capability.LOCK])
    with opened_by(opener):
        held = leftovers.make_held(
            LocalDirectory(leftovers.temporary_path(str(tmp_path / "c"))), b""
        )
        held.release()
        ocp.save(tmp_path / "c", {"a": 1})
        ocp.save(tmp_path / "c", {"a": 2}, overwrite=True)
        assert leftovers.sweep(str(tmp_path)) == []
        os.utime(held.directory.path, (time.time() - 130,) * 2)
        leftovers.sweep(str(tmp_path))  # or that of the last save, which may be at it
        assert ocp.load(tmp_path / "c") == {"a": 2}
    comes_to_hold(tmp_path, "c")


def test_f24_a_lock_that_can_not_be_had_for_now_proves_nothing(
    tmp_path: Path, dead_pid: int
) -> None:
    """Too many open files, say: then nobody is taken for dead."""
    path = Path(leftovers.temporary_path(str(tmp_path / "c")))
    path.mkdir()
    with opened_by(watched(Fault(errno.EMFILE, on("lock"), times=None))):
        assert leftovers.sweep(str(tmp_path)) == []
    assert leftovers.sweep(str(tmp_path)) == [str(path)]


# What the version before has left, which wrote in place also where it overwrote.


@pytest.fixture
def left_in_place(tmp_path: Path, dead_pid: int) -> Path:
    """An overwrite in place by the version before, which died."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    (final / "state").mkdir(parents=True)
    (final / "state" / "data").write_text("half")
    (final / "orbax.checkpoint").write_text(owned(final, "new", pid=dead_pid).name)
    return final


@pytest.mark.parametrize("marker", ["its owner", "empty", "none"])
@pytest.mark.parametrize("finder", ["load", "save", "sweep"])
def test_f1_what_the_version_before_set_aside_in_place_comes_back(
    finder: str, marker: str, left_in_place: Path
) -> None:
    """Killed at any call, or cut off: whoever comes first puts the old checkpoint back."""
    if marker == "empty":
        (left_in_place / "orbax.checkpoint").write_text("")
    if marker == "none":
        shutil.rmtree(left_in_place)
        (left_in_place / "state").mkdir(parents=True)
    act = {
        "load": lambda: ocp.load(left_in_place),
        "save": lambda: ocp.save(left_in_place.parent / "next", {"a": 3}),
        "sweep": lambda: leftovers.sweep(str(left_in_place.parent)),
    }
    act[finder]()
    while not (left_in_place / "commit_success.txt").exists():
        time.sleep(0.005)  # the sweep of a save comes after it
    assert ocp.load(left_in_place) == {"a": 1}
    with mode_of("commit_file"):
        ocp.save(left_in_place, {"a": 2}, overwrite=True)
        assert ocp.load(left_in_place) == {"a": 2}
    comes_to_hold(left_in_place.parent, "checkpoint", *["next"] * (finder == "save"))


def test_f1_what_somebody_has_put_there_since_is_kept(left_in_place: Path) -> None:
    """What is set aside goes back only over what a save in place makes."""
    shutil.rmtree(left_in_place)
    left_in_place.mkdir()
    (left_in_place / "thesis.txt").write_text("years of work")
    leftovers.settle(str(left_in_place))
    assert leftovers.sweep(str(left_in_place.parent)) == []
    assert (left_in_place / "thesis.txt").exists()
    shutil.rmtree(left_in_place)
    assert ocp.load(left_in_place) == {"a": 1}


def test_a_sweep_puts_back_what_was_set_aside(tmp_path: Path, dead_pid: int) -> None:
    """The only copy of a checkpoint is never swept, but returned to its place."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    assert leftovers.sweep(str(tmp_path)) == []
    assert ocp.load(final) == {"a": 1}


def test_w28_each_commit_sweeps_in_the_background(tmp_path: Path, dead_pid: int) -> None:
    """A leftover beside a checkpoint is gone soon after the next commit there."""
    dead = owned(tmp_path / "other", "new", pid=dead_pid)
    (dead / "state").mkdir(parents=True)
    ocp.save(tmp_path / "checkpoint", {"a": 1})
    comes_to_hold(tmp_path, "checkpoint")


def test_only_temporary_directories_can_be_discarded(tmp_path: Path) -> None:
    """The last line of defence: a path without our mark is never removed."""
    with pytest.raises(AssertionError, match="not ours"):
        leftovers.discard(LocalDirectory(str(tmp_path)))
    assert tmp_path.is_dir()
