"""Options of the format: their effect on disk, read by either library."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import disk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import abstract_of, as_plain, as_typed, assert_same
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1
from trees import ONLY_OURS, Nothing, Pair, jax_dtypes_sharded, numpy_dtypes, on, values

import orbax_async as ocp

LIBRARIES = {"ours": ocp, "orbax": v1}
SWITCHES = ("use_ocdbt", "use_zarr3", "use_compression")


def save(library: Any, path: Path, state: Any, **saving: Any) -> Path:
    """Saves a state under options of `array.saving`; returns the state's directory."""
    context = library.Context()
    for name, value in saving.items():
        setattr(context.array.saving, name, value)
    with context:
        library.save(path, state)
    return path / "state"


def mixed(mesh: Mesh) -> dict[str, Any]:
    """A tree of which every part is stored in another way."""
    return {
        "jax": jax_dtypes_sharded(mesh),
        "numpy": numpy_dtypes(mesh),
        "noise": jax.device_put(values("float32", (256, 300)), NamedSharding(mesh, P("y"))),
        "counts": np.random.default_rng(0).integers(0, 9, (300, 300), np.int64),
        "pair": Pair(jnp.arange(3), None),
        "key": jax.random.key(3),
        "step": 7,
        "done": False,
        "name": "text",
    }


@pytest.mark.parametrize("writer", LIBRARIES)
@pytest.mark.parametrize("switches", list(itertools.product([True, False], repeat=3)), ids=str)
def test_storage_switches(
    switches: tuple[bool, ...], writer: str, mesh8: Mesh, tmp_path: Path
) -> None:
    """B5.5: every combination of the storage switches is read by both under default options."""
    chosen = dict(zip(SWITCHES, switches, strict=True))
    state = mixed(mesh8)
    directory = save(LIBRARIES[writer], tmp_path / "checkpoint", state, **chosen)
    assert (directory / "manifest.ocdbt").exists() == chosen["use_ocdbt"]
    stored = disk.keys(directory)
    zarr3 = chosen["use_zarr3"]
    assert ("noise/zarr.json" in stored, "noise/.zarray" in stored) == (zarr3, not zarr3)
    assert ("noise/c/0/0" in stored, "noise/0.0" in stored) == (zarr3, not zarr3)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    assert (size > state["counts"].nbytes + state["noise"].nbytes) != chosen["use_compression"]
    for library in LIBRARIES.values():
        assert_same(library.load(tmp_path / "checkpoint"), as_plain(state))
        assert_same(library.load(tmp_path / "checkpoint", abstract_of(state)), as_typed(state))


@pytest.mark.parametrize("use_zarr3", [True, False])
@pytest.mark.parametrize("name", ONLY_OURS)
def test_richer_leaves_as_plain_files(
    name: str, use_zarr3: bool, mesh8: Mesh, tmp_path: Path
) -> None:
    """What Orbax can't save comes back from plain files of either zarr version, too."""
    state = ONLY_OURS[name](mesh8)
    save(ocp, tmp_path / "files", state, use_ocdbt=False, use_zarr3=use_zarr3)
    assert_same(ocp.load(tmp_path / "files"), state)
    shapes = jax.tree.map(np.shape, v1.load(tmp_path / "files"))
    lengths = jax.tree.map(lambda x: (len(x),) if isinstance(x, bytes) else np.shape(x), state)
    assert shapes == lengths


@pytest.mark.parametrize(
    ("min_saving", "expected"),
    [
        (0, {"noise": "zstd", "halves": "zstd", "counts": "zstd", "small": "gzip"}),
        (0.1, {"noise": "crc32c", "halves": "zstd", "counts": "zstd", "small": "gzip"}),
        (0.5, {"noise": "crc32c", "halves": "crc32c", "counts": "zstd", "small": "gzip"}),
        (1, {"noise": "crc32c", "halves": "crc32c", "counts": "crc32c", "small": "gzip"}),
    ],
)
def test_compression_min_saving(
    min_saving: float, expected: dict[str, str], tmp_path: Path
) -> None:
    """An array is compressed only where that saves the share asked for; each has a checksum."""
    state = {
        "noise": values("float32", (200, 200)),
        "halves": values("bfloat16", (300, 300)),
        "counts": np.random.default_rng(0).integers(0, 9, (200, 200), np.int32),
        "small": values("float32", (8, 8)),
    }
    directory = save(ocp, tmp_path / "ours", state, compression_min_saving=min_saving)
    for name, checksummed in expected.items():
        assert disk.codecs(directory, name) == ["bytes", checksummed]
    zstd = [c for c in disk.document(directory, "counts")["codecs"] if c["name"] == "zstd"]
    assert all(codec["configuration"]["checksum"] for codec in zstd)
    for library in LIBRARIES.values():
        assert_same(library.load(tmp_path / "ours"), state)


