"""Deleting a checkpoint, or one checkpointable of it."""

from __future__ import annotations

import json
from typing import Any

import anyio

from orbax_async import errors
from orbax_async._commit import atomicity, removal
from orbax_async._engine import loop
from orbax_async._layouts import table
from orbax_async._layouts.orbax import OrbaxCheckpoint, check_name
from orbax_async._operation import Operation, starting
from orbax_async._response import AsyncResponse
from orbax_async._storage.directory import Directory
from orbax_async._storage.openers import open_directory
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
    with starting("delete") as operation:
        where = pathlike.absolute(path, operation.context.file.path_class)
        deletion = _Deletion(operation, open_directory(where), checkpointable_name, missing_ok)
        return deletion.start()


class _Deletion:
    """One deletion; refuses what can be known to be wrong without a look at the path."""

    def __init__(
        self, operation: Operation, directory: Directory, name: Any, missing_ok: Any
    ) -> None:
        if name is not None:
            check_name(name, is_saved=True)
        if not isinstance(missing_ok, bool):
            raise TypeError(f"missing_ok must be a bool, got {missing_ok!r}")
        if directory.parent == directory:
            raise ValueError(f"Cannot delete a storage root: {directory.path}.")
        check_options(operation.context.deletion.gcs_deletion_options.todelete_full_path)
        self._operation = operation
        self._directory = directory
        self._name = name
        self._missing_ok = missing_ok
        self._lock = operation.lock_path(directory.path, overwrite=True)

    def start(self) -> AsyncResponse[bool]:
        """Starts it, and looks first what is there, unless a save to the path is under way."""
        path = self._directory.path
        if self._lock.is_first:
            self._is_there()
        what = path if self._name is None else f"{self._name!r} of {path}"
        return self._operation.start(f"deletion of {what}", self._run)

    async def _run(self) -> bool:
        processes = self._operation.processes
        async with processes.together():
            await self._lock.acquire()
            await processes.gather("looked")  # nothing goes before every process has seen it
            if not processes.is_primary:
                return bool(json.loads(await processes.broadcast("deleted")))
            is_there = await loop.to_worker(self._is_there)
            self._operation.cancel_switch.pass_commit_point()
            with anyio.CancelScope(shield=True):
                if is_there:
                    await loop.to_worker(self._remove)
                await processes.broadcast("deleted", json.dumps(is_there))
            return is_there

    def _is_there(self) -> bool:
        """Says whether there is anything to delete, and raises if it must not be."""
        with errors.reported_as(errors.CommitError, f"cannot delete {self._directory.path}"):
            return self._find()

    def _find(self) -> bool:
        path, name = self._directory.path, self._name
        status = self._directory.status()
        if status is not None and status.kind == "link":
            raise ValueError(
                f"Cannot delete a checkpoint through a symlink: {path}. Delete what it leads to."
            )
        atomicity.recover(path)
        status = self._directory.status()
        if status is None:
            if self._missing_ok:
                return False
            raise errors.NothingToDeleteError(f"Checkpoint does not exist: {path}.")
        if status.kind == "file":
            raise errors.NotACheckpointError(f"{path} is a file, not the directory of a checkpoint")
        found = OrbaxCheckpoint(self._directory)
        if name is None:
            problem = None if found.is_marked or found.is_empty else found.problem()
            if problem is not None:
                raise errors.InvalidLayoutError(
                    f"Not an Orbax checkpoint root: {path}: {problem} Delete it yourself if it "
                    "must go."
                )
            return True
        record = removal.read_record(path)
        if record is not None:
            if record["checkpointable_name"] == name:
                return True
            raise errors.DeletionRecoveryError(
                f"the deletion of {record['checkpointable_name']!r} of {path} was begun and not "
                f"finished: delete it again before {name!r}, or delete the checkpoint"
            )
        names_there: list[str] = []
        if not found.is_empty:
            checkpoint = table.open_checkpoint(self._directory, self._operation.context)
            names_there = list(checkpoint.checkpointables())
        if name not in names_there:
            if self._missing_ok:
                return False
            raise errors.NothingToDeleteError(
                f"Checkpointable {name!r} does not exist at {path}; it holds {names_there}"
            )
        if len(names_there) == 1:
            raise ValueError(
                f"Cannot delete the final checkpointable, {name!r} of {path}; delete the whole "
                "checkpoint instead."
            )
        return True

    def _remove(self) -> None:
        path = self._directory.path
        with errors.reported_as(errors.CommitError, f"cannot delete {path}"):
            if self._name is None:
                removal.remove_whole(path)
                return
            record = removal.read_record(path)
            if record is None:
                document = OrbaxCheckpoint(self._directory).document
                record = removal.begin(path, self._name, document)
            removal.finish(path, record)


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
