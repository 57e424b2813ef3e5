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

import argparse
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

    calls: list[tuple[int, CodeType]] = dataclasses.field(default_factory=list)  # with the thread
    resumptions: int = 0
    stations: list[CodeType] = dataclasses.field(default_factory=list)
    loop_thread: int = 0

    @property
    def files(self) -> set[str]:
        """The own files of which a function ran."""
        return {_file(code) for _, code in self.calls}

    def begun(self) -> list[CodeType]:
        """Returns what the loop's thread ran, in order."""
        return [code for thread, code in self.calls if thread == self.loop_thread]


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
        count = self._count
        if event != "call" or count is None or not _is_own(frame.f_code):
            return
        if frame.f_lasti > _entry(frame.f_code):
            count.resumptions += 1
        else:
            count.calls.append((threading.get_ident(), frame.f_code))

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
        self._count = count = Count(loop_thread=self._loop_thread)
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


def _file(code: CodeType) -> str:
    return str(Path(code.co_filename).relative_to(PACKAGE))


def _function(code: CodeType) -> str:
    return f"{_file(code)}: {code.co_qualname}"


def measure() -> dict[str, list[Count]]:
    """Counts saves and loads in the steady state."""
    counter = Counter()
    state = {"jax": jnp.ones((4, 4)), "numpy": np.ones(3), "step": 7}
    abstract = {"jax": jax.ShapeDtypeStruct((4, 4), jnp.float32), "numpy": np.ones(3), "step": 0}
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        paths = [Path(folder, str(number)) for number in range(WARM_UP + COUNTED)]
        for path in paths[:WARM_UP]:
            ocp.save_async(path, state).result()
            ocp.load_async(path, abstract).result()
        saves = [counter.count(partial(ocp.save_async, p, state)) for p in paths[WARM_UP:]]
        loads = [counter.count(partial(ocp.load_async, p, abstract)) for p in paths[WARM_UP:]]
    return {"save": saves, "load": loads}


def tell(name: str, found: list[Count], by: Callable[[CodeType], str], top: int) -> None:
    """Prints what was counted of an operation."""
    calls = [len(each.calls) for each in found]
    files = statistics.median(len(each.files) for each in found)
    resumed = statistics.median(each.resumptions for each in found)
    print(f"\na {name}: {files:.0f} own files, {statistics.median(calls):.0f} own calls", end="")
    print(f" ({min(calls)} to {max(calls)}), and {resumed:.0f} resumptions")
    last = found[-1]
    verb, *stations = map(_function, last.stations)
    print(f"  stations from {verb} to the loop: {len(stations)}")
    print(*(f"    {station}\n" for station in stations), sep="", end="")
    print("  what the loop's thread runs first")
    print(*(f"    {_function(code)}\n" for code in last.begun()[:10]), sep="", end="")
    print("  most calls")
    tally = collections.Counter(by(code) for _, code in last.calls)
    print(*(f"    {count:4} {each}\n" for each, count in tally.most_common(top)), sep="", end="")


def first_use(name: str) -> float:
    """Returns the median seconds that a fresh interpreter with jax takes for a name."""
    code = (
        "import jax, time; began = time.perf_counter(); import orbax_async; "
        f"orbax_async.{name}; print(time.perf_counter() - began)"
    )
    command = [sys.executable, "-c", code]
    secs = [
        float(subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, check=True).stdout)
        for _ in range(6)
    ]
    return statistics.median(secs[1:])  # the first may compile to bytecode


def main() -> None:
    """Prints everything that is counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--by", choices=("function", "file"), default="function")
    parser.add_argument("--top", type=int, default=20)
    args = parser.parse_args()
    print(f"{PACKAGE} on Python {sys.version.split()[0]}")
    for name, found in measure().items():
        tell(name, found, _file if args.by == "file" else _function, args.top)
    print("\nfirst use of a name, over import jax")
    for name in NAMES:
        print(f"  {first_use(name):.3f} s {name}")


if __name__ == "__main__":
    main()
