"""Finding which layout lies in a directory, and reading a checkpoint as one whole.

Rules
  I4   A reader sees a whole checkpoint, old or new, or none.

Theory of operation
  A layout that the options name is taken at its word. AUTO takes the first of the table that is
  there, and where none is, the first, which then tells what is missing.

  A reader first lets an overwrite settle that was interrupted or is between two renames. Then it
  looks who lies at the path, reads, and looks again. What was read while a checkpoint gave way to
  the next may belong to either, or be gone; then all of it is read again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import TypeVar

import anyio

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._engine import loop
from orbax_async._layouts.layout import Layout, reading
from orbax_async._layouts.orbax import OrbaxLayout
from orbax_async._layouts.tensors import SafetensorsLayout
from orbax_async._operation import Operation
from orbax_async._response import AsyncResponse
from orbax_async._storage.directory import Directory
from orbax_async._storage.local import open_directory
from orbax_async.options import CheckpointLayout
from orbax_async.path import PathLike, pathlike

Found = TypeVar("Found")
T = TypeVar("T")

_LOOKS = 50  # times that a checkpoint is looked for which is just being replaced
_LOOK_SECS = 0.02

TABLE: Mapping[str, type[Layout]] = {"orbax": OrbaxLayout, "safetensors": SafetensorsLayout}
"""Each under the name by which `context.checkpoint_layout` asks for it."""


def layout_of(directory: Directory, options: ambient.Context) -> Layout:
    """Returns the layout under which a directory is read, whatever lies there; blocks."""
    asked = options.checkpoint_layout
    if asked is not CheckpointLayout.AUTO:
        return TABLE[asked.value](directory, options)
    first, *others = (layout(directory, options) for layout in TABLE.values())
    return next((layout for layout in (first, *others) if layout.is_there), first)


def find_checkpoint(
    directory: Directory, options: ambient.Context, *, may_be_damaged: bool = False
) -> Layout:
    """Returns the layout of the checkpoint that lies in a directory; blocks."""
    layout = layout_of(directory, options)
    problem = layout.problem()
    if problem is None or (may_be_damaged and layout.is_damaged):
        return layout
    name = next(name for name, each in TABLE.items() if each is type(layout))
    others = {each: TABLE[each](directory, options) for each in TABLE if each != name}
    if options.checkpoint_layout is CheckpointLayout.AUTO:
        missing = [f"there are no {each.what}; " for each in others.values() if not each.is_there]
        raise errors.InvalidLayoutError(
            f"Could not auto-detect the layout of the checkpoint at {directory.path}: "
            f"{''.join(missing)}and as an {name.capitalize()} checkpoint: {problem}"
        )
    for other, found in others.items():
        if found.is_there:
            problem += f" It holds {found.what}: set context.checkpoint_layout = {other!r}."
    raise errors.InvalidLayoutError(
        f"Could not recognize the checkpoint at {directory.path} as a valid {name.capitalize()} "
        f"checkpoint: {problem}"
    )


class Reader:
    """An operation that reads one checkpoint."""

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

        `find` returns what is to be read of the checkpoint, on a worker, and `read` reads it. With
        `may_be_damaged` a checkpoint counts that can't be loaded.
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
            return find(find_checkpoint(self.directory, options, may_be_damaged=may_be_damaged))

    def _look(self) -> Hashable:
        """Returns what tells a checkpoint from the one before it at the same path."""
        with reading(self.directory.path):
            return self.directory.status(follow_links=True)
