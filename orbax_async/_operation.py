"""The one door to the engine: how an operation starts, what it holds, and how it ends.

    with starting("save") as operation:      # refuses what can't begin
        ...                                  # checks; what is raised here starts nothing
        return operation.start("save to /runs/7", run)

Rules
  I7   An operation sees options as they were when it was called.
  I15  Its response always settles, and what it holds is released, whatever was raised in it.

Theory of operation
  The block is the call of a verb. It runs on the caller's thread, under the snapshot of options.
  Until `start` an error in it is told to the other processes, and nothing has begun. `start` hands
  `run` to the loop and returns the response. When the block of a save is left, the caller waits
  until it may go on: until every value is captured for which it has to wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import os
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar

import anyio
import jax
import numpy as np

from orbax_async import context as ambient
from orbax_async import errors, multihost
from orbax_async._engine import loop
from orbax_async._engine.budget import ByteBudget
from orbax_async._response import AsyncResponse
from orbax_async._trace import Recorder, logger
from orbax_async.options import CheckpointLayout, MemoryOptions

P = ParamSpec("P")
T = TypeVar("T")
Verb = Literal["save", "load", "metadata", "delete"]

# Joint operations of several processes stop waiting for each other somewhat before they time out.
_LONGEST_SECS = 1200.0
_WAITING_SHARE = 0.8


class Operation:
    """One save, load or deletion, of one checkpointable or of several.

    Attributes:
      verb: what it is.
      context: the options as they were when the operation was called (I7).
      processes: who takes part.
      recorder: counts and times what is done.
      enable_x64: whether the caller's jax holds 64-bit values; the setting belongs to a thread.
      write_budget: bytes that are being written, of all its handlers together.
      transfer_budget: bytes that capturing has copied and that are not written yet. A limit on
        writes limits them too: a copy lives until it is written.
      read_budget: bytes that are being read.
      cancel_switch: ends it before its commit point.
      path_lock: the path that it holds until its end; None for one that holds none.
      response: what its caller has, once it is started.
    """

    def __init__(self, verb: Verb) -> None:
        """Takes a snapshot of the caller's options; all processes begin a save or a deletion."""
        self.verb = verb
        self.context = context = ambient.snapshot()
        options, timeout_secs = context.multiprocessing, context.asynchronous.timeout_secs
        self.processes = multihost.Processes(
            primary=options.primary_host,
            active=options.active_processes,
            prefix=options.barrier_sync_key_prefix,
            is_joint=verb in ("save", "delete"),
            timeout_secs=_WAITING_SHARE * (_LONGEST_SECS if timeout_secs is None else timeout_secs),
            call=loop.to_worker,
        )
        self.recorder = Recorder()
        self.enable_x64 = np.dtype(jax.dtypes.canonicalize_dtype(np.float64)) == np.float64
        self.write_budget = ByteBudget(context.memory.write_concurrent_bytes)
        self.transfer_budget = ByteBudget(_transfer_limit(context.memory))
        self.read_budget = ByteBudget(context.memory.read_concurrent_bytes)
        self.cancel_switch = CancelSwitch()
        self.path_lock: PathLock | None = None
        self.response: AsyncResponse[Any] | None = None
        self._is_started = self._has_ended = False
        self._end_profile: Callable[[], None] | None = None
        self._running: set[loop.Background] = set()
        self._waited_for: set[str] = set()
        self._uncaptured: set[str] = set()

    # Starting.

    def lock_path(
        self,
        path: str,
        *,
        overwrite: bool,
        after: concurrent.futures.Future[None] | None = None,
    ) -> PathLock:
        """Queues for a path; it is released when the operation ends, or does not start."""
        self.path_lock = PathLock(path, overwrite=overwrite, after=after)
        return self.path_lock

    def start(self, label: str, run: Callable[[], Awaitable[T]]) -> AsyncResponse[T]:
        """Starts it on the engine's loop, and returns its response.

        Args:
          label: what it is, for messages: "save to /runs/7".
          run: does the work, under the operation's own options; it cleans up after itself.
        """
        if self.verb == "save":
            self._regulate_memory()
        self.cancel_switch.label = label
        response: AsyncResponse[T] = AsyncResponse(label, self.recorder, self.cancel_switch.request)
        self.response = response
        loop.spawn(
            lambda: self._run(run, response),
            label=label,
            exit_grace_secs=self.context.asynchronous.exit_grace_secs,
            when_lost=lambda error: self._end(None, error),
        )
        self._is_started = True
        return response

    def _check_options(self) -> None:
        """Raises for options under which it can't begin."""
        if self.verb != "delete":
            ambient.refuse_unbuilt(self.context, operation=self.verb)
        layout = self.context.checkpoint_layout
        if self.verb == "save" and layout is CheckpointLayout.SAFETENSORS:
            raise errors.UnsupportedOptionError(
                "save does not start: context.checkpoint_layout = CheckpointLayout.SAFETENSORS is "
                "for loading alone; leave it at CheckpointLayout.ORBAX, or at AUTO to load both"
            )

    def _regulate_memory(self) -> None:
        """Moves the limit of transfers, if a regulator governs it, and begins to measure memory."""
        memory = self.context.memory
        if memory.regulator_options is not None:
            limit, self._end_profile = memory.regulator_options.regulator.begin(
                memory.expected_surge_bytes
            )
            self.transfer_budget = ByteBudget(limit)

    def _wait_until_released(self) -> None:
        """Blocks the caller of a save as long as the options say."""
        is_eager = self.verb == "save" and self.context.asynchronous.staging == "eager"
        if is_eager and self.response is not None:
            self.response._wait_until_released()
        self.recorder.unblock()

    # Running: what follows is called on the loop.

    async def _run(self, run: Callable[[], Awaitable[T]], response: AsyncResponse[T]) -> None:
        result: T | None = None
        error: BaseException | None = None
        timeout_secs = self.context.asynchronous.timeout_secs if self.verb == "save" else None
        try:
            _current.set(self)
            with (
                self.cancel_switch.scope() as scope,
                anyio.move_on_after(timeout_secs) as timer,
                errors.ungrouped(),
            ):
                result = await run()
                self.cancel_switch.pass_commit_point()  # for a load, which has no other
            if timer.cancelled_caught:
                raise errors.OperationTimeoutError(
                    f"Overall save timeout exceeded: {self.cancel_switch.label} took longer than "
                    f"asynchronous.timeout_secs, {timeout_secs} s; it is undone"
                )
            if scope.cancelled_caught:
                raise self.cancel_switch.cancelled()
        except asyncio.CancelledError:
            # Not the operation's own cancellation: the interpreter is exiting, and said so.
            error = self.cancel_switch.cancelled()
            response._mark_reported()
        except BaseException as problem:
            error = problem
        try:
            if self._end_profile is not None:
                with anyio.CancelScope(shield=True):
                    await loop.to_worker(self._end_profile)
        except Exception:
            logger.exception("the profiler of RegulatorOptions failed")
        finally:
            self._end(result, error)

    def _end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Releases the path and settles the response, once, whatever has ended the operation."""
        if self._has_ended:
            return
        self._has_ended = True
        if self.path_lock is not None:
            self.path_lock.release()
        if self.response is not None:
            try:
                self.recorder.enter("committed" if error is None else "failed")
                _log(self.cancel_switch.label, self.recorder, error)
            finally:
                self.response._settle(result, error)

    def _abandon(self, error: BaseException) -> None:
        """Releases what an operation holds that does not start, or ends one that nobody has."""
        if self._is_started and self.response is not None:
            self.response._end_interrupted(error)
        else:
            self.response = None
            self._end()
            if self._end_profile is not None:
                self._end_profile()

    def expect(self, names: Iterable[str]) -> None:
        """Says which checkpointables have to be captured before the response is staged."""
        self._waited_for = set(names)
        self._uncaptured = self._waited_for.copy()

    def release_caller(self, name: str, *, is_captured: bool = True) -> None:
        """Says that the caller need not wait any longer for a checkpointable to be captured.

        Args:
          name: the checkpointable's.
          is_captured: whether all its values are captured, not just those that had to be.
        """
        self._waited_for.discard(name)
        if is_captured:
            self._uncaptured.discard(name)
        if self.response is None:  # a handler is used by itself
            return
        if not self._uncaptured:
            self.response._set_staged()
        elif not self._waited_for:
            self.response._release_caller()

    def background(self, function: Callable[[], Awaitable[None]]) -> loop.Background:
        """Runs a coroutine beside the handler that calls this, until it is joined.

        One that is not joined, because the operation fails elsewhere, ends with the operation.
        """

        async def run() -> None:
            try:
                await function()
            finally:
                self._running.discard(running)

        running = loop.Background(run)
        self._running.add(running)
        return running

    async def end_background(self) -> None:
        """Cancels what no handler has joined, and waits for its end."""
        for running in list(self._running):
            await running.cancel()
        self._running.clear()


@contextlib.contextmanager
def starting(verb: Verb) -> Iterator[Operation]:
    """Encloses the call of a verb: what it checks, and the `start` of its operation.

    Raises:
      LoopError: the call comes from the engine's own thread.
      UnsupportedOptionError: an option asks for what this version does not do.
    """
    loop.refuse_engine_thread(verb)
    operation = Operation(verb)
    try:
        with operation.processes.telling(), operation.context:
            operation._check_options()
            yield operation
    except BaseException as error:
        operation._abandon(error)
        raise
    operation._wait_until_released()


_current: contextvars.ContextVar[Operation] = contextvars.ContextVar("orbax_async.operation")


def current(verb: Verb = "load") -> Operation:
    """Returns the operation under way; a handler that is used by itself begins its own."""
    return _current.get(None) or Operation(verb)


def _transfer_limit(memory: MemoryOptions) -> int | None:
    if memory.regulator_options is not None:
        return memory.regulator_options.regulator.current_limit_bytes
    if memory.transfer_concurrent_bytes is not None:
        return memory.transfer_concurrent_bytes
    return memory.write_concurrent_bytes


def _log(label: str, recorder: Recorder, error: BaseException | None) -> None:
    if error is not None:
        logger.debug("%s failed", label, exc_info=error)
        return
    done = recorder.progress()
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


class CancelSwitch:
    """Ends a running operation before its commit point, from any thread.

    Attributes:
      label: what the operation is, for messages.
    """

    def __init__(self) -> None:
        self.label = ""
        self._lock = threading.Lock()
        self._state: Literal["running", "cancelling", "committing"] = "running"
        self._scope: anyio.CancelScope | None = None

    @contextlib.contextmanager
    def scope(self) -> Iterator[anyio.CancelScope]:
        """Encloses the operation's work; a cancellation that was asked for ends it here."""
        with anyio.CancelScope() as scope:
            with self._lock:
                self._scope = scope
                if self._state == "cancelling":
                    scope.cancel()
            yield scope

    def request(self) -> bool:
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
            f"{self.label} was cancelled before it was committed; nothing of it is visible"
        )


