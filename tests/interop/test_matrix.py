"""The interop matrix: trees x with and without an abstract tree x both directions.

Each tree is saved by both libraries, and each of the two checkpoints is read by both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import library_trees
import numpy as np
import pytest
from equality import (
    abstract_of,
    as_plain,
    as_typed,
    assert_same,
    differences,
    is_empty,
    same_sharding,
)
from jax.sharding import Mesh
from orbax.checkpoint import v1
from trees import ONLY_OURS, TREES, on

import orbax_async as ocp

assert library_trees  # it registers its trees

LIBRARIES = {"ours": ocp, "orbax": v1}
HOLDS_BOOLS = ("python_bools",)  # Orbax has no metadata at all of trees with a bool (W15)


@pytest.mark.parametrize("name", TREES)
def test_both_directions(name: str, mesh8: Mesh, tmp_path: Path) -> None:
    """A tree saved by either library is loaded by both, bit for bit, and described alike."""
    state = TREES[name](mesh8)
    plain, typed, abstract = as_plain(state), as_typed(state), abstract_of(state)
    for writer, saving in LIBRARIES.items():
        path = tmp_path / writer
        saving.save(path, state)
        for loading in LIBRARIES.values():
            assert_same(loading.load(path), plain)
            assert_same(loading.load(path, abstract), typed)
    describing = [ocp] if name in HOLDS_BOOLS else LIBRARIES.values()
    described = [
        library.metadata(tmp_path / writer).metadata
        for writer in LIBRARIES
        for library in describing
    ]
    first, *others = described
    for other in others:
        assert_described_alike(other, first)
    assert_describes(first, plain)
    assert_same(ocp.load(tmp_path / "orbax", ocp.metadata(tmp_path / "ours")), plain)


def assert_described_alike(actual: Any, expected: Any) -> None:
    """Fails unless two metadata trees say the same; their classes may be of either library."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(expected, is_leaf=is_empty)
    others, other_treedef = jax.tree_util.tree_flatten_with_path(actual, is_leaf=is_empty)
    assert other_treedef == treedef
    for (path, want), (_, have) in zip(leaves, others, strict=True):
        where = jax.tree_util.keystr(path)
        assert type(have).__name__ == type(want).__name__, where
        if not hasattr(want, "storage_metadata"):
            assert have == want, where
            continue
        assert (have.shape, have.dtype) == (want.shape, want.dtype), where
        for side in ("write_shape", "chunk_shape"):
            shape = getattr(want.storage_metadata, side)
            assert getattr(have.storage_metadata, side) == shape, where
        if hasattr(want, "sharding_metadata"):
            assert same_sharding(have.sharding, want.sharding, len(want.shape)), where


def assert_describes(described: Any, plain: Any) -> None:
    """Fails unless a metadata tree has the shape, dtype and sharding of each leaf of a state."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(plain, is_leaf=is_empty)
    found, found_treedef = jax.tree_util.tree_flatten_with_path(described, is_leaf=is_empty)
    assert found_treedef == treedef
    for (path, leaf), (_, have) in zip(leaves, found, strict=True):
        where = jax.tree_util.keystr(path)
        if isinstance(leaf, jax.Array):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            assert (have.shape, have.dtype) == (leaf.shape, leaf.dtype), where
            assert same_sharding(have.sharding, leaf.sharding, leaf.ndim), where
        elif isinstance(leaf, np.ndarray):
            assert (have.shape, have.dtype) == (leaf.shape, leaf.dtype), where
        elif isinstance(leaf, str):
            assert have == "string", where
        else:
            assert type(have) is type(leaf), where
            assert is_empty(leaf) or have == type(leaf)(), where


def leaves_of(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a tree by key path."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path), leaf


@pytest.mark.leaves_temporaries  # Orbax's own, when it fails late
@pytest.mark.parametrize("name", ONLY_OURS)
def test_richer_than_orbax(name: str, mesh8: Mesh, tmp_path: Path) -> None:
    """What Orbax can't save is loaded by us exactly as it was, its types included."""
    state = ONLY_OURS[name](mesh8)
    with pytest.raises(ValueError, match=r".+"):
        v1.save(tmp_path / "orbax", state)
    ocp.save(tmp_path / "ours", state)
    assert_same(ocp.load(tmp_path / "ours"), state)
    assert_same(ocp.load(tmp_path / "ours", abstract_of(state)), state)
    described = dict(leaves_of(ocp.metadata(tmp_path / "ours").metadata))
    assert set(described) == set(dict(leaves_of(state)))


