"""States whose every byte follows from one number, so that a reader can tell which one it has."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


def expected(serial: int, *, mebibytes: float) -> dict[str, Any]:
    """Returns state `serial` on the host: leaves of all kinds, about `mebibytes` in all."""
    rng = np.random.default_rng(serial)
    unit = int(mebibytes * (1 << 20) / 8 / 4)
    return {
        "serial": serial,
        "note": f"state {serial}",
        "nothing": None,
        "raw": rng.standard_normal((5, unit), np.float32),
        "compressible": np.repeat(rng.integers(0, 99, unit // 8, np.int32), 8),
        "numpy": rng.integers(0, 256, unit * 4, np.uint8),
        "small": [
            rng.standard_normal(7 * index + 1).astype(ml_dtypes.bfloat16) for index in range(20)
        ],
        "scalar": np.float32(rng.standard_normal()),
    }


def make(serial: int, *, mebibytes: float) -> dict[str, Any]:
    """Returns state `serial` as a program holds it: jax arrays, but for one NumPy array."""
    state = expected(serial, mebibytes=mebibytes)
    for name in ("raw", "compressible", "small", "scalar"):
        state[name] = jax.tree.map(jnp.asarray, state[name])
    return state


def differences(loaded: Any, wanted: Any) -> list[str]:
    """Returns the leaves in which two trees differ, bit for bit."""
    flat, structure = jax.tree.flatten_with_path(loaded, is_leaf=lambda leaf: leaf is None)
    other, other_structure = jax.tree.flatten_with_path(wanted, is_leaf=lambda leaf: leaf is None)
    if structure != other_structure:
        return [f"{structure} is not {other_structure}"]
    return [
        jax.tree_util.keystr(path)
        for (path, leaf), (_, want) in zip(flat, other, strict=True)
        if not same_bits(leaf, want)
    ]


def same_bits(value: Any, wanted: Any) -> bool:
    """Compares shape, dtype and bytes of two leaves."""
    if isinstance(wanted, np.ndarray | np.generic | jax.Array):
        value, wanted = np.asarray(value), np.asarray(wanted)
        is_alike = value.shape == wanted.shape and value.dtype == wanted.dtype
        return is_alike and value.tobytes() == wanted.tobytes()
    return type(value) is type(wanted) and value == wanted
