"""Weaknesses of Orbax's Checkpointer that ours does not have, under this project's numbers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from runs import WAIT_SECS, Gate, on_disk, state, steps, until
from watched_directory import Call, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.local import opened_by
from orbax_async.training import Checkpointer
from orbax_async.training import preservation_policies as keep


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run's directory."""
    return tmp_path / "run"


def test_w9_a_save_that_fails_to_begin_wedges_nothing(run: Path) -> None:
    """W9: after a failure before anything is captured, the next save goes on by itself."""
    with Checkpointer(run) as checkpointer:
        for bad in ({}, {"x": object()}):
            with pytest.raises(errors.UnsupportedLeafError):
                checkpointer.save(0, bad)
            assert not checkpointer.is_saving_in_progress()
            assert checkpointer.should_save(0)
        with pytest.raises(errors.NotJsonError):
            checkpointer.save(0, state(0), metrics={"loss": np.float32(1)})
        with pytest.raises(ValueError, match="custom_metadata"):
            checkpointer.save(0, state(0), custom_metadata=[1])
        assert checkpointer.checkpoints == []
        assert checkpointer.save(0, state(0))
        assert steps(checkpointer) == [0]


def test_w16_a_lightweight_start_lists_when_asked(run: Path) -> None:
    """W16: an existing run opens without a look at it, and then does all that others do."""
    with Checkpointer(run) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state(step), metrics=step)
    listed: list[str] = []

    def noting(call: Call, proceed: Callable[[], Any]) -> Any:
        if call.verb == "entries" and threading.current_thread() is threading.main_thread():
            listed.append(call.path)  # saves look around, too
        return proceed()

    with opened_by(watched(noting)):
        checkpointer = Checkpointer(run, lightweight_initialize=True)
        assert listed == []
        assert steps(checkpointer) == [0, 1, 2]
        assert listed == [str(run)]
    assert checkpointer.latest is not None
    assert checkpointer.latest.metrics == 2
    assert checkpointer.latest.time.year >= 2024
    assert checkpointer.save(3, state(3))
    checkpointer.close()


def test_w17_steps_are_integers_of_any_kind(run: Path) -> None:
    """W17: NumPy and jax integers are steps everywhere, and come back as int; others are none."""
    with Checkpointer(run) as checkpointer:
        for step in (np.int64(8), np.uint8(9), jnp.int32(10)):
            assert checkpointer.should_save(step)
            assert checkpointer.save(step, state(8))
            assert checkpointer.load(step)["step"] == 8
        assert [type(each.step) for each in checkpointer.checkpoints] == [int] * 3
        for wrong in (6.5, "8", True, None, np.float32(8)):
            with pytest.raises(TypeError, match="integer"):
                checkpointer.save(wrong, state(0))  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="integer"):
                checkpointer.should_save(wrong)  # type: ignore[arg-type]
        for wrong in (6.5, "8", True):
            with pytest.raises(TypeError, match="integer"):
                checkpointer.load(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="negative"):
            checkpointer.save(-1, state(0))
        assert on_disk(run) == [8, 9, 10]


def test_w18_a_run_changes_the_names_of_its_steps(run: Path) -> None:
    """W18: with a composite format, steps under the old names are listed, loaded and removed."""
    bare = ocp.path.step.standard_name_format()
    padded = ocp.path.step.standard_name_format(step_prefix="step", step_format_fixed_length=4)
    with Checkpointer(run) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step))
    both = ocp.path.step.composite_name_format(padded, [padded, bare])
    policy = keep.LatestN(2)
    with Checkpointer(run, step_name_format=both, preservation_policy=policy) as checkpointer:
        assert steps(checkpointer) == [1, 2]
        assert checkpointer.load(1)["step"] == 1
        assert [each.path.name for each in checkpointer.checkpoints] == ["1", "2"]
        checkpointer.save(3, state(3))
        assert [each.path.name for each in checkpointer.checkpoints] == ["2", "step_0003"]
        with pytest.raises(errors.StepAlreadyExistsError):
            checkpointer.save(2, state(2))
        assert checkpointer.delete(2)
    assert [path.name for path in run.iterdir()] == ["step_0003"]


