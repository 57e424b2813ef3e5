"""Committing (I4, I5): what is durable when, what a reader sees, and what a failure leaves."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import orbax_async as ocp
from orbax_async import errors
from orbax_async._api import layout, writing
from orbax_async._commit import atomicity
from orbax_async._engine import loop
from orbax_async._storage import files, names
from orbax_async.tree import schema

STATE = {"a": jnp.arange(2000.0), "b": np.arange(10), "c": "text", "d": 1}


def entries(folder: Path) -> list[str]:
    """Returns what is in a folder."""
    return sorted(os.listdir(folder))


def save_and_sweep(final: Path, state: Any) -> None:
    """Saves, and waits for the sweep that follows, so that it does not meet what a test makes."""
    ocp.save(final, state)
    while any(each.label == "sweep" for each in list(loop._current().running)):
        time.sleep(0.001)


# I5: durable, then visible, then durably visible.


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Records each sync and each change of names, by path, in order."""
    events: list[tuple[str, str]] = []
    fsync, rename, exchange = os.fsync, os.rename, atomicity._exchange

    def recording_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_rename(source: Any, target: Any) -> None:
        rename(source, target)
        events.append(("publish", os.fspath(target)))

    def recording_exchange(first: str, second: str) -> bool:
        is_done = exchange(first, second)
        if is_done:
            events.append(("publish", second))
        return is_done

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    monkeypatch.setattr(atomicity, "_exchange", recording_exchange)
    return events


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@linux_only
@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_i5_everything_is_durable_before_it_is_visible(
    use_ocdbt: bool, overwrite: bool, tmp_path: Path, record: list[tuple[str, str]]
) -> None:
    """Every file and every directory is synced before the rename, and the parent after it."""
    final = tmp_path / "checkpoint"
    if overwrite:
        ocp.save(final, {"old": 1})
        record.clear()
    context = ocp.Context()
    context.array.saving.use_ocdbt = use_ocdbt
    with context:
        ocp.save(final, STATE, overwrite=overwrite)
    published = record.index(("publish", str(final)))
    synced_before = [path for kind, path in record[:published] if kind == "sync"]
    temporary = next(path for path in synced_before if names.TEMPORARY_MARK in path)
    root = temporary[: temporary.index("/", temporary.index(names.TEMPORARY_MARK))]
    expected = {root + str(path)[len(str(final)) :] for path in (final, *final.rglob("*"))}
    assert set(synced_before) == expected
    assert record[published + 1 :] == [("sync", str(tmp_path))]


@linux_only
def test_i5_a_directory_is_synced_after_what_is_in_it(
    tmp_path: Path, record: list[tuple[str, str]]
) -> None:
    """A file is synced before its directory, and a directory before the one that holds it."""
    ocp.save(tmp_path / "checkpoint", STATE)
    order = [path for kind, path in record if kind == "sync"]
    for position, path in enumerate(order):
        for later in order[position + 1 :]:
            assert os.path.dirname(later) != path, f"{later} was synced after {path}"


@linux_only
def test_i5_parents_that_were_made_are_durable_too(
    tmp_path: Path, record: list[tuple[str, str]]
) -> None:
    """Each new parent's entry is synced before the checkpoint becomes visible."""
    ocp.save(tmp_path / "a" / "b" / "checkpoint", STATE)
    published = record.index(("publish", str(tmp_path / "a" / "b" / "checkpoint")))
    synced_before = [path for _, path in record[:published]]
    assert str(tmp_path) in synced_before
    assert str(tmp_path / "a") in synced_before
    assert record[published + 1 :] == [("sync", str(tmp_path / "a" / "b"))]


@linux_only
def test_i5_the_commit_marker_is_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker that says "committed" follows every other document and all data."""
    written: list[str] = []
    original = files.write_bytes

    def recording(path: Any, data: bytes) -> None:
        written.append(os.path.basename(path))
        original(path, data)

    monkeypatch.setattr(files, "write_bytes", recording)
    ocp.save(tmp_path / "checkpoint", STATE)
    assert written[-1] == "commit_success.txt"
    assert written.index("_METADATA") < written.index("_CHECKPOINT_METADATA")


# I4: old, new, or nothing; never half.


@pytest.fixture(params=["exchange", "set aside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Overwrites in both ways: by exchanging names in one step, and by two renames."""
    if request.param == "set aside":
        monkeypatch.setattr(atomicity, "_exchange", lambda *_: False)
    elif sys.platform != "linux":
        pytest.skip("the platform has no exchange")
    return str(request.param)


