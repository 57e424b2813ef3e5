"""Partial saves: parts of a checkpoint that is not there before they are put together.

Rules
  I4   The checkpoint appears whole, with every part that was ever acknowledged, or not at all.

Theory of operation
  `<checkpoint>.partial_save/` is a session. Each part is written beside it and, when it is durable,
  renamed into it; from then on it is never changed. This is how Orbax has it, so that either
  library may go on with what the other has begun.

  Finalizing writes the whole checkpoint beside the session, out of new names for the same data
  files. That takes the session's name in exchange for the parts, and then the checkpoint's. Killed
  before, it leaves the parts as they were. Killed between, it leaves a session that consists of the
  finished checkpoint: it is finalized again, or added to, like any other, and Orbax's own
  finalizing takes the same form in its course.

  Whoever adds or finalizes holds the session all the while, so that what it has found there stays
  true. Where directories can't be locked (NFS, Windows), and against Orbax, which takes no lock,
  finalizing looks again in the end, and gives up if anything has come.

  Every function blocks, but for a moment only.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._commit.commits import NameChange, RenameCommit, appeared
from orbax_async._commit.leftovers import Held
from orbax_async._storage.directory import Directory, damage_in, read_json
from orbax_async._storage.local import open_directory
from orbax_async.tree.merging import merge_json

_KNOWN = {
    names.CHECKPOINT_MARKER,
    names.CHECKPOINT_METADATA,
    names.COMMIT_MARKER,
    names.DEFAULT_CHECKPOINTABLE,
}


def session_path(final: str) -> str:
    """Returns where the partial saves to a checkpoint gather."""
    return final + names.SESSION_SUFFIX


def find_parts(session: Directory) -> list[Directory]:
    """Returns the directories of a session's parts, in the order of their commits.

    The session itself comes first if a finalization was interrupted that had put together some.
    """
    with errors.reported_as(errors.CommitError, f"cannot look into {session.path}"):
        entries = session.entries()
    parts = [
        session / name for name, is_directory in entries if names.PART_MARK in name and is_directory
    ]
    is_whole = (names.DEFAULT_CHECKPOINTABLE, True) in entries
    return [session, *parts] if is_whole else parts


def check_unfinished(final: Directory) -> None:
    """Raises if partial saves come too late.

    Raises:
      DestinationExistsError: there is something at the checkpoint's path.
    """
    with errors.reported_as(errors.CommitError, f"cannot look at {final.path}"):
        leftovers.settle(final.path)
        leftovers.clear(final)
        is_there = final.status() is not None
    if is_there:
        raise errors.DestinationExistsError(
            f"Finalized checkpoint already exists at {final.path}: partial saves can't change it. "
            "Delete it first, or save elsewhere."
        )


def check_begun(final: Directory) -> None:
    """Raises if there is nothing to be finalized.

    Raises:
      DestinationExistsError: there is something at the checkpoint's path.
      NoPartialSaveError: there is no session, or nothing in it.
    """
    session = open_directory(session_path(final.path))
    with errors.reported_as(errors.CommitError, f"cannot look at {session.path}"):
        is_begun = leftovers.settle(session.path) or bool(find_parts(session))
    check_unfinished(final)  # after that look: another process may be finalizing just now
    if not is_begun:
        raise errors.NoPartialSaveError(
            f"Partial save path {session.path} does not exist, or nothing is in it: there is "
            "nothing to finalize. Check the path."
        )


class Session:
    """The partial saves to one checkpoint, claimed by one operation.

    Args:
      path: the checkpoint's path.

    Attributes:
      final: where the checkpoint will be.
      directory: where its parts gather.
      parts: what there was when it was claimed.
    """

    def __init__(self, path: str) -> None:
        self.final = open_directory(path)
        self.directory = open_directory(session_path(path))
        self.parts: list[Directory] = []
        self.held: Held | None = None
        self._is_made = False

    def claim(self, *, create: bool) -> str | None:
        """Holds the session; returns who has it instead.

        Args:
          create: whether to begin one if there is none.

        Raises:
          DestinationExistsError: the checkpoint is there already.
          NoPartialSaveError: there is none, and it is not to be begun.
          CommitError: its directory can't be made.
        """
        check = check_unfinished if create else check_begun
        check(self.final)
        with errors.reported_as(errors.CommitError, f"cannot open {self.directory.path}"):
            if leftovers.settle(self.directory.path):
                return self._holder()
            if create:
                self._make()
            self.held = leftovers.hold(self.directory)
            if self.held is None:
                self._is_made = False  # whoever has it may be about to add to it
                return self._holder()
            check(self.final)  # again: what was finished just before takes no parts
            leftovers.retire(self.directory)  # else it would come back when this is finished
            self.parts = find_parts(self.directory)
            return None

    def _make(self) -> None:
        try:
            self.directory.make()
            self._is_made = True
        except FileExistsError:
            status = self.directory.status()
            if status is not None and status.kind == "file":
                raise errors.CommitError(
                    f"cannot add to {self.directory.path}: it is a file, not a directory. Remove "
                    "it."
                ) from None

    def _holder(self) -> str:
        owners = leftovers.living_owners(self.directory)
        return f"{self.directory.path} is held by {owners or 'another process'}"

    def abandon(self) -> None:
        """Removes its directory, if it was made for this operation and holds nothing."""
        if self._is_made:
            with contextlib.suppress(OSError):
                self.directory.remove_if_empty()

    def release(self) -> None:
        """Lets others have it; once more does nothing."""
        if self.held is not None:
            self.held.release()

    def root_document(self) -> tuple[int, dict[str, Any]]:
        """Returns when the first part was begun, and the custom metadata of all together.

        Raises:
          InvalidLayoutError: a document is damaged.
          PartialSaveError: there is something that belongs to no part, and would be lost.
        """
        began: list[int] = []
        custom: Any = {}
        known = _KNOWN | {part.name for part in find_parts(self.directory)}
        for directory in dict.fromkeys([self.directory, *self.parts]):
            unknown = {entry.name for entry in directory.entries()} - known
            if unknown:
                raise errors.PartialSaveError(
                    f"{directory.path} holds {sorted(unknown)}, which a partial save does not "
                    "write, and finalizing would lose. Move it away."
                )
            document = read_json(directory, names.CHECKPOINT_METADATA)
            if document is not None:
                with damage_in((directory / names.CHECKPOINT_METADATA).path):
                    began.append(int(document["init_timestamp_nsecs"]))
                    custom = merge_json(custom, document.get("custom_metadata"))
        return min(began, default=time.time_ns()), custom


class _SessionCommit(RenameCommit):
    """What is written beside a session, which is held until it has a name."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.directory)
        self._session = session

    def release(self) -> None:
        """Releases what was written, and the session."""
        try:
            super().release()
        finally:
            self._session.release()


