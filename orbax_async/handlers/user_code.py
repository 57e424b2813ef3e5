"""Code that users wrote, on the engine's loop: handlers, and objects that save themselves.

Rules
  - A coroutine of the engine never blocks. One of a user may: Orbax runs it on a thread of its own,
    and handlers that write files where they stand are common. Here it holds up the scheduling of
    all operations, but neither the workers nor anybody's own loop; the log names it once.
  - What ends a user's coroutine in an unusual way must not end the loop, nor look as if the
    operation had been cancelled.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Generator
from typing import Any

from orbax_async import errors
from orbax_async._trace import logger
from orbax_async.handlers.protocol import StatefulCheckpointable
from orbax_async.path import Path, PathAwaitingCreation

__all__ = ["StatefulCheckpointableHandler", "awaited", "checked", "dispose", "is_stateful"]

_LONG_SECS = 0.1
_reported: set[str] = set()


def checked(returned: Any, what: str) -> Awaitable[Any]:
    """Returns what a user's code has returned; raises HandlerError if that can't be awaited."""
    if not inspect.isawaitable(returned):
        raise errors.HandlerError(
            f"{what} must be a coroutine function, the first phase, which returns an awaitable, "
            f"the second; it returned {returned!r}"
        )
    return returned


async def awaited(awaitable: Any, what: str) -> Any:
    """Awaits what `what`, a user's code like "PointHandler.save", has returned.

    Raises:
      HandlerError: it is no awaitable; or it asks the interpreter to exit, or is cancelled, on its
        own account.
    """
    try:
        return await _Timed(checked(awaitable, what), what)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise errors.HandlerError(f"{what} was cancelled by its own code") from None
    except (KeyboardInterrupt, SystemExit) as error:
        raise errors.HandlerError(f"{what} raised {error!r}, which would end the engine") from error


class _Timed:
    """Awaits an awaitable step by step, and logs a step in which it blocks the loop for long."""

    def __init__(self, awaitable: Awaitable[Any], what: str) -> None:
        self._awaitable = awaitable
        self._what = what

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = self._awaitable.__await__()
        answer: Any = None
        failure: BaseException | None = None
        while True:
            began = time.perf_counter()
            try:
                if failure is not None:
                    asked = steps.throw(failure)
                elif answer is None:
                    asked = next(steps)
                else:
                    asked = steps.send(answer)
            except StopIteration as end:
                return end.value
            finally:
                failure = None
                self._note(time.perf_counter() - began)
            try:
                answer = yield asked
            except BaseException as error:
                failure = error

    def _note(self, secs: float) -> None:
        if secs > _LONG_SECS and self._what not in _reported:
            _reported.add(self._what)
            logger.warning(
                "%s blocked the engine's loop for %.2f s; let it do that in asyncio.to_thread, so "
                "that other operations go on meanwhile",
                self._what,
                secs,
            )


async def dispose(awaitable: Any) -> None:
    """Ends what was to be awaited and no longer will be: a coroutine, a task or a future."""
    if isinstance(awaitable, asyncio.Future):
        awaitable.cancel()
        await asyncio.wait([awaitable])
        if not awaitable.cancelled():
            awaitable.exception()  # asked for, so that asyncio does not report it as lost
    elif inspect.iscoroutine(awaitable):
        awaitable.close()
    elif isinstance(awaitable, Then):
        await dispose(awaitable.awaitable)


class Then:
    """Awaits an awaitable, and gives a result of its own."""

    def __init__(self, awaitable: Awaitable[Any], result: Any) -> None:
        self.awaitable = awaitable
        self._result = result

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from self.awaitable.__await__()
        return self._result


class StatefulCheckpointableHandler:
    """Lets a `StatefulCheckpointable` save and load itself."""

    async def save(
        self, directory: PathAwaitingCreation, checkpointable: StatefulCheckpointable
    ) -> Awaitable[None]:
        """Lets the object capture its state (phase 1), and returns what writes it (phase 2)."""
        code = f"{type(checkpointable).__name__}.save"
        writing: Awaitable[None] = await checked(checkpointable.save(directory), code)
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
        loading = await checked(abstract_checkpointable.load(directory), code)
        return Then(checked(loading, code), abstract_checkpointable)

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