def test_w19_a_cancelled_save_says_so(run: Path) -> None:
    """W19: the response of a cancelled save raises, and nothing of it stays."""
    with Checkpointer(run) as checkpointer:
        checkpointer.save(0, state(0))
        gate = Gate()
        response = checkpointer.save_checkpointables_async(1, {"gate": gate})
        assert response is not None
        assert gate.reached.wait(WAIT_SECS)
        assert checkpointer.cancel(7) is False
        assert checkpointer.cancel(1) is True
        with pytest.raises(errors.OperationCancelledError):
            response.result()
        until(lambda: not checkpointer.is_saving_in_progress())
        assert steps(checkpointer) == on_disk(run) == [0]
        assert not list(run.glob("*tmp*"))
        assert checkpointer.save(1, state(1))


def test_w19_what_is_committed_stays(run: Path) -> None:
    """W19: cancelling a step that is finished, or all when nothing runs, removes nothing."""
    with Checkpointer(run) as checkpointer:
        checkpointer.save(0, state(0))
        assert checkpointer.cancel(0) is False
        assert checkpointer.cancel() is False
        assert checkpointer.cancel(checkpointer.latest) is False
        assert steps(checkpointer) == on_disk(run) == [0]
        checkpointer.wait()


ASKING: dict[str, Callable[[Checkpointer], Any]] = {
    "save": lambda checkpointer: checkpointer.save(2, state(2)),
    "save_async": lambda checkpointer: checkpointer.save_async(2, state(2)),
    "forced": lambda checkpointer: checkpointer.save(2, state(2), force=True),
    "wait": lambda checkpointer: checkpointer.wait(),
    "close": lambda checkpointer: checkpointer.close(),
}


@pytest.mark.parametrize("name", ASKING)
def test_w20_a_failure_that_nobody_asked_for_is_told_once(name: str, run: Path) -> None:
    """B13.20, W20: the next call raises it, the one after goes on; the step is not there."""
    checkpointer = Checkpointer(run)
    checkpointer.save(0, state(0))
    gate = Gate(failure=RuntimeError("no room"), is_open=True)
    response = checkpointer.save_checkpointables_async(1, {"gate": gate})
    until(response.done)  # type: ignore[union-attr]
    assert checkpointer.latest is not None
    assert checkpointer.latest.step == 0
    with pytest.raises(RuntimeError, match="no room"):
        ASKING[name](checkpointer)
    assert not checkpointer.is_saving_in_progress()
    assert steps(checkpointer) == on_disk(run) == [0]
    if name != "close":
        assert checkpointer.save(1, state(1))
    checkpointer.close()


@pytest.mark.parametrize("name", ASKING)
def test_w20_a_failure_that_was_told_is_not_told_again(name: str, run: Path) -> None:
    """W20: who has heard it from the response does not hear it from the next call."""
    checkpointer = Checkpointer(run)
    gate = Gate(failure=RuntimeError("no room"), is_open=True)
    response = checkpointer.save_checkpointables_async(1, {"gate": gate})
    with pytest.raises(RuntimeError, match="no room"):
        response.result()  # type: ignore[union-attr]
    ASKING[name](checkpointer)
    checkpointer.close()


def test_w20_a_save_waits_for_the_one_before_and_hears_of_its_failure(run: Path) -> None:
    """With one save at a time, a forced one waits, and is not begun if that one failed."""
    checkpointer = Checkpointer(run)
    gate = Gate(failure=RuntimeError("no room"))
    checkpointer.save_checkpointables_async(1, {"gate": gate})
    threading.Timer(0.05, gate.open).start()
    with pytest.raises(RuntimeError, match="no room"):
        checkpointer.save(2, state(2), force=True)
    assert on_disk(run) == []
    assert checkpointer.save(2, state(2))
    checkpointer.close()


