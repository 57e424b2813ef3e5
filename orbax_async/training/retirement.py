"""Removing steps in the background: out of sight first, file by file then.

Theory of operation
  A step that is not kept is renamed to a temporary name, which no reader takes for a step, and the
  rename is made durable. Only then are its files removed. A process that dies in between leaves a
  temporary directory that says whose it was, and the next save beside it sweeps that.

  Coroutines on the engine do this, so nobody waits for files to be removed. Renaming is done at
  once. The files go a few at a time, with rests, and not while a save is under way: a file system
  that is busy removing syncs slowly. They go as fast as they can only where too many steps wait,
  or the run is closed.

  A step that this process is just loading stays until it is loaded.

  What fails is tried again. A step that can't be renamed stays a step. Files that can't be removed
  are left to the next round, and to the sweep of a later process.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator

import anyio

from orbax_async import errors
from orbax_async._engine import loop
from orbax_async._storage.directory import Directory
from orbax_async._trace import logger
from orbax_async.training.steps import Promise, Step, Steps, promise

__all__ = ["Retirement"]

_EXIT_GRACE_SECS = 1.0
_FILES_AT_ONCE = 64
_REST_SECS = 0.02
_RESTS_AT_MOST = 50  # a run that saves all the time gets rid of its old steps, too
_MANY_STEPS = 50
_HELD_SECS = 0.05
_RETRY_SECS = (0.1, 0.5, 2.0)


class Retirement:
    """The steps of one run that are being removed.

    Args:
      steps: the steps of the run; they know who is read, and take back what can't be removed.
      is_busy: says whether a save is under way.
    """

    def __init__(self, steps: Steps, *, is_busy: Callable[[], bool]) -> None:
        self._steps = steps
        self._directory = steps.directory
        self._is_busy = is_busy
        self._lock = threading.Lock()
        self._leaving: list[Step] = []
        self._stuck: list[Step] = []  # out of sight, with files that could not be removed
        self._emptying = anyio.Lock()
        self._is_hurried = False

    def retire(self, leaving: list[Step]) -> None:
        """Begins to remove steps, and returns at once."""
        for each in leaving:
            each.out_of_sight, each.gone = promise(), promise()
        with self._lock:
            again, self._stuck = self._stuck, []
            self._leaving += leaving
        self._steps.give_up(leaving)
        if not leaving and not again:
            return
        try:
            loop.spawn(
                lambda: self._remove(leaving, again),
                label=f"removal of old steps of {self._directory.path}",
                exit_grace_secs=_EXIT_GRACE_SECS,
                is_told_of=False,
            )
        except errors.LoopError as error:
            logger.warning("old steps stay until a later process removes them: %s", error)
            self._end(leaving)

    def out_of_sight(self, number: int | None = None) -> list[Promise]:
        """Returns what is done once a step, or each, is out of sight or kept after all."""
        with self._lock:
            return [each.out_of_sight for each in self._leaving if number in (None, each.step)]

    def gone(self) -> list[Promise]:
        """Returns what is done once all is removed, or left to a later process; hurries."""
        self._is_hurried = True
        with self._lock:
            return [each.gone for each in self._leaving]

    async def _remove(self, leaving: list[Step], again: list[Step]) -> None:
        try:
            await self._hide(leaving)
            async with self._emptying:
                for each in [*leaving, *again]:
                    if each.hidden is not None:
                        await self._empty(each, each.hidden)
        finally:  # also where the interpreter ends before all is done
            self._end(leaving)

    def _end(self, leaving: Iterable[Step]) -> None:
        ended = set(map(id, leaving))
        with self._lock:
            self._leaving = [each for each in self._leaving if id(each) not in ended]
        for each in leaving:
            self._directory.leave(each)
            self._note_out_of_sight(each)
            _settle(each.gone)

    def _note_out_of_sight(self, step: Step) -> None:
        self._steps.forget(step)
        _settle(step.out_of_sight)

    async def _hide(self, leaving: list[Step]) -> None:
        """Takes steps out of sight, as soon as nobody reads them; those that can't be are kept."""
        pauses = iter(_RETRY_SECS)
        while True:
            are_held, failures = await loop.to_worker(self._hide_unread, leaving)
            for each in leaving:
                if each.hidden is not None:
                    self._note_out_of_sight(each)
            pause = _HELD_SECS if are_held else next(pauses, None) if failures else None
            if pause is None:
                break
            await anyio.sleep(pause)
        for each, error in failures:
            logger.error(
                "step %d was to be removed, and is kept: %s can't be renamed: %s",
                each.step,
                each.path,
                error,
            )
            await loop.to_worker(self._steps.keep, each)
            self._end([each])

    def _hide_unread(self, leaving: list[Step]) -> tuple[bool, list[tuple[Step, OSError]]]:
        """Renames steps durably; returns whether some are read just now, and what has failed."""
        in_sight = [each for each in leaving if each.hidden is None]
        unread = [each for each in in_sight if not self._steps.is_read(each)]
        failures: list[tuple[Step, OSError]] = []
        for each in unread:
            try:
                self._directory.hide(each)
            except OSError as error:
                failures.append((each, error))
        try:
            self._directory.sync()
        except OSError as error:  # without it, a crash of the machine might bring half a step back
            for each in unread:
                if each.hidden is not None:
                    with contextlib.suppress(OSError):
                        self._directory.show(each)
                        failures.append((each, error))
        return len(unread) < len(in_sight), failures

    async def _empty(self, step: Step, hidden: Directory) -> None:
        """Removes a directory that is out of sight, a few files at a time."""
        for pause in (*_RETRY_SECS, None):
            try:
                removing = self._directory.removal(hidden)
                while await loop.to_worker(_remove_some, removing):
                    await self._rest()
                break
            except OSError as error:
                if pause is None:
                    logger.warning(
                        "%s, an old step, can't be removed, and is left to a later time: %s",
                        hidden.path,
                        error,
                    )
                    with self._lock:
                        self._stuck.append(step)
                    return
            await anyio.sleep(pause)

    async def _rest(self) -> None:
        """Lets saves go first, unless there is too much to be removed, or nobody saves any more."""
        for _ in range(_RESTS_AT_MOST):
            if self._is_hurried or len(self._leaving) > _MANY_STEPS:
                return
            await anyio.sleep(_REST_SECS)
            if not self._is_busy():
                return


def _settle(future: Promise) -> None:
    if not future.done():
        future.set_result(None)


def _remove_some(removing: Iterator[None]) -> bool:
    """Goes on with a removal; returns whether there may be more."""
    return sum(1 for _ in itertools.islice(removing, _FILES_AT_ONCE)) == _FILES_AT_ONCE
