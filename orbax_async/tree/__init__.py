"""Pytrees and their description on disk.

Does:
  - spell key paths, for people and for the format, and select leaves by patterns (`keypath`);
  - name what trees are made of, flatten them, rebuild them, and match an abstract tree to what is
    stored (`structure`);
  - write and read the documents that describe a tree, with the types of its containers where they
    are asked for (`schema`);
  - put trees together, in memory and in documents (`merging`).

Does not:
  - look at the values of leaves, or know how arrays are stored.
"""

from orbax_async.tree.merging import merge
from orbax_async.tree.structure import (
    AbstractLeaf,
    JsonType,
    Leaf,
    PyTree,
    PyTreeKey,
    PyTreeKeyPath,
    PyTreeOf,
)

__all__ = [
    "AbstractLeaf",
    "JsonType",
    "Leaf",
    "PyTree",
    "PyTreeKey",
    "PyTreeKeyPath",
    "PyTreeOf",
    "merge",
]
