"""`tree.merge` merges as Orbax's does, and reports every conflict."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from typing import Any, NamedTuple

import flax.core
import flax.struct
import jax
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1

from orbax_async import errors
from orbax_async.tree import merge


class Pair(NamedTuple):
    x: Any
    y: Any


class Other(NamedTuple):
    x: Any
    z: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Fields:
    a: Any
    b: Any


@flax.struct.dataclass
class Struct:
    a: Any
    b: Any
    name: str = flax.struct.field(pytree_node=False, default="it")


@dataclasses.dataclass(eq=False)
class Leaf:
    """A dataclass that jax does not know is a leaf."""

    a: Any = None


class Custom:
    """A node whose children have neither names nor keys."""

    def __init__(self, *children: Any) -> None:
        self.children = children

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self.children == other.children

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Custom{self.children}"


jax.tree_util.register_pytree_node(
    Custom, lambda node: (node.children, None), lambda _, children: Custom(*children)
)

LEAVES: list[Any] = [None, 5, "s", ..., Leaf()]
# In each family, what meets is a leaf, or of one kind.
FAMILIES: dict[str, list[Any]] = {
    "mappings": [
        *({}, {"a": 1}, {"a": None}, {"b": 2, "a": 3}, {"c": 4, "0": 5}),
        *({"a": {"x": 1}}, {"a": {"y": None}}, {"a": {}}),
        *(collections.OrderedDict(b=1, a=2), flax.core.FrozenDict({"a": {"x": 1}, "e": 1})),
    ],
    "of sequences": [{"a": [1]}, {"a": (1, 2)}, {"a": ()}, {"a": 1}, {}],
    "sequences": [
        *([], (), [1], [2, 3], [None, 2], (4, None)),
        *([{"a": 1}], [{"b": 2}], ({"a": 1},), ({"b": None},)),
    ],
    "named tuples": [
        *(Pair(1, None), Pair({"a": 1}, {}), Pair({"b": 1}, {}), Other(3, 4), optax.EmptyState()),
    ],
    "dataclasses": [Fields(1, None), Fields({"a": 1}, {}), Fields({"b": 2}, {})],
    "flax's": [Struct(1, None), Struct({"a": 1}, {}), Struct({"b": 2}, {})],
    "custom": [Custom(1, 2), Custom(3), Custom({"a": 1}), Custom({"b": 2})],
}
EVERYTHING = [*LEAVES, *itertools.chain(*FAMILIES.values())]


def outcome(function: Any, *trees: Any, **how: Any) -> Any:
    """What a merge gives, with the order and the classes of its nodes; or that it is refused."""
    try:
        merged = function(*trees, **how)
    except ValueError:
        return "refused"
    return merged, repr(merged)


def assert_alike(earlier: Any, later: Any, *, overwrite: bool) -> None:
    """Both libraries merge two trees into the same, or refuse them, and leave them as they are."""
    before = repr((earlier, later))
    theirs = outcome(v1.tree.merge, earlier, later, overwrite=overwrite)
    assert outcome(merge, earlier, later, overwrite=overwrite) == theirs, (earlier, later)
    assert repr((earlier, later)) == before


def test_every_pair_of_trees_merges_as_in_orbax() -> None:
    """Of containers of every kind, either way round: the same result, or refused by both."""
    for earlier, later in itertools.product(EVERYTHING, repeat=2):
        assert_alike(earlier, later, overwrite=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_later_tree_wins_as_in_orbax(family: str) -> None:
    """With `overwrite`, where what meets is of one kind, or a leaf: the same result."""
    members = [*LEAVES, *FAMILIES[family]]
    for earlier, later in itertools.product(members, repeat=2):
        assert_alike(earlier, later, overwrite=True)


def test_what_is_of_another_kind_is_replaced() -> None:
    """Where Orbax mixes up the keys and items of nodes of two kinds, or loses some."""
    for earlier, later in [
        ({"a": {"x": 1}}, {"a": [1, 2]}),
        ({"a": [1]}, {"a": {"x": 1}}),
        ({"a": {}}, {"a": (1,)}),
        (Pair(1, 2), [3]),
        (Custom(1), Pair(1, 2)),
    ]:
        assert merge(earlier, later, overwrite=True) == later
    assert merge({"c": 1}, Struct(2, 3), overwrite=True) == {"c": 1, "a": 2, "b": 3}
    assert v1.tree.merge({"c": 1}, Struct(2, 3), overwrite=True) == Struct(2, 3)
    merged = merge({"c": 1}, collections.defaultdict(list, d=2), overwrite=True)
    assert merged["e"] == []


def test_any_number_of_trees() -> None:
    """None gives an empty dict, one itself, and more are merged from the left."""
    arrays = {"w": np.ones(2)}
    for function in (merge, v1.tree.merge):
        assert function() == {}
        assert function(arrays) is arrays
        assert list(function({"b": 1}, {"a": 2}, {"c": 3})) == ["b", "a", "c"]
        assert function({"b": 1}, {"a": 2}, {"b": 3}, overwrite=True) == {"b": 3, "a": 2}
        assert function(arrays, {"b": 0})["w"] is arrays["w"]


def test_all_conflicts_are_in_one_error() -> None:
    """By key path: values that meet, nodes of other kinds, sequences of other lengths."""
    earlier = {"a": {"x": 1, "y": 2}, "b": [1], "c": {}, "d": Struct({}, {}), "e": 0}
    later = {"a": {"x": 1, "z": 2}, "b": [1, 2], "c": [], "d": Struct({}, {}, "another")}
    with pytest.raises(errors.TreeMismatchError) as caught:
        merge(earlier, later)
    assert caught.value.mismatches == (
        "['a']['x']: both hold a value",
        "['b']: sequences of 1 and 2 items can't be merged",
        "['c']: dict and list can't be merged",
        "['d']: the two of Struct differ beside their leaves",
    )
    assert "overwrite=True" in str(caught.value)
    with pytest.raises(errors.TreeMismatchError, match=r"\['b'\]: sequences of 1 and 2") as caught:
        merge(earlier, later, overwrite=True)
    assert len(caught.value.mismatches) == 1


def test_what_is_a_leaf_can_be_said() -> None:
    """`is_leaf` makes nodes leaves: they come over whole, and may not meet others."""

    def is_leaf(node: Any) -> bool:
        return isinstance(node, dict) and "x" in node

    apart = {"a": {"x": 1}}, {"b": {"x": 2}}
    for function in (merge, v1.tree.merge):
        assert function(*apart, is_leaf=is_leaf) == {**apart[0], **apart[1]}
        replaced = function({"a": {"x": 1}}, {"a": {"x": 2, "y": 3}}, overwrite=True)
        assert replaced == {"a": {"x": 2, "y": 3}}
    with pytest.raises(ValueError, match="dict and dict"):
        merge({"a": {"x": 1}}, {"a": {"y": 2}}, is_leaf=is_leaf)
    # Orbax loses x here without a word.
    assert v1.tree.merge({"a": {"x": 1}}, {"a": {"y": 2}}, is_leaf=is_leaf) == {"a": {"y": 2}}
