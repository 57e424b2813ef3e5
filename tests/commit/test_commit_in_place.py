"""Options of files and atomicity: where a save writes, and what makes that a checkpoint."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orbax_async as ocp
from orbax_async import errors
from orbax_async._api import writing
from orbax_async._commit import atomicity, finalize, places
from orbax_async._storage import files

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
    publish = writing.Save._publish

    def held(self: writing.Save) -> Any:
        arrived.set()
        go_on.wait()
        return publish(self)

    monkeypatch.setattr(writing.Save, "_publish", held)

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


def test_the_proof_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I5: everything else is durable before the metadata, and these before the commit marker."""
    events: list[str] = []
    fsync_file, write_bytes = files.fsync_file, files.write_bytes

    def synced(path: str) -> None:
        events.append(f"sync {os.path.relpath(path, tmp_path)}")
        fsync_file(path)

    def written(path: Any, data: bytes) -> None:
        events.append(f"write {os.path.relpath(path, tmp_path)}")
        write_bytes(path, data)

    monkeypatch.setattr(files, "fsync_file", synced)
    monkeypatch.setattr(files, "write_bytes", written)
    with in_place():
        ocp.save(tmp_path / "parent" / "c", STATE)
    last = events[-9:]
    assert last == [
        "write parent/c/_CHECKPOINT_METADATA",
        "sync parent/c/_CHECKPOINT_METADATA",
        "sync parent/c",
        "write parent/c/commit_success.txt",
        "sync parent/c/commit_success.txt",
        "sync parent/c",
        "sync parent",
        "sync .",
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


FAILURES: dict[str, tuple[Any, str]] = {
    "while writing": (writing.Save, "_make_durable"),
    "at the proof": (finalize, "write_commit_marker"),
    "at the documents": (finalize, "write_root_documents"),
    "while creating": (atomicity, "create"),
}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_what_was_there(
    failure: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: wherever a save in place fails, the old checkpoint is back, or nothing is left."""
    if overwrite:
        ocp.save(tmp_path / "c", OLD)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no more")

    monkeypatch.setattr(*FAILURES[failure], fail)
    with in_place(), pytest.raises(OSError, match="no more"):
        ocp.save(tmp_path / "run" / ".." / "c", STATE, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["c"] * overwrite
    if overwrite:
        loads(tmp_path / "c", OLD)


def test_a_cancelled_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: cancelling an overwrite in place puts the old checkpoint back."""
    ocp.save(tmp_path / "c", OLD)
    arrived, go_on = threading.Event(), threading.Event()
    sync = finalize.sync_files

    def held(*args: Any) -> None:
        arrived.set()
        go_on.wait()
        sync(*args)

    monkeypatch.setattr(finalize, "sync_files", held)
    with in_place():
        response = ocp.save_async(tmp_path / "c", STATE, overwrite=True)
    assert arrived.wait(30)
    assert response.cancel()
    go_on.set()
    with pytest.raises(errors.OperationCancelledError):
        response.result()
    loads(tmp_path / "c", OLD)


# ----------------------------------------------------------------------------- dead processes


def _die(path: str, step: str, overwrite: bool) -> None:
    """Saves in place and dies: before the commit, or between the documents and the proof."""

    def die(*args: Any, **kwargs: Any) -> None:
        os._exit(9)

    if step == "writing":
        writing.Save._make_durable = die  # type: ignore[method-assign]
    else:
        finalize.write_commit_marker = die
    with in_place():
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


@pytest.mark.parametrize("reader", [in_place, ocp.Context])
def test_a_dead_overwrite_gives_the_old_checkpoint_back(
    reader: Callable[[], ocp.Context], tmp_path: Path
) -> None:
    """I4: a load after the writer died finds the old checkpoint, in either mode."""
    ocp.save(tmp_path / "c", OLD)
    die(tmp_path / "c", "writing", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2
    with reader():
        assert np.array_equal(ocp.load(tmp_path / "c")["w"], OLD["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_sweep_puts_the_old_checkpoint_back(tmp_path: Path) -> None:
    """I4: cleaning up beside another save doesn't take what a dead overwrite had set aside."""
    ocp.save(tmp_path / "c", OLD)
    die(tmp_path / "c", "writing", overwrite=True)
    atomicity.sweep(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    loads(tmp_path / "c", OLD)


def test_a_living_owner_is_left_alone(
    tmp_path: Path, paused: Callable[[], contextlib.ExitStack]
) -> None:
    """What a process is still writing in place is neither cleared nor overwritten."""
    with in_place():
        response = ocp.save_async(tmp_path / "c", STATE)
        with paused():
            assert not atomicity.is_abandoned_in_place(str(tmp_path / "c"))
            atomicity.clear_abandoned(str(tmp_path / "c"))
            with pytest.raises(errors.DestinationExistsError):
                writing.check_destination(str(tmp_path / "c"), overwrite=True)
    response.result()
    loads(tmp_path / "c", STATE)


# ------------------------------------------------------------------------- temporary_path_class


class CommitFileTemporaryPath:
    """Has the name of a class of Orbax."""


class AtomicRenameTemporaryPath:
    """Has the name of a class of Orbax."""


class Mine(CommitFileTemporaryPath):
    """Is one of them."""


@pytest.mark.parametrize(
    "kind, place",
    [
        (CommitFileTemporaryPath, places.InPlace),
        (Mine, places.InPlace),
        (AtomicRenameTemporaryPath, places.Beside),
    ],
)
def test_the_older_option_chooses_the_mode(
    kind: type, place: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`temporary_path_class` acts as the mode that it stands for, and warns that it is older."""
    made: list[type] = []
    publish = place.publish
    monkeypatch.setattr(
        place, "publish", lambda self, *a, **k: made.append(type(self)) or publish(self, *a, **k)
    )
    context = ocp.Context()
    with pytest.warns(DeprecationWarning, match="set atomicity.mode = ") as caught:
        context.file.temporary_path_class = kind
    assert caught[0].filename == __file__
    with context:
        ocp.save(tmp_path / "c", STATE)
    assert made == [place]


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
    create = atomicity.create

    def held(*args: Any, **kwargs: Any) -> Any:
        if is_async:
            go_on.wait()
        return create(*args, **kwargs)

    monkeypatch.setattr(atomicity, "create", held)
    with context:
        response = ocp.save_async(tmp_path / "c", STATE)
    if is_async:
        assert not list(tmp_path.iterdir())
    else:
        assert len(list(tmp_path.iterdir())) == 1
    go_on.set()
    response.result()
    loads(tmp_path / "c", STATE)
