"""Deleting: a whole checkpoint in one step, one checkpointable so that a crash can't hide it.

Theory of operation
  A whole checkpoint is renamed to a temporary name beside it, which no reader takes for one, and
  then removed. If the process dies in between, the next save beside it sweeps the rest.

  One checkpointable can't vanish in one step, because the checkpoint's metadata names it too. A
  record says first what is being deleted, and what the metadata will be; every reader, Orbax's
  too, then leaves that checkpointable out. The record goes last. What was interrupted is finished
  by deleting the same checkpointable again.

  Every function blocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from typing import Any

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import atomicity
from orbax_async._storage import files

__all__ = ["begin", "finish", "read_record", "remove_whole"]

_UNFINISHED = ".orbax-delete-"  # begins the names of documents that are being written

_KEYS = {"checkpointable_name", "destination", "operation_id", "original_metadata"}
_KEYS |= {"updated_metadata"}


def remove_whole(path: str) -> None:
    """Removes a directory: out of sight in one step, durably, and then its files.

    Raises:
      CommitError: it can't be renamed, and is as it was; or some of its files can't be removed.
    """
    retired = atomicity.temporary_path(path)
    try:
        os.rename(path, retired)
    except OSError as error:
        raise errors.CommitError(f"cannot delete {path}: {error.strerror or error}") from error
    try:
        files.fsync_directory(os.path.dirname(path))
        atomicity.discard(retired)
    except OSError as error:
        raise errors.CommitError(
            f"{path} is deleted, but what it held, now at {retired}, could not be removed: "
            f"{error.strerror or error}"
        ) from error


def begin(root: str, name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Records durably that a checkpointable is being deleted, and returns the record.

    Args:
      root: the checkpoint.
      name: the checkpointable.
      document: the checkpoint's metadata; empty where there is none.
    """
    updated = dict(document)
    if isinstance(document.get("item_handlers"), dict):
        handlers = document["item_handlers"].items()
        updated["item_handlers"] = {key: value for key, value in handlers if key != name}
    record = {
        "checkpointable_name": name,
        "destination": None,
        "operation_id": uuid.uuid4().hex,
        "original_metadata": document,
        "updated_metadata": updated,
    }
    _replace(root, names.DELETION_RECORD, record)
    return record


def read_record(root: str) -> dict[str, Any] | None:
    """Returns the record of a deletion that was begun and not finished, None if there is none.

    Raises:
      DeletionRecoveryError: it is damaged, or asks for what this library does not do.
    """
    file = os.path.join(root, names.DELETION_RECORD)
    data = files.read_bytes(file)
    if data is None:
        return None
    try:
        record = json.loads(data)
        missing = _KEYS - record.keys()
        if missing:
            raise ValueError(f"it lacks {sorted(missing)}")
    except (ValueError, AttributeError) as error:
        raise errors.DeletionRecoveryError(
            f"{file} is damaged: {error}. It is the record of a deletion that was begun: remove it "
            "if every checkpointable is whole, or delete the checkpoint."
        ) from error
    if record["destination"] is not None:
        raise errors.DeletionRecoveryError(
            f"{file} says that a checkpointable is being moved to {record['destination']!r}, "
            "which is only done in cloud storage; finish that with the library that began it"
        )
    return dict(record)


def finish(root: str, record: dict[str, Any]) -> None:
    """Does what a record says, or the rest of it, and removes the record.

    Raises:
      CommitError: a file can't be removed or written; the record stays, and it can be tried again.
    """
    try:
        directory = os.path.join(root, record["checkpointable_name"])
        if os.path.lexists(directory):
            files.remove_tree(directory)
        if record["updated_metadata"]:
            _replace(root, names.CHECKPOINT_METADATA, record["updated_metadata"])
        for entry in files.scan(root):
            if entry.name.startswith(_UNFINISHED):
                os.unlink(entry.path)
        files.fsync_directory(root)
        os.unlink(os.path.join(root, names.DELETION_RECORD))
        files.fsync_directory(root)
    except OSError as error:
        raise errors.CommitError(
            f"cannot finish deleting {record['checkpointable_name']!r} of {root}: "
            f"{error.strerror or error}"
        ) from error


def _replace(root: str, name: str, document: dict[str, Any]) -> None:
    """Writes a document durably, so that a reader sees the old one or the new."""
    unfinished = os.path.join(root, f"{_UNFINISHED}{uuid.uuid4().hex}")
    try:
        files.write_bytes(unfinished, json.dumps(document).encode())
        files.fsync_file(unfinished)
        os.replace(unfinished, os.path.join(root, name))
        files.fsync_directory(root)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise errors.CommitError(
            f"cannot write {name} of {root}: {error.strerror or error}"
        ) from error
