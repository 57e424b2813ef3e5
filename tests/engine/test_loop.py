"""The one loop and its workers (I6, I11): what they carry, and how they end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import numpy as np
import pytest

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine import loop

T = TypeVar("T")

COLOUR: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


def on_engine(function: Callable[[], Awaitable[T]]) -> T:
    """Runs a coroutine function on the engine's loop, and returns what it returns."""
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    async def run() -> None:
        try:
            outcome.set_result(await function())
        except BaseException as error:
            outcome.set_exception(error)

    loop.spawn(run, label="a test", exit_grace_secs=0)
    return outcome.result(30)


def engine_threads() -> set[threading.Thread]:
    """Returns the threads of the engine that are alive."""
    return {each for each in threading.enumerate() if each.name.startswith("orbax_async")}


# I6: one loop, no strays.


def test_i6_every_operation_runs_on_one_loop_thread() -> None:
    """Two operations see the same loop in the same thread, which is not the caller's."""

    async def where() -> tuple[int, asyncio.AbstractEventLoop]:
        assert loop.is_engine_thread()
        return threading.get_ident(), asyncio.get_running_loop()

    assert on_engine(where) == on_engine(where)
    assert on_engine(where)[0] != threading.get_ident()
    assert not loop.is_engine_thread()


def test_i6_a_steady_state_save_starts_no_thread_and_no_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first operation, saves and loads use the threads and the loop that are there."""
    state = {"a": np.arange(1000.0), "b": 1, "c": "text"}
    ocp.save(tmp_path / "warm", state)
    before = engine_threads()
    started: list[object] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: started.append("loop"))
    for index in range(5):
        ocp.save(tmp_path / str(index), state)
        ocp.load(tmp_path / str(index))
        ocp.metadata(tmp_path / str(index))
    assert started == []
    assert engine_threads() == before


def test_a_loop_that_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of open files, say: whoever starts the engine is told, and no thread stays."""

    def refuse() -> asyncio.AbstractEventLoop:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(loop, "_engine", None)
    monkeypatch.setattr(loop, "new_event_loop", refuse)
    before = set(threading.enumerate())
    with pytest.raises(errors.LoopError, match="Too many open files"):
        loop.call_soon(lambda: None)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()
    assert loop._engine is None


def test_i6_threads_that_arrive_together_start_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first operations of a process may come from many threads; one engine serves them all."""
    made: list[object] = []

    class Engine:
        def __init__(self) -> None:
            made.append(self)
            time.sleep(0.01)  # long enough for every thread to arrive

    monkeypatch.setattr(loop, "_engine", None)
    monkeypatch.setattr(loop, "Engine", Engine)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: loop._current(), range(8)))
    assert len(made) == 1
    assert found == made * 8


# Contexts.


def test_an_operation_runs_under_the_context_of_its_caller() -> None:
    """Context variables are those of the call, and what the operation sets stays its own."""

    async def look() -> str:
        seen = COLOUR.get()
        COLOUR.set("changed inside")
        return seen

    token = COLOUR.set("red")
    try:
        assert on_engine(look) == "red"
        assert COLOUR.get() == "red"
    finally:
        COLOUR.reset(token)
    assert on_engine(look) == "none"


def test_a_blocking_call_runs_elsewhere_under_the_same_context() -> None:
    """A worker sees the operation's context variables, and is not the loop's thread."""

    async def look() -> tuple[str, bool, bool]:
        COLOUR.set("blue")

        def inside() -> tuple[str, bool, bool]:
            name = threading.current_thread().name
            return COLOUR.get(), loop.is_engine_thread(), name.startswith("orbax_async worker")

        return await loop.to_worker(inside)

    assert on_engine(look) == ("blue", False, True)


# Workers.


def test_a_blocking_call_raises_what_the_worker_raised() -> None:
    """An error of a worker reaches the task that waits, and the worker lives on."""

    async def fail() -> None:
        await loop.to_worker(int, "no number")

    for _ in range(20):  # more often than there are workers
        with pytest.raises(ValueError, match="no number"):
            on_engine(fail)
    assert len([each for each in engine_threads() if "worker" in each.name]) == loop._WORKERS


def test_a_cancelled_task_waits_for_its_blocking_call() -> None:
    """A worker never acts for an operation that has already been undone."""
    entered, leave = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        entered.set()
        leave.wait(10)
        order.append("worker ended")

    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(loop.to_worker, slow)
            await loop.to_worker(entered.wait, 10)
            group.cancel_scope.cancel()
            asyncio.get_running_loop().call_later(0.02, leave.set)
        order.append("task ended")

    on_engine(run)
    assert order == ["worker ended", "task ended"]


# What runs beside a task.


def test_joining_waits_for_the_end() -> None:
    """`join` returns when the coroutine has ended, at once if it already has."""

    async def run() -> list[str]:
        order = []

        async def work() -> None:
            await anyio.lowlevel.checkpoint()
            order.append("work")

        background = loop.Background(work)
        await background.join()
        order.append("joined")
        await background.join()
        assert not background.has_failed
        return order

    assert on_engine(run) == ["work", "joined"]


def test_joining_raises_what_the_coroutine_raised() -> None:
    """A failure is kept until it is joined, and `has_failed` says so before."""

    async def run() -> bool:
        async def work() -> None:
            raise LookupError("lost")

        background = loop.Background(work)
        await anyio.sleep(0.01)
        assert background.has_failed
        with pytest.raises(LookupError, match="lost"):
            await background.join()
        return True

    assert on_engine(run)


def test_cancelling_waits_until_the_coroutine_has_cleaned_up() -> None:
    """After `cancel` nothing of the coroutine runs any more."""

    async def run() -> list[str]:
        order = []

        async def work() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
                order.append("cleaned")

        background = loop.Background(work)
        await anyio.sleep(0.01)
        await background.cancel()
        order.append("cancelled")
        assert not background.has_failed
        return order

    assert on_engine(run) == ["cleaned", "cancelled"]


def test_cancelling_the_joining_task_cancels_the_coroutine() -> None:
    """A task that is cancelled while it joins takes the coroutine with it, to its end."""

    async def run() -> list[str]:
        order = []

        async def work() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
                order.append("cleaned")

        with anyio.move_on_after(0.02):
            await loop.Background(work).join()
        order.append("joiner ended")
        return order

    assert on_engine(run) == ["cleaned", "joiner ended"]


# Blocking verbs where they would wait for themselves.


@pytest.mark.parametrize("verb", ["save", "save_async", "load", "load_async", "metadata"])
def test_a_verb_on_the_engines_own_loop_is_refused(verb: str, tmp_path: Path) -> None:
    """The engine's thread must never wait for itself: LoopError says what to do instead."""
    arguments: tuple[Any, ...] = ({"a": 1},) if "save" in verb else ()

    async def run() -> None:
        getattr(ocp, verb)(tmp_path / "checkpoint", *arguments)

    with pytest.raises(errors.LoopError, match="thread or a loop of your own"):
        on_engine(run)
    assert list(tmp_path.iterdir()) == []
    ocp.save(tmp_path / "checkpoint", {"a": 1})  # the engine goes on


