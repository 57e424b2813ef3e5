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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from listing import entries
from watched_directory import Call, watched

import orbax_async as ocp
from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import atomicity
from orbax_async._engine import save_pipeline
from orbax_async._storage import array_store, files
from orbax_async._storage.openers import opened_by

STATE = {"a": jnp.arange(2000.0), "b": np.arange(10), "c": "text", "d": 1}


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
def test_i5_the_disk_begins_early_and_every_file_is_synced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: list[tuple[str, str]]
) -> None:
    """Writing back begins as large data files come, and each file is synced once, at the end."""
    monkeypatch.setattr(save_pipeline, "_WRITTEN_BACK_NBYTES", 0)
    monkeypatch.setattr(array_store, "_LARGE_FILE_NBYTES", 256 << 10)
    started: dict[str, int] = {}

    def starting(call: Call, proceed: Callable[[], Any]) -> Any:
        if call.verb == "start_writeback" and not call.path.endswith(".__lock"):
            started[call.path] = len(record)  # else it is being written, and told of again
        return proceed()

    final, context = tmp_path / "checkpoint", ocp.Context()
    context.memory.write_concurrent_bytes = 1 << 20  # a batch for each
    context.array.saving.use_compression = False
    with context, opened_by(watched(starting)):
        ocp.save(final, {name: np.full(1 << 18, ord(name), np.float32) for name in "abcd"})
    synced = [path for kind, path in record if kind == "sync"]
    temporary = next(path for path in synced if names.TEMPORARY_MARK in path)
    root = temporary[: temporary.index("/", temporary.index(names.TEMPORARY_MARK))]
    expected = [root + str(path)[len(str(final)) :] for path in (final, *final.rglob("*"))]
    assert sorted(synced) == sorted([*expected, str(tmp_path)])
    large = [path for path in synced if os.path.dirname(path).endswith("/d")]
    large = [p for p in large if (final / p[len(root) + 1 :]).stat().st_size >= 256 << 10]
    assert len(large) >= 4
    assert started == dict.fromkeys(large, 0)  # before anything was synced


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
