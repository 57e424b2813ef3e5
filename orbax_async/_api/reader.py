"""Reading a checkpoint as one whole: what loading, describing and verifying have in common.

Rules
  I4   A reader sees a whole checkpoint, old or new, or none.

Theory of operation
  A reader first lets an overwrite settle that was interrupted or is between two renames. Then it
  looks who lies at the path, reads, and looks again. What was read while a checkpoint gave way to
  the next may belong to either, or be gone; then all of it is read again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import TypeVar

import anyio

from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._engine import loop
from orbax_async._layouts import table
from orbax_async._layouts.layout import Layout, reading
from orbax_async._operation import Operation
from orbax_async._response import AsyncResponse
from orbax_async._storage.local import open_directory
from orbax_async.path import PathLike, pathlike

__all__ = ["Reader"]

Found = TypeVar("Found")
T = TypeVar("T")

_LOOKS = 50  # times that a checkpoint is looked for which is just being replaced
_LOOK_SECS = 0.02


class Reader:
    """An operation that reads one checkpoint.

    Args:
      operation: the operation.
      path: the checkpoint.
    """

    def __init__(self, operation: Operation, path: PathLike) -> None:
        self._operation = operation
        self.directory = open_directory(pathlike.absolute(path, operation.context.file.path_class))
        self._is_settled = True
        self._identity: Hashable = None

    def start(
        self,
        label: str,
        find: Callable[[Layout], Found],
        read: Callable[[Found], Awaitable[T]],
        *,
        may_be_damaged: bool = False,
    ) -> AsyncResponse[T]:
        """Starts the operation, and returns its response.

        Args:
          label: what it is, for messages: "load from".
          find: returns what is to be read of the checkpoint; called on a worker.
          read: reads it.
          may_be_damaged: whether a checkpoint counts that can't be loaded.
        """
        path = self.directory.path

        async def run() -> T:
            changed: Exception | None = None
            for _ in range(_LOOKS):
                try:
                    found = await loop.to_worker(self._find, find, may_be_damaged)
                    result = await read(found)
                    if await loop.to_worker(self._look) == self._identity:
                        return result
                except errors.CommitError:
                    raise  # what an overwrite has set aside can't be put back
                except Exception as error:
                    if self._is_settled and await loop.to_worker(self._look) == self._identity:
                        raise
                    changed = error
                if not self._is_settled:
                    await anyio.sleep(_LOOK_SECS)
            raise errors.InvalidLayoutError(
                f"{path} was being overwritten each of the {_LOOKS} times that it was read; read "
                "it again later"
            ) from changed

        return self._operation.start(f"{label} {path}", run)

    def _find(self, find: Callable[[Layout], Found], may_be_damaged: bool) -> Found:
        with reading(self.directory.path):
            self._is_settled = not leftovers.settle(self.directory.path)
            self._identity = self.directory.status(follow_links=True)
            options = self._operation.context
            return find(
                table.find_checkpoint(self.directory, options, may_be_damaged=may_be_damaged)
            )

    def _look(self) -> Hashable:
        """Returns what tells a checkpoint from the one before it at the same path."""
        with reading(self.directory.path):
            return self.directory.status(follow_links=True)
