"""Where a save writes, and the step that makes it a checkpoint: the two commit protocols.

Rules
  I4   Whoever reads sees a whole checkpoint or none, and an overwrite that fails or dies leaves
       the old one.

Theory of operation
  `Beside` writes to a temporary sibling and renames it; see `atomicity`.

  `InPlace` writes to the destination itself, for file systems that can't rename a directory. The
  destination's marker file is there first, and says who is writing. The checkpoint's own metadata
  follow when everything else is durable, and the commit marker, which is the proof, when they
  are. Without metadata no reader takes the directory for a checkpoint; readers in the same mode
  ask for the proof, too. An old checkpoint is set aside first, so nothing is visible while it is
  overwritten, and put back if the save fails; if the process dies, the next reader or save puts it
  back (`atomicity.recover`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import atomicity, finalize

__all__ = ["Beside", "InPlace", "Place"]


class Beside:
    """A temporary directory beside the destination, which takes its place in one step.

    Attributes:
      directory: where to write.
    """

    is_in_place = False
    makes_checkpoint = True

    def __init__(self, final: str) -> None:
        self._final = final
        self._parents: list[str] = []
        self.directory = atomicity.temporary_path(final)

    def create(self, names_inside: Sequence[str], *, mode: int | None, overwrite: bool) -> None:
        """Makes the directory, its parents, and directories in it."""
        self._parents = atomicity.create(self.directory, names_inside, mode=mode)

    def claim(self) -> bool:
        """Says whether what is written may depend on what is there; asked again until it may."""
        return True

    def publish(self, write_documents: Callable[[], None], *, overwrite: bool) -> str | None:
        """Makes the checkpoint visible; its documents are written already.

        Returns:
          Where the checkpoint that was replaced lies now, or None if there was none.
        """
        self._sync_parents()
        return atomicity.publish(self.directory, self._final, overwrite=overwrite)

    def undo(self) -> None:
        """Removes what was written, and parents that were made for it."""
        atomicity.discard(self.directory)
        atomicity.remove_empty(self._parents)

    def _sync_parents(self) -> None:
        _sync_parents(self._parents, self._final)


class InPlace:
    """The destination itself.

    Attributes:
      directory: where to write.
    """

    is_in_place = True
    makes_checkpoint = True

    def __init__(self, final: str) -> None:
        self._final = final
        self._parents: list[str] = []
        self._aside: str | None = None
        self._is_ours = False
        self.directory = final

    def create(self, names_inside: Sequence[str], *, mode: int | None, overwrite: bool) -> None:
        """Sets aside what is to be overwritten, and makes the directory.

        Raises:
          DestinationExistsError: there is something already, and `overwrite` is not set.
          CommitError: the directory can't be made.
        """
        try:
            if os.path.lexists(self._final):
                if not overwrite:
                    raise errors.DestinationExistsError(
                        f"Destination {self._final} already exists. Save elsewhere, or with "
                        "overwrite=True."
                    )
                aside = atomicity.temporary_path(self._final, "old")
                os.rename(self._final, aside)
                self._aside = aside
            self._parents = atomicity.create(self.directory, names_inside, mode=mode)
            self._is_ours = True
            owner = os.path.basename(atomicity.temporary_path(self._final))
            finalize.write_marker(self._final, owner)
        except OSError as error:
            if isinstance(error, errors.CheckpointError):
                raise
            raise errors.CommitError(
                f"cannot begin to write {self._final}: {error.strerror or error}"
            ) from error

    def claim(self) -> bool:
        """Has nothing to claim: the directory says whose it is."""
        return True

    def publish(self, write_documents: Callable[[], None], *, overwrite: bool) -> str | None:
        """Writes the checkpoint's documents, and then the proof that it is whole.

        Returns:
          Where the checkpoint that was replaced lies now, or None if there was none.
        """
        write_documents()
        document = os.path.join(self._final, names.CHECKPOINT_METADATA)
        finalize.sync_files([document], self._final)
        finalize.sync_directories([self._final], self._final)
        finalize.write_commit_marker(self._final, self._final)
        finalize.sync_files([os.path.join(self._final, names.COMMIT_MARKER)], self._final)
        finalize.sync_directories([self._final, os.path.dirname(self._final)], self._final)
        _sync_parents(self._parents, self._final)
        with contextlib.suppress(OSError):  # it is committed: nobody asks for its owner any more
            finalize.write_marker(self._final)
        return self._aside

    def undo(self) -> None:
        """Removes what was written, and puts back what was set aside."""
        if self._is_ours:
            hidden = atomicity.temporary_path(self._final)
            os.rename(self._final, hidden)
            atomicity.discard(hidden)
        if self._aside is not None:
            os.rename(self._aside, self._final)
        atomicity.remove_empty(self._parents)


Place = Beside | InPlace


def _sync_parents(made: Sequence[str], final: str) -> None:
    finalize.sync_directories([os.path.dirname(path) for path in reversed(made)], final)
