"""Whether budgets bound memory, and whether saves leave memory behind."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import machine, measures, report
from benchmarks.figures import Spread
from benchmarks.measures import Trial
from benchmarks.peers import OURS
from benchmarks.rounds import Tell
from benchmarks.trees import abstract_of
from benchmarks.workloads import MIB, State

BUDGETS = tuple(size * MIB for size in (32, 64, 128, 256, 512, 1024))
# What each budget bounds.
BOUNDS = {"write": "peak_save", "transfer": "peak_save", "read": "peak_load"}
SLACK = 64 * MIB
MANY, ONE = "many leaves", "one leaf"
KINDS = ("numpy", "jax")


def _states(budget: int, least: int) -> dict[str, State]:
    """Returns states of several times the budget in small leaves, and of one leaf above it."""
    rng = np.random.default_rng(0)

    def leaves(count: int, nbytes: int) -> State:
        return {str(index): rng.standard_normal(nbytes // 4, np.float32) for index in range(count)}

    many = leaves(max(least, 2 * budget) * 8 // budget, budget // 8)
    return {MANY: many, ONE: leaves(1, budget * 3 // 2)}


def sweep(
    directory: Path,
    budgets: Sequence[int] = BUDGETS,
    *,
    least: int = 512 * MIB,
    tell: Tell = print,
) -> dict[str, Any]:
    """Saves and loads NumPy and jax states under each budget, and takes the peaks of memory.

    A leaf above the budget has to pass, and takes what it takes; the rest should stay under the
    budget and 64 MiB. `least` is the smallest state of many leaves.
    """
    rows = []
    for budget in budgets:
        for shape, numpy_state in _states(budget, least).items():
            for kind in KINDS:
                state = numpy_state
                if kind == "jax":
                    state = jax.device_put(numpy_state, may_alias=False)
                for which in BOUNDS:
                    rows.append(_row(directory, state, budget, which))
                    rows[-1] |= {"shape": shape, "kind": kind}
        tell(f"budget of {budget // MIB} MiB")
    return {"kind": "budgets", "machine": machine.facts(directory), "rows": rows}


def _row(directory: Path, state: State, budget: int, which: str) -> dict[str, Any]:
    trial = Trial(
        peer=OURS,
        path=directory / "budget",
        state=state,
        abstract=abstract_of(state),
        settings={f"memory.{which}_concurrent_bytes": budget},
    )
    measures.first(trial)
    peak = measures.memory(trial)[BOUNDS[which]]
    shutil.rmtree(trial.path)
    return {"budget": budget, "which": which, "peak": peak, "is_held": peak <= budget + SLACK}


def sweep_summary(result: dict[str, Any]) -> str:
    """Returns the peaks as a table, a column for each budget."""
    rows = result["rows"]
    budgets = sorted({row["budget"] for row in rows})
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        mark = "" if row["is_held"] or row["shape"] == ONE else " (over)"
        about = (row["shape"], row["kind"], row["which"])
        cells.setdefault(about, {})[row["budget"]] = f"{row['peak'] / MIB:.0f}{mark}"
    header = ["state", "kind", "budget of", *(f"{budget // MIB} MiB" for budget in budgets)]
    lines = [[*about, *(found[budget] for budget in budgets)] for about, found in cells.items()]
    return f"# Peaks in MiB under a budget\n\n{report.markdown(header, lines)}\n"


def draw_sweep(result: dict[str, Any], path: Path) -> None:
    """Draws the peaks over the budgets, with the line that they should stay under."""
    rows = [row for row in result["rows"] if row["shape"] == MANY]
    panels = {}
    for which in BOUNDS:
        lines = {
            kind: [
                (row["budget"] / MIB, Spread.exact(row["peak"] / MIB))
                for row in rows
                if (row["which"], row["kind"]) == (which, kind)
            ]
            for kind in KINDS
        }
        lines["budget + 64 MiB"] = [
            (at, Spread.exact(at + SLACK / MIB)) for at, _ in lines[KINDS[0]]
        ]
        panels[f"{which} budget: peak in MiB"] = ("budget, MiB", lines)
    report.draw_lines(panels, path, log=False)


def growth(
    directory: Path, name: str, state: State, saves: int, warm_up: int = 3
) -> dict[str, Any]:
    """Saves one state many times over; resident memory after each save should not rise."""
    path = directory / "growth"
    levels = []
    for _ in range(warm_up + saves):
        shutil.rmtree(path, ignore_errors=True)
        OURS.save(path, state, {}).result()
        gc.collect()
        levels.append(measures.resident())
    shutil.rmtree(path)
    levels = levels[warm_up - 1 :]
    return {
        "kind": "growth",
        "workload": name,
        "machine": machine.facts(directory),
        "levels": levels,
        "per_save": (levels[-1] - levels[0]) / saves,
    }


def growth_summary(result: dict[str, Any]) -> str:
    """Returns the growth in a sentence."""
    levels = [level / MIB for level in result["levels"]]
    return (
        f"# Growth over saves\n\n{len(levels) - 1} saves of {result['workload']}: resident memory "
        f"from {levels[0]:.1f} to {levels[-1]:.1f} MiB, at most {max(levels):.1f}; "
        f"{result['per_save'] / MIB:+.2f} MiB a save.\n"
    )


def draw_growth(result: dict[str, Any], path: Path) -> None:
    """Draws resident memory over the saves."""
    points = [
        (float(number), Spread.exact(level / MIB)) for number, level in enumerate(result["levels"])
    ]
    panel = ("saves", {result["workload"]: points})
    report.draw_lines({"resident memory in MiB": panel}, path, log=False)
