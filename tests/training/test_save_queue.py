"""Several saves of a run under way at once, and the end of them all."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import WAIT_SECS, Gate, on_disk, state, steps, until

from orbax_async import errors
from orbax_async.training import Checkpointer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run's directory."""
    return tmp_path / "run"


class Always:
    """A policy that saves every step."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


# Overlap.


def test_saves_overlap_and_commit_in_order(run: Path) -> None:
    """Several are captured while one writes; each commits after the one before it."""
    gates = [Gate() for _ in range(3)]
    done: list[int] = []
    with Checkpointer(run, max_saves_in_flight=3) as checkpointer:
        value = np.zeros(4)
        for step, gate in enumerate(gates):
            value[:] = step
            response = checkpointer.save_checkpointables_async(
                step, {"gate": gate, "s": {"v": value}}
            )
            assert response is not None
            response.on_complete(lambda _, step=step: done.append(step))
        value[:] = -1
        assert gates[0].reached.wait(WAIT_SECS)
        for gate in reversed(gates[1:]):
            assert not gate.reached.is_set()
            gate.open()
        assert checkpointer.checkpoints == []
        gates[0].open()
        checkpointer.wait()
        assert [
            checkpointer.load_checkpointables(step, {"s": None})["s"]["v"][0] for step in range(3)
        ] == [0, 1, 2]
    assert done == [0, 1, 2]


def test_there_is_room_for_so_many_saves(run: Path) -> None:
    """The one that is too many waits for the oldest to end."""
    gates = [Gate() for _ in range(2)]
    checkpointer = Checkpointer(run, max_saves_in_flight=2, save_decision_policy=Always())
    for step, gate in enumerate(gates):
        checkpointer.save_checkpointables_async(step, {"gate": gate})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        third = pool.submit(checkpointer.save_async, 2, state(2))
        with pytest.raises(TimeoutError):
            third.result(timeout=0.05)
        gates[0].open()
        response = third.result(WAIT_SECS)
        assert response is not None
        assert steps(checkpointer) == [0]
        gates[1].open()
        assert response.result()
    checkpointer.close()
    assert on_disk(run) == [0, 1, 2]


def test_the_default_policy_skips_while_there_is_no_room(run: Path) -> None:
    """B13.5: one save at a time; with two, the second is taken and the third is not."""
    for most in (1, 2):
        gates = [Gate() for _ in range(most)]
        with Checkpointer(run / str(most), max_saves_in_flight=most) as checkpointer:
            for step, gate in enumerate(gates):
                assert checkpointer.save_checkpointables_async(step, {"gate": gate}) is not None
            assert checkpointer.is_saving_in_progress()
            assert checkpointer.save_async(most, state(1)) is None
            assert checkpointer.save(most, state(1)) is False
            for gate in gates:
                gate.open()
        assert steps(checkpointer) == list(range(most))


def test_a_failure_in_the_middle_does_not_stop_the_others(run: Path) -> None:
    """Each response tells of its own save; those behind a failed one are written all the same."""
    failing = Gate(is_open=True, failure=RuntimeError("no room"))
    with Checkpointer(run, max_saves_in_flight=3) as checkpointer:
        gate = Gate()
        first = checkpointer.save_checkpointables_async(0, {"gate": gate})
        second = checkpointer.save_checkpointables_async(1, {"gate": failing})
        third = checkpointer.save_async(2, state(2))
        gate.open()
        assert first is not None and second is not None and third is not None
        assert first.result() is True
        assert isinstance(second.exception(), RuntimeError)
        assert third.result() is True
        assert steps(checkpointer) == [0, 2]


def test_a_newer_save_supersedes_those_that_wait(run: Path) -> None:
    """The one that writes goes on; those that wait are cancelled, and say so; the newest stays."""
    checkpointer = Checkpointer(run, max_saves_in_flight=2, supersede_queued=True)
    gate = Gate()
    writing = checkpointer.save_checkpointables_async(0, {"gate": gate})
    responses = [checkpointer.save_async(step, state(step)) for step in (1, 2, 3)]
    assert None not in responses
    gate.open()
    assert writing is not None and writing.result()
    for superseded in responses[:2]:
        with pytest.raises(errors.OperationCancelledError):
            superseded.result()  # type: ignore[union-attr]
    assert responses[2].result()  # type: ignore[union-attr]
    checkpointer.close()
    assert on_disk(run) == steps(checkpointer) == [0, 3]


def test_threads_share_a_checkpointer(run: Path) -> None:
    """Saves and loads from several threads at once: each step is saved once, and whole."""
    refused: list[int] = []

    def save_and_load(step: int) -> None:
        try:
            checkpointer.save(step // 2, state(step // 2), force=True)
        except errors.StepAlreadyExistsError:
            refused.append(step // 2)
        else:
            assert checkpointer.load(step // 2)["step"] == step // 2

    with (
        Checkpointer(run, max_saves_in_flight=3) as checkpointer,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(save_and_load, range(32)))
    assert sorted(refused) == on_disk(run) == list(range(16))


# The end.


def test_closing_waits_for_saves(run: Path) -> None:
    """B13.14: at the end of the block, what was begun is there, also if the block fails."""
    with pytest.raises(ZeroDivisionError), Checkpointer(run) as checkpointer:
        checkpointer.save_async(0, state(0))
        raise ZeroDivisionError
    assert on_disk(run) == steps(checkpointer) == [0]


def test_a_block_that_fails_beside_a_save(run: Path) -> None:
    """The block's own error comes out, with a note on the save's."""
    with pytest.raises(ZeroDivisionError) as caught, Checkpointer(run) as checkpointer:
        gate = Gate(is_open=True, failure=RuntimeError("no room"))
        checkpointer.save_checkpointables_async(0, {"gate": gate})
        raise ZeroDivisionError
    assert any("no room" in note for note in caught.value.__notes__)


def test_a_save_that_began_before_the_end_counts(run: Path) -> None:
    """A save that waits for room when the Checkpointer is closed is refused, not lost silently."""
    checkpointer = Checkpointer(run)
    gate = Gate()
    checkpointer.save_checkpointables_async(0, {"gate": gate})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(checkpointer.save, 1, state(1), force=True)
        until(lambda: checkpointer.is_saving_in_progress() and not waiting.done())
        closing = pool.submit(checkpointer.close)
        until(lambda: "closed" in repr(checkpointer))
        gate.open()
        with pytest.raises(errors.ClosedError):
            waiting.result()
        closing.result()
    assert on_disk(run) == [0]
