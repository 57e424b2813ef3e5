"""Committing by a marker: the destination itself says that it is whole, as the last of all.

Theory of operation
  This is how a first save is committed where nothing is renamed. What an overwrite writes lies
  beside, also in this mode, and takes the name as in `rename`: a checkpoint is never hidden.

  1. The destination is made. `orbax.checkpoint` is written to it, which must not be there yet, and
     says whose it is; that is durable before anything else comes.
  2. Handlers write their directories, and all of it is made durable.
  3. `_CHECKPOINT_METADATA` is written and made durable. Without it no reader takes the directory
     for a checkpoint.
  4. `commit_success.txt`, the proof, is written and made durable: this is the commit point.
  5. `orbax.checkpoint` is emptied: nobody asks for the owner any more.

  If its process dies before 4, the next save clears what is there (`leftovers.clear`).

  An owner that was paused, and taken for dead meanwhile, finds another marker than its own at the
  destination, and publishes nothing; the documents of 3 and 4 are written only where there are
  none. With locks, on one machine, nobody who is paused is taken for dead. Without, an owner that
  wakes after two minutes looks at the marker within ten seconds; until then what it was just
  writing may reach files of the same name. Only a commit by renaming keeps these apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._commit.leftovers import Held
from orbax_async._commit.rename import RenameCommit
from orbax_async._storage.directory import Directory

__all__ = ["MarkerCommit"]


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
