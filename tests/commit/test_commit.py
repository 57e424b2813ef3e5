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
from listing import comes_to_hold, entries
from watched_directory import Call, Fault, Log, before, on, watched

import orbax_async as ocp
from orbax_async import _names as names
from orbax_async import errors
from orbax_async._engine import save_pipeline
from orbax_async._storage import array_store, local
from orbax_async._storage.directory import Capability
from orbax_async._storage.local import opened_by

STATE = {"a": jnp.arange(2000.0), "b": np.arange(10), "c": "text", "d": 1}


# I5: durable, then visible, then durably visible.


class Record(list[tuple[str, str]]):
    """Each sync, and each change of names, by path, in order."""

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if call.verb == "sync":
            self.append(("sync", call.path))
        result = proceed()
        if call.verb == "rename" or (call.verb == "exchange" and result):
            self.append(("publish", str(call.target)))
        return result


@pytest.fixture
def record() -> Iterator[Record]:
    """Records what the saves of a test do."""
    found = Record()
    with opened_by(watched(found)):
        yield found


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_i5_everything_is_durable_before_it_is_visible(
    use_ocdbt: bool, overwrite: bool, tmp_path: Path, record: Record
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


def test_i5_the_disk_begins_early_and_every_file_is_synced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
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
    with context, opened_by(watched(record, starting)):
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


def test_i5_a_directory_is_synced_after_what_is_in_it(tmp_path: Path, record: Record) -> None:
    """A file is synced before its directory, and a directory before the one that holds it."""
    ocp.save(tmp_path / "checkpoint", STATE)
    order = [path for kind, path in record if kind == "sync"]
    for position, path in enumerate(order):
        for later in order[position + 1 :]:
            assert os.path.dirname(later) != path, f"{later} was synced after {path}"


def test_i5_parents_that_were_made_are_durable_too(tmp_path: Path, record: Record) -> None:
    """Each new parent's entry is synced before the checkpoint becomes visible."""
    ocp.save(tmp_path / "a" / "b" / "checkpoint", STATE)
    published = record.index(("publish", str(tmp_path / "a" / "b" / "checkpoint")))
    synced_before = [path for _, path in record[:published]]
    assert str(tmp_path) in synced_before
    assert str(tmp_path / "a") in synced_before
    assert record[published + 1 :] == [("sync", str(tmp_path / "a" / "b"))]


def test_i5_the_commit_marker_is_written_last(tmp_path: Path) -> None:
    """The marker that says "committed" follows every other document and all data."""
    seen: list[set[str]] = []

    def look() -> None:
        (temporary,) = tmp_path.iterdir()
        seen.append({str(path.relative_to(temporary)) for path in temporary.rglob("*")})

    log = Log()
    with opened_by(watched(log, before(on("write", path="*/commit_success.txt"), look))):
        ocp.save(tmp_path / "checkpoint", STATE)
    final = tmp_path / "checkpoint"
    assert seen[0] == {
        str(path.relative_to(final))
        for path in final.rglob("*")
        if path.name != "commit_success.txt"
    }
    assert log.paths("write")[-1].endswith("/commit_success.txt")


# I4: old, new, or nothing; never half.


@pytest.fixture(params=["exchange", "set aside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Overwrites in both ways: by exchanging names in one step, and by two renames."""
    if request.param == "set aside":
        monkeypatch.setattr(local, "_renameat2", lambda: None)
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
    way: str, tmp_path: Path
) -> None:
    """W8: up to the commit an overwrite leaves the old checkpoint in its place, and loadable."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    seen: list[Any] = []

    def look() -> None:
        if not seen:
            seen.append(shutil.copytree(final, tmp_path / "seen"))

    with opened_by(watched(before(on("exchange", "rename"), look))):
        ocp.save(final, {"a": 2}, overwrite=True)
    assert [ocp.load(tmp_path / "seen"), ocp.load(final)] == [{"a": 1}, {"a": 2}]


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


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """What came to be at the destination during the save is not overwritten without leave."""
    final = tmp_path / "checkpoint"

    def appear() -> None:
        final.mkdir()
        (final / "theirs.txt").write_text("theirs")

    last = on("write", path="*/commit_success.txt")
    refused = pytest.raises(errors.DestinationExistsError, match="appeared while")
    with opened_by(watched(before(last, appear))), refused:
        ocp.save(final, {"a": 1})
    assert (final / "theirs.txt").read_text() == "theirs"
    assert entries(tmp_path) == ["checkpoint"]


# Faults: the N-th call of something fails.

FAILING = {
    "sync": on("sync"),
    "names": on("rename", "exchange"),
    "make": on("make"),
    "write": on("write"),
    "lock": on("lock"),
}


@pytest.mark.parametrize("failing", FAILING.values(), ids=FAILING)
def test_a_failing_overwrite_changes_nothing(
    failing: Callable[[Call], bool], way: str, tmp_path: Path
) -> None:
    """Whichever call fails, the old checkpoint is in its place, alone, and the next save works."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    for nth in itertools.count(1):
        fault = Fault(errno.EIO, failing, nth=nth)
        with opened_by(watched(fault)):
            try:
                ocp.save(final, {"a": 2, "w": np.arange(5)}, overwrite=True)
            except errors.CommitError as error:
                assert os.strerror(errno.EIO) in str(error)
                assert str(tmp_path) in str(error)
            else:
                break
        assert fault.left == 0
        assert ocp.load(final) == {"a": 1}, f"call {nth}"
        assert entries(tmp_path) == ["checkpoint"], f"call {nth}"
    assert nth > 1
    assert ocp.load(final)["a"] == 2
    assert entries(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("failing", FAILING.values(), ids=FAILING)
def test_a_failing_save_leaves_nothing(failing: Callable[[Call], bool], tmp_path: Path) -> None:
    """Whichever call fails, neither the checkpoint nor the parents made for it are left."""
    for nth in itertools.count(1):
        with opened_by(watched(Fault(errno.EIO, failing, nth=nth))):
            try:
                ocp.save(tmp_path / "a" / "b" / "checkpoint", {"w": np.arange(5)})
            except errors.CommitError as error:
                assert os.strerror(errno.EIO) in str(error)
                assert str(tmp_path) in str(error)
            else:
                break
        assert entries(tmp_path) == [], f"call {nth}"
    assert nth > 1
    assert ocp.load(tmp_path / "a" / "b" / "checkpoint")["w"].tolist() == [0, 1, 2, 3, 4]


def test_f25_what_could_not_be_removed_is_swept_by_the_next_save(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Past the commit only a warning tells of it; this process removes it as soon as it can."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    with opened_by(watched(Fault(errno.EPERM, on("remove")))):
        ocp.save(final, {"a": 2}, overwrite=True)
    assert ocp.load(final) == {"a": 2}
    assert any("could not be removed" in record.getMessage() for record in caplog.records)
    ocp.save(tmp_path / "other", {"a": 3})
    comes_to_hold(tmp_path, "checkpoint", "other")


def test_f25_what_a_deletion_could_not_remove_is_swept_by_the_next_save(tmp_path: Path) -> None:
    """The deletion says where it lies; nobody has to end this process to have it removed."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    told = pytest.raises(errors.CommitError, match="is deleted, but what it held")
    with opened_by(watched(Fault(errno.EPERM, on("remove")))), told:
        ocp.delete(final)
    assert not final.exists() and len(entries(tmp_path)) == 1
    ocp.save(tmp_path / "other", {"a": 3})
    comes_to_hold(tmp_path, "other")


# F26: two faults at once. What is said to be there is there, and nothing else is gone.


@pytest.mark.parametrize("overwrite", [True, False])
def test_f26_a_commit_that_can_not_be_taken_back_says_what_is_visible(
    overwrite: bool, way: str, tmp_path: Path
) -> None:
    """The parent can't be synced, nor the names changed back: the new one stays, and is told of."""
    final = tmp_path / "checkpoint"
    if overwrite:
        ocp.save(final, {"a": 1})
    is_parent = on("sync", path=str(tmp_path))
    unsynced = Fault(errno.EIO, is_parent)
    is_back = on("exchange", "rename")
    stuck = Fault(errno.EPERM, lambda call: unsynced.left == 0 and is_back(call), times=None)
    visible = r"Input/output error\. It can't be taken back either: Operation not permitted\. What"
    visible += " was saved is visible"
    with (
        opened_by(watched(unsynced, stuck)),
        pytest.raises(errors.CommitError, match=visible) as at,
    ):
        ocp.save(final, {"a": 2}, overwrite=overwrite)
    assert ocp.load(final) == {"a": 2}
    if overwrite:
        (old,) = (path for path in tmp_path.iterdir() if path != final)
        assert str(old) in str(at.value)
        assert (old / "state" / "_METADATA").exists()  # nothing of it was removed
    ocp.save(tmp_path / "other", {"a": 3})
    comes_to_hold(tmp_path, "checkpoint", "other")


def test_f26_a_checkpoint_that_can_not_be_put_back_is_found(
    tmp_path: Path,
) -> None:
    """Neither the new one gets the name nor the old one: the error says so, the next load does."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    stuck = Fault(errno.EPERM, on("rename"), nth=2, times=None)
    gone = r"Nothing is visible at .*checkpoint now; what was there before lies at .*-old, and the"
    watching = watched(stuck, lacking=[Capability.EXCHANGE])
    with opened_by(watching), pytest.raises(errors.CommitError, match=gone):
        ocp.save(final, {"a": 2}, overwrite=True)
    assert not final.exists()
    assert ocp.load(final) == {"a": 1}
    assert entries(tmp_path) == ["checkpoint"]


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
