"""Responses: one handle on an operation, for sync and async callers alike."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar, final

from orbax_async import errors
from orbax_async._engine import loop
from orbax_async._trace import Progress, Recorder, Span, logger

R = TypeVar("R")
T = TypeVar("T")

_UNDO_SECS = 1.5  # for which an interrupt waits


@final
class AsyncResponse(Generic[T]):
    """What `save_async` and `load_async` return: an operation that is under way.

    It can be awaited from any event loop and from several at once, waited for by any thread, and
    asked for its progress. Cancelling a task that awaits it does not cancel the operation; only
    `cancel` does.

    Example:
      ::

        response = ocp.save_async("/checkpoints/7", state)
        await response.staged()       # every value is captured: mutate, donate, delete
        ...
        await response                # written, durable and visible

    A failure that nobody asks for is written to the log, and at interpreter exit to stderr.
    """

    def __init__(self, label: str, recorder: Recorder, request_cancel: Callable[[], bool]) -> None:
        self._label = label
        self._recorder = recorder
        self._request_cancel = request_cancel
        self._pid = os.getpid()
        self._committed: concurrent.futures.Future[T] = _promise()
        self._staged: concurrent.futures.Future[None] = _promise()
        self._released: concurrent.futures.Future[None] = _promise()
        self._lock = threading.Lock()
        self._callbacks: list[tuple[Callable[..., object], Callable[[], object]]] = []
        self._is_reported = False
        _unreported.add(self)

    def __repr__(self) -> str:
        return f"<AsyncResponse of {self._label}: {self.progress.phase}>"

    # Waiting.

    def result(self, timeout: float | None = None) -> T:
        """Blocks until the operation is committed, and returns its result.

        Args:
          timeout: seconds; the operation goes on when they are over, and may be waited for again.

        Raises:
          TimeoutError: the time is over.
          CheckpointError: the operation failed, each time it is asked.
          OperationCancelledError: it was cancelled before its commit point.
          LoopError: the call comes from the engine's own thread, which it would block for ever.
        """
        return self._wait(self._committed, timeout)

    def _finish(self) -> T:
        """Blocks like `result`, for a verb that blocks: what interrupts it ends the operation."""
        try:
            return self._wait(self._committed)
        except BaseException as raised:
            self._end_interrupted(raised)
            raise

    def _wait_until_released(self) -> None:
        """Blocks until the caller may go on; who interrupts that never gets the response."""
        try:
            self._wait(self._released)
        except BaseException as raised:
            self._end_interrupted(raised)
            raise

    def _end_interrupted(self, raised: BaseException) -> None:
        """Undoes what can still be undone, and notes what became of an operation.

        Nothing is to be done where it was its own failure that was raised.
        """
        for promise in (self._released, self._committed):
            if promise.done() and promise.exception() is raised:
                return
        self.cancel()
        concurrent.futures.wait([self._committed], timeout=_UNDO_SECS)
        if not self._committed.done():
            end = "goes on in the background: it could not be undone in time"
        elif (error := self._committed.exception()) is None:
            end = "could no longer be stopped, and is complete"
        elif self.cancelled():
            end = "is undone"
        else:  # which says what is visible
            end = f"has failed: {error}"
        raised.add_note(f"{self._label} {end}.")
        self._mark_reported()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Blocks like `result`, and returns what the operation failed with, or None."""
        self._check_may_block()
        error = self._committed.exception(timeout)
        self._note_report(self._committed)
        return error

    def __await__(self) -> Generator[Any, None, T]:
        """Waits like `result` without blocking the caller's event loop."""
        return self._await(self._committed)

    def staged(self) -> Awaitable[None]:
        """Returns an awaitable that ends once every value is captured.

        From then on the inputs may be mutated, donated and deleted. A failure before that is
        raised here too.
        """
        self._check_process()
        return _Staged(self)

    def wait_staged(self, timeout: float | None = None) -> None:
        """Blocks until every value is captured; see `staged` and `result`."""
        self._wait(self._staged, timeout)

    def _wait(self, promise: concurrent.futures.Future[R], timeout: float | None = None) -> R:
        self._check_may_block()
        try:
            return promise.result(timeout)
        finally:
            self._note_report(promise)

    def _await(self, promise: concurrent.futures.Future[R]) -> Generator[Any, None, R]:
        self._check_process()
        try:
            asyncio.get_running_loop()
        except RuntimeError as error:
            raise errors.LoopError(
                f"{self._label} can be awaited on asyncio's event loops alone, of which none runs "
                "here. Wait for `result` on a thread, as in `trio.to_thread.run_sync`."
            ) from error
        try:
            return (yield from asyncio.wrap_future(promise).__await__())
        finally:
            self._note_report(promise)

    # Asking.

    def done(self) -> bool:
        """Says whether the operation has ended, well or not."""
        return self._committed.done()

    def cancelled(self) -> bool:
        """Says whether the operation has ended because it was cancelled."""
        is_done = self._committed.done()
        return is_done and isinstance(self._committed.exception(), errors.OperationCancelledError)

    @property
    def progress(self) -> Progress:
        """A frozen snapshot of what is done so far."""
        return self._recorder.progress()

    @property
    def timeline(self) -> tuple[Span, ...]:
        """The pieces of work that have ended: what ran when, and how many bytes it moved."""
        return self._recorder.timeline()

    # Acting.

    def cancel(self) -> bool:
        """Asks the operation to stop and to undo what it did.

        Returns:
          True if the request came before the commit point: nothing becomes visible, and waiting
          raises OperationCancelledError. False if the operation is committed, or about to be.
        """
        self._check_process()
        is_cancelled = not self.done() and self._request_cancel()
        if is_cancelled:
            self._mark_reported()
        return is_cancelled

    def add_done_callback(self, callback: Callable[[AsyncResponse[T]], object]) -> None:
        """Calls `callback(response)` once the operation has ended, also when it failed.

        Callbacks run in order on a thread of their own, or at once in this thread if the operation
        has ended. What they raise is logged. Those of asyncio itself (`asyncio.wait`) run on the
        event loop that adds them.
        """
        if getattr(callback, "__module__", "") == "asyncio.tasks":
            schedule = asyncio.get_running_loop().call_soon_threadsafe
            self._add_callback(callback, lambda: schedule(callback, self))
        else:
            self._add_callback(callback, lambda: callback(self))

    def remove_done_callback(self, callback: Callable[[AsyncResponse[T]], object]) -> int:
        """Forgets a callback, and returns how often it would have been called."""
        with self._lock:
            kept = [each for each in self._callbacks if each[0] != callback]
            count = len(self._callbacks) - len(kept)
            self._callbacks = kept
        return count

    def on_complete(self, callback: Callable[[T], object]) -> None:
        """Calls `callback(result)` once the operation has succeeded; never after a failure."""

        def if_successful() -> None:
            if self._committed.exception() is None:
                callback(self._committed.result())

        self._add_callback(callback, if_successful)

    def _add_callback(self, callback: Callable[..., object], call: Callable[[], object]) -> None:
        with self._lock:
            if not self._committed.done():
                self._callbacks.append((callback, call))
                return
        self._call(call)

    def _call(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception:
            logger.exception("a callback of %s failed", self._label)

    def _call_all(self, callbacks: list[Callable[[], object]]) -> None:
        """Calls callbacks on the thread that serves those of all operations, and must not end."""
        for callback in callbacks:
            try:
                self._call(callback)
            except BaseException:
                logger.exception("a callback of %s tried to end its thread", self._label)

    # The operation's side.

    def _release_caller(self) -> None:
        if not self._released.done():
            self._released.set_result(None)

    def _set_staged(self) -> None:
        self._release_caller()
        if not self._staged.done():
            self._staged.set_result(None)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        """Ends the response, on the engine's loop; only the first end counts."""
        with self._lock:
            if self._committed.done():
                return
            if error is None:
                self._set_staged()
                self._committed.set_result(result)
            else:
                for promise in (self._released, self._staged):
                    if not promise.done():
                        promise.set_exception(error)
                self._committed.set_exception(error)
            callbacks, self._callbacks = [call for _, call in self._callbacks], []
        if error is None:
            _unreported.discard(self)
        if callbacks:
            loop.submit_callback(lambda: self._call_all(callbacks))

    def _note_report(self, asked: concurrent.futures.Future[Any]) -> None:
        """Remembers that a failure, if there is one, has been told to somebody."""
        if asked.done() and asked.exception() is not None:
            self._mark_reported()

    def _mark_reported(self) -> None:
        self._is_reported = True
        _unreported.discard(self)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise errors.LoopError(
                f"{self._label} was started by process {self._pid}; a forked child can't wait for "
                "it. Wait in the parent, or start the operation in the child."
            )

    def _check_may_block(self) -> None:
        self._check_process()
        loop.refuse_engine_thread(
            f"waiting for {self._label}", "await the response instead, or wait on another thread"
        )

    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if _is_finalizing() or self._is_reported or os.getpid() != self._pid:
            return
        if self._committed.done():
            error = self._committed.exception()
            if error is not None:
                told = errors.with_notes(error)
                logger.error("%s failed, and nobody asked for its result: %s", self._label, told)


def _promise() -> concurrent.futures.Future[Any]:
    promise: concurrent.futures.Future[Any] = concurrent.futures.Future()
    promise.set_running_or_notify_cancel()  # a waiter that is cancelled does not cancel it
    return promise


class _Staged:
    """Awaits that a response is staged, on any number of loops."""

    def __init__(self, response: AsyncResponse[Any]) -> None:
        self._response = response

    def __await__(self) -> Generator[Any, None, None]:
        return self._response._await(self._response._staged)


_unreported: weakref.WeakSet[AsyncResponse[Any]] = weakref.WeakSet()


def _report_at_exit() -> None:
    """Tells on stderr what failed in the background and was never asked for."""
    for response in list(_unreported):
        if response._pid == os.getpid() and response.done():
            error = response.exception()
            if error is not None:
                told = errors.with_notes(error)
                print(f"orbax_async: {response._label} FAILED: {told}", file=sys.stderr)
                response._mark_reported()


loop.at_exit(_report_at_exit)
