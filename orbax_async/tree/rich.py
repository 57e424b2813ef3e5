"""Rich types: a second description of a tree, in which tuples and named tuples keep their kind.

The tree of a `_METADATA` document knows lists and dicts alone. Beside it a `RichTree` nests what
is recorded of each leaf in the containers that the tree had: lists and dicts as they are, tuples
and named tuples as `{"category": ..., "clazz": ..., "entries": ...}`; any other node is a dict.
Only key names lead from one description to the other.
"""

from __future__ import annotations

import collections
import functools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from orbax_async.tree import keypath, structure
from orbax_async.tree.keypath import KeyPath

__all__ = ["EMPTY_NAMED_TUPLE", "describe", "fill", "merge", "nest"]

EMPTY_NAMED_TUPLE = "NamedTuple"  # the kind of an empty named tuple, where rich types are recorded
_LEAF = "ValueMetadataEntry"
_Names = tuple[str, ...]

Empty = collections.namedtuple("Empty", ())
Empty.__doc__ = "What an empty named tuple is loaded as: its own class is not recorded."


def describe(tree: Any) -> tuple[Any, frozenset[int]]:
    """Describes the containers of a tree.

    Returns:
      The description with the place of each leaf or empty node, in flatten order, in its stead;
      and which of these are empty named tuples.
    """
    empties: set[int] = set()
    places = iter(range(sys.maxsize))

    def walk(node: Any) -> Any:
        children = None if structure.is_empty(node) else _children(node)
        if children is None:
            place = next(places)
            if structure.is_named_tuple(node):
                empties.add(place)
            return place
        described = [(key, walk(child)) for key, child in children]
        if structure.is_named_tuple(node):
            return {
                "category": "namedtuple",
                "module": type(node).__module__,
                "clazz": type(node).__name__,
                "entries": [{"key": key, "value": each} for key, each in described],
            }
        if isinstance(node, tuple):
            entries = [each for _, each in described]
            return {"category": "custom", "clazz": "tuple", "entries": entries}
        if isinstance(node, list):
            return [each for _, each in described]
        return dict(described)

    return walk(tree), frozenset(empties)


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """Returns the children of a node by key; None for a leaf."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda each: each is not node)
    if len(pairs) == 1 and not pairs[0][0]:
        return None
    return [(keypath.keys_of(path)[0].name, child) for path, child in pairs]


def fill(description: Any, values: Sequence[Mapping[str, Any]]) -> Any:
    """Replaces places in a description by what is recorded of the leaves there."""
    if isinstance(description, int):
        return {"category": "custom", "clazz": _LEAF, "data": values[description]}
    if isinstance(description, list):
        return [fill(each, values) for each in description]
    if isinstance(description, dict):
        return {key: fill(each, values) for key, each in description.items()}
    return description


def merge(first: Any, second: Any) -> Any:
    """Puts two filled descriptions together, of trees that have no leaf in common.

    Raises:
      ValueError: a node is of different kinds in the two.
    """
    if first == second or _is_leaf(second):  # a leaf at a node is an empty one, which adds nothing
        return first
    if _is_leaf(first):
        return second
    if isinstance(first, list) and isinstance(second, list):
        both = [merge(*pair) for pair in zip(first, second, strict=False)]
        return both + max(first, second, key=len)[len(both) :]
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise ValueError(f"{first!r:.60} is not of the kind of {second!r:.60}")
    if not _is_typed(first) and not _is_typed(second):
        shared = {key: merge(first[key], second[key]) for key in first.keys() & second.keys()}
        return {key: shared.get(key, value) for key, value in (first | second).items()}
    kind, other = [
        (each.get("category"), each.get("module"), each.get("clazz")) for each in (first, second)
    ]
    if kind != other or "entries" not in first:
        raise ValueError(f"{kind} is not {other}")
    return first | {"entries": merge(first["entries"], second["entries"])}


def _is_typed(document: dict[str, Any]) -> bool:
    return isinstance(document.get("category"), str)  # else it is the key of a dict


def _is_leaf(document: Any) -> bool:
    return isinstance(document, dict) and document.get("clazz") == _LEAF


def nest(text: str, entries: Iterable[tuple[KeyPath, Any]]) -> Any:
    """Builds the tree that a recorded description tells of, around values by key path.

    Named tuples are of their own class where that is imported and has the same fields, else of
    one that is made for them.

    Raises:
      ValueError: the description is damaged, or does not fit the key paths.
    """
    values = {tuple([key.name for key in keys]): value for keys, value in entries}
    try:
        tree = _nested(json.loads(text), (), values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {error!r}") from error
    if values:
        raise ValueError(f"leaves without a place in it: {sorted(values)[:10]}")
    return tree


def _nested(document: Any, names: _Names, values: dict[_Names, Any]) -> Any:
    if isinstance(document, list):
        return [_nested(each, (*names, str(at)), values) for at, each in enumerate(document)]
    if not isinstance(document, dict):
        raise ValueError(f"at {names} it holds {document!r}")
    match document.get("category"), document.get("clazz"):
        case "custom", "tuple":
            return tuple(_nested(document["entries"], names, values))
        case "namedtuple", str(name):
            pairs = [(each["key"], each["value"]) for each in document["entries"]]
            made = _named_tuple(document["module"], name, tuple([key for key, _ in pairs]))
            return made(*[_nested(each, (*names, key), values) for key, each in pairs])
        case "custom", str(name) if name == _LEAF:
            if names not in values:
                raise ValueError(f"it has a leaf at {names}, the tree does not")
            value = values.pop(names)
            return Empty() if document["data"]["value_type"] == EMPTY_NAMED_TUPLE else value
        case str(category), name:
            raise ValueError(f"at {names} it holds a {category} {name!r}")
    return {key: _nested(each, (*names, key), values) for key, each in document.items()}


def _named_tuple(module: str, name: str, fields: tuple[str, ...]) -> Any:
    found = getattr(sys.modules.get(module), name, None)
    is_class = isinstance(found, type) and issubclass(found, tuple)
    if is_class and getattr(found, "_fields", None) == fields:
        return found
    return _made_named_tuple(f"{module}.{name}.{len(fields)}".replace(".", "_"), fields)


@functools.cache
def _made_named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)
