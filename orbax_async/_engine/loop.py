"""The one event loop of the process, and the workers that do its blocking calls.

Rules
  I6   At most one loop thread per process; a save in the steady state starts no thread, no loop.
  I11  A forgotten operation neither hangs the interpreter nor leaves a visible half-checkpoint.

Theory of operation
  The first operation starts an *engine*: one thread with an event loop (uvloop where it exists),
  a fixed set of worker threads, and a watcher. Nothing else in the package starts a thread.

  `spawn` schedules a coroutine on the loop under a copy of the caller's context variables and
  returns at once. `to_worker` is how code on the loop makes a blocking call. The workers exist
  from the start because from Python 3.12 on no thread can be started once the interpreter has
  begun to exit, and that is when the last checkpoint of a script is still being written. They also
  take over what handlers give to `asyncio.to_thread`, whose own threads end before that.

  The watcher is the only thread of ours that the interpreter waits for. It sleeps until the main
  thread has ended, and every other that the interpreter waits for. Then it gives each running
  operation its grace period, cancels what is left (with a line on stderr), and stops the loop and
  the workers before finalization begins. It waits for no end without a bound: what hangs in a
  blocking call is left behind, in threads that the interpreter does not wait for.

  A forked child inherits memory but no threads: it forgets the engine and starts its own on first
  use. Operations of the parent stay the parent's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import importlib
import os
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import anyio

from orbax_async import errors

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

# What anyio imports as its first loop starts: here, the first operation does not wait for it.
with contextlib.suppress(ImportError):
    importlib.import_module("anyio._backends._asyncio")

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_WORKERS = 4  # few: each keeps an arena of the C allocator, and with it some freed memory
_CANCEL_SECS = 2.0  # how long the exit drain waits for cancelled operations to clean up


@dataclasses.dataclass(eq=False)
class _Running:
    """An operation on the loop; `scope` is there once it has begun."""

    label: str
    exit_grace_secs: float
    is_told_of: bool
    when_lost: Callable[[BaseException], None] | None = None
    ended: concurrent.futures.Future[None] = dataclasses.field(
        default_factory=concurrent.futures.Future
    )
    scope: anyio.CancelScope | None = None
    task: asyncio.Task[None] | None = None  # the loop itself holds tasks only weakly

    def cancel(self) -> None:
        """Cancels the operation; called on the loop."""
        if self.scope is not None:
            self.scope.cancel()


class _Executor(concurrent.futures.ThreadPoolExecutor):
    """Where the `asyncio.to_thread` of users' handlers runs: on the workers during the exit."""

    def __init__(self, workers: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        super().__init__(thread_name_prefix="orbax_async to_thread")
        self._exit_jobs = workers

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        # A job whose thread could not be started is queued all the same, so it may be called twice.
        waiting = [future]

        def job() -> None:
            try:
                taken = waiting.pop()
            except IndexError:
                return
            if taken.set_running_or_notify_cancel():
                try:
                    taken.set_result(fn(*args, **kwargs))
                except BaseException as error:
                    taken.set_exception(error)
            del taken  # with an error, whose traceback has this frame, it would be a cycle

        try:
            super().submit(job)
        except RuntimeError:  # the interpreter is exiting, and executors start nothing any more
            self._exit_jobs.put(job)
        return future


class Engine:
    """The loop thread, the workers and the watcher of one process."""

    def __init__(self) -> None:
        self.running: set[_Running] = set()
        self._is_stopping = False
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Users' callbacks may wait for operations, and those need the workers.
        self.callbacks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        roles = [(f"worker {index}", self.jobs) for index in range(_WORKERS)]
        roles.append(("callbacks", self.callbacks))
        self._workers = [
            threading.Thread(
                target=self._work, args=(jobs,), name=f"orbax_async {role}", daemon=True
            )
            for role, jobs in roles
        ]
        for worker in self._workers:
            worker.start()
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop_thread = threading.Thread(
            target=self._run_loop, args=(started,), name="orbax_async loop", daemon=True
        )
        self._loop_thread.start()
        try:
            started.result()
        except BaseException:
            self._end_threads()
            raise
        self.thread_id = self._loop_thread.ident
        self._watcher = threading.Thread(target=self._watch, name="orbax_async exit watcher")
        self._watcher.daemon = False
        self._watcher.start()

    def _run_loop(self, started: concurrent.futures.Future[None]) -> None:
        async def run() -> None:
            self.loop, self._stopped = asyncio.get_running_loop(), anyio.Event()
            self.loop.set_default_executor(_Executor(self.jobs))
            started.set_result(None)
            await self._stopped.wait()

        try:
            anyio.run(run, backend="asyncio", backend_options={"loop_factory": new_event_loop})
        except Exception as error:
            if not started.done():
                started.set_exception(error)
            elif not isinstance(error, RuntimeError):
                raise
            # From Python 3.12 on there is no thread to be had at the end that ends the executor.

    def spawn(self, function: Callable[[], Awaitable[None]], about: _Running) -> None:
        """Runs a coroutine function on the loop under a copy of the caller's context."""
        if self._is_stopping:
            raise errors.LoopError(
                f"{about.label}: the interpreter is exiting, and the engine has stopped; "
                "start the operation before the main thread ends"
            )
        self.running.add(about)
        context = contextvars.copy_context()
        if (sniffio := sys.modules.get("sniffio")) is not None:  # a caller may be on trio's loop
            context.run(sniffio.current_async_library_cvar.set, "asyncio")

        async def run() -> None:
            try:
                with anyio.CancelScope() as about.scope:
                    await function()
            except BaseException as error:
                if about.when_lost is not None:
                    with contextlib.suppress(BaseException):
                        about.when_lost(error)
                elif not isinstance(error, SystemExit | KeyboardInterrupt):
                    raise  # I15: of these two asyncio would end the loop
            finally:
                self.running.discard(about)
                about.ended.set_result(None)

        def begin() -> None:
            about.task = asyncio.get_running_loop().create_task(run(), name=about.label)

        self.loop.call_soon_threadsafe(begin, context=context)

    @staticmethod
    def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None:
            with contextlib.suppress(BaseException):  # I15: a logger may raise anything
                job()
            del job  # an idle worker holds nobody's arrays

    def _watch(self) -> None:
        threading.main_thread().join()
        while others := [each for each in threading.enumerate() if self._is_waited_for(each)]:
            threading.Thread.join(others[0])  # a subclass's own may raise, and end this watch
        self._drain()
        self._is_stopping = True
        for hook in _exit_hooks:
            hook()
        # The loop ends first: what was cancelled may need the workers to clean up.
        self.loop.call_soon_threadsafe(self._stopped.set)
        self._loop_thread.join(_CANCEL_SECS)
        self._end_threads()
        until = time.monotonic() + _CANCEL_SECS
        for worker in self._workers:
            worker.join(max(0, until - time.monotonic()))

    def _end_threads(self) -> None:
        self.callbacks.put(None)
        for _ in range(_WORKERS):
            self.jobs.put(None)

    def _is_waited_for(self, thread: threading.Thread) -> bool:
        # The interpreter lets these end before it goes on, so they may still start operations.
        return not thread.daemon and thread is not self._watcher and thread.is_alive()

    def _drain(self) -> None:
        """I11: waits for each running operation as long as its grace allows, then cancels it."""
        began = time.monotonic()
        while running := list(self.running):
            waited = time.monotonic() - began
            late = [about for about in running if waited >= about.exit_grace_secs]
            if late:
                self._abandon(late)
                continue
            concurrent.futures.wait(
                [about.ended for about in running],
                timeout=min(about.exit_grace_secs for about in running) - waited,
                return_when=concurrent.futures.FIRST_COMPLETED,
            )

    def _abandon(self, late: list[_Running]) -> None:
        for about in late:
            if about.is_told_of:
                print(
                    f"orbax_async: {about.label} was still running {about.exit_grace_secs:g} s "
                    "after the main thread ended: it is cancelled and NOT committed. Wait for the "
                    "response before the program ends.",
                    file=sys.stderr,
                    flush=True,
                )
            self.loop.call_soon_threadsafe(about.cancel)
        concurrent.futures.wait([about.ended for about in late], timeout=_CANCEL_SECS)
        self.running.difference_update(late)


_exit_hooks: list[Callable[[], None]] = []
_engine: Engine | None = None
_lock = threading.Lock()


def _current() -> Engine:
    global _engine
    with _lock:
        if _engine is None:
            try:
                _engine = Engine()
            except (RuntimeError, OSError) as error:
                raise errors.LoopError(
                    f"the checkpoint engine cannot start: {error}; the interpreter may be exiting, "
                    "or the process have too many threads or open files"
                ) from error
        return _engine


def _forget_in_child() -> None:
    global _engine, _lock
    _engine = None
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def spawn(
    function: Callable[[], Awaitable[None]],
    *,
    label: str,
    exit_grace_secs: float,
    is_told_of: bool = True,
    when_lost: Callable[[BaseException], None] | None = None,
) -> None:
    """Schedules `function` on the engine's loop and returns at once.

    Args:
      function: a coroutine function that handles its own errors.
      label: what is running, for messages: "save to /runs/7".
      exit_grace_secs: how long interpreter exit waits for it.
      is_told_of: whether stderr hears of it when it is cancelled at exit.
      when_lost: called with what ends its task, should anything but its own end do so.

    Raises:
      LoopError: the interpreter is exiting.
    """
    _current().spawn(function, _Running(label, exit_grace_secs, is_told_of, when_lost))


def at_exit(hook: Callable[[], None]) -> None:
    """Calls `hook` once everything has ended and before the interpreter does."""
    _exit_hooks.append(hook)


def call_soon(function: Callable[[], object]) -> None:
    """Calls a quick function on the engine's loop, from any thread."""
    _current().loop.call_soon_threadsafe(function)


def submit_callback(job: Callable[[], None]) -> None:
    """Runs a user's callbacks, whose errors are handled, one job after the other."""
    _current().callbacks.put(job)


def is_engine_thread() -> bool:
    """Says whether the calling thread is the engine's loop thread."""
    engine = _engine
    return engine is not None and engine.thread_id == threading.get_ident()


def refuse_engine_thread(
    what: str, advice: str = "call it from a thread or a loop of your own"
) -> None:
    """Raises LoopError on the engine's own thread, which must never wait.

    Args:
      what: what would block there: "save".
      advice: what to do instead.
    """
    if is_engine_thread():
        raise errors.LoopError(
            f"{what} is refused on the engine's own thread, which must never wait; {advice}"
        )


async def to_worker(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Runs a blocking call on a worker, under a copy of the caller's context.

    Cancellation waits for the call to end: a worker never acts on behalf of an operation that has
    already been undone.
    """
    engine = _current()
    caller = asyncio.get_running_loop()  # a handler that is used by itself has a loop of the user's
    context = contextvars.copy_context()
    done = anyio.Event()
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def job() -> None:
        try:
            outcome.append(context.run(function, *args))
        except BaseException as error:
            failure.append(error)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            caller.call_soon_threadsafe(done.set)

    engine.jobs.put(job)
    with anyio.CancelScope(shield=True):
        await done.wait()
    if failure:
        try:
            raise failure.pop()
        finally:
            failure.clear()
    return outcome.pop()  # type: ignore[no-any-return]


class Background:
    """A coroutine that runs beside the task that started it, until it is joined.

    What starts one must join it: `join` returns when it has ended, with its error if it failed.
    When the joining task is cancelled, so is the coroutine, and `join` still waits for its end.
    """

    def __init__(self, function: Callable[[], Awaitable[None]]) -> None:
        self._function = function
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        self._error: BaseException | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    @property
    def has_failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._error is not None

    async def join(self) -> None:
        """Waits for the end, and raises what the coroutine raised."""
        try:
            await self._ended.wait()
        except BaseException:
            await self.cancel()
            raise
        if self._error is not None:
            raise self._error

    async def cancel(self) -> None:
        """Cancels the coroutine and waits for its end."""
        self._scope.cancel()
        with anyio.CancelScope(shield=True):
            await self._ended.wait()
