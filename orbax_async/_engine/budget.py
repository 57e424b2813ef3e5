"""Byte budgets, and slots for batches: how much may be in flight at once.

Rules
  I2   Reserved bytes never exceed the limit, except that one request larger than the limit is
       admitted alone. Grants are first come, first served within a priority. A waiter that is
       cancelled takes nothing with it, and hands on what it was granted in the same instant.

Theory of operation
  All methods run on the engine's loop, so no lock is needed: state changes only between awaits.
  Waiters stand in a heap ordered by (priority, arrival). Only the head of the heap is ever
  granted: a small request does not overtake a large one, so a large one cannot starve.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
from collections.abc import AsyncIterator
from typing import NamedTuple

import anyio

__all__ = ["BatchSlots", "BudgetStatistics", "ByteBudget"]

_LARGE_AT_ONCE = 3
_SMALL_PIECE_NBYTES = 64 << 10  # and less; what a save encodes without opening an array


class BudgetStatistics(NamedTuple):
    """A snapshot of a budget: its limit, the bytes reserved now and at most, and who waits."""

    limit_nbytes: int | None
    reserved_nbytes: int
    peak_nbytes: int
    waiting: int


@dataclasses.dataclass(order=True)
class _Waiter:
    priority: int
    arrival: int
    nbytes: int = dataclasses.field(compare=False)
    granted: anyio.Event = dataclasses.field(compare=False, default_factory=anyio.Event)
    has_left: bool = dataclasses.field(compare=False, default=False)


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
        self._limit = limit_nbytes
        self._reserved = 0  # I2: the sum of all grants not yet released
        self._peak = 0
        self._waiters: list[_Waiter] = []
        self._arrivals = itertools.count()

    @contextlib.asynccontextmanager
    async def reserve(self, nbytes: int, priority: int = 0) -> AsyncIterator[None]:
        """Holds `nbytes` for the length of an `async with` block; lower priority goes first."""
        await self.acquire(nbytes, priority)
        try:
            yield
        finally:
            self.release(nbytes)

    async def acquire(self, nbytes: int, priority: int = 0) -> None:
        """Waits until `nbytes` fit; when cancelled while waiting, nothing stays reserved."""
        waiter = _Waiter(priority, next(self._arrivals), nbytes)
        heapq.heappush(self._waiters, waiter)
        self._grant()
        try:
            await waiter.granted.wait()
        except BaseException:
            waiter.has_left = True
            if waiter.granted.is_set():
                self.release(nbytes)
            else:
                self._grant()
            raise

    def release(self, nbytes: int) -> None:
        """Gives `nbytes` back and lets the next waiters in."""
        self._reserved -= nbytes
        self._grant()

    @property
    def has_limit(self) -> bool:
        """Whether anyone may have to wait."""
        return self._limit is not None

    def statistics(self) -> BudgetStatistics:
        """Returns a snapshot."""
        waiting = sum(not waiter.has_left for waiter in self._waiters)
        return BudgetStatistics(self._limit, self._reserved, self._peak, waiting)

    def _grant(self) -> None:
        while self._waiters:
            head = self._waiters[0]
            if not head.has_left:
                if not self._fits(head.nbytes):
                    return
                self._reserved += head.nbytes
                self._peak = max(self._peak, self._reserved)
                head.granted.set()
            heapq.heappop(self._waiters)

    def _fits(self, nbytes: int) -> bool:
        if self._limit is None or self._reserved == 0:
            return True
        return self._reserved + nbytes <= self._limit
