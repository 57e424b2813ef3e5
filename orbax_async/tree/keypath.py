"""Key paths: how a leaf is named in messages, in documents, and in the key-value store."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.tree_util as jtu

__all__ = ["JaxKeyPath", "Key", "KeyPath", "jax_path", "key", "keys_of", "label", "stored_name"]

JaxKeyPath = tuple[Any, ...]


class Key(NamedTuple):
    """One step of a stored key path: the key as a string, and whether it indexes a sequence."""

    name: str
    is_index: bool


KeyPath = tuple[Key, ...]


@functools.lru_cache(maxsize=4096)
def key(name: str, is_index: bool = False) -> Key:
    """Returns a step; most trees have few different ones, which their leaves then share."""
    return Key(name, is_index)


def _key(entry: Any) -> Key:
    if isinstance(entry, jtu.DictKey):
        return key(str(entry.key))
    if isinstance(entry, jtu.GetAttrKey):
        return key(entry.name)
    if isinstance(entry, jtu.SequenceKey):
        return key(str(entry.idx), True)
    if isinstance(entry, jtu.FlattenedIndexKey):
        return key(str(entry.key), True)
    # A pytree registered with its own key class: whatever names it best.
    named = getattr(entry, "key", getattr(entry, "name", entry))
    return key(str(named))


def keys_of(path: JaxKeyPath) -> KeyPath:
    """Returns a jax key path in its stored form."""
    return tuple([_key(entry) for entry in path])


def jax_path(keys: KeyPath) -> JaxKeyPath:
    """Returns a stored key path in jax's own classes, as users' functions expect it."""
    return tuple(
        jtu.SequenceKey(int(key.name)) if key.is_index else jtu.DictKey(key.name) for key in keys
    )


def stored_name(keys: KeyPath) -> str:
    """Returns the name under which a leaf is stored; the format joins keys without escaping."""
    return ".".join([key.name for key in keys])


def label(keys: KeyPath) -> str:
    """Returns a key path as people read it: `['params'][0]`; empty for a bare leaf."""
    return "".join(f"[{key.name}]" if key.is_index else f"[{key.name!r}]" for key in keys)
