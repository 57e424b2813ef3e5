"""Responses: one handle on an operation, for threads and event loops alike."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import anyio
import held_saves
import jax.numpy as jnp
import numpy as np
import pytest
from held_saves import STATE, Gate, with_async

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine import loop, save_pipeline
from orbax_async.handlers.pytree import PyTreeHandler

before_commit = held_saves.before_commit
at_commit = held_saves.at_commit
before_staging = held_saves.before_staging
failing = held_saves.failing


def kept(message: str, caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Returns the log records that hold a text."""
    return [record for record in caplog.records if message in record.getMessage()]


def collect(gone: weakref.ref[Any]) -> None:
    """Waits until an object is collected: the engine drops its references in its own time."""
    for _ in range(100):
        gc.collect()
        if gone() is None:
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"something keeps {gone()!r}")


# Waiting.


def test_result_waits_and_may_be_asked_again(tmp_path: Path) -> None:
    """`result` returns once the checkpoint is there, every time it is asked."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    assert response.result() is None
    assert (tmp_path / "checkpoint").is_dir()
    assert response.result() is None
    assert response.result(timeout=0) is None
    assert response.done()
    assert response.exception() is None


def test_a_load_returns_its_state_every_time(tmp_path: Path) -> None:
    """The result of a load is the same object however it is asked for."""
    ocp.save(tmp_path / "checkpoint", STATE)
    response = ocp.load_async(tmp_path / "checkpoint")
    loaded = response.result()
    assert np.array_equal(loaded["a"], STATE["a"])
    assert response.result() is loaded


def test_a_timeout_leaves_the_save_running(tmp_path: Path, before_commit: Gate) -> None:
    """When the time is over TimeoutError is raised; the save can be waited for again."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    assert before_commit.reached.wait(30)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            response.result(timeout=0.01)
        with pytest.raises(TimeoutError):
            response.exception(timeout=0)
    assert not response.done()
    assert not (tmp_path / "checkpoint").exists()
    before_commit.open()
    assert response.result(timeout=30) is None
    assert (tmp_path / "checkpoint").is_dir()


def test_w2_await_waits_without_blocking_the_loop(tmp_path: Path) -> None:
    """`await` gives the result, and other tasks run meanwhile; also `await save_async(...)`."""

    async def main() -> None:
        assert await ocp.save_async(tmp_path / "one", STATE) is None
        loaded = await ocp.load_async(tmp_path / "one")
        assert np.array_equal(loaded["a"], STATE["a"])

    asyncio.run(main())


async def test_a_response_is_awaited_on_each_loop(tmp_path: Path) -> None:
    """The same response serves several tasks of one loop, staged and committed."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    done: list[str] = []

    async def wait(what: str) -> None:
        await (response.staged() if what == "staged" else response)
        done.append(what)

    async with anyio.create_task_group() as group:
        for what in ("staged", "committed", "committed", "staged"):
            group.start_soon(wait, what)
    assert sorted(done) == ["committed", "committed", "staged", "staged"]
    assert await response is None
    await response.staged()


def test_a_response_is_waited_for_by_loops_and_threads_at_once(
    tmp_path: Path, before_commit: Gate
) -> None:
    """Several event loops and several threads wait for one save; all of them learn of its end."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)

    async def on_a_loop() -> str:
        await response.staged()
        await response
        return "loop"

    def in_a_thread() -> str:
        response.wait_staged()
        response.result()
        return "thread"

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(lambda: asyncio.run(on_a_loop())) for _ in range(3)]
        jobs += [pool.submit(in_a_thread) for _ in range(3)]
        assert before_commit.reached.wait(30)
        assert not any(job.done() for job in jobs)
        before_commit.open()
        assert [job.result(30) for job in jobs] == ["loop"] * 3 + ["thread"] * 3


async def test_cancelling_an_awaiter_does_not_cancel_the_save(
    tmp_path: Path, before_commit: Gate
) -> None:
    """A task that gives up waiting leaves the save alone."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    with anyio.move_on_after(0.02) as scope:
        await response
    assert scope.cancelled_caught
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await response
    assert not response.done()
    before_commit.open()
    await response
    assert (tmp_path / "checkpoint").is_dir()


# The first tier.


def test_an_eager_save_is_staged_when_it_returns(tmp_path: Path, before_commit: Gate) -> None:
    """By default every value is captured before `save_async` returns."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    response.wait_staged(timeout=0)
    assert response.progress.leaves_staged == 2
    assert not response.done()
    before_commit.open()
    response.result()