def test_i4_an_overwrite_replaces_the_checkpoint(way: str, tmp_path: Path) -> None:
    """The new state takes the place of the old, and nothing of the old one is left."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"old": np.arange(3)})
    (final / "state" / "stray.txt").write_text("stray")
    ocp.save(final, {"new": np.arange(4)}, overwrite=True)
    assert ocp.load(final)["new"].tolist() == [0, 1, 2, 3]
    assert not (final / "state" / "stray.txt").exists()
    assert entries(tmp_path) == ["checkpoint"]


def test_i4_a_reader_always_finds_a_whole_checkpoint(
    way: str, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """While saves overwrite each other, every load gives one state that was saved, whole."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"step": 0, "w": np.zeros(300)})
    stop = threading.Event()
    seen: list[int] = []
    problems: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                state = ocp.load(final)
                assert (state["w"] == state["step"]).all()
                seen.append(state["step"])
            except BaseException as error:
                problems.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    last = soak(15, 500)
    for step in range(1, last + 1):
        ocp.save(final, {"step": step, "w": np.full(300, float(step))}, overwrite=True)
    stop.set()
    reader.join()
    assert problems == []
    assert seen == sorted(seen)
    assert ocp.load(final)["step"] == last
    assert entries(tmp_path) == ["checkpoint"]


def test_i4_the_old_checkpoint_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W8: up to the commit an overwrite leaves the old checkpoint in its place, and loadable."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    loaded: list[Any] = []
    original = atomicity.publish

    def publish(temporary: str, final: str, *, overwrite: bool) -> str | None:
        shutil.copytree(final, tmp_path / "seen")
        return original(temporary, final, overwrite=overwrite)

    monkeypatch.setattr(atomicity, "publish", publish)
    ocp.save(final, {"a": 2}, overwrite=True)
    loaded = [ocp.load(tmp_path / "seen"), ocp.load(final)]
    assert loaded == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("what", ["file", "directory", "link to a checkpoint", "dangling link"])
def test_w8_an_overwrite_refuses_what_is_no_checkpoint(what: str, tmp_path: Path) -> None:
    """Files, other directories and links are never replaced, and nothing is written."""
    final = tmp_path / "precious"
    if what == "file":
        final.write_text("years of work")
    elif what == "directory":
        final.mkdir()
        (final / "thesis.txt").write_text("years of work")
    elif what == "link to a checkpoint":
        ocp.save(tmp_path / "real", {"a": 1})
        final.symlink_to(tmp_path / "real")
    else:
        final.symlink_to(tmp_path / "nowhere")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    for overwrite in (True, False):
        with pytest.raises(errors.DestinationExistsError, match=str(final)):
            ocp.save(final, STATE, overwrite=overwrite)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_overwrite_takes_the_place_of_an_empty_directory(tmp_path: Path) -> None:
    """An empty directory holds nothing to lose, and is replaced."""
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(errors.DestinationExistsError):
        ocp.save(tmp_path / "checkpoint", {"a": 1})
    ocp.save(tmp_path / "checkpoint", {"a": 1}, overwrite=True)
    assert ocp.load(tmp_path / "checkpoint") == {"a": 1}
    assert entries(tmp_path) == ["checkpoint"]


def test_a_destination_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came to be at the destination during the save is not overwritten without leave."""
    original = atomicity.publish

    def publish(temporary: str, final: str, *, overwrite: bool) -> str | None:
        Path(final).mkdir()
        (Path(final) / "theirs.txt").write_text("theirs")
        return original(temporary, final, overwrite=overwrite)

    monkeypatch.setattr(atomicity, "publish", publish)
    with pytest.raises(errors.DestinationExistsError, match="appeared while"):
        ocp.save(tmp_path / "checkpoint", {"a": 1})
    assert (tmp_path / "checkpoint" / "theirs.txt").read_text() == "theirs"
    assert entries(tmp_path) == ["checkpoint"]


# Leftovers: recovering and sweeping.


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owned(final: Path, use: str, *, pid: int, host: str | None = None, started: int = 1) -> Path:
    """Returns a temporary name of some owner."""
    host = atomicity._host() if host is None else host
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


def test_i4_a_reader_waits_for_a_writer_between_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that a living process has set aside is left alone, and looked for again."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    aside = Path(atomicity.temporary_path(str(final), "old"))
    final.rename(aside)
    original, looks = atomicity.recover, []

    def recover(path: str) -> bool:
        looks.append(original(path))
        if looks == [True, True]:
            aside.rename(final)
        return looks[-1]

    monkeypatch.setattr(atomicity, "recover", recover)
    assert ocp.load(final) == {"a": 1}
    assert looks[:3] == [True, True, False]


def test_i4_a_reader_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the living writer never puts anything in place, the reader says what is missing."""
    monkeypatch.setattr(layout, "_LOOKS", 2)
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    aside = Path(atomicity.temporary_path(str(final), "old"))
    final.rename(aside)
    with pytest.raises(errors.InvalidLayoutError, match=str(final)):
        ocp.load(final)
    aside.rename(final)


