"""Putting trees together.

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
from collections.abc import Callable, Mapping
from typing import Any

import jax.tree_util as jtu

from orbax_async import errors
from orbax_async.tree import keypath

__all__ = ["merge"]


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
