"""Writing a tree: its arrays by the pipeline, and then the documents that describe them."""

from __future__ import annotations

import itertools
from collections import Counter

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._engine import loop
from orbax_async._engine.save_pipeline import SavePipeline
from orbax_async._operation import Operation
from orbax_async._storage import array_store
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.directory import Directory
from orbax_async._storage.local import open_directory
from orbax_async.handlers.status import StatusReporter
from orbax_async.handlers.write_plan import PreparedTree
from orbax_async.path import PathAwaitingCreation

__all__ = ["TreeWriter"]


class TreeWriter:
    """Writes one tree.

    Args:
      prepared: the tree.
      operation: the one that it belongs to.
      is_part: whether its arrays stay in databases of their own, to be merged later.
    """

    def __init__(
        self, prepared: PreparedTree, operation: Operation, *, is_part: bool = False
    ) -> None:
        self._plan = plan = prepared.plan
        self._strings = prepared.strings
        self._processes = operation.processes
        self._is_part = is_part
        limits = (operation.write_budget.limit_nbytes, operation.transfer_budget.limit_nbytes)
        batches = plan.batches(operation.processes, limits)
        report = None
        if plan.status_callback is not None:
            pieces = Counter(request.leaf for batch in batches for request in batch.requests)
            report = StatusReporter(plan.status_callback, plan.paths, pieces)
        # Whether what readers open is made of others, each in its own directory.
        is_divided = is_part or operation.processes.are_several
        is_divided |= any(batch.is_separate for batch in batches)
        self._is_divided = is_divided and plan.saving.use_ocdbt
        self.pipeline = SavePipeline(
            batches,
            prepared.arrays,
            write_budget=operation.write_budget,
            transfer_budget=operation.transfer_budget,
            recorder=operation.recorder,
            report=report,
        )

    async def run(self, directory: PathAwaitingCreation) -> None:
        """Writes arrays and documents; nothing is visible yet."""
        await self.pipeline.run(lambda is_separate: self._open_store(directory, is_separate))
        await self._processes.gather(f"arrays of {directory.path.name} written")
        where = open_directory(await directory.await_creation())
        if not self._processes.is_primary:
            return
        if self._is_divided and not self._is_part:
            await loop.to_worker(array_store.merge_process_databases, where)
            if self._plan.saving.enable_post_merge_validation:
                await loop.to_worker(self._validate, where)
        await loop.to_worker(self._write_documents, where)

    async def _open_store(self, directory: PathAwaitingCreation, is_separate: bool) -> ArrayStore:
        where = open_directory(await directory.await_creation())
        saving = self._plan.saving
        if self._is_divided:
            name = names.PROCESS_REPLICA_DATABASE if is_separate else names.PROCESS_DATABASE
            where /= name.format(self._processes.index)
        return await loop.to_worker(
            lambda: ArrayStore.create(
                where,
                ocdbt=saving.use_ocdbt,
                zarr3=saving.use_zarr3,
                syncs=self._processes.are_several,
                target_data_file_nbytes=saving.ocdbt_target_data_file_size,
            )
        )

    def _write_documents(self, where: Directory) -> None:
        documents = dict(self._plan.documents)
        if self._strings is not None:
            documents[names.STRINGS] = self._strings
        for name, data in documents.items():
            with errors.reported_as(errors.CommitError, f"cannot write {name} in {where.path}"):
                where.write(name, data)

    def _validate(self, where: Directory) -> None:
        """Checks that every array that was planned is in the merged store."""
        saving = self._plan.saving
        if not self._plan.arrays:
            return
        store = ArrayStore(where, ocdbt=saving.use_ocdbt, zarr3=saving.use_zarr3)
        keys = store.list_keys()
        for leaf in self._plan.arrays:
            assert leaf.shape is not None
            sides = zip(leaf.shape, leaf.storage.chunk_shape, strict=True)
            grid = itertools.product(*[range(side // piece) for side, piece in sides])
            for key in [leaf.document_key, *map(leaf.chunk_key, grid)]:
                if key not in keys:
                    raise errors.WriteError(leaf.label, f"{key} is missing after the write")