def test_a_lazy_save_returns_at_once(tmp_path: Path, before_staging: Gate) -> None:
    """With lazy staging the call returns before anything is captured; `staged` tells when it is."""
    value = np.zeros(1000)
    with with_async(staging="lazy"):
        response = ocp.save_async(tmp_path / "checkpoint", {"a": value})
    with pytest.raises(TimeoutError):
        response.wait_staged(timeout=0.01)
    assert response.progress.leaves_staged == 0
    value[:] = 1  # still the caller's to change
    before_staging.open()
    response.wait_staged(timeout=30)
    value[:] = 2
    response.result()
    assert (ocp.load(tmp_path / "checkpoint")["a"] == 1).all()


async def test_a_lazy_save_can_be_awaited_by_tier(tmp_path: Path, before_commit: Gate) -> None:
    """`await response.staged()` ends before `await response` does."""
    with with_async(staging="lazy"):
        response = ocp.save_async(tmp_path / "checkpoint", STATE)
    await response.staged()
    assert not response.done()
    before_commit.open()
    await response


def test_a_failure_before_staging_is_raised_by_both_tiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong while values are captured reaches who waits for either tier."""

    def fail(*_: Any) -> None:
        raise errors.StagingError("['a']", "cannot be captured")

    monkeypatch.setattr(save_pipeline.SavePipeline, "_capture", fail)
    with with_async(staging="lazy"):
        response = ocp.save_async(tmp_path / "checkpoint", STATE)
    with pytest.raises(errors.StagingError):
        response.wait_staged()
    with pytest.raises(errors.StagingError):
        response.result()

    async def main() -> None:
        await response.staged()

    with pytest.raises(errors.StagingError):
        asyncio.run(main())
    assert os.listdir(tmp_path) == []


def test_a_failure_after_staging_is_raised_by_the_second_tier(
    tmp_path: Path, failing: None
) -> None:
    """A save that was staged and then failed stays staged, and fails every time it is asked."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    response.wait_staged()
    for _ in range(2):
        with pytest.raises(errors.CommitError, match="No space left on device"):
            response.result()
    assert isinstance(response.exception(), errors.CommitError)
    assert response.done()
    response.wait_staged()
    assert os.listdir(tmp_path) == []


# Cancelling.


@pytest.mark.parametrize("staging", ["eager", "lazy"])
def test_w36_cancel_before_the_commit_point_undoes_the_save(
    staging: str, tmp_path: Path, before_commit: Gate
) -> None:
    """`cancel` is true and prompt: nothing becomes visible, and no temporary directory is left."""
    with with_async(staging=staging):
        response = ocp.save_async(tmp_path / "deep" / "checkpoint", STATE)
    assert before_commit.reached.wait(30)
    assert response.cancel()
    with pytest.raises(errors.OperationCancelledError, match="cancelled before it was committed"):
        response.result(timeout=30)  # with the gate still closed
    assert isinstance(response.exception(), concurrent.futures.CancelledError)
    assert os.listdir(tmp_path) == []
    assert response.progress.phase == "failed"
    assert not response.cancel()


def test_w36_cancel_before_staging(tmp_path: Path, before_staging: Gate) -> None:
    """A save that has captured nothing yet is cancelled for both tiers."""
    with with_async(staging="lazy"):
        response = ocp.save_async(tmp_path / "checkpoint", STATE)
    assert response.cancel()
    with pytest.raises(errors.OperationCancelledError):
        response.wait_staged(timeout=30)
    with pytest.raises(errors.OperationCancelledError):
        response.result()
    assert os.listdir(tmp_path) == []


def test_w36_cancel_after_the_commit_point_is_refused(tmp_path: Path, at_commit: Gate) -> None:
    """Past the commit point `cancel` is false, and the checkpoint appears."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    assert at_commit.reached.wait(30)
    assert not response.cancel()
    at_commit.open()
    assert response.result() is None
    assert not response.cancel()
    assert np.array_equal(ocp.load(tmp_path / "checkpoint")["a"], STATE["a"])


def test_w36_a_cancelled_overwrite_leaves_the_old_checkpoint(
    tmp_path: Path, before_commit: Gate
) -> None:
    """Cancelling an overwrite changes nothing of what was there."""
    before_commit.open()
    ocp.save(tmp_path / "checkpoint", {"a": 1})
    before_commit.opened.clear()
    before_commit.reached.clear()
    response = ocp.save_async(tmp_path / "checkpoint", {"a": 2}, overwrite=True)
    assert before_commit.reached.wait(30)
    assert response.cancel()
    with pytest.raises(errors.OperationCancelledError):
        response.result()
    assert ocp.load(tmp_path / "checkpoint") == {"a": 1}
    assert os.listdir(tmp_path) == ["checkpoint"]


async def test_a_cancelled_save_raises_in_its_awaiters(tmp_path: Path, before_commit: Gate) -> None:
    """An awaiter of a cancelled save gets an error, and its own task is not cancelled."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    assert response.cancel()
    with pytest.raises(errors.OperationCancelledError):
        await response
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


