"""Parts of a state, and what tests of partial saves do with them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
from watched_directory import before, on, watched

import orbax_async as ocp
from orbax_async._storage.local import opened_by

PYTHON_PATH = os.pathsep.join([str(Path(ocp.__file__).parents[1]), str(Path(__file__).parent)])
FIRST: dict[str, Any] = {
    "a": np.arange(5),
    "n": {"x": 1.5},
    "s": "text",
    "l": [1, 2],
    "e": {},
    "none": None,
}
SECOND: dict[str, Any] = {"b": np.arange(3.0), "n": {"y": "other"}, "e2": []}
BOTH: dict[str, Any] = {**FIRST, **SECOND, "n": {"x": 1.5, "y": "other"}}


def storing(use_ocdbt: bool = True, use_zarr3: bool = True) -> ocp.Context:
    """Returns a context that stores arrays in a certain format."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = use_ocdbt
    context.array.saving.use_zarr3 = use_zarr3
    return context


def check(loaded: Any, expected: Any) -> None:
    """Compares two trees, values and all."""
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def gathered(path: Path) -> list[Path]:
    """Returns the parts that wait for a checkpoint."""
    folder = path.with_name(f"{path.name}.partial_save")
    return sorted(folder.iterdir()) if folder.exists() else []


def another(*arguments: object, code: str) -> subprocess.Popen[str]:
    """Starts a program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": PYTHON_PATH, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class Stop:
    """Stops partial saves to `c` and its finalization before they sync, until it is opened.

    Whatever is opened in its block goes through it.
    """

    def __init__(self) -> None:
        self.reached, self._may_go = threading.Event(), threading.Event()
        self._may_go.set()
        self._opened = opened_by(watched(before(on("walk", path="*/c.partial_save*"), self._wait)))

    def __enter__(self) -> Stop:
        self._opened.__enter__()
        return self

    def __exit__(self, *how: Any) -> None:
        self._opened.__exit__(*how)

    def _wait(self) -> None:
        self.reached.set()
        self._may_go.wait(30)

    def close(self) -> None:
        """Stops the next."""
        self.reached.clear()
        self._may_go.clear()

    def open(self) -> None:
        """Lets all go on."""
        self._may_go.set()
