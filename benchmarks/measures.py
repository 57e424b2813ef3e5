"""What is measured of one peer's turn, and how; docs/benchmarks.md explains each figure."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import inspect
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import states
from benchmarks.peers import Peer, Settings
from benchmarks.states import State

Figures = dict[str, float]
TICK_SECS = 0.001
TASKS = "/proc/self/task"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a peer saves and loads, and where."""

    peer: Peer
    path: Path
    state: State
    settings: Settings = field(default_factory=dict)
    is_cold: bool = False  # whether files are dropped from the page cache before they are loaded
    pace_secs: float = 1.0  # how long a program beside the saves is watched

    @functools.cached_property
    def abstract(self) -> State:
        """What a load is asked for."""
        return states.abstract_of(self.state)

    def save(self) -> Any:
        """Starts a save; returns once the caller may change the state."""
        return self.peer.save(self.path, self.state, self.settings)

    def load(self) -> State:
        """Loads, and waits for the last array."""
        return jax.block_until_ready(self.peer.load(self.path, self.abstract, self.settings))

    def clear(self) -> None:
        """Removes what was saved; leaves nothing to collect and nothing to write back."""
        shutil.rmtree(self.path, ignore_errors=True)
        settle()

    def warm_up(self) -> None:
        """Saves once and removes it, so that the next files can take the memory of these.

        Where a virtual machine asks its host for memory, the kernel may take 5 ms to copy 2 MiB to
        a file, 15 times as long as otherwise, and meanwhile lets nothing else run on that core.
        This makes it rarer, not impossible: which memory is taken next, the kernel decides.
        """
        self.clear()
        self.save().result()
        self.clear()


def settle() -> None:
    """Takes what earlier work has put off out of what is measured next."""
    gc.collect()
    os.sync()


def first(trial: Trial) -> Figures:
    """Takes the first save and load of a process, and compares what was loaded.

    Raises:
      ValueError: what was loaded is not what was saved.
    """
    trial.clear()
    began = time.perf_counter()
    trial.save().result()
    saved = time.perf_counter()
    loaded = trial.load()
    ended = time.perf_counter()
    is_same = states.same_bytes if trial.peer.is_floor else states.same_values
    if not is_same(loaded, trial.state):
        raise ValueError("loads other values than were saved")
    return {"first_save": saved - began, "first_load": ended - saved}


def timed(trial: Trial) -> Figures:
    """Times a save and a load: wall clock, and the CPU time of all threads of the process."""
    trial.clear()
    _touch(trial.state)  # as much as will be in the page cache
    cpu, began = time.process_time(), time.perf_counter()
    pending = trial.save()
    blocked = time.perf_counter() - began
    if hasattr(pending, "wait_staged"):
        pending.wait_staged()
    staged = time.perf_counter() - began
    pending.result()
    committed, save_cpu = time.perf_counter() - began, time.process_time() - cpu
    del pending
    files = [path for path in trial.path.rglob("*") if path.is_file()]
    nbytes = sum(path.stat().st_size for path in files)
    settle()
    for path in files if trial.is_cold else ():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _touch(trial.state)
    cpu, began = time.process_time(), time.perf_counter()
    loaded = trial.load()
    seconds, load_cpu = time.perf_counter() - began, time.process_time() - cpu
    del loaded
    return {
        "blocked": blocked,
        "staged": staged,
        "committed": committed,
        "loaded": seconds,
        "save_cpu": save_cpu,
        "load_cpu": load_cpu,
        "disk_nbytes": nbytes,
        "disk_files": len(files),
    }


def _touch(state: State) -> None:
    """Writes to as much new memory as a state takes, and frees it again.

    A virtual machine may have to ask its host for pages that nothing used for a while. Whoever has
    the next turn would pay for that: seconds for a gibibyte, and nothing of its own doing.
    """
    np.ones(states.stored_nbytes(state), np.uint8)


def memory(trial: Trial) -> Figures:
    """Takes the peak of resident memory of a save and a load, and counts the threads of a save.

    Apart from the timed turns: free memory is given back to the system first, which costs time.
    """
    trial.clear()
    with new_threads() as threads:
        _, peak_save = peak_of(lambda: trial.save().result())
    settle()
    loaded, peak_load = peak_of(trial.load)
    peak_load -= states.resident_nbytes(loaded)
    return {"peak_save": peak_save, "peak_load": peak_load, "threads": len(threads)}