@pytest.mark.parametrize("name", ONLY_OURS)
def test_richer_than_orbax_read_by_orbax(name: str, mesh8: Mesh, tmp_path: Path) -> None:
    """What Orbax can't save it still loads, as the table in `handlers/kinds.py` says."""
    state = ONLY_OURS[name](mesh8)
    ocp.save(tmp_path / "ours", state)
    loaded = dict(leaves_of(v1.load(tmp_path / "ours")))
    for where, leaf in leaves_of(state):
        have = loaded.pop(where)
        want = np.asarray(bytearray(leaf), np.uint8) if isinstance(leaf, bytes) else leaf
        if isinstance(want, np.generic | complex):
            want = np.asarray(want)
        stored = want.dtype
        if stored.name in ("uint2", "uint4", "float8_e4m3"):
            stored = np.dtype(np.uint8)
        assert (have.shape, have.dtype) == (want.shape, stored), where
        assert isinstance(have, jax.Array) == isinstance(leaf, jax.Array), where
        assert np.asarray(have).tobytes() == np.asarray(want).tobytes(), where
    assert not loaded


def test_numpy_float64_scalar(tmp_path: Path) -> None:
    """np.float64, which Orbax takes for a float, comes back from ours as what it was."""
    state = {"x": np.float64(0.1)}
    for writer, library in LIBRARIES.items():
        library.save(tmp_path / writer, state)
        assert_same(v1.load(tmp_path / writer), {"x": 0.1})
    assert_same(ocp.load(tmp_path / "ours"), state)
    assert_same(ocp.load(tmp_path / "orbax"), {"x": 0.1})


def test_what_the_format_has_no_place_for(tmp_path: Path) -> None:
    """W37: memory kind and weak type come back from ours; Orbax reads the values all the same."""
    device = jax.devices()[0]
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    state = {"pinned": jax.device_put(np.arange(6.0), pinned), "weak": jnp.asarray(2.5)}
    assert state["weak"].weak_type
    ocp.save(tmp_path / "ours", state)
    loaded = ocp.load(tmp_path / "ours")
    assert loaded["pinned"].sharding == pinned
    assert loaded["weak"].weak_type
    assert loaded["weak"].dtype == jnp.float32
    for library in LIBRARIES.values():
        typed = library.load(tmp_path / "ours", abstract_of(state))
        assert_same(typed, state)
        assert typed["pinned"].sharding.memory_kind == "pinned_host"
    assert_same(v1.load(tmp_path / "ours")["weak"], state["weak"])


def test_there_are_enough_trees() -> None:
    """The matrix is as large as it claims to be."""
    assert len(TREES) >= 45


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"a": np.arange(3), "b": [1, 2.0]}, "structure"),
        ({"a": np.arange(3), "b": (1, 2)}, ""),
        ({"a": np.arange(3), "b": (1, True)}, "expected 2"),
        ({"a": np.arange(3, dtype=np.int32), "b": (1, 2)}, "int32"),
        ({"a": np.array([0, 1, 3]), "b": (1, 2)}, "values differ"),
        ({"a": jnp.arange(3), "b": (1, 2)}, "expected a NumPy array"),
        ({"a": np.arange(3)[::-1], "b": (1, 2)}, "values differ"),
    ],
)
def test_comparison_sees_differences(other: Any, difference: str) -> None:
    """The comparison that this matrix rests on finds what it should find."""
    found = list(differences(other, {"a": np.arange(3), "b": (1, 2)}))
    assert bool(found) == bool(difference)
    assert all(difference in line for line in found)


def test_comparison_sees_shardings(mesh8: Mesh) -> None:
    """Equal values on other devices, or cut in another way, count as different."""
    spec = jax.sharding.PartitionSpec
    array = on(mesh8, spec("x"), (8, 4))
    for sharding in (
        jax.sharding.NamedSharding(mesh8, spec("y")),
        jax.sharding.SingleDeviceSharding(jax.devices()[1]),
    ):
        assert list(differences(jax.device_put(array, sharding), array))
    assert not list(differences(jax.device_put(array, array.sharding), array))
