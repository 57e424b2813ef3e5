"""Old steps go in the background: nobody waits, nothing is lost, nothing stays."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import WAIT_SECS, Gate, on_disk, state, steps, until
from watched_directory import Fault, Log, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._storage.local import opened_by
from orbax_async.training import Checkpointer, retirement
from orbax_async.training import preservation_policies as keep


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run's directory."""
    return tmp_path / "run"


@pytest.fixture
def held_removal(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Removing files waits until the event is set."""
    event = threading.Event()
    remove_some = retirement._remove_some

    def held(removing: Any) -> bool:
        assert event.wait(WAIT_SECS)
        return remove_some(removing)

    monkeypatch.setattr(retirement, "_remove_some", held)
    yield event
    event.set()


def test_nobody_waits_for_files_to_be_removed(run: Path, held_removal: threading.Event) -> None:
    """A save is done, and its old step out of sight, while no file is removed; closing waits."""
    checkpointer = Checkpointer(run, preservation_policy=keep.LatestN(1))
    for step in range(4):
        assert checkpointer.save(step, state(step))
        assert steps(checkpointer) == [step]
        checkpointer.wait()
    assert on_disk(run) == [3]
    hidden = [path for path in run.iterdir() if ".orbax-checkpoint-tmp" in path.name]
    assert sorted(int(path.name.split(".")[0]) for path in hidden) == [0, 1, 2]
    assert not any(ocp.is_orbax_checkpoint(path) for path in hidden)
    with pytest.raises(errors.StepNotFoundError):
        checkpointer.load(2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        closing = pool.submit(checkpointer.close)
        with pytest.raises(TimeoutError):
            closing.result(timeout=0.05)
        held_removal.set()
        closing.result(WAIT_SECS)
    assert [path.name for path in run.iterdir()] == ["3"]


class Reader(Gate):
    """An object whose loading waits at the gate."""

    async def load(self, directory: Any) -> Any:
        return self._write(PathThatIsThere(directory))


class PathThatIsThere:
    def __init__(self, path: Path) -> None:
        self._path = path

    async def await_creation(self) -> Path:
        return self._path


def test_a_step_stays_while_it_is_loaded(run: Path) -> None:
    """A step that is superfluous goes once those who read it are done; others don't wait."""
    with Checkpointer(run, preservation_policy=keep.LatestN(1)) as checkpointer:
        checkpointer.save_checkpointables(0, {"object": Gate(is_open=True), "state": state(0)})
        reader = Reader()
        loading = checkpointer.load_checkpointables_async(0, {"object": reader, "state": None})
        assert reader.reached.wait(WAIT_SECS)
        assert checkpointer.save(1, state(1))
        assert steps(checkpointer) == [1]
        with pytest.raises(errors.StepNotFoundError, match="being removed"):
            checkpointer.load(0)
        assert on_disk(run) == [0, 1]
        reader.open()
        assert loading.result()["state"]["step"] == 0
    assert on_disk(run) == [1]


def test_a_step_that_went_can_come_again(run: Path, held_removal: threading.Event) -> None:
    """A step that is being removed can be saved anew at once."""
    with Checkpointer(run, preservation_policy=keep.LatestN(1)) as checkpointer:
        for step in (0, 1):
            checkpointer.save(step, state(step))
        checkpointer.save(0, state(10), force=True)
        assert steps(checkpointer) == [1], "it is not among the latest"
        checkpointer.save(1, state(11), overwrite=True)
        assert checkpointer.load()["step"] == 11
        held_removal.set()


@pytest.fixture
def run_of_one(run: Path) -> Path:
    """A run with one step, which is saved before anything fails."""
    with Checkpointer(run) as checkpointer:
        checkpointer.save(0, state(0))
    return run


def keeping_one(run: Path) -> Checkpointer:
    """Goes on with a run, and gives up all steps but the latest."""
    return Checkpointer(run, preservation_policy=keep.LatestN(1))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    monkeypatch.setattr(retirement, "_RETRY_SECS", (0.01, 0.01))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "call",
    [("rename", "0"), ("remove", "0.orbax*/_CHECKPOINT_METADATA"), ("remove", "0.orbax*-new")],
    ids=["the step", "a file", "the directory"],
)
def test_a_removal_is_tried_again(call: tuple[str, str], run_of_one: Path) -> None:
    """A failure to rename or to remove that passes leaves nothing behind."""
    fault = Fault(errno.EACCES, on(call[0], path=f"{run_of_one}/{call[1]}"), times=2)
    with opened_by(watched(fault)), keeping_one(run_of_one) as checkpointer:
        checkpointer.save(1, state(1))
    assert fault.left == 0
    assert [path.name for path in run_of_one.iterdir()] == ["1"]


@pytest.mark.usefixtures("impatient")
def test_a_step_that_can_not_be_removed_stays(
    run_of_one: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where renaming fails for good, the step is listed again, and removed after the next save."""
    fault = Fault(errno.EACCES, on("rename", path=f"{run_of_one}/0"), times=None)
    with opened_by(watched(fault)), keeping_one(run_of_one) as checkpointer:
        checkpointer.save(1, state(1))
        checkpointer.wait()
        until(lambda: steps(checkpointer) == [0, 1])
        assert any("step 0 was to be removed" in line for line in caplog.messages)
        assert checkpointer.load(0)["step"] == 0
        fault.end()
        checkpointer.save(2, state(2))
        assert steps(checkpointer) == [2]
    assert [path.name for path in run_of_one.iterdir()] == ["2"]


@pytest.mark.usefixtures("impatient")
def test_a_step_that_is_not_durably_out_of_sight_comes_back(run_of_one: Path) -> None:
    """I5: where its new name can't be made durable it gets the old one again; then it goes."""
    log = Log()
    is_renamed = on("rename", path=f"{run_of_one}/0")
    fault = Fault(errno.EIO, lambda call: call.verb == "sync" and any(map(is_renamed, log.calls)))
    with opened_by(watched(log, fault)), keeping_one(run_of_one) as checkpointer:
        checkpointer.save(1, state(1))
    assert fault.left == 0
    assert [call.path == f"{run_of_one}/0" for call in log.calls if is_renamed(call)] == [
        True,
        False,  # back again
        True,
    ]
    assert [path.name for path in run_of_one.iterdir()] == ["1"]


@pytest.mark.usefixtures("impatient")
def test_files_that_can_not_be_removed_are_left_to_the_next_time(
    run_of_one: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They stay out of sight, with a line in the log, and go with the next step that goes."""
    fault = Fault(errno.EACCES, on("remove", path=f"{run_of_one}/0.orbax*"), times=None)
    with opened_by(watched(fault)), keeping_one(run_of_one) as checkpointer:
        checkpointer.save(1, state(1))
        until(lambda: any("can't be removed" in line for line in caplog.messages))
        fault.end()
        assert on_disk(run_of_one) == [1]
        checkpointer.save(2, state(2))
    assert [path.name for path in run_of_one.iterdir()] == ["2"]


def test_a_removal_that_a_crash_interrupted_is_resumed(run: Path) -> None:
    """What a dead process had put out of sight is removed after the next save."""
    with Checkpointer(run) as checkpointer:
        checkpointer.save(0, state(0))
    os.rename(run / "0", leftovers.temporary_path(str(run / "0")))  # that nobody holds
    with Checkpointer(run) as checkpointer:
        assert checkpointer.checkpoints == []
        checkpointer.save(1, state(1))
        until(lambda: [path.name for path in run.iterdir()] == ["1"])
