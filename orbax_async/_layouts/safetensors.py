"""The layout of safetensors files: a flat dict of arrays, by the names of the tensors.

A checkpoint is one file, or the files of a directory. It is read, and never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._layouts.protocol import Checkpoint, Damage, Details, StoredTree
from orbax_async._storage import safetensors, zarr
from orbax_async._storage.directory import Directory
from orbax_async._storage.kvstore import ArrayStore
from orbax_async.options import SafetensorsOptions
from orbax_async.tree import schema
from orbax_async.tree.keypath import Key

__all__ = ["SafetensorsLayout"]


class SafetensorsLayout:
    """Finds and opens safetensors files."""

    name = "safetensors"
    what = "safetensors files"

    def holds(self, directory: Directory) -> bool:
        """Says whether there is such a file."""
        return bool(safetensors.find(directory.path))

    def find(
        self, directory: Directory, options: ambient.Context, *, may_be_damaged: bool = False
    ) -> Checkpoint | str:
        """Returns the files as a checkpoint; damage shows when they are opened."""
        if self.holds(directory):
            return _Files(directory, self.what)
        return (
            f"it is no {names.SAFETENSORS} file, and no directory with such in it. Check the path, "
            "or leave context.checkpoint_layout at 'orbax'."
        )

    def open_tree(
        self, directory: Directory, options: ambient.Context, *, is_for_jax: bool
    ) -> StoredTree:
        """Reads what the headers of the files say."""
        return _Tensors(directory, options.safetensors, is_for_jax=is_for_jax)

    def explain(self, directory: Directory, error: Exception) -> list[Damage]:
        """Names each file that is damaged; where all are whole, what is wrong between them."""
        hint = "Nothing can be loaded from here without it."
        found = safetensors.find_damage(directory.path) or [(directory.path, error)]
        return [Damage.of_file(path, problem, hint) for path, problem in found]


class _Files(Checkpoint):
    """Files of tensors, which are one tree."""

    def details(self) -> Details:
        """Returns sizes and times of the files, and the texts in their headers."""
        contents = safetensors.read_headers(self.directory.path)
        files = [file.removeprefix(f"{self.directory.path}/") for file in contents.files]
        found = [status for file in files if (status := self.directory.status(file))]
        newest = max((status.modified_nsecs for status in found), default=None)
        nbytes = sum(status.nbytes for status in found)
        return Details(nbytes, None, newest, contents.metadata)


class _Tensors(StoredTree):
    """The tensors of some files."""

    may_be_asked_in_part = True
    lies_plainly = True
    mismatch = errors.UnknownTensorError
    mismatch_hint = "Tensors lie in one flat dict: ask for some, by name."

    def __init__(
        self, directory: Directory, options: SafetensorsOptions, *, is_for_jax: bool
    ) -> None:
        self._options = options
        self._contents = safetensors.read_headers(directory.path)
        kind = schema.JAX_ARRAY if is_for_jax else schema.NUMPY_ARRAY
        # With a dtype of its own, a leaf is read as it is stored and cast thereafter.
        entries = [
            schema.Entry(
                (Key(name, False),), kind, name, private={"logical_dtype": tensor.dtype.name}
            )
            for name, tensor in self._contents.tensors.items()
        ]
        super().__init__(directory, entries)

    def open_store(self) -> ArrayStore:
        """Opens the files as a store of arrays."""
        reader = safetensors.TensorReader(
            self._contents.tensors,
            max_over_read_ratio=self._options.max_over_read_ratio,
            read_chunk_nbytes=self._options.read_chunk_bytes,
        )
        return ArrayStore(self.directory.path, ocdbt=False, zarr3=True, direct=reader)

    def documents(
        self, store: ArrayStore, entries: Sequence[schema.Entry]
    ) -> dict[str, dict[str, Any]]:
        """Returns what a zarr document would say of some tensors, by name."""
        found = [self._contents.tensors[entry.name] for entry in entries]
        return {each.name: zarr.plain_document(each.shape, each.dtype) for each in found}

    def default_sharding(self) -> jax.sharding.Sharding:
        """Returns where Orbax puts tensors of which no sharding is asked: on every device."""
        mesh = jax.sharding.Mesh(np.array(jax.devices()), (names.SAFETENSORS_AXIS,))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def metadata(self, options: ambient.Context) -> Any:
        """Returns the shape and dtype of each tensor."""
        return {
            name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
            for name, tensor in self._contents.tensors.items()
        }
