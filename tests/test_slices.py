"""Workers let others have the GIL while they work through many items."""

from __future__ import annotations

import sys
import time

import pytest

from orbax_async._engine import loop


class SlicedClock:
    """A clock for `sliced`: the time, how often the thread has waited, and when it paused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 0.0, 0
        self.paused: list[tuple[float, float]] = []
        monkeypatch.setattr(loop, "time", self)
        monkeypatch.setattr(loop, "_waits", lambda: self.waits)

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.paused.append((round(self.now * 1e3, 2), secs))
        self.now += 1e-4
        self.waits += 1


def test_a_sliced_loop_lets_others_have_the_gil_every_millisecond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It yields all items, and sleeps a moment between two where a millisecond has passed."""
    clock, items = SlicedClock(monkeypatch), []
    for item in loop.sliced(range(8)):
        items.append(item)
        clock.now += 0.00051
    assert items == list(range(8))
    assert [at for at, _ in clock.paused] == [1.02, 2.14, 3.26]  # none at the end
    assert all(0 < secs < 1e-3 for _, secs in clock.paused)


def test_a_sliced_loop_that_has_waited_does_not_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had to wait for the GIL has let others have it: only milliseconds without count."""
    clock = SlicedClock(monkeypatch)
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
