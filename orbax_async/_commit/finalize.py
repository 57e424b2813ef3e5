"""Committing: everything durable, then visible, then the change of names durable.

Rules
  I5   Data and metadata are durable before the checkpoint becomes visible, and the rename is
       durable before the response is done.

Theory of operation
  1. Handlers have written their directories; nothing is synced yet.
  2. The checkpoint's own documents are written, the commit marker last. (A save in place writes
     them in step 4, each synced before the next; see `places`.)
  3. Every file is synced, several at once, then every directory, the deepest first: an entry is
     durable only once its directory is.
  4. The temporary directory is published. This is the commit point: what was asked to stop before
     it leaves nothing, what fails after it is already committed.
  5. The parent directory is synced, and parents that were made for this save.

  With several processes each syncs what it wrote before it reports to the others; the primary
  alone takes steps 2, 4 and 5.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._storage import files

__all__ = [
    "checkpoint_document",
    "sync_directories",
    "sync_files",
    "write_commit_marker",
    "write_marker",
    "write_root_documents",
]


def checkpoint_document(
    handlers: Mapping[str, str],
    *,
    init_nsecs: int,
    commit_nsecs: int | None,
    custom_metadata: Mapping[str, Any] | None,
) -> bytes:
    """Returns the `_CHECKPOINT_METADATA` document."""
    return json.dumps(
        {
            "item_handlers": dict(handlers),
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": init_nsecs,
            "commit_timestamp_nsecs": commit_nsecs,
            "custom_metadata": dict(custom_metadata or {}),
        }
    ).encode()


def write_root_documents(
    directory: str,
    final: str,
    handlers: Mapping[str, str],
    *,
    init_nsecs: int,
    custom_metadata: Mapping[str, Any] | None,
) -> None:
    """Writes the metadata at the root of a checkpoint."""
    document = checkpoint_document(
        handlers,
        init_nsecs=init_nsecs,
        commit_nsecs=time.time_ns(),
        custom_metadata=custom_metadata,
    )
    try:
        files.write_bytes(os.path.join(directory, names.CHECKPOINT_METADATA), document)
    except OSError as error:
        raise errors.CommitError(
            f"cannot write the documents of {final}: {error.strerror or error}"
        ) from error


def write_marker(directory: str, content: str = "") -> None:
    """Writes the file that tells a checkpoint of version 1 by its name."""
    try:
        files.write_bytes(os.path.join(directory, names.CHECKPOINT_MARKER), content.encode())
    except OSError as error:
        raise errors.CommitError(
            f"cannot write {names.CHECKPOINT_MARKER} in {directory}: {error.strerror or error}"
        ) from error


def write_commit_marker(directory: str, final: str) -> None:
    """Writes the document that says that a checkpoint is whole; the last one of all."""
    marker = f"Checkpoint commit was successful to {final}".encode()
    try:
        files.write_bytes(os.path.join(directory, names.COMMIT_MARKER), marker)
    except OSError as error:
        raise errors.CommitError(
            f"cannot write the commit marker of {final}: {error.strerror or error}"
        ) from error


def sync_files(paths: Iterable[str], final: str) -> None:
    """Makes some files durable (I5)."""
    _sync(files.fsync_file, paths, final)


def sync_directories(paths: Iterable[str], final: str) -> None:
    """Makes the entries of some directories durable, in the order given (I5)."""
    _sync(files.fsync_directory, paths, final)


def _sync(fsync: Callable[[str], None], paths: Iterable[str], final: str) -> None:
    for path in paths:
        try:
            fsync(path)
        except OSError as error:
            raise errors.CommitError(
                f"cannot make {path} durable for {final}: {error.strerror or error}"
            ) from error
