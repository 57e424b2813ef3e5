"""States of many sizes, budgets of many sizes, and one state saved many times."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks import measures, report, states
from benchmarks.peers import ORBAX, OURS, ours
from benchmarks.rounds import Plan, Record, measure
from benchmarks.states import MIB, State

AXES: dict[str, tuple[Callable[[int], State], tuple[int, ...]]] = {
    "leaves of 1 KiB": (states.many, (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)),
    "MiB of float32 in 16 leaves": (
        lambda size: states.large(16, size << 16, "float32"),
        (1, 4, 16, 64, 256, 1024, 4096),
    ),
}
BUDGETS = tuple(size * MIB for size in (32, 64, 128, 256, 512, 1024))
# What each budget bounds.
BOUNDS = {"write": "peak_save", "transfer": "peak_save", "read": "peak_load"}
SLACK = 64 * MIB


def scale(plan: Plan, most: Sequence[int], orbax_secs: float) -> list[Record]:
    """Measures ours and Orbax at the sizes of each of `AXES`, up to the most.

    Once a save and load of Orbax takes longer than `orbax_secs`, larger sizes go without it.
    """
    records = []
    for (axis, (make, sizes)), limit in zip(AXES.items(), most, strict=True):
        peers = [OURS, ORBAX]
        for size in [size for size in sizes if size <= limit]:
            about = f"{size:,} {axis}"
            record = measure("scale", make(size), peers, plan, about, axis=axis, size=size)
            records.append(record)
            orbax = [report.of(record, ORBAX.name, time) for time in ("committed", "loaded")]
            if sum(each.median for each in orbax if each) > orbax_secs:
                peers = [OURS]
    return records


def scale_text(records: Sequence[Record]) -> str:
    """Returns every time that was measured, and how the time of a leaf grows."""
    rows = []
    for peer, time in [(p, t) for p in (OURS.name, ORBAX.name) for t in ("committed", "loaded")]:
        secs = {
            record["size"]: found.median
            for record in records
            if "leaves of" in record["axis"] and (found := report.of(record, peer, time))
        }
        # The largest number beside a tenth of it.
        near, far = max(secs, default=0) // 10, max(secs, default=0)
        if near in secs:
            # From a thousand leaves on: below, the fixed cost of an operation shows.
            fitted = {size: each for size, each in secs.items() if size >= min(1_000, near)}
            at = [f"{secs[size] / size * 1e6:.1f} at {size:,}" for size in (near, far)]
            ratio, logs = secs[far] / secs[near] / 10, np.log(list(fitted.items()))
            exponent = np.polyfit(logs[:, 0], logs[:, 1], 1)[0]
            rows.append([f"{peer}, {time}", *at, f"{ratio:.2f}", f"{exponent:.2f}"])
    header = ["", "us a leaf", "us a leaf", "ratio", "exponent of growth, 1 is linear"]
    times = report.table(records, report.TIMES, with_absent=True)
    return f"# Scaling\n\n{times}\n\n{report.markdown(header, rows)}"


def budgets(plan: Plan, sizes: Sequence[int], least: int = 512 * MIB) -> list[Record]:
    """Saves and loads NumPy and jax states under each budget, and takes the peaks of memory.

    States of several times the budget in small leaves, and of one leaf above it. That has to pass,
    and takes what it takes; the rest should stay under the budget and 64 MiB. `least` is the
    smallest state of many leaves.
    """
    records, rng = [], np.random.default_rng(0)
    for budget in sizes:
        peers = [ours(which, {f"memory.{which}_concurrent_bytes": budget}) for which in BOUNDS]
        many = max(least, 2 * budget) * 8 // budget
        shapes = {"many leaves": (many, budget // 8), "one leaf": (1, budget * 3 // 2)}
        for shape, (count, nbytes) in shapes.items():
            arrays = [rng.standard_normal(nbytes // 4, np.float32) for _ in range(count)]
            for kind in ("numpy", "jax"):
                state = jax.device_put(arrays, may_alias=False) if kind == "jax" else arrays
                axis, size = f"budget in MiB, {shape}, {kind}", budget // MIB
                about = f"{size} MiB, {shape}, {kind}"
                record = measure("budgets", state, peers, plan, about, axis=axis, size=size)
                records.append(record)
    return records


def budgets_text(records: Sequence[Record]) -> str:
    """Returns the peaks, and which are over the budget that bounds them."""

    def verdict(record: Record, which: str) -> str:
        peak = report.of(record, which, BOUNDS[which])
        is_over = peak and peak.median > record["size"] * MIB + SLACK
        return "over" if is_over and "many leaves" in record["about"] else ""

    table = report.table(records, report.PEAKS | {"its budget": verdict}, with_absent=True)
    return f"# Peaks under a budget for writing, transfers, reading\n\n{table}"


def growth(plan: Plan, name: str, state: State, saves: int) -> list[Record]:
    """Saves one state many times over; memory in use after each save should not rise.

    Of the process, and of the whole host: drivers differ in whether they count pinned memory as the
    process's. The host's has it always.
    """
    records, path, in_use = [], plan.directory / "growth", measures.kernel_nbytes
    for number in range(saves):
        shutil.rmtree(path, ignore_errors=True)
        OURS.save(path, state, {}).result()
        measures.settle()
        figures = {
            "resident": in_use("self/status", "VmRSS"),
            "host": in_use("meminfo", "MemTotal") - in_use("meminfo", "MemAvailable"),
        }
        turns = [{"kind": "growth", "round": 0, "peer": OURS.name, "figures": figures}]
        record = {"workload": name, "about": f"save {number}", "axis": "saves", "size": number}
        records.append(record | {"peers": {OURS.name: {}}, "turns": turns})
    shutil.rmtree(path)
    return records


def growth_text(records: Sequence[Record]) -> str:
    """Returns the growth in a sentence."""
    levels = [record["turns"][0]["figures"]["resident"] / MIB for record in records]
    per_save = (levels[-1] - levels[0]) / (len(levels) - 1)
    return (
        f"# Growth over saves\n\n{len(levels) - 1} saves of {records[0]['workload']}: resident "
        f"memory from {levels[0]:.1f} to {levels[-1]:.1f} MiB, at most {max(levels):.1f}; "
        f"{per_save:+.2f} MiB a save."
    )
