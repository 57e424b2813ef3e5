"""A stored tree: its documents, and what they say of each leaf."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orbax_async import _names as names
from orbax_async import arrays, errors
from orbax_async import context as ambient
from orbax_async._storage import files, zarr
from orbax_async._storage.array_store import ArrayStore, holds_ocdbt, read_index
from orbax_async._storage.openers import open_directory
from orbax_async.handlers import kinds
from orbax_async.tree import keypath, rich, schema, structure
from orbax_async.tree.keypath import KeyPath

__all__ = ["StoredTree", "read_metadata"]

Entries = Iterable[tuple[KeyPath, Any]]

# What reading a document raises that has another form than it should.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)


class StoredTree:
    """The documents of a stored tree; every method blocks.

    Raises:
      InvalidLayoutError: there is no tree, or its document is damaged.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._files = open_directory(directory)
        data = files.read_bytes(os.path.join(directory, names.TREE_METADATA))
        if data is None:
            raise errors.InvalidLayoutError(
                f"{directory} holds no pytree: it has no {names.TREE_METADATA}"
            )
        index = read_index(self._files)
        try:
            self.tree = schema.TreeDocument.load(data)
        except _DAMAGED as error:
            raise errors.InvalidLayoutError(
                f"{os.path.join(directory, names.TREE_METADATA)} is damaged: {error!r}"
            ) from error
        self.uses_ocdbt = self.tree.uses_ocdbt
        if self.uses_ocdbt is None:
            self.uses_ocdbt = holds_ocdbt(self._files)
        self._index = index if self.uses_ocdbt else None
        if self.uses_ocdbt and self.arrays and not (index or holds_ocdbt(self._files)):
            raise errors.InvalidLayoutError(
                f"{directory} is damaged: {names.OCDBT_MANIFEST} is missing"
            )

    @functools.cached_property
    def arrays(self) -> list[schema.Entry]:
        """The leaves that are stored as arrays."""
        return [
            entry
            for entry in self.tree.entries
            if not entry.is_empty and entry.kind != schema.STRING
        ]

    def nest_for(self, options: ambient.Context) -> Callable[[Entries], Any]:
        """Returns what builds the tree: of plain containers, or of those that were recorded."""
        text = self.tree.rich
        if text is None or not options.pytree.saving.pytree_metadata_options.support_rich_types:
            return structure.nest

        def nest(entries: Entries) -> Any:
            try:
                return rich.nest(text, entries)
            except ValueError as error:
                raise errors.InvalidLayoutError(
                    f"the rich types in {os.path.join(self.directory, names.TREE_METADATA)} can't "
                    f"be used: {error}. Load without support_rich_types, or with an abstract tree."
                ) from error

        return nest

    def open_store(self) -> ArrayStore:
        """Opens the store of its arrays."""
        return ArrayStore(
            self._files,
            ocdbt=bool(self.uses_ocdbt),
            zarr3=self.tree.uses_zarr3,
            direct=self._index,
        )

    def documents(
        self, store: ArrayStore, entries: list[schema.Entry]
    ) -> dict[str, dict[str, Any]]:
        """Reads the zarr documents of some arrays, by stored name."""
        keys = [zarr.document_key(entry.name, zarr3=store.zarr3) for entry in entries]
        parsed: dict[bytes, dict[str, Any]] = {}  # few differ
        found = {}
        for entry, value in zip(entries, self._read_many(store, keys), strict=True):
            if value is None:
                raise errors.ReadError(
                    keypath.label(entry.keys),
                    f"its array {entry.name!r} is missing from {self.directory}",
                )
            data = bytes(value)
            document = parsed.get(data)
            if document is None:
                try:
                    document = parsed[data] = zarr.parse_document(data)
                except ValueError as error:
                    raise errors.CorruptDataError(
                        keypath.label(entry.keys),
                        f"the metadata of its array is damaged: {error}",
                    ) from error
            found[entry.name] = document
        return found

    def _read_many(self, store: ArrayStore, keys: list[str]) -> list[bytes | memoryview | None]:
        try:
            return store.read_many(keys)
        except Exception as error:
            text = str(error).split(" [source locations=")[0]
            raise errors.InvalidLayoutError(
                f"the array store of {self.directory} is damaged: {text}"
            ) from error

    def shardings(self) -> Mapping[str, Mapping[str, Any]]:
        """Reads where jax arrays were, by stored name."""
        data = files.read_bytes(os.path.join(self.directory, names.SHARDINGS))
        try:
            return {} if data is None else schema.load_shardings(data)
        except _DAMAGED as error:
            raise errors.InvalidLayoutError(
                f"{os.path.join(self.directory, names.SHARDINGS)} is damaged: {error}"
            ) from error

    def prng_impls(self) -> Mapping[str, str]:
        """Reads the implementations of typed keys, by stored name."""
        folder = os.path.join(self.directory, names.ARRAY_METADATAS)
        prefix = names.PROCESS_METADATA.format("")
        for entry in sorted(files.scan(folder), key=lambda entry: entry.name):
            if entry.name.removeprefix(prefix).isdigit():
                data = files.read_bytes(entry.path) or b""
                try:
                    return schema.load_array_metadatas(data)
                except _DAMAGED as error:
                    raise errors.InvalidLayoutError(f"{entry.path} is damaged: {error}") from error
        return {}

    def strings(self, wanted: list[schema.Entry]) -> dict[str, str]:
        """Reads some strings, by stored name."""
        path = os.path.join(self.directory, names.STRINGS)
        data = files.read_bytes(path)
        try:
            found = schema.load_strings(data or b"{}", [entry.name for entry in wanted])
        except ValueError as error:
            raise errors.InvalidLayoutError(f"{path} is damaged: {error}") from error
        for entry in wanted:
            if entry.name not in found:
                raise errors.ReadError(
                    keypath.label(entry.keys), f"its text is missing from {path}"
                )
        return found


def read_metadata(directory: str, options: ambient.Context) -> Any:
    """Returns the stored tree of a directory with the metadata of each leaf; blocks."""
    stored = StoredTree(directory)
    store = stored.open_store() if stored.arrays else None
    documents = {} if store is None else stored.documents(store, stored.arrays)
    sizes = {} if store is None else _sizes(store, {entry.name for entry in stored.arrays})
    shardings = stored.shardings()

    def leaf(entry: schema.Entry) -> Any:
        record = kinds.LeafRecord(entry, sharding=shardings.get(entry.name))
        document = documents.get(entry.name)
        if document is not None:
            record = record._replace(
                shape=tuple(document["shape"]),
                dtype=zarr.stored_dtype(document),
                storage=arrays.StorageMetadata(
                    zarr.chunk_shape(document), entry.write_shape, sizes.get(entry.name)
                ),
            )
        return kinds.of_stored(entry).describe(record)

    nest = stored.nest_for(options)
    return nest((entry.keys, leaf(entry)) for entry in stored.tree.entries)


def _sizes(store: ArrayStore, array_names: set[str]) -> dict[str, int]:
    """Returns the bytes that each array takes on disk, where the store's index tells."""
    sizes = dict.fromkeys(array_names, 0)
    for key, nbytes in store.sizes().items():
        name = zarr.array_of(key, array_names, zarr3=store.zarr3)
        if name is not None:
            sizes[name] += nbytes
    return {name: nbytes for name, nbytes in sizes.items() if nbytes}
