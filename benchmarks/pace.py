"""A program beside the save: a step that is repeated on a core of its own, and counted."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Mark(NamedTuple):
    """How many steps were done at a moment, and how long the thread had a core for them."""

    steps: int
    secs: float
    cpu_secs: float


class Pacer:
    """Repeats a step on a thread that has a core to itself as far as this process goes.

    The other threads of the process keep to the other cores, and so do those that they start. With
    one core everything shares it.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self._step = step
        self._steps = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._cores = sorted(os.sched_getaffinity(0))

    def __enter__(self) -> Pacer:
        self._step()  # compiles
        _hold(self._cores[1:] or self._cores)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        _hold(self._cores)

    def _run(self) -> None:
        os.sched_setaffinity(0, self._cores[:1])  # of this thread
        while not self._stop.is_set():
            self._step()
            self._steps += 1

    def mark(self) -> Mark:
        """Returns how far the steps are now."""
        assert self._thread.ident is not None
        clock = time.pthread_getcpuclockid(self._thread.ident)
        return Mark(self._steps, time.perf_counter(), time.clock_gettime(clock))

    def rate(self, secs: float) -> float:
        """Returns the steps per second over the next seconds, or until one is done."""
        before = after = self.mark()
        while after.steps == before.steps and self._thread.is_alive():
            time.sleep(secs)
            after = self.mark()
        return (after.steps - before.steps) / (after.secs - before.secs)


def _hold(cores: Iterable[int]) -> None:
    """Lets every thread that there is now run on these cores only."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def training_step() -> Callable[[], Any]:
    """Returns a compiled step of about ten milliseconds that computes on one core.

    It runs on the thread that calls it where jax's asynchronous dispatch on CPU is off, as
    `python -m benchmarks run` has it; else on a thread of XLA's.
    """

    @jax.jit
    def step(values: jax.Array) -> jax.Array:
        result: jax.Array = jax.lax.fori_loop(0, 3000, lambda _, x: jnp.sin(x) * 1.1 + 0.1, values)
        return result

    values = jax.device_put(jnp.ones(1024), jax.devices()[0])
    return lambda: jax.block_until_ready(step(values))


def count() -> int:
    """Counts in pure Python, which the save's own Python code competes with."""
    number = 0
    while number < 1000:
        number += 1
    return number
