"""Objects that save and load themselves."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from orbax_async import errors
from orbax_async.handlers import user_code
from orbax_async.handlers.protocol import StatefulCheckpointable
from orbax_async.path import Path, PathAwaitingCreation

__all__ = ["StatefulCheckpointableHandler", "is_stateful"]


class StatefulCheckpointableHandler:
    """Lets a `StatefulCheckpointable` save and load itself."""

    async def save(
        self, directory: PathAwaitingCreation, checkpointable: StatefulCheckpointable
    ) -> Awaitable[None]:
        """Lets the object capture its state (phase 1), and returns what writes it (phase 2)."""
        code = f"{type(checkpointable).__name__}.save"
        writing: Awaitable[None] = await user_code.checked(checkpointable.save(directory), code)
        return writing

    async def load(
        self, directory: Path, abstract_checkpointable: StatefulCheckpointable | None = None
    ) -> Awaitable[Any]:
        """Returns what loads the state into the object, and returns that.

        Raises:
          MissingAbstractError: there is no object to load into.
        """
        if abstract_checkpointable is None:
            raise errors.MissingAbstractError(
                "To restore a `StatefulCheckpointable`, you must pass an instance of the object: "
                "its state is loaded into that"
            )
        code = f"{type(abstract_checkpointable).__name__}.load"
        loading = await user_code.checked(abstract_checkpointable.load(directory), code)
        return user_code.Then(user_code.checked(loading, code), abstract_checkpointable)

    async def metadata(self, directory: Path) -> None:
        """Returns None: only the object itself can read what it has written."""

    def is_handleable(self, checkpointable: Any) -> bool:
        """Says whether an object saves itself."""
        return is_stateful(checkpointable)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Says whether an object loads itself."""
        return is_stateful(abstract_checkpointable)


def is_stateful(value: Any) -> bool:
    """Says whether an object is a `StatefulCheckpointable`; a class of such objects is none."""
    return isinstance(value, StatefulCheckpointable) and not isinstance(value, type)
