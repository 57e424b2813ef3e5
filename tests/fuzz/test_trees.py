"""Random trees: what is saved comes back, with and without an abstract tree."""

from __future__ import annotations

import collections
import dataclasses
import operator
import shutil
import string
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

import orbax_async as ocp
from orbax_async import errors


class Pair(NamedTuple):
    """A named tuple with a field that may be empty."""

    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    """A dataclass that jax takes apart by attribute."""

    first: Any
    second: Any


NARROW = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.uint4]
NATIVE = ["?", *"bhilBHILefdFD", ">i4", ">f8"]
DTYPES = st.sampled_from([np.dtype(each) for each in NATIVE + NARROW])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@st.composite
def host_arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Draws an array of any dtype, shape and memory order."""
    dtype, shape = draw(DTYPES), draw(SHAPES)
    values = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 8, shape)
    array = values.astype(dtype)
    how = draw(st.sampled_from(["plain", "fortran", "reversed", "strided"]))
    if how == "fortran":
        return np.asfortranarray(array)
    if how == "reversed" and array.ndim:
        return array[::-1]
    if how == "strided" and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]
    return array


@st.composite
def device_arrays(draw: st.DrawFn) -> jax.Array:
    """Draws a jax array: single, sharded over eight devices in some way, or typed keys."""
    kind = draw(st.sampled_from(["single", "sharded", "key"]))
    if kind == "key":
        keys = jax.random.key(draw(st.integers(0, 99)))
        return jax.random.split(keys, draw(st.integers(1, 3))) if draw(st.booleans()) else keys
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_]))
    if kind == "single":
        values = np.arange(np.prod(shape := draw(SHAPES))).reshape(shape) % 8
        return jax.device_put(jnp.asarray(values, dtype), jax.devices()[draw(st.integers(0, 7))])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    spec = draw(
        st.sampled_from([(), ("x",), ("y",), (None, "x"), ("x", "y"), (("x", "y"),), ("y", "x")])
    )
    values = np.arange(8 * 16).reshape(8, 16) % 8
    return jax.device_put(jnp.asarray(values, dtype), NamedSharding(mesh, PartitionSpec(*spec)))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
SCALARS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.complex_numbers(allow_nan=False),
    TEXT,
    st.binary(max_size=8),
    st.just(None),
    hnp.from_dtype(np.dtype("f4"), allow_nan=False),
    hnp.from_dtype(np.dtype("i8")),
)
LEAVES = st.one_of(SCALARS, host_arrays(), device_arrays())
# Keys with whatever the format or a path could take for its own; `~` is refused for texts.
KEYS = st.text(string.ascii_letters + "01 ./'\"()[],\\:\u00fc\U0001f600-_", max_size=6)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner, inner),
        st.just(()),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


def as_saved(tree: Any) -> Any:
    """Returns what a tree is loaded as without an abstract tree: plain dicts and lists."""
    match tree:
        case Pair():
            return {"left": as_saved(tree.left), "right": as_saved(tree.right)}
        case Record():
            return {"first": as_saved(tree.first), "second": as_saved(tree.second)}
        case dict():
            return {key: as_saved(value) for key, value in tree.items()}
        case list():
            return [as_saved(value) for value in tree]
        case tuple():
            return [as_saved(value) for value in tree] if tree else ()
        case np.ndarray():
            return tree.astype(tree.dtype.newbyteorder("="))
    return tree


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compares two trees: containers, types, dtypes, shardings and values."""
    assert type(found) is type(expected), where
    match expected:
        case dict():
            assert list(found) == (
                list(expected) if isinstance(expected, collections.OrderedDict) else list(found)
            )
            assert found.keys() == expected.keys(), where
            for key in expected:
                assert_same(found[key], expected[key], f"{where}[{key!r}]")
        case Record():
            assert_same(vars(found), vars(expected), where)
        case list() | tuple():
            assert len(found) == len(expected), where
            for index, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert_same(one, other, f"{where}[{index}]")
        case jax.Array() | np.ndarray() | np.generic():
            assert found.shape == expected.shape, where
            assert found.dtype == expected.dtype, where
            if isinstance(expected, jax.Array):
                assert found.sharding.is_equivalent_to(expected.sharding, expected.ndim), where
                if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
                    found, expected = jax.random.key_data(found), jax.random.key_data(expected)
            assert np.array_equal(np.asarray(found), np.asarray(expected)), where
        case _:
            assert found == expected, where


def save(path: Path, tree: Any, **options: Any) -> None:
    """Saves a tree, under options by their dot path; leaves out trees that can't be saved."""
    shutil.rmtree(path, ignore_errors=True)
    context = ocp.Context()
    for name, value in options.items():
        group, _, option = name.rpartition("__")
        setattr(operator.attrgetter(group.replace("__", "."))(context), option, value)
    try:
        with context:
            ocp.save(path, tree)
    except errors.DuplicateLeafError:
        assume(False)  # two names that the format can't tell apart
    except errors.UnsupportedLeafError as error:
        # The only reasons: nothing at all at the root, and names that are no file paths.
        assert (isinstance(tree, (type(None), dict, list, tuple)) and not tree) or (
            "use_ocdbt" in str(error) and not context.array.saving.use_ocdbt
        ), error
        assume(False)


OPTIONS = st.fixed_dictionaries(
    {
        "array__saving__use_ocdbt": st.booleans(),
        "array__saving__use_zarr3": st.booleans(),
        "array__saving__use_compression": st.booleans(),
    }
)


@given(tree=TREES)
def test_a_tree_comes_back_in_plain_containers(tree: Any, tmp_path: Path) -> None:
    """Without an abstract tree every leaf comes back as it was, in dicts and lists."""
    save(tmp_path / "checkpoint", tree)
    assert_same(ocp.load(tmp_path / "checkpoint"), as_saved(tree))


@given(tree=TREES)
def test_a_tree_comes_back_in_its_own_containers(tree: Any, tmp_path: Path) -> None:
    """With the tree itself as the abstract tree the containers come back, too."""
    save(tmp_path / "checkpoint", tree)
    assert_same(ocp.load(tmp_path / "checkpoint", tree), tree)


@given(tree=TREES)
def test_metadata_is_an_abstract_tree_of_any_tree(tree: Any, tmp_path: Path) -> None:
    """What `metadata` tells of a checkpoint has its shape, and loads it."""
    save(tmp_path / "checkpoint", tree)
    found = ocp.metadata(tmp_path / "checkpoint")
    loaded = ocp.load(tmp_path / "checkpoint", found)
    plain = ocp.load(tmp_path / "checkpoint")
    assert jax.tree.structure(loaded) == jax.tree.structure(plain)


@given(tree=TREES, options=OPTIONS)
def test_a_tree_comes_back_from_every_format(
    tree: Any, options: dict[str, bool], tmp_path: Path
) -> None:
    """The same, in any combination of formats."""
    save(tmp_path / "checkpoint", tree, **options)
    assert_same(ocp.load(tmp_path / "checkpoint"), as_saved(tree))


@given(tree=TREES, budget=st.integers(1, 5000))
def test_a_tree_comes_back_under_any_budget(tree: Any, budget: int, tmp_path: Path) -> None:
    """However little may be in flight at once, everything is saved and loaded."""
    save(
        tmp_path / "checkpoint",
        tree,
        memory__write_concurrent_bytes=budget,
        memory__transfer_concurrent_bytes=budget,
    )
    context = ocp.Context()
    context.memory.read_concurrent_bytes = budget
    with context:
        assert_same(ocp.load(tmp_path / "checkpoint", tree), tree)
