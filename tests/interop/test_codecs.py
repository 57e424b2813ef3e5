"""FORMAT 5.2 and 5.3: arrays in encodings and chunk grids that neither library writes itself."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
import jax
import numpy as np
import pytest
from equality import abstract_of, assert_same
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1
from stock import refusal
from trees import base_state

import orbax_async as ocp
from orbax_async import errors

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}
CRC = {"name": "crc32c"}


def zstd(level: int = 1, *, checksum: bool = False) -> dict[str, Any]:
    """A zstd codec."""
    return {"name": "zstd", "configuration": {"level": level, "checksum": checksum}}


def blosc(cname: str, shuffle: str) -> dict[str, Any]:
    """A blosc codec."""
    settings = {"cname": cname, "clevel": 5, "shuffle": shuffle, "blocksize": 0, "typesize": 4}
    return {"name": "blosc", "configuration": settings}


def sharding(inner: tuple[int, ...], *codecs: Any, index: Any = None, **more: Any) -> Any:
    """A sharding_indexed codec."""
    configuration = {
        "chunk_shape": inner,
        "codecs": list(codecs),
        "index_codecs": index or [LITTLE, CRC],
    }
    return {"name": "sharding_indexed", "configuration": configuration | more}


CODECS: dict[str, list[Any]] = {
    "raw": [LITTLE],
    "zstd1": [LITTLE, zstd(1)],
    "zstd-5": [LITTLE, zstd(-5)],
    "zstd-100": [LITTLE, zstd(-100)],
    "zstd22": [LITTLE, zstd(22)],
    "zstd-checksum": [LITTLE, zstd(checksum=True)],
    "gzip": [LITTLE, {"name": "gzip", "configuration": {"level": 6}}],
    "gzip-level-0": [LITTLE, {"name": "gzip", "configuration": {"level": 0}}],
    "blosc-lz4-shuffle": [LITTLE, blosc("lz4", "shuffle")],
    "blosc-zstd-bitshuffle": [LITTLE, blosc("zstd", "bitshuffle")],
    "blosc-zstd-noshuffle": [LITTLE, blosc("zstd", "noshuffle")],
    "crc32c": [LITTLE, CRC],
    "zstd-crc32c": [LITTLE, zstd(), CRC],
    "big-endian": [BIG],
    "big-endian-gzip": [BIG, {"name": "gzip", "configuration": {"level": 1}}],
    "transpose": [{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE],
    "transpose-zstd": [{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE, zstd()],
}
GRIDS = {"whole": (8, 16), "dividing": (4, 8), "not-dividing": (3, 5), "larger": (16, 32)}


def document(array: Any, codecs: list[Any], grid: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """A zarr v3 document for an array."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": codecs,
        "fill_value": 0.0,
    } | more


def assert_reads(path: Path, mesh: Mesh) -> None:
    """Fails unless we and Orbax load the base state, we also resharded, to NumPy and cast."""
    state = base_state()
    assert_same(ocp.load(path), state)
    assert_same(ocp.load(path, abstract_of(state)), state)
    assert_same(v1.load(path, abstract_of(state)), state)
    only_w = dict.fromkeys(state, ...)
    sharding = NamedSharding(mesh, P("y", "x"))
    across = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=sharding)
    assert_same(ocp.load(path, only_w | {"w": across})["w"], jax.device_put(state["w"], sharding))
    assert_same(ocp.load(path, only_w | {"w": np.ndarray})["w"], np.asarray(state["w"]))
    halves = np.zeros((8, 16), np.float16)
    wanted = np.asarray(state["w"]).astype(np.float16)
    assert_same(ocp.load(path, only_w | {"w": halves})["w"], wanted)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("codec", CODECS)
def test_zarr3_codecs(codec: str, grid: str, copy_of: Callable[[str], Path], mesh8: Mesh) -> None:
    """Any codec chain on any chunk grid loads, though the documents beside it say otherwise."""
    path = copy_of("orbax")
    array = np.asarray(base_state()["w"])
    disk.replace_array(path / "state", "w", array, document(array, CODECS[codec], GRIDS[grid]))
    assert_reads(path, mesh8)


