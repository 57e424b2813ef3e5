"""Objects that save themselves when a test lets them, or fail when it wants that."""

from __future__ import annotations

import threading
from collections.abc import Awaitable
from typing import Any

import anyio


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
        while not self._opened.is_set():
            await anyio.sleep(0.002)
        if self._failure is not None:
            raise self._failure
        (path / "gate").write_text("was open")

    async def load(self, directory: Any) -> Awaitable[None]:
        """Loads nothing."""

        async def nothing() -> None:
            pass

        return nothing()