def test_an_aside_is_not_put_back_over_a_checkpoint(tmp_path: Path, dead_pid: int) -> None:
    """What was set aside is only a leftover where its place is taken."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    shutil.copytree(owned(final, "old", pid=dead_pid), final)
    assert atomicity.recover(str(final)) is False
    assert atomicity.sweep(str(tmp_path)) == [str(owned(final, "old", pid=dead_pid))]
    assert entries(tmp_path) == ["checkpoint"]


@pytest.mark.leaves_temporaries
def test_a_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path: Path, dead_pid: int) -> None:
    """Leftovers of dead processes go; those of the living, of other hosts, and all else stay."""
    final = tmp_path / "checkpoint"
    dead = owned(final, "new", pid=dead_pid)
    reused = owned(final, "new", pid=os.getpid(), started=1)  # our number, an earlier process
    long_ago = owned(final, "new", pid=1, host="0123abcd")
    kept = [
        Path(atomicity.temporary_path(str(final))),
        Path(atomicity.temporary_path(str(final), "old")),
        owned(final, "new", pid=1, host="89ef0123"),
        tmp_path / "notes",
        tmp_path / "checkpoint.orbax-checkpoint-tmp",  # of stock Orbax
        tmp_path / "my.orbax-checkpoint-tmp-backup",
        tmp_path / f"{dead.name}.bak",
        tmp_path / "new",
    ]
    for path in (dead, reused, long_ago, *kept):
        (path / "state").mkdir(parents=True)
        (path / "state" / "data").write_text("data")
    day_before_yesterday = time.time() - 2 * 24 * 3600
    for path in (long_ago, long_ago / "state", long_ago / "state" / "data"):
        os.utime(path, (day_before_yesterday, day_before_yesterday))
    assert sorted(atomicity.sweep(str(tmp_path))) == sorted(map(str, (dead, reused, long_ago)))
    assert entries(tmp_path) == sorted(path.name for path in kept)
    assert all((path / "state" / "data").read_text() == "data" for path in kept)


def test_a_sweep_puts_back_what_was_set_aside(tmp_path: Path, dead_pid: int) -> None:
    """The only copy of a checkpoint is never swept, but returned to its place."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    assert atomicity.sweep(str(tmp_path)) == []
    assert ocp.load(final) == {"a": 1}


def test_w28_each_commit_sweeps_in_the_background(tmp_path: Path, dead_pid: int) -> None:
    """A leftover beside a checkpoint is gone soon after the next commit there."""
    dead = owned(tmp_path / "other", "new", pid=dead_pid)
    (dead / "state").mkdir(parents=True)
    ocp.save(tmp_path / "checkpoint", {"a": 1})
    for _ in range(1000):
        if not dead.exists():
            break
        time.sleep(0.01)
    assert entries(tmp_path) == ["checkpoint"]


def test_only_temporary_directories_can_be_discarded(tmp_path: Path) -> None:
    """The last line of defence: a path without our mark is never removed."""
    with pytest.raises(AssertionError, match="not ours"):
        atomicity.discard(str(tmp_path))
    assert tmp_path.is_dir()


# Faults: the N-th call of something fails.


