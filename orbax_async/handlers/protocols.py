"""What a handler is."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar, runtime_checkable

from orbax_async.path import Path, PathAwaitingCreation

__all__ = ["PLACEHOLDER", "CheckpointableHandler"]

PLACEHOLDER = ...
"""As an abstract leaf: do not load this leaf, and give `...` back."""

T = TypeVar("T")
AbstractT = TypeVar("AbstractT")


@runtime_checkable
class CheckpointableHandler(Protocol[T, AbstractT]):
    """Saves and loads one kind of object, in two tiers.

    `save` and `load` are coroutines: what they do before they return is tier 1, in which an
    object's state is captured. What they return is awaited as tier 2, in the background. In tier
    1 of a save the directory may not exist yet; tier 2 awaits `directory.await_creation()`.
    """

    async def save(self, directory: PathAwaitingCreation, checkpointable: T) -> Awaitable[None]:
        """Captures `checkpointable`, and returns what writes it."""
        ...

    async def load(
        self, directory: Path, abstract_checkpointable: AbstractT | None = None
    ) -> Awaitable[T]:
        """Checks what is asked for, and returns what reads it."""
        ...

    async def metadata(self, directory: Path) -> AbstractT:
        """Returns the abstract form of what is stored, without reading its data."""
        ...

    def is_handleable(self, checkpointable: Any) -> bool:
        """Says whether this handler can save an object."""
        ...

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Says whether this handler can load what an abstract object asks for."""
        ...
