"""Orbax's guide to pytrees, on abstract leaves, casts, layouts and options: both libraries.

Where the guide and the released package differ, the released package is right:

- an abstract None gives None, and loads nothing; the guide loads the leaf with it;
- an abstract leaf without a sharding takes the saved one; the guide gets a NumPy array with it;
- `create_array_storage_options_fn` of `PyTreeOptions.Saving` has become
  `array.saving.scoped_storage_options_creator`; whoever goes on using it gets a TypeError;
- handlers of leaves (`LeafHandler`, `leaf_handler_registry`) have gone from the public names.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk import document
from equality import assert_same
from guide import EITHER, LIBRARIES, described, laid_out, put, refused
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import orbax_async as ocp


def pair() -> dict[str, Any]:
    """Returns two arrays, one piece of each on each of eight devices."""
    tree = {"up": np.arange(24, dtype=np.int32), "ones": np.ones(16, np.int32)}
    return put(tree, P("x"))


@pytest.fixture
def saved(library: ModuleType, tmp_path: Path) -> Path:
    """The pair, saved by the library of the test."""
    library.save(tmp_path / "pair", pair())
    return tmp_path / "pair"


# What to load.


@EITHER
@pytest.mark.parametrize("by", ["nothing", "values", "abstract", "types", "metadata", "whole"])
def test_ways_to_ask(library: ModuleType, by: str, saved: Path) -> None:
    """However a tree is asked for, it comes back with its dtypes and shardings."""
    wanted = {
        "nothing": lambda: None,
        "values": lambda: jax.tree.map(jnp.zeros_like, pair()),
        "abstract": lambda: jax.tree.map(described, pair()),
        "types": lambda: dict.fromkeys(pair(), jax.ShapeDtypeStruct),
        "metadata": lambda: library.metadata(saved).metadata,
        "whole": lambda: library.metadata(saved),
    }[by]()
    assert_same(library.load(saved, wanted), pair())


@EITHER
def test_none_asks_for_nothing(library: ModuleType, saved: Path) -> None:
    """A leaf that is None stays None: the released package, against its guide."""
    loaded = library.load(saved, {"up": None, "ones": described(pair()["ones"])})
    assert_same(loaded, {"up": None, "ones": pair()["ones"]})


@EITHER
def test_casting(library: ModuleType, saved: Path) -> None:
    """The abstract dtype is the dtype of what is loaded."""
    wanted = jax.tree.map(lambda leaf: described(leaf, dtype=np.int16), pair())
    expected = jax.tree.map(lambda leaf: leaf.astype(np.int16), pair())
    assert_same(library.load(saved, wanted), expected)


@EITHER
@pytest.mark.parametrize("known", ["the tree", "its metadata"])
def test_another_layout(library: ModuleType, known: str, saved: Path) -> None:
    """Arrays are laid out as asked, here over a half of the devices, whatever wrote them."""
    half = NamedSharding(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b")), P("b"))
    forms = pair() if known == "the tree" else library.metadata(saved).metadata
    wanted = jax.tree.map(lambda leaf: described(leaf, sharding=half), forms)
    assert_same(library.load(saved, wanted), jax.device_put(pair(), half))


@EITHER
def test_other_types_of_leaves(library: ModuleType, tmp_path: Path) -> None:
    """The abstract leaf decides what a leaf comes back as: an array in memory, a float, an int."""
    tree = {"a": np.asarray(12), "b": 13.75, "c": put(np.arange(8.0), P("x")), "d": "name", "e": 4}
    library.save(tmp_path / "c", tree)
    wanted = {"a": np.zeros((), np.float32), "b": int, "c": np.empty(8), "d": str, "e": float}
    expected = {"a": np.float32(12), "b": 13, "c": np.arange(8.0), "d": "name", "e": 4.0}
    loaded = library.load(tmp_path / "c", wanted)
    assert loaded["a"].dtype == np.float32
    assert_same(loaded | {"a": float(loaded["a"])}, expected | {"a": 12.0})
    assert_same(library.load(tmp_path / "c", {**wanted, "b": 0, "d": "", "e": 0.0})["b"], 13)


@EITHER
def test_a_scalar_out_of_an_array(library: ModuleType, tmp_path: Path) -> None:
    """An array of no dimensions is a number, too, for whoever asks for one."""
    library.save(tmp_path / "c", {"a": np.asarray(12), "b": jnp.asarray(2.5)})
    assert_same(library.load(tmp_path / "c", {"a": float, "b": int}), {"a": 12.0, "b": 2})


@EITHER
def test_standard_leaves(library: ModuleType, tmp_path: Path) -> None:
    """Every type of leaf in the guide's table but `bytes`, which only ours can save."""
    tree = {"j": put(np.ones(8), P("x")), "n": np.arange(3), "i": -3, "f": 0.5, "s": "text"}
    library.save(tmp_path / "c", tree)
    assert_same(library.load(tmp_path / "c"), tree)
    abstract = {
        "j": described(tree["j"]),
        "n": np.ndarray,
        "i": int,
        "f": float,
        "s": str,
    }
    assert_same(library.load(tmp_path / "c", abstract), tree)


