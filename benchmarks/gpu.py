"""Staging from a GPU: against the link to the host, against Orbax, and whether it is safe.

The link is what jax gets when it copies large arrays to pinned host memory. Staging is what a save
does before its caller may go on, so its speed is the bytes of the state over that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import orbax_async as ocp
from benchmarks import report, rounds, sweeps
from benchmarks.peers import ORBAX, configured, ours
from benchmarks.report import Spread
from benchmarks.rounds import Record
from benchmarks.states import MIB, State, large, same_values, stored_nbytes

STAGING = ("eager", "lazy")
GIB = 1 << 30


def link(state: State, count: int) -> dict[str, Spread | None]:
    """Measures bytes per second from device to host, to pinned memory and to pageable memory."""
    shardings = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), state)

    def rate(copy: Callable[[State], Any]) -> float:
        # Fresh arrays, because jax keeps the host copy of one that has been asked for it before.
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        began = time.perf_counter()
        _kept = jax.block_until_ready(copy(fresh))
        return stored_nbytes(state) / (time.perf_counter() - began)

    def rates(copy: Callable[[State], Any]) -> Spread | None:
        return report.spread([rate(copy) for _ in range(count + 1)][1:])  # the first warms up

    pinned = rates(lambda fresh: jax.device_put(fresh, shardings))
    return {"pinned": pinned, "pageable": rates(jax.device_get)}


def survives_donation(state: State, path: Path, staging: str) -> bool:
    """Donates every array as soon as it is staged; says whether the checkpoint has the values."""
    clobber = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    victim = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    jax.block_until_ready(clobber(jax.tree.map(jnp.copy, state)))  # compiles
    with configured(ocp, {"asynchronous.staging": staging}):
        response = ocp.save_async(path, victim, overwrite=True)
    response.wait_staged()
    jax.block_until_ready(clobber(victim))
    response.result()
    return same_values(ocp.load(path, state), state)


def measure(kind: str, plan: rounds.Plan, count: int, nbytes: int) -> list[Record]:
    """Measures everything on jax's first device: staging, then memory over ten saves."""
    state = large(count, nbytes, "float32")
    ways = [ours(f"ours, {way}", {"asynchronous.staging": way}) for way in STAGING]
    more = {
        "link": link(state, plan.rounds["timed"]),
        "is_safe": {way: survives_donation(state, plan.directory / way, way) for way in STAGING},
    }
    staging = rounds.measure("gpu", state, [*ways, ORBAX], plan, kind, **more)
    return [staging, *sweeps.growth(plan, "gpu", state, 10)]


def text(records: list[Record]) -> str:
    """Returns the tables."""
    staging, *growth = records

    def rate(form: str, unit: float) -> report.Column:
        nbytes = staging["nbytes"] / unit
        return report.column(
            "staged", lambda secs: form.format(nbytes / secs.median if secs else 0)
        )

    columns = {name: report.column(name) for name in ("blocked", "staged", "committed")} | {
        "staging, GiB/s": rate("{:.2f}", GIB),
        "share of the link": rate("{:.0%}", staging["link"]["pinned"][1]),
    }
    in_use = {name: report.column(name, report.MEBIBYTES) for name in ("resident", "host")}
    links = [
        [name, report.times(Spread(*(each / GIB for each in found)))]
        for name, found in staging["link"].items()
    ]
    safe = (f"{way} {'safe' if ok else 'NOT SAFE'}" for way, ok in staging["is_safe"].items())
    parts = [
        f"# {staging['about']}",
        f"{staging['nbytes'] / MIB:,.0f} MiB; {staging['machine']}",
        report.markdown(["link, device to host", "GiB/s"], links),
        report.table([staging], columns, with_absent=True),
        "Memory in use, MiB",
        report.table(growth, in_use),
        f"Donated as soon as staged: {', '.join(safe)}.",
    ]
    return "\n\n".join(parts)
