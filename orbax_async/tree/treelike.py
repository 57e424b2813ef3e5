"""What a pytree is, to a type checker.

No checker knows a pytree when it sees one, so `PyTree` and `PyTreeOf` stand for anything; they say
in a signature what is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import jax
import jax.tree_util as jtu
import numpy as np

from orbax_async.arrays import AbstractArray, AbstractShardedArray

__all__ = [
    "AbstractLeaf",
    "JsonType",
    "Leaf",
    "PyTree",
    "PyTreeKey",
    "PyTreeKeyPath",
    "PyTreeOf",
]

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
