"""Workers let others have the GIL: while they work through many items, and between batches."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import anyio
import jax.numpy as jnp
import pytest

import orbax_async as ocp
from orbax_async._engine import loop
from orbax_async.handlers import saving


class Clock:
    """The time, how long the thread computed, how often it has waited, and when it paused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.computed, self.waits = 0.0, 0.0, 0
        self.paused: list[tuple[float, float]] = []
        monkeypatch.setattr(loop, "time", self)
        monkeypatch.setattr(loop, "_waits", lambda: self.waits)

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.computed

    def sleep(self, secs: float) -> None:
        self.paused.append((round(self.now * 1e3, 2), secs))
        self.now += 1e-4
        self.waits += 1


def test_a_sliced_loop_lets_others_have_the_gil_every_millisecond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It yields all items, and sleeps a moment between two where a millisecond has passed."""
    clock, items = Clock(monkeypatch), []
    for item in loop.sliced(range(8)):
        items.append(item)
        clock.now += 0.00051
    assert items == list(range(8))
    assert [at for at, _ in clock.paused] == [1.02, 2.14, 3.26]  # none at the end
    assert all(0 < secs < 1e-3 for _, secs in clock.paused)


def test_a_sliced_loop_that_has_waited_does_not_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had to wait for the GIL has let others have it: only milliseconds without count."""
    clock = Clock(monkeypatch)
    for item in loop.sliced(range(8)):
        clock.now += 0.0051
        clock.waits += item < 6
    assert [at for at, _ in clock.paused] == [35.7]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count a thread's waits")
def test_the_waits_of_a_thread_are_counted() -> None:
    """A thread that has slept has waited once more."""
    before = loop._waits()
    time.sleep(1e-3)
    assert loop._waits() > before


@pytest.mark.parametrize(
    ("took", "computed", "rest"),
    [(0.2, 0.03, 0.2), (0.2, 0.05, 0.0), (0.2, 0.2, 0.0), (0.019, 0.0, 0.0), (0.02, 0.0, 0.02)],
)
def test_who_waited_for_the_gil_rests_as_long_as_it_worked(
    took: float, computed: float, rest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where it waited four fifths of 20 ms or more: alone there is no rest."""
    clock = Clock(monkeypatch)
    stint = loop.Stint()
    clock.now, clock.computed = took, computed
    assert stint.rest_secs() == rest


def test_waiting_takes_no_time_of_the_processor() -> None:
    """By the system's own clocks, a thread that waited 30 ms is to rest."""
    stint = loop.Stint()
    threading.Event().wait(0.03)
    assert stint.rest_secs() >= 0.03


@pytest.mark.parametrize("rest_secs", [0.0, 1000.0])
def test_no_batch_is_filled_while_the_worker_rests(
    rest_secs: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch but the first waits for the end of the rest that the last one called for."""
    waits: list[float] = []

    async def sleep_until(deadline: float) -> None:
        waits.append(deadline - anyio.current_time())

    monkeypatch.setattr(anyio, "sleep_until", sleep_until)
    monkeypatch.setattr(loop.Stint, "rest_secs", lambda _: rest_secs)
    monkeypatch.setattr(saving, "_BATCH_NBYTES", 1 << 18)
    ocp.save(tmp_path / "checkpoint", [jnp.full(1 << 16, i, jnp.float32) for i in range(4)])
    assert len(waits) == 4
    assert [round(wait, -3) if wait > 0 else 0.0 for wait in waits] == [0.0, *[rest_secs] * 3]
