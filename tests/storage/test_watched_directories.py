"""The directories with which tests look on, delay, fail and crash do what they say."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from directory_conformance import DirectoryConformance
from power_cuts import PowerCuts, lay_out
from watched_directory import (
    CHANGES,
    Call,
    Crash,
    Crashed,
    Fault,
    Held,
    Latency,
    Log,
    before,
    instead,
    on,
    watched,
)

from orbax_async._storage.directory import Capability, Directory


class TestWatchedDirectory(DirectoryConformance):
    """It forwards everything, with what it is given and what comes back."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Directory:
        return watched(Log(), Latency(0))(str(tmp_path))


def test_a_log_has_every_call(tmp_path: Path) -> None:
    """With what it is about; each name that is synced is a call."""
    log = Log()
    directory = watched(log)(str(tmp_path))
    directory.write("a/file", b"text")
    (directory / "a").rename(directory / "b")
    directory.replace("b/file", "b/name")
    directory.sync(["b/name", "b", ""])
    assert directory.read("b/file") is None
    run = str(tmp_path)
    assert log.calls == [
        Call("write", f"{run}/a/file"),
        Call("rename", f"{run}/a", f"{run}/b"),
        Call("replace", f"{run}/b/file", f"{run}/b/name"),
        *(Call("sync", path) for path in (f"{run}/b/name", f"{run}/b", run)),
        Call("read", f"{run}/b/file"),
    ]
    assert log.paths("sync", "read") == [f"{run}/b/name", f"{run}/b", run, f"{run}/b/file"]
    assert [call.verb for call in log.of(path="*/name")] == ["replace", "sync"]


def test_capabilities_can_be_taken_away(tmp_path: Path) -> None:
    """Also from what lies below and above."""
    directory = watched(lacking=[Capability.EXCHANGE])(str(tmp_path))
    for each in (directory, directory / "below", directory.parent):
        assert not each.can(Capability.EXCHANGE)
        assert each.can(Capability.RENAME)


def test_calls_take_longer(tmp_path: Path) -> None:
    """Those that are meant."""
    directory = watched(Latency(0.05, on("write")))(str(tmp_path))
    begin = time.perf_counter()
    directory.write("file", b"")
    written = time.perf_counter()
    directory.read("file")
    assert written - begin >= 0.05 > time.perf_counter() - written


@pytest.mark.parametrize(
    ("nth", "times", "failed"), [(1, 1, [0]), (2, 1, [1]), (2, 2, [1, 2]), (2, None, [1, 2, 3])]
)
def test_the_nth_call_fails(tmp_path: Path, nth: int, times: int | None, failed: list[int]) -> None:
    """With an errno and the path; other calls, of that verb too, do not."""
    fault = Fault(errno.ENOSPC, on("write", path="*/a?"), nth=nth, times=times)
    directory = watched(fault)(str(tmp_path))
    found = []
    for index in range(4):
        directory.write(f"b{index}", b"")
        try:
            directory.write(f"a{index}", b"")
        except OSError as error:
            assert (error.errno, error.filename) == (errno.ENOSPC, f"{tmp_path}/a{index}")
            found.append(index)
        assert (directory.read(f"a{index}") is None) == (index in found)
    assert found == failed
    fault.end()
    directory.write("a0", b"")


@pytest.mark.parametrize("is_done", [False, True])
def test_after_a_crash_nothing_is_done(tmp_path: Path, is_done: bool) -> None:
    """A look is no change, and does not count; it fails as everything does after the crash."""
    directory = watched(Crash(2, is_done=is_done))(str(tmp_path))
    directory.write("first", b"")
    directory.status("first")
    with pytest.raises(Crashed):
        directory.write("second", b"")
    for action in (directory.entries, directory.remove, (directory / "third").make):
        with pytest.raises(Crashed):
            action()
    left = sorted(each.name for each in tmp_path.iterdir())
    assert left == (["first", "second"] if is_done else ["first"])
    assert {"write", "rename", "exchange", "remove"} <= set(CHANGES)


