"""Small and large tensors, and loading them under the safetensors layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tensor_files import layout

import orbax_async as ocp

TENSORS = {
    "layers.0.weight": np.arange(32, dtype=np.float32).reshape(8, 4),
    "layers.0.bias": np.arange(4, dtype=np.int32),
    "scale": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "half": np.arange(6).astype(ml_dtypes.bfloat16),
}
LARGE = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)


def load(path: Path, abstract: Any = None, *, context: Any = None, **how: Any) -> Any:
    """Loads under the layout, or under a context."""
    with context or layout():
        return ocp.load(path, abstract, **how)


def same(loaded: Any, expected: Any) -> bool:
    """Says whether two dicts hold the same arrays, bit for bit."""
    return loaded.keys() == expected.keys() and all(
        (loaded[name].dtype, loaded[name].shape, np.asarray(loaded[name]).tobytes())
        == (each.dtype, each.shape, each.tobytes())
        for name, each in expected.items()
    )


def sds(array: np.ndarray[Any, Any], dtype: Any = None, **how: Any) -> jax.ShapeDtypeStruct:
    """The abstract form of an array."""
    return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, **how)