def test_a_cancelled_load_never_returns_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once `cancel` of a load was true it raises, even where the state had just been read."""
    ocp.save(tmp_path / "checkpoint", STATE)
    reached, opened = threading.Event(), threading.Event()

    async def load(self: PyTreeHandler, *_: Any) -> Any:
        def read() -> str:
            reached.set()
            opened.wait(30)
            return "a whole state"

        return loop.to_worker(read)

    monkeypatch.setattr(PyTreeHandler, "load", load)
    response = ocp.load_async(tmp_path / "checkpoint")
    assert reached.wait(30)
    assert response.cancel()
    opened.set()
    with pytest.raises(errors.OperationCancelledError):
        response.result()


# Progress.


def test_w36_progress_is_a_frozen_snapshot(tmp_path: Path, before_commit: Gate) -> None:
    """Progress counts leaves and bytes; a snapshot that was taken stays as it was."""
    state = {"a": np.arange(1000, dtype=np.int32), "b": jnp.zeros((8, 8)), "c": 1, "d": "text"}
    response = ocp.save_async(tmp_path / "checkpoint", state)
    assert before_commit.reached.wait(30)
    early = response.progress
    assert early.phase == "written"
    assert early.leaves_planned == early.leaves_staged == early.leaves_written == 3
    assert early.bytes_planned == early.bytes_staged == early.bytes_written == 4000 + 256 + 8
    assert 0 < early.blocked_secs <= early.elapsed_secs
    before_commit.open()
    response.result()
    assert early.phase == "written"
    with pytest.raises(AttributeError):
        early.phase = "planned"  # type: ignore[misc]
    final = response.progress
    assert final.phase == "committed"
    assert response.progress.elapsed_secs == final.elapsed_secs >= early.elapsed_secs
    assert "committed" in repr(response)
    assert str(tmp_path / "checkpoint") in repr(response)


def test_w36_progress_of_a_load(tmp_path: Path) -> None:
    """A load counts what it plans to read and what it has read."""
    ocp.save(tmp_path / "checkpoint", {"a": np.arange(1000, dtype=np.int32), "b": "text"})
    response = ocp.load_async(tmp_path / "checkpoint")
    response.result()
    progress = response.progress
    assert (progress.phase, progress.leaves_planned, progress.leaves_written) == ("committed", 1, 1)
    assert progress.bytes_planned == progress.bytes_written == 4000


def test_w36_timeline_shows_each_piece_of_work(tmp_path: Path) -> None:
    """A timeline has the spans that have ended, in order, inside of the operation's time."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    response.result()
    spans = response.timeline
    assert {"create", "stage", "write", "documents", "sync", "publish"} == {s.name for s in spans}
    assert sum(span.nbytes for span in spans if span.name == "write") == 8008
    assert [span.start_secs for span in spans] == sorted(span.start_secs for span in spans)
    elapsed = response.progress.elapsed_secs
    assert all(0 <= span.start_secs <= span.end_secs <= elapsed for span in spans)
    ends = {span.name: span.end_secs for span in spans}
    assert ends["write"] <= ends["documents"] <= ends["sync"] <= ends["publish"]
    large = ocp.save_async(tmp_path / "large", {"a": np.ones(16 << 20, np.uint8)})
    large.result()
    assert {span.name for span in large.timeline} - {s.name for s in spans} == {"writeback"}
    loading = ocp.load_async(tmp_path / "checkpoint")
    loading.result()
    assert {"read", "place"} == {span.name for span in loading.timeline}


# Callbacks.


def test_callbacks_run_in_order_once_the_save_has_ended(
    tmp_path: Path, before_commit: Gate
) -> None:
    """Both kinds of callback run in the order of registration, not on the engine's loop."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    calls: list[Any] = []
    ended = threading.Event()
    response.add_done_callback(lambda done: calls.append((1, done is response, done.done())))
    response.on_complete(lambda result: calls.append((2, result)))
    response.add_done_callback(lambda _: calls.append((3, loop.is_engine_thread())))
    response.add_done_callback(lambda _: ended.set())
    assert calls == []
    before_commit.open()
    assert ended.wait(30)
    assert calls == [(1, True, True), (2, None), (3, False)]


def test_a_callback_that_comes_late_runs_at_once(tmp_path: Path) -> None:
    """After the end callbacks run in the calling thread, before registration returns."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    response.result()
    calls: list[int] = []
    response.add_done_callback(lambda _: calls.append(threading.get_ident()))
    response.on_complete(lambda _: calls.append(threading.get_ident()))
    assert calls == [threading.get_ident()] * 2


