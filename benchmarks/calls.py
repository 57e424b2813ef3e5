"""Counts what a small save and a small load run: own files, own calls, stations on the way.

The state has three leaves: a jax array, a NumPy array and an int. Each operation saves to a new
path or loads from one, and its response is waited for with `result()`. The first two saves and
loads warm up; medians of the next five are printed.

A call is the entry of a function whose code lies below `orbax_async/`, in any Python thread: a
`call` event of Python's profiler. A generator or coroutine counts once, when it begins; that it
goes on after a `yield` or `await` is told apart, as a resumption. On Python 3.11 a comprehension is
a function too. A file counts if a function of it ran. What comes within 0.1 s of the end still
counts. Code that dataclasses make does not.

Stations are the own functions on the caller's stack when the loop gets the operation. After them
stands what the loop's thread runs first: where the work begins, the reader judges.
"""

from __future__ import annotations

import collections
import dataclasses
import dis
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import uvloop

import orbax_async as ocp

PACKAGE = Path(ocp.__file__).parent
WARM_UP, COUNTED = 2, 5
SETTLE_SECS = 0.1
NAMES = ("save_async", "load_async", "training")


@dataclasses.dataclass
class Count:
    """What one operation ran."""

    calls: list[CodeType] = dataclasses.field(default_factory=list)
    on_loop: list[CodeType] = dataclasses.field(default_factory=list)  # those of its thread
    stations: list[CodeType] = dataclasses.field(default_factory=list)
    resumptions: int = 0

    @property
    def files(self) -> set[str]:
        """The own files of which a function ran."""
        return set(map(file, self.calls))


class Counter:
    """Sees the calls of all threads that start after it, and when a loop is handed something."""

    def __init__(self) -> None:
        self._count: Count | None = None
        self._loop_thread = 0
        counter = self

        class Loop(uvloop.Loop):
            def run_forever(self) -> None:
                counter._loop_thread = threading.get_ident()
                super().run_forever()

            def call_soon_threadsafe(self, *args: Any, **more: Any) -> Any:  # type: ignore[override]
                counter._note_stations(sys._getframe())
                return super().call_soon_threadsafe(*args, **more)

        uvloop.new_event_loop = Loop  # before the engine's module is imported
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        count, code = self._count, frame.f_code
        if event != "call" or count is None or not _is_own(code):
            return
        if frame.f_lasti > _entry(code):
            count.resumptions += 1
            return
        count.calls.append(code)
        if threading.get_ident() == self._loop_thread:
            count.on_loop.append(code)

    def _note_stations(self, frame: FrameType | None) -> None:
        count = self._count
        if count is None or count.stations:
            return
        while frame is not None:
            if _is_own(frame.f_code):
                count.stations.insert(0, frame.f_code)
            frame = frame.f_back

    def count(self, start: Callable[[], ocp.AsyncResponse[Any]]) -> Count:
        """Starts an operation, waits for its end, and returns what it ran."""
        self._count = count = Count()
        start().result()
        time.sleep(SETTLE_SECS)
        self._count = None
        return count


def _is_own(code: CodeType) -> bool:
    return code.co_filename.startswith(f"{PACKAGE}/")


@cache
def _entry(code: CodeType) -> int:
    """Returns where a function begins: at its first RESUME, before which a generator is made."""
    return next(each.offset for each in dis.get_instructions(code) if each.opname == "RESUME")


def file(code: CodeType) -> str:
    """Returns the file of a function, relative to the package."""
    return str(Path(code.co_filename).relative_to(PACKAGE))


def function(code: CodeType) -> str:
    """Returns the file and the name of a function."""
    return f"{file(code)}: {code.co_qualname}"


def measure() -> dict[str, list[Count]]:
    """Counts saves and loads in the steady state."""
    counter = Counter()
    state = {"jax": jnp.ones((4, 4)), "numpy": np.ones(3), "step": 7}
    abstract = {"jax": jax.ShapeDtypeStruct((4, 4), jnp.float32), "numpy": np.ones(3), "step": 0}
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        paths = [Path(folder, str(number)) for number in range(WARM_UP + COUNTED)]
        saves = [counter.count(partial(ocp.save_async, path, state)) for path in paths]
        loads = [counter.count(partial(ocp.load_async, path, abstract)) for path in paths]
    return {"save": saves[WARM_UP:], "load": loads[WARM_UP:]}


def tell(name: str, found: list[Count], by: Callable[[CodeType], str], top: int) -> None:
    """Prints what was counted of an operation."""
    calls, last = [len(each.calls) for each in found], found[-1]
    files = statistics.median(len(each.files) for each in found)
    resumed = statistics.median(each.resumptions for each in found)
    tally = collections.Counter(map(by, last.calls))
    lines = [
        f"\na {name}: {files:.0f} own files, {statistics.median(calls):.0f} own calls "
        f"({min(calls)} to {max(calls)}), and {resumed:.0f} resumptions",
        f"  stations from the verb to the loop: {len(last.stations) - 1}",
        *(f"    {function(code)}" for code in last.stations),
        "  what the loop's thread runs first",
        *(f"    {function(code)}" for code in last.on_loop[:10]),
        "  most calls",
        *(f"    {count:4} {each}" for each, count in tally.most_common(top)),
    ]
    print(*lines, sep="\n")


def first_use(name: str) -> float:
    """Returns the median seconds that a fresh interpreter with jax takes for a name."""
    use = f"import orbax_async; orbax_async.{name}"
    code = (
        f"import jax, time; began = time.perf_counter(); {use}; print(time.perf_counter() - began)"
    )
    run = partial(subprocess.run, cwd=PACKAGE.parent, capture_output=True, check=True)
    secs = [float(run([sys.executable, "-c", code]).stdout) for _ in range(6)]
    return statistics.median(secs[1:])  # the first may compile to bytecode


if __name__ == "__main__":
    print(f"{PACKAGE} on Python {sys.version.split()[0]}")
    for operation, counts in measure().items():
        tell(operation, counts, {"file": file, "function": function}[sys.argv[1]], int(sys.argv[2]))
    print("\nfirst use of a name, over import jax")
    for name in NAMES:
        print(f"  {first_use(name):.3f} s {name}")
