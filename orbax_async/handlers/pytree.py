"""Pytrees: the handler of states.

A save flattens and describes the tree, plans what this process writes, and hands the plan to the
pipeline; then it writes the documents that describe the tree. A load reads those documents,
matches them with the abstract tree, plans what this process reads, and rebuilds.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Awaitable
from typing import Any

import jax

from orbax_async import _names as names
from orbax_async import _operation, errors
from orbax_async import context as ambient
from orbax_async._engine import loop
from orbax_async._engine.save_pipeline import SavePipeline
from orbax_async._layouts.reader import layout_of
from orbax_async._operation import Operation
from orbax_async._storage import array_store
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.directory import Directory
from orbax_async._storage.local import open_directory
from orbax_async.handlers import read_plan, write_plan
from orbax_async.handlers.read_plan import AbstractTree, Loading, ShardingFunction
from orbax_async.handlers.write_plan import PreparedTree
from orbax_async.path import Path, PathAwaitingCreation
from orbax_async.tree.keypath import Select

__all__ = ["PyTreeHandler", "TreeWriter"]


class PyTreeHandler:
    """Saves and loads pytrees of arrays, scalars and strings.

    Example:
      A handler is used through `save` and `load`; by itself it writes one directory::

        committing = await PyTreeHandler().save(directory, state)
        await committing

    Args:
      context: the options to use, instead of those of the operation.
      partial_save_mode: whether what is saved is part of a tree. Its arrays then wait in a database
        that is not yet merged; `partial.finalize` makes it one that can be loaded.
    """

    def __init__(
        self, *, context: ambient.Context | None = None, partial_save_mode: bool = False
    ) -> None:
        self._context = context
        self._partial_save_mode = partial_save_mode

    # Saving.

    def flatten(self, state: Any) -> PreparedTree:
        """Takes a state apart and refuses what can't be stored; `save` accepts the result.

        Raises:
          UnsupportedLeafError: the state is empty, or holds leaves that can't be stored.
          DuplicateLeafError: two leaves would be stored under one name.
          StagingError: a jax array was deleted or donated.
        """
        if state is None:
            raise errors.UnsupportedLeafError("", "checkpointable must not be None for saving.")
        return write_plan.prepare(state, self._options())

    def validate_leaves_handleable(self, checkpointable: Any) -> None:
        """Raises what `save` would raise for a tree; returns None for a good one."""
        self.flatten(checkpointable)

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """Captures a state (tier 1) and returns what writes it (tier 2).

        Args:
          directory: where to; it may not exist before phase 2.
          checkpointable: a pytree, or what `flatten` made of it.
        """
        prepared = (
            checkpointable
            if isinstance(checkpointable, PreparedTree)
            else self.flatten(checkpointable)
        )
        operation = _operation.current("save")
        writer = TreeWriter(prepared, operation, is_part=self._partial_save_mode)
        pipeline = writer.pipeline
        await pipeline.capture()
        if pipeline.staged.is_set():
            return writer.run(directory)
        # Copies are limited: some have to be written before the others are made.
        running = operation.background(lambda: writer.run(directory))
        try:
            await pipeline.released.wait()
            # A tree that a user's handler passes on may be only a part of what that captures.
            if prepared is checkpointable:
                operation.release_caller(directory.path.name, is_captured=False)
            await pipeline.staged.wait()
        except BaseException:
            await running.cancel()
            raise
        if running.has_failed:
            await running.join()
        return running.join()

    # Loading.

    def validate_abstract_leaves_handleable(self, abstract_checkpointable: Any) -> None:
        """Raises AbstractLeafError for a tree that can't be asked for; returns None otherwise."""
        self.read_abstract(abstract_checkpointable)

    def read_abstract(
        self,
        abstract: Any,
        *,
        select: Select | None = None,
        sharding: jax.sharding.Sharding | ShardingFunction | None = None,
    ) -> AbstractTree:
        """Understands an abstract tree; `load` accepts the result. None asks for what is stored.

        Args:
          abstract: the tree.
          select: which leaves to load.
          sharding: of jax arrays of which the tree says none: one for all, or a function of key
            path, shape and dtype.

        Raises:
          AbstractLeafError: a leaf of it can't be loaded as anything.
          TypeError: `select` or `sharding` is something else.
          ValueError: a pattern of `select` is empty.
        """
        return read_plan.understand(abstract, select, sharding)

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
            if isinstance(abstract_checkpointable, AbstractTree)
            else self.read_abstract(abstract_checkpointable)
        )
        operation = _operation.current()
        loading = await loop.to_worker(
            Loading, os.fspath(directory), abstract, self._options(), operation
        )
        return loading.run()

    async def metadata(self, directory: Path) -> Any:
        """Returns the stored tree with each leaf's metadata, without reading array data."""
        options = self._options()

        def read() -> Any:
            layout = layout_of(open_directory(os.fspath(directory)), options)
            return read_plan.describe(layout.open_tree(), options)

        return await loop.to_worker(read)

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


