"""A job that is about to be preempted saves out of turn."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from runs import WAIT_SECS, on_disk, state, until

from orbax_async.training import Checkpointer, preemption
from orbax_async.training import save_decision_policies as when


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run's directory."""
    return tmp_path / "run"


def test_a_signal_saves_out_of_turn(run: Path) -> None:
    """A notice of preemption saves the step at hand; a handler that was there is called as well."""
    policy = when.AnySavePolicy(
        [when.FixedIntervalPolicy(100), when.PreemptionCheckpointingPolicy()]
    )
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with (
            preemption.watched(),
            Checkpointer(run, save_decision_policy=policy) as checkpointer,
        ):
            assert [checkpointer.save(step, state(step)) for step in range(3)] == [
                True,
                False,
                False,
            ]
            assert not preemption.is_noticed()
            os.kill(os.getpid(), signal.SIGTERM)
            until(preemption.is_noticed)
            assert preemption.noticed_at() == pytest.approx(time.time(), abs=WAIT_SECS)
            assert checkpointer.save(3, state(3))
            assert "Preemption" in str(checkpointer.last_decision)
        assert not preemption.is_noticed()
        assert heard == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: len(heard) == 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_notice_of_jax_saves_out_of_turn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where jax's preemption service runs, it is asked at every step."""
    from jax.experimental import multihost_utils

    class Service:
        def reached_sync_point(self, step: int) -> bool:
            return step == 2

    known = multihost_utils.distributed.global_state  # type: ignore[attr-defined]
    monkeypatch.setattr(known, "client", object())
    monkeypatch.setattr(known, "preemption_sync_manager", Service())
    policy = when.PreemptionCheckpointingPolicy()
    with Checkpointer(run, save_decision_policy=policy) as checkpointer:
        for step in range(4):
            checkpointer.save(step, state(step))
    assert on_disk(run) == [2]
