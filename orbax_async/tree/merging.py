"""Putting trees together: those in memory, and the stored ones of partial saves.

Rules
  Two trees are merged node by node. Children with names (of mappings, named tuples, dataclasses)
  are matched by name, others by place; what only one tree has is taken from it. A leaf can't be
  merged with anything, and None counts as one.

  Without `overwrite` nothing may meet a leaf, and nodes that meet must be of one class and say the
  same beside their children. With it the later tree wins: by its leaves, by its classes of nodes,
  and by all that it has in place of what is of another kind. Only its None never wins. Lists and
  tuples of different lengths can't be merged even so.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.tree_util as jtu

from orbax_async import errors
from orbax_async._trace import logger
from orbax_async.tree import keypath, schema
from orbax_async.tree.keypath import KeyPath
from orbax_async.tree.schema import STRING, Entry

__all__ = ["Taken", "merge", "merge_array_metadatas", "merge_json", "merge_trees"]

_Names = tuple[str, ...]


def merge(
    *trees: Any, overwrite: bool = False, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Merges trees into one that holds what any of them does; none of them is changed.

    Example:
      ::

        params = ocp.tree.merge(ocp.load("/base", select="encoder"), {"head": new_head})
        params = ocp.tree.merge(params, {"head": {"bias": zeros}}, overwrite=True)

    Args:
      *trees: the trees. Without any, the result is an empty dict.
      overwrite: whether the later tree wins where two have something at one key path, unless that
        is None; otherwise each such place is an error.
      is_leaf: called with each node; where it returns True, the node is taken for a leaf.

    Returns:
      The merged tree. Its nodes are of the classes of the later trees; but of dicts where such a
      class can't hold what has come together, as a named tuple can't hold a further name.

    Raises:
      TreeMismatchError: the trees hold something at one key path, or nodes that can't be merged;
        every such place is listed.
    """
    problems: list[str] = []
    merging = _Merging(overwrite, is_leaf, problems)
    merged = functools.reduce(functools.partial(merging.of, ()), trees) if trees else {}
    if problems:
        hint = "" if overwrite else "; with overwrite=True the later tree wins"
        raise errors.TreeMismatchError(
            f"the trees can't be merged: {'; '.join(problems)}{hint}", tuple(problems)
        )
    return merged


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node taken apart.

    Attributes:
      children: by name, or by index.
      has_names: which of the two.
      besides: what the node says beside its children; None of a mapping, which takes any names.
      build: makes such a node of other children.
    """

    children: dict[Any, Any]
    has_names: bool
    besides: Any
    build: Callable[[dict[Any, Any]], Any]


@dataclasses.dataclass(frozen=True)
class _Merging:
    overwrite: bool
    is_leaf: Callable[[Any], bool] | None
    problems: list[str]

    def of(self, path: tuple[keypath.Key, ...], earlier: Any, later: Any) -> Any:
        """Merges what two trees have at one key path."""
        first, second = self._taken_apart(earlier), self._taken_apart(later)
        if first is None or second is None:
            if not self.overwrite:
                are_both = first is None and second is None
                self._report(path, "both hold a value" if are_both else _kinds(earlier, later))
            return earlier if later is None else later
        if not self.overwrite and type(earlier) is not type(later):
            self._report(path, _kinds(earlier, later))
            return later
        if first.has_names is not second.has_names:
            return later
        if not first.has_names and len(first.children) != len(second.children):
            if not self.overwrite or isinstance(later, (list, tuple)):
                lengths = f"{len(first.children)} and {len(second.children)}"
                self._report(path, f"sequences of {lengths} items can't be merged")
            return later
        if not self.overwrite and first.besides != second.besides:
            self._report(path, f"the two of {type(later).__qualname__} differ beside their leaves")
            return later
        merged = dict(first.children)
        for name, child in second.children.items():
            key = keypath.Key(str(name), not first.has_names)
            is_new = name not in first.children
            merged[name] = child if is_new else self.of((*path, key), merged[name], child)
        if second.besides is None or merged.keys() == second.children.keys():
            return second.build(merged)
        return merged

    def _taken_apart(self, tree: Any) -> _Node | None:
        """Returns a node and its children; None of a leaf."""
        if tree is None or (self.is_leaf is not None and self.is_leaf(tree)):
            return None
        if jtu.all_leaves([tree]):
            return None
        if isinstance(tree, Mapping):  # as it is ordered; jax would sort it
            return _Node(dict(tree), True, None, functools.partial(_mapping_like, tree))
        entries, treedef = jtu.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
        keys = keypath.keys_of(tuple(path[0] for path, _ in entries))
        has_names = not isinstance(tree, list) and not any(key.is_index for key in keys)
        if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
            has_names = False
        names = [key.name if has_names else index for index, key in enumerate(keys)]
        return _Node(
            dict(zip(names, (child for _, child in entries), strict=True)),
            has_names,
            treedef,
            lambda children: jtu.tree_unflatten(treedef, [children[name] for name in names]),
        )

    def _report(self, path: tuple[keypath.Key, ...], what: str) -> None:
        self.problems.append(f"{keypath.label(path) or '<root>'}: {what}")


def _kinds(earlier: Any, later: Any) -> str:
    names = [type(each).__qualname__ for each in (earlier, later)]
    return f"{names[0]} and {names[1]} can't be merged"


def _mapping_like(original: Mapping[Any, Any], children: dict[Any, Any]) -> Any:
    if isinstance(original, collections.defaultdict):
        return collections.defaultdict(original.default_factory, children)
    kind: Any = type(original)
    return kind(children)


# Stored trees that have no leaf in common, as entries and as parsed documents.


class Taken:
    """The keys that trees have taken; another may only add to them.

    Args:
      as_files: whether each array becomes a directory, which can't lie inside that of another.
    """

    def __init__(self, *, as_files: bool = False) -> None:
        self._as_files = as_files
        self._entries: dict[_Names, Entry] = {}
        self._above: dict[_Names, bool] = {}  # of each container, whether it is a sequence
        self._stored: dict[str, Entry] = {}
        self._below: dict[tuple[str, bool], Entry] = {}  # by a name above, and if it is a string

    def add(self, entries: Iterable[Entry]) -> None:
        """Takes the keys of one more tree."""
        for entry in entries:
            keys = _names(entry)
            if entry.is_empty and keys in self._above:
                continue
            self._entries.setdefault(keys, entry)
            for count, key in enumerate(entry.keys):
                self._above.setdefault(keys[:count], key.is_index)
            if not entry.is_empty:
                self._stored.setdefault(entry.name, entry)
                for above in _above(entry.name):
                    self._below.setdefault((above, entry.kind == STRING), entry)

    def replaced_by(self, entry: Entry) -> Entry | None:
        """Returns what an entry would take the place of, or None if it can be added.

        An empty node that is there already, or with something in it, adds nothing, and may.
        """
        keys = _names(entry)
        for count in range(len(keys)):
            above = self._entries.get(keys[:count])
            if above is not None:
                return above
        there = self._entries.get(keys)
        if there is not None:
            return None if _is_same_empty(entry, there) else there
        if keys in self._above and not entry.is_empty:
            return next(each for known, each in self._entries.items() if known[: len(keys)] == keys)
        return None

    def of_other_kind(self, entry: Entry) -> KeyPath | None:
        """Returns where an entry takes a sequence for a dict, or a dict for a sequence."""
        keys = _names(entry)
        for count, key in enumerate(entry.keys):
            if self._above.get(keys[:count], key.is_index) != key.is_index:
                return entry.keys[:count]
        return None

    def confused_with(self, entry: Entry) -> Entry | None:
        """Returns what an entry, that can be added, can't be stored beside.

        That is one of the same stored name; also a string above or below another, which nest in
        their document, and an array above or below another, where they are files.
        """
        is_string = entry.kind == STRING
        if entry.is_empty:
            return None
        there = self._stored.get(entry.name)
        if there is not None or not (is_string or self._as_files):
            return there
        for name in _above(entry.name):
            above = self._stored.get(name)
            if above is not None and (above.kind == STRING) == is_string:
                return above
        return self._below.get((entry.name, is_string))


def _names(entry: Entry) -> _Names:
    return tuple([key.name for key in entry.keys])


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _is_same_empty(entry: Entry, other: Entry) -> bool:
    # What an empty named tuple is recorded as depends on the options of the part.
    return entry.is_empty and other.is_empty and entry.empty_value() == other.empty_value()


def merge_trees(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one `_METADATA` document for several; an empty node gives way to what is in it."""
    merged = dict(documents[0])
    tree: dict[str, Any] = {}
    for document in documents:
        tree = document["tree_metadata"] | tree
    in_order = [key for document in documents for key in document["tree_metadata"]]
    keys = {key: tuple(each["key"] for each in tree[key]["key_metadata"]) for key in in_order}
    above = {path[:count] for path in keys.values() for count in range(len(path))}
    merged["tree_metadata"] = {key: tree[key] for key, path in keys.items() if path not in above}
    merged.pop("value_metadata_tree", None)
    texts = [document.get("value_metadata_tree") for document in documents]
    if all(isinstance(text, str) for text in texts):
        description, *others = [json.loads(text) for text in texts if text is not None]
        try:
            for other in others:
                description = schema.merge_rich(description, other)
        except ValueError as error:
            logger.warning("the rich types of partial saves do not fit together: %s", error)
        else:
            merged["value_metadata_tree"] = json.dumps(description)
    return merged


def merge_json(first: Any, second: Any) -> Any:
    """Returns the later of two JSON values, but the union of two objects; None says nothing."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first | {key: merge_json(first.get(key), value) for key, value in second.items()}
    return first if second is None else second


def merge_array_metadatas(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one `array_metadatas` document for several; of each array there is one."""
    found = {
        each["array_metadata"]["param_name"]: each
        for document in documents
        for each in document["array_metadatas"]
    }
    return {"array_metadatas": list(found.values())}
