"""A small train state and a checkpoint of it, for tests of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orbax_async as ocp

Sds = jax.ShapeDtypeStruct


def state() -> dict[str, Any]:
    """A small train state."""
    return {
        "params": {
            "dense": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)},
            "out": {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.zeros(2)},
        },
        "opt": [np.arange(3), np.arange(4), np.arange(5)],
        "step": 7,
        "name": "run",
        "empty": {},
    }


class Pair(NamedTuple):
    a: Any
    b: Any


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of it."""
    ocp.save(tmp_path / "saved", state())
    return tmp_path / "saved"
