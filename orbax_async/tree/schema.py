"""The documents that describe a tree: `_METADATA`, `_sharding`, `_strings.json`, `array_metadatas`.

Pure translations between Python values and JSON bytes (invariant I10); `docs/format.md` explains
each document. What only we know of a leaf rides in its entry under a key that Orbax ignores.

The tree of a `_METADATA` document knows lists and dicts alone. Where rich types are asked for, a
`RichTree` beside it nests what is recorded of each leaf in the containers that the tree had: lists
and dicts as they are, tuples and named tuples as `{"category": ..., "clazz": ..., "entries": ...}`;
any other node is a dict. Only key names lead from one description to the other.
"""

from __future__ import annotations

import base64
import collections
import functools
import json
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from orbax_async._storage.zarr import dtype_named
from orbax_async.tree import keypath, structure
from orbax_async.tree.keypath import KeyPath, stored_name

__all__ = [
    "EMPTY_NAMED_TUPLE",
    "Entry",
    "TreeDocument",
    "describe_rich",
    "dump_array_metadatas",
    "dump_shardings",
    "dump_strings",
    "fill_rich",
    "load_array_metadatas",
    "load_shardings",
    "load_strings",
    "merge_rich",
    "nest_rich",
]


# Kinds of leaf, as `value_type`.
JAX_ARRAY = "jax.Array"
NUMPY_ARRAY = "np.ndarray"
SCALAR = "scalar"
STRING = "string"
EMPTY_NAMED_TUPLE = "NamedTuple"  # the kind of an empty named tuple, where rich types are recorded
_EMPTY: Mapping[str, Any] = {
    "None": lambda: None,
    "Dict": dict,
    "List": list,
    "Tuple": tuple,
    EMPTY_NAMED_TUPLE: lambda: None,
}

_NOTHING: Mapping[str, Any] = types.MappingProxyType({})

_SEQUENCE_KEY = 1
_DICT_KEY = 2
_PRIVATE = "orbax_async"


def _parsed(data: bytes | str) -> Any:
    return json.loads(data)


class Entry(NamedTuple):
    """One leaf, or one empty node, of a stored tree.

    Attributes:
      keys: where it is.
      kind: `jax.Array`, `np.ndarray`, `scalar`, `string`, or the name of an empty node.
      name: the name under which the leaf is stored.
      write_shape: the shape of the pieces that were written, of a jax array.
      private: what we know beyond Orbax: `python_type`, `logical_dtype`, `memory_kind`,
        `weak_type`.
    """

    keys: KeyPath
    kind: str
    name: str
    write_shape: tuple[int, ...] | None = None
    private: Mapping[str, Any] = _NOTHING

    @property
    def is_empty(self) -> bool:
        """Whether this is None or an empty container, which has no data."""
        return self.kind in _EMPTY

    def empty_value(self) -> Any:
        """Returns a new empty node of the recorded kind."""
        return _EMPTY[self.kind]()