def test_bytes_are_leaves_here(tmp_path: Path) -> None:
    """The guide's table has `bytes`, the released package refuses them (W30), ours saves them."""
    ocp.save(tmp_path / "c", {"blob": b"\x00\xff raw"})
    assert ocp.load(tmp_path / "c") == {"blob": b"\x00\xff raw"}
    assert ocp.load(tmp_path / "c", {"blob": bytes}) == {"blob": b"\x00\xff raw"}


@EITHER
def test_leaves_to_leave_out(library: ModuleType, tmp_path: Path) -> None:
    """A placeholder stands for what is not loaded, and stays in its place."""
    layer = {"kernel": np.arange(6.0), "bias": np.zeros(2)}
    tree = {"params": {"first": layer, "second": layer}, "moments": [np.ones(3)] * 2, "step": 8}
    library.save(tmp_path / "c", tree)
    skipped = dict.fromkeys(layer, library.PLACEHOLDER)
    wanted = {
        "params": {"first": skipped, "second": jax.tree.map(np.zeros_like, layer)},
        "moments": [..., ...],
        "step": 0,
    }
    expected = {
        "params": {"first": dict.fromkeys(layer, ...), "second": layer},
        "moments": [..., ...],
        "step": 8,
    }
    assert library.PLACEHOLDER is ...
    assert_same(library.load(tmp_path / "c", wanted), expected)


# How to save.


def with_array_saving(library: ModuleType, spelling: str, **options: Any) -> Any:
    """Returns a context with options of saving arrays, set by either spelling."""
    if spelling == "keywords":
        saving = library.options.ArrayOptions.Saving(**options)
        return library.Context(array_options=library.options.ArrayOptions(saving=saving))
    context = library.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    return context


SPELLINGS = pytest.mark.parametrize("spelling", ["attributes", "keywords"])


@EITHER
@SPELLINGS
@pytest.mark.parametrize("which", ["one", "all"])
def test_dtype_on_disk(library: ModuleType, spelling: str, which: str, tmp_path: Path) -> None:
    """The dtype of one leaf, or of all, is chosen while saving, by a function of the key path."""
    storage = library.options.ArrayOptions.Saving.StorageOptions

    def narrow(keypath: Any, _: Any) -> Any:
        chosen = which == "all" or keypath[-1].key == "up"
        return storage(dtype=np.dtype(np.int16)) if chosen else storage()

    with with_array_saving(library, spelling, scoped_storage_options_creator=narrow):
        library.save(tmp_path / "c", pair())
    expected = {"up": np.int16, "ones": np.int16 if which == "all" else np.int32}
    for reader in LIBRARIES.values():
        loaded = reader.load(tmp_path / "c")
        assert {name: leaf.dtype for name, leaf in loaded.items()} == expected
        assert_same(jax.tree.map(lambda leaf: leaf.astype(np.int32), loaded), pair())


@EITHER
def test_where_the_function_used_to_be(library: ModuleType) -> None:
    """The options of older guides that have gone are refused, not ignored, by both libraries."""
    with pytest.raises(TypeError, match="create_array_storage_options_fn"):
        library.options.PyTreeOptions.Saving(create_array_storage_options_fn=lambda *_: None)
    with pytest.raises(TypeError, match="leaf_handler_registry"):
        library.options.PyTreeOptions(leaf_handler_registry=None)
    assert not hasattr(library, "LeafHandler")


