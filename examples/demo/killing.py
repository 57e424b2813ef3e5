"""Killing a trainer in the middle of a save, again and again, and letting it resume."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

VICTIM = Path(__file__).with_name("victim.py")
TEMPORARY_MARK = ".orbax-checkpoint-tmp"


@dataclasses.dataclass
class Life:
    """One process of the killed trainer.

    Attributes:
      resumed: the step it loaded; 0 for a fresh start.
      losses: the loss by step.
      committed: the steps whose save it saw committed.
      killed_in: the step whose save was under way when it was killed; None if it ran to the end.
      after_secs: how long that save had been running.
    """

    resumed: int = 0
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    committed: list[int] = dataclasses.field(default_factory=list)
    killed_in: int | None = None
    after_secs: float = 0.0


def _is_under_way(folder: Path, step: int) -> bool:
    """Says whether the save of a step has written something and is not committed."""
    has_begun = any(folder.glob(f"{step}{TEMPORARY_MARK}*"))
    return has_begun and not (folder / str(step)).exists()


def _try_to_kill(child: subprocess.Popen[str], folder: Path, step: int, delay: float) -> bool:
    """Stops the child in the middle of a save and kills it there; lets it go on if it missed."""
    time.sleep(delay)
    os.kill(child.pid, signal.SIGSTOP)
    if _is_under_way(folder, step):
        child.kill()
        return True
    os.kill(child.pid, signal.SIGCONT)
    return False


def live(
    folder: Path,
    *,
    steps: int,
    save_every: int,
    staging: str,
    dice: random.Random,
    save_secs: float | None,
) -> Life:
    """Runs the trainer once.

    Args:
      folder: its checkpoints.
      steps: the last step to train.
      save_every: steps between saves.
      staging: `eager` or `lazy`.
      dice: picks the save in which it is killed, and the moment.
      save_secs: about how long a save takes; None lets the trainer live.
    """
    life = Life()
    spared = 0  # saves that may pass first
    command = [sys.executable, str(VICTIM), str(folder), "--steps", str(steps)]
    command += ["--save-every", str(save_every), "--staging", staging]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            what, step, *more = line.split()
            match what:
                case "resumed":
                    life.resumed = int(step)
                    spared = dice.randrange(2) if life.resumed else dice.randrange(1, 3)
                case "step":
                    life.losses[int(step)] = float(more[0])
                case "committed":
                    life.committed.append(int(step))
                case "saving" if save_secs is not None and life.killed_in is None:
                    if spared:
                        spared -= 1
                        continue
                    delay = dice.uniform(0.05, 0.9) * save_secs
                    if _try_to_kill(child, folder, int(step), delay):
                        life.killed_in, life.after_secs = int(step), delay
                    else:
                        save_secs /= 2  # most likely it was over already: aim earlier
    if life.killed_in is None and child.returncode != 0:
        raise RuntimeError(f"the trainer failed with exit code {child.returncode}")
    return life
