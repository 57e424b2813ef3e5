"""Loads straight from the data files: the index, ranges and checksums (I1, I12)."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from seals import unseal

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine import load_pipeline
from orbax_async._storage import codecs, direct, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.direct import DirectReader
from orbax_async._storage.local import LocalDirectory

LARGE = np.random.default_rng(0).standard_normal((3072, 1024), np.float32)  # 12 MiB: three blocks


def database(directory: Path, values: dict[str, bytes], **config: Any) -> ts.KvStore:
    """Writes an OCDBT database in several commits."""
    store = ts.KvStore.open(
        {
            "driver": "ocdbt",
            "base": directory.as_uri() + "/",
            "config": {"max_inline_value_bytes": 100, **config},
            "assume_config": True,
        }
    ).result()
    keys = list(values)
    for part in range(3):
        transaction = ts.Transaction(atomic=True)
        for key in keys[part::3]:
            store.with_transaction(transaction)[key] = values[key]
        transaction.commit_async().result()
    return store


@pytest.mark.parametrize("node_bytes", [400, 5000, 8_000_000])
def test_the_index_lists_every_value(
    node_bytes: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Trees of one node and of several levels give the values that TensorStore gives."""
    values = {
        f"{'läyer' if i % 2 else 'b.ias'}{i % 7}/w{i:04}/c": rng.bytes(int(rng.integers(0, 300)))
        for i in range(400)
    }
    database(tmp_path, values, max_decoded_node_bytes=node_bytes)
    keys = [*values, "absent", "läyer1"]
    found = DirectReader(LocalDirectory(str(tmp_path))).values(keys)
    assert [None if value is None else bytes(value) for value in found] == [
        values.get(key) for key in keys
    ]


def test_an_empty_database_has_no_values(tmp_path: Path) -> None:
    """A database from which everything was deleted is one without values."""
    store = database(tmp_path, {"a": b"x"})
    store["a"] = None
    assert DirectReader(LocalDirectory(str(tmp_path))).values(["a"]) == [None]


def test_values_that_are_cut_off_are_told(tmp_path: Path) -> None:
    """A data file that has lost its end is an error, not short values."""
    database(tmp_path, {"a": b"x" * 500, "b": b"y", "c": b"z"})  # the index is in a later file
    (file,) = (each for each in (tmp_path / "d").iterdir() if each.stat().st_size >= 500)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="300 bytes found, 500 expected"):
        DirectReader(LocalDirectory(str(tmp_path))).values(["a"])


