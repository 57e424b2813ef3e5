"""What a save asks of the way in which it is committed, and the two ways.

Rules
  I4   A reader sees a whole checkpoint, old or new, or none; an overwrite never leaves none.
  I5   All data is durable before the checkpoint becomes visible, and what makes it visible is
       durable before the response is done.

Theory of operation
  `sequence` has the one order of steps, whatever the commit: begin, claim, let handlers write,
  complete, make all of it durable, publish; or undo, at any time before publishing.

  **By names.** `RenameCommit` writes beside the destination, and takes its name in one step. Over
  an old checkpoint the two names are exchanged in one step where that can be; the old one is then
  what has the temporary name. Elsewhere the old one is set aside as `...-old`, and the new one
  renamed. Whoever looks in between puts the old one back; then it is set aside again. That is how
  a checkpoint is overwritten, in every mode.

  Whoever changes what a name means holds what lies there. So of several processes that overwrite
  one checkpoint each begins when the one before it has made its change durable, or taken it back.
  A change that can't be made durable is taken back. If that fails too, nothing is removed, and the
  error says what is visible, and where the other lies.

  **By a marker.** `MarkerCommit` writes at the destination, where nothing lies yet, for file
  systems and stores that can't rename.

  1. The destination is made. `orbax.checkpoint` is written to it, which must not be there yet, and
     says whose it is; that is durable before anything else comes.
  2. Handlers write their directories, and all of it is made durable.
  3. `_CHECKPOINT_METADATA` is written and made durable. Without it no reader takes the directory
     for a checkpoint.
  4. `commit_success.txt`, the proof, is written and made durable: this is the commit point.
  5. `orbax.checkpoint` is emptied: nobody asks for the owner any more.

  If its process dies before 4, the next save clears what is there (`leftovers.clear`).

  **Paused owners.** One that was taken for dead meanwhile finds that its directory has no marker of
  its own any more, and publishes nothing; the documents of 3 and 4 are written only where there are
  none. With locks, on one machine, nobody who is paused is taken for dead. Without, an owner that
  wakes after two minutes looks at the marker within ten seconds; until then what it was just
  writing may reach files of the same name. Only a commit by renaming keeps these apart.

  `sessions.PartCommit` adds a part to a session of partial saves, and `sessions.WholeCommit` makes
  a session a checkpoint; both take names as `RenameCommit` does. What commits leave when they die
  is told in `leftovers`. Every method blocks, and only the primary process calls them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._commit.leftovers import Held
from orbax_async._storage.directory import Capability, Directory


class Commit(Protocol):
    """Where a save writes, and the step that makes it a checkpoint.

    Attributes:
      directory: where handlers write.
      makes_checkpoint: whether there is a checkpoint afterwards, not just a part of one.
    """

    directory: Directory
    makes_checkpoint: bool

    def begin(self, names_inside: Sequence[str], *, mode: int | None) -> None:
        """Makes the directory, its parents, and `names_inside` it, and holds it.

        Args:
          names_inside: the directories to make in it.
          mode: its permission bits; None leaves them to the process's umask.

        Raises:
          DestinationExistsError: it writes at the destination, and something is there.
          CommitError: a directory can't be made.
        """
        ...

    def claim(self) -> str | None:
        """Claims what is there, if what is written depends on it; asked again until it may.

        Returns:
          None if it may; else who has it.
        """
        ...

    def renew(self) -> None:
        """Shows those who can't see its lock that the save is under way.

        Raises:
          CommitError: it has been taken for dead all the same.
        """
        ...

    def complete(self, documents: Mapping[str, bytes]) -> None:
        """Writes the checkpoint's own documents, unless they say that it is whole by being there.

        Args:
          documents: by name, in their order; the last one says that the checkpoint is whole.
        """
        ...

    def publish(self, documents: Mapping[str, bytes]) -> Held | None:
        """Makes the checkpoint visible (I4), and that durable (I5); all else is durable already.

        Returns:
          What it has replaced, out of sight and to be disposed of; None if that is nothing.

        Raises:
          DestinationExistsError: something has come to be there, and must not be replaced.
          CommitError: it can't be published. What was there is there; or else the message says
            what is visible now, and where the other lies.
        """
        ...

    def undo(self) -> None:
        """Removes what was written, and parents that were made for it, unless it is visible."""
        ...

    def release(self) -> None:
        """Holds nothing any more; once more does nothing."""
        ...


_TRIES = 100  # to set aside what readers put back
_BUSY_SECS = 10.0


class NameChange:
    """A directory takes a name, durably.

    Args:
      new: the directory.
      final: the name.
      old: what has it now, held; None where nothing has.

    Attributes:
      is_made: whether the directory has the name.
      is_exchange: whether what had it has got the directory's.
    """

    def __init__(self, new: Directory, final: Directory, old: Held | None = None) -> None:
        self._new = new
        self._final = final
        self._old = old
        self.is_exchange = False
        self.is_made = False

    def make(self) -> None:
        """Makes the change, or leaves everything as it was.

        Raises:
          OSError: it can't be made, or not be made durable.
          CommitError: that, and it can't be taken back.
        """
        if self._old is None:
            self._new.rename(self._final)
        elif self._final.can(Capability.EXCHANGE) and self._new.exchange(self._final):
            self.is_exchange = True
            self._old.directory = self._new
        else:
            self._set_aside(self._old)
        self.is_made = True
        try:
            for parent in dict.fromkeys([self._final.parent, self._new.parent]):
                parent.sync([""])
        except OSError as error:
            self.take_back(error)
            raise

    def _set_aside(self, old: Held) -> None:
        leftovers.retire(self._final)
        aside = leftovers.temporary(self._final, "old")
        for _ in range(_TRIES):
            old.rename(aside)
            try:
                self._new.rename(self._final)
            except OSError as error:
                if self._final.status() is not None:  # somebody has put it back
                    old.directory = self._final
                    continue
                with self._reporting(error):
                    aside.rename(self._final)
                    old.directory = self._final
                raise
            return
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), self._final.path)

    def take_back(self, cause: BaseException) -> None:
        """Undoes the change.

        Args:
          cause: why; told in the error, if there is one.

        Raises:
          CommitError: it can't be undone; the message says what is visible.
        """
        with self._reporting(cause):
            if self.is_exchange:
                if not self._new.exchange(self._final):
                    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), self._final.path)
                self.is_made = False
            else:
                if self._old is not None:  # by this name whoever comes puts it back
                    self._old.rename(leftovers.temporary(self._final, "old"))
                self._final.rename(self._new)
                self.is_made = False
                if self._old is not None:
                    self._old.directory.rename(self._final)
            if self._old is not None:
                self._old.directory = self._final

    @contextlib.contextmanager
    def _reporting(self, cause: BaseException) -> Iterator[None]:
        """Tells of an error on the way back what is visible then."""
        try:
            yield
        except OSError as error:
            why = getattr(cause, "strerror", None) or cause
            if self.is_made:
                now = f"What was saved is visible at {self._final.path}, though a crash may undo it"
            else:
                now = f"Nothing is visible at {self._final.path} now"
            if self._old is not None and self._old.directory != self._final:
                now += f"; what was there before lies at {self._old.directory.path}"
                now += "." if self.is_made else ", and the next load or save puts it back."
            raise errors.CommitError(
                f"cannot publish {self._final.path}: {why}. It can't be taken back either: "
                f"{error.strerror or error}. {now}"
            ) from cause


class RenameCommit:
    """A directory beside the destination, which takes its name.

    Args:
      final: the destination.
      check: raises if what lies there may not be replaced; None where nothing may.

    Attributes:
      directory: where to write.
    """

    makes_checkpoint = True

    def __init__(self, final: Directory, check: Callable[[], None] | None = None) -> None:
        self.final = final
        self.directory = leftovers.temporary(final)
        self._check = check
        self._problem = f"cannot publish {final.path}"
        self._marker = b""
        self._held: Held | None = None
        self._parents: list[Directory] = []
        self._is_published = False

    def begin(self, names_inside: Sequence[str], *, mode: int | None) -> None:
        """Makes the directory, and holds it; see `Commit.begin`."""
        with errors.reported_as(
            errors.CommitError,
            f"cannot create a directory in {self.directory.parent.path}",
            "Check that the path is right, writable and not full.",
        ):
            self._make_parents()
            self._make(mode)
            for name in names_inside:
                (self.directory / name).make()

    def _make_parents(self) -> None:
        missing = []
        parent = self.directory.parent
        while parent.status() is None:
            missing.append(parent)
            parent = parent.parent
        for parent in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another save has just made it
                parent.make()
                self._parents.append(parent)

    def _make(self, mode: int | None) -> None:
        self._held = leftovers.make_held(self.directory, self._marker, mode=mode)

    def claim(self) -> str | None:
        """Depends on nothing that is there; see `Commit.claim`."""
        return None

    def renew(self) -> None:
        """Touches the directory; see `Commit.renew`."""
        if self._held is not None and not self._is_published:
            self._check_is_own()
            with contextlib.suppress(OSError):  # what is wrong with it, the save will find
                self.directory.touch()

    def _check_is_own(self) -> None:
        if self.directory.read(names.CHECKPOINT_MARKER) != self._marker:
            raise errors.CommitError(
                f"{self._problem}: {self.directory.path} is not this save's any more. It has made "
                "no sign for so long that another process has taken it for dead. Save again."
            )

    def complete(self, documents: Mapping[str, bytes]) -> None:
        """Writes all documents: nobody looks at them under this name."""
        self._write(documents)

    def _write(self, documents: Mapping[str, bytes]) -> None:
        with errors.reported_as(
            errors.CommitError, f"cannot write the documents of {self.final.path}"
        ):
            for name, data in documents.items():
                self.directory.write(name, data, only_if_absent=True)

    def publish(self, documents: Mapping[str, bytes]) -> Held | None:
        """Takes the destination's name; see `Commit.publish`."""
        if self._check is not None:
            self._check()  # what is there may have come after the first look, or without one
        with errors.reported_as(errors.CommitError, self._problem):
            old = self._hold_old()
            try:
                change = NameChange(self.directory, self.final, old)
                self._make_visible(change)
                if old is not None and not change.is_exchange:
                    with contextlib.suppress(OSError):  # then a sweep finds it where it lies
                        old.hide(self.final)
            except BaseException:
                if old is not None:
                    old.release()
                raise
        self.release()
        return old

    def _make_visible(self, change: NameChange) -> None:
        self._prepare_to_publish()
        try:
            change.make()
        finally:
            self._is_published = change.is_made

    def _prepare_to_publish(self) -> None:
        self._check_is_own()
        for parent in reversed(self._parents):
            parent.parent.sync([""])

    def _hold_old(self) -> Held | None:
        """Holds what is to be replaced, so that nobody else changes what its name means."""
        if self.final.status() is None:
            return None
        if self._check is None:
            raise appeared(self.final)
        old = leftovers.hold(self.final, busy_secs=_BUSY_SECS)
        if old is None and self.final.status() is not None:
            raise errors.CommitError(
                f"{self._problem}: another process is just replacing or deleting it, and has not "
                f"finished in {_BUSY_SECS:g} s. End that process, or save again."
            )
        return old

    def undo(self) -> None:
        """Removes what was written, and parents that were made for it."""
        if not self._is_published:
            self._remove()
            for parent in reversed(self._parents):
                with contextlib.suppress(OSError):
                    parent.remove_if_empty()

    def _remove(self) -> None:
        leftovers.discard(self.directory)

    def release(self) -> None:
        """Unlocks what was written."""
        if self._held is not None:
            self._held.release()


