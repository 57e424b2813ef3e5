"""Looks for the options that suit a state and a storage path, one factor at a time."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import figures, peers, report
from benchmarks.figures import Record, Spread
from benchmarks.rounds import Plan, Tell, measure
from benchmarks.workloads import MIB, State

BUDGETS = (64 * MIB, 256 * MIB, 1024 * MIB)
# What is tried beside the default. What this version refuses is listed as refused.
FACTORS: dict[str, tuple[Any, ...]] = {
    "memory.write_concurrent_bytes": BUDGETS,
    "memory.transfer_concurrent_bytes": BUDGETS,
    "memory.read_concurrent_bytes": BUDGETS,
    "array.saving.use_compression": (False,),
    "array.saving.compression_min_saving": (0.0, 0.05, 0.2),
    "array.saving.use_zarr3": (False,),
    "array.saving.use_ocdbt": (False,),
    "array.saving.ocdbt_target_data_file_size": (64 * MIB, 256 * MIB),
    "array.saving.storage_options.chunk_byte_size": (4 * MIB, 16 * MIB),
}
AIMS = {
    "both": ("committed", "loaded"),
    "save": ("committed",),
    "load": ("loaded",),
    "blocked": ("blocked",),
}
DEFAULT = "default"
COMBINED = "combined"
MARGIN = 0.03


def tune(
    name: str, state: State, plan: Plan, *, aim: str, limit: int | None, tell: Tell = print
) -> dict[str, Any]:
    """Sweeps each factor, confirms the best of all together, and returns the result.

    Args:
      name: the workload.
      state: what is saved and loaded.
      plan: how; timed and memory turns are needed.
      aim: which times to shorten, a key of `AIMS`.
      limit: the most bytes of memory that a save, or a load beside its result, may take; None for
        no limit.
      tell: called with a line of text after each factor.
    """
    sweeps: dict[str, Record] = {}
    chosen: dict[str, Any] = {}
    for path, values in FACTORS.items():
        variants: dict[str, dict[str, Any]] = {DEFAULT: {}} | {
            _label(value): {path: value} for value in values
        }
        record = measure(
            name, state, [peers.variant(*pair) for pair in variants.items()], plan, about=path
        )
        sweeps[path] = record
        best = choose(record, aim, limit, _peaks(path))
        chosen |= variants[best]
        tell(f"{path}: {best}{_refusals(record)}")
    if chosen.get("array.saving.use_compression") is False:
        chosen.pop("array.saving.compression_min_saving", None)
    confirmed: Record | None = None
    if chosen:
        pair = [peers.variant(DEFAULT, {}), peers.variant(COMBINED, chosen)]
        confirmed = measure(name, state, pair, plan, about="all together")
        if choose(confirmed, aim, limit, ("peak_save", "peak_load")) == DEFAULT:
            tell("all together are no better than the defaults")
            chosen = {}
    return {
        "kind": "tune",
        "workload": name,
        "aim": aim,
        "limit": limit,
        "sweeps": sweeps,
        "confirmed": confirmed,
        "recommended": chosen,
    }


def _peaks(path: str) -> tuple[str, ...]:
    """Returns the measures of memory that an option governs."""
    if not path.startswith("memory."):
        return ()
    return ("peak_load",) if "read" in path else ("peak_save",)


def choose(record: Record, aim: str, limit: int | None, peaks: tuple[str, ...]) -> str:
    """Returns the best variant: within the limit of memory, and faster than the default.

    Faster means by `MARGIN` in three rounds of four; less than that is noise, and the default
    stays. Where the default exceeds the limit, the fastest variant within it is taken, and
    the most frugal one if there is none.
    """
    present: list[str] = [name for name in record["peers"] if figures.of(record, name, "committed")]

    def peak(name: str) -> float:
        found = [figures.of(record, name, cost) for cost in peaks]
        return max((each.median for each in found if each), default=0.0)

    within = [name for name in present if limit is None or peak(name) <= limit]
    if not within:
        return min(present, key=peak)
    best: str = min(within, key=lambda name: gain(record, name, aim).median)
    if DEFAULT in within and gain(record, best, aim).high > 1 - MARGIN:
        return DEFAULT
    return best


def gain(record: Record, name: str, aim: str) -> Spread:
    """Returns the time of a variant relative to the default's of the same round."""
    measured = [figures.ratios(record, time, name, DEFAULT) for time in AIMS[aim]]
    found = figures.spread(map(figures.geometric_mean, zip(*measured, strict=True)))
    assert found is not None, f"no round of {name}"
    return found


def _refusals(record: Record) -> str:
    left_out = {name: about["left_out"] for name, about in record["peers"].items()}
    return "".join(f"; {name} left out ({why})" for name, why in left_out.items() if why)


def code(settings: dict[str, Any]) -> str:
    """Returns the lines that make the recommended context."""
    lines = [f"context.{path} = {_literal(value)}" for path, value in settings.items()]
    return "\n".join(["import orbax_async as ocp", "", "context = ocp.Context()", *lines])


def _label(value: Any) -> str:
    return f"{value // MIB} MiB" if _is_mebibytes(value) else str(value)


def _literal(value: Any) -> str:
    return f"{value // MIB} * 2**20" if _is_mebibytes(value) else repr(value)


def _is_mebibytes(value: Any) -> bool:
    return type(value) is int and value >= MIB and value % MIB == 0


def summary(result: dict[str, Any]) -> str:
    """Returns the sweeps as tables, and the recommended context as code."""
    parts = [f"# Tuning {result['workload']} for {result['aim']}"]
    for path, record in {**result["sweeps"], "all together": result["confirmed"]}.items():
        if record is not None:
            parts += [f"## {path}", _table(record, result["aim"])]
    parts += ["## Recommended", f"```python\n{code(result['recommended'])}\n```"]
    return "\n\n".join(parts) + "\n"


def _table(record: Record, aim: str) -> str:
    rows = []
    for name, about in record["peers"].items():
        if figures.of(record, name, "committed") is None:
            rows.append([name, about["left_out"], *([report.NOTHING] * 6)])
            continue
        cells = [report.secs(figures.of(record, name, time)) for time in report.TIMES]
        for cost in ("peak_save", "peak_load", "disk_nbytes"):
            cells.append(report.MEBIBYTES(figures.of(record, name, cost)))
        rows.append([name, report.times(gain(record, name, aim)), *cells])
    memory = ["peak of a save, MiB", "peak of a load, MiB", "on disk, MiB"]
    return report.markdown(["value", "time, default = 1", *report.TIMES, *memory], rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the times of each value of each factor."""
    sweeps = result["sweeps"]
    columns = 3
    figure, grid = plt.subplots(
        -(-len(sweeps) // columns), columns, figsize=(15, 9), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(sweeps) :]:
        axes.set_axis_off()
    for axes, (factor, record) in zip(grid.flat, sweeps.items(), strict=False):
        names = [name for name in record["peers"] if figures.of(record, name, "committed")]
        for time in report.TIMES:
            found = [figures.of(record, name, time) for name in names]
            medians = np.array([each.median for each in found if each])
            ends = np.array([[each.low, each.high] for each in found if each])
            errors = abs(ends.T - medians)
            axes.errorbar(names, medians, yerr=errors, marker="o", capsize=3, label=time)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("seconds")
        axes.set_title("\n".join(textwrap.wrap(factor, 48)), fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
    grid.flat[0].legend()
    report.save_figure(figure, path)