class PathLock:
    """A save's or deletion's place in the queue of this process for one path.

    Args:
      path: the path.
      overwrite: whether it may follow another one that is under way.
      after: what it waits for besides; None for nothing.

    Raises:
      SaveInProgressError: another one is under way, and it may not.
    """

    _lock = threading.Lock()
    _last: ClassVar[dict[str, PathLock]] = {}

    def __init__(
        self,
        path: str,
        *,
        overwrite: bool,
        after: concurrent.futures.Future[None] | None = None,
    ) -> None:
        self._path = path
        self._after = after
        self._released: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._released.set_running_or_notify_cancel()
        with self._lock:
            before = self._last.get(path)
            if before is not None and not overwrite:
                raise errors.SaveInProgressError(
                    f"another save to {path} is under way, or its deletion; wait for its "
                    "response, or save with overwrite=True to follow it"
                )
            self._before = before
            self._last[path] = self

    @property
    def is_first(self) -> bool:
        """Whether nothing else was under way when this one came."""
        return self._before is None

    async def acquire(self) -> None:
        """Waits until the one before it is released."""
        if self._before is not None:
            await asyncio.wrap_future(self._before._released)
            self._before = None
        if self._after is not None:
            await asyncio.wrap_future(self._after)

    def release(self) -> None:
        """Lets the next one go on; if this one was never acquired, after the one before it."""
        before, self._before = self._before, None
        if before is None:
            self._leave()
        else:
            before._released.add_done_callback(lambda _: self._leave())

    def _leave(self) -> None:
        with self._lock:
            if self._last.get(self._path) is self:
                del self._last[self._path]
        if not self._released.done():
            self._released.set_result(None)


if hasattr(os, "register_at_fork"):  # what the parent holds is not the child's
    os.register_at_fork(after_in_child=PathLock._last.clear)


def older(newer: Callable[P, T]) -> Callable[P, T]:
    """Returns a verb by a name that Orbax has deprecated; calling it tells the newer name."""

    def function(*args: P.args, **kwargs: P.kwargs) -> T:
        _warn_of_new_name(newer.__name__)
        return newer(*args, **kwargs)

    function.__doc__ = f"Does what `{newer.__name__}` does; deprecated."
    return function


def older_method(name: str) -> Callable[..., Any]:
    """Returns a method that does what the one of another name does, and tells that name."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warn_of_new_name(name)
        return getattr(self, name)(*args, **kwargs)

    method.__doc__ = f"Does what `{name}` does; deprecated."
    return method


def _warn_of_new_name(name: str) -> None:
    warnings.warn(f"Use `{name}` instead.", DeprecationWarning, stacklevel=3)
