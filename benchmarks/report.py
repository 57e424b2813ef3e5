"""From single measurements to what is shown: medians and their spread, tables and plots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.rounds import Record
from benchmarks.states import MIB


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    median: float
    high: float


NOTHING = "-"
Cell = Callable[[Spread | None], str]
Column = Callable[[Record, str], str]  # what it says of a peer


def spread(values: Iterable[float]) -> Spread | None:
    """Returns the median and quartiles; None of no values."""
    values = list(values)
    return Spread(*map(float, np.quantile(values, [0.25, 0.5, 0.75]))) if values else None


def by_round(record: Record, peer: str, measure: str) -> dict[int, float]:
    """Returns what was measured of a peer, by round."""
    return {
        turn["round"]: turn["figures"][measure]
        for turn in record["turns"]
        if turn["peer"] == peer and measure in turn["figures"]
    }


def of(record: Record, peer: str, measure: str) -> Spread | None:
    """Returns the spread of a measure of a peer."""
    return spread(by_round(record, peer, measure).values())


def present(record: Record) -> list[str]:
    """Returns the names of the peers that had a turn that counts."""
    seen = {turn["peer"] for turn in record["turns"] if turn["kind"] != "first"}
    return [name for name in record["peers"] if name in seen]


def ratios(record: Record, measure: str, above: str, below: str) -> list[float]:
    """Returns `above / below` for each round in which both were measured.

    Two turns of one round lie close together in time, so that a slow minute hits both.
    """
    tops, bottoms = by_round(record, above, measure), by_round(record, below, measure)
    return [tops[number] / bottoms[number] for number in tops if bottoms.get(number)]


def secs(found: Spread | None) -> str:
    """Returns a time with its quartiles, in ms below a second."""
    if found is None:
        return NOTHING
    unit, factor = ("ms", 1e3) if found.median < 1 else ("s", 1)
    return f"{times(Spread(*(value * factor for value in found)))} {unit}"


def times(found: Spread | None) -> str:
    """Returns a ratio with its quartiles, three figures each."""
    if found is None:
        return NOTHING
    low, median, high = (f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in found)
    return median if found.low == found.high else f"{median} ({low} to {high})"


def scaled(factor: float, form: str) -> Cell:
    """Returns what writes a median in another unit."""
    return lambda found: NOTHING if found is None else form.format(found.median * factor)


def column(measure: str, cell: Cell = secs) -> Column:
    """Returns the column of a measure."""
    return lambda record, peer: cell(of(record, peer, measure))


def ratio(measure: str, above: str = "", below: str = "") -> Column:
    """Returns the column of `above / below`; a name that is missing is the peer's."""
    return lambda record, peer: times(spread(ratios(record, measure, above or peer, below or peer)))


MEBIBYTES, COUNT, PERCENT = scaled(1 / MIB, "{:.1f}"), scaled(1, "{:.0f}"), scaled(100, "{:.0f} %")
TIMES = {time: column(time) for time in ("blocked", "committed", "loaded")}
PEAKS = {
    "peak of a save, MiB": column("peak_save", MEBIBYTES),
    "peak of a load, MiB": column("peak_load", MEBIBYTES),
}
DISK = {"on disk, MiB": column("disk_nbytes", MEBIBYTES)}
COSTS = {
    "first save": column("first_save"),
    "first load": column("first_load"),
    **DISK,
    "files": column("disk_files", COUNT),
    "CPU of a save": column("save_cpu"),
    "CPU of a load": column("load_cpu"),
    **PEAKS,
    "threads": column("threads", COUNT),
    "longest gap of the loop": column("loop_gap"),
    "training step: of its rate": column("step_pace", PERCENT),
    "counter: of its rate": column("counter_pace", PERCENT),
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(
    records: Sequence[Record], columns: Mapping[str, Column], *, with_absent: bool = False
) -> str:
    """Returns a table with a row for each peer of each record.

    A peer that was left out has no row, or with `with_absent` one that tells the reason.
    """
    rows = []
    for record in records:
        measured = present(record)
        for peer, about in record["peers"].items():
            if peer in measured:
                cells = [column(record, peer) for column in columns.values()]
                rows.append([record["about"], peer, *cells])
            elif with_absent:
                nothing = [NOTHING] * (len(columns) - 1)
                rows.append([record["about"], peer, about["left_out"], *nothing])
    begin = 1 if len(records) == 1 else 0  # one subject needs no column
    return markdown(["", "peer", *columns][begin:], [row[begin:] for row in rows])


def tables(record: Record) -> str:
    """Returns the tables of one workload: times, ratios, costs."""
    cache = "dropped from the page cache" if record["is_cold"] else "in the page cache"
    rounds = len({turn["round"] for turn in record["turns"] if turn["kind"] == "timed"})
    facts = (
        f"{record['leaves']:,} leaves, {record['nbytes'] / MIB:,.1f} MiB; {rounds} rounds, medians "
        f"(quartiles); files {cache} when they are loaded. {record['machine']}."
    )
    durable: dict[str, Column] = {"durable": lambda record, peer: record["peers"][peer]["durable"]}
    faster = {f"{time}, times as fast as Orbax": ratio(time, above="orbax") for time in TIMES}
    shares = {
        f"{time}, share of {floor}": ratio(time, above=floor)
        for time in ("committed", "loaded")
        for floor in present(record)
        if record["peers"][floor]["is_floor"]
    }
    title = f"## {record['workload']}: {record['about']}"
    seconds = table([record], durable | TIMES, with_absent=True)
    others = [table([record], columns) for columns in (faster | shares, COSTS)]
    return "\n\n".join([title, facts, seconds, *others])


def draw(records: Sequence[Record], measures: Iterable[str], path: Path) -> None:
    """Draws medians and quartiles over the sizes of records, or over peers if they have none.

    Records with the same axis share a panel for each measure. Times have logarithmic axes.
    """
    panels: dict[tuple[str, str], dict[str, list[tuple[Any, Spread]]]] = {}
    for record in records:
        for measure in measures:
            panel = panels.setdefault((measure, record.get("axis") or record["about"]), {})
            for peer in present(record):
                line, at = (peer, record["size"]) if "size" in record else ("median", peer)
                if found := of(record, peer, measure):
                    panel.setdefault(line, []).append((at, found))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (5 * columns, 4 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, ((measure, about), lines) in zip(grid.flat, panels.items(), strict=False):
        for name, points in lines.items():
            x, y = [at for at, _ in points], np.array([found for _, found in points])
            errors = abs(y[:, [0, 2]].T - y[:, 1])
            axes.errorbar(x, y[:, 1], yerr=errors, marker="o", capsize=3, label=name)
        axes.set_title(f"{measure}\n{about}", fontsize=8)
        if measure in TIMES:
            axes.set(yscale="log", **({} if "median" in lines else {"xscale": "log"}))
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def publish(
    folder: Path, name: str, records: Sequence[Record], text: str, measures: Iterable[str] = TIMES
) -> None:
    """Prints a text, and writes it beside the records, as JSON, and their plot."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / re.sub(r"[^\w.-]+", "-", name)
    Path(f"{stem}.json").write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    Path(f"{stem}.md").write_text(text + "\n", "utf-8")
    draw(records, measures, Path(f"{stem}.png"))
    print(text)
