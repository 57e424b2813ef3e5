"""The saves of one run that are under way: one writes, the others are captured and wait.

Rules
  - Saves write, and commit, in the order in which they began, one at a time.
  - No more than a fixed number are under way; who comes then waits for the oldest to end.
  - A failure is told once: by its own response, or else by the next call.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import threading
from collections.abc import Iterable
from typing import Any

from orbax_async import errors
from orbax_async._response import AsyncResponse
from orbax_async._trace import logger

__all__ = ["Pending", "SaveQueue", "until_done"]


def _promise() -> concurrent.futures.Future[None]:
    promise: concurrent.futures.Future[None] = concurrent.futures.Future()
    promise.set_running_or_notify_cancel()  # a waiter that is cancelled does not cancel it
    return promise


@dataclasses.dataclass(eq=False)
class Pending:
    """A save that is under way, and what policies see of it.

    Attributes:
      step: the step's number.
      time: when the save began.
      metrics: the step's.
      may_write: done once the saves before it have ended.
      ended: done once it has, well or not, and the run knows.
      response: what its caller has; None until it is started.
      is_withdrawn: whether it gives way to a later one.
    """

    step: int
    time: datetime.datetime
    metrics: Any
    may_write: concurrent.futures.Future[None] = dataclasses.field(default_factory=_promise)
    ended: concurrent.futures.Future[None] = dataclasses.field(default_factory=_promise)
    response: AsyncResponse[bool] | None = None
    is_withdrawn: bool = False

    def endings(self) -> list[concurrent.futures.Future[Any]]:
        """Returns what is done when all is over, for the run and for the caller."""
        return [self.ended] + ([] if self.response is None else [self.response._committed])


async def until_done(futures: Iterable[concurrent.futures.Future[Any]]) -> None:
    """Waits until all are done, well or not, without blocking the caller's loop."""
    loop = asyncio.get_running_loop()
    for future in futures:
        done = asyncio.Event()

        def tell(_: object, done: asyncio.Event = done) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(done.set)

        future.add_done_callback(tell)
        await done.wait()


class SaveQueue:
    """The saves of one run that are under way.

    Args:
      most: how many there may be.
      supersede: whether those that wait give way to the next one.
    """

    def __init__(self, most: int, supersede: bool) -> None:
        self._most = most
        self._supersede = supersede
        self._lock = threading.Lock()
        self._pending: list[Pending] = []
        self._is_closed = False
        self._responses: list[AsyncResponse[bool]] = []  # whose end nobody has looked at here

    def pending(self) -> list[Pending]:
        """Returns the saves that are under way, the oldest first."""
        with self._lock:
            return list(self._pending)

    @property
    def is_full(self) -> bool:
        """Whether another save would have to wait for one that is under way."""
        with self._lock:
            staying = [each for each in self._pending if not self._gives_way(each)]
            return len(staying) >= self._most

    def _gives_way(self, pending: Pending) -> bool:
        return self._supersede and not pending.may_write.done()

    # Entering and leaving.

    def make_room(self, step: int) -> None:
        """Blocks until another save may begin; those that give way to it are cancelled."""
        for pending in self._in_the_way(step):
            concurrent.futures.wait(pending.endings())

    async def room(self) -> None:
        """Waits until another save could begin at once."""
        while self.is_full and (pending := self.pending()):
            await until_done(pending[0].endings())

    def _in_the_way(self, step: int) -> list[Pending]:
        """Returns the saves that must end before another one begins."""
        with self._lock:
            withdrawn = [each for each in self._pending if self._gives_way(each)]
            for each in withdrawn:
                each.is_withdrawn = True
            staying = [each for each in self._pending if not each.is_withdrawn]
            surplus = max(0, len(staying) - self._most + 1)
        for each in withdrawn:
            logger.info("step %d gives way to step %d; it is not saved", each.step, step)
            if each.response is not None:
                each.response.cancel()
        return withdrawn + staying[:surplus]

    def enter(self, pending: Pending) -> None:
        """Adds a save.

        Raises:
          ClosedError: the queue is closed.
        """
        with self._lock:
            if self._is_closed:
                raise errors.ClosedError(
                    f"step {pending.step} is not saved: the Checkpointer was closed meanwhile"
                )
            self._pending.append(pending)
            self._let_the_first_write()

    def leave(self, pending: Pending) -> None:
        """Removes a save that has ended, or never started; the next one may write."""
        with self._lock:
            if pending not in self._pending:
                return
            self._pending.remove(pending)
            self._let_the_first_write()
        pending.ended.set_result(None)

    def _let_the_first_write(self) -> None:
        staying = [each for each in self._pending if not each.is_withdrawn]
        if staying and not staying[0].may_write.done():
            staying[0].may_write.set_result(None)

    def started(self, pending: Pending, response: AsyncResponse[bool]) -> None:
        """Notes the response of a save."""
        with self._lock:
            pending.response = response
            self._responses.append(response)
        if pending.is_withdrawn:
            response.cancel()

    # Ending.

    def cancel(self, step: int | None) -> bool:
        """Cancels the save of a step, or all; returns whether any had not committed yet."""
        chosen = [each for each in self.pending() if step in (None, each.step)]
        responses = [each.response for each in chosen if each.response is not None]
        return any([response.cancel() for response in responses])

    def close(self) -> None:
        """Lets no save enter any more."""
        with self._lock:
            self._is_closed = True

    def wait(self) -> None:
        """Blocks until all saves that are under way have ended, well or not."""
        concurrent.futures.wait(self._endings_of_all())

    async def wait_async(self) -> None:
        """Waits like `wait`."""
        await until_done(self._endings_of_all())

    def _endings_of_all(self) -> list[concurrent.futures.Future[Any]]:
        with self._lock:
            endings = [ending for each in self._pending for ending in each.endings()]
            return endings + [response._committed for response in self._responses]

    def raise_failures(self) -> None:
        """Raises what a save has failed with, unless it was told already (W20)."""
        with self._lock:
            ended = [response for response in self._responses if response.done()]
            self._responses = [each for each in self._responses if each not in ended]
        failed = []
        for response in ended:
            if not response._is_reported and (error := response.exception()) is not None:
                failed.append(error)
        if not failed:
            return
        for error in failed[1:]:
            failed[0].add_note(f"another save failed too: {type(error).__name__}: {error}")
        raise failed[0]
