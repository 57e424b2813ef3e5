"""Checkpoints that tests copy and alter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import base_state

import orbax_async as ocp
from orbax.checkpoint import v1


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base state, saved once by either library."""
    folder = tmp_path_factory.mktemp("saved")
    for name, library in (("ours", ocp), ("orbax", v1)):
        library.save(folder / name, base_state())
    return {name: folder / name for name in ("ours", "orbax")}


@pytest.fixture
def copy_of(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of a saved checkpoint, free to be altered."""

    def copy(writer: str) -> Path:
        return Path(shutil.copytree(saved[writer], tmp_path / writer))

    return copy
