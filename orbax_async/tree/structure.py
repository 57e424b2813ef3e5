"""Flattening trees, rebuilding them, and matching an abstract tree to a stored one."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

import jax
import jax.tree_util as jtu
import numpy as np

from orbax_async import errors
from orbax_async.arrays import AbstractArray, AbstractShardedArray
from orbax_async.tree import keypath
from orbax_async.tree.keypath import KeyPath

__all__ = [
    "LEFT_OUT",
    "AbstractLeaf",
    "FlatTree",
    "JsonType",
    "Leaf",
    "PyTree",
    "PyTreeKey",
    "PyTreeKeyPath",
    "PyTreeOf",
    "empty_kind",
    "flatten",
    "flatten_with_path",
    "match",
    "nest",
]


def is_named_tuple(value: Any) -> bool:
    """Says whether a value is an instance of a named tuple class."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


@functools.lru_cache(maxsize=256)
def _are_leaves(kind: type) -> bool:
    """Says whether the values of a type are neither None nor containers."""
    return issubclass(
        kind, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, str, int, float)
    )


def is_empty(value: Any) -> bool:
    """Says whether a value is None or an empty container."""
    if value is None:
        return True
    kind: Any = type(value)
    if _are_leaves(kind):  # most values by far: no need for the slower question
        return False
    return isinstance(value, (tuple, list, Mapping)) and not value


def empty_kind(value: Any) -> str | None:
    """Returns how an empty node (None, an empty container) is recorded, None for anything else."""
    if not is_empty(value):
        return None
    if value is None or is_named_tuple(value):
        return "None"  # without rich types the format has no empty named tuple
    return "Tuple" if isinstance(value, tuple) else "List" if isinstance(value, list) else "Dict"


class FlatTree(NamedTuple):
    """A tree taken apart: key paths, leaves and empty nodes in their order, and its definition."""

    keys: Sequence[KeyPath]
    leaves: Sequence[Any]
    treedef: jtu.PyTreeDef

    @property
    def entries(self) -> Iterator[tuple[KeyPath, Any]]:
        """The leaves and empty nodes, each with its key path."""
        return zip(self.keys, self.leaves, strict=True)

    def rebuild(self, values: Sequence[Any]) -> Any:
        """Returns a tree of the same containers around other values."""
        return jtu.tree_unflatten(self.treedef, values)


def flatten_with_path(
    tree: Any,
) -> tuple[list[tuple[keypath.JaxKeyPath, Any]], jtu.PyTreeDef]:
    """Takes a tree apart as `flatten` does, and keeps the key paths of jax."""
    return jtu.tree_flatten_with_path(tree, is_leaf=is_empty)


def flatten(tree: Any) -> FlatTree:
    """Takes a tree apart, keeping None and empty containers as leaves."""
    leaves, treedef = jtu.tree_flatten(tree, is_leaf=is_empty)
    try:
        keys = _known_keys.get(treedef)
    except Exception:  # whatever comparing what the user's nodes hold may raise
        keys = None
    if keys is None:
        paths, _ = flatten_with_path(tree)
        keys = tuple([keypath.keys_of(path) for path, _ in paths])
        with contextlib.suppress(Exception), _lock:
            _known_keys[treedef] = keys
            while len(_known_keys) > _KEPT:
                del _known_keys[next(iter(_known_keys))]
    return FlatTree(keys, leaves, treedef)


# Of the trees that were taken apart last. A program has few, and most of the work is their keys.
_known_keys: dict[jtu.PyTreeDef, tuple[KeyPath, ...]] = {}
_KEPT = 8
_lock = threading.Lock()


LEFT_OUT: Any = object()
"""As a value for `nest`: the leaf is not wanted."""


def nest(entries: Iterable[tuple[KeyPath, Any]]) -> Any:
    """Builds plain dicts and lists from key paths: what is loaded without an abstract tree.

    Where all leaves of a subtree are `LEFT_OUT`, a dict leaves it out, and a list holds `...` for
    it.
    """
    root: dict[keypath.Key, Any] = {}
    for keys, value in entries:
        if not keys:
            return ... if value is LEFT_OUT else value
        node = root
        for key in keys[:-1]:
            node = node.setdefault(key, _Node())
        node[keys[-1]] = value
    tree = _plain(root)
    return {} if tree is LEFT_OUT else tree


class _Node(dict[Any, Any]):
    """An inner node under construction, told apart from a leaf that is a dict."""


def _plain(node: dict[Any, Any]) -> Any:
    children = {
        key: _plain(child) if isinstance(child, _Node) else child for key, child in node.items()
    }
    if children and all(child is LEFT_OUT for child in children.values()):
        return LEFT_OUT
    if children and all(key.is_index for key in children):
        indexes = sorted(children, key=lambda key: int(key.name))
        if int(indexes[-1].name) >= len(indexes):
            raise errors.InvalidLayoutError(
                f"a list of the stored tree has only the indexes {[key.name for key in indexes]}"
            )
        return [... if children[key] is LEFT_OUT else children[key] for key in indexes]
    return {key.name: child for key, child in children.items() if child is not LEFT_OUT}


