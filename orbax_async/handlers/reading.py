"""Reading a stored tree: its documents, what is asked of it, and its arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orbax_async import arrays, errors
from orbax_async import context as ambient
from orbax_async._engine import loop, plan
from orbax_async._engine.load_pipeline import LoadPipeline, ReadableLeaf
from orbax_async._storage import files, names, zarr
from orbax_async._storage.kvstore import ArrayStore, holds_ocdbt
from orbax_async.handlers import leaves, operation, targets
from orbax_async.tree import keypath, rich, schema, structure
from orbax_async.tree.keypath import KeyPath
from orbax_async.tree.structure import FlatTree

__all__ = ["AbstractTree", "Loading", "read_metadata"]

_BATCH_NBYTES = 64 << 20

Entries = Iterable[tuple[KeyPath, Any]]

# What reading a document raises that has another form than it should.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)


class AbstractTree:
    """An abstract tree whose leaves are understood."""

    def __init__(self, flat: FlatTree, wanted: list[targets.Wanted]) -> None:
        self.flat = flat
        self.wanted = wanted


class _Stored:
    """The documents of a stored tree, read and parsed."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        data = files.read_bytes(os.path.join(directory, names.TREE_METADATA))
        if data is None:
            raise errors.InvalidLayoutError(
                f"{directory} holds no pytree: it has no {names.TREE_METADATA}"
            )
        try:
            self.tree = schema.TreeDocument.load(data)
        except _DAMAGED as error:
            raise errors.InvalidLayoutError(
                f"{os.path.join(directory, names.TREE_METADATA)} is damaged: {error!r}"
            ) from error
        self.uses_ocdbt = self.tree.uses_ocdbt
        if self.uses_ocdbt is None:
            self.uses_ocdbt = holds_ocdbt(directory)
        self.arrays = [
            entry
            for entry in self.tree.entries
            if not entry.is_empty and entry.kind != schema.STRING
        ]
        if self.arrays and self.uses_ocdbt and not holds_ocdbt(directory):
            raise errors.InvalidLayoutError(
                f"{directory} is damaged: {names.OCDBT_MANIFEST} is missing"
            )

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
        return ArrayStore(self.directory, ocdbt=bool(self.uses_ocdbt), zarr3=self.tree.uses_zarr3)

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
        data = files.read_bytes(os.path.join(self.directory, names.SHARDINGS))
        try:
            return {} if data is None else schema.load_shardings(data)
        except _DAMAGED as error:
            raise errors.InvalidLayoutError(
                f"{os.path.join(self.directory, names.SHARDINGS)} is damaged: {error}"
            ) from error

    def prng_impls(self) -> Mapping[str, str]:
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


