"""Pytrees: the handler of states.

A save flattens and describes the tree, plans what this process writes, and hands the plan to the
pipeline; then it writes the documents that describe the tree. A load reads those documents,
matches them with the abstract tree, plans what this process reads, and rebuilds.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Mapping
from typing import Any

import jax

from orbax_async import arrays, errors, multihost
from orbax_async import context as ambient
from orbax_async._engine import loop, plan
from orbax_async._engine.pipeline import LoadPipeline, SavePipeline, WritableLeaf
from orbax_async._storage import files, names, ocdbt, zarr
from orbax_async._storage.kvstore import ArrayStore, holds_ocdbt
from orbax_async.handlers import leaves, operation, targets
from orbax_async.handlers.leaves import SaveLeaf
from orbax_async.path import Path, PathAwaitingCreation
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.structure import FlatTree

__all__ = ["PyTreeHandler"]

# What reading a document raises that has another form than it should.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)


class PyTreeHandler:
    """Saves and loads pytrees of arrays, scalars and strings.

    Example:
      A handler is used through `save` and `load`; by itself it writes one directory::

        committing = await PyTreeHandler().save(directory, state)
        await committing

    Args:
      context: the options to use, instead of those of the operation.
    """

    def __init__(self, *, context: ambient.Context | None = None) -> None:
        self._context = context

    # Saving.

    def flatten(self, state: Any) -> PreparedTree:
        """Takes a state apart and refuses what can't be stored; `save` accepts the result.

        Raises:
          UnsupportedLeafError: the state is empty, or holds leaves that can't be stored.
          DuplicateLeafError: two leaves would be stored under one name.
          StagingError: a jax array was deleted or donated.
        """
        flat = structure.flatten(state)
        if state is None:
            raise errors.UnsupportedLeafError("", "checkpointable must not be None for saving.")
        if all(not keys for keys, _ in flat.entries) and (
            not flat.entries or structure.empty_kind(flat.entries[0][1]) is not None
        ):
            raise errors.UnsupportedLeafError(
                "", f"Found empty item. There is nothing to save in {state!r}."
            )
        options = self._options().array.saving
        processes = multihost.participants(self._options().multiprocessing.active_processes)
        described = leaves.describe_all(
            flat.entries, as_files=not options.use_ocdbt, are_several=len(processes) > 1
        )
        texts = {leaf.name: leaf.text for leaf in described if leaf.text is not None}
        try:
            strings = schema.dump_strings(texts) if texts else None
        except ValueError as error:
            raise errors.DuplicateLeafError(
                "", f"the string leaves can't be stored together: {error}; rename a key"
            ) from None
        return PreparedTree(described, strings)

    def validate_leaves_handleable(self, tree: Any) -> None:
        """Raises what `save` would raise for a tree; returns None for a good one."""
        self.flatten(tree)

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """Captures a state (tier 1) and returns what writes it (tier 2).

        Args:
          directory: where to; it may not exist before tier 2.
          checkpointable: a pytree, or what `flatten` made of it.
        """
        prepared = (
            checkpointable
            if isinstance(checkpointable, PreparedTree)
            else self.flatten(checkpointable)
        )
        doing = operation.current(is_joint=True)
        saving = _Saving(prepared.leaves, prepared.strings, self._options(), doing)
        running = loop.Background(lambda: saving.run(directory))
        try:
            await saving.pipeline.staged.wait()
        except BaseException:
            await running.cancel()
            raise
        if running.has_failed:
            await running.join()
        return running.join()

    # Loading.

    def validate_abstract_leaves_handleable(self, tree: Any) -> None:
        """Raises AbstractLeafError for a tree that can't be asked for; returns None otherwise."""
        self.read_abstract(tree)

    def read_abstract(self, abstract: Any) -> AbstractTree | None:
        """Understands an abstract tree; `load` accepts the result. None asks for what is stored.

        Raises:
          AbstractLeafError: a leaf of it can't be loaded as anything.
        """
        if abstract is None:
            return None
        flat = structure.flatten(abstract)
        wanted, refused = [], []
        for keys, leaf in flat.entries:
            try:
                wanted.append(targets.want(keys, leaf))
            except errors.LeafError as error:
                refused.append(error)
        if refused:
            raise leaves.summary(refused)
        return AbstractTree(flat, wanted)

    async def load(
        self, directory: Path, abstract_checkpointable: Any | None = None
    ) -> Awaitable[Any]:
        """Reads what is stored and matches it with the abstract tree; returns what loads it.

        Raises:
          InvalidLayoutError: the directory holds no pytree, or its documents are damaged.
          TreeMismatchError: the trees differ.
          ShapeMismatchError, DtypeMismatchError: a leaf can't be loaded as asked.
        """
        abstract = (
            abstract_checkpointable
            if isinstance(abstract_checkpointable, AbstractTree | None)
            else self.read_abstract(abstract_checkpointable)
        )
        doing = operation.current()
        loading = await loop.to_worker(
            _Loading, os.fspath(directory), abstract, self._options(), doing
        )
        return loading.run()

    async def metadata(self, directory: Path) -> Any:
        """Returns the stored tree with each leaf's metadata, without reading array data."""
        return await loop.to_worker(_read_metadata, os.fspath(directory))

    def is_handleable(self, checkpointable: Any) -> bool:
        """Says whether every leaf of a tree can be stored."""
        try:
            self.flatten(checkpointable)
        except errors.LeafError:
            return False
        return True

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Says whether every leaf of an abstract tree can be loaded as something."""
        try:
            self.read_abstract(abstract_checkpointable)
        except errors.LeafError:
            return False
        return True

    def _options(self) -> ambient.Context:
        return self._context or ambient.current()


class PreparedTree:
    """A state whose leaves are described: what tier 1 starts from."""

    def __init__(self, described: list[SaveLeaf], strings: bytes | None) -> None:
        self.leaves = described
        self.strings = strings


class AbstractTree:
    """An abstract tree whose leaves are understood."""

    def __init__(self, flat: FlatTree, wanted: list[targets.Wanted]) -> None:
        self.flat = flat
        self.wanted = wanted


class _Saving:
    """One save of one tree."""

    def __init__(
        self,
        described: list[SaveLeaf],
        strings: bytes | None,
        options: ambient.Context,
        doing: operation.Operation,
    ) -> None:
        self._described = described
        self._strings = strings
        self._options = options
        self._processes = doing.processes
        saving, memory = options.array.saving, options.memory
        self._stored = [leaf for leaf in described if leaf.array is not None]
        primary = doing.processes.primary or 0
        is_prioritized = memory.is_prioritized_key_fn
        specs = [
            leaf.spec(
                index,
                host_process=primary,
                is_prioritized=is_prioritized is not None and bool(is_prioritized(_path(leaf))),
            )
            for index, leaf in enumerate(self._stored)
        ]
        policy = _replica_parallel(options)
        self._write_shapes = [plan.write_shape(spec, policy) for spec in specs]
        self.pipeline = SavePipeline(
            [
                WritableLeaf(
                    label=leaf.label,
                    name=leaf.name,
                    source=leaf.source(
                        use_pinned_host=saving.enable_pinned_host_transfer,
                        copies_host_arrays=memory.deepcopy_host_arrays,
                    ),
                    shape=leaf.shape,
                    chunk_shape=write_shape,
                    dtype=leaf.dtype,
                    may_compress=saving.use_compression,
                    min_saving=saving.compression_min_saving,
                )
                for leaf, write_shape in zip(self._stored, self._write_shapes, strict=True)
            ],
            plan.plan_writes(specs, process=doing.processes.index, policy=policy),
            writes_documents=doing.processes.is_primary,
            may_sample=not doing.processes.are_several,
            zarr3=saving.use_zarr3,
            write_limit=memory.write_concurrent_bytes,
            transfer_limit=memory.transfer_concurrent_bytes,
            recorder=doing.recorder,
        )

    async def run(self, directory: PathAwaitingCreation) -> None:
        """Writes arrays and documents; nothing is visible yet."""
        saving = self._options.array.saving
        await self.pipeline.run(lambda: self._open_store(directory))
        await self._processes.gather(f"arrays of {directory.path.name} written")
        path = os.fspath(await directory.await_creation())
        if self._processes.are_several and self._processes.is_primary and saving.use_ocdbt:
            await loop.to_worker(ocdbt.merge_process_databases, path)
        if self._processes.is_primary:
            await loop.to_worker(self._write_documents, path)
            if saving.enable_post_merge_validation:
                await loop.to_worker(self._validate, path)

    async def _open_store(self, directory: PathAwaitingCreation) -> ArrayStore:
        path = os.fspath(await directory.await_creation())
        saving = self._options.array.saving
        if saving.use_ocdbt and self._processes.are_several:
            path = os.path.join(path, names.PROCESS_DATABASE.format(self._processes.index))
        return await loop.to_worker(
            lambda: ArrayStore(
                path,
                ocdbt=saving.use_ocdbt,
                zarr3=saving.use_zarr3,
                create=True,
                syncs=self._processes.are_several,
                target_data_file_nbytes=saving.ocdbt_target_data_file_size,
            )
        )

    def _write_documents(self, path: str) -> None:
        saving = self._options.array.saving
        jax_leaves = [
            (leaf, shape)
            for leaf, shape in zip(self._stored, self._write_shapes, strict=True)
            if isinstance(leaf.array, jax.Array)
        ]
        write_shapes = {leaf.name: shape for leaf, shape in jax_leaves}
        records_arrays = saving.array_metadata_store is not None
        tree = schema.TreeDocument(
            entries=tuple(
                schema.Entry(
                    leaf.keys,
                    leaf.kind,
                    write_shapes.get(leaf.name) if records_arrays else None,
                    leaf.private,
                )
                for leaf in self._described
            ),
            uses_zarr3=saving.use_zarr3,
            uses_ocdbt=saving.use_ocdbt,
        )
        documents = {names.TREE_METADATA: tree.dump()}
        if self._strings is not None:
            documents[names.STRINGS] = self._strings
        if jax_leaves and saving.enable_write_sharding_file:
            documents[names.SHARDINGS] = schema.dump_shardings(
                {
                    leaf.name: arrays.sharding_document(leaf.array.sharding)
                    for leaf, _ in jax_leaves
                    if isinstance(leaf.array, jax.Array)
                }
            )
        if jax_leaves and records_arrays:
            name = os.path.join(names.ARRAY_METADATAS, names.PROCESS_METADATA.format(0))
            documents[name] = schema.dump_array_metadatas(
                (leaf.name, shape, shape, leaf.prng_impl) for leaf, shape in jax_leaves
            )
        try:
            for name, data in documents.items():
                files.write_bytes(os.path.join(path, name), data)
        except OSError as error:
            raise errors.CommitError(
                f"cannot write {name} in {path}: {error.strerror or error}"
            ) from error

    def _validate(self, path: str) -> None:
        """Checks that every array that was planned is in the merged store."""
        saving = self._options.array.saving
        if not self._stored:
            return
        store = ArrayStore(path, ocdbt=saving.use_ocdbt, zarr3=saving.use_zarr3)
        keys = store.list_keys()
        for leaf, write_shape in zip(self._stored, self._write_shapes, strict=True):
            expected = [zarr.document_key(leaf.name, zarr3=saving.use_zarr3)]
            if 0 not in leaf.shape:
                grid = [side // piece for side, piece in zip(leaf.shape, write_shape, strict=True)]
                ends = ([0] * len(grid), [count - 1 for count in grid])
                expected += [
                    zarr.chunk_key(leaf.name, index, zarr3=saving.use_zarr3) for index in ends
                ]
            for key in expected:
                if key not in keys:
                    raise errors.WriteError(leaf.label, f"{key} is missing after the write")


def _path(leaf: SaveLeaf) -> tuple[Any, ...]:
    """Returns a key path in jax's own classes, as callbacks of the options expect it."""
    return tuple(
        jax.tree_util.SequenceKey(int(key.name))
        if key.is_index
        else jax.tree_util.DictKey(key.name)
        for key in leaf.keys
    )


