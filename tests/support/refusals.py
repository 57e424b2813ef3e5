"""Where tests of bad input start from, and what must hold after each of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import orbax_async as ocp

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "n": np.arange(4), "step": 7, "name": "run"}


@pytest.fixture(autouse=True)
def the_engine_goes_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checks after each test that a good save and load work."""
    yield
    folder = tmp_path_factory.mktemp("good")
    ocp.save(folder / "checkpoint", {"a": np.arange(3)})
    assert ocp.load(folder / "checkpoint")["a"].tolist() == [0, 1, 2]
    shutil.rmtree(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of STATE."""
    ocp.save(tmp_path / "checkpoint", STATE)
    return tmp_path / "checkpoint"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
