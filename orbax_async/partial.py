"""Saving a checkpoint part by part: each adds leaves, and the last step makes them one.

    partial.save(path, {"encoder": encoder})
    partial.save(path, {"decoder": decoder})
    partial.finalize(path)                    # only now there is a checkpoint at `path`

Parts may be saved by several tasks, threads and processes, and by Orbax; each begins to write when
the one before it has ended.
"""

from __future__ import annotations

from typing import Any

from orbax_async import _names as names
from orbax_async._api.save import json_metadata, writing
from orbax_async._commit.sequence import Save, check_parent
from orbax_async._commit.sessions import (
    PartCommit,
    Session,
    WholeCommit,
    check_begun,
    check_unfinished,
    find_parts,
)
from orbax_async._layouts.orbax import writes_in_place
from orbax_async._operation import Operation, starting
from orbax_async._response import AsyncResponse
from orbax_async._storage.directory import Directory
from orbax_async.handlers import phases
from orbax_async.handlers.parts import PartsHandler, check_part
from orbax_async.handlers.phases import Part
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.path import PathLike, pathlike

__all__ = ["finalize", "finalize_async", "save", "save_async"]


def save(path: PathLike, state: Any, *, custom_metadata: Any | None = None) -> None:
    """Saves a part of a state, and returns once it is durable.

    Takes and raises what `save_async` does.

    Example:
      ::

        ocp.partial.save("/checkpoints/7", {"params": params})
        ocp.partial.save("/checkpoints/7", {"step": 7})
        ocp.partial.finalize("/checkpoints/7")
    """
    save_async(path, state, custom_metadata=custom_metadata)._finish()


def save_async(
    path: PathLike, state: Any, *, custom_metadata: Any | None = None
) -> AsyncResponse[None]:
    """Saves a part of a state in the background; there is no checkpoint before `finalize`.

    Like `orbax_async.save_async` it returns once every value is captured. What is written waits at
    `<path>.partial_save`, whatever happens to this process, until it is finalized.

    Example:
      ::

        first = ocp.partial.save_async("/checkpoints/7", {"params": params})
        second = ocp.partial.save_async("/checkpoints/7", {"step": 7})
        await first, await second
        await ocp.partial.finalize_async("/checkpoints/7")

    Args:
      path: the checkpoint that the parts will become.
      state: a pytree with the leaves to add, each in its place in the whole tree.
      custom_metadata: a dict of JSON values, merged with that of the other parts, dicts by key;
        where they differ, the later part is right, but a None says nothing.

    Returns:
      A response; cancelling it removes what was written, until the part is added.

    Raises:
      DestinationExistsError: the checkpoint is there already.
      PartialSaveReplacementError: a leaf was saved before, or lies above or below one that was.
        This, and the next two, are raised when the response is awaited if another part is being
        saved meanwhile.
      DuplicateLeafError: two leaves would be stored under one name.
      PartialSaveError: earlier parts are stored with another `use_ocdbt` or `use_zarr3`.
      UnsupportedLeafError: the state holds what can't be stored, or nothing.
      StagingError: a value could not be captured.
      ValueError: `atomicity.mode` is `COMMIT_FILE`: parts are renamed.
      CommitError: a directory can't be created.
    """
    with starting("save") as operation:
        save = _prepare_save(operation, path, state, custom_metadata)
        what = save.final.removesuffix(names.SESSION_SUFFIX)
        return operation.start(f"partial save to {what}", save.run)


def _prepare_save(operation: Operation, path: Any, state: Any, custom_metadata: Any) -> Save:
    options = operation.context
    if writes_in_place(options):
        raise ValueError(
            "partial saves are not supported with atomicity.mode = 'commit_file': they gather in a "
            "directory that is renamed in the end. Leave the option at 'auto'."
        )
    session = Session(pathlike.absolute(path, options.file.path_class))
    metadata = json_metadata(custom_metadata)
    with phases.naming(names.DEFAULT_CHECKPOINTABLE):
        handler = PyTreeHandler(partial_save_mode=True)
        prepared = handler.flatten(state)
    plan = prepared.plan

    def check(others: list[Directory]) -> None:
        check_part(plan, others)

    lock = operation.lock_path(session.directory.path, overwrite=True)
    if lock.is_first and not options.file.skip_sync_file_validations:
        check_unfinished(session.final)
        check_parent(session.directory)
        check(find_parts(session.directory))
    part = Part(names.DEFAULT_CHECKPOINTABLE, handler, prepared)
    return Save(
        operation=operation,
        final=session.directory.path,
        commit=PartCommit(session, check),
        handlers={names.DEFAULT_CHECKPOINTABLE: part.typestr},
        write=writing(operation, [part]),
        custom_metadata=metadata,
    )


def finalize(path: PathLike) -> None:
    """Makes one checkpoint of all that partial saves have written for a path.

    Takes and raises what `finalize_async` does.

    Example:
      ::

        ocp.partial.finalize("/checkpoints/7")
        state = ocp.load("/checkpoints/7")
    """
    finalize_async(path)._finish()


def finalize_async(path: PathLike) -> AsyncResponse[None]:
    """Makes one checkpoint of all that partial saves have written for a path, in the background.

    No array is read or copied. The checkpoint appears in one step; before that the parts are as
    they were, whatever happens, and may be added to or finalized again. A finalization waits for
    partial saves to the same path that this process has begun before.

    Example:
      ::

        await ocp.partial.finalize_async("/checkpoints/7")

    Args:
      path: what the partial saves were given, or the same with `.partial_save`.

    Returns:
      A response; cancelling it leaves the parts as they were, until the checkpoint is visible.

    Raises:
      DestinationExistsError: the checkpoint is there already.
      NoPartialSaveError: nothing was saved; a `FileNotFoundError`. This and the former are raised
        when the response is awaited, if a part is being saved meanwhile.
      PartialSaveError: (when awaited) the parts do not fit together, or something else lies
        among them.
      InvalidLayoutError: (when awaited) a document of a part is damaged.
      CommitError: (when awaited) files can't be linked, written or renamed.
    """
    with starting("save") as operation:
        given = pathlike.absolute(path, operation.context.file.path_class)
        session = Session(given.removesuffix(names.SESSION_SUFFIX))
        lock = operation.lock_path(session.directory.path, overwrite=True)
        if lock.is_first:
            check_begun(session.final)
        part = Part(names.DEFAULT_CHECKPOINTABLE, PartsHandler(), session)
        save = Save(
            operation=operation,
            final=session.final.path,
            commit=WholeCommit(session),
            handlers={names.DEFAULT_CHECKPOINTABLE: part.typestr},
            write=writing(operation, [part]),
            custom_metadata={},
            inherit=session.root_document,
        )
        return operation.start(f"finalization of {session.final.path}", save.run)