class TreeWriter:
    """Writes one tree; the arrays of a part stay in databases of their own, to be merged later."""

    def __init__(
        self, prepared: PreparedTree, operation: Operation, *, is_part: bool = False
    ) -> None:
        self._plan, arrays, self._strings = prepared
        self._processes = operation.processes
        self._is_part = is_part
        limits = (operation.write_budget.limit_nbytes, operation.transfer_budget.limit_nbytes)
        batches = self._plan.batches(operation.processes, limits)
        # Whether what readers open is made of others, each in its own directory.
        is_divided = is_part or operation.processes.are_several or self._plan.is_separate
        self._is_divided = is_divided and self._plan.saving.use_ocdbt
        self.pipeline = SavePipeline(
            batches,
            arrays,
            write_budget=operation.write_budget,
            transfer_budget=operation.transfer_budget,
            recorder=operation.recorder,
            report=self._plan.reporter(batches),
        )

    async def run(self, directory: PathAwaitingCreation) -> None:
        """Writes arrays and documents; nothing is visible yet."""
        await self.pipeline.run(functools.partial(self._open_store, directory))
        await self._processes.gather(f"arrays of {directory.path.name} written")
        where = open_directory(await directory.await_creation())
        if self._processes.is_primary:
            await loop.to_worker(self._complete, where)

    async def _open_store(self, directory: PathAwaitingCreation, is_separate: bool) -> ArrayStore:
        where = open_directory(await directory.await_creation())
        saving = self._plan.saving
        if self._is_divided:
            name = names.PROCESS_REPLICA_DATABASE if is_separate else names.PROCESS_DATABASE
            where /= name.format(self._processes.index)
        create = functools.partial(
            ArrayStore.create,
            where,
            ocdbt=saving.use_ocdbt,
            zarr3=saving.use_zarr3,
            syncs=self._processes.are_several,
            target_data_file_nbytes=saving.ocdbt_target_data_file_size,
        )
        return await loop.to_worker(create)

    def _complete(self, where: Directory) -> None:
        """Merges the databases of several processes, and writes the documents."""
        if self._is_divided and not self._is_part:
            array_store.merge_process_databases(where)
            if self._plan.saving.enable_post_merge_validation:
                self._validate(where)
        documents = dict(self._plan.documents)
        if self._strings is not None:
            documents[names.STRINGS] = self._strings
        for name, data in documents.items():
            with errors.reported_as(errors.CommitError, f"cannot write {name} in {where.path}"):
                where.write(name, data)

    def _validate(self, where: Directory) -> None:
        """Checks that every array that was planned is in the merged store."""
        saving, arrays = self._plan.saving, self._plan.arrays
        if not arrays:
            return
        keys = ArrayStore(where, ocdbt=saving.use_ocdbt, zarr3=saving.use_zarr3).list_keys()
        for leaf in arrays:
            assert leaf.shape is not None
            sides = zip(leaf.shape, leaf.storage.chunk_shape, strict=True)
            grid = itertools.product(*[range(side // piece) for side, piece in sides])
            for key in [leaf.document_key, *map(leaf.chunk_key, grid)]:
                if key not in keys:
                    raise errors.WriteError(leaf.label, f"{key} is missing after the write")
