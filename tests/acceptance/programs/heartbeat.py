"""Saves and loads jax arrays with `await` beside a heartbeat; prints the gaps of the heartbeat.

    heartbeat.py DIRECTORY LOOP STAGING MEBIBYTES

LOOP is asyncio or uvloop. The last line of the output is JSON: milliseconds by phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator

import jax
import jax.numpy as jnp
import numpy as np
import uvloop

import orbax_async as ocp

ROUNDS = 3  # the first save and load of a process, too, must leave the loop alone


def make_state(mebibytes: int) -> dict[str, jax.Array]:
    """Returns three quarters in large leaves, the rest in medium and small ones."""
    rng = np.random.default_rng(0)
    sizes = {"large": (12, 1 << 22), "medium": (48, 1 << 18), "small": (1024, 1 << 12)}
    state = {}
    for name, (count, size) in sizes.items():
        for index in range(count):
            values = rng.standard_normal(size * mebibytes // 256, np.float32)
            state[f"{name}{index}"] = jnp.asarray(values) * 2
    return jax.block_until_ready(state)


@contextlib.asynccontextmanager
async def heartbeat(gaps: list[float]) -> AsyncIterator[None]:
    """Notes in milliseconds how long the loop took to come back each time."""

    async def beat() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gaps.append((now - last) * 1e3)
            last = now

    task = asyncio.create_task(beat())
    await asyncio.sleep(0.02)
    gaps.clear()
    yield
    await asyncio.sleep(0.02)
    task.cancel()


def figures(gaps: list[float]) -> dict[str, float]:
    """Returns percentiles of the gaps."""
    p50, p99, top = np.percentile(gaps, [50, 99, 100])
    return {"p50": p50, "p99": p99, "max": top, "beats": len(gaps)}


async def main(directory: str, staging: str, mebibytes: int) -> None:
    """Measures an idle loop, then saves and loads."""
    state = make_state(mebibytes)
    abstract = jax.eval_shape(lambda: state)
    measured: dict[str, list[float]] = {"idle": [], "save": [], "load": []}
    async with heartbeat(measured["idle"]):
        await asyncio.sleep(0.5)
    options = ocp.Context()
    options.asynchronous.staging = staging
    for index in range(ROUNDS):
        gaps: list[float] = []
        async with heartbeat(gaps):
            with options:
                await ocp.save_async(f"{directory}/{index}", state)
        measured["save"] += gaps
        async with heartbeat(gaps := []):
            loaded = await ocp.load_async(f"{directory}/{index}", abstract)
        measured["load"] += gaps
        for name, array in state.items():
            assert np.array_equal(array, loaded[name]), name
        del loaded
    print(json.dumps({phase: figures(gaps) for phase, gaps in measured.items()}))


directory, loop, staging, mebibytes = sys.argv[1:]
run = uvloop.run if loop == "uvloop" else asyncio.run
run(main(directory, staging, int(mebibytes)))
