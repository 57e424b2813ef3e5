"""Key paths: how a leaf is named in messages, documents and stores, and selected by patterns."""

from __future__ import annotations

import fnmatch
import functools
import glob
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.tree_util as jtu

__all__ = [
    "JaxKeyPath",
    "Key",
    "KeyPath",
    "Select",
    "Selection",
    "jax_path",
    "key",
    "keys_of",
    "label",
    "pattern_of",
    "stored_name",
]


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


Select = str | Iterable[str] | Callable[[tuple[Any, ...]], Any]


class Selection:
    """The leaves that are wanted of a tree.

    A pattern is keys joined by `/`. In each key `*`, `?` and `[...]` stand for characters, and a
    key `**` for any number of keys. It selects what it matches, and everything below. A pattern
    that begins with `!` takes away from what the others select, or from everything.

    Args:
      select: a pattern, several, or a function that is called with each key path, of jax's own
        key classes, and returns whether to load the leaf.

    Raises:
      TypeError: `select` is none of these.
      ValueError: a pattern is empty, or there is none.
    """

    def __init__(self, select: Select) -> None:
        self._function: Callable[[tuple[Any, ...]], Any] | None = None
        self._taken: dict[str, list[str]] = {}
        self._left_out: list[list[str]] = []
        self._unmatched: set[str] = set()
        if callable(select):
            self._function = select
            return
        if not isinstance(select, str) and not isinstance(select, Iterable):
            raise TypeError(f"select must be patterns or a function, not {select!r}")
        patterns = [select] if isinstance(select, str) else list(select)
        if not patterns:
            raise ValueError("select holds no pattern, and would load nothing; leave it out")
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"a pattern of select must be a str, not {pattern!r}")
            keys = pattern.removeprefix("!").strip("/")
            if not keys:
                raise ValueError(f"select: the pattern {pattern!r} names no key")
            if pattern.startswith("!"):
                self._left_out.append(keys.split("/"))
            else:
                self._taken[pattern] = keys.split("/")
        self._unmatched = set(self._taken)

    def has(self, keys: KeyPath) -> bool:
        """Says whether a leaf is selected."""
        if self._function is not None:
            return bool(self._function(jax_path(keys)))
        names = [key.name for key in keys]
        matching = [pattern for pattern, keys in self._taken.items() if _matches(keys, names)]
        self._unmatched.difference_update(matching)
        is_taken = bool(matching) or not self._taken
        return is_taken and not any(_matches(keys, names) for keys in self._left_out)

    def problems(self, present: Iterable[KeyPath]) -> list[str]:
        """Returns a line for each pattern that has matched nothing so far; for one report."""
        if not self._unmatched:
            return []
        top = sorted({keys[0].name for keys in present if keys})
        return [
            f"select {pattern!r}: nothing in the checkpoint matches it; it holds {top[:20]}"
            for pattern in self._taken
            if pattern in self._unmatched
        ]


def pattern_of(keys: KeyPath) -> str:
    """Returns the pattern that selects one leaf."""
    return "/".join(glob.escape(key.name).replace("/", "?") for key in keys)


def _matches(pattern: list[str], names: list[str]) -> bool:
    """Says whether a pattern matches a key path, or one of those above it."""
    if not pattern:
        return True
    first, *rest = pattern
    if first == "**":
        return _matches(rest, names) or (bool(names) and _matches(pattern, names[1:]))
    return bool(names) and fnmatch.fnmatchcase(names[0], first) and _matches(rest, names[1:])