def test_a_call_is_held_until_it_is_released(tmp_path: Path) -> None:
    """The first of its kind; the thread that made it waits."""
    held = Held(on("write"))
    directory = watched(held)(str(tmp_path))
    thread = threading.Thread(target=directory.write, args=("file", b""))
    thread.start()
    assert held.is_reached.wait(10)
    assert directory.read("file") is None
    held.is_released.set()
    thread.join()
    assert directory.read("file") == b""


def test_a_call_can_have_another_answer(tmp_path: Path) -> None:
    """Such as an exchange that turns out impossible."""
    directory = watched(instead(on("exchange"), False))(str(tmp_path))
    for name in ("a", "b"):
        directory.write(f"{name}/{name}", b"")
    assert not (directory / "a").exchange(directory / "b")
    assert sorted(directory.walk()[0]) == ["a/a", "b/b"]


def test_something_is_done_before_each_call(tmp_path: Path) -> None:
    """A test can look at every state on the way."""
    seen: list[int] = []
    look = before(on("write"), lambda: seen.append(len(list(tmp_path.iterdir()))))
    directory = watched(look)(str(tmp_path))
    for index in range(3):
        directory.write(str(index), b"")
    assert seen == [0, 1, 2]


# Power cuts.


@pytest.fixture
def cuts(tmp_path: Path) -> Iterator[tuple[PowerCuts, Directory]]:
    """A root with a file, and a directory there of which it is known what is durable."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "old").write_bytes(b"old")
    found = PowerCuts(tmp_path / "root")
    yield found, watched(found)(str(tmp_path / "root"))
    found.close()


def test_a_power_cut_takes_what_is_not_synced(cuts: tuple[PowerCuts, Directory]) -> None:
    """Data last once the file was synced, a name once its directory was."""
    power, directory = cuts
    directory.write("a/file", b"data")
    states = dict(power.states())
    root = directory.path
    assert states == {
        "only what is synced": {"old": b"old"},
        "all names, no data": {"old": b"old", "a": None, "a/file": b""},
        "all names, zeros": {"old": b"old", "a": None, "a/file": bytes(4)},
        f"the names in {root}": {"old": b"old", "a": None},
        f"all names but those in {root}": {"old": b"old"},
        f"the names in {root}/a": {"old": b"old"},
        f"all names but those in {root}/a": {"old": b"old", "a": None},
        "everything": {"old": b"old", "a": None, "a/file": b"data"},
    }
    directory.sync(["a/file"])
    states = dict(power.states())
    assert states["only what is synced"] == {"old": b"old"}
    assert states["all names, no data"] == {"old": b"old", "a": None, "a/file": b"data"}
    directory.sync(["a", ""])
    assert set(map(repr, dict(power.states()).values())) == {repr(states["everything"])}


def test_a_power_cut_undoes_renames_and_removals(cuts: tuple[PowerCuts, Directory]) -> None:
    """Until the directory is synced the old name is there, with what was synced."""
    power, directory = cuts
    directory.write("a/file", b"data")
    directory.sync(["a/file", "a", ""])
    before_it = {"old": b"old", "a": None, "a/file": b"data"}
    (directory / "a").rename(directory / "b")
    directory.remove("old")
    directory.write("new", b"of the same inode, perhaps")
    states = dict(power.states())
    assert states["only what is synced"] == before_it
    assert states["everything"] == {
        **{"b": None, "b/file": b"data"},
        "new": b"of the same inode, perhaps",
    }
    directory.sync([""])
    assert dict(power.states())["only what is synced"] == {
        **{"b": None, "b/file": b"data", "new": b""}
    }


def test_what_a_power_cut_has_left_can_be_laid_out(
    cuts: tuple[PowerCuts, Directory], tmp_path: Path
) -> None:
    """So that a test can go on from there."""
    power, directory = cuts
    directory.write("a/file", b"data")
    for index, (_, tree) in enumerate(power.states()):
        folder = lay_out(tree, tmp_path / str(index))
        found = {
            each.relative_to(folder).as_posix(): each.read_bytes() if each.is_file() else None
            for each in folder.rglob("*")
        }
        assert found == tree
