"""What `metadata` tells of a checkpoint: without its data, and without the devices that saved."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import orbax_async as ocp

LAYOUTS = {
    "ocdbt": {},
    "zarr2": {"use_zarr3": False},
    "files": {"use_ocdbt": False},
    "zarr2 files": {"use_ocdbt": False, "use_zarr3": False},
}


def save(path: Path, state: Any, **options: Any) -> None:
    """Saves a state with options of saving arrays."""
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    with context:
        ocp.save(path, state)


def state(rng: np.random.Generator) -> dict[str, Any]:
    """A large array that compresses, one that doesn't, small ones, and leaves without arrays."""
    return {
        "flat": np.zeros((512, 512), np.float32),
        "noise": rng.standard_normal((512, 512)).astype(np.float32),
        "jax": jnp.ones((100, 100)),
        "a": {"b": np.arange(10), "c": {"0": np.arange(20)}},
        "n": 5,
        "s": "text",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_on_disk_are_told(tmp_path: Path, rng: np.random.Generator, layout: str) -> None:
    """Each array's bytes as they are encoded, and those of the whole checkpoint."""
    save(tmp_path / "c", state(rng), **LAYOUTS[layout])
    described = ocp.metadata(tmp_path / "c")
    tree = described.metadata
    sizes = {
        name: leaf.storage_metadata.nbytes
        for name, leaf in [
            *((name, tree[name]) for name in ("flat", "noise", "jax")),
            ("b", tree["a"]["b"]),
            ("c", tree["a"]["c"]["0"]),
        ]
    }
    whole = 512 * 512 * 4
    assert sizes["flat"] < whole / 10
    assert whole <= sizes["noise"] < whole * 1.01
    assert 40_000 <= sizes["jax"] < 41_000
    assert 80 <= sizes["b"] < 600 and 160 <= sizes["c"] < 700
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert described.nbytes == sum(path.stat().st_size for path in files)
    assert sum(sizes.values()) < described.nbytes
    assert ocp.checkpointables_metadata(tmp_path / "c").nbytes == described.nbytes
    assert ocp.CheckpointMetadata("x", metadata=tree).nbytes is None


def test_keys_with_slashes_are_counted_once(tmp_path: Path) -> None:
    """An array whose name goes on below that of another has its own bytes."""
    value = {"x": np.zeros(1000, np.uint8), "x/c": np.zeros(50, np.uint8), "x/c/0": np.arange(4)}
    save(tmp_path / "c", value)
    tree = ocp.metadata(tmp_path / "c").metadata
    sizes = {name: tree[name].storage_metadata.nbytes for name in value}
    assert 1000 < sizes["x"] < 1500
    assert 50 < sizes["x/c"] < 550
    assert 32 < sizes["x/c/0"] < 500


def test_storage_tells_chunks_and_writes(tmp_path: Path, mesh8: Mesh) -> None:
    """B7.1: the shape of chunks and of what was written; nothing was written in pieces of NumPy."""
    array = jax.device_put(jnp.ones((16, 6)), NamedSharding(mesh8, P("x")))
    ocp.save(tmp_path / "c", {"j": array, "n": np.ones((2, 3), np.int8)})
    tree = ocp.metadata(tmp_path / "c").metadata
    assert tree["j"].storage_metadata == ocp.arrays.StorageMetadata((2, 6), (2, 6))
    assert tree["n"].storage_metadata == ocp.arrays.StorageMetadata((2, 3))
    assert tree["j"].sharding == array.sharding
    assert (tree["j"].shape, tree["j"].dtype) == ((16, 6), np.float32)
    assert (tree["n"].shape, tree["n"].dtype) == ((2, 3), np.int8)


@pytest.mark.parametrize("layout", ["ocdbt", "files"])
def test_array_data_is_not_read(tmp_path: Path, rng: np.random.Generator, layout: str) -> None:
    """With every byte of array data overwritten or gone, the metadata is the same."""
    value = {name: rng.integers(0, 256, 300_000, np.uint8) for name in "ab"}
    save(tmp_path / "c", value, **LAYOUTS[layout])
    before = ocp.metadata(tmp_path / "c")
    directory = tmp_path / "c" / "state"
    if layout == "files":
        for chunk in directory.glob("*/c/0"):
            os.truncate(chunk, 0)
    else:
        for file in (directory / "d").iterdir():
            content = file.read_bytes()
            for array in value.values():
                content = content.replace(array.tobytes(), bytes(array.nbytes))
            file.write_bytes(content)
    with pytest.raises(ocp.errors.CorruptDataError):
        ocp.load(tmp_path / "c")
    assert ocp.metadata(tmp_path / "c").metadata == before.metadata


def test_metadata_needs_no_devices(tmp_path: Path, mesh8: Mesh) -> None:
    """A process with one device reads the shardings of eight, and makes none of them."""
    array = jax.device_put(jnp.ones((16, 6)), NamedSharding(mesh8, P("x")))
    ocp.save(tmp_path / "c", {"j": array}, custom_metadata={"run": 1})
    program = """
        import sys
        import orbax_async as ocp
        found = ocp.metadata(sys.argv[1])
        leaf = found.metadata["j"]
        assert leaf.sharding_metadata.document["shape"] == [4, 2]
        assert leaf.storage_metadata.chunk_shape == (2, 6)
        assert found.custom_metadata == {"run": 1}
        assert found.init_timestamp < found.commit_timestamp
        try:
            leaf.sharding
        except ValueError as error:
            assert "are not here" in str(error)
        else:
            raise AssertionError("a sharding over devices that are not here")
        import jax
        replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        loaded = ocp.load(sys.argv[1], found, sharding=replicated)
        assert loaded["j"].sharding == replicated and len(jax.devices()) == 1
    """
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "c")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
