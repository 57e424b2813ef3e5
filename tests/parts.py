"""Parts of a state, and what tests of partial saves do with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import orbax_async as ocp

ROOT = Path(ocp.__file__).parent.parent
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
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
