"""The trainer that is killed: a process that says on stdout what it does, and resumes by itself."""

from __future__ import annotations

import argparse
import asyncio
import threading
from pathlib import Path

import trainers

_lock = threading.Lock()


def tell(line: str) -> None:
    """Prints a line at once; commits are told from another thread."""
    with _lock:
        print(line, flush=True)


def main() -> None:
    """Trains to the last step, from wherever the run before was killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, required=True)
    parser.add_argument("--staging", choices=["eager", "lazy"], required=True)
    given = parser.parse_args()
    found = trainers.latest(given.folder)
    tell(f"resumed {0 if found is None else found.name}")
    asyncio.run(
        trainers.train_async(
            "killed",
            given.folder,
            steps=given.steps,
            save_every=given.save_every,
            staging=given.staging,
            tell=tell,
        )
    )


if __name__ == "__main__":
    main()
