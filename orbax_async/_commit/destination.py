"""What may lie at the path that a save is given, and how the save is committed there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from orbax_async import errors
from orbax_async._commit import leftovers, removal
from orbax_async._commit.commit_protocol import Commit
from orbax_async._commit.marker import MarkerCommit
from orbax_async._commit.rename import RenameCommit
from orbax_async._storage.directory import Capability, Directory

__all__ = ["Destination", "check_parent"]


class Destination(NamedTuple):
    """Where a save is to be committed; every method blocks.

    Attributes:
      final: the path.
      overwrite: whether a checkpoint there may be replaced.
      is_in_place: whether a first save is written at the path itself.
      is_replaceable: says whether what lies at a path is a checkpoint, or was to be one.
    """

    final: Directory
    overwrite: bool
    is_in_place: bool
    is_replaceable: Callable[[str], bool]

    def commit(self, *, may_look: bool) -> Commit:
        """Chooses how to commit: in place, where that is asked for, only what overwrites nothing.

        Args:
          may_look: whether it may look at the path. It is of no use before another save there.
        """
        with self._looking():
            is_first = not self.overwrite or (may_look and self._is_free())
        if self.is_in_place and (is_first or not self.final.can(Capability.RENAME)):
            return MarkerCommit(self.final)
        return RenameCommit(self.final, self.check if self.overwrite else None)

    def _looking(self) -> contextlib.AbstractContextManager[None]:
        return errors.reported_as(errors.CommitError, f"cannot save to {self.final.path}")

    def _is_free(self) -> bool:
        return self.final.status() is None or leftovers.is_hollow(self.final)

    def check(self) -> None:
        """Raises what can be known to go wrong before any value is captured.

        Raises:
          DestinationExistsError: something lies there that may not be replaced.
          DeletionInProgressError: a deletion there was begun and not finished.
          CommitError: no directory can be made there.
        """
        with self._looking():
            self._check()

    def _check(self) -> None:
        final = self.final
        leftovers.settle(final.path)
        leftovers.clear(final)
        status = final.status()
        if status is not None and not (self.is_in_place and leftovers.is_hollow(final)):
            self._check_replaceable(is_directory=status.kind == "directory")
        check_parent(final)

    def _check_replaceable(self, *, is_directory: bool) -> None:
        path = self.final.path
        if removal.name_in_deletion(self.final) is not None:
            raise errors.DeletionInProgressError(
                f"{path} has a deletion that was begun and not finished: finish it before saving "
                "there, or delete the checkpoint"
            )
        if leftovers.is_unfinished(self.final) and leftovers.owner_in_place(self.final):
            raise errors.DestinationExistsError(
                f"Destination {path} is being written by another save, or one of another machine "
                "has died there within the last two minutes. Wait for it, or save elsewhere."
            )
        if not self.overwrite:
            raise errors.DestinationExistsError(
                f"Destination {path} already exists. Save elsewhere, or with overwrite=True."
            )
        is_empty = is_directory and not self.final.entries()
        if not is_empty and not (is_directory and self.is_replaceable(path)):
            raise errors.DestinationExistsError(
                f"Destination {path} already exists and is no checkpoint: overwrite=True replaces "
                "checkpoints only. Remove it yourself, or save elsewhere."
            )


def check_parent(final: Directory) -> None:
    """Raises if no directory can be made at a path.

    Raises:
      CommitError: there is a file above it, or nothing can be made there.
    """
    parent = final.parent
    with errors.reported_as(errors.CommitError, f"cannot create {final.path}"):
        while (status := parent.status()) is None:
            parent = parent.parent
        if status.kind == "file":
            raise errors.CommitError(
                f"cannot create {final.path}: {parent.path} is a file, not a directory. Check the "
                "path."
            )
        if not parent.is_writable():
            raise errors.CommitError(
                f"cannot create {final.path}: the directory {parent.path} is not writable. Change "
                "its permissions, or save elsewhere."
            )
