"""Safetensors files as a stored tree: a flat dict of arrays, by the names of the tensors."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async._storage import safetensors, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.openers import open_directory
from orbax_async.handlers.stored import StoredTree
from orbax_async.options import CheckpointLayout, SafetensorsOptions
from orbax_async.tree import schema
from orbax_async.tree.keypath import Key

__all__ = ["TensorTree", "is_of_tensors", "open_tree", "replicated"]


class TensorTree(StoredTree):
    """The safetensors files at a path; they have no document but their headers.

    Args:
      path: a file, or a directory of files.
      options: how they are read.
      is_for_jax: whether tensors become jax arrays where nothing is said of them.

    Raises:
      InvalidLayoutError: there are none, or they are damaged.
    """

    def __init__(self, path: str, options: SafetensorsOptions, *, is_for_jax: bool = False) -> None:
        self.directory = path
        self._options = options
        self.contents = safetensors.read_headers(open_directory(path))
        # With a dtype of its own, a leaf is read as it is stored and cast thereafter.
        entries = tuple(
            schema.Entry(
                (Key(name, False),),
                schema.JAX_ARRAY if is_for_jax else schema.NUMPY_ARRAY,
                name,
                private={"logical_dtype": tensor.dtype.name},
            )
            for name, tensor in self.contents.tensors.items()
        )
        self.uses_ocdbt = False
        self.tree = schema.TreeDocument(entries, uses_zarr3=True, uses_ocdbt=False)
        self.arrays = list(entries)

    def open_store(self) -> ArrayStore:
        """Opens the files as a store of arrays."""
        files = self.contents.directory
        reader = safetensors.TensorReader(
            files,
            self.contents.tensors,
            max_over_read_ratio=self._options.max_over_read_ratio,
            read_chunk_nbytes=self._options.read_chunk_bytes,
        )
        return ArrayStore(files, ocdbt=False, zarr3=True, direct=reader)

    def documents(
        self, store: ArrayStore, entries: list[schema.Entry]
    ) -> dict[str, dict[str, Any]]:
        """Returns what a zarr document would say of some tensors, by name."""
        found = [self.contents.tensors[entry.name] for entry in entries]
        return {each.name: zarr.plain_document(each.shape, each.dtype) for each in found}

    def metadata(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of each tensor."""
        return {
            name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
            for name, tensor in self.contents.tensors.items()
        }


def open_tree(path: str, options: ambient.Context, *, is_for_jax: bool = False) -> StoredTree:
    """Opens what is stored at a path, under the layout of the operation; blocks.

    Raises:
      InvalidLayoutError: there is no tree, or it is damaged.
    """
    if is_of_tensors(path, options):
        return TensorTree(path, options.safetensors, is_for_jax=is_for_jax)
    return StoredTree(path)


def is_of_tensors(path: str, options: ambient.Context) -> bool:
    """Says whether what lies at a path is read as safetensors files."""
    layout = options.checkpoint_layout
    if layout is CheckpointLayout.AUTO:
        is_orbax = os.path.exists(os.path.join(path, names.TREE_METADATA))
        return not is_orbax and bool(safetensors.find(open_directory(path)))
    return layout is CheckpointLayout.SAFETENSORS


def replicated() -> jax.sharding.Sharding:
    """Returns where Orbax puts tensors of which no sharding is asked: on every device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (names.SAFETENSORS_AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
