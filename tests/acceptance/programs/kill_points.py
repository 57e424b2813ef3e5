"""Saves over and over, and dies each time at the next of its changes to the file system.

    kill_points.py DIRECTORY MODE STRIDE

MODE has words: fresh or overwrite; aside, where names can't be exchanged; in-place, for
`atomicity.mode = 'commit_file'`. Each save runs in a forked child, in DIRECTORY/NUMBER, and is
killed just before its call NUMBER that makes, writes, locks, renames, syncs or removes something.
Ends when a save has no such call left, and prints their numbers.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acceptance import states

sys.path.append(str(Path(__file__).parents[2] / "support"))
from watched_directory import CHANGES, Call, watched

import orbax_async as ocp
from orbax_async._storage.directory import Capability
from orbax_async._storage.local import opened_by

KILLING = {*CHANGES, "lock", "sync"}
OLD, NEW, MEBIBYTES = 1, 2, 1


class Killer:
    """Watches the calls of all threads, and kills the process at one of them."""

    def __init__(self, point: int) -> None:
        self.point = point
        self.calls = itertools.count()  # counts without a lock

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if call.verb in KILLING:
            self.count()
        return proceed()

    def count(self) -> None:
        """Counts a call, which may be the last."""
        if next(self.calls) == self.point:
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(self, name: str) -> None:
        """Has a function of `os` counted too: one call of a directory may remove a whole tree."""
        function: Callable[..., Any] = getattr(os, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return function(*args, **kwargs)

        setattr(os, name, counted)


def save(directory: Path, mode: str, point: int) -> None:
    """Saves the new state over the old one, if the mode says so, and dies on the way."""
    directory.mkdir()
    path = directory / "checkpoint"
    words = mode.split()
    context = ocp.Context()
    context.atomicity.mode = "commit_file" if "in-place" in words else "auto"
    lacking = [Capability.EXCHANGE] if "aside" in words else []
    with context:
        if "fresh" not in words:
            ocp.save(path, states.make(OLD, mebibytes=MEBIBYTES))
        killer = Killer(point)
        for name in ("unlink", "rmdir"):
            killer.patch(name)
        with opened_by(watched(killer, lacking=lacking)):
            ocp.save(path, states.make(NEW, mebibytes=MEBIBYTES), overwrite="fresh" not in words)
    os._exit(0)  # without the sweep, whose calls come at any time


def dies(directory: Path, mode: str, point: int) -> bool:
    """Saves in a forked child; no thread runs here, so a fork is safe."""
    child = os.fork()
    if child == 0:
        save(directory / str(point), mode, point)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        shutil.rmtree(directory / str(point))
        assert os.WEXITSTATUS(status) == 0, status
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    return True


def main(directory: Path, mode: str, stride: int) -> None:
    """Saves over and over; the last of the calls is among those that kill."""
    points = list(
        itertools.takewhile(lambda at: dies(directory, mode, at), itertools.count(0, stride))
    )
    between = range(points[-1] + stride - 1, points[-1], -1)
    points += itertools.islice((at for at in between if dies(directory, mode, at)), 1)
    print(*points)


main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
