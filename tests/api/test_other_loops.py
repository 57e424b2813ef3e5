"""Other loops than the engine's: handlers, responses and callers of asyncio and of trio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import jax
import numpy as np
import pytest

import orbax_async as ocp
from orbax_async import errors, handlers
from orbax_async.path import Path as CheckpointPath

STATE = {"a": np.arange(10)}
LATE = """
import sys, threading
import orbax_async as ocp

def work():
    threading.main_thread().join()
    ocp.save(sys.argv[1], {"a": 1})
    print(ocp.load(sys.argv[1]))

threading.Thread(target=work).start()
"""


class Created:
    """A directory that is there already, as handlers are given it."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = CheckpointPath(path)

    def __truediv__(self, other: Any) -> Created:
        raise NotImplementedError

    async def await_creation(self) -> CheckpointPath:
        """Returns the directory at once."""
        return self.path


@pytest.mark.parametrize(
    ("handler", "value"),
    [(handlers.PyTreeHandler(), STATE), (handlers.JsonHandler(), {"a": [1, 2]})],
    ids=["PyTreeHandler", "JsonHandler"],
)
async def test_f7_a_handler_is_awaited_on_any_loop(
    handler: Any, value: Any, tmp_path: Path
) -> None:
    """F7: both phases of a save and of a load of a built-in handler end on the caller's loop."""
    jax.devices()  # which blocks when it is asked for the first time
    directory = Created(tmp_path / "c")
    with anyio.fail_after(20):
        await (await handler.save(directory, value))
        loaded = await (await handler.load(directory.path))
    np.testing.assert_equal(loaded, value)


async def test_f8_asyncio_waits_for_responses(tmp_path: Path) -> None:
    """F8: `asyncio.wait`, with and without a time limit, and the functions that wrap awaitables."""
    first, second = (ocp.save_async(tmp_path / name, STATE) for name in "ab")
    done, pending = await asyncio.wait([first, second])
    assert (done, pending) == ({first, second}, set())
    late = ocp.save_async(tmp_path / "c", STATE)
    done, pending = await asyncio.wait(
        [first, late], timeout=20, return_when=asyncio.FIRST_EXCEPTION
    )
    assert (done, pending) == ({first, late}, set())
    await asyncio.gather(ocp.save_async(tmp_path / "d", STATE), asyncio.shield(late))
    await asyncio.wait_for(ocp.save_async(tmp_path / "e", STATE), 20)
    assert not late.cancelled()


async def test_f8_a_wait_that_is_over_leaves_no_callback(tmp_path: Path) -> None:
    """F8: after its time limit `asyncio.wait` takes its callback back."""
    response = ocp.save_async(tmp_path / "c", {"a": np.zeros(1 << 20)})
    await asyncio.wait([response], timeout=0)
    assert not response._callbacks
    await response
    calls: list[Any] = []
    assert response.remove_done_callback(calls.append) == 0


def test_f9_the_verbs_work_below_trio(tmp_path: Path) -> None:
    """F9: a verb that blocks works there; a response that is awaited says at once what to do."""

    async def main() -> None:
        ocp.save(tmp_path / "c", STATE)
        response = ocp.save_async(tmp_path / "d", STATE)
        with pytest.raises(errors.LoopError, match="on asyncio's event loops alone"):
            await response
        response.result()

    anyio.run(main, backend="trio")
    np.testing.assert_equal(ocp.load(tmp_path / "d"), STATE)


def test_f10_a_thread_may_begin_when_the_main_thread_has_ended(tmp_path: Path) -> None:
    """F10: the first operation of a process may come that late."""
    done = subprocess.run(
        [sys.executable, "-c", LATE, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "{'a': 1}", done.stderr


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, RuntimeError])
def test_f4_a_logger_that_raises_ends_nothing(kind: type[BaseException], tmp_path: Path) -> None:
    """F4, I15: whatever a logger raises on the engine's threads, responses settle, saves go on."""

    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise kind

    def fail(_: Any) -> None:
        raise ValueError

    logger, handler = logging.getLogger("orbax_async"), Raising()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        response = ocp.save_async(tmp_path / "a", STATE)
        response.add_done_callback(fail)
        with contextlib.suppress(kind):
            response.result(20)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    called = threading.Event()
    response = ocp.save_async(tmp_path / "b", STATE)
    response.add_done_callback(lambda _: called.set())
    response.result(20)
    assert called.wait(20)
    np.testing.assert_equal(ocp.load(tmp_path / "a"), STATE)