def _replica_parallel(options: ambient.Context) -> plan.ReplicaParallel | None:
    saving = options.array.saving
    is_on = saving.use_replica_parallel
    if is_on is None:
        is_on = jax.default_backend() != "gpu"
    if not is_on:
        return None
    return plan.ReplicaParallel(
        min_slice_nbytes=saving.min_slice_bytes_for_replica_parallel,
        max_replicas=saving.max_replicas_for_replica_parallel,
    )


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

    def open_store(self) -> ArrayStore:
        return ArrayStore(self.directory, ocdbt=bool(self.uses_ocdbt), zarr3=self.tree.uses_zarr3)

    def documents(
        self, store: ArrayStore, entries: list[schema.Entry]
    ) -> dict[str, dict[str, Any]]:
        """Reads the zarr documents of some arrays, by stored name."""
        keys = [zarr.document_key(entry.name, zarr3=store.zarr3) for entry in entries]
        parsed: dict[bytes, dict[str, Any]] = {}
        found = {}
        for entry, data in zip(entries, self._read_many(store, keys), strict=True):
            label = keypath.label(entry.keys)
            if data is None:
                raise errors.ReadError(
                    label, f"its array {entry.name!r} is missing from {self.directory}"
                )
            try:
                if data not in parsed:
                    parsed[data] = zarr.parse_document(data)
            except ValueError as error:
                raise errors.CorruptDataError(
                    label, f"the metadata of its array is damaged: {error}"
                ) from error
            found[entry.name] = parsed[data]
        return found

    def _read_many(self, store: ArrayStore, keys: list[str]) -> list[bytes | None]:
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