class PartCommit(_SessionCommit):
    """What a partial save writes takes a name in a session.

    Args:
      session: what it adds to.
      check: called with the parts that are there; raises if this one does not fit.
    """

    makes_checkpoint = False

    def __init__(self, session: Session, check: Callable[[list[Directory]], None]) -> None:
        super().__init__(session)
        self._problem = f"cannot add to {session.directory.path}"
        self._check_parts = check

    def claim(self) -> str | None:
        """Claims the session, and sees whether this part fits."""
        holder = self._session.claim(create=True)
        if holder is None:
            self._check_parts(self._session.parts)
        return holder

    def publish(self, documents: Mapping[str, bytes]) -> Held | None:
        """Adds what was written."""
        session = self._session
        last = max(map(_nsecs, session.parts), default=0)
        name = names.PART.format(
            session=session.directory.name,
            nsecs=max(time.time_ns(), last + 1),
            serial=uuid.uuid4().hex,
        )
        with errors.reported_as(errors.CommitError, self._problem):
            self._make_visible(NameChange(self.directory, session.directory / name))
        self.release()
        return None

    def _remove(self) -> None:
        try:
            super()._remove()
        finally:
            self._session.abandon()


def _nsecs(part: Directory) -> int:
    digits = part.name.rpartition(names.PART_MARK)[2].split("_")
    return int(digits[1]) if len(digits) > 1 and digits[1].isdecimal() else 0


class WholeCommit(_SessionCommit):
    """What was put together of all parts takes the session's name, and then the checkpoint's."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._problem = f"cannot publish {session.final.path}"

    def claim(self) -> str | None:
        """Claims the session."""
        return self._session.claim(create=False)

    def publish(self, documents: Mapping[str, bytes]) -> Held | None:
        """Makes the checkpoint visible, in place of the parts, which nobody needs any more."""
        session, parts = self._session, self._session.held
        assert parts is not None
        first = NameChange(self.directory, session.directory, parts)
        second = NameChange(session.directory, session.final)
        with errors.reported_as(errors.CommitError, self._problem):
            self._make_visible(first)
            try:
                self._check_nothing_came(parts.directory)
                if not first.is_exchange:
                    parts.hide(session.directory)  # else it would come back to that name
                if session.final.status() is not None:
                    raise appeared(session.final)
                second.make()
            except BaseException as error:
                if not second.is_made:
                    first.take_back(error)
                    self._is_published = first.is_made
                raise
        self.release()
        return parts

    def _check_nothing_came(self, where: Directory) -> None:
        before, now = self._session.directory.path, where.path
        expected = [part.path.removeprefix(before) for part in self._session.parts]
        if [part.path.removeprefix(now) for part in find_parts(where)] != expected:
            raise errors.CommitError(
                f"{self._session.directory.path} was added to while it was being finalized, by "
                "another process that takes no lock. Finalize it again."
            )
