"""Workers let others have the GIL while they work through many items, and few fill batches."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import orbax_async as ocp
from orbax_async._engine import gil, save_pipeline
from orbax_async._engine import leaf as leaves


class Clock:
    """The time, how often the thread has waited, and when it paused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 0.0, 0
        self.paused: list[tuple[float, float]] = []
        monkeypatch.setattr(gil, "time", self)
        monkeypatch.setattr(gil, "_never", self)
        monkeypatch.setattr(gil, "_waits", lambda: self.waits)

    def perf_counter(self) -> float:
        return self.now

    def wait(self, secs: float) -> None:
        self.paused.append((round(self.now * 1e3, 2), secs))
        self.now += max(secs, 1e-4)
        self.waits += 1


def test_a_sliced_loop_lets_others_have_the_gil_every_millisecond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It yields all items, and sleeps a moment between two where a millisecond has passed."""
    clock, items = Clock(monkeypatch), []
    for item in gil.sliced(range(8)):
        items.append(item)
        clock.now += 0.00051
    assert items == list(range(8))
    assert [at for at, _ in clock.paused] == [1.02, 2.14, 3.26]  # none at the end
    assert all(0 < secs < 1e-3 for _, secs in clock.paused)


def test_a_sliced_loop_that_has_waited_does_not_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had to wait for the GIL has let others have it: only milliseconds without count."""
    clock = Clock(monkeypatch)
    for item in gil.sliced(range(8)):
        clock.now += 0.0051
        clock.waits += item < 6
    assert [at for at, _ in clock.paused] == [35.7]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count a thread's waits")
def test_a_pause_is_a_wait_that_is_counted() -> None:
    """A thread that has paused has waited once more."""
    before = gil._waits()
    gil._never.wait(gil._PAUSE_SECS)
    assert gil._waits() > before


@pytest.mark.parametrize("together", [1, 2])
def test_no_more_batches_are_filled_at_a_time_than_is_said(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several workers at it would wait for each other's GIL."""
    filled, peak = 0, 0

    def fill(pipeline: Any, store: Any, batch: Any, pieces: Any) -> Any:
        nonlocal filled, peak
        filled += 1
        peak = max(peak, filled)
        time.sleep(0.1)  # for another worker to come along
        filled -= 1
        return original(pipeline, store, batch, pieces)

    original = save_pipeline.SavePipeline._fill
    monkeypatch.setattr(save_pipeline.SavePipeline, "_fill", fill)
    monkeypatch.setattr(save_pipeline, "_FILLED_AT_ONCE", together)
    monkeypatch.setattr(leaves, "_BATCH_NBYTES", 1 << 18)
    ocp.save(tmp_path / "checkpoint", [jnp.full(1 << 16, i, jnp.float32) for i in range(6)])
    assert (filled, peak) == (0, together)
    assert [leaf[0] for leaf in ocp.load(tmp_path / "checkpoint")] == list(range(6))
