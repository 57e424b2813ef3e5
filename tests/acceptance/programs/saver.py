"""Saves one state after the other until it is killed, and acknowledges each in a synced log.

    saver.py DIRECTORY MODE FIRST SEED

MODE is fresh, for a new path each time, or overwrite, for one path.
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
    sizes = random.Random(seed)
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for serial in itertools.count(first):
        mebibytes = sizes.choice([1, 1, 4, 16])
        name = "latest" if mode == "overwrite" else str(serial)
        state = states.make(serial, mebibytes=mebibytes)
        ocp.save(
            directory / name,
            state,
            overwrite=mode == "overwrite",
            custom_metadata={"serial": serial, "mebibytes": mebibytes},
        )
        os.write(log, f"{serial}\n".encode())
        os.fsync(log)
        if mode == "fresh" and serial - KEPT >= first:
            shutil.rmtree(directory / str(serial - KEPT))


main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