@pytest.mark.parametrize("writer", LIBRARIES)
def test_without_sharding_file(writer: str, mesh8: Mesh, tmp_path: Path) -> None:
    """B3.37: without recorded shardings an abstract tree still places every leaf.

    Without one, too, we load, on one device, where Orbax refuses.
    """
    state = {"w": on(mesh8, P("x", "y"), (8, 4)), "key": jax.random.key(1), "n": np.arange(3)}
    path = tmp_path / "checkpoint"
    directory = save(LIBRARIES[writer], path, state, enable_write_sharding_file=False)
    assert not (directory / "_sharding").exists()
    assert ocp.metadata(path).metadata["w"].sharding is None
    for library in LIBRARIES.values():
        assert_same(library.load(path, abstract_of(state)), state)
    here = jax.device_put(state["w"], jax.devices()[0])
    assert_same(ocp.load(path), state | {"w": here})
    with pytest.raises(ValueError, match=r"Sharding of jax\.Array cannot be None"):
        v1.load(path)


@pytest.mark.parametrize("writer", LIBRARIES)
def test_without_array_metadatas(writer: str, mesh8: Mesh, tmp_path: Path) -> None:
    """Without `array_metadatas` keys come back as integers, unless we are asked for keys."""
    state = {"w": on(mesh8, P("x", "y"), (8, 4)), "key": jax.random.key(1)}
    path = tmp_path / "checkpoint"
    directory = save(LIBRARIES[writer], path, state, array_metadata_store=None)
    assert not (directory / "array_metadatas").exists()
    entries = json.loads((directory / "_METADATA").read_text())["tree_metadata"]
    assert not any("write_shape" in entry["value_metadata"] for entry in entries.values())
    raw = state | {"key": jax.random.key_data(state["key"])}
    for library in LIBRARIES.values():
        assert_same(library.load(path), raw)
        assert library.metadata(path).metadata["w"].storage_metadata.write_shape is None
    assert_same(ocp.load(path, abstract_of(state)), state)


@pytest.mark.parametrize("target", [None, 0, 1 << 17])
def test_target_data_file_size(target: int | None, tmp_path: Path) -> None:
    """A target size divides the data over files, none much above it; None and 0 leave it whole."""
    state = [values("float32", (100, 200), seed) for seed in range(12)]
    directory = save(ocp, tmp_path / "ours", state, ocdbt_target_data_file_size=target)
    sizes = [file.stat().st_size for file in (directory / "d").iterdir()]
    if target:
        assert max(sizes) < target + state[0].nbytes + 1024
        assert len(sizes) >= sum(array.nbytes for array in state) // max(sizes)
    else:
        assert max(sizes) > sum(array.nbytes for array in state)
    assert_same(v1.load(tmp_path / "ours"), state)


REPLICAS = {
    "default": {},
    "on": {"use_replica_parallel": True},
    "off": {"use_replica_parallel": False},
    "one": {"max_replicas_for_replica_parallel": 1},
    "two": {"max_replicas_for_replica_parallel": 2},
    "three": {"max_replicas_for_replica_parallel": 3},
    "min_bytes": {"min_slice_bytes_for_replica_parallel": 100},
}


CHUNKS = {
    "default": ((2, 3), (3, 50)),
    "on": ((2, 3), (3, 50)),
    "off": ((16, 3), (24, 50)),
    "one": ((16, 3), (24, 50)),
    "two": ((8, 3), (12, 50)),
    "three": ((16, 1), (8, 50)),
    "min_bytes": ((16, 3), (3, 50)),
}


@pytest.mark.parametrize("case", REPLICAS)
def test_replica_parallel(case: str, mesh8: Mesh, tmp_path: Path) -> None:
    """B5.6: replicas divide an array as Orbax divides it: equal chunk shapes, equal chunk keys."""
    state = {
        "whole": on(mesh8, P(), (16, 3)),
        "half": on(mesh8, P("x"), (16, 4)),
        "other_half": on(mesh8, P(None, "y"), (4, 8)),
        "second_axis": on(mesh8, P(), (7, 8)),
        "none": on(mesh8, P(), (7, 5)),
        "all": on(mesh8, P("x", "y"), (8, 4)),
        "tall": on(mesh8, P(), (24, 50)),
        "scalar": on(mesh8, P(), ()),
    }
    found = {}
    for writer, library in LIBRARIES.items():
        directory = save(library, tmp_path / writer, state, **REPLICAS[case])
        described = ocp.metadata(tmp_path / writer).metadata
        found[writer] = (
            jax.tree.map(lambda leaf: leaf.storage_metadata, described),
            disk.keys(directory),
            json.loads((directory / "array_metadatas" / "process_0").read_text()),
        )
        for reader in LIBRARIES.values():
            assert_same(reader.load(tmp_path / writer), state)
    assert found["ours"] == found["orbax"]
    shapes = {name: leaf.chunk_shape for name, leaf in found["ours"][0].items()}
    assert (shapes["whole"], shapes["tall"]) == CHUNKS[case]


# What Orbax writes under options that have no effect in ours yet.


