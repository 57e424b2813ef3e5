"""What is measured of one peer's turn, and how; docs/benchmarks.md explains each figure."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import inspect
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import apart, pace
from benchmarks.peers import Peer, Pending, Settings
from benchmarks.trees import resident_nbytes, stored_nbytes
from benchmarks.workloads import State

Figures = dict[str, float]
TICK_SECS = 0.001


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a peer saves and loads, and where."""

    peer: Peer
    path: Path
    state: State
    abstract: State
    settings: Settings = field(default_factory=dict)
    is_cold: bool = False
    pace_secs: float = 1.0

    def save(self) -> Pending:
        """Starts a save; returns once the caller may change the state."""
        return self.peer.save(self.path, self.state, self.settings)

    def load(self) -> State:
        """Loads, and waits for the last array."""
        return jax.block_until_ready(self.peer.load(self.path, self.abstract, self.settings))

    def clear(self) -> None:
        """Removes what was saved; leaves nothing to collect and nothing to write back."""
        shutil.rmtree(self.path, ignore_errors=True)
        settle()


def settle() -> None:
    """Takes what earlier work has put off out of what is measured next."""
    gc.collect()
    os.sync()


def touch(nbytes: int) -> None:
    """Writes to so much new memory and frees it again.

    A virtual machine may have to ask its host for pages that nothing used for a while. Whoever has
    the next turn would pay for that: seconds for a gibibyte, and nothing of its own doing.
    """
    np.ones(nbytes, np.uint8)


def warm_up(trial: Trial) -> None:
    """Saves once and removes it, so that the next files can take the memory that these gave back.

    Where a virtual machine asks its host for memory, the kernel may take 5 ms to copy 2 MiB to a
    file, 15 times as long as otherwise, and meanwhile lets nothing else run on that core. This
    makes it rarer, not impossible: which memory is taken next, the kernel decides.
    """
    trial.clear()
    trial.save().result()
    trial.clear()


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
    if not trial.peer.matches(loaded, trial.state):
        raise ValueError("loads other values than were saved")
    return {"first_save": saved - began, "first_load": ended - saved}


def timed(trial: Trial) -> Figures:
    """Times a save and a load: wall clock, and the CPU time of all threads of the process."""
    trial.clear()
    nbytes_of_state = stored_nbytes(trial.state)
    touch(nbytes_of_state)  # as much as will be in the page cache
    cpu, began = time.process_time(), time.perf_counter()
    pending = trial.save()
    blocked = time.perf_counter() - began
    pending.result()
    committed, save_cpu = time.perf_counter() - began, time.process_time() - cpu
    del pending
    files = [path for path in trial.path.rglob("*") if path.is_file()]
    nbytes = sum(path.stat().st_size for path in files)
    settle()
    if trial.is_cold:
        for path in files:
            _drop_from_cache(path)
    touch(nbytes_of_state)
    cpu, began = time.process_time(), time.perf_counter()
    loaded = trial.load()
    seconds, load_cpu = time.perf_counter() - began, time.process_time() - cpu
    del loaded
    return {
        "blocked": blocked,
        "committed": committed,
        "loaded": seconds,
        "save_cpu": save_cpu,
        "load_cpu": load_cpu,
        "disk_nbytes": nbytes,
        "disk_files": len(files),
    }


def _drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def memory(trial: Trial) -> Figures:
    """Takes the peak of resident memory of a save and a load, and counts the threads of a save.

    Apart from the timed turns: free memory is given back to the system first, which costs time.
    """
    trial.clear()
    with Threads() as threads, PeakMemory() as saving:
        trial.save().result()
    settle()
    with PeakMemory() as loading:
        loaded = trial.load()
    extra = loading.extra - resident_nbytes(loaded)
    del loaded
    return {
        "peak_save": saving.extra,
        "peak_load": extra,
        "threads": threads.count,
    }


class PeakMemory:
    """The most resident memory beyond what there was before a block; the kernel keeps the mark."""

    extra = 0

    def __enter__(self) -> PeakMemory:
        if sys.platform == "linux":
            with contextlib.suppress(AttributeError, OSError):  # glibc only
                ctypes.CDLL(None).malloc_trim(0)
        # 5 resets the mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = resident()
        return self

    def __exit__(self, *_: object) -> None:
        self.extra = _status("VmHWM") - self._before