def match(
    abstract: FlatTree,
    stored: Mapping[KeyPath, Any],
    *,
    is_partial: bool = False,
) -> tuple[list[Any], list[str]]:
    """Finds the stored entry for each entry of an abstract tree.

    A list matches a tuple, and a dict a named tuple or a dataclass: only key paths count. An
    abstract `None` or `...` asks for nothing; an extra `...` is tolerated.

    Args:
      abstract: what is asked for.
      stored: the entries that there are; see `schema.Entry`.
      is_partial: whether dicts of both trees may have keys that the other has not.

    Returns:
      For each abstract entry its stored entry, or None where nothing is to be loaded; and all
      differences, one line each.
    """
    found: list[Any] = []
    problems: list[str] = []
    unused: dict[KeyPath, Any] = {}
    if list(stored) == list(abstract.keys):  # nearly always, and quick to see
        entries = list(stored.values())
    else:
        unused = dict(stored)
        entries = [unused.pop(keys, None) for keys in abstract.keys]
    for keys, wanted, entry in zip(abstract.keys, abstract.leaves, entries, strict=True):
        if entry is None:
            if not is_partial and wanted is not ... and not is_empty(wanted):
                problems.append(f"{_named(keys)}: asked for, not in the checkpoint")
        elif entry.is_empty:
            if wanted is not ... and not is_empty(wanted):
                problems.append(f"{_named(keys)}: the checkpoint holds an empty node, not a leaf")
            entry = None
        elif wanted is not None and is_empty(wanted):
            problems.append(
                f"{_named(keys)}: the checkpoint holds a leaf, not an empty {type(wanted).__name__}"
            )
        found.append(entry if wanted is not None and wanted is not ... else None)
    if is_partial:
        leaves = {keys for keys, entry in stored.items() if not entry.is_empty}
        problems += _misfits(abstract, stored, leaves)
    else:
        problems += [
            f"{_named(keys)}: in the checkpoint, not asked for"
            for keys, entry in unused.items()
            if not entry.is_empty
        ]
    return found, problems


def _named(keys: KeyPath) -> str:
    return keypath.label(keys) or "<root>"


def _misfits(
    abstract: FlatTree, stored: Iterable[KeyPath], leaves: Container[KeyPath]
) -> list[str]:
    """Returns where two trees differ by more than keys of dicts."""
    asked, held = _inner(abstract.keys), _inner(stored)
    problems = []
    for keys, children in asked.items():
        others = held.get(keys)
        kind = _kind(children)
        if others is None:
            if keys in leaves:
                problems.append(f"{_named(keys)}: the checkpoint holds a leaf, not a {kind}")
        elif kind != _kind(others):
            problems.append(f"{_named(keys)}: the checkpoint holds a {_kind(others)}, not a {kind}")
        elif kind == "list" and children != others:
            problems.append(
                f"{_named(keys)}: the checkpoint holds a list of {len(others)}, not of "
                f"{len(children)}; only keys of dicts can be left out. `...` skips an element"
            )
    problems += [
        f"{_named(keys)}: the checkpoint holds a {_kind(held[keys])}, not a leaf"
        for keys, wanted in abstract.entries
        if keys in held and wanted is not ... and not is_empty(wanted)
    ]
    return problems


def _inner(paths: Iterable[KeyPath]) -> dict[KeyPath, set[keypath.Key]]:
    """Returns the keys below each inner node."""
    inner: dict[KeyPath, set[keypath.Key]] = {}
    for keys in paths:
        for depth, key in enumerate(keys):
            inner.setdefault(keys[:depth], set()).add(key)
    return inner


def _kind(children: Iterable[keypath.Key]) -> str:
    return "list" if all(key.is_index for key in children) else "dict"


# What trees are made of, to a type checker. None knows a pytree when it sees one, so `PyTree` and
# `PyTreeOf` stand for anything; they say in a signature what is meant.

LeafT = TypeVar("LeafT")

Leaf: TypeAlias = jax.Array | np.ndarray | int | float | np.number | bytes | bool | str
"""What a leaf may be when it is saved, as Orbax names it; `save` takes more."""

AbstractLeaf: TypeAlias = (
    AbstractArray | AbstractShardedArray | int | float | np.number | bytes | bool | str
)
"""What may be asked for in place of a leaf; types, None and `...` besides."""

PyTreeKey: TypeAlias = jtu.SequenceKey | jtu.DictKey | jtu.GetAttrKey | jtu.FlattenedIndexKey
"""One step of a key path."""

PyTreeKeyPath: TypeAlias = tuple[PyTreeKey, ...]
"""Where a leaf lies in its tree."""

JsonValue: TypeAlias = "str | int | float | bool | JsonType | None"
JsonType: TypeAlias = list["JsonValue"] | dict[str, "JsonValue"]
"""A JSON document."""

if TYPE_CHECKING:
    from typing_extensions import TypeAliasType

    PyTreeOf = TypeAliasType("PyTreeOf", Any, type_params=(LeafT,))
    PyTree: TypeAlias = Any
else:

    class PyTreeOf(Generic[LeafT]):
        """A pytree all of whose leaves are of one type; to a type checker, anything."""

    class PyTree:
        """A pytree of any leaves; to a type checker, anything."""
