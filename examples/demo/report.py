"""The table and the two pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from killing import Life
from matplotlib.patches import Patch
from trainers import Run

WAITS = "training stands still"
STEPS = "training steps"
# What a save does: the span's name, and its row.
ROWS = {
    "stage": "capture values",
    "create": "create directory",
    "write": "write arrays",
    "writeback": "start the disk",
    "documents": "write documents",
    "sync": "sync to disk",
    "publish": "rename into place",
}
LEGEND = {
    "the trainer waits for the save": "crimson",
    "the trainer trains": "seagreen",
    "the engine moves array bytes": "steelblue",
    "the engine makes them durable and visible": "0.4",
}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(runs: list[Run]) -> str:
    """Returns one line for each run; times are means over its saves.

    Blocked is the time inside `save_async`; waited is all the time that the training stood still
    because of a save; total is from the call to the commit.
    """
    lines = [
        f"{'trainer':<36}{'saves':>6}{'blocked ms':>12}{'waited ms':>11}{'total ms':>10}"
        f"{'MB/s':>7}{'steps/s':>9}"
    ]
    for run in runs:
        cells = f"{'-':>6}{'-':>12}{'-':>11}{'-':>10}{'-':>7}"
        if run.saves:
            done = [save.response.progress for save in run.saves]
            blocked = _mean([each.blocked_secs for each in done]) * 1e3
            waited = _mean([save.waited_secs for save in run.saves]) * 1e3
            total = _mean([each.elapsed_secs for each in done])
            rate = _mean([each.bytes_written for each in done]) / 1e6 / total
            cells = f"{len(done):>6}{blocked:>12.1f}{waited:>11.1f}{total * 1e3:>10.0f}{rate:>7.0f}"
        lines.append(f"{run.name:<36}{cells}{len(run.steps) / run.secs:>9.1f}")
    return "\n".join(lines)


def draw_loss(reference: Run, lives: list[Life], save_every: int, path: Path) -> None:
    """Draws the loss of the run that was killed over the one that was not."""
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    axes.plot(
        list(reference.losses),
        list(reference.losses.values()),
        color="0.75",
        linewidth=9,
        solid_capstyle="round",
        label="never interrupted",
    )
    colours = plt.get_cmap("viridis")
    for number, life in enumerate(lives):
        colour = colours(number / max(len(lives), 2))
        how = "fresh start" if not life.resumed else f"resumed from step {life.resumed}"
        steps = list(life.losses)
        # Each life thinner than the one before: where they overlap, all can be seen.
        width = max(5.0 - 1.3 * number, 1.1)
        axes.plot(steps, list(life.losses.values()), color=colour, linewidth=width, label=how)
        if life.killed_in is not None:
            axes.plot(
                steps[-1],
                life.losses[steps[-1]],
                marker="X",
                markersize=11,
                linestyle="none",
                color=colour,
                markeredgecolor="crimson",
                markeredgewidth=1.5,
                zorder=5,
                label=f"SIGKILL {life.after_secs * 1e3:.0f} ms into the save of {life.killed_in}",
            )
    axes.set_yscale("log")
    axes.set_xlabel(f"training step (a save every {save_every})")
    axes.set_ylabel("cross-entropy loss of the batch (nats)")
    axes.set_title("Killed in the middle of saves, resumed, and on the same curve")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_timeline(runs: list[Run], path: Path) -> None:
    """Draws the median save of each run: what the engine did, and the trainer meanwhile."""
    figure, all_axes = plt.subplots(
        len(runs), 1, figsize=(9, 2.4 * len(runs) + 0.8), sharex=True, layout="constrained"
    )
    for axes, run in zip(all_axes, runs, strict=True):
        followed = run.saves[:-1]  # no training comes after the last save
        by_time = sorted(followed, key=lambda save: save.response.progress.elapsed_secs)
        save = by_time[len(by_time) // 2]
        progress = save.response.progress
        shown = progress.elapsed_secs * 1.15
        bars = [
            (row, begun - save.called, ended - save.called, colour)
            for row, spans, colour in (
                (WAITS, save.waits, "crimson"),
                (STEPS, run.steps, "seagreen"),
            )
            for begun, ended in spans
        ]
        bars += [
            (ROWS[span.name], span.start_secs, span.end_secs, "steelblue" if span.nbytes else "0.4")
            for span in save.response.timeline
        ]
        rows = [WAITS, STEPS, *ROWS.values()]
        for row, start, stop, colour in bars:
            if stop > 0 and start < shown:
                width = max(min(stop, shown) - start, shown / 300)
                edge = "white" if row == STEPS else "none"
                axes.barh(
                    rows.index(row), width * 1e3, left=start * 1e3, color=colour, edgecolor=edge
                )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(progress.elapsed_secs * 1e3, color="black", linestyle="--", linewidth=1)
        axes.text(progress.elapsed_secs * 1e3, -0.85, " committed", fontsize=8.5, va="center")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -1.4)
        axes.set_title(
            f"{run.name}, {progress.bytes_written / 1e6:.0f} MB", loc="left", fontsize=10
        )
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    all_axes[-1].set_xlim(left=0)
    all_axes[-1].set_xlabel("milliseconds since save_async was called (each run's median save)")
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in LEGEND.items()],
        loc="outside upper center",
        ncols=2,
        fontsize=8.5,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
