"""Pytrees: the handler of states.

A save flattens and describes the tree, plans what this process writes, and hands the plan to the
pipeline; then it writes the documents that describe the tree. A load reads those documents,
matches them with the abstract tree, plans what this process reads, and rebuilds.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable
from typing import Any

import anyio
import jax

from orbax_async import _operation as operation
from orbax_async import context as ambient
from orbax_async import errors, multihost
from orbax_async._commit.sessions import Session
from orbax_async._engine import loop
from orbax_async._layouts.table import layout_of
from orbax_async._storage.openers import open_directory
from orbax_async.handlers import forms, ordering, parts, read_plan, shardings, storing
from orbax_async.handlers.forms import PreparedTree
from orbax_async.handlers.read_plan import AbstractTree, Loading, ShardingFunction
from orbax_async.handlers.saving import Saving
from orbax_async.path import Path, PathAwaitingCreation
from orbax_async.tree import structure
from orbax_async.tree.selection import Select, Selection

__all__ = ["PyTreeHandler"]

_HEAD_START_SECS = 1e-3  # for the caller that is let go: what follows would keep the GIL from it


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
        options = self._options()
        processes = multihost.participants(options.multiprocessing.active_processes)
        prepared = forms.prepare(
            state,
            as_files=not options.array.saving.use_ocdbt,
            are_several=len(processes) > 1,
        )
        prepared.stored = storing.choose(prepared, options.array.saving)
        if options.memory.serialization_status_callback is not None:
            prepared.delays = ordering.delays(
                prepared, options.memory.serialization_status_callback
            )
        return prepared

    def validate_leaves_handleable(self, checkpointable: Any) -> None:
        """Raises what `save` would raise for a tree; returns None for a good one."""
        self.flatten(checkpointable)

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """Captures a state (tier 1) and returns what writes it (tier 2).

        Args:
          directory: where to; it may not exist before tier 2.
          checkpointable: a pytree, or what `flatten` made of it, or partial saves to be one.
        """
        if isinstance(checkpointable, Session):
            return parts.put_together(directory, checkpointable)
        prepared = (
            checkpointable
            if isinstance(checkpointable, PreparedTree)
            else self.flatten(checkpointable)
        )
        doing = operation.current("save")
        options = self._options()
        # A tree that a handler of the user's passes on may be only a part of what that captures.
        is_all = prepared is checkpointable
        may_copy = not doing.transfer_budget.has_limit
        hold = functools.partial(prepared.hold, options, may_copy=may_copy)
        if is_all and not _asks_callbacks(options) and await loop.to_worker(hold):
            doing.release_caller(directory.path.name)
            await anyio.sleep(_HEAD_START_SECS)
        saving = Saving(prepared, options, doing, is_part=self._partial_save_mode)
        running = doing.background(lambda: saving.run(directory))
        try:
            await saving.pipeline.let_go.wait()
            if is_all and not saving.pipeline.staged.is_set():
                doing.release_caller(directory.path.name, is_captured=False)
            await saving.pipeline.staged.wait()
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
        selection = None if select is None else Selection(select)
        if isinstance(sharding, jax.sharding.Sharding):
            try:
                sharding = shardings.concrete(sharding)
            except ValueError as reason:
                raise errors.AbstractLeafError("", str(reason)) from None
        elif sharding is not None and not callable(sharding):
            raise TypeError(
                f"sharding must be a jax.sharding.Sharding or a function, not {sharding!r}"
            )
        if abstract is None:
            return AbstractTree(None, (), selection, sharding)
        flat = structure.flatten(abstract)
        return AbstractTree(flat, read_plan.want(flat.entries), selection, sharding)

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
        doing = operation.current()
        loading = await loop.to_worker(
            Loading, os.fspath(directory), abstract, self._options(), doing
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


def _asks_callbacks(options: ambient.Context) -> bool:
    """Says whether functions of the user's are asked while a save is planned and captured."""
    memory = options.memory
    return (
        memory.is_prioritized_key_fn is not None or memory.serialization_status_callback is not None
    )
