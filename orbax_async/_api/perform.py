"""Running one operation on the engine: its limits, its end, and what it leaves when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal, TypeVar

import anyio

from orbax_async import _operation as operation
from orbax_async import errors
from orbax_async._engine import loop
from orbax_async._operation import Operation
from orbax_async._response import AsyncResponse
from orbax_async._trace import logger

__all__ = ["Control", "start"]

T = TypeVar("T")


class Control:
    """What is asked of a running operation, from any thread."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._lock = threading.Lock()
        self._state: Literal["running", "cancelling", "committing"] = "running"
        self._scope: anyio.CancelScope | None = None

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Encloses the operation's work; a cancellation that was asked for ends it here."""
        with anyio.CancelScope() as scope:
            with self._lock:
                self._scope = scope
                if self._state == "cancelling":
                    scope.cancel()
            yield

    def request_cancel(self) -> bool:
        """Cancels the operation, unless it has passed its commit point."""
        with self._lock:
            if self._state == "committing":
                return False
            self._state = "cancelling"
            scope = self._scope
        if scope is not None:
            loop.call_soon(scope.cancel)
        return True

    def pass_commit_point(self) -> None:
        """From here on the operation can't be cancelled; raises if it already is."""
        with self._lock:
            if self._state == "cancelling":
                raise self.cancelled()
            self._state = "committing"

    def cancelled(self) -> errors.OperationCancelledError:
        """Makes the error that a cancelled operation ends with."""
        return errors.OperationCancelledError(
            f"{self._label} was cancelled before it was committed; nothing of it is visible"
        )


def start(
    label: str,
    doing: Operation,
    body: Callable[[Control, AsyncResponse[T]], Awaitable[T]],
    *,
    timeout_secs: float | None = None,
    when_ended: Callable[[], None] = lambda: None,
) -> AsyncResponse[T]:
    """Starts an operation and returns its response.

    Args:
      label: what it is, for messages: "save to /runs/7".
      doing: its options, processes and recorder.
      body: does the work, under the operation's own options; it cleans up after itself.
      timeout_secs: how long it may take; None for ever.
      when_ended: called on the loop before the response ends.
    """
    if loop.is_engine_thread():
        raise errors.LoopError(
            f"{label} was called on the engine's own thread, which must never wait; call it from "
            "a thread or a loop of your own"
        )
    response: AsyncResponse[T] = AsyncResponse(label, doing.recorder)
    control = Control(label)
    response._request_cancel = control.request_cancel

    async def run() -> None:
        operation.enter(doing)
        result: T | None = None
        error: BaseException | None = None
        try:
            with doing.context:
                result = await _limited(label, control, body(control, response), timeout_secs)
        except BaseException as problem:
            error = problem
        if isinstance(error, asyncio.CancelledError):
            # Not this operation's own cancellation: the interpreter is exiting, and said so.
            error = control.cancelled()
            response._mark_reported()
        when_ended()
        doing.recorder.enter("committed" if error is None else "failed")
        _log(label, doing, error)
        response._settle(result, error)

    loop.spawn(run, label=label, exit_grace_secs=doing.context.asynchronous.exit_grace_secs)
    return response


async def _limited(
    label: str, control: Control, work: Awaitable[T], timeout_secs: float | None
) -> T:
    late = errors.OperationTimeoutError(
        f"Overall save timeout exceeded: {label} took longer than asynchronous.timeout_secs, "
        f"{timeout_secs} s; it is undone"
    )
    with control.scope(), anyio.move_on_after(timeout_secs) as timer, errors.ungrouped():
        result = await work
        control.pass_commit_point()  # for what has none of its own: a load is cancelled or returned
        return result
    raise late if timer.cancelled_caught else control.cancelled()


def _log(label: str, doing: Operation, error: BaseException | None) -> None:
    if error is not None:
        logger.debug("%s failed", label, exc_info=error)
        return
    done: Any = doing.recorder.progress()
    megabytes = done.bytes_planned / 1e6
    logger.info(
        "%s: %d leaves, %.1f MB in %.3f s (%.0f MB/s), caller blocked %.3f s",
        label,
        done.leaves_planned,
        megabytes,
        done.elapsed_secs,
        megabytes / max(done.elapsed_secs, 1e-9),
        done.blocked_secs,
    )
