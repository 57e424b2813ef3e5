"""The documents that describe a tree: `_METADATA`, `_sharding`, `_strings.json`, `array_metadatas`.

Pure translations between Python values and JSON bytes (invariant I10); `docs/format.md` explains
each document. What only we know of a leaf rides in its entry under a key that Orbax ignores.
"""

from __future__ import annotations

import base64
import functools
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from orbax_async.tree import keypath, rich
from orbax_async.tree.keypath import KeyPath, stored_name

__all__ = [
    "Entry",
    "TreeDocument",
    "dump_array_metadatas",
    "dump_shardings",
    "dump_strings",
    "load_array_metadatas",
    "load_shardings",
    "load_strings",
]

# Kinds of leaf, as `value_type`.
JAX_ARRAY = "jax.Array"
NUMPY_ARRAY = "np.ndarray"
SCALAR = "scalar"
STRING = "string"
_EMPTY: Mapping[str, Any] = {
    "None": lambda: None,
    "Dict": dict,
    "List": list,
    "Tuple": tuple,
    rich.EMPTY_NAMED_TUPLE: lambda: None,
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
    containers: Any = None  # to be recorded: what `rich.describe` made of the tree
    rich: str | None = None  # as found: what `rich.nest` takes

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
            document["value_metadata_tree"] = json.dumps(rich.fill(self.containers, values))
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
            keys = tuple(
                [
                    keypath.key(each["key"], each["key_type"] == _SEQUENCE_KEY)
                    for each in item["key_metadata"]
                ]
            )
            entries.append(
                Entry(
                    keys,
                    value["value_type"],
                    stored_name(keys),
                    shapes.setdefault(shape, shape),
                    value.get(_PRIVATE, _NOTHING),
                )
            )
        return TreeDocument(
            entries=tuple(entries),
            uses_zarr3=bool(document.get("use_zarr3", False)),
            uses_ocdbt=document.get("use_ocdbt"),
            rich=document.get("value_metadata_tree"),
        )


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
