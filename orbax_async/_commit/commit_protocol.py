"""What a save asks of the way in which it is committed.

Rules
  I4   A reader sees a whole checkpoint, old or new, or none; an overwrite never leaves none.
  I5   All data is durable before the checkpoint becomes visible, and what makes it visible is
       durable before the response is done.

Theory of operation
  `sequence` has the one order of steps, whatever the commit: begin, claim, let handlers write,
  complete, make all of it durable, publish; or undo, at any time before publishing.

  `rename.RenameCommit` writes beside the destination, and takes its name in one step. That is how
  a checkpoint is overwritten, in every mode: the old one is visible and whole until the new one is.

  `marker.MarkerCommit` writes at the destination, where nothing lies yet, for file systems and
  stores that can't rename. The destination says first whose it is, and last that it is whole.

  `sessions.PartCommit` adds a part to a session of partial saves, and `sessions.WholeCommit` makes
  a session a checkpoint; both take names as `RenameCommit` does.

  What they leave when they die, and what becomes of it, is told in `leftovers`. Every method
  blocks, and only the primary process calls them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from orbax_async._commit.leftovers import Held
from orbax_async._storage.directory import Directory

__all__ = ["Commit"]


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