def peak_of(act: Callable[[], Any]) -> tuple[Any, int]:
    """Does something; returns what it returned, and the most memory beyond what was resident."""
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's mark to what is resident
    before = kernel_nbytes("self/status", "VmRSS")
    result = act()
    return result, kernel_nbytes("self/status", "VmHWM") - before


def kernel_nbytes(file: str, name: str) -> int:
    """Returns a size that a file below /proc tells."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def new_threads() -> Iterator[set[str]]:
    """Yields a set of the threads, of any language, that a block has and that were not before it.

    It looks every 2 ms; a thread that lives shorter may be missed. It is complete after the block.
    """
    before, seen, stop = set(os.listdir(TASKS)), set[str](), threading.Event()

    def watch() -> None:
        before.add(str(threading.get_native_id()))
        while not stop.wait(0.002):
            seen.update(os.listdir(TASKS))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
        seen.update(os.listdir(TASKS))
    finally:
        stop.set()
        watcher.join()
        seen -= before


def gap(trial: Trial) -> Figures:
    """Takes the longest time for which a save keeps other tasks of the caller's loop waiting.

    A response that can be awaited is; for others a thread waits, and the call itself blocks.
    """
    wakeups = []

    async def tick() -> None:
        while True:
            wakeups.append(time.perf_counter())
            await asyncio.sleep(TICK_SECS)

    async def save() -> None:
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(10 * TICK_SECS)
        del wakeups[:-1]
        pending = trial.save()
        if inspect.isawaitable(pending):
            await pending
        else:
            await asyncio.to_thread(pending.result)
        await asyncio.sleep(2 * TICK_SECS)  # the last gap ends here
        ticking.cancel()

    trial.warm_up()
    asyncio.run(save())
    return {"loop_gap": max(end - begin for begin, end in itertools.pairwise(wakeups))}


class Pacer:
    """Repeats a step on a thread that has a core to itself as far as this process goes.

    The other threads of the process keep to the other cores, and so do those that they start. With
    one core everything shares it.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self.steps = 0
        self._step = step
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
            self.steps += 1

    def rate(self, secs: float) -> float:
        """Returns the steps per second over the next seconds, or until one is done."""
        before, began = self.steps, time.perf_counter()
        while self.steps == before and self._thread.is_alive():
            time.sleep(secs)
        return (self.steps - before) / (time.perf_counter() - began)

    def rate_beside(self, saves: Generator[None], secs: float) -> float:
        """Returns the steps per second while each save is under way, over so long at least."""
        steps, lasted = 0, 0.0
        while lasted < secs:  # a short save is repeated, for a rate that means something
            next(saves)
            before, began = self.steps, time.perf_counter()
            next(saves)
            steps, lasted = steps + self.steps - before, lasted + time.perf_counter() - began
        return steps / lasted


def _hold(cores: Iterable[int]) -> None:
    """Lets every thread that there is now run on these cores only."""
    for thread in os.listdir(TASKS):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def training_step() -> Callable[[], Any]:
    """Returns a compiled step of about ten milliseconds that computes on one core.

    It runs on the thread that calls it where jax's asynchronous dispatch on CPU is off, as
    `Workload.build` has it; else on a thread of XLA's.
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


def pace(trial: Trial) -> Figures:
    """Takes the rate of a training step and of a Python counter beside background saves.

    Relative to the rate without a save just before and just after.
    """
    figures = {}
    for name, step in {"step": training_step(), "counter": count}.items():
        with Pacer(step) as pacer:
            quiet = pacer.rate(trial.pace_secs / 2)
            trial.warm_up()
            with contextlib.closing(_saves(trial)) as saves:
                beside = pacer.rate_beside(saves, trial.pace_secs)
            trial.clear()
            quiet = (quiet + pacer.rate(trial.pace_secs / 2)) / 2
        figures[f"{name}_pace"] = beside / quiet
    return figures


def _saves(trial: Trial) -> Generator[None]:
    """Saves again and again; goes on when a save has begun, and when it has ended, by turns.

    A peer that blocks saves on a thread, as a program would have it do. The end is told where it
    can be: who blocks for a save wants it soon, at the cost of whoever runs beside it.
    """
    with ThreadPoolExecutor(1) as blocking:
        while True:
            shutil.rmtree(trial.path, ignore_errors=True)
            pending = trial.save() if trial.peer.is_async else blocking.submit(trial.save)
            yield
            if hasattr(pending, "add_done_callback"):
                ended = threading.Event()
                pending.add_done_callback(lambda _: ended.set())  # noqa: B023
                ended.wait()
            pending.result()
            yield