class _Loading:
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
        self._leaves: dict[int, targets.LoadLeaf] = {}
        self._pipeline: LoadPipeline | None = None
        if not to_load:
            return
        store = stored.open_store()
        documents = stored.documents(store, [entry for _, entry, _ in to_load])
        shardings = stored.shardings()
        impls = stored.prng_impls()
        refused: list[errors.LeafError] = []
        for index, entry, wanted in to_load:
            try:
                self._leaves[index] = targets.resolve(
                    index,
                    entry,
                    documents[entry.name],
                    wanted,
                    saved_sharding=shardings.get(entry.name),
                    prng_impl=impls.get(entry.name),
                    process=doing.processes.index,
                    enable_x64=doing.enable_x64,
                )
            except errors.LeafError as error:
                refused.append(error)
        if refused:
            raise leaves.summary(refused)
        specs = [leaf.spec for leaf in self._leaves.values()]
        self._pipeline = LoadPipeline(
            {index: leaf.readable for index, leaf in self._leaves.items()},
            plan.plan_reads(specs, process=doing.processes.index),
            store,
            read_limit=options.memory.read_concurrent_bytes,
            recorder=doing.recorder,
        )

    async def run(self) -> Any:
        """Reads the data and rebuilds the tree."""
        if self._pipeline is not None:
            await self._pipeline.run()
        return await loop.to_worker(self._finish)

    def _finish(self) -> Any:
        for index, leaf in self._leaves.items():
            assert self._pipeline is not None
            self._values[index] = leaf.finish(self._pipeline.pieces[index])
        if self._abstract is not None:
            return self._abstract.flat.rebuild(self._values)
        return structure.nest(
            (entry.keys, value)
            for entry, value in zip(self._entries, self._values, strict=True)
            if entry is not None
        )


def _read_metadata(directory: str) -> Any:
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

    return structure.nest((entry.keys, leaf(entry)) for entry in stored.tree.entries)
