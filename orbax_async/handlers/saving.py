"""Writing a tree: what is planned for each leaf, and the documents that describe them all."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax

from orbax_async import _names as names
from orbax_async import _operation as operation
from orbax_async import arrays, errors, multihost
from orbax_async import context as ambient
from orbax_async._engine import loop, plan, transfer
from orbax_async._engine.save_pipeline import (
    SavePipeline,
    WritableLeaf,
    WriteForm,
    WritePlan,
    encoding_of,
)
from orbax_async._storage import array_store, files, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.openers import open_directory
from orbax_async.handlers import ordering, storing
from orbax_async.handlers.forms import PreparedTree
from orbax_async.handlers.leaves import LeafForm
from orbax_async.handlers.storing import Stored
from orbax_async.path import PathAwaitingCreation
from orbax_async.tree import rich, schema

__all__ = ["Saving"]

_BATCH_NBYTES = 128 << 20  # half as much of what is not raw


class _Alike(NamedTuple):
    """What is decided once for leaves that are alike.

    Attributes:
      form: how they are written.
      itemsize: bytes of an element, of its values or on disk: of those that are more.
      shards: each device's part of such an array.
      write_shape: the shape of the pieces that are written.
      is_separate: whether replicas write a part each, to a database of their own.
    """

    form: WriteForm
    itemsize: int
    shards: tuple[plan.ShardSpec, ...]
    write_shape: tuple[int, ...]
    is_separate: bool


def _decide(
    leaf: LeafForm,
    how: Stored,
    options: ambient.Context,
    processes: multihost.Processes,
    policy: plan.ReplicaParallel | None,
) -> _Alike:
    assert leaf.shape is not None
    saving = options.array.saving
    shards = leaf.shards(processes.primary or 0)
    # A cast may need more bytes than the values that it starts from, or fewer.
    itemsize = max(leaf.dtype.itemsize, how.dtype.itemsize)
    spec = plan.LeafSpec(0, leaf.shape, itemsize, shards)
    write_shape = plan.write_shape(spec, policy)
    chunk_shape = how.chunk_shape(leaf.shape, write_shape)
    form = WriteForm(
        shape=leaf.shape,
        chunk_shape=chunk_shape,
        dtype=how.dtype,
        cast=how.cast,
        mode=transfer.capture_mode(
            leaf.sharding,
            is_mutable=leaf.is_mutable and options.memory.deepcopy_host_arrays,
            use_pinned_host=saving.enable_pinned_host_transfer,
        ),
        has_one_shard=len(shards) == 1,
        encoding=encoding_of(
            chunk_shape,
            how.dtype,
            may_compress=saving.use_compression,
            min_saving=saving.compression_min_saving,
            may_sample=not processes.are_several,
        ),
        min_saving=saving.compression_min_saving,
    )
    is_separate = (
        saving.use_ocdbt
        and saving.enable_replica_parallel_separate_folder
        and write_shape != plan.write_shape(spec, None)
    )
    return _Alike(form, itemsize, shards, write_shape, is_separate)


class _Plan:
    """What a save of one form writes under given options: arrays, and documents about them."""

    def __init__(
        self,
        prepared: PreparedTree,
        stored: list[Stored],
        options: ambient.Context,
        processes: multihost.Processes,
        batch_nbytes: int,
        is_limited: bool,
    ) -> None:
        self._form = prepared.form
        self._stored = stored
        self._options = options
        self._containers: Any = None
        self._empty_named_tuples: frozenset[int] = frozenset()
        if _supports_rich_types(options):
            self._containers, self._empty_named_tuples = rich.describe(prepared.state)
        saving = options.array.saving
        policy = _replica_parallel(options)
        prioritized = ordering.prioritized(prepared, options.memory.is_prioritized_key_fn)
        leaves: list[WritableLeaf] = []
        specs: list[plan.LeafSpec] = []
        self.write_shapes: list[tuple[int, ...]] = []
        self.separate: set[int] = set()
        decided: dict[Hashable, _Alike] = {}
        for index, (leaf, how) in enumerate(zip(self._form.arrays, stored, strict=True)):
            kind = (leaf.shape, leaf.dtype, leaf.sharding, leaf.is_mutable, how.kind)
            alike = decided.get(kind)
            if alike is None:
                alike = decided[kind] = _decide(leaf, how, options, processes, policy)
            delay = prepared.delays.get(index, 0)
            specs.append(
                plan.LeafSpec(
                    index,
                    alike.form.shape,
                    alike.itemsize,
                    alike.shards,
                    index in prioritized,
                    delay,
                )
            )
            leaves.append(WritableLeaf(leaf.keys, leaf.name, alike.form))
            self.write_shapes.append(alike.write_shape)
            if alike.is_separate:
                self.separate.add(index)
        requests = plan.plan_writes(specs, process=processes.index, policy=policy)
        if self.separate:  # so that few batches are mixed; prioritized leaves still come first
            requests.sort(key=lambda each: (each.priority, each.leaf in self.separate))
        self.arrays = WritePlan(
            leaves,
            requests,
            batch_nbytes=batch_nbytes,
            is_limited=is_limited,
            writes_documents=processes.is_primary,
            zarr3=saving.use_zarr3,
            separate=self.separate,
        )

    @functools.cached_property
    def documents(self) -> dict[str, bytes]:
        """The documents that describe the tree, by file name."""
        saving = self._options.array.saving
        chunk_shapes = [leaf.form.chunk_shape for leaf in self.arrays.leaves]
        of_arrays = zip(self._form.arrays, self.write_shapes, chunk_shapes, strict=True)
        jax_leaves = [each for each in of_arrays if each[0].sharding is not None]
        write_shapes = {leaf.name: shape for leaf, shape, _ in jax_leaves}
        private = {
            leaf.name: how.private
            for leaf, how in zip(self._form.arrays, self._stored, strict=True)
        }
        records_arrays = saving.array_metadata_store is not None
        tree = schema.TreeDocument(
            entries=tuple(
                schema.Entry(
                    leaf.keys,
                    rich.EMPTY_NAMED_TUPLE if at in self._empty_named_tuples else leaf.kind,
                    leaf.name,
                    write_shapes.get(leaf.name) if records_arrays else None,
                    private.get(leaf.name, {}) if leaf.shape is not None else {},
                )
                for at, leaf in enumerate(self._form.leaves)
            ),
            containers=self._containers,
            uses_zarr3=saving.use_zarr3,
            uses_ocdbt=saving.use_ocdbt,
        )
        documents = {names.TREE_METADATA: tree.dump()}
        if jax_leaves and saving.enable_write_sharding_file:
            describe = functools.cache(arrays.sharding_document)
            documents[names.SHARDINGS] = schema.dump_shardings(
                {leaf.name: describe(leaf.sharding) for leaf, _, _ in jax_leaves}
            )
        if jax_leaves and records_arrays:
            name = os.path.join(names.ARRAY_METADATAS, names.PROCESS_METADATA.format(0))
            documents[name] = schema.dump_array_metadatas(
                (leaf.name, write_shape, chunk_shape, leaf.prng_impl)
                for leaf, write_shape, chunk_shape in jax_leaves
            )
        return documents


def _planned(prepared: PreparedTree, options: ambient.Context, doing: operation.Operation) -> _Plan:
    """Returns the plan of a save; the same for the same options, unless they hold a callback."""
    form, saving, memory = prepared.form, options.array.saving, options.memory
    processes = doing.processes
    budgets = (doing.write_budget, doing.transfer_budget)
    limits = [limit for each in budgets if (limit := each.statistics().limit_nbytes) is not None]
    # Within a limit in smaller steps: one batch is filled while another is being written.
    batch_nbytes = min([_BATCH_NBYTES // 2, *limits]) if limits else _BATCH_NBYTES
    stored = prepared.stored or storing.choose(prepared, saving)
    if (
        memory.is_prioritized_key_fn is not None
        or saving.scoped_storage_options_creator is not None
        or memory.serialization_status_callback is not None
    ):
        return _Plan(prepared, stored, options, processes, batch_nbytes, bool(limits))
    key = (
        (processes.index, processes.primary, processes.are_several, processes.is_primary),
        repr(saving),
        _supports_rich_types(options),
        batch_nbytes,
        bool(limits),
        memory.deepcopy_host_arrays,
    )
    found: _Plan | None = form.plans.get(key)
    if found is None:
        form.plans.clear()  # whoever changes options seldom changes them back
        found = form.plans[key] = _Plan(
            prepared, stored, options, processes, batch_nbytes, bool(limits)
        )
    return found


class Saving:
    """One save of one tree.

    Args:
      prepared: the tree.
      options: how to save it.
      doing: the operation that it belongs to.
      is_part: whether its arrays stay in databases of their own, to be merged later.
    """

    def __init__(
        self,
        prepared: PreparedTree,
        options: ambient.Context,
        doing: operation.Operation,
        *,
        is_part: bool = False,
    ) -> None:
        self._is_part = is_part
        self._form = prepared.form
        self._strings = prepared.strings
        self._options = options
        self._processes = doing.processes
        self._plan = _planned(prepared, options, doing)
        self.pipeline = SavePipeline(
            self._plan.arrays,
            prepared.arrays,
            write_budget=doing.write_budget,
            transfer_budget=doing.transfer_budget,
            recorder=doing.recorder,
            reporter=ordering.reporter(
                prepared, options.memory.serialization_status_callback, self._plan.arrays.pieces
            ),
            may_delay=ordering.may_delay(options.memory),
        )

    async def run(self, directory: PathAwaitingCreation) -> None:
        """Writes arrays and documents; nothing is visible yet."""
        saving = self._options.array.saving
        await self.pipeline.run(lambda is_separate: self._open_store(directory, is_separate))
        await self._processes.gather(f"arrays of {directory.path.name} written")
        path = os.fspath(await directory.await_creation())
        if not self._processes.is_primary:
            return
        if self._is_divided and not self._is_part:
            await loop.to_worker(array_store.merge_process_databases, open_directory(path))
            if saving.enable_post_merge_validation:
                await loop.to_worker(self._validate, path)
        await loop.to_worker(self._write_documents, path)

    @property
    def _is_divided(self) -> bool:
        """Whether the database that readers open is made of others, each in its own directory."""
        is_divided = self._processes.are_several or bool(self._plan.separate) or self._is_part
        return is_divided and self._options.array.saving.use_ocdbt

    async def _open_store(self, directory: PathAwaitingCreation, is_separate: bool) -> ArrayStore:
        path = os.fspath(await directory.await_creation())
        saving = self._options.array.saving
        if self._is_divided:
            name = names.PROCESS_REPLICA_DATABASE if is_separate else names.PROCESS_DATABASE
            path = os.path.join(path, name.format(self._processes.index))
        return await loop.to_worker(
            lambda: ArrayStore.create(
                open_directory(path),
                ocdbt=saving.use_ocdbt,
                zarr3=saving.use_zarr3,
                syncs=self._processes.are_several,
                target_data_file_nbytes=saving.ocdbt_target_data_file_size,
            )
        )

    def _write_documents(self, path: str) -> None:
        documents = dict(self._plan.documents)
        if self._strings is not None:
            documents[names.STRINGS] = self._strings
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
        if not self._form.arrays:
            return
        store = ArrayStore(open_directory(path), ocdbt=saving.use_ocdbt, zarr3=saving.use_zarr3)
        keys = store.list_keys()
        for leaf in self._plan.arrays.leaves:
            expected = [zarr.document_key(leaf.name, zarr3=saving.use_zarr3)]
            grid = [
                range(side // piece)
                for side, piece in zip(leaf.form.shape, leaf.form.chunk_shape, strict=True)
            ]
            expected += [
                zarr.chunk_key(leaf.name, index, zarr3=saving.use_zarr3)
                for index in itertools.product(*grid)
            ]
            for key in expected:
                if key not in keys:
                    raise errors.WriteError(leaf.label, f"{key} is missing after the write")


def _supports_rich_types(options: ambient.Context) -> bool:
    return options.pytree.saving.pytree_metadata_options.support_rich_types


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
