"""Partial saves: additions to a checkpoint that is not there before they are put together.

Rules
  I4   The checkpoint appears whole, with every addition that was ever acknowledged, or not at all.

Theory of operation
  `<checkpoint>.partial_save/` is a session. Each partial save is written beside it and, when it is
  durable, renamed into it; from then on it is never changed. This is how Orbax has it, so that
  either library may go on with what the other has begun.

  Finalizing writes the whole checkpoint beside the session, out of new names for the same data
  files. That takes the session's name in exchange for the additions, and then the checkpoint's.
  Killed before, it leaves the additions as they were. Killed between, it leaves a session that
  consists of the finished checkpoint: it is finalized again, or added to, like any other, and
  Orbax's own finalizing takes the same form in its course.

  Whoever adds or finalizes holds a lock on the session's directory all the while, so that what it
  has found there stays true. Locks end with their process. Where directories can't be locked (NFS,
  Windows), and against Orbax, which takes none, finalizing looks again in the end, and gives up if
  anything has come.

  Every function blocks, but for a moment only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import atomicity
from orbax_async._commit.places import Beside
from orbax_async._storage import files
from orbax_async.tree.merging import merge_json

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Addition",
    "Session",
    "Union",
    "check_begun",
    "check_unfinished",
    "directory_of",
    "find_additions",
]

_KNOWN = {
    names.CHECKPOINT_MARKER,
    names.CHECKPOINT_METADATA,
    names.COMMIT_MARKER,
    names.DEFAULT_CHECKPOINTABLE,
}


def directory_of(final: str) -> str:
    """Returns where the partial saves to a checkpoint gather."""
    return final + names.SESSION_SUFFIX


def find_additions(session: str) -> list[str]:
    """Returns the directories of a session's partial saves, in the order of their commits.

    The session itself comes first if a finalization was interrupted that had put together some.
    """
    found = sorted(
        entry.path
        for entry in files.scan(session)
        if names.ADDITION_MARK in entry.name and entry.is_dir()
    )
    whole = os.path.join(session, names.DEFAULT_CHECKPOINTABLE)
    return [session, *found] if os.path.isdir(whole) else found


def check_unfinished(final: str) -> None:
    """Raises if partial saves come too late.

    Raises:
      DestinationExistsError: there is something at the checkpoint's path.
    """
    atomicity.recover(final)
    atomicity.clear_abandoned(final)
    if os.path.lexists(final):
        raise errors.DestinationExistsError(
            f"Finalized checkpoint already exists at {final}: partial saves can't change it. "
            "Delete it first, or save elsewhere."
        )


def check_begun(final: str) -> None:
    """Raises if there is nothing to be finalized.

    Raises:
      DestinationExistsError: there is something at the checkpoint's path.
      NoPartialSaveError: there is no session, or nothing in it.
    """
    session = directory_of(final)
    is_begun = atomicity.recover(session) or bool(find_additions(session))
    check_unfinished(final)  # after that look: another process may be finalizing just now
    if not is_begun:
        raise errors.NoPartialSaveError(
            f"Partial save path {session} does not exist, or nothing is in it: there is nothing "
            "to finalize. Check the path."
        )


class Session:
    """The partial saves to one checkpoint, claimed by one operation.

    Attributes:
      final: the checkpoint's path.
      directory: where they gather.
      additions: what there was when it was claimed.
    """

    def __init__(self, final: str) -> None:
        self.final = final
        self.directory = directory_of(final)
        self.additions: list[str] = []
        self._locks: list[int] = []
        self._is_made = False

    def claim(self, *, create: bool) -> bool:
        """Locks the session; False while somebody else has it.

        Args:
          create: whether to begin one if there is none.

        Raises:
          DestinationExistsError: the checkpoint is there already.
          NoPartialSaveError: there is none, and it is not to be begun.
          CommitError: its directory can't be made.
        """
        check = check_unfinished if create else check_begun
        check(self.final)
        if atomicity.recover(self.directory):
            return False
        if create:
            self._make()
        if not self.lock(self.directory):
            self._is_made = False  # whoever has it may be about to add to it
            return False
        check(self.final)  # again: what was finished just before the lock was had takes no parts
        atomicity.clear_asides(self.directory)  # else they would come back when it is finished
        self.additions = find_additions(self.directory)
        return True

    def _make(self) -> None:
        try:
            os.mkdir(self.directory)
            self._is_made = True
        except FileExistsError:
            if not os.path.isdir(self.directory):
                raise errors.CommitError(
                    f"cannot add to {self.directory}: it is a file, not a directory. Remove it."
                ) from None
        except OSError as error:
            raise errors.CommitError(
                f"cannot create {self.directory}: {error.strerror or error}"
            ) from error

    def lock(self, directory: str) -> bool:
        """Locks a directory, if nobody else has it and it still lies where it did."""
        if fcntl is None:
            return True
        try:
            descriptor = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(descriptor), os.stat(directory))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        except OSError:  # a file system that can't lock a directory
            is_ours = True
        if is_ours:
            self._locks.append(descriptor)
        else:
            os.close(descriptor)
        return is_ours

    def add(self, temporary: str) -> None:
        """Makes a durable directory an addition, durably.

        Raises:
          CommitError: the file system refuses; nothing is added.
        """
        last = max((_nsecs(path) for path in self.additions), default=0)
        name = names.ADDITION.format(
            session=os.path.basename(self.directory),
            nsecs=max(time.time_ns(), last + 1),
            serial=uuid.uuid4().hex,
        )
        added = os.path.join(self.directory, name)
        try:
            os.rename(temporary, added)
            try:
                files.fsync_directory(self.directory)
                files.fsync_directory(os.path.dirname(self.directory))
            except OSError:
                os.rename(added, temporary)
                raise
        except OSError as error:
            raise errors.CommitError(
                f"cannot add to {self.directory}: {error.strerror or error}"
            ) from error

    def replace(self, whole: str) -> str:
        """Puts a durable directory that holds all additions at the checkpoint's path, durably.

        Returns:
          Where the additions lie now.

        Raises:
          DestinationExistsError: there is something at that path.
          CommitError: the file system refuses, or something was added meanwhile. The session is as
            it was.
        """
        self.lock(whole)  # it bears the session's name for a moment
        before = atomicity.publish(whole, self.directory, overwrite=True)
        assert before is not None
        try:
            found = find_additions(before)
            if _relative(found, before) != _relative(self.additions, self.directory):
                raise errors.CommitError(
                    f"{self.directory} was added to while it was being finalized, by another "
                    "process that takes no lock. Finalize it again."
                )
            if before != whole:
                atomicity.retire(before, whole)
                before = whole
            atomicity.publish(self.directory, self.final, overwrite=False)
        except BaseException:
            unused = atomicity.publish(before, self.directory, overwrite=True)
            assert unused is not None
            atomicity.discard(unused)
            raise
        return before

    def release(self) -> None:
        """Unlocks the session, and removes its directory if it came to nothing."""
        if self._is_made:
            with contextlib.suppress(OSError):
                os.rmdir(self.directory)
            self._is_made = False
        while self._locks:
            descriptor = self._locks.pop()
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have it open too
            os.close(descriptor)

    def root_document(self) -> tuple[int, dict[str, Any]]:
        """Returns when the first addition was begun, and the custom metadata of all together.

        Raises:
          InvalidLayoutError: a document is damaged.
          PartialSaveError: there is something that belongs to no addition, and would be lost.
        """
        began: list[int] = []
        custom: Any = {}
        known = _KNOWN | {os.path.basename(path) for path in find_additions(self.directory)}
        for directory in dict.fromkeys([self.directory, *self.additions]):
            unknown = {entry.name for entry in files.scan(directory)} - known
            if unknown:
                raise errors.PartialSaveError(
                    f"{directory} holds {sorted(unknown)}, which a partial save does not write, "
                    "and finalizing would lose. Move it away."
                )
            file = os.path.join(directory, names.CHECKPOINT_METADATA)
            data = files.read_bytes(file)
            if data is None:
                continue
            try:
                document = json.loads(data)
                began.append(int(document["init_timestamp_nsecs"]))
                custom = merge_json(custom, document.get("custom_metadata"))
            except (ValueError, TypeError, KeyError) as error:
                raise errors.InvalidLayoutError(f"{file} is damaged: {error!r}") from error
        return min(began, default=time.time_ns()), custom


def _nsecs(addition: str) -> int:
    digits = os.path.basename(addition).rpartition(names.ADDITION_MARK)[2].split("_")
    return int(digits[1]) if len(digits) > 1 and digits[1].isdecimal() else 0


def _relative(paths: list[str], directory: str) -> list[str]:
    return [os.path.relpath(path, directory) for path in paths]


class Addition(Beside):
    """Where a partial save writes.

    Args:
      session: what it adds to.
      check: called with the additions that are there; raises if this one does not fit.
    """

    makes_checkpoint = False

    def __init__(self, session: Session, check: Callable[[list[str]], None]) -> None:
        super().__init__(session.directory)
        self._session = session
        self._check = check

    def claim(self) -> bool:
        """Claims the session, and sees whether this addition fits."""
        if not self._session.claim(create=True):
            return False
        self._check(self._session.additions)
        return True

    def publish(self, write_documents: Callable[[], None], *, overwrite: bool) -> str | None:
        """Adds what was written; its documents are written already."""
        self._sync_parents()
        self._session.add(self.directory)
        self._session.release()
        return None

    def undo(self) -> None:
        """Removes what was written, and the session if it is empty."""
        self._session.release()
        super().undo()


class Union(Beside):
    """Where all additions of a session are put together."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.directory)
        self._session = session

    def claim(self) -> bool:
        """Claims the session."""
        return self._session.claim(create=False)

    def publish(self, write_documents: Callable[[], None], *, overwrite: bool) -> str | None:
        """Makes the checkpoint visible; its documents are written already.

        Returns:
          Where the additions lie, which nobody needs any more.
        """
        before = self._session.replace(self.directory)
        self._session.release()
        return before

    def undo(self) -> None:
        """Removes what was written; the session is as it was."""
        super().undo()
        self._session.release()