@EITHER
@SPELLINGS
@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_one_database_or_many_files(
    library: ModuleType, spelling: str, use_ocdbt: bool, tmp_path: Path
) -> None:
    """A manifest shows that leaves share a database; without, each has a directory."""
    with with_array_saving(library, spelling, use_ocdbt=use_ocdbt):
        library.save(tmp_path / "c", pair())
    names = {path.name for path in (tmp_path / "c" / "state").iterdir()}
    assert ("manifest.ocdbt" in names) is use_ocdbt
    assert names.isdisjoint(pair()) is use_ocdbt
    for reader in LIBRARIES.values():
        assert_same(reader.load(tmp_path / "c"), pair())


@EITHER
def test_chunks_on_disk(library: ModuleType, tmp_path: Path) -> None:
    """Chunks are as small as they are asked to be, on disk and in the metadata."""
    context = library.Context()
    context.array.saving.storage_options.chunk_byte_size = 8
    with context:
        library.save(tmp_path / "c", {"up": put(np.arange(32, dtype=np.int32), P("x"))})
    storage = library.metadata(tmp_path / "c").metadata["up"].storage_metadata
    assert (storage.chunk_shape, storage.write_shape) == ((2,), (4,))
    written = document(tmp_path / "c" / "state", "up")
    assert written["chunk_grid"]["configuration"]["chunk_shape"] == [2]


# Shapes.


@EITHER
@SPELLINGS
def test_padding_and_cutting(library: ModuleType, spelling: str, saved: Path) -> None:
    """Another shape is an error that names both, unless arrays may be padded and cut."""
    shapes = {"up": (8,), "ones": (32,)}
    wanted = {name: described(leaf, shape=shapes[name]) for name, leaf in pair().items()}
    with refused(library, ocp.errors.ShapeMismatchError, ValueError):
        library.load(saved, wanted)
    if spelling == "keywords":
        loading = library.options.ArrayOptions.Loading(enable_padding_and_truncation=True)
        context = library.Context(array_options=library.options.ArrayOptions(loading=loading))
    else:
        context = library.Context()
        context.array.loading.enable_padding_and_truncation = True
    with context:
        loaded = library.load(saved, wanted)
    padded = np.concatenate([np.ones(16, np.int32), np.zeros(16, np.int32)])
    assert_same(loaded, put({"up": np.arange(8, dtype=np.int32), "ones": padded}, P("x")))


# Metadata.


@EITHER
def test_metadata_tells_all_but_the_values(library: ModuleType, tmp_path: Path) -> None:
    """Shapes, dtypes, layouts, scalars' types and the structure: enough to ask for the tree."""
    tree = {"w": put(np.zeros((8, 3), np.float32), P("x")), "h": np.zeros((2,), np.int8)}
    tree |= {"steps": [1, 2.5], "name": "run", "nothing": None}
    library.save(tmp_path / "c", tree, custom_metadata={"note": "first"})
    found = library.metadata(tmp_path / "c")
    assert found.path == tmp_path / "c"
    assert found.custom_metadata == {"note": "first"}
    form = found.metadata
    assert form.keys() == tree.keys()
    assert (form["w"].shape, form["w"].dtype) == ((8, 3), np.float32)
    assert form["w"].sharding == laid_out(P("x"))
    assert (form["h"].shape, form["h"].dtype) == ((2,), np.int8)
    assert not hasattr(form["h"], "sharding")
    assert [type(each) for each in form["steps"]] == [int, float]
    assert type(form["name"]) is str
    assert form["nothing"] is None
    assert library.arrays.to_shape_dtype_struct(form["w"]) == described(tree["w"])
    if library is ocp:  # Orbax's function asks every description for a sharding, and fails
        assert ocp.arrays.to_shape_dtype_struct(form["h"]) == jax.ShapeDtypeStruct((2,), np.int8)
    assert_same(library.load(tmp_path / "c", form), tree)