def resident() -> int:
    """Returns the bytes of memory that the process holds now."""
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Threads:
    """Counts threads, of any language, that are there during a block and were not before it.

    It looks every 2 ms; a thread that lives shorter may be missed.
    """

    count = 0

    def __enter__(self) -> Threads:
        self._before = set(os.listdir("/proc/self/task"))
        self._seen: set[str] = set()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        self._before.add(str(threading.get_native_id()))
        while not self._stop.wait(0.002):
            self._seen.update(os.listdir("/proc/self/task"))

    def __exit__(self, *_: object) -> None:
        self._seen.update(os.listdir("/proc/self/task"))
        self._stop.set()
        self._watcher.join()
        self.count = len(self._seen - self._before)


def gap(trial: Trial) -> Figures:
    """Takes the longest time for which a save keeps other tasks of the caller's loop waiting.

    A response that can be awaited is; for others a thread waits, and the call itself blocks.
    """
    warm_up(trial)
    return {"loop_gap": asyncio.run(_longest_gap(trial))}


async def _longest_gap(trial: Trial) -> float:
    gaps = []

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(TICK_SECS)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(10 * TICK_SECS)
    gaps.clear()
    pending = trial.save()
    if inspect.isawaitable(pending):
        await pending
    else:
        await asyncio.to_thread(pending.result)
    await asyncio.sleep(2 * TICK_SECS)  # the last gap ends here
    ticking.cancel()
    return max(gaps)


def training_pace(trial: Trial) -> Figures:
    """Takes the rate of a training step and of a Python counter beside a background save.

    Relative to the rate without a save just before and just after. A peer that blocks saves on a
    thread, as a program would have it do. Of each also: the share of the time in which its thread
    had its core.
    """
    return _paces(trial, "", lambda: contextlib.closing(_saves(trial)))


def pace_apart(trial: Trial) -> Figures:
    """Takes the same beside another process that makes the same saves.

    Rounds of their own, the last: what that process gives back, a host may take before the next.
    """
    path = trial.path.with_name(f"{trial.path.name}-apart")
    return _paces(
        trial, "apart_", lambda: apart.saves(trial.peer.name, path, trial.state, trial.settings)
    )


def _paces(
    trial: Trial, prefix: str, saving: Callable[[], AbstractContextManager[Iterator[None]]]
) -> Figures:
    figures = {}
    for name, step in {"step": pace.training_step(), "counter": pace.count}.items():
        with pace.Pacer(step) as pacer:
            quiet = pacer.rate(trial.pace_secs / 2)
            warm_up(trial)
            with saving() as moments:
                beside = _between(pacer, moments, trial.pace_secs)
            trial.clear()
            quiet = (quiet + pacer.rate(trial.pace_secs / 2)) / 2
        figures[f"{name}_{prefix}pace"] = beside.steps / beside.secs / quiet
        figures[f"{name}_{prefix}core"] = beside.cpu_secs / beside.secs
    return figures


def _saves(trial: Trial) -> Generator[None, None, None]:
    """Saves again and again; goes on when a save has begun, and when it has ended, by turns."""
    with ThreadPoolExecutor(1) as blocking:
        while True:
            shutil.rmtree(trial.path, ignore_errors=True)
            pending = trial.save() if trial.peer.is_async else blocking.submit(trial.save)
            yield
            _await_end(pending)
            yield


def _await_end(pending: Any) -> None:
    """Waits as a program does that has other things to do: it is told, where it can be.

    Who blocks for a save wants it to be done soon, at the cost of whoever runs beside it.
    """
    add_callback = getattr(pending, "add_done_callback", None)
    if add_callback is not None:
        ended = threading.Event()
        add_callback(lambda _: ended.set())
        ended.wait()
    pending.result()


def _between(pacer: pace.Pacer, moments: Iterator[None], secs: float) -> pace.Mark:
    """Returns how much was done from each odd moment to the next even one, in so long at least."""
    steps, lasted, cpu_secs = 0, 0.0, 0.0
    while lasted < secs:  # a short save is repeated, for a rate that means something
        next(moments)
        before = pacer.mark()
        next(moments)
        after = pacer.mark()
        steps, lasted = steps + after.steps - before.steps, lasted + after.secs - before.secs
        cpu_secs += after.cpu_secs - before.cpu_secs
    return pace.Mark(steps, lasted, cpu_secs)


KINDS: dict[str, Callable[[Trial], Figures]] = {
    "timed": timed,
    "memory": memory,
    "gap": gap,
    "pace": training_pace,
    "apart": pace_apart,
}
