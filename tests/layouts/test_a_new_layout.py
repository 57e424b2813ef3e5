"""A layout of one's own: a module and a row of the table, and every verb reads it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import orbax_async as ocp
from orbax_async import errors
from orbax_async._layouts import reader
from orbax_async._layouts.layout import Layout, StoredTree, reading
from orbax_async._storage import zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.direct import Extent
from orbax_async._storage.directory import Directory, damage_in
from orbax_async._storage.safetensors import Tensor, TensorReader
from orbax_async.tree import schema
from orbax_async.tree.keypath import Key

# What would be the layout's own module.


class NpyLayout(Layout):
    """A directory of `.npy` files, of which each is an array."""

    what = "npy files"

    @property
    def is_there(self) -> bool:
        return any(entry.name.endswith(".npy") for entry in self.directory.entries())

    def open_tree(self, *, is_for_jax: bool = False) -> StoredTree:
        return NpyTree(self.directory, schema.JAX_ARRAY if is_for_jax else schema.NUMPY_ARRAY)


class NpyTree(StoredTree):
    """The arrays of some files, by the names of the files."""

    lies_plainly = True

    def __init__(self, directory: Directory, kind: str) -> None:
        with reading(directory.path):
            found = [name for name, _ in directory.entries() if name.endswith(".npy")]
            self._arrays = {name[:-4]: array_in(directory, name) for name in found}
        # With a dtype of its own, an array is read as it lies, and cast then.
        entries = [
            schema.Entry(
                (Key(name, False),), kind, name, private={"logical_dtype": each.dtype.name}
            )
            for name, each in self._arrays.items()
        ]
        super().__init__(directory, entries)

    def open_store(self) -> ArrayStore:
        reader = TensorReader(self.directory, self._arrays)
        return ArrayStore(self.directory, ocdbt=False, zarr3=True, direct=reader)

    def documents(
        self, store: ArrayStore, entries: Sequence[schema.Entry]
    ) -> dict[str, zarr.ArrayDocument]:
        found = [self._arrays[entry.name] for entry in entries]
        return {each.name: zarr.plain_document(each.shape, each.dtype) for each in found}


def array_in(directory: Directory, file: str) -> Tensor:
    """Reads a file's header."""
    start = io.BytesIO(directory.read(file, 0, 1000) or b"")
    with damage_in((directory / file).path):
        np.lib.format.read_magic(start)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(start)
        if is_fortran:
            raise ValueError("its elements are not in C order")
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return Tensor(file[:-4], dtype, shape, Extent(file, start.tell(), nbytes))


# What it does for its users.

ARRAYS = {"w": np.arange(60_000, dtype=np.float32).reshape(300, 200), "step": np.array(7)}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Such a directory, when the layout has its row."""
    monkeypatch.setattr(reader, "TABLE", {**reader.TABLE, "npy": NpyLayout})
    (tmp_path / "model").mkdir()
    for name, array in ARRAYS.items():
        np.save(tmp_path / "model" / f"{name}.npy", array)
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def auto() -> Any:
    """Lets each verb find out what lies at a path."""
    with ocp.Context(checkpoint_layout="auto") as context:
        yield context


def test_it_is_loaded(model: Path, mesh8: Mesh) -> None:
    """As it is, in part, as jax arrays over devices, and cast."""
    loaded = ocp.load(model)
    assert loaded.keys() == ARRAYS.keys()
    assert all(np.array_equal(loaded[name], ARRAYS[name]) for name in ARRAYS)
    assert ocp.load(model, select="step")["step"] == 7
    sharding = NamedSharding(mesh8, P("x", "y"))
    abstract = {"w": jax.ShapeDtypeStruct((300, 200), np.float16, sharding=sharding), "step": ...}
    sharded = ocp.load(model, abstract)["w"]
    assert (sharded.sharding, sharded.dtype) == (sharding, np.float16)
    assert np.array_equal(sharded, ARRAYS["w"].astype(np.float16))
    assert isinstance(ocp.load(model, sharding=sharding, select="w")["w"], jax.Array)


def test_it_is_described(model: Path) -> None:
    """With shapes, dtypes and sizes; what is described is loaded again."""
    described = ocp.metadata(model)
    assert described.metadata["w"].shape == (300, 200)
    assert described.metadata["w"].storage_metadata.nbytes == ARRAYS["w"].nbytes
    assert described.nbytes == sum(file.stat().st_size for file in model.iterdir())
    assert np.array_equal(ocp.load(model, described)["w"], ARRAYS["w"])


def test_it_is_verified(model: Path) -> None:
    """Every byte is read; a file that is cut short, or has no header, is named."""
    report = ocp.verify(model)
    assert (report.is_intact, report.leaves) == (True, 2)
    assert report.nbytes == sum(array.nbytes for array in ARRAYS.values())
    whole = (model / "w.npy").read_bytes()
    (model / "w.npy").write_bytes(whole[:-1])
    assert [each.keypath for each in ocp.verify(model).damage] == ["['w']"]
    (model / "w.npy").write_bytes(b"nothing")
    (found,) = ocp.verify(model).damage
    assert found.path == str(model / "w.npy")


def test_the_others_are_what_they_were(model: Path, tmp_path: Path) -> None:
    """Orbax checkpoints come first, mismatches are told as ever, and so is what is none."""
    ocp.save(tmp_path / "c", {"a": 1})
    np.save(tmp_path / "c" / "w.npy", ARRAYS["w"])
    assert ocp.load(tmp_path / "c") == {"a": 1}
    with pytest.raises(errors.TreeMismatchError, match=r"\['v'\]"):
        ocp.load(model, {"w": np.ndarray, "v": np.ndarray})
    with pytest.raises(errors.UnsupportedOptionError, match="npy files, which hold no check"):
        ocp.load_checkpointables(model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.InvalidLayoutError, match="no npy files; and as an Orbax"):
        ocp.load(tmp_path / "empty")
    with ocp.Context(), pytest.raises(errors.InvalidLayoutError, match="layout = 'npy'"):
        ocp.load(model)
