"""Looks for the options that suit a state and a storage path, one factor at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.peers import ours
from benchmarks.report import Spread
from benchmarks.rounds import Plan, Record, measure
from benchmarks.states import MIB, State

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
DEFAULT, COMBINED = "default", "all together"
MARGIN = 0.03


def tune(
    name: str, state: State, plan: Plan, aim: str, limit: int | None
) -> tuple[list[Record], dict[str, Any]]:
    """Sweeps each factor, confirms the best of all together, and returns the settings too.

    `limit` is the most bytes of memory that a save, or a load beside its result, may take.
    """
    records: list[Record] = []
    chosen: dict[str, Any] = {}
    for path, values in FACTORS.items():
        variants: dict[str, Any] = {DEFAULT: {}} | {_literal(each): {path: each} for each in values}
        peers = [ours(*each) for each in variants.items()]
        records.append(measure(name, state, peers, plan, path))
        best = choose(records[-1], aim, limit)
        chosen |= variants[best]
        plan.tell(f"{path}: {best}")
    if chosen.get("array.saving.use_compression") is False:
        chosen.pop("array.saving.compression_min_saving", None)
    if chosen:
        pair = [ours(DEFAULT), ours(COMBINED, chosen)]
        records.append(measure(name, state, pair, plan, COMBINED))
        if choose(records[-1], aim, limit) == DEFAULT:
            plan.tell("all together are no better than the defaults")
            chosen = {}
    return records, chosen


def choose(record: Record, aim: str, limit: int | None) -> str:
    """Returns the best variant: within the limit of memory, and faster than the default.

    Faster means by `MARGIN` in three rounds of four; less than that is noise, and the default
    stays. Where the default exceeds the limit, the fastest variant within it is taken, and
    the most frugal one if there is none. A budget for reading bounds loads, one for writing or
    transfers saves, all options together bound both, and another one bounds nothing.
    """
    option, measured = record["about"], report.present(record)
    governs = {"peak_load": ("read_", COMBINED), "peak_save": ("write_", "transfer_", COMBINED)}
    peaks = [peak for peak, names in governs.items() if any(name in option for name in names)]

    def peak(name: str) -> float:
        found = [report.of(record, name, measure) for measure in peaks]
        return max((each.median for each in found if each), default=0.0)

    within = [name for name in measured if limit is None or peak(name) <= limit]
    if not within:
        return min(measured, key=peak)
    best = min(within, key=lambda name: gain(record, name, aim).median)
    if DEFAULT in within and gain(record, best, aim).high > 1 - MARGIN:
        return DEFAULT
    return best


def gain(record: Record, name: str, aim: str) -> Spread:
    """Returns the time of a variant relative to the default's of the same round."""
    measured = [report.ratios(record, time, name, DEFAULT) for time in AIMS[aim]]
    found = report.spread(map(statistics.geometric_mean, zip(*measured, strict=True)))
    assert found is not None, f"no round of {name}"
    return found


def code(settings: dict[str, Any]) -> str:
    """Returns the lines that make the recommended context."""
    lines = [f"context.{path} = {_literal(value)}" for path, value in settings.items()]
    return "\n".join(["import orbax_async as ocp", "", "context = ocp.Context()", *lines])


def _literal(value: Any) -> str:
    is_mebibytes = type(value) is int and value >= MIB and value % MIB == 0
    return f"{value // MIB} * 2**20" if is_mebibytes else repr(value)


def text(records: Sequence[Record], chosen: dict[str, Any], aim: str) -> str:
    """Returns the sweeps as a table, and the recommended context as code."""
    relative: dict[str, report.Column] = {
        "time, default = 1": lambda record, name: report.times(gain(record, name, aim))
    }
    columns = relative | report.TIMES | report.PEAKS | report.DISK
    table = report.table(records, columns, with_absent=True)
    title = f"# Tuning {records[0]['workload']} for {aim}"
    return f"{title}\n\n{table}\n\n## Recommended\n\n```python\n{code(chosen)}\n```"
