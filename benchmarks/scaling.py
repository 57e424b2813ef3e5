"""How time grows with the number of leaves and with their bytes, ours beside Orbax's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures, report, workloads
from benchmarks.figures import Record
from benchmarks.peers import ORBAX, OURS
from benchmarks.rounds import Plan, Tell, measure
from benchmarks.workloads import MIB, State

LEAVES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
MEBIBYTES = (1, 4, 16, 64, 256, 1024, 4096)
AXES: dict[str, tuple[str, Callable[[int], State]]] = {
    "leaves": ("leaves of 1 KiB", lambda count: workloads.many(count, 1.0)),
    "mebibytes": (
        "MiB of float32 in 16 leaves",
        lambda size: workloads.large(16, size * MIB // 16, np.float32, "normal", 1.0),
    ),
}


def scale(
    plan: Plan, sizes: Mapping[str, Sequence[int]], *, orbax_secs: float, tell: Tell = print
) -> dict[str, Any]:
    """Measures ours and Orbax at each size of each axis.

    Args:
      plan: how.
      sizes: for each of `AXES` the sizes, ascending.
      orbax_secs: once a save and load of Orbax takes longer than this, larger sizes go without it.
      tell: called with a line of text after each size.
    """
    records: list[Record] = []
    for axis, steps in sizes.items():
        label, make = AXES[axis]
        taking_part = [OURS, ORBAX]
        for size in steps:
            record = measure(f"{size} {axis}", make(size), taking_part, plan, about=label)
            records.append({**record, "axis": axis, "size": size})
            orbax = [figures.of(record, ORBAX.name, time) for time in ("committed", "loaded")]
            took = sum(each.median for each in orbax if each)
            if took > orbax_secs and ORBAX in taking_part:
                taking_part.remove(ORBAX)
            tell(f"{size} {label}: Orbax {f'{took:.2f} s' if took else 'left out'}")
    return {"kind": "scale", "orbax_secs": orbax_secs, "records": records}


def per_leaf(result: dict[str, Any], peer: str, time: str) -> dict[int, float]:
    """Returns the median seconds for each leaf, by number of leaves."""
    return {
        record["size"]: found.median / record["size"]
        for record in result["records"]
        if record["axis"] == "leaves" and (found := figures.of(record, peer, time))
    }


def summary(result: dict[str, Any]) -> str:
    """Returns every time that was measured, and how the time of a leaf grows."""
    rows = [
        [f"{record['size']:,}", record["about"], peer]
        + [report.secs(figures.of(record, peer, time)) for time in report.TIMES]
        for record in result["records"]
        for peer in record["peers"]
    ]
    header = ["size", "of", "peer", *report.TIMES]
    return f"# Scaling\n\n{report.markdown(header, rows)}\n\n{_growth(result)}\n"


def _growth(result: dict[str, Any]) -> str:
    """Compares the time of a leaf at the largest number with that at a tenth of it."""
    rows = []
    for peer in (OURS.name, ORBAX.name):
        for time in ("committed", "loaded"):
            secs = per_leaf(result, peer, time)
            far = max(secs, default=0)
            near = far // 10
            if near not in secs:
                continue
            # From a thousand leaves on: below, the fixed cost of an operation shows.
            fitted = {size: each * size for size, each in secs.items() if size >= min(1_000, near)}
            rows.append(
                [
                    f"{peer}, {time}",
                    f"{secs[near] * 1e6:.1f} at {near:,}",
                    f"{secs[far] * 1e6:.1f} at {far:,}",
                    f"{secs[far] / secs[near]:.2f}",
                    f"{figures.slope(fitted, fitted.values()):.2f}",
                ]
            )
    header = ["", "µs a leaf", "µs a leaf", "ratio", "exponent of growth, 1 is linear"]
    return report.markdown(header, rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the times over leaves and over bytes, both axes logarithmic."""
    panels: dict[str, Any] = {}
    for axis, (label, _) in AXES.items():
        for time in ("committed", "loaded"):
            lines = {
                peer: [
                    (record["size"], found)
                    for record in result["records"]
                    if record["axis"] == axis and (found := figures.of(record, peer, time))
                ]
                for peer in (OURS.name, ORBAX.name)
            }
            if any(lines.values()):
                panels[f"{time}, seconds over {axis}"] = (label, lines)
    report.draw_lines(panels, path, log=True)