def appeared(final: Directory) -> errors.DestinationExistsError:
    """Makes the error of a save that finds something where nothing was when it began."""
    return errors.DestinationExistsError(
        f"Destination {final.path} already exists: it appeared while the save was under way. Save "
        "elsewhere, or with overwrite=True."
    )


class MarkerCommit(RenameCommit):
    """The destination itself, where nothing may lie yet."""

    def __init__(self, final: Directory) -> None:
        super().__init__(final)
        self.directory = final
        self._marker = leftovers.temporary(final).name.encode()

    def _make(self, mode: int | None) -> None:
        leftovers.clear(self.final, is_in_place=True)
        try:
            super()._make(mode)
            self.final.sync([names.CHECKPOINT_MARKER, ""])
        except FileExistsError as error:
            raise errors.DestinationExistsError(
                f"Destination {self.final.path} already exists. Save elsewhere, or with "
                "overwrite=True."
            ) from error
        except OSError:
            with contextlib.suppress(OSError):
                leftovers.clear(self.final, is_in_place=True)
            raise

    def complete(self, documents: Mapping[str, bytes]) -> None:
        """Writes nothing: documents are what tells readers of a checkpoint."""

    def publish(self, documents: Mapping[str, bytes]) -> Held | None:
        """Writes the documents, and the proof when these are durable; see `Commit.publish`."""
        *_, (proof, text) = documents.items()
        others = {name: data for name, data in documents.items() if name != proof}
        with errors.reported_as(errors.CommitError, self._problem):
            self._prepare_to_publish()
            try:
                self._write(others)
                self.final.sync([*others, ""])
                self._is_published = True
                self._write({proof: text})
                self.final.sync([proof, ""])
                self.final.parent.sync([""])
            except OSError as error:
                if not isinstance(error.__cause__, FileExistsError):  # else it is another's
                    self._take_back([proof, *others], error)
                raise
        with contextlib.suppress(OSError):
            self.final.write(names.CHECKPOINT_MARKER, b"")
        self.release()
        return None

    def _take_back(self, documents: Iterable[str], cause: OSError) -> None:
        with errors.reported_as(
            errors.CommitError,
            f"{cause}. It can't be taken back either",
            f"What was saved is visible at {self.final.path}, though a crash may undo it.",
        ):
            for name in documents:
                self.final.remove(name)
        self._is_published = False

    def _remove(self) -> None:
        if self._held is None or self.final.read(names.CHECKPOINT_MARKER) != self._marker:
            return  # it is not there, or another's
        try:
            self._held.hide(self.final)
        except OSError:  # a file system that can't
            self.final.remove(names.CHECKPOINT_METADATA)
            self.final.remove()
        else:
            leftovers.discard(self._held.directory)