@pytest.mark.parametrize("wait", ["result", "exception", "wait_staged"])
def test_waiting_on_the_engines_own_loop_is_refused(wait: str, tmp_path: Path) -> None:
    """A response that is waited for on the engine's thread would never end."""
    response = ocp.save_async(tmp_path / "checkpoint", {"a": 1})

    async def run() -> None:
        getattr(response, wait)()

    with pytest.raises(errors.LoopError, match="await the response"):
        on_engine(run)
    response.result()


# Forks.


def in_child(function: Callable[[], None]) -> int:
    """Forks, runs `function` in the child, and returns the child's exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
ignores_fork_warnings = pytest.mark.filterwarnings("ignore:.*fork.*")


@forks
@ignores_fork_warnings
def test_i6_a_forked_child_cannot_wait_for_its_parents_operations(tmp_path: Path) -> None:
    """Operations of the parent stay the parent's: the child is told so, and does not hang."""
    response = ocp.save_async(tmp_path / "parent", {"a": np.arange(3)})

    def child() -> None:
        for wait in (response.result, response.exception, response.wait_staged, response.cancel):
            with pytest.raises(errors.LoopError, match="forked child"):
                wait()

    assert in_child(child) == 0
    response.result()


@forks
@ignores_fork_warnings
def test_a_child_that_was_forked_too_late_is_told_so(tmp_path: Path) -> None:
    """After its first use TensorStore aborts a forked child; ours raises, and leaves nothing."""
    ocp.save(tmp_path / "parent", {"a": np.arange(3)})

    def child() -> None:
        with pytest.raises(errors.LoopError, match="spawn"):
            ocp.save(tmp_path / "child", {"a": np.arange(3)})
        with pytest.raises(errors.LoopError, match="spawn"):
            ocp.load(tmp_path / "parent")

    assert in_child(child) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["parent"]
    ocp.save(tmp_path / "after", {"a": np.arange(3)})


