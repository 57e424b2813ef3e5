"""Workers let others have the GIL: while they work through many items, and batch by batch."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import pytest

import orbax_async as ocp
from orbax_async._engine import loop, save_pipeline
from orbax_async.handlers import saving


class Clock:
    """The time, how long the thread computed, how often it has waited, and when it paused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.computed, self.waits = 0.0, 0.0, 0
        self.gil_secs = 0.0  # how long it takes to get the GIL after a pause
        self.paused: list[tuple[float, float]] = []
        monkeypatch.setattr(loop, "time", self)
        monkeypatch.setattr(loop, "_waits", lambda: self.waits)

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.computed

    def sleep(self, secs: float) -> None:
        self.paused.append((round(self.now * 1e3, 2), secs))
        self.now += max(secs, 1e-4) + self.gil_secs
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


@pytest.mark.parametrize(
    ("may_rest", "is_long"), [(lambda: True, True), (lambda: False, False), (None, False)]
)
def test_a_sliced_loop_that_may_rest_does_beside_a_program_in_python(
    may_rest: Callable[[], bool] | None, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pause for which the GIL was not to be had it leaves thirty parts of thirty-one."""
    clock = Clock(monkeypatch)
    clock.gil_secs = sys.getswitchinterval()
    for _ in loop.sliced(range(10), may_rest=may_rest):
        clock.now += 0.0011
    first, *others = [secs for _, secs in clock.paused]
    assert len(others) == 8
    assert first < 1e-3
    taken = [1.1e-3 / (1.1e-3 + secs + clock.gil_secs) for secs in others]
    assert all((share < 0.036) == is_long for share in taken)


def test_a_sliced_loop_stops_resting_when_nobody_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pause tells anew whether there is somebody to leave the GIL to."""
    clock = Clock(monkeypatch)
    for index in loop.sliced(range(10), may_rest=lambda: True):
        clock.now += 0.0011
        clock.gil_secs = sys.getswitchinterval() if index < 5 else 0.0
    pauses = [secs > 1e-3 for _, secs in clock.paused]
    assert pauses == [False, True, True, True, True, True, False, False, False]


def test_threads_that_change_often_are_no_program_in_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever interval a program has set, a pause of a millisecond is no wait for the GIL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        clock = Clock(monkeypatch)
        clock.gil_secs = 1e-3
        for _ in loop.sliced(range(10), may_rest=lambda: True):
            clock.now += 0.0011
    finally:
        sys.setswitchinterval(before)
    assert clock.paused
    assert all(secs < 1e-3 for _, secs in clock.paused)


@pytest.mark.parametrize("wait", [None, "result", "exception"])
def test_a_save_takes_its_time_unless_a_thread_waits_for_it(
    wait: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who blocks for a save has it sooner; while nobody does, its work in Python may rest."""
    may_go_on, answers = threading.Event(), []

    def fill(pipeline: Any, *args: Any) -> Any:
        may_go_on.wait(60)
        answers.append(pipeline._may_rest())
        return original(pipeline, *args)

    original = save_pipeline.SavePipeline._fill
    monkeypatch.setattr(save_pipeline.SavePipeline, "_fill", fill)
    response = ocp.save_async(tmp_path / "checkpoint", {"a": jnp.ones(3)})
    with pytest.raises(TimeoutError):
        response.result(timeout=0)
    waiting = threading.Thread(target=getattr(response, wait or "done"))
    waiting.start()
    while wait and not response._recorder.is_waited_for:
        time.sleep(1e-3)
    may_go_on.set()
    while not answers:
        time.sleep(1e-3)
    waiting.join()
    response.result()
    assert answers == [wait is None]
    assert not response._recorder.is_waited_for


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count a thread's waits")
def test_the_waits_of_a_thread_are_counted() -> None:
    """A thread that has slept has waited once more."""
    before = loop._waits()
    time.sleep(1e-3)
    assert loop._waits() > before


@pytest.mark.parametrize(
    ("took", "computed", "was_contested"),
    [(0.2, 0.05, True), (0.2, 0.07, False), (0.009, 0.0, False), (0.01, 0.0, True)],
)
def test_who_waited_most_of_the_time_has_a_rival(
    took: float, computed: float, was_contested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GIL is contested where a thread computed less than a third of 10 ms or more."""
    clock = Clock(monkeypatch)
    stint = loop.Stint()
    clock.now, clock.computed = took, computed
    assert stint.was_contested() == was_contested


def test_waiting_takes_no_time_of_the_processor() -> None:
    """By the system's own clocks, a thread that waited 30 ms did not compute."""
    stint = loop.Stint()
    threading.Event().wait(0.03)
    assert stint.was_contested()


@pytest.mark.parametrize("was_contested", [False, True])
@pytest.mark.parametrize("together", [1, 2])
def test_no_more_batches_are_filled_at_a_time_than_is_said(
    together: int, was_contested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are more under way until the disk has them, where the GIL is contested; else more are."""
    now, peaks = {"filled": 0, "under way": 0}, {"filled": 0, "under way": 0}

    def begin(what: str) -> None:
        now[what] += 1
        peaks[what] = max(peaks[what], now[what])

    def fill(pipeline: Any, store: Any, batch: Any, pieces: Any) -> Any:
        begin("under way")
        begin("filled")
        time.sleep(0.1)  # for another worker to come along
        now["filled"] -= 1
        return original(pipeline, store, batch, pieces)

    async def write_back(_: Any, __: Any) -> None:
        await anyio.sleep(0.2)  # for another batch to come along
        now["under way"] -= 1

    original = save_pipeline.SavePipeline._fill
    monkeypatch.setattr(save_pipeline.SavePipeline, "_fill", fill)
    monkeypatch.setattr(save_pipeline.SavePipeline, "_start_writeback", write_back)
    monkeypatch.setattr(save_pipeline, "_WRITTEN_BACK_NBYTES", 0)
    monkeypatch.setattr(save_pipeline, "_FILLED_AT_ONCE", together)
    monkeypatch.setattr(loop.Stint, "was_contested", lambda _: was_contested)
    monkeypatch.setattr(saving, "_BATCH_NBYTES", 1 << 18)
    ocp.save(tmp_path / "checkpoint", [jnp.full(1 << 16, i, jnp.float32) for i in range(6)])
    assert now == {"filled": 0, "under way": 0}
    assert peaks["filled"] == together
    assert (peaks["under way"] == together) == was_contested
    assert [leaf[0] for leaf in ocp.load(tmp_path / "checkpoint")] == list(range(6))
