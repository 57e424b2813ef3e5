"""Measures the resident memory of one thing that a program does, and prints it as JSON in MiB.

memory.py DIRECTORY growth SAVES MEBIBYTES
memory.py DIRECTORY budget BUDGET MEBIBYTES    BUDGET in MiB, 0 for none
memory.py DIRECTORY compressed BUDGET MEBIBYTES
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

import orbax_async as ocp

MIB = 1 << 20


def resident() -> float:
    """Returns the memory that the process holds now."""
    return psutil.Process().memory_info().rss / MIB


class Peak:
    """The most memory beyond what was there before a block (Linux counts it for us)."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = resident()
        Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        self.extra = peak / 1024 - self.before


def growth(directory: Path, saves: int, mebibytes: int) -> dict[str, Any]:
    """Saves one state many times over, and looks at what stays."""
    devices = np.array(jax.devices())
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "x"), jax.P("x"))
    rng = np.random.default_rng(0)

    def array(nbytes: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(nbytes // 4 // 8 * 8, np.float32)

    state = {
        "large": [jnp.asarray(array(mebibytes * MIB // 16)) * 2 for _ in range(8)],
        "sharded": jax.device_put(array(mebibytes * MIB // 4), sharding) * 2,
        "small": [jnp.asarray(array(16 * 1024)) * 2 for _ in range(256)],
        "numpy": array(mebibytes * MIB // 5),
    }
    jax.block_until_ready(state)
    levels = []
    for _ in range(saves):
        ocp.save(directory / "checkpoint", state, overwrite=True)
        gc.collect()
        levels.append(resident())
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    cached = sum(array._npy_value is not None for array in arrays)
    return {"levels": levels, "cached_host_values": cached, "arrays": len(arrays)}


def budget(directory: Path, limit: int, mebibytes: int) -> dict[str, Any]:
    """Saves and loads NumPy arrays of 8 MiB, then one leaf above the budget."""
    rng = np.random.default_rng(0)
    state = {str(i): rng.standard_normal(2 * MIB, np.float32) for i in range(mebibytes // 8)}
    context = ocp.Context()
    context.memory.write_concurrent_bytes = limit * MIB or None
    context.memory.transfer_concurrent_bytes = limit * MIB or None
    context.memory.read_concurrent_bytes = limit * MIB or None
    figures: dict[str, Any] = {}
    with context:
        ocp.save(directory / "first", {"engine": "is running"})
        ocp.load(directory / "first")
        with Peak() as saving:
            ocp.save(directory / "checkpoint", state)
        with Peak() as loading:
            loaded = ocp.load(directory / "checkpoint")
        assert all(np.array_equal(loaded[name], array) for name, array in state.items())
        figures["save"], figures["load"] = saving.extra, loading.extra - mebibytes
        del loaded
        large = {"large": rng.standard_normal((limit or 32) * MIB * 3 // 8, np.float32)}
        ocp.save(directory / "large", large)
        assert np.array_equal(ocp.load(directory / "large")["large"], large["large"])
    return figures


def compressed(directory: Path, limit: int, mebibytes: int) -> dict[str, Any]:
    """Saves jax arrays of 64 MiB that are compressed: what is encoded takes memory, they do not."""
    keys = jax.random.split(jax.random.key(0), mebibytes // 64)
    state = [jax.random.normal(key, (8192, 4096), jnp.bfloat16) for key in keys]
    jax.block_until_ready(state)
    context = ocp.Context()
    context.memory.write_concurrent_bytes = limit * MIB or None
    peaks = []
    with context:
        ocp.save(directory / "first", {"engine": "is running"})  # and imports are done
        for _ in range(3):
            with Peak() as saving:
                ocp.save(directory / "checkpoint", state, overwrite=True)
            peaks.append(saving.extra)
    nbytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {"peaks": peaks, "stored": nbytes / MIB}


directory, what, *numbers = sys.argv[1:]
measure = {"growth": growth, "budget": budget, "compressed": compressed}[what]
print(json.dumps(measure(Path(directory), *map(int, numbers))))
