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

import orbax_async as ocp
from orbax_async._storage import local

CALLS = [
    (os, "mkdir"),
    (os, "rename"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (local, "_write"),
    (local.LocalDirectory, "lock"),
    (local.LocalDirectory, "exchange"),
]
OLD, NEW, MEBIBYTES = 1, 2, 1


class Killer:
    """Counts the calls of all threads, and kills the process at one of them."""

    def __init__(self, point: int) -> None:
        self.point = point
        self.calls = itertools.count()  # counts without a lock

    def patch(self, owner: Any, name: str) -> None:
        """Makes a function count."""
        function: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(self.calls) == self.point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(owner, name, counted)


def save(directory: Path, mode: str, point: int) -> None:
    """Saves the new state over the old one, if the mode says so, and dies on the way."""
    directory.mkdir()
    path = directory / "checkpoint"
    words = mode.split()
    if "aside" in words:
        local._renameat2 = lambda: None
    context = ocp.Context()
    context.atomicity.mode = "commit_file" if "in-place" in words else "auto"
    with context:
        if "fresh" not in words:
            ocp.save(path, states.make(OLD, mebibytes=MEBIBYTES))
        killer = Killer(point)
        for owner, name in CALLS:
            killer.patch(owner, name)
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
