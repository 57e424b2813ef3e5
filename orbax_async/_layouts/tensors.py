"""The layout of safetensors files: a flat dict of arrays, by the names of the tensors.

A checkpoint is one file, or the files of a directory. It is read, and never written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._layouts.layout import Damage, Details, Layout, StoredTree, reading
from orbax_async._storage import safetensors, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.directory import Directory
from orbax_async.options import SafetensorsOptions
from orbax_async.tree import schema
from orbax_async.tree.keypath import Key


class SafetensorsLayout(Layout):
    """Safetensors files."""

    what = "safetensors files"

    @property
    def is_there(self) -> bool:
        """Whether there is such a file."""
        return bool(safetensors.find(self.directory))

    def problem(self) -> str | None:
        """Returns that there are no files; damage shows when they are opened."""
        if self.is_there:
            return None
        return (
            f"it is no {names.SAFETENSORS} file, and no directory with such in it. Check the path, "
            "or leave context.checkpoint_layout at 'orbax'."
        )

    def details(self) -> Details:
        """Returns sizes and times of the files, and the texts in their headers."""
        contents = safetensors.read_headers(self.directory)
        files = [contents.directory.status(file, follow_links=True) for file in contents.files]
        found = [status for status in files if status is not None]
        return Details(
            nbytes=sum(status.nbytes for status in found),
            commit_timestamp_nsecs=max((each.modified_nsecs for each in found), default=None),
            custom_metadata=contents.metadata,
        )

    def open_tree(self, *, is_for_jax: bool = False) -> StoredTree:
        """Reads the headers of the files."""
        return _Tensors(self.directory, self.options.safetensors, is_for_jax=is_for_jax)

    def find_damage(self) -> Iterator[Damage]:
        """Yields each file that is damaged; where all are whole, what is wrong between them."""
        with reading(self.directory.path):
            found = safetensors.find_damage(self.directory)
        for path, error in found:
            hint = "Nothing can be loaded from here without it."
            yield dataclasses.replace(Damage.of(self.directory, error, hint), path=path)


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
        with reading(directory.path):
            found = safetensors.read_headers(directory)
        self._files, self._tensors = found.directory, found.tensors
        kind = schema.JAX_ARRAY if is_for_jax else schema.NUMPY_ARRAY
        # With a dtype of its own, a leaf is read as it is stored and cast thereafter.
        entries = [
            schema.Entry(
                (Key(name, False),), kind, name, private={"logical_dtype": tensor.dtype.name}
            )
            for name, tensor in self._tensors.items()
        ]
        super().__init__(directory, entries)

    def open_store(self) -> ArrayStore:
        """Opens the files as a store of arrays."""
        reader = safetensors.TensorReader(
            self._files,
            self._tensors,
            max_over_read_ratio=self._options.max_over_read_ratio,
            read_chunk_nbytes=self._options.read_chunk_bytes,
        )
        return ArrayStore(self._files, ocdbt=False, zarr3=True, direct=reader)

    def documents(
        self, store: ArrayStore, entries: Sequence[schema.Entry]
    ) -> dict[str, zarr.ArrayDocument]:
        """Returns what zarr documents would say."""
        found = [self._tensors[entry.name] for entry in entries]
        return {each.name: zarr.plain_document(each.shape, each.dtype) for each in found}

    def default_sharding(self) -> jax.sharding.Sharding:
        """Returns where Orbax puts tensors of which no sharding is asked: on every device."""
        mesh = jax.sharding.Mesh(np.array(jax.devices()), (names.SAFETENSORS_AXIS,))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def metadata(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of each tensor."""
        return {
            name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
            for name, tensor in self._tensors.items()
        }
