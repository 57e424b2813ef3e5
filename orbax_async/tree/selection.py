"""Selecting leaves by patterns of their key paths."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Callable, Iterable
from typing import Any

from orbax_async.tree import keypath
from orbax_async.tree.keypath import KeyPath

__all__ = ["Select", "Selection", "pattern_of"]

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
            return bool(self._function(keypath.jax_path(keys)))
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
