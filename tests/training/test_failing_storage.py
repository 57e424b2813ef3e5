"""Storage that fails under a run: every call of it, with every verb of the Checkpointer (F23)."""

from __future__ import annotations

import contextlib
import datetime
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import on_disk, state, steps
from watched_directory import Call, Fault, Log, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.local import opened_by
from orbax_async.training import Checkpointer, retirement
from orbax_async.training import preservation_policies as keep


def opened(run: Path, **arguments: Any) -> Checkpointer:
    """Goes on with a run whose policies ask for the times and metrics of all steps."""
    policy = keep.AnyPreservationPolicy(
        [
            keep.LatestDuration(datetime.timedelta(days=1)),
            keep.BestN(get_metric_fn=lambda metrics: metrics["loss"], n=1),
        ]
    )
    return Checkpointer(run, preservation_policy=policy, **arguments)


VERBS: dict[str, Callable[[Checkpointer], Any]] = {
    "save": lambda checkpointer: checkpointer.save(9, state(9), metrics={"loss": 0}),
    "overwrite": lambda checkpointer: checkpointer.save(
        2, state(9), overwrite=True, metrics={"loss": 0}
    ),
    "load": lambda checkpointer: checkpointer.load(1),
    "load the latest": lambda checkpointer: checkpointer.load(),
    "load what is not listed": lambda checkpointer: checkpointer.load(0),
    "metadata": lambda checkpointer: checkpointer.metadata(),
    "root_metadata": lambda checkpointer: checkpointer.root_metadata(),
    "reload": lambda checkpointer: checkpointer.reload(),
    "delete": lambda checkpointer: checkpointer.delete(1),
    "times": lambda checkpointer: [each.time for each in checkpointer.checkpoints],
    "metrics": lambda checkpointer: [each.metrics for each in checkpointer.checkpoints],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps; the first is not listed by who opened it before."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with Checkpointer(run, custom_metadata={"seed": 1}) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state(step), metrics={"loss": step})
    return run


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    monkeypatch.setattr(retirement, "_RETRY_SECS", (0.001, 0.001))


def may_fail(call: Call) -> bool:
    """Says whether a call asks the storage for anything."""
    return call.verb != "kvstore"


@contextlib.contextmanager
def copied(whole: Path, run: Path) -> Iterator[Checkpointer]:
    """Opens a copy of a run; a step of it has come since, and is not listed."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("0"))
    checkpointer = opened(run)
    shutil.copytree(whole / "0", run / "0", dirs_exist_ok=True)
    yield checkpointer
    with contextlib.suppress(errors.CheckpointError):
        checkpointer.close()


@pytest.mark.leaves_temporaries
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("verb", VERBS)
def test_every_failure_is_an_error_of_ours(verb: str, whole: Path, tmp_path: Path) -> None:
    """F23: it names a path and the cause; what is committed is listed, and the run goes on."""
    run = tmp_path / "run"
    with copied(whole, run) as checkpointer, opened_by(watched(log := Log())):
        VERBS[verb](checkpointer)
    count = sum(map(may_fail, log.calls))
    for nth in range(1, count + 1):
        with copied(whole, run) as checkpointer:
            with opened_by(watched(Fault([errno.EACCES, errno.EIO][nth % 2], may_fail, nth=nth))):
                try:
                    VERBS[verb](checkpointer)
                except errors.CheckpointError as error:
                    assert str(run) in errors.with_notes(error), (nth, error)
                checkpointer.wait()
            checkpointer.reload()
            assert steps(checkpointer) == on_disk(run)
            assert checkpointer.load(2)["step"] in (2, 9)


def test_opening_a_run_fails_with_an_error_of_ours(whole: Path, tmp_path: Path) -> None:
    """F23: each call of the storage while a run is opened for the first time, or again."""
    for origin in (None, whole):
        run, nth, fault = tmp_path / "run", 0, Fault(errno.EIO, may_fail)
        while nth == 0 or fault.left == 0:
            nth += 1
            shutil.rmtree(run, ignore_errors=True)
            if origin is not None:
                shutil.copytree(origin, run)
            fault = Fault(errno.EIO, may_fail, nth=nth)
            with opened_by(watched(fault)), contextlib.suppress(errors.CheckpointError):
                opened(run, custom_metadata={"seed": 2}, cleanup_tmp_directories=True)
        said = opened(run).root_metadata().custom_metadata
        assert said == {"seed": 2 if origin is None else 1}
        assert nth > 5


@pytest.mark.parametrize("document", ["_CHECKPOINT_METADATA", "metrics/metrics"])
def test_a_step_whose_documents_can_not_be_read_is_saved_all_the_same(
    document: str, tmp_path: Path
) -> None:
    """F23: nobody asked for them, so nobody is told; who asks hears of it, and nothing goes."""
    fault = Fault(errno.EIO, on("read", path=f"*/run/[01]/{document}"), times=None)
    with opened_by(watched(fault)), Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.save(0, state(0), metrics={"loss": 1}) is True
        assert steps(checkpointer) == [0]
        with pytest.raises(errors.UnreadableError, match="Input/output error"):
            _ = checkpointer.checkpoints[0].time, checkpointer.checkpoints[0].metrics
    with opened_by(watched(fault)), opened(tmp_path / "run") as checkpointer:
        response = checkpointer.save_async(1, state(1), metrics={"loss": 1})
        assert response is not None
        with pytest.raises(errors.UnreadableError) as caught:
            response.result()
        assert caught.value.__notes__ == ["step 1 is saved, and nothing was removed"]
        assert steps(checkpointer) == [0, 1]
    assert ocp.load(tmp_path / "run" / "1")["step"] == 1
