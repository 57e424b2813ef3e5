"""Whose turn it is at a path."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from typing import ClassVar

from orbax_async import errors

__all__ = ["Turn"]


class Turn:
    """A save's or deletion's place among those of this process at one path (W7).

    Args:
      final: the path.
      overwrite: whether it may follow another one that is under way.
      after: what its turn waits for besides; None for nothing.

    Raises:
      SaveInProgressError: another one is under way, and it may not.
    """

    _lock = threading.Lock()
    _last: ClassVar[dict[str, Turn]] = {}

    def __init__(
        self,
        final: str,
        *,
        overwrite: bool,
        after: concurrent.futures.Future[None] | None = None,
    ) -> None:
        self._final = final
        self._after = after
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended.set_running_or_notify_cancel()
        with self._lock:
            before = self._last.get(final)
            if before is not None and not overwrite:
                raise errors.SaveInProgressError(
                    f"another save to {final} is under way, or its deletion; wait for its "
                    "response, or save with overwrite=True to follow it"
                )
            self._before = before
            self._last[final] = self

    @property
    def is_first(self) -> bool:
        """Whether nothing else was under way when this one came."""
        return self._before is None

    async def come(self) -> None:
        """Waits until the one before it has ended, well or not."""
        if self._before is not None:
            await asyncio.wrap_future(self._before._ended)
            self._before = None
        if self._after is not None:
            await asyncio.wrap_future(self._after)

    def end(self) -> None:
        """Lets the next one go on; if this one's turn never came, after the one before it."""
        before, self._before = self._before, None
        if before is None:
            self._leave()
        else:
            before._ended.add_done_callback(lambda _: self._leave())

    def _leave(self) -> None:
        with self._lock:
            if self._last.get(self._final) is self:
                del self._last[self._final]
        if not self._ended.done():
            self._ended.set_result(None)


if hasattr(os, "register_at_fork"):  # what the parent does is not the child's
    os.register_at_fork(after_in_child=Turn._last.clear)
