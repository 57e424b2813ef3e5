"""Interrupts blocking verbs at random moments, and compares what is there with what was said.

    python interrupts.py DIRECTORY VERB COUNT SEED

The last line printed is a JSON object: how often each end was met, the longest time from the signal
to the KeyboardInterrupt, and what was wrong.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import orbax_async as ocp
from orbax_async.training import Checkpointer

MEBIBYTES = 24


def state(serial: int) -> dict[str, Any]:
    """Returns a state that takes some ten milliseconds to save."""
    values = {f"leaf {index}": np.full(1 << 18, serial, np.float32) for index in range(MEBIBYTES)}
    return values | {"serial": serial}


def serial_at(path: Path) -> int | None:
    """Returns the serial of a whole checkpoint; None where nothing is."""
    if not path.exists():
        return None
    loaded = ocp.load(path)
    wanted = state(loaded["serial"])
    assert all(np.array_equal(loaded[name], wanted[name]) for name in wanted)
    return int(loaded["serial"])


class Verbs:
    """The verbs, and who looks at what they left; `serial` is what a call saves."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "c"
        self.checkpointer = Checkpointer(directory / "run")
        ocp.save(self.path, state(0))

    def save(self, serial: int) -> None:
        """Overwrites one checkpoint."""
        ocp.save(self.path, state(serial), overwrite=True)

    def load(self, serial: int) -> None:
        """Loads a checkpoint, which changes nothing."""
        ocp.load(self.path)

    def step(self, serial: int) -> None:
        """Saves a step of a run."""
        self.checkpointer.save(serial, state(serial))

    def found(self, verb: str, serial: int) -> bool:
        """Says whether what a call saves is there."""
        if verb == "load":
            return False
        if verb == "step":
            self.checkpointer.wait()
            self.checkpointer.reload()
            steps = [each.step for each in self.checkpointer.checkpoints]
            return serial in steps and bool(self.checkpointer.load(serial))
        return serial_at(self.path) == serial


class Loop:
    """Interrupts one verb again and again, and counts."""

    def __init__(self, directory: Path, verb: str, seed: str) -> None:
        self.verbs = Verbs(directory)
        self.verb = verb
        self.call = getattr(self.verbs, verb)
        self.moments = random.Random(f"{verb} {seed}")
        self.ends: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.longest_secs = 0.0
        self.call(0)
        began = time.monotonic()
        self.call(1)
        self.usual_secs = time.monotonic() - began

    def run(self, serial: int) -> None:
        """Interrupts one call, and makes it again."""
        note, end = self._interrupted(serial)
        self.ends[end] += 1
        is_there = self.verbs.found(self.verb, serial)
        is_told = end in ("committed", "undone") and self.verb != "load"
        if is_told and is_there != (end == "committed"):
            self.wrong.append(f"{serial}: {note!r}, and it is {'' if is_there else 'not '}there")
        if "goes on" in note:
            self.wrong.append(note)
        try:
            if not is_there:
                self.call(serial)
            if self.verb != "load" and not self.verbs.found(self.verb, serial):
                self.wrong.append(f"{serial}: the same call again saved nothing")
        except Exception as error:
            self.wrong.append(f"{serial}: the same call again: {type(error).__name__}: {error}")
        if self.verb == "step":
            self.verbs.checkpointer.delete(serial)

    def _interrupted(self, serial: int) -> tuple[str, str]:
        """Returns what a call that is interrupted says, and how it ended."""
        sent: list[float] = []

        def interrupt() -> None:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(self.moments.uniform(0, 1.2 * self.usual_secs), interrupt)
        try:
            timer.start()
            self.call(serial)
            while not sent:  # the signal came too late for the call
                time.sleep(0.001)
            time.sleep(0.01)
        except KeyboardInterrupt as raised:
            self.longest_secs = max(self.longest_secs, time.monotonic() - sent[0])
            note = " ".join(getattr(raised, "__notes__", []))
            return note, "undone" if "undone" in note else "committed" if note else "without a note"
        finally:
            timer.join()
        return "", "returned"


def main() -> None:
    """Runs the calls that the command line asks for."""
    directory, verb, count, seed = sys.argv[1:]
    loop = Loop(Path(directory), verb, seed)
    for serial in range(2, int(count) + 2):
        loop.run(serial)
    loop.verbs.checkpointer.close()
    left = [path.name for path in Path(directory).iterdir() if "tmp" in path.name]
    if left:
        loop.wrong.append(f"left: {left}")
    told = {"ends": loop.ends, "longest_secs": loop.longest_secs, "wrong": loop.wrong}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
