"""A process of its own that writes and syncs a file, over and over.

It shares no interpreter lock with a program beside it. What that program loses all the same is the
machine's: two cores may be threads of one, and share memory, caches and a host.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_SLICE = 64 << 20


@contextlib.contextmanager
def writer(path: Path, nbytes: int) -> Iterator[None]:
    """Has a process write `nbytes` bytes to `path` again and again, and removes them afterwards.

    It has begun when the block is entered, and runs on the cores of the thread that enters it.
    """
    command = [sys.executable, __file__, str(path), str(nbytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"the process that writes {path} ended: {process.wait()}")
            yield
        finally:
            process.kill()
            process.wait()
            path.unlink(missing_ok=True)


def _write(path: str, nbytes: int) -> None:
    data = memoryview(os.urandom(min(nbytes, _SLICE)))
    for turn in itertools.count():
        with open(path, "wb", buffering=0) as file:
            if turn == 0:
                print("begun", flush=True)
            for start in range(0, nbytes, _SLICE):
                file.write(data[: nbytes - start])
            os.fsync(file.fileno())


if __name__ == "__main__":
    _write(sys.argv[1], int(sys.argv[2]))
