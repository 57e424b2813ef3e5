"""The tables and the plots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib import ticker

from benchmarks import figures, machine
from benchmarks.figures import Record, Spread
from benchmarks.workloads import MIB

TIMES = ("blocked", "committed", "loaded")
NOTHING = "-"


def secs(found: Spread | None) -> str:
    """Returns a time with its quartiles, in ms below a second."""
    if found is None:
        return NOTHING
    unit, factor = ("ms", 1e3) if found.median < 1 else ("s", 1)
    low, median, high = (_rounded(value * factor) for value in found)
    return f"{median} {unit}" if found.low == found.high else f"{median} ({low} to {high}) {unit}"


def _rounded(value: float) -> str:
    """Returns three figures, without exponents."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(found: Spread | None) -> str:
    """Returns a ratio with its quartiles."""
    if found is None:
        return NOTHING
    low, median, high = map(_rounded, found)
    return f"{median} ({low} to {high})"


def _scaled(factor: float, form: str) -> Callable[[Spread | None], str]:
    return lambda found: NOTHING if found is None else form.format(found.median * factor)


MEBIBYTES = _scaled(1 / MIB, "{:.1f}")
COSTS: dict[str, tuple[str, Callable[[Spread | None], str]]] = {
    "first save": ("first_save", secs),
    "first load": ("first_load", secs),
    "on disk, MiB": ("disk_nbytes", MEBIBYTES),
    "files": ("disk_files", _scaled(1, "{:.0f}")),
    "CPU of a save": ("save_cpu", secs),
    "CPU of a load": ("load_cpu", secs),
    "peak of a save, MiB": ("peak_save", MEBIBYTES),
    "peak of a load, MiB": ("peak_load", MEBIBYTES),
    "threads": ("threads", _scaled(1, "{:.0f}")),
    "longest gap of the loop": ("loop_gap", secs),
}
PERCENT = _scaled(100, "{:.0f} %")
PACES = {
    "of its rate": "pace",
    "of its rate, saved apart": "apart_pace",
    "of its core": "core",
    "of its core, saved apart": "apart_core",
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables(record: Record) -> str:
    """Returns the tables of one workload: times, ratios, costs."""
    title = f"## {record['workload']}: {record['about']}"
    cache = "dropped from the page cache" if record["is_cold"] else "in the page cache"
    rounds = len({turn["round"] for turn in record["turns"] if turn["kind"] == "timed"})
    facts = (
        f"{record['leaves']:,} leaves, {record['nbytes'] / MIB:,.1f} MiB; {rounds} rounds, medians "
        f"(quartiles); files {cache} when they are loaded. {machine.line(record['machine'])}."
    )
    peers = record["peers"]
    present = [name for name in peers if figures.of(record, name, "committed")]
    seconds = markdown(
        ["peer", "durable", *TIMES],
        [
            [name, about["durable"], *(secs(figures.of(record, name, time)) for time in TIMES)]
            if name in present
            else [name, about["left_out"], *([NOTHING] * len(TIMES))]
            for name, about in peers.items()
        ],
    )
    costs = markdown(
        ["peer", *COSTS],
        [
            [name, *(form(figures.of(record, name, measure)) for measure, form in COSTS.values())]
            for name in present
        ],
    )
    paces = markdown(
        ["peer", *(f"{name}: {share}" for name in ("step", "counter") for share in PACES)],
        [
            [
                peer,
                *(
                    PERCENT(figures.of(record, peer, f"{name}_{measure}"))
                    for name in ("step", "counter")
                    for measure in PACES.values()
                ),
            ]
            for peer in present
        ],
    )
    return "\n\n".join([title, facts, seconds, _ratios(record, present), costs, paces])


def _ratios(record: Record, present: list[str]) -> str:
    """Returns how many times as fast as Orbax each peer is, and its shares of raw speed."""

    def faster(name: str, time: str) -> str:
        return times(figures.ratio(record, time, "orbax", name))

    shares = [(floor, time) for time in ("committed", "loaded") for floor in figures.floors(record)]
    return markdown(
        [
            "times as fast as Orbax",
            *TIMES,
            *(f"{time}, share of {floor}" for floor, time in shares),
        ],
        [
            [
                name,
                *(faster(name, time) for time in TIMES),
                *(times(figures.ratio(record, time, floor, name)) for floor, time in shares),
            ]
            for name in present
        ],
    )


def draw_times(record: Record, path: Path) -> None:
    """Draws a dot for each peer and time, with its quartiles."""
    names = [name for name in record["peers"] if figures.of(record, name, "committed")]
    figure, panels = plt.subplots(1, len(TIMES), figsize=(12, 3.6), layout="constrained")
    for axes, time in zip(panels, TIMES, strict=True):
        for name in names:
            if found := figures.of(record, name, time):
                errors = [[found.median - found.low], [found.high - found.median]]
                colour = "crimson" if name == "ours" else "0.4"
                axes.errorbar(found.median, name, xerr=errors, fmt="o", capsize=3, color=colour)
        axes.set(title=time, xlabel="seconds", xscale="log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(visible=True, alpha=0.3)
        axes.invert_yaxis()
    figure.suptitle(f"{record['workload']}: {record['about']}")
    save_figure(figure, path)


def draw_lines(
    panels: dict[str, tuple[str, dict[str, list[tuple[float, Spread]]]]], path: Path, *, log: bool
) -> None:
    """Draws lines with quartiles as bands.

    Args:
      panels: for each title the label of the x axis, and the points of each line.
      path: the file to write.
      log: whether both axes are logarithmic.
    """
    figure, row = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axes, (title, (label, lines)) in zip(row[0], panels.items(), strict=True):
        for name, points in lines.items():
            x = [at for at, _ in points]
            (line,) = axes.plot(x, [found.median for _, found in points], marker="o", label=name)
            low, high = [found.low for _, found in points], [found.high for _, found in points]
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        axes.set(title=title, xlabel=label)
        if log:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a plot as PNG and forgets it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def file_name(workload: str) -> str:
    """Returns a workload's name as the name of a file."""
    return re.sub(r"[^\w.-]+", "-", workload)


def write_json(record: Any, path: Path) -> None:
    """Writes a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_runs(results: Path) -> str:
    """Draws each run found in a results folder, writes tables.md there, and returns its text."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("run-*.json"))]
    for record in found:
        draw_times(record, results / f"run-{file_name(record['workload'])}.png")
    text = "\n\n".join(tables(record) for record in found) + "\n"
    (results / "tables.md").write_text(text, encoding="utf-8")
    return text
