"""A process of its own that saves a state, over and over.

It shares no interpreter lock with a program beside it. What that program loses all the same is the
machine's: the kernel writes back on any core, and two cores may be threads of one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orbax_async as ocp
from benchmarks.peers import PEERS, Settings
from benchmarks.workloads import State

_PACKAGES = Path(__file__).parent.parent


@contextlib.contextmanager
def saves(peer: str, path: Path, state: State, settings: Settings) -> Iterator[Iterator[None]]:
    """Has a process save the leaves of a state again and again, and removes it all afterwards.

    It keeps to the cores of the thread that enters. What the block gets is an iterator that goes on
    when a save has begun, and when it has ended, by turns; of a peer that writes in the background
    it has begun when the caller may go on. The first save goes untold.

    Raises:
      RuntimeError: the process has ended; raised by the iterator.
    """
    source = path.with_name(f"{path.name}-state")
    ocp.save(source, state, overwrite=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH", "")])
        ),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has its share of a GPU's memory
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.apart",
        str(source),
        str(path),
        peer,
        json.dumps(settings),
    ]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            try:
                yield _told(process)
            finally:
                process.kill()
    finally:
        for each in (source, path):
            shutil.rmtree(each, ignore_errors=True)


def _told(process: subprocess.Popen[bytes]) -> Iterator[None]:
    assert process.stdout is not None
    while process.stdout.readline():
        yield
    raise RuntimeError(f"the process that saves beside this one ended: {process.wait()}")


def _save(source: Path, path: Path, name: str, settings: Settings) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each save
    peer, state = PEERS[name], ocp.load(source)
    for turn in itertools.count():
        shutil.rmtree(path, ignore_errors=True)
        if turn and not peer.is_async:
            print("begun", flush=True)
        pending = peer.save(path, state, settings)
        if turn and peer.is_async:
            print("begun", flush=True)
        pending.result()
        if turn:
            print("ended", flush=True)


if __name__ == "__main__":
    _save(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
