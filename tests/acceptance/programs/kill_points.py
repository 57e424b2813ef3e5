"""Saves over and over, and dies each time at the next of its changes to the file system.

    kill_points.py DIRECTORY MODE STRIDE

MODE is fresh, overwrite, or aside: an overwrite where names can't be exchanged. Each save runs in
a forked child, in DIRECTORY/NUMBER, and is killed just before its call NUMBER that makes, renames,
syncs or removes something. Ends when a save has no such call left, and prints how many there were.
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
from orbax_async._commit import atomicity
from orbax_async._storage import files

CALLS = [
    (os, "mkdir"),
    (os, "rename"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (files, "_write"),
    (atomicity, "_exchange"),
]
OLD, NEW, MEBIBYTES = 1, 2, 1


class Killer:
    """Counts the calls of all threads, and kills the process at one of them."""

    def __init__(self, point: int) -> None:
        self.point = point
        self.calls = itertools.count()  # counts without a lock

    def patch(self, owner: Any, name: str, *, always_returns: Any = None) -> None:
        """Makes a function count."""
        function: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(self.calls) == self.point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs) if always_returns is None else always_returns

        setattr(owner, name, counted)


def save(directory: Path, mode: str, point: int) -> None:
    """Saves the new state over the old one, if the mode says so, and dies on the way."""
    directory.mkdir()
    path = directory / "checkpoint"
    if mode != "fresh":
        ocp.save(path, states.make(OLD, mebibytes=MEBIBYTES))
    killer = Killer(point)
    for owner, name in CALLS:
        is_refused = mode == "aside" and name == "_exchange"
        killer.patch(owner, name, always_returns=False if is_refused else None)
    ocp.save(path, states.make(NEW, mebibytes=MEBIBYTES), overwrite=mode != "fresh")
    os._exit(0)  # without the sweep, whose calls come at any time


def main(directory: Path, mode: str, stride: int) -> None:
    """Forks a child for each point; no thread runs here, so a fork is safe."""
    point = 0
    while True:
        child = os.fork()
        if child == 0:
            save(directory / str(point), mode, point)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            shutil.rmtree(directory / str(point))
            sys.exit(os.WEXITSTATUS(status)) if os.WEXITSTATUS(status) else print(point)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        point += stride


main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