def test_w21_the_order_is_that_of_the_steps(run: Path) -> None:
    """W21: whatever the order of saving, an earlier or existing step is not due."""
    with Checkpointer(run) as checkpointer:
        for step in (0, 5, 3):
            checkpointer.save(step, state(step), force=True)
        due = {step: checkpointer.should_save(step) for step in range(8)}
    assert [step for step, is_due in due.items() if is_due] == [6, 7]


def test_w31_a_step_of_another_checkpointer_is_not_overwritten(run: Path) -> None:
    """W31: what another one has saved meanwhile is found, kept, and known from then on."""
    with Checkpointer(run) as first, Checkpointer(run) as second:
        first.save(0, state(100))
        assert second.checkpoints == []
        with pytest.raises(errors.StepAlreadyExistsError, match="Step 0"):
            second.save(0, state(200))
        assert steps(second) == [0]
        assert second.load(0)["step"] == 100
        first.save(1, state(1))
        assert second.load(1)["step"] == 1, "a step that is there is found"
        first.save(2, state(2))
        second.reload()
        assert steps(second) == [0, 1, 2]
        assert second.save(2, state(3), overwrite=True)
        assert first.load(2)["step"] == 3


def test_w31_two_saves_of_one_step_at_once(run: Path) -> None:
    """W31: while one Checkpointer is saving a step, another can't, in the same process."""
    gate = Gate()
    with Checkpointer(run) as first, Checkpointer(run) as second:
        response = first.save_checkpointables_async(0, {"gate": gate, "state": state(1)})
        with pytest.raises(errors.StepAlreadyExistsError):
            second.save(0, state(2))
        with pytest.raises(errors.StepAlreadyExistsError):
            first.save(0, state(2), force=True)
        gate.open()
        assert response is not None and response.result()
        assert first.load(0)["step"] == 1


def test_w31_a_step_that_appears_while_it_is_saved(run: Path, tmp_path: Path) -> None:
    """W31: a step of another process that is committed first stays, and the response tells."""
    ocp.save(tmp_path / "elsewhere", state(1))
    gate = Gate()
    with Checkpointer(run) as checkpointer:
        response = checkpointer.save_checkpointables_async(0, {"gate": gate, "state": state(2)})
        assert gate.reached.wait(WAIT_SECS)
        os.rename(tmp_path / "elsewhere", run / "0")
        gate.open()
        with pytest.raises(errors.StepAlreadyExistsError):
            response.result()  # type: ignore[union-attr]
        assert checkpointer.load(0)["step"] == 1


def test_w38_a_closed_checkpointer_does_nothing(run: Path) -> None:
    """W38: verbs raise ClosedError, closing again is fine, and what is known can be asked for."""
    checkpointer = Checkpointer(run)
    checkpointer.save(0, state(0), metrics=1)
    checkpointer.close()
    checkpointer.close()
    for call in (
        lambda: checkpointer.save(1, state(1)),
        lambda: checkpointer.save_async(1, state(1)),
        lambda: checkpointer.save_checkpointables(1, {"a": state(1)}),
        lambda: checkpointer.save_checkpointables_async(1, {"a": state(1)}),
        lambda: checkpointer.should_save(1),
        lambda: checkpointer.load(0),
        lambda: checkpointer.load_async(0),
        lambda: checkpointer.load_checkpointables(0),
        lambda: checkpointer.load_checkpointables_async(0),
        lambda: checkpointer.metadata(0),
        lambda: checkpointer.checkpointables_metadata(0),
        lambda: checkpointer.root_metadata(),
        lambda: checkpointer.reload(),
        lambda: checkpointer.delete(0),
        lambda: checkpointer.delete_async(0),
        lambda: checkpointer.__enter__(),
    ):
        with pytest.raises(errors.ClosedError, match="closed"):
            call()
    checkpointer.wait()
    assert steps(checkpointer) == on_disk(run) == [0]
    assert checkpointer.latest is not None
    assert checkpointer.latest.metrics == 1
    assert not checkpointer.is_saving_in_progress()
    assert checkpointer.cancel() is False
    assert "closed" in repr(checkpointer)
