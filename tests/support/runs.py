"""Runs for the tests of the Checkpointer: small states, and saves that wait or fail on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp

from orbax_async.training import Checkpointer

WAIT_SECS = 60.0


def state(step: int) -> dict[str, Any]:
    """A small state that follows from its step."""
    return {"w": jnp.full((4,), step, jnp.float32), "step": step}


def steps(checkpointer: Checkpointer) -> list[int]:
    """The steps that a Checkpointer lists."""
    return [each.step for each in checkpointer.checkpoints]


def on_disk(folder: Path) -> list[int]:
    """The steps that are in sight on disk."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def until(condition: Callable[[], Any]) -> None:
    """Waits for something that happens in the background."""
    end = time.monotonic() + WAIT_SECS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Gate:
    """Is captured at once, and written only when it is open.

    Args:
      is_open: whether it is from the start.
      failure: raised in place of writing.
    """

    def __init__(self, *, is_open: bool = False, failure: Exception | None = None) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()
        self._failure = failure
        if is_open:
            self._opened.set()

    def open(self) -> None:
        """Lets the save go on."""
        self._opened.set()

    async def save(self, directory: Any) -> Awaitable[None]:
        """Captures nothing; what it returns waits at the gate."""
        return self._write(directory)

    async def _write(self, directory: Any) -> None:
        path = await directory.await_creation()
        self.reached.set()
        while not self._opened.is_set():  # noqa: ASYNC110 - the event is another thread's
            await anyio.sleep(0.002)
        if self._failure is not None:
            raise self._failure
        (path / "gate").write_text("was open")

    async def load(self, directory: Any) -> Awaitable[None]:
        """Loads nothing."""

        async def nothing() -> None:
            pass

        return nothing()