@st.composite
def regions(draw: st.DrawFn) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Draws the shape of an array, of its chunks, and a box of it."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    chunk_shape = [draw(st.integers(1, side)) for side in shape]
    box = []
    for side in shape:
        start = draw(st.integers(0, side - 1))
        box.append((start, draw(st.integers(start + 1, side))))
    return shape, chunk_shape, box


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for many small databases."""
    yield tmp_path_factory.mktemp("regions")


@settings(max_examples=max(60, settings().max_examples), deadline=None)
@given(drawn=regions(), tail=st.sampled_from([(), ("crc32c",)]), data=st.data())
def test_any_region_of_any_chunks_is_read(
    drawn: tuple[list[int], list[int], list[tuple[int, int]]],
    tail: tuple[str, ...],
    data: st.DataObject,
    folders: Path,
) -> None:
    """Boxes that cut chunks anywhere, chunks that reach over the edge: the values are the array's.

    Without checksums of ours a CRC-32C leaves the array to TensorStore, untouched.
    """
    shape, chunk_shape, box = drawn
    with_sums = data.draw(st.booleans())
    directory = folders / str(len(list(folders.iterdir())))
    array = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    kvstore = {"driver": "ocdbt", "base": directory.as_uri() + "/", "path": "x/"}
    kvstore["config"] = {"max_inline_value_bytes": 0}
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    stored = ts.open(
        {
            "driver": "zarr3",
            "kvstore": kvstore,
            "metadata": {
                "shape": shape,
                "data_type": "int16",
                "chunk_grid": grid,
                "codecs": [little, *({"name": name} for name in tail)],
            },
            "store_data_equal_to_fill_value": True,
        },
        create=True,
    ).result()
    stored.write(array).result()
    store = ts.KvStore.open(kvstore | {"path": ""}).result()
    if with_sums:
        pads = [(0, -side % piece) for side, piece in zip(shape, chunk_shape, strict=True)]
        padded = np.pad(array, pads)
        for index in np.ndindex(
            *(side // piece for side, piece in zip(padded.shape, chunk_shape, strict=True))
        ):
            at = zip(index, chunk_shape, strict=True)
            chunk = padded[tuple(slice(i * side, (i + 1) * side) for i, side in at)]
            sums = codecs.block_checksums(np.ascontiguousarray(chunk))
            store[zarr.checksums_key("x", index)] = sums
    document = zarr.parse_document(store.read("x/zarr.json").result().value)
    layout = document.raw
    assert layout is not None
    target = np.full([stop - start for start, stop in box], -1, np.int16)
    is_read = DirectReader(LocalDirectory(str(directory))).read_region("x", layout, box, target)
    assert is_read == (with_sums or not tail)
    expected = array[tuple(slice(start, stop) for start, stop in box)]
    assert np.array_equal(target, expected if is_read else np.full_like(target, -1))


def flip(directory: Path, offset: int) -> None:
    """Flips a bit of the largest data file."""
    file = max((directory / "d").iterdir(), key=lambda each: each.stat().st_size)
    content = bytearray(file.read_bytes())
    content[offset] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("beyond", [-4097, -4096, -1, 0, 1, 4095, 4096, 5000])
def test_i12_a_chunk_has_the_checksum_of_each_of_its_blocks(blocks: int, beyond: int) -> None:
    """What is computed of a whole chunk is what a reader computes block by block."""
    size, block = blocks * codecs.CHECKSUM_BLOCK + beyond, codecs.CHECKSUM_BLOCK
    data = np.random.default_rng(0).integers(0, 256, max(size, 0), np.uint8)
    expected = [codecs.checksum(data[start : start + block]) for start in range(0, size, block)]
    assert np.frombuffer(codecs.block_checksums(data), "<u4").tolist() == expected


@pytest.mark.parametrize("offset", [0, 4_000_000, (12 << 20) - 1])
def test_i12_a_flipped_bit_anywhere_in_a_large_chunk_is_found(offset: int, tmp_path: Path) -> None:
    """Each block of a chunk is verified, the first, one in the middle, and the last byte."""
    ocp.save(tmp_path / "checkpoint", {"w": jnp.asarray(LARGE)})
    flip(tmp_path / "checkpoint" / "state", offset)
    with pytest.raises(errors.CorruptDataError, match=r"\['w'\].*checksum"):
        ocp.load(tmp_path / "checkpoint")


def test_i12_a_part_of_a_chunk_is_verified_and_no_more_is_read(
    tmp_path: Path, mesh8: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a chunk are verified by the blocks that they touch; damage elsewhere is not met."""
    ocp.save(tmp_path / "checkpoint", {"w": LARGE})
    flip(tmp_path / "checkpoint" / "state", (12 << 20) - 1)
    reader = DirectReader(LocalDirectory(str(tmp_path / "checkpoint" / "state")))
    layout = zarr.RawLayout((3072, 1024), True, True)
    read: list[int] = []
    original = direct.read_into
    monkeypatch.setattr(
        direct, "read_into", lambda *args: (read.append(len(args[2])), original(*args))[1]
    )
    target = np.empty((1000, 1024), np.float32)
    assert reader.read_region("w", layout, ((100, 1100), (0, 1024)), target)
    assert np.array_equal(target, LARGE[100:1100])
    assert sum(read) == 8 << 20  # two blocks of three
    with pytest.raises(ValueError, match="checksum"):
        reader.read_region("w", layout, ((2000, 3000), (0, 1024)), target)


