"""Saves one state after the other until it is killed, and acknowledges each in a synced log.

    saver.py DIRECTORY MODE FIRST SEED

MODE has words: fresh, for a new path each time, or overwrite, for one path; in-place, for
`atomicity.mode = 'commit_file'`.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sys
from pathlib import Path

from acceptance import states

import orbax_async as ocp

KEPT = 3


def main(directory: Path, mode: str, first: int, seed: int) -> None:
    """Saves for ever."""
    sizes, overwrite = random.Random(seed), "overwrite" in mode.split()
    context = ocp.Context()
    context.atomicity.mode = "commit_file" if "in-place" in mode.split() else "auto"
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for serial in itertools.count(first):
        mebibytes = sizes.choice([1, 1, 4, 16])
        name = "latest" if overwrite else str(serial)
        state = states.make(serial, mebibytes=mebibytes)
        about = {"serial": serial, "mebibytes": mebibytes}
        with context:
            ocp.save(directory / name, state, overwrite=overwrite, custom_metadata=about)
        os.write(log, f"{serial}\n".encode())
        os.fsync(log)
        if not overwrite and serial - KEPT >= first:
            shutil.rmtree(directory / str(serial - KEPT))


main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
