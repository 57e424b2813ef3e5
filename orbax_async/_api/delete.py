"""Deleting a checkpoint, or one checkpointable of it."""

from __future__ import annotations

import json
import os
from typing import Any

import anyio

from orbax_async import errors
from orbax_async._api import layout
from orbax_async._commit import atomicity, removal
from orbax_async._engine import loop
from orbax_async._operation import Operation, starting
from orbax_async._response import AsyncResponse
from orbax_async._storage import files
from orbax_async.path import PathLike, pathlike

__all__ = ["check_options", "delete", "delete_async"]


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
    ).result()


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
    with starting("delete") as doing:
        return _start(doing, path, checkpointable_name, missing_ok)


def _start(doing: Operation, path: Any, name: Any, missing_ok: Any) -> AsyncResponse[bool]:
    where = pathlike.absolute(path, doing.context.file.path_class)
    if name is not None:
        layout.check_name(name, is_saved=True)
    if not isinstance(missing_ok, bool):
        raise TypeError(f"missing_ok must be a bool, got {missing_ok!r}")
    if where == os.path.dirname(where):
        raise ValueError(f"Cannot delete a storage root: {where}.")
    check_options(doing.context.deletion.gcs_deletion_options.todelete_full_path)
    lock = doing.lock_path(where, overwrite=True)

    async def body() -> bool:
        processes = doing.processes
        async with processes.together():
            await lock.acquire()
            await processes.gather("looked")  # nothing goes before every process has seen it
            if not processes.is_primary:
                return bool(json.loads(await processes.broadcast("deleted")))
            is_there = await loop.to_worker(_is_there, where, name, missing_ok)
            doing.cancel_switch.pass_commit_point()
            with anyio.CancelScope(shield=True):
                if is_there:
                    await loop.to_worker(_remove, where, name)
                await processes.broadcast("deleted", json.dumps(is_there))
            return is_there

    what = where if name is None else f"{name!r} of {where}"
    if lock.is_first:
        _is_there(where, name, missing_ok)
    return doing.start(f"deletion of {what}", body)


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


def _is_there(path: str, name: str | None, missing_ok: bool) -> bool:
    """Says whether there is anything to delete, and raises if it must not be."""
    if os.path.islink(path):
        raise ValueError(
            f"Cannot delete a checkpoint through a symlink: {path}. Delete {os.path.realpath(path)}"
        )
    atomicity.recover(path)
    if not os.path.lexists(path):
        if missing_ok:
            return False
        raise errors.NothingToDeleteError(f"Checkpoint does not exist: {path}.")
    if not os.path.isdir(path):
        raise errors.NotACheckpointError(f"{path} is a file, not the directory of a checkpoint")
    if name is None:
        layout.check_deletable(path)
        return True
    record = removal.read_record(path)
    if record is not None:
        if record["checkpointable_name"] == name:
            return True
        raise errors.DeletionRecoveryError(
            f"the deletion of {record['checkpointable_name']!r} of {path} was begun and not "
            f"finished: delete it again before {name!r}, or delete the checkpoint"
        )
    is_empty = not any(True for _ in files.scan(path))
    found = [] if is_empty else list(layout.contents(path).typestrs)
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


def _remove(path: str, name: str | None) -> None:
    if name is None:
        removal.remove_whole(path)
        return
    record = removal.read_record(path)
    if record is None:
        record = removal.begin(path, name, layout.contents(path).document)
    removal.finish(path, record)
