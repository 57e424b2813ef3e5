"""What a handler is, and what an object that saves itself is."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar, runtime_checkable

from orbax_async.path import Path, PathAwaitingCreation

__all__ = [
    "PLACEHOLDER",
    "AbstractCheckpointable",
    "Checkpointable",
    "CheckpointableHandler",
    "StatefulCheckpointable",
]

PLACEHOLDER = ...
"""As an abstract leaf: do not load this leaf, and give `...` back."""

T = TypeVar("T")
AbstractT = TypeVar("AbstractT")


class Checkpointable(Protocol):
    """Anything that a checkpoint can hold under a name: a pytree, a dict of JSON, an iterator."""


class AbstractCheckpointable(Protocol):
    """Anything that says what a checkpointable is to be loaded as."""


@runtime_checkable
class CheckpointableHandler(Protocol[T, AbstractT]):
    """Saves and loads one kind of object, in two phases.

    `save` and `load` are coroutines: what they do before they return is phase 1, in which an
    object's state is captured. What they return is awaited as phase 2, in the background. In phase
    1 of a save the directory may not exist yet; phase 2 awaits `directory.await_creation()`. All
    checkpointables of one checkpoint are saved at once, each phase 2 after the last phase 1.

    Handlers run on the engine's loop. Work that takes long belongs into `asyncio.to_thread`: while
    a coroutine blocks, no other operation is scheduled. They are constructed without arguments,
    once for each operation, unless they are registered as instances.

    Example:
      ::

        @ocp.handlers.register_handler
        class PointHandler:
            async def save(self, directory, checkpointable):
                text = json.dumps(dataclasses.asdict(checkpointable))

                async def write():
                    path = await directory.await_creation()
                    await asyncio.to_thread((path / "point.json").write_text, text)

                return write()

            async def load(self, directory, abstract_checkpointable=None):
                async def read():
                    text = await asyncio.to_thread((directory / "point.json").read_text)
                    return Point(**json.loads(text))

                return read()

            async def metadata(self, directory):
                return AbstractPoint()

            def is_handleable(self, checkpointable):
                return isinstance(checkpointable, Point)

            def is_abstract_handleable(self, abstract_checkpointable):
                return isinstance(abstract_checkpointable, AbstractPoint)
    """

    async def save(self, directory: PathAwaitingCreation, checkpointable: T) -> Awaitable[None]:
        """Captures `checkpointable`, and returns what writes it."""

    async def load(
        self, directory: Path, abstract_checkpointable: AbstractT | None = None
    ) -> Awaitable[T]:
        """Checks what is asked for, and returns what reads it."""

    async def metadata(self, directory: Path) -> AbstractT:
        """Returns the abstract form of what is stored, without reading its data."""

    def is_handleable(self, checkpointable: Any) -> bool:
        """Says whether this handler can save an object."""

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Says whether this handler can load what an abstract object asks for.

        None says that it can't tell: it is then asked to load what it has saved. An abstract object
        of None asks for what is stored, and this method is not asked about it.
        """


@runtime_checkable
class StatefulCheckpointable(Protocol):
    """An object that saves and loads its own state, in two phases, without any handler.

    Grain's iterators are such objects. One is loaded into an instance, which is given as its own
    abstract form and is what the load returns. Its coroutines run where those of handlers do.

    Example:
      ::

        ocp.save_checkpointables("/checkpoints/7", {"state": state, "data": iterator})
        ocp.load_checkpointables("/checkpoints/7", {"state": None, "data": iterator})
    """

    async def save(self, directory: PathAwaitingCreation) -> Awaitable[None]:
        """Captures the object's state, and returns what writes it."""

    async def load(self, directory: Path) -> Awaitable[None]:
        """Returns what reads the state and puts it into the object."""
