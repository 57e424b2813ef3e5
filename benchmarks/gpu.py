"""Staging from a GPU: against the link to the host, against Orbax, and whether it is safe.

The link is what jax gets when it copies large arrays to pinned host memory. Staging is what a save
does before its caller may go on, so its speed is the bytes of the state over that time.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import orbax_async as ocp
from benchmarks import figures, machine, measures, report
from benchmarks.figures import Spread
from benchmarks.peers import ORBAX, OURS, Pending, configured
from benchmarks.trees import same_values, stored_nbytes
from benchmarks.workloads import MIB, State

Figures = dict[str, Any]


def device() -> jax.Device | None:
    """Returns the first GPU, or None."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        return None


def make(on: jax.Device, count: int, nbytes: int) -> State:
    """Returns `count` arrays of `nbytes` on a device, of random bits: nothing to compress."""
    keys = jax.random.split(jax.random.key(0), count)
    draw = jax.jit(lambda key: jax.random.normal(key, (nbytes // 4,), jnp.float32))
    with jax.default_device(on):
        state = {f"kernel_{index}": draw(key) for index, key in enumerate(keys)}
    return jax.block_until_ready(jax.device_put(state, on))


def bandwidth(nbytes: int, act: Callable[[], Any], rounds: int) -> Spread:
    """Returns bytes per second over some rounds, after one for warming up."""
    rates = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        kept = act()
        rates.append(nbytes / (time.perf_counter() - began))
        del kept
    return _spread(rates[1:])


def link(state: State, rounds: int) -> dict[str, Spread]:
    """Measures device to host, to pinned memory and to pageable memory."""
    nbytes = stored_nbytes(state)
    shardings = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), state)

    def pageable() -> Any:
        # Fresh arrays, because jax keeps the host copy of one that has been asked for it before.
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        began = time.perf_counter()
        jax.device_get(fresh)
        return time.perf_counter() - began

    pageable()
    return {
        "pinned": bandwidth(
            nbytes, lambda: jax.block_until_ready(jax.device_put(state, shardings)), rounds
        ),
        "pageable": _spread(nbytes / pageable() for _ in range(rounds)),
    }


def staging(state: State, path: Path, rounds: int) -> dict[str, dict[str, Spread]]:
    """Times saves until they return, are staged and are committed: ours, eager and lazy, Orbax."""
    nbytes = stored_nbytes(state)
    ways: dict[str, Callable[[], Pending]] = {
        "ours, eager": functools.partial(OURS.save, path, state, {}),
        "ours, lazy": functools.partial(OURS.save, path, state, {"asynchronous.staging": "lazy"}),
        "orbax": functools.partial(ORBAX.save, path, state, {}),
    }
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, save in ways.items():
            shutil.rmtree(path, ignore_errors=True)
            measures.settle()
            began = time.perf_counter()
            pending = save()
            blocked = time.perf_counter() - began
            if isinstance(pending, ocp.AsyncResponse):
                pending.wait_staged()
            staged = time.perf_counter() - began
            pending.result()
            if number:
                times[name].append((blocked, staged, time.perf_counter() - began))
    return {
        name: {
            "blocked": _spread(row[0] for row in rows),
            "staged": _spread(row[1] for row in rows),
            "committed": _spread(row[2] for row in rows),
            "bytes_per_sec": _spread(nbytes / row[1] for row in rows),
        }
        for name, rows in times.items()
    }


def _spread(values: Iterable[float]) -> Spread:
    found = figures.spread(values)
    assert found is not None
    return found


def growth(state: State, path: Path, saves: int) -> list[tuple[int, int]]:
    """Returns the memory in use after each save: the process's, and the whole host's.

    Drivers differ in whether they count pinned memory as the process's; the host's has it always.
    """
    levels = []
    for _ in range(saves):
        shutil.rmtree(path, ignore_errors=True)
        OURS.save(path, state, {}).result()
        measures.settle()
        levels.append((measures.resident(), _host_memory_in_use()))
    return levels


def _host_memory_in_use() -> int:
    lines = map(str.split, Path("/proc/meminfo").read_text().splitlines())
    sizes = {name: int(size) * 1024 for name, size, *_ in lines}
    return sizes["MemTotal:"] - sizes["MemAvailable:"]


def survives_donation(state: State, path: Path, staging: str) -> bool:
    """Donates every array as soon as it is staged; says whether the checkpoint has the values."""
    clobber = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    victim = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    jax.block_until_ready(clobber(jax.tree.map(jnp.copy, state)))  # compiles
    shutil.rmtree(path, ignore_errors=True)
    with configured(ocp, {"asynchronous.staging": staging}):
        response = ocp.save_async(path, victim)
    response.wait_staged()
    jax.block_until_ready(clobber(victim))
    response.result()
    return same_values(ocp.load(path, state), state)


def measure(on: jax.Device, directory: Path, count: int, nbytes: int, rounds: int) -> Figures:
    """Measures everything on one device, and returns the record."""
    state = make(on, count, nbytes)
    path = directory / "gpu"
    found: Figures = {
        "kind": "gpu",
        "device": on.device_kind,
        "machine": machine.facts(directory),
        "nbytes": stored_nbytes(state),
        "link": link(state, rounds),
        "staging": staging(state, path, rounds),
        "levels": growth(state, path, 10),
        "survives_donation": {
            way: survives_donation(state, path, way) for way in ("eager", "lazy")
        },
    }
    shutil.rmtree(path)
    return found


def summary(found: Figures) -> str:
    """Returns the tables."""
    pinned = found["link"]["pinned"][1]
    gibibyte = 1 << 30
    links = [
        [name, f"{median / gibibyte:.2f} ({low / gibibyte:.2f} to {high / gibibyte:.2f})"]
        for name, (low, median, high) in found["link"].items()
    ]
    saves = [
        [
            name,
            *(report.secs(Spread(*times[time])) for time in ("blocked", "staged", "committed")),
            f"{times['bytes_per_sec'][1] / gibibyte:.2f}",
            f"{times['bytes_per_sec'][1] / pinned:.0%}",
        ]
        for name, times in found["staging"].items()
    ]
    shown = dict(enumerate(found["levels"], 1))
    levels = [
        [str(number), *(f"{level / MIB:,.0f}" for level in shown[number])]
        for number in sorted({1, 2, len(shown)} & shown.keys())
    ]
    donated = ", ".join(
        f"{way} {'safe' if is_safe else 'NOT SAFE'}"
        for way, is_safe in found["survives_donation"].items()
    )
    header = ["save", "blocked", "staged", "committed", "staging, GiB/s", "share of the link"]
    return "\n\n".join(
        [
            f"# {found['device']}",
            f"{found['nbytes'] / MIB:,.0f} MiB; {machine.line(found['machine'])}",
            report.markdown(["link, device to host", "GiB/s"], links),
            report.markdown(header, saves),
            report.markdown(["after save", "process, MiB", "host, MiB"], levels),
            f"Donated as soon as staged: {donated}.\n",
        ]
    )