def test_reads_cast_storage(mesh8: Mesh, tmp_path: Path) -> None:
    """B5.1: arrays that Orbax cast while saving, scalars among them, load as Orbax loads them."""
    state = {"w": on(mesh8, P("x"), (8, 2)), "n": np.arange(3.0), "step": 5, "rate": 0.5}
    context = v1.Context()
    context.array.saving.storage_options.dtype = jnp.bfloat16
    with context:
        v1.save(tmp_path / "orbax", state)
    loaded = ocp.load(tmp_path / "orbax")
    assert_same(loaded, v1.load(tmp_path / "orbax"))
    assert (loaded["step"], loaded["w"].dtype) == (5.0, jnp.bfloat16)
    assert_same(ocp.load(tmp_path / "orbax", abstract_of(state))["step"], 5)
    described = ocp.metadata(tmp_path / "orbax").metadata
    assert (described["step"], described["n"].dtype) == (0.0, jnp.bfloat16)


@pytest.mark.parametrize(
    "options", [{"chunk_byte_size": 64}, {"chunk_byte_size": 256, "shard_axes": (1,)}], ids=str
)
def test_reads_small_chunks(options: dict[str, Any], mesh8: Mesh, tmp_path: Path) -> None:
    """B5.3: arrays that Orbax divided into chunks smaller than their shards load whole."""
    state = {"w": on(mesh8, P("x", "y"), (16, 64)), "n": values("float32", (30, 21))}
    context = v1.Context()
    for name, value in options.items():
        setattr(context.array.saving.storage_options, name, value)
    with context:
        v1.save(tmp_path / "orbax", state)
    assert_same(ocp.load(tmp_path / "orbax"), state)
    transposed = jax.ShapeDtypeStruct(
        (16, 64), jnp.float32, sharding=NamedSharding(mesh8, P("y", "x"))
    )
    resharded = ocp.load(tmp_path / "orbax", {"w": transposed, "n": np.empty(0)})
    assert_same(resharded["w"], jax.device_put(state["w"], transposed.sharding))
    described = [library.metadata(tmp_path / "orbax").metadata["w"] for library in (ocp, v1)]
    ours, theirs = (leaf.storage_metadata for leaf in described)
    assert ours.chunk_shape == theirs.chunk_shape != (4, 32)
    assert ours.write_shape == theirs.write_shape == (4, 32)


def test_reads_separate_replica_folders(mesh8: Mesh, tmp_path: Path) -> None:
    """Data that Orbax put into folders of its own for replicated arrays is found."""
    state = {"w": on(mesh8, P("x", "y"), (8, 4)), "replicated": on(mesh8, P(), (16, 3))}
    directory = save(v1, tmp_path / "orbax", state, enable_replica_parallel_separate_folder=True)
    assert list(directory.glob("ocdbt.process_replica_*"))
    assert_same(ocp.load(tmp_path / "orbax"), state)


def test_reads_rich_types(mesh8: Mesh, tmp_path: Path) -> None:
    """B2.22: a checkpoint with rich types loads as plain containers, as in a default Orbax."""
    state = {"pair": Pair(np.arange(2), (1, 2)), "nothing": Nothing(), "w": on(mesh8, P(), (8,))}
    context = v1.Context()
    context.pytree.saving.pytree_metadata_options.support_rich_types = True
    with context:
        v1.save(tmp_path / "orbax", state)
    assert_same(ocp.load(tmp_path / "orbax"), as_plain(state))
    assert_same(ocp.load(tmp_path / "orbax"), v1.load(tmp_path / "orbax"))
    assert_same(ocp.load(tmp_path / "orbax", abstract_of(state)), state)


def test_reads_partial_save(mesh8: Mesh, tmp_path: Path) -> None:
    """A checkpoint that Orbax assembled from partial saves loads as one tree."""
    path = tmp_path / "partial"
    state = {"a": on(mesh8, P("x"), (8, 2)), "b": np.arange(3)}
    v1.partial.save(path, {"a": state["a"]})
    v1.partial.save(path, {"b": state["b"]})
    v1.partial.finalize(path)
    assert_same(ocp.load(path), state)


def test_reads_checkpointer_steps(mesh8: Mesh, tmp_path: Path) -> None:
    """A step of Orbax's Checkpointer, which has no marker and metrics beside it, loads."""
    state = {"w": on(mesh8, P("x"), (8, 2)), "step": 2}
    with v1.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(2, state, metrics={"loss": 0.5})
    step = tmp_path / "run" / "2"
    assert (step / "metrics").is_dir()
    assert not (step / "orbax.checkpoint").exists()
    assert_same(ocp.load(step), state)
    assert_same(ocp.load(step, ocp.metadata(step)), state)


def test_reads_several_checkpointables(mesh8: Mesh, tmp_path: Path) -> None:
    """Of several checkpointables saved by Orbax each pytree is found by its name."""
    trees = {"b": {"w": on(mesh8, P("x"), (8, 2))}, "a": {"n": np.arange(3)}}
    v1.save_checkpointables(tmp_path / "several", trees)
    assert_same(ocp.load(tmp_path / "several"), trees["a"])
    for name, tree in trees.items():
        assert_same(ocp.load(tmp_path / "several", checkpointable_name=name), tree)
