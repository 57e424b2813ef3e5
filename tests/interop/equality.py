"""Strict comparison of trees: container types, leaf types, dtypes, shardings, and every bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np


def is_empty(node: Any) -> bool:
    """Says whether a node is None or an empty container, which trees keep without a leaf."""
    return node is None or (isinstance(node, (dict, list, tuple)) and not node)


def is_key(leaf: Any) -> bool:
    """Says whether a leaf, real or abstract, holds typed PRNG keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def assert_same(actual: Any, expected: Any) -> None:
    """Fails with every difference between two trees."""
    found = list(differences(actual, expected))
    assert not found, "\n".join(found)


def differences(actual: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Yields one line for each difference between two trees, values and containers alike."""
    entries, treedef = jtu.tree_flatten_with_path(expected, is_leaf=is_empty)
    found, found_treedef = jtu.tree_flatten_with_path(actual, is_leaf=is_empty)
    if treedef != found_treedef:
        yield f"{where}: structure {found_treedef}, expected {treedef}"
        return
    for (path, want), (_, have) in zip(entries, found, strict=True):
        yield from _leaf_differences(have, want, where + jtu.keystr(path))


def _leaf_differences(have: Any, want: Any, where: str) -> Iterator[str]:
    if is_empty(want):
        if type(have) is not type(want) or not is_empty(have):
            yield f"{where}: {have!r}, expected {want!r}"
    elif isinstance(want, jax.Array):
        yield from _jax_differences(have, want, where)
    elif isinstance(want, np.ndarray):
        if type(have) is not np.ndarray:
            yield f"{where}: {type(have)}, expected a NumPy array"
        else:
            yield from _host_differences(have, want, where)
    elif type(have) is not type(want):
        yield f"{where}: {have!r} of {type(have)}, expected {want!r} of {type(want)}"
    elif isinstance(want, (float, complex, np.generic)):
        yield from _host_differences(np.asarray(have), np.asarray(want), where)
    elif have != want:
        yield f"{where}: {have!r}, expected {want!r}"


def _jax_differences(have: Any, want: jax.Array, where: str) -> Iterator[str]:
    if not isinstance(have, jax.Array):
        yield f"{where}: {type(have)}, expected a jax array"
        return
    if have.dtype != want.dtype or have.shape != want.shape:
        yield f"{where}: {have.dtype}{have.shape}, expected {want.dtype}{want.shape}"
        return
    if not same_sharding(have.sharding, want.sharding, want.ndim):
        yield f"{where}: {have.sharding}, expected {want.sharding}"
    if is_key(want):
        have, want = jax.random.key_data(have), jax.random.key_data(want)
    yield from _host_differences(np.asarray(have), np.asarray(want), where)


def _host_differences(
    have: np.ndarray[Any, Any], want: np.ndarray[Any, Any], where: str
) -> Iterator[str]:
    if have.dtype != want.dtype or have.shape != want.shape:
        yield f"{where}: {have.dtype}{have.shape}, expected {want.dtype}{want.shape}"
    elif have.tobytes() != want.tobytes():
        yield f"{where}: values differ: {have!r}, expected {want!r}"


def same_sharding(
    have: jax.sharding.Sharding | None, want: jax.sharding.Sharding | None, ndim: int
) -> bool:
    """Says whether two shardings are of one class and put the same box on each device."""
    if have is None or want is None:
        return have is want
    return type(have) is type(want) and have.is_equivalent_to(want, ndim)


def as_stored(leaf: Any) -> Any:
    """Returns a leaf as the format keeps it: arrays native and C-ordered, subclasses plain."""
    if isinstance(leaf, np.ndarray):
        return np.array(np.asarray(leaf), leaf.dtype.newbyteorder("="), order="C")
    for kind in (bool, int, float, str):
        if isinstance(leaf, kind):
            return kind(leaf)
    return leaf


def as_plain(tree: Any) -> Any:
    """Returns a tree as a load without an abstract tree gives it: dicts and lists by key path."""
    root: Any = None
    for path, leaf in jtu.tree_flatten_with_path(tree, is_leaf=is_empty)[0]:
        # Empty named tuples, which have no keys to tell what they were, become None.
        is_lost = isinstance(leaf, tuple) and not leaf and type(leaf) is not tuple
        value = None if is_lost else {} if isinstance(leaf, dict) else as_stored(leaf)
        if not path:
            return value
        root = _insert(root, path, value)
    return root


def _insert(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    head, *rest = path
    if isinstance(head, (jtu.SequenceKey, jtu.FlattenedIndexKey)):
        index = head.idx if isinstance(head, jtu.SequenceKey) else head.key
        node = [] if node is None else node
        if index == len(node):
            node.append(None)
        node[index] = _insert(node[index], tuple(rest), value)
        return node
    name = head.name if isinstance(head, jtu.GetAttrKey) else str(head.key)
    node = {} if node is None else node
    node[name] = _insert(node.get(name), tuple(rest), value)
    return node


def as_typed(tree: Any) -> Any:
    """Returns a tree as a load with an abstract tree gives it: its own containers."""
    return jax.tree.map(as_stored, tree)


def abstract_of(tree: Any) -> Any:
    """Returns the abstract tree with explicit shardings; scalars and strings stand for themselves.

    The NumPy templates hold other values than the tree, so that a load can't just return them.
    """

    def abstract(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        if isinstance(leaf, np.ndarray):
            return np.zeros_like(as_stored(leaf))
        return type(as_stored(leaf))() if isinstance(leaf, (bool, int, float, str)) else leaf

    return jax.tree.map(abstract, tree)