class TreeDocument(NamedTuple):
    """The `_METADATA` document: every entry in flatten order, and how the arrays are stored."""

    entries: tuple[Entry, ...]
    uses_zarr3: bool
    uses_ocdbt: bool | None  # None: the document doesn't say; look for a manifest
    containers: Any = None  # to be recorded: what `describe` made of the tree
    rich: str | None = None  # as found: what `nest_rich` takes

    def dump(self) -> bytes:
        """Returns the document as JSON."""
        tree = {}
        values = []
        for entry in self.entries:
            value: dict[str, Any] = {
                "value_type": entry.kind,
                "skip_deserialize": entry.is_empty,
            }
            if entry.write_shape is not None:
                value["write_shape"] = entry.write_shape
            values.append(value.copy())
            if entry.private:
                value[_PRIVATE] = entry.private
            tree[str(tuple(key.name for key in entry.keys))] = {
                "key_metadata": [
                    {"key": key.name, "key_type": _SEQUENCE_KEY if key.is_index else _DICT_KEY}
                    for key in entry.keys
                ],
                "value_metadata": value,
            }
        document: dict[str, Any] = {
            "tree_metadata": tree,
            "use_ocdbt": self.uses_ocdbt,
            "use_zarr3": self.uses_zarr3,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        if self.containers is not None:
            document["value_metadata_tree"] = json.dumps(fill_rich(self.containers, values))
        return json.dumps(document).encode()

    @staticmethod
    @functools.lru_cache(maxsize=4)  # the checkpoints of a run have equal ones
    def load(data: bytes) -> TreeDocument:
        """Reads the document; raises ValueError, KeyError, or their like, where it is damaged."""
        document = _parsed(data)
        tree = document["tree_metadata"]
        entries = []
        shapes: dict[Any, tuple[int, ...] | None] = {None: None}  # few differ
        for path in list(tree.keys()):  # what is no dict has none, and is damage
            item = tree.pop(path)  # fewer objects at a time are less work for the collector
            value = item["value_metadata"]
            shape = value.get("write_shape")
            shape = None if shape is None else tuple(shape)
            kind = value["value_type"]
            if not isinstance(kind, str):
                raise ValueError(f"the kind of {path} is {kind!r:.60}")
            keys = tuple(
                [
                    keypath.key(each["key"], each["key_type"] == _SEQUENCE_KEY)
                    for each in item["key_metadata"]
                ]
            )
            entries.append(
                Entry(
                    keys,
                    kind,
                    stored_name(keys),
                    shapes.setdefault(shape, shape),
                    _private_of(path, value[_PRIVATE]) if _PRIVATE in value else _NOTHING,
                )
            )
        return TreeDocument(
            entries=tuple(entries),
            uses_zarr3=bool(document.get("use_zarr3", False)),
            uses_ocdbt=document.get("use_ocdbt"),
            rich=document.get("value_metadata_tree"),
        )


def _private_of(path: str, private: Any) -> Mapping[str, Any]:
    """Returns what only we know of a leaf; raises where that can't be it."""
    if not isinstance(private, dict):
        raise ValueError(f"what is known of {path} is {private!r:.60}")
    for name, value in private.items():
        if not isinstance(value, bool if name == "weak_type" else str):
            raise ValueError(f"the {name} of {path} is {value!r:.60}")
    if "logical_dtype" in private:
        dtype_named(private["logical_dtype"])
    return private


def dump_shardings(shardings: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Returns the `_sharding` document: base64 of the stored name to JSON inside a string."""
    return json.dumps(
        {
            base64.urlsafe_b64encode(name.encode()).decode(): json.dumps(sharding)
            for name, sharding in sorted(shardings.items())
        },
        separators=(",", ":"),
    ).encode()


def load_shardings(data: bytes) -> dict[str, dict[str, Any]]:
    """Reads the `_sharding` document; an entry that says nothing is left out."""
    parsed: dict[str, dict[str, Any]] = {}  # few differ
    shardings = {}
    for key, text in _parsed(data).items():
        if isinstance(text, str) and text:
            padded = key + "=" * (-len(key) % 4)
            if text not in parsed:
                parsed[text] = _parsed(text)
            shardings[base64.urlsafe_b64decode(padded).decode()] = parsed[text]
    return shardings


def dump_strings(strings: Mapping[str, str]) -> bytes:
    """Returns the `_strings.json` document; a `/` in a stored name nests, as readers expect.

    Raises:
      ValueError: one name is a prefix of another, so that both can't be held.
    """
    root: dict[str, Any] = {}
    for name, text in strings.items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} lies below another string's name")
        if last in node:
            raise ValueError(f"{name!r} lies above another string's name")
        node[last] = text
    return json.dumps(root, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


def load_strings(data: bytes, wanted: Iterable[str]) -> dict[str, str]:
    """Reads the strings of the `wanted` stored names; names that are absent are left out."""
    root = _parsed(data)
    found = {}
    for name in wanted:
        node: Any = root
        for part in name.split("/"):
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, str):
            found[name] = node
    return found


def dump_array_metadatas(
    arrays: Iterable[tuple[str, tuple[int, ...], tuple[int, ...], str | None]],
) -> bytes:
    """Returns an `array_metadatas` document.

    Args:
      arrays: for each jax array its stored name, write shape, chunk shape, and, for typed PRNG
        keys, the name of their implementation.
    """
    return json.dumps(
        {
            "array_metadatas": [
                {
                    "array_metadata": {
                        "param_name": name,
                        "write_shape": write_shape,
                        "chunk_shape": chunk_shape,
                        "ext_metadata": None if impl is None else {"random_key_impl": impl},
                    }
                }
                for name, write_shape, chunk_shape, impl in arrays
            ]
        }
    ).encode()


def load_array_metadatas(data: bytes) -> dict[str, str]:
    """Reads an `array_metadatas` document: the PRNG implementation by stored name."""
    impls = {}
    for item in _parsed(data)["array_metadatas"]:
        array = item["array_metadata"]
        impl = (array.get("ext_metadata") or {}).get("random_key_impl")
        if impl is not None:
            impls[array["param_name"]] = impl
    return impls


# Rich types.


_LEAF = "ValueMetadataEntry"
_Names = tuple[str, ...]

Empty = collections.namedtuple("Empty", ())
Empty.__doc__ = "What an empty named tuple is loaded as: its own class is not recorded."


def describe_rich(tree: Any) -> tuple[Any, frozenset[int]]:
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


def fill_rich(description: Any, values: Sequence[Mapping[str, Any]]) -> Any:
    """Replaces places in a description by what is recorded of the leaves there."""
    if isinstance(description, int):
        return {"category": "custom", "clazz": _LEAF, "data": values[description]}
    if isinstance(description, list):
        return [fill_rich(each, values) for each in description]
    if isinstance(description, dict):
        return {key: fill_rich(each, values) for key, each in description.items()}
    return description


def merge_rich(first: Any, second: Any) -> Any:
    """Puts two filled descriptions together, of trees that have no leaf in common.

    Raises:
      ValueError: a node is of different kinds in the two.
    """
    if first == second or _is_leaf(second):  # a leaf at a node is an empty one, which adds nothing
        return first
    if _is_leaf(first):
        return second
    if isinstance(first, list) and isinstance(second, list):
        both = [merge_rich(*pair) for pair in zip(first, second, strict=False)]
        return both + max(first, second, key=len)[len(both) :]
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise ValueError(f"{first!r:.60} is not of the kind of {second!r:.60}")
    if not _is_typed(first) and not _is_typed(second):
        shared = {key: merge_rich(first[key], second[key]) for key in first.keys() & second.keys()}
        return {key: shared.get(key, value) for key, value in (first | second).items()}
    kind, other = [
        (each.get("category"), each.get("module"), each.get("clazz")) for each in (first, second)
    ]
    if kind != other or "entries" not in first:
        raise ValueError(f"{kind} is not {other}")
    return first | {"entries": merge_rich(first["entries"], second["entries"])}


def _is_typed(document: dict[str, Any]) -> bool:
    return isinstance(document.get("category"), str)  # else it is the key of a dict


def _is_leaf(document: Any) -> bool:
    return isinstance(document, dict) and document.get("clazz") == _LEAF


def nest_rich(text: str, entries: Iterable[tuple[KeyPath, Any]]) -> Any:
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