@pytest.mark.parametrize(
    ("outer", "codec"),
    {
        "one-inner-chunk": ((8, 16), sharding((8, 16), LITTLE, zstd())),
        "four-inner-chunks": ((8, 16), sharding((4, 8), LITTLE)),
        "shards-of-four": ((4, 16), sharding((2, 8), LITTLE, zstd())),
        "not-dividing": ((6, 10), sharding((3, 5), LITTLE)),
        "inner-crc32c": ((8, 16), sharding((4, 16), LITTLE, CRC)),
        "index-without-crc32c": ((8, 16), sharding((4, 8), LITTLE, index=[LITTLE])),
        "index-first": ((8, 16), sharding((4, 8), LITTLE, index_location="start")),
        "nested": ((8, 16), sharding((4, 16), sharding((2, 4), LITTLE))),
    }.values(),
)
def test_zarr3_sharding_indexed(
    outer: tuple[int, ...], codec: Any, copy_of: Callable[[str], Path], mesh8: Mesh
) -> None:
    """Shards of one or several inner chunks load, wherever and however their index lies."""
    path = copy_of("ours")
    array = np.asarray(base_state()["w"])
    disk.replace_array(path / "state", "w", array, document(array, [codec], outer))
    assert_reads(path, mesh8)
    chunk_shape = ocp.metadata(path).metadata["w"].storage_metadata.chunk_shape
    assert chunk_shape == v1.metadata(path).metadata["w"].storage_metadata.chunk_shape


@pytest.mark.parametrize("grid", ["whole", "dividing"])
@pytest.mark.parametrize(
    ("name", "separator"), [("default", "."), ("default", "/"), ("v2", "."), ("v2", "/")]
)
def test_zarr3_chunk_key_encodings(
    name: str, separator: str, grid: str, copy_of: Callable[[str], Path], mesh8: Mesh
) -> None:
    """Chunk keys of every spelling are found."""
    path = copy_of("orbax")
    array = np.asarray(base_state()["w"])
    keys = {"name": name, "configuration": {"separator": separator}}
    changed = document(array, [LITTLE], GRIDS[grid], chunk_key_encoding=keys)
    disk.replace_array(path / "state", "w", array, changed)
    assert_reads(path, mesh8)


@pytest.mark.parametrize("extra", [{"attributes": {"a": [1]}}, {"x": {"must_understand": False}}])
def test_zarr3_extra_entries(
    extra: dict[str, Any], copy_of: Callable[[str], Path], mesh8: Mesh
) -> None:
    """FORMAT 5.5: attributes, and keys that need not be understood, don't matter."""
    path = copy_of("orbax")
    array = np.asarray(base_state()["w"])
    disk.replace_array(path / "state", "w", array, document(array, [LITTLE], (8, 16)))
    changed = disk.document(path / "state", "w") | extra
    disk.put_document(path / "state", "w", changed)
    assert_reads(path, mesh8)


ZARR2 = {
    "none": {"compressor": None},
    "zstd1": {"compressor": {"id": "zstd", "level": 1}},
    "zstd-5": {"compressor": {"id": "zstd", "level": -5}},
    "blosc": {
        "compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
    },
    "zlib": {"compressor": {"id": "zlib", "level": 1}},
    "gzip": {"compressor": {"id": "gzip", "level": 1}},
    "bz2": {"compressor": {"id": "bz2", "level": 1}},
    "fortran": {"compressor": None, "order": "F"},
    "fortran-slash": {"compressor": None, "order": "F", "dimension_separator": "/"},
    "slash": {"compressor": None, "dimension_separator": "/"},
    "slash-zlib": {"compressor": {"id": "zlib", "level": 1}, "dimension_separator": "/"},
    "big-endian": {"compressor": None, "dtype": ">f4"},
}


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("chunks", GRIDS)
@pytest.mark.parametrize("variant", ZARR2)
def test_zarr2_variants(
    variant: str, chunks: str, use_ocdbt: bool, mesh8: Mesh, tmp_path: Path
) -> None:
    """Zarr v2 arrays load with any compressor, order, separator and chunk grid."""
    context = ocp.Context()
    context.array.saving.use_zarr3 = False
    context.array.saving.use_ocdbt = use_ocdbt
    state = {"w": base_state()["w"], "n": np.arange(3)}
    with context:
        ocp.save(tmp_path / "ours", state)
    array = np.asarray(state["w"])
    changed = {
        "zarr_format": 2,
        "shape": [8, 16],
        "chunks": GRIDS[chunks],
        "dtype": "<f4",
        "order": "C",
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    } | ZARR2[variant]
    disk.replace_array(tmp_path / "ours" / "state", "w", array, changed, zarr3=False)
    assert_same(ocp.load(tmp_path / "ours"), state)
    assert_same(v1.load(tmp_path / "ours"), state)
    sharding = NamedSharding(mesh8, P("y", "x"))
    across = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=sharding)
    resharded = ocp.load(tmp_path / "ours", {"w": across, "n": np.ndarray})["w"]
    assert_same(resharded, jax.device_put(state["w"], sharding))


def test_dtype_edges_in_plain_chunks(copy_of: Callable[[str], Path]) -> None:
    """FORMAT 3.1: narrow integers load from masked and from sign-extended bytes."""
    path = copy_of("orbax")
    directory = path / "state"
    array = np.zeros((4,), np.int8)
    for name, stored in (("b", b"\x0e\x02\x00\x07"), ("np", b"\xfe\x02\x00\x07")):
        changed = document(array, [{"name": "bytes"}], (4,), data_type="int4", fill_value=0)
        disk.put_document(directory, name, changed)
        disk.put(directory, {f"{name}/c/0": stored})
    loaded = ocp.load(path)
    assert np.asarray(loaded["b"]).astype(np.int8).tolist() == [-2, 2, 0, 7]
    assert loaded["np"].astype(np.int8).tolist() == [-2, 2, 0, 7]
    assert_same(loaded, v1.load(path))


