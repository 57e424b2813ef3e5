"""What is in a folder, for tests of what a commit leaves there."""

from __future__ import annotations

import os
import time
from pathlib import Path


def entries(folder: Path) -> list[str]:
    """Returns what is in a folder."""
    return sorted(os.listdir(folder))


def comes_to_hold(folder: Path, *names: str) -> None:
    """Waits until a folder holds these names, and nothing else: a sweep comes after a commit."""
    end = time.monotonic() + 30
    while entries(folder) != sorted(names):
        assert time.monotonic() < end, entries(folder)
        time.sleep(0.005)