@pytest.mark.parametrize("spec", [("x",), ("x", "y"), (None, "x"), ("y", "x"), ()])
def test_i1_resharding_reads_each_byte_once(
    spec: tuple[str | None, ...], tmp_path: Path, mesh8: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array saved on one device and loaded on eight is read once, however it is divided."""
    ocp.save(tmp_path / "checkpoint", {"w": jnp.asarray(LARGE)})
    read: list[int] = []
    original = direct.read_into
    monkeypatch.setattr(
        direct, "read_into", lambda *args: (read.append(len(args[2])), original(*args))[1]
    )
    sharding = NamedSharding(mesh8, PartitionSpec(*spec))
    abstract = {"w": jax.ShapeDtypeStruct(LARGE.shape, LARGE.dtype, sharding=sharding)}
    loaded = ocp.load(tmp_path / "checkpoint", abstract)["w"]
    assert loaded.sharding == sharding
    assert np.array_equal(loaded, LARGE)
    # Rows of several devices may share a block of checksums, which each then reads.
    assert LARGE.nbytes <= sum(read) <= LARGE.nbytes + 8 * codecs.CHECKSUM_BLOCK


def test_large_raw_arrays_are_loaded_without_tensorstore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What we save and what Orbax saves uncompressed is read directly; the rest by TensorStore."""
    state = {"w": jnp.asarray(LARGE), "small": np.arange(5), "step": 3}
    ocp.save(tmp_path / "checkpoint", state)
    opened: list[str] = []
    original = ArrayStore.open_array

    def open_array(self: ArrayStore, name: str, *args: Any, **options: Any) -> Any:
        opened.append(name)
        return original(self, name, *args, **options)

    monkeypatch.setattr(ArrayStore, "open_array", open_array)
    assert np.array_equal(ocp.load(tmp_path / "checkpoint")["w"], LARGE)
    assert opened == []
    unseal(tmp_path / "checkpoint")
    base = (tmp_path / "checkpoint" / "state").as_uri() + "/"
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    store[zarr.checksums_key("w", (0, 0))] = None  # as another writer of CRC-32C would leave it
    assert np.array_equal(ocp.load(tmp_path / "checkpoint")["w"], LARGE)
    assert opened == ["w"]
    context = ocp.Context()
    context.array.saving.compression_min_saving = 0
    with context:
        ocp.save(tmp_path / "compressed", state)
    assert np.array_equal(ocp.load(tmp_path / "compressed")["w"], LARGE)
    assert opened == ["w", "w"]


def test_what_is_loaded_is_the_memory_that_was_read_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU a jax array takes over the buffer into which its bytes were read."""
    ocp.save(tmp_path / "checkpoint", {"w": jnp.asarray(LARGE)})
    targets: list[int] = []
    original = DirectReader.read_region

    def read_region(self: DirectReader, *args: Any) -> bool:
        targets.append(args[3].ctypes.data)
        return original(self, *args)

    monkeypatch.setattr(DirectReader, "read_region", read_region)
    loaded = ocp.load(tmp_path / "checkpoint")["w"]
    assert [loaded.unsafe_buffer_pointer()] == targets


def test_memory_that_stays_is_mapped_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapping waits for page faults nearby; a check, which keeps nothing, maps batch by batch."""
    ocp.save(tmp_path / "checkpoint", {str(i): LARGE[i:] for i in range(20)})
    events: list[str] = []
    originals = DirectReader.read_region, load_pipeline.aligned_empty

    def read_region(self: DirectReader, *args: Any) -> bool:
        events.append("read")
        return originals[0](self, *args)

    def aligned_empty(*args: Any) -> np.ndarray[Any, Any]:
        events.append("map")
        return originals[1](*args)

    monkeypatch.setattr(DirectReader, "read_region", read_region)
    monkeypatch.setattr(load_pipeline, "aligned_empty", aligned_empty)
    ocp.load(tmp_path / "checkpoint")
    assert events == ["map"] * 20 + ["read"] * 20
    events.clear()
    assert ocp.verify(tmp_path / "checkpoint").is_intact
    assert "map" in events[events.index("read") :]


def test_i3_donating_one_replica_leaves_the_others(tmp_path: Path, mesh8: Mesh) -> None:
    """Replicas share the memory that was read; donating one of them changes none of the others."""
    ocp.save(tmp_path / "checkpoint", {"w": jnp.asarray(LARGE)})
    sharding = NamedSharding(mesh8, PartitionSpec())
    abstract = {"w": jax.ShapeDtypeStruct(LARGE.shape, LARGE.dtype, sharding=sharding)}
    replicas = [s.data for s in ocp.load(tmp_path / "checkpoint", abstract)["w"].addressable_shards]
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    update(replicas[0]).block_until_ready()
    assert all(np.array_equal(replica, LARGE) for replica in replicas[1:])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """What was read of which array in each go, where 100 kB count as a large part."""
    found: list[tuple[str, tuple[int, ...]]] = []
    original = DirectReader.read_region

    def read_region(
        self: DirectReader, name: str, layout: Any, box: Any, into: np.ndarray[Any, Any]
    ) -> bool:
        found.append((name, into.shape))
        return original(self, name, layout, box, into)

    monkeypatch.setattr(load_pipeline, "_PART_NBYTES", 100_000)
    monkeypatch.setattr(DirectReader, "read_region", read_region)
    return found


@pytest.mark.parametrize("chunk_nbytes", [None, 400_000])
def test_a_large_array_is_read_in_parts(
    tmp_path: Path,
    mesh8: Mesh,
    rng: np.random.Generator,
    parts: list[tuple[str, tuple[int, ...]]],
    chunk_nbytes: int | None,
) -> None:
    """Rows that lie together, of one chunk or several, are read in parts; columns are not."""
    values = {
        "flat": rng.standard_normal(400_000, np.float32),
        "deep": rng.standard_normal((9, 30, 500), np.float32),
    }
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = chunk_nbytes
    with context:
        ocp.save(tmp_path / "checkpoint", values)
    loaded = ocp.load(tmp_path / "checkpoint")
    assert all(np.array_equal(loaded[name], values[name]) for name in values)
    of_flat = [shape for name, shape in parts if name == "flat"]
    of_deep = [shape for name, shape in parts if name == "deep"]
    assert of_flat == [(25_000,)] * 16
    # Divided to 400 kB its chunks have all rows and some columns each.
    assert of_deep == ([(1, 30, 500)] * 9 if chunk_nbytes is None else [(9, 30, 500)])
    sharding = NamedSharding(mesh8, PartitionSpec(None, "y"))
    abstract = {"deep": jax.ShapeDtypeStruct((9, 30, 500), np.float32, sharding=sharding)}
    abstract["flat"] = ...
    deep = ocp.load(tmp_path / "checkpoint", abstract)["deep"]
    assert deep.sharding == sharding
    assert np.array_equal(deep, values["deep"])


def test_damage_in_a_part_is_named(
    tmp_path: Path, parts: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator
) -> None:
    """One flipped bit in one of the parts fails the load, with the leaf's name."""
    value = rng.standard_normal(333_333, np.float32)
    ocp.save(tmp_path / "checkpoint", {"flat": value})
    probe = value[200_000:200_016].tobytes()
    (path,) = [
        path
        for path in (tmp_path / "checkpoint").rglob("*")
        if path.is_file() and probe in path.read_bytes()
    ]
    data = bytearray(path.read_bytes())
    data[data.index(probe)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ocp.errors.CorruptDataError, match=r"\['flat'\]"):
        ocp.load(tmp_path / "checkpoint")
    assert len(parts) > 1


def test_parts_that_only_tensorstore_verifies(
    tmp_path: Path, parts: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator
) -> None:
    """Where an array's checksums are missing its parts are given up, and it is read whole."""
    value = rng.standard_normal(333_333, np.float32)
    ocp.save(tmp_path / "checkpoint", {"flat": value})
    unseal(tmp_path / "checkpoint")
    base = (tmp_path / "checkpoint" / "state").as_uri() + "/"
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    store[zarr.checksums_key("flat", (0,))] = None
    assert np.array_equal(ocp.load(tmp_path / "checkpoint")["flat"], value)
    assert ("flat", value.shape) in parts


@pytest.mark.parametrize("node_bytes", [400, 5000, 100_000_000])
@pytest.mark.parametrize("compression", [None, {"id": "zstd"}])
@pytest.mark.parametrize("commits", [1, 2, 40])
def test_the_index_says_what_tensorstore_says(
    node_bytes: int, compression: Any, commits: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Of nodes of one block and of many, that compress and that do not, of one version or many."""
    base = {"driver": "file", "path": f"{tmp_path}/"}
    config = {"max_decoded_node_bytes": node_bytes, "compression": compression}
    config |= {"max_inline_value_bytes": 1000, "version_tree_arity_log2": 2}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    values = {
        f"läyer.{i % 7}/w{i:04}": (rng.bytes if i % 5 else bytes)(int(rng.integers(0, 1500)))
        for i in range(600)
    }
    for part in range(commits):
        transaction = ts.Transaction(atomic=True)
        for key in list(values)[part::commits]:
            store.with_transaction(transaction)[key] = values[key]
        transaction.commit_async().result()
    reader = DirectReader(LocalDirectory(str(tmp_path)))
    assert reader.sizes() == {key: len(value) for key, value in values.items()}
    found = reader.values(list(values))
    assert [bytes(each or b"") for each in found] == list(values.values())


def test_f11_a_load_leaves_nothing_of_the_index_behind(tmp_path: Path) -> None:
    """F11: what was read of an index is freed; TensorStore's dump keeps four blocks a key."""
    ocp.save(tmp_path / "checkpoint", {str(i): np.arange(3) for i in range(300)})
    counts = []
    for _ in range(6):
        ocp.load(tmp_path / "checkpoint")
        gc.collect()
        counts.append(sys.getallocatedblocks())
    assert counts[-1] - counts[2] < 300


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d"])
def test_a_flipped_bit_in_an_index_is_found(name: str, tmp_path: Path) -> None:
    """Each record has a checksum, which is verified before anything is believed."""
    database(tmp_path, {f"key{i}": bytes([i]) * 50 for i in range(200)})
    for file in [tmp_path / name] if name != "d" else (tmp_path / name).iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        DirectReader(LocalDirectory(str(tmp_path))).sizes()