class Fault:
    """Makes the N-th call of some functions fail with an OSError."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0
        self._lock = threading.Lock()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.calls += 1
                fails = self.calls == self.at
            if fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))
            return function(*args, **kwargs)

        return call


def _fsync(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "fsync_file", fault.around(files.fsync_file))


def _rename(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "rename", fault.around(os.rename))
    patch.setattr(atomicity, "_exchange", fault.around(atomicity._exchange))


def _mkdir(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "mkdir", fault.around(os.mkdir))


def _write(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "write_bytes", fault.around(files.write_bytes))


@pytest.mark.parametrize("fail", [_fsync, _rename, _mkdir, _write])
def test_a_failing_overwrite_changes_nothing(
    fail: Callable[[Fault, pytest.MonkeyPatch], None], way: str, tmp_path: Path
) -> None:
    """Whichever call fails, the old checkpoint is in its place, alone, and the next save works."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    failures = 0
    for at in itertools.count(1):
        fault = Fault(at)
        with pytest.MonkeyPatch.context() as patch:
            fail(fault, patch)
            try:
                ocp.save(final, {"a": 2, "w": np.arange(5)}, overwrite=True)
            except errors.CommitError as error:
                assert os.strerror(errno.EIO) in str(error)
                assert str(tmp_path) in str(error)
                failures += 1
            else:
                if fault.calls < at:
                    break
                # Some directory was there all the same; any other call that fails is told of.
                assert fail is _mkdir
                ocp.save(final, {"a": 1}, overwrite=True)
        assert ocp.load(final) == {"a": 1}, f"call {at}"
        assert entries(tmp_path) == ["checkpoint"], f"call {at}"
    assert failures > 0
    assert ocp.load(final)["a"] == 2
    assert entries(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("fail", [_fsync, _rename, _mkdir, _write])
def test_a_failing_save_leaves_nothing(
    fail: Callable[[Fault, pytest.MonkeyPatch], None], tmp_path: Path
) -> None:
    """Whichever call fails, neither the checkpoint nor the parents made for it are left."""
    failures = 0
    for at in itertools.count(1):
        fault = Fault(at)
        with pytest.MonkeyPatch.context() as patch:
            fail(fault, patch)
            try:
                ocp.save(tmp_path / "a" / "b" / "checkpoint", {"w": np.arange(5)})
            except errors.CommitError as error:
                assert os.strerror(errno.EIO) in str(error)
                assert str(tmp_path) in str(error)
                failures += 1
            else:
                if fault.calls < at:
                    break
                assert fail is _mkdir
                shutil.rmtree(tmp_path / "a")
        assert entries(tmp_path) == [], f"call {at}"
    assert failures > 0
    assert ocp.load(tmp_path / "a" / "b" / "checkpoint")["w"].tolist() == [0, 1, 2, 3, 4]


def test_a_replaced_checkpoint_that_cannot_be_removed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Past the commit only a warning tells of what could not be cleaned up; the next sweep may."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    with monkeypatch.context() as patch:
        fault = Fault(1)
        patch.setattr(files, "remove_tree", fault.around(files.remove_tree))
        ocp.save(final, {"a": 2}, overwrite=True)
    assert ocp.load(final) == {"a": 2}
    assert any("could not be removed" in record.getMessage() for record in caplog.records)
    (left,) = (path for path in tmp_path.iterdir() if path != final)
    shutil.rmtree(left)


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; its test must end with an empty one, or with checkpoints only."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"mount can't be run: {error}")
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_a_full_disk_is_told_and_harms_nothing(
    use_ocdbt: bool, small_disk: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """ENOSPC names leaf, path and cause; the old checkpoint stays; the engine goes on."""
    final = small_disk / "checkpoint"
    old = {"w": rng.random(1000)}
    ocp.save(final, old)
    before = shutil.disk_usage(small_disk).used
    context = ocp.Context()
    context.array.saving.use_ocdbt = use_ocdbt
    large = {"layer": {"w": rng.random(500_000)}}
    with context:
        for overwrite, where in ((True, final), (False, small_disk / "deep" / "other")):
            with pytest.raises(OSError, match="No space left on device") as caught:
                ocp.save(where, large, overwrite=overwrite)
            assert isinstance(caught.value, errors.WriteError)
            assert caught.value.keypath == "['layer']['w']"
            assert str(where) in str(caught.value)
            assert entries(small_disk) == ["checkpoint"]
            assert shutil.disk_usage(small_disk).used == before
    assert np.array_equal(ocp.load(final)["w"], old["w"])
    ocp.save(tmp_path / "good place", large)
    assert np.array_equal(ocp.load(tmp_path / "good place")["layer"]["w"], large["layer"]["w"])


def test_a_disk_without_room_for_the_documents(small_disk: Path, tmp_path: Path) -> None:
    """Where only small files are written, CommitError names the path and the cause."""
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(errors.CommitError, match="No space left on device") as caught:
        ocp.save(small_disk / "checkpoint", {"s": "only a string"})
    assert str(small_disk / "checkpoint") in str(caught.value)
    assert entries(small_disk) == ["filler"]
    ocp.save(tmp_path / "checkpoint", {"s": "only a string"})


# Many saves at once.


def test_w7_a_second_save_to_one_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a save is under way another one to its path is refused, and does not harm it."""
    opened = threading.Event()
    original = writing.Save._publish

    def held(self: writing.Save) -> str | None:
        opened.wait(30)
        return original(self)

    monkeypatch.setattr(writing.Save, "_publish", held)
    final = tmp_path / "checkpoint"
    first = ocp.save_async(final, {"a": 1})
    with pytest.raises(errors.SaveInProgressError, match=r"(?s)checkpoint is under way.*overwrite"):
        ocp.save_async(f"{final}/", {"a": 2})
    elsewhere = ocp.save_async(tmp_path / "elsewhere", {"a": 3})
    opened.set()
    first.result()
    elsewhere.result()
    assert ocp.load(final) == {"a": 1}
    with pytest.raises(errors.DestinationExistsError):
        ocp.save_async(final, {"a": 4})


def test_w7_overwrites_of_one_path_follow_each_other(tmp_path: Path) -> None:
    """Saves with `overwrite` to one path commit in the order of their calls; the last one stays."""
    final = tmp_path / "checkpoint"
    order: list[int] = []
    responses = []
    for step in range(6):
        responses.append(ocp.save_async(final, {"step": step}, overwrite=True))
        responses[-1].add_done_callback(lambda _, step=step: order.append(step))  # type: ignore[misc]
    for response in reversed(responses):
        response.result()
    assert ocp.load(final) == {"step": 5}
    assert entries(tmp_path) == ["checkpoint"]


def test_w7_a_cancelled_save_does_not_let_the_next_one_pass_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three overwrites the middle one is cancelled; the third still waits for the first."""
    opened = threading.Event()
    original = writing.Save._publish
    published: list[int] = []

    def held(self: writing.Save) -> str | None:
        if self._custom_metadata["step"] == 0:
            opened.wait(30)
        published.append(self._custom_metadata["step"])
        return original(self)

    monkeypatch.setattr(writing.Save, "_publish", held)
    final = tmp_path / "checkpoint"
    first, second, third = (
        ocp.save_async(final, {"step": i}, overwrite=True, custom_metadata={"step": i})
        for i in range(3)
    )
    assert second.cancel()
    with pytest.raises(errors.OperationCancelledError):
        second.result()
    with pytest.raises(TimeoutError):
        third.result(timeout=0.1)
    with pytest.raises(errors.SaveInProgressError):
        ocp.save_async(tmp_path / "checkpoint", {"step": 9})
    opened.set()
    third.result()
    assert first.done()
    assert published == [0, 2]
    assert ocp.load(final) == {"step": 2}
    assert entries(tmp_path) == ["checkpoint"]


def test_w7_a_failed_save_lets_the_next_one_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the first of two saves fails, the second one is made all the same."""
    original = writing.Save._publish

    def fail_first(self: writing.Save) -> str | None:
        if self._custom_metadata:
            raise errors.CommitError("the first one fails")
        return original(self)

    monkeypatch.setattr(writing.Save, "_publish", fail_first)
    final = tmp_path / "checkpoint"
    first = ocp.save_async(final, {"a": 1}, overwrite=True, custom_metadata={"fails": True})
    second = ocp.save_async(final, {"a": 2}, overwrite=True)
    with pytest.raises(errors.CommitError, match="the first one fails"):
        first.result()
    second.result()
    assert ocp.load(final) == {"a": 2}


def test_w6_many_threads_save_and_load_at_once(
    tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """Six threads save and load to paths of their own and one of all, and none gets in the way."""
    rounds = soak(5, 20)
    problems: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for index in range(rounds):
                value = thread * 1000 + index
                state = {"w": np.full(100, value), "j": jnp.full(50, value), "s": str(value)}
                ocp.save(tmp_path / f"{thread}-{index}", state)
                loaded = ocp.load(tmp_path / f"{thread}-{index}")
                assert (loaded["w"] == value).all()
                assert (np.asarray(loaded["j"]) == value).all()
                assert loaded["s"] == str(value)
                ocp.save(tmp_path / "shared", state, overwrite=True)
                shared = ocp.load(tmp_path / "shared")
                assert (shared["w"] == int(shared["s"])).all()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    expected = {f"{thread}-{index}" for thread in range(6) for index in range(rounds)}
    assert set(os.listdir(tmp_path)) == expected | {"shared"}