@forks
def test_i6_a_forked_child_starts_its_own_engine(tmp_path: Path) -> None:
    """A child has memory but no threads of its parent: it saves and loads with its own."""
    ended = run_script(
        """
        import os
        import signal
        import warnings

        try:
            ocp.load(folder / "missing")  # starts the engine, and uses no TensorStore
        except ocp.errors.InvalidLayoutError:
            pass
        warnings.simplefilter("ignore")  # jax and Python both warn of the fork
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            ocp.save(folder / "child", {"a": np.arange(5)})
            assert ocp.load(folder / "child")["a"].tolist() == [0, 1, 2, 3, 4]
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        ocp.save(folder / "parent", {"a": np.arange(3)})
        """,
        tmp_path,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ocp.load(tmp_path / "child")["a"].tolist() == [0, 1, 2, 3, 4]
    assert ocp.load(tmp_path / "parent")["a"].tolist() == [0, 1, 2]


# I11: the end of the interpreter.


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script that has `folder` and the imports it needs, and returns how it ended."""
    head = f"""
    import sys
    from pathlib import Path
    import anyio
    import numpy as np
    import orbax_async as ocp
    from orbax_async._operation import PathLock
    folder = Path({str(folder)!r})
    """
    code = textwrap.dedent(head) + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_i11_a_forgotten_save_is_committed(tmp_path: Path) -> None:
    """A script that ends right after `save_async` leaves a whole checkpoint, and ends well."""
    ended = run_script(
        "ocp.save_async(folder / 'checkpoint', {'a': np.arange(100_000)})\n", tmp_path
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ocp.load(tmp_path / "checkpoint")["a"].tolist() == list(range(100_000))


@pytest.mark.parametrize("has_used_threads", [False, True])
def test_i11_a_handler_may_use_threads_while_the_interpreter_exits(
    has_used_threads: bool, tmp_path: Path
) -> None:
    """`asyncio.to_thread` of a forgotten save works when the interpreter's executors have ended."""
    ended = run_script(
        f"""
        import asyncio
        import threading

        class Place:
            def __init__(self, is_late):
                self.is_late = is_late

            async def save(self, directory):
                async def write():
                    path = await directory.await_creation() / "place"
                    while self.is_late and threading.main_thread().is_alive():
                        await anyio.sleep(0.01)
                    await anyio.sleep(0.1 * self.is_late)
                    try:
                        await asyncio.to_thread(int, "no number")
                    except ValueError:  # what the thread raised has come back
                        await asyncio.to_thread(path.write_text, "three")
                return write()

            async def load(self, directory):
                raise NotImplementedError

        if {has_used_threads}:
            ocp.save_checkpointables(folder / "before", {{"place": Place(is_late=False)}})
        ocp.save_checkpointables_async(folder / "checkpoint", {{"place": Place(is_late=True)}})
        """,
        tmp_path,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "checkpoint" / "place" / "place").read_text() == "three"


def test_a_call_that_fails_in_a_thread_leaves_no_cycle() -> None:
    """What a handler gives to `asyncio.to_thread` is free with its error, before any collection."""

    class Given:
        pass

    def fail(_: Given) -> None:
        raise ValueError("it fails")

    async def call() -> weakref.ref[Given]:
        given = Given()
        with pytest.raises(ValueError, match="it fails"):
            await asyncio.to_thread(fail, given)
        return weakref.ref(given)

    gc.collect()
    gc.disable()
    try:
        given = on_engine(call)
        on_engine(lambda: asyncio.to_thread(gc.get_count))  # whose thread has let go of the first
        assert given() is None
    finally:
        gc.enable()


def test_i11_a_save_that_outlasts_its_grace_is_undone_and_told_of(tmp_path: Path) -> None:
    """A save that can't end in time leaves nothing visible, and stderr says so by name."""
    ended = run_script(
        """
        async def never(*_):
            await anyio.sleep_forever()

        PathLock.acquire = never
        context = ocp.Context()
        context.asynchronous.exit_grace_secs = 0.1
        with context:
            ocp.save_async(folder / "checkpoint", {"a": np.arange(3)})
        """,
        tmp_path,
    )
    assert ended.returncode == 0
    assert f"save to {tmp_path / 'checkpoint'}" in ended.stderr
    assert "NOT committed" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_i11_a_call_that_never_returns_does_not_hang_the_interpreter(tmp_path: Path) -> None:
    """A worker that hangs in a system call is left behind, and with it the save that waits."""
    ended = run_script(
        """
        import os
        import threading
        from orbax_async._engine import loop

        loop._CANCEL_SECS = 0.2
        os.fsync = lambda _: threading.Event().wait()
        context = ocp.Context()
        context.asynchronous.exit_grace_secs = 0.1
        with context:
            ocp.save_async(folder / "checkpoint", {"a": np.arange(3)})
        """,
        tmp_path,
    )
    assert ended.returncode == 0
    assert "NOT committed" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "checkpoint").exists()


def test_i11_a_failure_that_nobody_asked_for_is_told_at_exit(tmp_path: Path) -> None:
    """A background failure reaches stderr when the script ends without waiting."""
    ended = run_script(
        """
        from orbax_async._commit import sequence

        def full(*_):
            raise ocp.errors.CommitError("the disk is full")

        sequence.Save._sync = full
        response = ocp.save_async(folder / "checkpoint", {"a": np.arange(3)})
        """,
        tmp_path,
    )
    assert ended.returncode == 0
    assert "FAILED: the disk is full" in ended.stderr
    assert list(tmp_path.iterdir()) == []