class Loading:
    """One load of one tree; building it reads documents, so it is built on a worker."""

    def __init__(
        self,
        directory: str,
        abstract: AbstractTree | None,
        options: ambient.Context,
        doing: operation.Operation,
    ) -> None:
        self._abstract = abstract
        stored = _Stored(directory)
        by_keys = {entry.keys: entry for entry in stored.tree.entries}
        pairs: list[tuple[schema.Entry | None, targets.Wanted]]
        if abstract is None:
            pairs = [(entry, targets.STORED) for entry in stored.tree.entries]
        else:
            found = structure.match(
                abstract.flat,
                by_keys,
                where=directory,
                is_stored_empty=lambda entry: bool(entry.is_empty),
            )
            pairs = list(zip(found, abstract.wanted, strict=True))
        self._nest = stored.nest_for(options)
        self._entries = [entry for entry, _ in pairs]
        self._values: list[Any] = [wanted.original for _, wanted in pairs]
        to_load: list[tuple[int, schema.Entry, targets.Wanted]] = []
        texts: list[tuple[int, schema.Entry]] = []
        for index, (entry, wanted) in enumerate(pairs):
            if entry is None or wanted.form == "skip":
                continue
            if entry.is_empty:
                self._values[index] = entry.empty_value()
            elif entry.kind == schema.STRING:
                if wanted.form not in ("string", "stored"):
                    raise errors.DtypeMismatchError(
                        keypath.label(entry.keys),
                        "the checkpoint holds a str, and something else was asked for",
                    )
                texts.append((index, entry))
            else:
                to_load.append((index, entry, wanted))
        strings = stored.strings([entry for _, entry in texts]) if texts else {}
        for index, entry in texts:
            self._values[index] = strings[entry.name]
        self._targets: dict[int, targets.Target] = {}
        self._pipeline: LoadPipeline | None = None
        if not to_load:
            return
        store = stored.open_store()
        documents = stored.documents(store, [entry for _, entry, _ in to_load])
        needs_shardings = any(
            wanted.form == "stored" or (wanted.form == "jax" and wanted.sharding is None)
            for _, _, wanted in to_load
        )
        shardings = stored.shardings() if needs_shardings else {}
        # Typed keys are stored as uint32; nothing else needs the records of arrays.
        distinct = {id(document): document for document in documents.values()}.values()
        may_hold_keys = any(zarr.stored_dtype(each).name == "uint32" for each in distinct)
        impls = stored.prng_impls() if may_hold_keys else {}
        alike: dict[Any, targets.Target] = {}
        refused: list[errors.LeafError] = []
        for index, entry, wanted in to_load:
            document, saved = documents[entry.name], shardings.get(entry.name)
            impl = impls.get(entry.name)
            private = tuple(sorted(entry.private.items())) if entry.private else ()
            key = (id(document), id(wanted), id(saved), entry.kind, impl, private)
            target = alike.get(key)
            if target is None:
                try:
                    target = alike[key] = targets.resolve(
                        entry,
                        document,
                        wanted,
                        saved_sharding=saved,
                        prng_impl=impl,
                        process=doing.processes.index,
                        enable_x64=doing.enable_x64,
                    )
                except errors.LeafError as error:
                    refused.append(error)
                    continue
            self._targets[index] = target
        if refused:
            raise leaves.summary(refused)
        limit = options.memory.read_concurrent_bytes
        self._pipeline = LoadPipeline(
            {
                index: ReadableLeaf(entry.keys, entry.name, self._targets[index].form)
                for index, entry, _ in to_load
            },
            [
                plan.ReadRequest(index, region, region.nbytes)
                for index, target in self._targets.items()
                for region in target.regions
            ],
            store,
            batch_nbytes=_BATCH_NBYTES if limit is None else min(limit, _BATCH_NBYTES),
            read_budget=doing.read_budget,
            recorder=doing.recorder,
        )

    async def run(self) -> Any:
        """Reads the data and rebuilds the tree."""
        if self._pipeline is not None:
            await self._pipeline.run()
        return await loop.to_worker(self._finish)

    def _finish(self) -> Any:
        for index, target in self._targets.items():
            assert self._pipeline is not None
            entry = self._entries[index]
            assert entry is not None
            self._values[index] = target.finish(entry, self._pipeline.pieces[index])
        if self._abstract is not None:
            return self._abstract.flat.rebuild(self._values)
        return self._nest(
            (entry.keys, value)
            for entry, value in zip(self._entries, self._values, strict=True)
            if entry is not None
        )


def read_metadata(directory: str, options: ambient.Context) -> Any:
    """Returns the stored tree of a directory with the metadata of each leaf; blocks."""
    stored = _Stored(directory)
    documents = stored.documents(stored.open_store(), stored.arrays) if stored.arrays else {}
    shardings = stored.shardings()

    def leaf(entry: schema.Entry) -> Any:
        if entry.is_empty:
            return entry.empty_value()
        if entry.kind == schema.STRING:
            return "string"
        document = documents[entry.name]
        dtype = zarr.stored_dtype(document)
        shape = tuple(document["shape"])
        if entry.kind == schema.SCALAR:
            return {"b": False, "i": 0, "u": 0, "c": 0j}.get(dtype.kind, 0.0)
        chunk_shape = zarr.chunk_shape(document)
        if entry.kind != schema.JAX_ARRAY:
            return arrays.NumpyMetadata(shape, dtype, arrays.StorageMetadata(chunk_shape))
        saved = shardings.get(entry.name)
        return arrays.ArrayMetadata(
            shape,
            dtype,
            None if saved is None else arrays.ShardingMetadata(saved),
            arrays.StorageMetadata(chunk_shape, entry.write_shape),
        )

    nest = stored.nest_for(options)
    return nest((entry.keys, leaf(entry)) for entry in stored.tree.entries)
