"""Saves and loads jax arrays with `await` beside a heartbeat; prints the gaps of the heartbeat.

    heartbeat.py DIRECTORY LOOP STAGING MEBIBYTES LEAVES ROUNDS

The names it uses are imported before, as at the top of any program. LOOP is asyncio or uvloop.
Each round looks at the idle loop, saves, loads, and looks at the idle loop again. The output is
JSON: for each round, by phase, the gaps in milliseconds, each with how long the thread was ready
to run and no core was free for it (0 where the system does not say).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator

import jax
import jax.numpy as jnp
import numpy as np
import uvloop

from orbax_async import Context, load_async, save_async


def make_state(mebibytes: int, leaves: int) -> dict[str, jax.Array]:
    """Returns float32 weights in leaves of one size."""
    rng = np.random.default_rng(0)
    size = mebibytes * (1 << 18) // leaves
    return {
        str(index): jnp.asarray(rng.standard_normal(size, np.float32)) for index in range(leaves)
    }


try:
    schedule = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
except FileNotFoundError:
    schedule = -1


def waited_for_a_core() -> float:
    """Returns for how many milliseconds this thread has been ready to run, and did not.

    A single call of the system: each lets go of the GIL, and the wait for it is not to be ours.
    """
    return int(os.pread(schedule, 64, 0).split()[1]) / 1e6 if schedule >= 0 else 0.0


@contextlib.asynccontextmanager
async def heartbeat(gaps: list[tuple[float, float]]) -> AsyncIterator[None]:
    """Notes how long the loop took to come back each time."""

    async def beat() -> None:
        last, last_waited = time.perf_counter(), waited_for_a_core()
        while True:
            await asyncio.sleep(0.001)
            now, waited = time.perf_counter(), waited_for_a_core()
            gaps.append(((now - last) * 1e3, waited - last_waited))
            last, last_waited = now, waited

    task = asyncio.create_task(beat())
    await asyncio.sleep(0.02)
    gaps.clear()
    yield
    await asyncio.sleep(0.02)
    task.cancel()


async def main(directory: str, staging: str, mebibytes: int, leaves: int, rounds: int) -> None:
    """Measures every round."""
    state = make_state(mebibytes, leaves)
    abstract = jax.eval_shape(lambda: state)
    options = Context()
    options.asynchronous.staging = staging
    # The collector's pauses grow with the program's own objects, and are its own.
    gc.collect()
    gc.freeze()
    measured: list[dict[str, list[tuple[float, float]]]] = []
    for index in range(rounds):
        gaps: dict[str, list[tuple[float, float]]]
        gaps = {"before": [], "save": [], "load": [], "after": []}
        async with heartbeat(gaps["before"]):
            await asyncio.sleep(0.2)
        async with heartbeat(gaps["save"]):
            with options:
                response = save_async(f"{directory}/{index % 2}", state, overwrite=True)
            await response
        async with heartbeat(gaps["load"]):
            loaded = await load_async(f"{directory}/{index % 2}", abstract)
        async with heartbeat(gaps["after"]):
            await asyncio.sleep(0.2)
        for name, array in state.items():
            assert np.array_equal(array, loaded[name]), name
        del loaded
        gc.collect()  # jax puts off to the next collection to free what was dropped
        measured.append(gaps)
    print(json.dumps(measured))


directory, loop, staging, *numbers = sys.argv[1:]
run = uvloop.run if loop == "uvloop" else asyncio.run
run(main(directory, staging, *map(int, numbers)))
