"""zarr's documents are checked before they are believed; a codec is one entry of a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from memory_directory import MemoryStore

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage import codecs, zarr
from orbax_async._storage.array_store import ArrayStore

DOCUMENTS = {
    zarr3: zarr.array_document((4, 6), (2, 6), "float32", "raw", zarr3=zarr3)
    for zarr3 in (True, False)
}


def changed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Returns a document in which something is different."""
    document = json.loads(data)
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("encoding", codecs.CODECS)
def test_what_we_write_is_a_document(encoding: codecs.Encoding, zarr3: bool) -> None:
    """With a checksum, of every encoding in either version."""
    document = zarr.parse_document(
        zarr.array_document((4, 6), (2, 6), "bfloat16", encoding, zarr3=zarr3)
    )
    assert document.shape == (4, 6)
    assert document.chunk_shape == (2, 6)
    assert document.dtype == jnp.bfloat16
    assert document.has_checksum


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(shape=[4, -6]),
        lambda document: document.update(shape=[4, 6.0]),
        lambda document: document.update(shape=[4]),
        lambda document: document.update(shape=4),
        lambda document: document.update(shape=[1 << 30, 1 << 30]),
        lambda document: document.update(chunks=[0, 6], chunk_grid={}),
        lambda document: document.update(chunks=None, chunk_grid=None),
        lambda document: document.update(dtype=["f4"], data_type={"name": "float32"}),
        lambda document: document.update(compressor=7, codecs=7),
        lambda document: document.update(compressor="gzip", codecs=["gzip", "gzip"]),
        lambda document: document.update(zarr_format="3"),
        lambda document: document.clear(),
    ],
)
def test_i14_a_damaged_document_is_a_value_error(zarr3: bool, change: Any) -> None:
    """I14: and raises nothing else when it is asked for something."""
    with pytest.raises(ValueError, match="it"):
        zarr.parse_document(changed(DOCUMENTS[zarr3], change))


NO_NUMBERS = ["O", "object", "S8", "U4", "V8", "M8[ns]", "m8[s]", "i4,O", "str", "finfo", "g"]


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("name", NO_NUMBERS)
def test_f2_i14_only_types_of_numbers_are_read(name: str, zarr3: bool) -> None:
    """F2, I14: bytes of a file never become pointers."""
    change = changed(DOCUMENTS[zarr3], lambda each: each.update(dtype=name, data_type=name))
    with pytest.raises(ValueError, match="type"):
        zarr.parse_document(change)


@pytest.mark.parametrize("dtype", ["O", "|O", "object"])
@pytest.mark.parametrize("layout", ["zarr3", "zarr2"])
def test_f2_a_stored_dtype_that_is_none_is_damage_of_its_leaf(
    dtype: str, layout: str, tmp_path: Path
) -> None:
    """F2: loading and verifying name the leaf, and the process lives on."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = is_zarr3 = layout == "zarr3"
    with context:
        ocp.save(tmp_path / "checkpoint", {"w": np.arange(5)})
    path = tmp_path / "checkpoint" / "state" / zarr.document_key("w", zarr3=is_zarr3)
    key = "data_type" if is_zarr3 else "dtype"
    path.write_bytes(changed(path.read_bytes(), lambda each: each.update({key: dtype})))
    with pytest.raises(errors.CorruptDataError, match=r"\['w'\].*type"):
        ocp.load(tmp_path / "checkpoint")
    assert not ocp.verify(tmp_path / "checkpoint").is_intact


@pytest.mark.parametrize("dtype", ["O", "V8", "nonsense"])
def test_f2_a_recorded_dtype_that_is_none_is_damage_too(dtype: str, tmp_path: Path) -> None:
    """F2: what we record of a leaf beside the array is believed no more than that."""
    ocp.save(tmp_path / "checkpoint", {"w": np.arange(5, dtype=jnp.uint4)})
    path = tmp_path / "checkpoint" / "state" / "_METADATA"
    assert b'"logical_dtype": "uint4"' in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b'"uint4"', json.dumps(dtype).encode()))
    with pytest.raises((errors.CheckpointError, TypeError)):
        ocp.load(tmp_path / "checkpoint")


def test_a_new_codec_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorStore encodes and decodes what the table names; its checksum finds a flipped bit.

    The other place that a codec is named in is the choice between them, when a batch is written.
    """
    blosc = {"cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "typesize": 4, "blocksize": 0}
    entry = codecs.Codec(
        ({"name": "blosc", "configuration": blosc}, {"name": "crc32c"}), {"id": "blosc"}
    )
    monkeypatch.setitem(codecs.CODECS, "blosc", entry)
    array = np.arange(1 << 16, dtype=np.float32).reshape(256, 256)
    name: Any = "blosc"
    data = zarr.array_document(array.shape, array.shape, "float32", name, zarr3=True)
    document = zarr.parse_document(data)
    assert document.has_checksum
    assert document.raw is document.whole is None
    directory = MemoryStore().open("/run")
    store = ArrayStore.create(directory, ocdbt=False, zarr3=True)
    transaction = store.begin()
    written = store.put_chunk(transaction, "w", data, ((0, 256), (0, 256)), array)
    transaction.commit_async().result()
    written.result()
    key = zarr.chunk_key("w", (0, 0), zarr3=True)
    (nbytes,) = store.sizes().values()
    assert nbytes < array.nbytes / 2
    read = ArrayStore(directory, ocdbt=False, zarr3=True)
    assert np.array_equal(read.open_array("w", document).read().result(), array)
    encoded = bytearray(directory.read(key) or b"")
    encoded[len(encoded) // 2] ^= 1
    directory.write(key, bytes(encoded))
    with pytest.raises(ValueError, match="Error reading"):
        read.open_array("w", document).read().result()
