"""What is in a folder, for tests of what a commit leaves there."""

from __future__ import annotations

import os
from pathlib import Path


def entries(folder: Path) -> list[str]:
    """Returns what is in a folder."""
    return sorted(os.listdir(folder))
