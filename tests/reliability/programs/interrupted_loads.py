"""Loads and checks a checkpoint while each open and each read in turn is interrupted once.

    python interrupted_loads.py LIBRARY DIRECTORY OPTIONS

Prints how many were interrupted.
"""

from __future__ import annotations

import ctypes
import errno
import json
import sys

import numpy as np

import orbax_async as ocp

OPEN, READ = 0, 1
STATE = {"large": np.arange(100_000.0), "small": np.arange(10), "step": 3}


def main(library: str, directory: str, options: str) -> None:
    """Saves, and then loads and checks again and again."""
    faults = ctypes.CDLL(library)
    path, context = f"{directory}/checkpoint", ocp.Context()
    for name, value in json.loads(options).items():
        setattr(context.array.saving, name, value)
    with context:
        ocp.save(path, STATE)
    interrupted = 0
    for kind in (OPEN, READ):
        nth, was_reached = 1, True
        while was_reached:
            faults.faults_arm(path.encode(), kind, ctypes.c_long(nth), errno.EINTR, 0)
            loaded, report = ocp.load(path), ocp.verify(path)
            was_reached = bool(faults.faults_disarm())
            assert np.array_equal(loaded["large"], STATE["large"])
            assert report.is_intact, report
            interrupted += was_reached
            nth += 1
    print(interrupted)


if __name__ == "__main__":
    main(*sys.argv[1:])
