"""Stores of arrays, wherever the directory lies (I12, I14)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from memory_directory import LIKE_A_BUCKET, LIKE_A_FILE_SYSTEM, MemoryStore

from orbax_async._storage import codecs, safetensors, zarr
from orbax_async._storage.array_store import (
    ArrayStore,
    holds_ocdbt,
    merge_process_databases,
    read_index,
)
from orbax_async._storage.direct import DirectReader
from orbax_async._storage.directory import Capability, Directory
from orbax_async._storage.local import LocalDirectory

VALUES = {f"a/{index}": bytes([index]) * (index * 300) for index in range(10)}


@pytest.fixture(params=["local", "file system", "bucket"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    """A directory that is not there yet."""
    if request.param == "local":
        return LocalDirectory(str(tmp_path / "run"))
    capabilities = LIKE_A_BUCKET if request.param == "bucket" else LIKE_A_FILE_SYSTEM
    return MemoryStore(capabilities).open("/run")


def put(store: ArrayStore, values: dict[str, bytes]) -> None:
    """Writes whole values in one transaction."""
    transaction = store.begin()
    target = store.values(transaction)
    for key, value in values.items():
        target[key] = value
    transaction.commit_async().result()


@pytest.mark.parametrize("ocdbt", [True, False])
def test_values_come_back(directory: Directory, ocdbt: bool) -> None:
    """Those of a database straight from its files, where the directory has files."""
    put(ArrayStore.create(directory, ocdbt=ocdbt, zarr3=True), VALUES)
    assert holds_ocdbt(directory) == ocdbt
    store = ArrayStore(directory, ocdbt=ocdbt, zarr3=True)
    assert store.list_keys() == VALUES.keys()
    found = store.read_many([*VALUES, "absent"])
    assert [None if each is None else bytes(each) for each in found] == [*VALUES.values(), None]
    is_direct = ocdbt and directory.can(Capability.MAP)
    assert isinstance(store.direct, DirectReader) == is_direct
    assert (read_index(directory) is not None) == is_direct
    if is_direct or not ocdbt:
        assert store.sizes() == {key: len(value) for key, value in VALUES.items()}


@pytest.mark.parametrize("ocdbt", [True, False])
def test_arrays_come_back(directory: Directory, ocdbt: bool) -> None:
    """In the encodings of the table, written by TensorStore."""
    array = np.random.default_rng(0).standard_normal((300, 200), np.float32)
    store = ArrayStore.create(directory, ocdbt=ocdbt, zarr3=True)
    for encoding in codecs.CODECS:
        document = zarr.array_document(array.shape, array.shape, "float32", encoding, zarr3=True)
        transaction = store.begin()
        written = store.put_chunk(transaction, encoding, document, ((0, 300), (0, 200)), array)
        transaction.commit_async().result()
        written.result()
        store.start_writeback()
        read = ArrayStore(directory, ocdbt=ocdbt, zarr3=True)
        found = read.open_array(encoding, zarr.parse_document(document))
        assert np.array_equal(found.read().result(), array)


def test_the_databases_of_processes_become_one(directory: Directory) -> None:
    """What else lies beside them is left alone; without a database there is nothing to merge."""
    directory.write("ocdbt.process_9/no_database", b"")
    assert merge_process_databases(directory) == 0
    for index in range(3):
        part = {key: value for key, value in VALUES.items() if int(key[2:]) % 3 == index}
        below = directory / f"ocdbt.process_{index}"
        put(ArrayStore.create(below, ocdbt=True, zarr3=True), part)
    assert not holds_ocdbt(directory)
    assert merge_process_databases(directory) == 3
    assert holds_ocdbt(directory)
    store = ArrayStore(directory, ocdbt=True, zarr3=True)
    found = store.read_many(list(VALUES))
    assert [bytes(each or b"") for each in found] == list(VALUES.values())
    assert not [name for name in directory.walk()[0] if name.startswith("d/") and "lock" in name]


def test_a_directory_named_like_the_manifest_is_no_database(directory: Directory) -> None:
    """A leaf may have that name."""
    directory.write("manifest.ocdbt/zarr.json", b"{}")
    assert not holds_ocdbt(directory)


@pytest.mark.parametrize("place", ["/etc/", "../", "d/../../"])
def test_i14_an_index_names_no_file_outside_of_its_database(place: str, tmp_path: Path) -> None:
    """I14: what an index says of where a value lies is not believed."""
    base = {"driver": "file", "path": f"{tmp_path}/run/"}
    config = {"compression": None, "max_inline_value_bytes": 0}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    store["key"] = bytes(5000)
    (data,) = (tmp_path / "run" / "d").iterdir()
    for file in (data, tmp_path / "run" / "manifest.ocdbt"):
        name = f"d/{data.name}".encode()
        record = file.read_bytes().replace(name, place.encode().ljust(len(name), b"x"))
        start = record.find(bytes.fromhex("0cdb"))
        file.write_bytes(record[:start] + with_checksum(record[start:-4]))
    with pytest.raises(ValueError, match="outside"):
        DirectReader(LocalDirectory(str(tmp_path / "run"))).values(["key"])


def with_checksum(record: bytes) -> bytes:
    """Returns a record with the CRC-32C that it should have at its end."""
    crc = 0xFFFFFFFF
    for byte in record:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return record + (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


# Safetensors.


def tensors(directory: Directory, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Writes a safetensors file."""
    header, end = {}, 0
    for key, array in arrays.items():
        header[key] = {
            "dtype": "F32",
            "shape": array.shape,
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    head = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    directory.write(name, len(head).to_bytes(8, "little") + head + data)


def test_safetensors_are_read_in_ranges(directory: Directory) -> None:
    """A file by its own path, or the files of a directory, without a file of the local system."""
    arrays = {
        key: np.arange(i, i + 600, dtype=np.float32).reshape(20, 30) for i, key in enumerate("abc")
    }
    tensors(directory, "one.safetensors", {"a": arrays["a"], "b": arrays["b"]})
    tensors(directory, "two.safetensors", {"c": arrays["c"]})
    directory.write("other", b"")
    root = directory.path
    assert safetensors.find(directory) == [f"{root}/one.safetensors", f"{root}/two.safetensors"]
    assert safetensors.find(directory / "two.safetensors") == [f"{root}/two.safetensors"]
    assert safetensors.find(directory / "other") == safetensors.find(directory / "absent") == []
    assert safetensors.find_damage(directory) == []
    assert safetensors.read_headers(directory / "two.safetensors").tensors.keys() == {"c"}
    contents = safetensors.read_headers(directory)
    reader = safetensors.TensorReader(contents.directory, contents.tensors)
    store = ArrayStore(contents.directory, ocdbt=False, zarr3=True, direct=reader)
    keys = [zarr.chunk_key(name, (0, 0), zarr3=True) for name in arrays]
    assert [bytes(each or b"") for each in store.read_many(keys)] == [
        array.tobytes() for array in arrays.values()
    ]
    target = np.empty((5, 7), np.float32)
    layout = zarr.plain_document((20, 30), np.dtype(np.float32)).raw
    assert layout is not None
    for name, array in arrays.items():
        assert reader.read_region(name, layout, ((3, 8), (11, 18)), target)
        assert np.array_equal(target, array[3:8, 11:18])


def test_a_tensor_whose_file_is_gone_is_told(directory: Directory) -> None:
    """With the path of the file."""
    tensors(directory, "one.safetensors", {"a": np.zeros(4, np.float32)})
    contents = safetensors.read_headers(directory)
    directory.remove("one.safetensors")
    reader = safetensors.TensorReader(contents.directory, contents.tensors)
    with pytest.raises(FileNotFoundError, match=f"{directory.path}/one.safetensors"):
        reader.values([zarr.chunk_key("a", (0,), zarr3=True)])


def test_nothing_is_pinned_when_a_store_is_gone(directory: Directory) -> None:
    """Stores share a context of TensorStore, but for no cache and no pool of threads."""
    first, second = (ArrayStore.create(directory, ocdbt=True, zarr3=True) for _ in range(2))
    for name in ("cache_pool", "cache_pool#nodes", "data_copy_concurrency"):
        assert first._context[name] is not second._context[name]
    assert isinstance(first._context, ts.Context)
