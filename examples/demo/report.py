"""The table and the two pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from killing import Life
from trainers import Run

# What a save does, in the order of a timeline's rows; the rest of a span's life is waiting.
ROWS = {
    "stage": "stage: capture values",
    "create": "create temporary directory",
    "write": "write arrays",
    "documents": "write documents",
    "sync": "sync files, directories",
    "publish": "publish: rename, sync",
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
        linewidth=6,
        solid_capstyle="round",
        label="never interrupted",
    )
    colours = plt.get_cmap("viridis")
    for number, life in enumerate(lives):
        colour = colours(number / max(len(lives), 2))
        how = "fresh start" if not life.resumed else f"resumed from step {life.resumed}"
        steps = list(life.losses)
        axes.plot(steps, list(life.losses.values()), color=colour, linewidth=1.5, label=how)
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
    """Draws one save of each run: what the engine did, and what the trainer did meanwhile."""
    figure, all_axes = plt.subplots(
        len(runs), 1, figsize=(9, 2.9 * len(runs)), sharex=True, layout="constrained"
    )
    names = ["training waits", "training steps", *ROWS.values()]
    for axes, run in zip(all_axes, runs, strict=True):
        save = run.saves[len(run.saves) // 2]
        called, response = save.called, save.response
        end = response.progress.elapsed_secs
        bars = [("training waits", 0.0, save.waited_secs, "crimson")]
        for begun, ended in run.steps:
            start = max(begun - called, 0.0)
            if ended > called and start < end * 1.25:
                bars.append(("training steps", start, ended - called, "seagreen"))
        for span in response.timeline:
            colour = "steelblue" if span.nbytes else "slategray"
            bars.append((ROWS[span.name], span.start_secs, span.end_secs, colour))
        for name, start, stop, colour in bars:
            width = max(stop - start, end / 400) * 1e3
            axes.barh(
                names.index(name), width, left=start * 1e3, color=colour, edgecolor="white"
            )
        axes.axvline(end * 1e3, color="black", linestyle="--", linewidth=1)
        axes.text(end * 1e3, -0.75, " committed", fontsize=8.5, va="center")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -1.3)
        axes.set_title(
            f"{run.name}: {response.progress.bytes_written / 1e6:.0f} MB", loc="left", fontsize=10
        )
        axes.grid(axis="x", alpha=0.3)
    all_axes[-1].set_xlabel("milliseconds since save_async was called")
    figure.savefig(path, dpi=130)
    plt.close(figure)
