"""Byte budgets, and slots for batches: how much may be in flight at once.

Rules
  I2   Reserved bytes never exceed the limit, except that one request larger than the limit is
       admitted alone. Grants are first come, first served. A waiter that is cancelled takes
       nothing with it, and hands on what it was granted in the same instant.

Theory of operation
  All methods run on the engine's loop, so no lock is needed: state changes only between awaits.
  Only the first in the queue is ever granted: a small request does not overtake a large one, so a
  large one cannot starve.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import NamedTuple

import anyio

_LARGE_AT_ONCE = 3
_SMALL_PIECE_NBYTES = 64 << 10  # and less; what a save encodes without opening an array


class BudgetStatistics(NamedTuple):
    """A snapshot of a budget: its limit, the bytes reserved now and at most, and who waits."""

    limit_nbytes: int | None
    reserved_nbytes: int
    peak_nbytes: int
    waiting: int


@dataclasses.dataclass(eq=False)
class _Waiter:
    nbytes: int
    granted: anyio.Event = dataclasses.field(default_factory=anyio.Event)


class BatchSlots:
    """How many batches of one operation are read or written at a time.

    A few of large pieces; of small pieces a single one: the work is then Python's, and several
    threads at it would only wait for each other's GIL.
    """

    def __init__(self) -> None:
        self._of_large = anyio.Semaphore(_LARGE_AT_ONCE)
        self._of_small = anyio.Semaphore(1)

    def of(self, nbytes: int, count: int) -> anyio.Semaphore:
        """Returns the semaphore for a batch of `count` pieces of `nbytes` in all."""
        return self._of_small if nbytes <= count * _SMALL_PIECE_NBYTES else self._of_large


class ByteBudget:
    """A semaphore that counts bytes; a limit of None never makes anyone wait."""

    def __init__(self, limit_nbytes: int | None) -> None:
        self.limit_nbytes = limit_nbytes
        self._reserved = 0  # I2: the sum of all grants not yet released
        self._peak = 0
        self._waiters: collections.deque[_Waiter] = collections.deque()

    @contextlib.asynccontextmanager
    async def reserve(self, nbytes: int) -> AsyncIterator[None]:
        """Holds `nbytes` for the length of an `async with` block."""
        await self.acquire(nbytes)
        try:
            yield
        finally:
            self.release(nbytes)

    async def acquire(self, nbytes: int) -> None:
        """Waits until `nbytes` fit; when cancelled while waiting, nothing stays reserved."""
        waiter = _Waiter(nbytes)
        self._waiters.append(waiter)
        self._grant()
        if waiter.granted.is_set():
            return
        try:
            await waiter.granted.wait()
        except BaseException:
            if waiter.granted.is_set():
                self.release(nbytes)
            else:
                self._waiters.remove(waiter)
                self._grant()
            raise

    def release(self, nbytes: int) -> None:
        """Gives `nbytes` back and lets the next waiters in."""
        self._reserved -= nbytes
        self._grant()

    def statistics(self) -> BudgetStatistics:
        """Returns a snapshot."""
        return BudgetStatistics(self.limit_nbytes, self._reserved, self._peak, len(self._waiters))

    def _grant(self) -> None:
        while self._waiters and self._fits(self._waiters[0].nbytes):
            waiter = self._waiters.popleft()
            self._reserved += waiter.nbytes
            self._peak = max(self._peak, self._reserved)
            waiter.granted.set()

    def _fits(self, nbytes: int) -> bool:
        if self.limit_nbytes is None or self._reserved == 0 or nbytes == 0:
            return True
        return self._reserved + nbytes <= self.limit_nbytes
