"""Options of files and atomicity: where a save writes, and what makes that a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listing import comes_to_hold, entries
from watched_directory import Call, Fault, Held, Log, before, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._commit import leftovers, sequence
from orbax_async._commit.commits import MarkerCommit, RenameCommit
from orbax_async._commit.sequence import Destination
from orbax_async._storage.local import LocalDirectory, opened_by

STATE = {"w": np.arange(4)}
OLD = {"w": np.arange(3)}


def in_place(**atomicity_options: Any) -> ocp.Context:
    """Returns a context whose saves write to their destination."""
    context = ocp.Context()
    context.atomicity.mode = "commit_file"
    for name, value in atomicity_options.items():
        setattr(context.atomicity, name, value)
    return context


def loads(path: Path, state: Any) -> None:
    """Compares what both kinds of readers load with a state."""
    for context in (in_place(), ocp.Context()):
        with context:
            assert np.array_equal(ocp.load(path)["w"], state["w"])


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], contextlib.ExitStack]]:
    """Holds each save before it commits; call it to wait until one is there."""
    arrived, go_on = threading.Event(), threading.Event()
    publish = sequence.Save._publish

    def held(self: sequence.Save) -> Any:
        arrived.set()
        go_on.wait()
        return publish(self)

    monkeypatch.setattr(sequence.Save, "_publish", held)

    def wait() -> contextlib.ExitStack:
        assert arrived.wait(30)
        stack = contextlib.ExitStack()
        stack.callback(go_on.set)
        return stack

    yield wait
    go_on.set()


# -------------------------------------------------------------------------------- commit file


def test_a_save_writes_where_it_will_be_read(
    tmp_path: Path, paused: Callable[[], contextlib.ExitStack]
) -> None:
    """COMMIT_FILE: the data lie at the destination before the commit, and nothing lies beside."""
    with in_place():
        response = ocp.save_async(tmp_path / "c", STATE)
    with paused():
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
        assert (tmp_path / "c" / "state" / "manifest.ocdbt").exists()
        assert not (tmp_path / "c" / "commit_success.txt").exists()
        for context in (in_place(), ocp.Context(), in_place(allow_legacy_atomic_rename=True)):
            with context:
                assert not ocp.is_orbax_checkpoint(tmp_path / "c")
                with pytest.raises(errors.InvalidLayoutError):
                    ocp.load(tmp_path / "c")
    response.result()
    loads(tmp_path / "c", STATE)
    assert (tmp_path / "c" / "orbax.checkpoint").read_bytes() == b""


def test_the_proof_comes_last(tmp_path: Path) -> None:
    """I5: all else is durable before the metadata, and these before the commit marker."""
    with in_place(), opened_by(watched(log := Log())):
        ocp.save(tmp_path / "parent" / "c", STATE)
    events = [
        f"{call.verb} {os.path.relpath(call.path, tmp_path)}" for call in log.of("write", "sync")
    ]
    assert events[:3] == [
        "write parent/c/orbax.checkpoint",
        "sync parent/c/orbax.checkpoint",
        "sync parent/c",
    ]
    assert events[-9:] == [
        "sync .",
        "write parent/c/_CHECKPOINT_METADATA",
        "sync parent/c/_CHECKPOINT_METADATA",
        "sync parent/c",
        "write parent/c/commit_success.txt",
        "sync parent/c/commit_success.txt",
        "sync parent/c",
        "sync parent",
        "write parent/c/orbax.checkpoint",
    ]
    assert "sync parent/c/state/manifest.ocdbt" in events[:-9]
    assert "sync parent/c/state" in events[:-9]


def test_readers_in_the_same_mode_ask_for_the_proof(tmp_path: Path) -> None:
    """A checkpoint without the marker is refused, unless it may have been renamed into place."""
    ocp.save(tmp_path / "c", STATE)
    with in_place():
        assert ocp.is_orbax_checkpoint(tmp_path / "c")  # ours have the marker in every mode
    (tmp_path / "c" / "commit_success.txt").unlink()
    assert np.array_equal(ocp.load(tmp_path / "c")["w"], STATE["w"])
    with in_place():
        assert not ocp.is_orbax_checkpoint(tmp_path / "c")
        for read in (ocp.load, ocp.load_checkpointables, ocp.metadata):
            with pytest.raises(errors.InvalidLayoutError, match="allow_legacy_atomic_rename"):
                read(tmp_path / "c")
    with in_place(allow_legacy_atomic_rename=True):
        assert ocp.is_orbax_checkpoint(tmp_path / "c")
        assert np.array_equal(ocp.load(tmp_path / "c")["w"], STATE["w"])


@pytest.mark.parametrize("mode", ["auto", "atomic_rename"])
def test_other_modes_rename(
    mode: str, tmp_path: Path, paused: Callable[[], contextlib.ExitStack]
) -> None:
    """AUTO, on a local file system, and ATOMIC_RENAME write beside the destination."""
    context = ocp.Context()
    context.atomicity.mode = mode  # type: ignore[assignment]
    with context:
        response = ocp.save_async(tmp_path / "c", STATE)
    with paused():
        (path,) = tmp_path.iterdir()
        assert ".orbax-checkpoint-tmp-" in path.name
    response.result()
    loads(tmp_path / "c", STATE)


def test_an_existing_checkpoint_is_refused(tmp_path: Path) -> None:
    """COMMIT_FILE: without overwrite=True what is there stays, also if it is found late."""
    with in_place() as context:
        ocp.save(tmp_path / "c", OLD)
        with pytest.raises(errors.DestinationExistsError):
            ocp.save_async(tmp_path / "c", STATE)
        late = ocp.Context(context)
        late.file.skip_sync_file_validations = True
        with late, pytest.raises(errors.DestinationExistsError):
            ocp.save_async(tmp_path / "c", STATE).result()
        with pytest.raises(errors.DestinationExistsError, match="is no checkpoint"):
            (tmp_path / "other").mkdir()
            (tmp_path / "other" / "file").touch()
            ocp.save(tmp_path / "other", STATE, overwrite=True)
    loads(tmp_path / "c", OLD)


def test_an_overwrite_replaces(tmp_path: Path) -> None:
    """COMMIT_FILE: the new checkpoint takes the old one's place, and nothing else stays."""
    with in_place():
        ocp.save(tmp_path / "c", OLD)
        for _ in range(2):
            ocp.save(tmp_path / "c", STATE, overwrite=True)
    loads(tmp_path / "c", STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


FAILURES = {
    "while writing": on("sync", path="*/state"),
    "at the proof": on("write", path="*/commit_success.txt"),
    "at the documents": on("write", path="*/_CHECKPOINT_METADATA"),
    "while creating": on("make", path="*/c*"),
    "at the owner": on("write", path="*/orbax.checkpoint"),
}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("failing", FAILURES.values(), ids=FAILURES)
def test_a_failure_leaves_what_was_there(
    failing: Callable[[Call], bool], overwrite: bool, tmp_path: Path
) -> None:
    """I4: wherever a save in place fails, the old checkpoint is there, or nothing is left."""
    if overwrite:
        ocp.save(tmp_path / "c", OLD)
    told = pytest.raises(errors.CommitError, match="No space left")
    with in_place(), opened_by(watched(Fault(errno.ENOSPC, failing))), told:
        ocp.save(tmp_path / "run" / ".." / "c", STATE, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["c"] * overwrite
    if overwrite:
        loads(tmp_path / "c", OLD)


def test_a_cancelled_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: an overwrite that is cancelled has touched nothing."""
    ocp.save(tmp_path / "c", OLD)
    arrived, go_on = threading.Event(), threading.Event()
    sync = sequence.Save._sync

    def held(*args: Any) -> None:
        arrived.set()
        go_on.wait()
        sync(*args)

    monkeypatch.setattr(sequence.Save, "_sync", held)
    with in_place():
        response = ocp.save_async(tmp_path / "c", STATE, overwrite=True)
    assert arrived.wait(30)
    loads(tmp_path / "c", OLD)
    assert response.cancel()
    go_on.set()
    with pytest.raises(errors.OperationCancelledError):
        response.result()
    loads(tmp_path / "c", OLD)


@pytest.mark.parametrize("reader", [in_place, ocp.Context])
def test_f1_the_old_checkpoint_is_there_while_it_is_overwritten(
    reader: Callable[[], ocp.Context], tmp_path: Path
) -> None:
    """I4: an overwrite hides nothing in this mode either, up to the moment of its commit."""
    held = Held(on("exchange", "rename"))
    with in_place():
        ocp.save(tmp_path / "c", OLD)
        with opened_by(watched(held)):
            response = ocp.save_async(tmp_path / "c", STATE, overwrite=True)
    assert held.is_reached.wait(30)
    with reader():
        assert np.array_equal(ocp.load(tmp_path / "c")["w"], OLD["w"])
    held.is_released.set()
    response.result()
    loads(tmp_path / "c", STATE)


def test_f26_a_first_save_that_can_not_be_taken_back_says_that_it_is_visible(
    tmp_path: Path,
) -> None:
    """The proof can't be synced, nor removed again: the checkpoint stays, and the error says so."""
    proof = on("sync", "remove", path="*/commit_success.txt")
    told = pytest.raises(errors.CommitError, match=r"can't be taken back either.* is visible at")
    with in_place(), opened_by(watched(Fault(errno.EIO, proof, times=None))), told:
        ocp.save(tmp_path / "c", STATE)
    loads(tmp_path / "c", STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_f26_a_save_that_can_not_be_undone_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """What could neither be finished nor hidden is removed where it is."""
    with in_place():
        failing = Fault(errno.EIO, on("write", path="*/commit_success.txt"))
        stuck = Fault(errno.EPERM, on("rename"), times=None)
        with opened_by(watched(failing, stuck)), pytest.raises(errors.CommitError):
            ocp.save(tmp_path / "c", STATE)
        assert not list(tmp_path.iterdir())
        ocp.save(tmp_path / "c", STATE)
    loads(tmp_path / "c", STATE)


# ----------------------------------------------------------------------------- dead processes


def _die(path: str, step: str, overwrite: bool) -> None:
    """Saves in place and dies: before the commit, or between the documents and the proof."""

    def die(*args: Any, **kwargs: Any) -> None:
        os._exit(9)

    if step == "writing":
        sequence.Save._make_durable = die  # type: ignore[method-assign]
    watcher = before(on("write", path="*/commit_success.txt"), die)
    with in_place(), opened_by(watched(watcher)):
        ocp.save(path, STATE, overwrite=overwrite)


def die(path: Path, step: str, *, overwrite: bool = False) -> None:
    """Lets another process die in the middle of a save."""
    child = multiprocessing.get_context("spawn").Process(
        target=_die, args=(str(path), step, overwrite)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 9


@pytest.mark.parametrize("step", ["writing", "proof"])
def test_a_dead_save_gives_way(step: str, tmp_path: Path) -> None:
    """What a dead process had written in place is no checkpoint; the next save clears it."""
    die(tmp_path / "c", step)
    assert (tmp_path / "c").exists()
    with in_place(), pytest.raises(errors.InvalidLayoutError):
        ocp.load(tmp_path / "c")
    with in_place():
        ocp.save(tmp_path / "c", STATE)
    loads(tmp_path / "c", STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("step", ["writing", "proof"])
def test_a_dead_overwrite_leaves_the_old_checkpoint(step: str, tmp_path: Path) -> None:
    """I4: a load after the writer died finds the old checkpoint; the next save sweeps the rest."""
    ocp.save(tmp_path / "c", OLD)
    die(tmp_path / "c", step, overwrite=True)
    assert len(entries(tmp_path)) == 2
    loads(tmp_path / "c", OLD)
    ocp.save(tmp_path / "d", OLD)
    comes_to_hold(tmp_path, "c", "d")
    loads(tmp_path / "c", OLD)


def test_a_living_owner_is_left_alone(
    tmp_path: Path, paused: Callable[[], contextlib.ExitStack]
) -> None:
    """What a process is still writing in place is neither cleared nor overwritten."""
    with in_place():
        response = ocp.save_async(tmp_path / "c", STATE)
        with paused():
            final = LocalDirectory(str(tmp_path / "c"))
            leftovers.clear(final)
            leftovers.clear(final, is_in_place=True)
            for overwrite in (True, False):
                destination = Destination(final, overwrite, True, lambda _: True)
                with pytest.raises(errors.DestinationExistsError, match="being written"):
                    destination.check()
    response.result()
    loads(tmp_path / "c", STATE)


def test_a_late_owner_publishes_nothing(
    tmp_path: Path, paused: Callable[[], contextlib.ExitStack]
) -> None:
    """A save that was taken for dead, and replaced, fails; what has taken its place is whole."""
    with in_place():
        late = ocp.save_async(tmp_path / "c", STATE)
        with paused():
            (tmp_path / "c").rename(tmp_path / "elsewhere")  # as by a sweep of another machine
            shutil.copytree(saved(tmp_path), tmp_path / "c")
        with pytest.raises(errors.CommitError, match="taken it for dead"):
            late.result()
    loads(tmp_path / "c", OLD)


def saved(folder: Path) -> Path:
    """Returns a checkpoint of another process, which no fixture holds."""
    code = "import sys, numpy, orbax_async as ocp; ocp.save(sys.argv[1], {'w': numpy.arange(3)})"
    path = folder / "other"
    environment = os.environ | {"PYTHONPATH": str(Path(ocp.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
    return path


# ------------------------------------------------------------------------- temporary_path_class


class CommitFileTemporaryPath:
    """Has the name of a class of Orbax."""


class AtomicRenameTemporaryPath:
    """Has the name of a class of Orbax."""


class Mine(CommitFileTemporaryPath):
    """Is one of them."""


@pytest.mark.parametrize(
    "kind, commit",
    [
        (CommitFileTemporaryPath, MarkerCommit),
        (Mine, MarkerCommit),
        (AtomicRenameTemporaryPath, RenameCommit),
    ],
)
def test_the_older_option_chooses_the_mode(
    kind: type, commit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`temporary_path_class` acts as the mode that it stands for, and warns that it is older."""
    made: list[type] = []
    publish = commit.publish
    monkeypatch.setattr(
        commit, "publish", lambda self, *a, **k: made.append(type(self)) or publish(self, *a, **k)
    )
    context = ocp.Context()
    with pytest.warns(DeprecationWarning, match="set atomicity.mode = ") as caught:
        context.file.temporary_path_class = kind
    assert caught[0].filename == __file__
    with context:
        ocp.save(tmp_path / "c", STATE)
    assert made == [commit]


def test_the_two_options_must_agree(tmp_path: Path) -> None:
    """Asking for different modes by the older and the newer option is refused by the call."""
    context = in_place()
    with pytest.warns(DeprecationWarning):
        context.file.temporary_path_class = AtomicRenameTemporaryPath
    with context, pytest.raises(ValueError, match=r"temporary_path_class.*atomicity.mode"):
        ocp.save_async(tmp_path / "c", STATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, error", [(Path, ValueError), ("CommitFile", TypeError)])
def test_other_classes_are_refused(kind: Any, error: type[Exception]) -> None:
    """A class that stands for no mode is refused where it is assigned."""
    with pytest.raises(error, match=r"FileOptions\.temporary_path_class"):
        ocp.Context().file.temporary_path_class = kind


# ------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize("mode", ["commit_file", "atomic_rename"])
def test_permission_bits_are_those_asked_for(mode: str, tmp_path: Path) -> None:
    """B8.6: `path_permission_mode` is that of the checkpoint's directory, whatever the umask."""
    context = ocp.Context()
    context.atomicity.mode = mode  # type: ignore[assignment]
    context.file.path_permission_mode = 0o751
    before = os.umask(0o077)
    try:
        with context:
            ocp.save(tmp_path / "c", STATE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o751
    assert stat.S_IMODE((tmp_path / "c" / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", ["commit_file", "atomic_rename"])
@pytest.mark.parametrize("is_async", [True, False])
def test_directories_may_be_awaited(
    mode: str, is_async: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B8.7: without asynchronous creation the directory is there when `save_async` returns."""
    context = ocp.Context()
    context.atomicity.mode = mode  # type: ignore[assignment]
    context.asynchronous.create_directories_asynchronously = is_async
    go_on = threading.Event()
    begin = sequence.Save._begin

    def held(self: sequence.Save) -> None:
        if is_async:
            go_on.wait()
        begin(self)

    monkeypatch.setattr(sequence.Save, "_begin", held)
    with context:
        response = ocp.save_async(tmp_path / "c", STATE)
    if is_async:
        assert not list(tmp_path.iterdir())
    else:
        assert len(list(tmp_path.iterdir())) == 1
    go_on.set()
    response.result()
    loads(tmp_path / "c", STATE)
