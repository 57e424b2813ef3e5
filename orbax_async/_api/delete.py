"""Deleting a checkpoint, or one checkpointable of it."""

from __future__ import annotations

import functools
import json

import anyio

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._commit import leftovers, removal
from orbax_async._engine import loop
from orbax_async._layouts.layout import reading
from orbax_async._layouts.orbax import OrbaxLayout, check_name
from orbax_async._layouts.reader import find_checkpoint
from orbax_async._operation import starting
from orbax_async._response import AsyncResponse
from orbax_async._storage.directory import Directory
from orbax_async._storage.local import open_directory
from orbax_async.path import PathLike, pathlike


def delete(
    path: PathLike, *, checkpointable_name: str | None = None, missing_ok: bool = False
) -> bool:
    """Deletes a checkpoint, or one checkpointable of it.

    Takes and raises what `delete_async` does.

    Example:
      ::

        ocp.delete("/checkpoints/7")
        ocp.delete("/checkpoints/8", checkpointable_name="optimizer", missing_ok=True)
    """
    return delete_async(
        path, checkpointable_name=checkpointable_name, missing_ok=missing_ok
    )._finish()


def delete_async(
    path: PathLike, *, checkpointable_name: str | None = None, missing_ok: bool = False
) -> AsyncResponse[bool]:
    """Deletes a checkpoint, or one checkpointable of it, in the background.

    A whole checkpoint goes out of sight in one step. Deleting one checkpointable can be
    interrupted by a crash; readers then leave it out, and deleting it again finishes. A deletion
    waits for a save to the same path that this process has begun before.

    Example:
      ::

        await ocp.delete_async("/checkpoints/7")

    Args:
      path: the checkpoint.
      checkpointable_name: what to delete of it; None deletes all.
      missing_ok: whether it may be missing.

    Returns:
      A response whose result is whether anything was deleted. Cancelling it comes too late once
      the deletion has begun.

    Raises:
      NothingToDeleteError: there is no such checkpoint or checkpointable. This and the others are
        raised when the response is awaited, if a save to `path` is under way.
      InvalidLayoutError: `path` is no checkpoint; it is also a `NotADirectoryError` if it is a
        file.
      ValueError: it is a symbolic link or the root of a file system, the name can't be one, or it
        is the checkpoint's last.
      DeletionRecoveryError: the deletion of another checkpointable has to be finished first.
      UnsupportedOptionError: `deletion.gcs_deletion_options` asks to move it instead.
      CommitError: (when awaited) files can't be removed.
    """
    with starting("delete") as operation:
        directory = open_directory(pathlike.absolute(path, operation.context.file.path_class))
        name, options = checkpointable_name, operation.context
        if name is not None:
            check_name(name, is_saved=True)
        if not isinstance(missing_ok, bool):
            raise TypeError(f"missing_ok must be a bool, got {missing_ok!r}")
        if directory.parent == directory:
            raise ValueError(f"Cannot delete a storage root: {directory.path}.")
        check_options(options.deletion.gcs_deletion_options.todelete_full_path)
        lock = operation.lock_path(directory.path, overwrite=True)
        find = functools.partial(_is_there, directory, name, options, missing_ok=missing_ok)
        if lock.is_first:
            find()

        async def run() -> bool:
            processes = operation.processes
            async with processes.together():
                await lock.acquire()
                await processes.gather("looked")  # nothing goes before every process has seen it
                if not processes.is_primary:
                    return bool(json.loads(await processes.broadcast("deleted")))
                is_there = await loop.to_worker(find)
                operation.cancel_switch.pass_commit_point()
                with anyio.CancelScope(shield=True):
                    if is_there:
                        await loop.to_worker(_remove, directory, name, options)
                    await processes.broadcast("deleted", json.dumps(is_there))
                return is_there

        what = directory.path if name is None else f"{name!r} of {directory.path}"
        return operation.start(f"deletion of {what}", run)


def check_options(todelete_full_path: str | None) -> None:
    """Raises if what is deleted is to be moved somewhere else, which is done in the cloud alone."""
    if todelete_full_path is None:
        return
    parts = todelete_full_path.split("/")
    if not todelete_full_path or "://" in todelete_full_path or {"", ".."} & set(parts):
        raise ValueError(
            "deletion.gcs_deletion_options.todelete_full_path must be a relative bucket path, and "
            f"is {todelete_full_path!r}"
        )
    raise errors.UnsupportedOptionError(
        "deletion.gcs_deletion_options.todelete_full_path requires a checkpoint in Google's cloud "
        "storage, which this version does not reach; leave it at None"
    )


def _is_there(
    directory: Directory, name: str | None, options: ambient.Context, *, missing_ok: bool
) -> bool:
    """Says whether there is anything to delete, and raises if it must not be."""
    path = directory.path
    with reading(path):
        status = directory.status()
        if status is not None and status.kind == "link":
            raise ValueError(
                f"Cannot delete a checkpoint through a symlink: {path}. Delete what it leads to."
            )
        leftovers.settle(path)
        status = directory.status()
        if status is None:
            if missing_ok:
                return False
            raise errors.NothingToDeleteError(f"Checkpoint does not exist: {path}.")
        if status.kind == "file":
            raise errors.NotACheckpointError(f"{path} is a file, not the directory of a checkpoint")
        layout = OrbaxLayout(directory, options)
        if name is not None:
            return _holds(layout, name, missing_ok=missing_ok)
        problem = None if layout.is_marked or not layout.inside else layout.problem()
        if problem is not None:
            raise errors.InvalidLayoutError(
                f"Not an Orbax checkpoint root: {path}: {problem} Delete it yourself if it must go."
            )
        return True


def _holds(layout: OrbaxLayout, name: str, *, missing_ok: bool) -> bool:
    """Says whether a checkpoint holds what is to be deleted of it."""
    path = layout.directory.path
    record = removal.read_record(path)
    if record is not None:
        if record["checkpointable_name"] == name:
            return True
        raise errors.DeletionRecoveryError(
            f"the deletion of {record['checkpointable_name']!r} of {path} was begun and not "
            f"finished: delete it again before {name!r}, or delete the checkpoint"
        )
    found: list[str] = []
    if layout.inside:
        found = list(find_checkpoint(layout.directory, layout.options).checkpointables())
    if name not in found:
        if missing_ok:
            return False
        raise errors.NothingToDeleteError(
            f"Checkpointable {name!r} does not exist at {path}; it holds {found}"
        )
    if len(found) == 1:
        raise ValueError(
            f"Cannot delete the final checkpointable, {name!r} of {path}; delete the whole "
            "checkpoint instead."
        )
    return True


def _remove(directory: Directory, name: str | None, options: ambient.Context) -> None:
    path = directory.path
    if name is None:
        removal.remove_whole(path)
        return
    record = removal.read_record(path)
    if record is None:
        record = removal.begin(path, name, OrbaxLayout(directory, options).document)
    removal.finish(path, record)