# What must be refused.

SKIPPABLE = struct.pack("<II", 0x184D2A50, 8) + bytes(8)

DAMAGES: dict[str, tuple[list[Any], Callable[[bytes], bytes | None]]] = {
    "trailing bytes": ([LITTLE], lambda value: value + bytes(100)),
    "cut short": ([LITTLE], lambda value: value[:-1]),
    "empty": ([LITTLE], lambda value: b""),
    "gone": ([LITTLE], lambda value: None),
    "wrong crc32c": ([LITTLE, CRC], lambda value: value[:-1] + bytes([value[-1] ^ 1])),
    "wrong byte under crc32c": ([LITTLE, CRC], lambda value: bytes([value[0] ^ 1]) + value[1:]),
    "wrong byte under gzip": (
        CODECS["gzip-level-0"],
        lambda value: value[:40] + bytes([value[40] ^ 4]) + value[41:],
    ),
    "two zstd frames": ([LITTLE, zstd()], lambda value: value + value),
    "skippable zstd frame first": ([LITTLE, zstd()], lambda value: SKIPPABLE + value),
    "shard index with a wrong crc32c": (
        [sharding((8, 16), LITTLE)],
        lambda value: value[:-1] + bytes([value[-1] ^ 1]),
    ),
    "shard with a chunk missing": (
        [sharding((8, 16), LITTLE, index=[LITTLE])],
        lambda value: value[:-16] + b"\xff" * 16,
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_values_are_refused(damage: str, copy_of: Callable[[str], Path]) -> None:
    """A value that is missing, or not what its codecs say, is an error that names the leaf."""
    codecs, spoil = DAMAGES[damage]
    path = copy_of("orbax")
    directory = path / "state"
    array = np.asarray(base_state()["w"])
    disk.replace_array(directory, "w", array, document(array, codecs, (8, 16)))
    assert_same(ocp.load(path), base_state())
    spoiled = spoil(disk.value(directory, "w/c/0/0"))
    if damage == "two zstd frames":
        # The second frame must count: a first one of half the array alone is not enough.
        half = document(array[:4], codecs, (4, 16))
        disk.replace_array(directory, "np", array[:4], half)
        first = disk.value(directory, "np/c/0/0")
        spoiled = first + first
    if spoiled is None:
        disk.remove(directory, "w/c/0/0")
    else:
        disk.put(directory, {"w/c/0/0": spoiled})
    wanted = dict.fromkeys(base_state(), ...) | {"w": base_state()["w"]}
    with pytest.raises(errors.ReadError, match=r"leaf \['w'\]"):
        ocp.load(path, wanted)
    assert refusal(path, wanted | {"w": np.ndarray})


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("leaf", ["w", "np", "large", "i"])
def test_missing_chunk_is_no_zeros(
    leaf: str, flag: bool | None, copy_of: Callable[[str], Path]
) -> None:
    """A chunk that is gone is an error, whatever the tree's document says of fill values."""
    path = copy_of("ours")
    directory = path / "state"

    def set_flag(content: dict[str, Any]) -> None:
        del content["store_array_data_equal_to_fill_value"]
        if flag is not None:
            content["store_array_data_equal_to_fill_value"] = flag

    disk.edit(directory / "_METADATA", set_flag)
    assert_same(ocp.load(path), base_state())
    chunk = max(key for key in disk.keys(directory) if key.startswith(f"{leaf}/c"))
    disk.remove(directory, chunk)
    with pytest.raises(errors.ReadError, match=rf"leaf \['{leaf}'\]"):
        ocp.load(path)


def test_tolerated_zstd_tails(copy_of: Callable[[str], Path]) -> None:
    """FORMAT 5.2: bytes after the first zstd frame, and its checksum undeclared, are no error."""
    path = copy_of("orbax")
    directory = path / "state"
    array = np.asarray(base_state()["w"])
    disk.replace_array(
        directory, "w", array, document(array, [LITTLE, zstd(checksum=True)], (8, 16))
    )
    disk.put_document(directory, "w", document(array, [LITTLE, zstd(7)], (8, 16)))
    assert_same(ocp.load(path), base_state())
    frame = disk.value(directory, "w/c/0/0")
    for tail in (SKIPPABLE, b"garbage"):
        disk.put(directory, {"w/c/0/0": frame + tail})
        assert_same(ocp.load(path), base_state())
        assert_same(v1.load(path), base_state())