def test_on_complete_is_never_called_after_a_failure(
    tmp_path: Path, before_commit: Gate, failing: None
) -> None:
    """A failed save calls its done callbacks, and no completion callback, early or late."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    calls: list[str] = []
    ended = threading.Event()
    response.on_complete(lambda _: calls.append("complete"))
    response.add_done_callback(lambda done: calls.append(type(done.exception()).__name__))
    response.add_done_callback(lambda _: ended.set())
    before_commit.open()
    assert ended.wait(30)
    response.on_complete(lambda _: calls.append("complete, late"))
    assert calls == ["CommitError"]
    assert response.done()


def test_a_callback_that_raises_is_logged(
    tmp_path: Path, before_commit: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken callback stops neither the others nor the save."""
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    ended = threading.Event()

    def broken(_: object) -> None:
        raise ZeroDivisionError("broken callback")

    response.add_done_callback(broken)
    response.on_complete(broken)
    response.add_done_callback(lambda _: ended.set())
    before_commit.open()
    assert ended.wait(30)
    assert response.result() is None
    response.add_done_callback(broken)
    records = kept("a callback of save to", caplog)
    assert len(records) == 3
    assert all(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in records)


def test_the_end_of_a_save_lets_go_of_the_state(tmp_path: Path) -> None:
    """Neither the response nor an idle worker keeps the arrays that were saved."""
    array, host = jnp.arange(1000.0), np.arange(1000.0)
    gone = [weakref.ref(array), weakref.ref(host)]
    response = ocp.save_async(tmp_path / "checkpoint", {"a": array, "b": host})
    response.result()
    del array, host
    for each in gone:
        collect(each)


def test_the_end_of_a_load_lets_go_of_the_state(tmp_path: Path) -> None:
    """Once a loaded state and its response are dropped, nothing keeps its arrays."""
    ocp.save(tmp_path / "checkpoint", {"a": jnp.arange(1000.0), "b": np.arange(1000.0)})
    loaded = ocp.load(tmp_path / "checkpoint")
    gone = [weakref.ref(value) for value in loaded.values()]
    del loaded
    for each in gone:
        collect(each)


def test_callbacks_may_wait_for_other_operations(tmp_path: Path, before_commit: Gate) -> None:
    """More callbacks than the engine has workers wait for saves, and make some; none hangs."""
    count = 10
    ended = threading.Semaphore(0)
    responses = [ocp.save_async(tmp_path / str(index), STATE) for index in range(count)]

    def copy(done: ocp.AsyncResponse[None]) -> None:
        for response in responses:
            response.result()
        index = responses.index(done)
        ocp.save(tmp_path / f"copy {index}", ocp.load(tmp_path / str(index)))
        ended.release()

    for response in responses:
        response.add_done_callback(copy)
    before_commit.open()
    for _ in range(count):
        assert ended.acquire(timeout=30)
    assert len(os.listdir(tmp_path)) == 2 * count


# Failures are never silent.


def test_a_dropped_failure_is_logged(
    tmp_path: Path, before_commit: Gate, failing: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A response that fails and is dropped unasked leaves an error in the log."""
    ended = threading.Event()
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    response.add_done_callback(lambda _: ended.set())
    before_commit.open()
    assert ended.wait(30)
    gone = weakref.ref(response)
    del response
    collect(gone)
    records = kept("nobody asked for its result: cannot make", caplog)
    assert [record.levelno for record in records] == [logging.ERROR]
    assert str(tmp_path / "checkpoint") in records[0].getMessage()


@pytest.mark.parametrize("ask", ["result", "exception", "await"])
def test_a_failure_that_was_asked_for_is_not_logged_again(
    ask: str, tmp_path: Path, failing: None, caplog: pytest.LogCaptureFixture
) -> None:
    """What was raised, or returned, to somebody is not reported a second time."""
    responses = [ocp.save_async(tmp_path / "checkpoint", STATE)]

    async def main() -> None:
        await responses[0]

    with pytest.raises(errors.CommitError):
        if ask == "await":
            asyncio.run(main())
        elif ask == "result":
            responses[0].result()
        else:
            raise responses[0].exception() or AssertionError
    gone = weakref.ref(responses[0])
    responses.clear()
    collect(gone)
    assert kept("nobody asked", caplog) == []
