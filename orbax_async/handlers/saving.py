"""Writing a tree: what is planned for each leaf, and the documents that describe them all."""

from __future__ import annotations

import os
from typing import Any

import jax

from orbax_async import arrays, errors
from orbax_async import context as ambient
from orbax_async._engine import loop, plan
from orbax_async._engine.pipeline import SavePipeline, WritableLeaf
from orbax_async._storage import files, names, ocdbt, zarr
from orbax_async._storage.kvstore import ArrayStore
from orbax_async.handlers import operation
from orbax_async.handlers.leaves import SaveLeaf
from orbax_async.path import PathAwaitingCreation
from orbax_async.tree import schema

__all__ = ["PreparedTree", "Saving"]


class PreparedTree:
    """A state whose leaves are described: what tier 1 starts from."""

    def __init__(self, described: list[SaveLeaf], strings: bytes | None) -> None:
        self.leaves = described
        self.strings = strings


class Saving:
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
