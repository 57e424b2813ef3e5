"""Deleting: a whole checkpoint in one step, one checkpointable so that a crash can't hide it.

Theory of operation
  A whole checkpoint is renamed to a temporary name beside it, which no reader takes for one, and
  then removed. If the process dies in between, a later save beside it sweeps the rest. Where
  nothing can be renamed it is removed where it lies; then a later save there removes the rest.

  One checkpointable can't vanish in one step, because the checkpoint's metadata names it too. A
  record says first what is being deleted, and what the metadata will be; every reader, Orbax's
  too, then leaves that checkpointable out. The record goes last. What was interrupted is finished
  by deleting the same checkpointable again.

  Every function blocks.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from typing import Any, cast

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._storage.directory import Capability, Directory, damage_in, read_json
from orbax_async._storage.local import open_directory

_UNFINISHED = ".orbax-delete-"  # begins the names of documents that are being written

_ADVICE = (
    "It is the record of a deletion that was begun: remove it if every checkpointable is whole, or "
    "delete the checkpoint."
)

_KEYS = {"checkpointable_name", "destination", "operation_id", "original_metadata"}
_KEYS |= {"updated_metadata"}


def remove_whole(path: str) -> None:
    """Removes a directory: out of sight in one step, durably, and then its files.

    Raises:
      CommitError: it can't be renamed, and is as it was; or some of its files can't be removed.
    """
    final = open_directory(path)
    with errors.reported_as(errors.CommitError, f"cannot delete {path}"):
        leftovers.retire(final)
        if not final.can(Capability.RENAME):
            leftovers.hold_own(final).remove_where_it_lies()
            return
        hidden = leftovers.hide(final)
    try:
        with errors.reported_as(
            errors.CommitError,
            f"{path} is deleted, but what it held, now at {hidden.directory.path}, could not be "
            "removed",
        ):
            final.parent.sync([""])
            leftovers.discard(hidden.directory)
    finally:
        hidden.release()


def begin(path: str, name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Records durably that a checkpointable is being deleted, and returns the record.

    Args:
      path: the checkpoint.
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
    _replace(open_directory(path), names.DELETION_RECORD, record)
    return record


def read_record(path: str) -> dict[str, Any] | None:
    """Returns the record of a deletion that was begun and not finished, None if there is none.

    Raises:
      DeletionRecoveryError: it is damaged, or asks for what this library does not do.
    """
    root = open_directory(path)
    record = _read(root)
    if record is None:
        return None
    file = (root / names.DELETION_RECORD).path
    with _damage_in(file):
        missing = _KEYS - record.keys()
        if missing:
            raise ValueError(f"it lacks {sorted(missing)}")
    if record["destination"] is not None:
        raise errors.DeletionRecoveryError(
            f"{file} says that a checkpointable is being moved to {record['destination']!r}, "
            "which is only done in cloud storage; finish that with the library that began it"
        )
    return record


def name_in_deletion(root: Directory) -> str | None:
    """Returns the checkpointable whose deletion was begun and not finished, None if there is none.

    Raises:
      DeletionRecoveryError: the record is damaged.
    """
    record = _read(root)
    if record is None:
        return None
    with _damage_in((root / names.DELETION_RECORD).path):
        return str(record["checkpointable_name"])


def _read(root: Directory) -> dict[str, Any] | None:
    file = (root / names.DELETION_RECORD).path
    with errors.reported_as(errors.CommitError, f"cannot read {file}"):
        try:
            return cast("dict[str, Any] | None", read_json(root, names.DELETION_RECORD))
        except errors.InvalidLayoutError as error:
            raise errors.DeletionRecoveryError.of_file(f"{error}. {_ADVICE}", file) from error


def _damage_in(file: str) -> contextlib.AbstractContextManager[None]:
    return damage_in(file, _ADVICE, errors.DeletionRecoveryError)


def finish(path: str, record: dict[str, Any]) -> None:
    """Does what a record says, or the rest of it, and removes the record.

    Raises:
      CommitError: a file can't be removed or written; the record stays, and it can be tried again.
    """
    root, name = open_directory(path), record["checkpointable_name"]
    with errors.reported_as(errors.CommitError, f"cannot finish deleting {name!r} of {path}"):
        root.remove(name)
        if record["updated_metadata"]:
            _replace(root, names.CHECKPOINT_METADATA, record["updated_metadata"])
        for entry in root.entries():
            if entry.name.startswith(_UNFINISHED):
                root.remove(entry.name)
        root.sync([""])
        root.remove(names.DELETION_RECORD)
        root.sync([""])


def _replace(root: Directory, name: str, document: dict[str, Any]) -> None:
    """Writes a document durably, so that a reader sees the old one or the new."""
    unfinished = f"{_UNFINISHED}{uuid.uuid4().hex}"
    with errors.reported_as(errors.CommitError, f"cannot write {name} of {root.path}"):
        try:
            root.write(unfinished, json.dumps(document).encode())
            root.sync([unfinished])
            root.replace(unfinished, name)
            root.sync([""])
        except OSError:
            with contextlib.suppress(OSError):
                root.remove(unfinished)
            raise
