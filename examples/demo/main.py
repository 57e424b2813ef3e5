"""Trains a real model that saves while it trains, is killed in the middle of saves, and resumes.

    python examples/demo/main.py [--output out/demo]

It proves, or ends with exit code 1:

  - every trainer, sync or async, saving or not, ends with the same weights, bit for bit;
  - a trainer that is killed with SIGKILL in the middle of saves resumes from its last committed
    checkpoint, loses no save that it was told is committed, and ends with those weights too;
  - the network learns, and what is loaded from disk is what was trained.

It prints what saving costs, and draws the loss and the timeline of a save.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import killing
import model
import report
import trainers

STEPS = 160
SAVE_EVERY = 20
KILLS = 3


class Claims:
    """What has to hold; each is printed, and remembered if it does not."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, claim: str, holds: bool) -> None:
        """Prints a claim and whether it holds."""
        print(f"  {'ok    ' if holds else 'FAILED'} {claim}", flush=True)
        if not holds:
            self.failed.append(claim)


def measure(root: Path, claims: Claims) -> list[trainers.Run]:
    """Trains without interruption in five ways; the first one twice, to show the noise."""
    plan = {"steps": STEPS, "save_every": SAVE_EVERY}
    folders = {name: root / name for name in ("blocking", "sync", "eager", "lazy")}
    for folder in folders.values():
        folder.mkdir()
    trainers.warm_up(root / "warm up")
    runs = [
        trainers.train_sync("no saving", None, **plan),
        trainers.train_sync("sync, result() at once", folders["blocking"], waits="at once", **plan),
        trainers.train_sync("sync, result() before the next save", folders["sync"], **plan),
    ]
    for staging in ("eager", "lazy"):
        name, folder = f"async, await, {staging} staging", folders[staging]
        runs.append(asyncio.run(trainers.train_async(name, folder, staging=staging, **plan)))
    runs.append(trainers.train_sync("no saving, once more", None, **plan))
    print("\n" + report.table(runs) + "\n")

    reference = runs[0]
    for run in runs[1:]:
        same = model.same_bytes(run.state, reference.state)
        claims.check(f"{run.name}: same weights as without saving", same)
    for name, folder in folders.items():
        loaded, step = trainers.load_latest(folder)
        same = step == STEPS and model.same_bytes(loaded, reference.state)
        claims.check(f"checkpoint {step} of {name!r} holds these weights", same)
    read_right = model.accuracy(reference.state)
    claims.check(f"{read_right:.1%} of unseen digits are read right", read_right > 0.9)
    return runs


def kill_and_resume(
    root: Path, reference: trainers.Run, save_secs: float, claims: Claims
) -> list[killing.Life]:
    """Kills a trainer in the middle of saves until it is let through to the end."""
    folder = root / "killed"
    folder.mkdir()
    dice = random.Random(model.SEED)
    lives: list[killing.Life] = []
    for number in range(KILLS + 1):
        life = killing.live(
            folder,
            steps=STEPS,
            save_every=SAVE_EVERY,
            staging=("lazy", "eager")[number % 2],
            dice=dice,
            save_secs=save_secs if number < KILLS else None,
        )
        lives.append(life)
        acknowledged = max([step for each in lives for step in each.committed], default=0)
        found = trainers.latest(folder)
        newest = 0 if found is None else int(found.name)
        if life.killed_in is None:
            break
        print(
            f"  killed {life.after_secs * 1e3:.0f} ms into the save of step {life.killed_in}; "
            f"the newest checkpoint is {newest}",
            flush=True,
        )
        claims.check(
            f"the save of {life.killed_in} left nothing visible, and {acknowledged}, the last "
            "one acknowledged, is there",
            acknowledged <= newest < life.killed_in,
        )
    hits = sum(life.killed_in is not None for life in lives)
    claims.check(f"{hits} of {KILLS} kills hit the middle of a save", hits == KILLS)
    resumed, step = trainers.load_latest(folder)
    claims.check(
        f"resumed from {', '.join(str(life.resumed) for life in lives[1:])}: at step {step}, same "
        "weights, bit for bit, as never interrupted",
        step == STEPS and model.same_bytes(resumed, reference.state),
    )
    losses = {step: loss for life in lives for step, loss in life.losses.items()}
    claims.check("every step had the same loss, to the last bit", losses == reference.losses)
    leftovers = [path.name for path in folder.iterdir() if not path.name.isdigit()]
    claims.check("what the killed saves left behind has been swept", not leftovers)
    return lives


def main() -> int:
    """Runs everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="for the pictures")
    output = parser.parse_args().output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    claims = Claims()
    size = f"{model.nbytes(model.abstract_state()) / 1e6:.0f} MB"
    print(f"A reader of digits, {size} with Adam: {STEPS} steps, a save every {SAVE_EVERY}")
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=output) as folder:
        runs = measure(Path(folder), claims)
        saves = [save.response.progress for save in runs[4].saves]
        save_secs = sum(each.elapsed_secs for each in saves) / len(saves)
        print("\nThe same training, killed in the middle of saves:")
        lives = kill_and_resume(Path(folder), runs[0], save_secs, claims)
    report.draw_loss(runs[0], lives, SAVE_EVERY, output / "loss.png")
    report.draw_timeline(runs[1:5], output / "timeline.png")
    print(f"\nPictures: {output / 'loss.png'}, {output / 'timeline.png'}")
    print(f"{time.perf_counter() - began:.0f} s in all")
    if claims.failed:
        print("\n".join(["", "FAILED:", *claims.failed]), file=sys.stderr)
    return 1 if claims.failed else 0


if __name__ == "__main__":
    sys.exit(main())
