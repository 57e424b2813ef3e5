"""Removing steps in the background: out of sight first, file by file then.

Theory of operation
  A step that is not kept is renamed to a temporary name, which no reader takes for a step, and the
  rename is made durable; only then are its files removed. A process that dies in between leaves a
  temporary directory that says whose it was, and the next save beside it sweeps that.

  Coroutines on the engine do this, so that nobody waits for files to be removed. Renaming is done
  at once; the files go a few at a time, with rests, and not while a save is under way: a file
  system that is busy removing syncs slowly. Only where too many steps wait, or the run is closed,
  they go as fast as they can.

  A step that this process is just loading stays until it is loaded.

  What fails is tried again. A step that can't be renamed stays a step; files that can't be removed
  are left to the next round, and to the sweep of a later process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator

import anyio

from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._engine import loop
from orbax_async._storage import files
from orbax_async._trace import logger
from orbax_async.training.save_queue import until_done

__all__ = ["Retirement"]

_EXIT_GRACE_SECS = 1.0
_FILES_AT_ONCE = 64
_REST_SECS = 0.02
_RESTS_AT_MOST = 50  # a run that saves all the time gets rid of its old steps, too
_MANY_STEPS = 50
_HELD_SECS = 0.05
_RETRY_SECS = (0.1, 0.5, 2.0)


@dataclasses.dataclass(eq=False)
class _Leaving:
    """A step on its way out; `hidden` is where it lies once it is out of sight."""

    step: int
    path: str
    hidden: str | None = None
    out_of_sight: concurrent.futures.Future[None] = dataclasses.field(
        default_factory=concurrent.futures.Future
    )
    gone: concurrent.futures.Future[None] = dataclasses.field(
        default_factory=concurrent.futures.Future
    )


class Retirement:
    """The steps of one run that are being removed.

    Args:
      run: the run's directory.
      is_busy: says whether a save is under way.
      put_back: called with a step that could not be removed, and is one again.
    """

    def __init__(
        self, run: str, *, is_busy: Callable[[], bool], put_back: Callable[[int], None]
    ) -> None:
        self._run = run
        self._is_busy = is_busy
        self._put_back = put_back
        self._lock = threading.Lock()
        self._leaving: list[_Leaving] = []
        self._stuck: list[_Leaving] = []  # out of sight, with files that could not be removed
        self._holders: collections.Counter[int] = collections.Counter()
        self._emptying = anyio.Lock()
        self._is_hurried = False

    def steps(self) -> set[int]:
        """Returns the steps that are still in sight."""
        with self._lock:
            return {each.step for each in self._leaving if each.hidden is None}

    def retire(self, steps: Iterable[tuple[int, str]]) -> None:
        """Begins to remove steps, given with their directories, and returns at once."""
        leaving = [_Leaving(step, path) for step, path in steps]
        with self._lock:
            again, self._stuck = self._stuck, []
            self._leaving += leaving
        if not leaving and not again:
            return
        try:
            loop.spawn(
                lambda: self._remove(leaving, again),
                label=f"removal of old steps of {self._run}",
                exit_grace_secs=_EXIT_GRACE_SECS,
                is_told_of=False,
            )
        except errors.LoopError as error:
            logger.warning("old steps stay until a later process removes them: %s", error)
            self._end(leaving)

    def hold(self, step: int) -> Callable[[], None]:
        """Keeps a step in sight while it is read, until the function returned is called."""
        with self._lock:
            self._holders[step] += 1

        def release() -> None:
            with self._lock:
                self._holders[step] -= 1
                self._holders += collections.Counter()  # forgets those that nobody holds

        return release

    # Waiting.

    def wait_out_of_sight(self, steps: Iterable[int] | None = None) -> None:
        """Blocks until steps are out of sight, or were put back; None stands for all."""
        concurrent.futures.wait([each.out_of_sight for each in self._chosen(steps)])

    async def wait_out_of_sight_async(self) -> None:
        """Waits like `wait_out_of_sight`."""
        await until_done([each.out_of_sight for each in self._chosen(None)])

    def wait(self) -> None:
        """Blocks until all is removed, or left to a later process; nothing is saved any more."""
        self._is_hurried = True
        concurrent.futures.wait([each.gone for each in self._chosen(None)])

    async def wait_async(self) -> None:
        """Waits like `wait`."""
        self._is_hurried = True
        await until_done([each.gone for each in self._chosen(None)])

    def _chosen(self, steps: Iterable[int] | None) -> list[_Leaving]:
        with self._lock:
            return [each for each in self._leaving if steps is None or each.step in steps]

    # Working.

    async def _remove(self, leaving: list[_Leaving], again: list[_Leaving]) -> None:
        try:
            await self._hide(leaving)
            async with self._emptying:
                for each in [*leaving, *again]:
                    if each.hidden is not None:
                        await self._empty(each, each.hidden)
        finally:  # also where the interpreter ends before all is done
            self._end(leaving)

    def _end(self, leaving: Iterable[_Leaving]) -> None:
        with self._lock:
            self._leaving = [each for each in self._leaving if each not in leaving]
        for each in leaving:
            if each.hidden is not None:
                leftovers.leave(each.hidden)
            _settle(each.out_of_sight)
            _settle(each.gone)

    async def _hide(self, leaving: list[_Leaving]) -> None:
        """Renames steps, and makes that durable."""
        failures: dict[_Leaving, OSError] = {}
        pauses = iter(_RETRY_SECS)
        while True:
            are_held = await loop.to_worker(self._rename_all, leaving, failures)
            pause = _HELD_SECS if are_held else next(pauses, None) if failures else None
            if pause is None:
                break
            await anyio.sleep(pause)
        for each, error in failures.items():
            logger.error(
                "step %d was to be removed, and is kept: %s can't be renamed: %s",
                each.step,
                each.path,
                error,
            )
            await loop.to_worker(self._put_back, each.step)
            self._end([each])
        for each in leaving:
            _settle(each.out_of_sight)

    def _rename_all(self, leaving: list[_Leaving], failures: dict[_Leaving, OSError]) -> bool:
        """Renames those that nobody reads; returns whether there are others."""
        failures.clear()
        renamed, are_held = [], False
        for each in leaving:
            if each.hidden is not None:
                continue
            hidden = leftovers.temporary_path(each.path)
            with self._lock:
                if self._holders[each.step]:
                    are_held = True
                    continue
                leftovers.look_after(hidden)
                try:
                    os.rename(each.path, hidden)
                except FileNotFoundError:
                    pass  # somebody else has removed it: nothing will be found there
                except OSError as error:
                    leftovers.leave(hidden)
                    failures[each] = error
                    continue
                else:
                    renamed.append(each)
                each.hidden = hidden
        try:
            files.fsync_directory(self._run)
        except OSError as error:  # without it, a crash of the machine might bring half a step back
            for each in renamed:
                with contextlib.suppress(OSError):
                    os.rename(str(each.hidden), each.path)
                    leftovers.leave(str(each.hidden))
                    each.hidden, failures[each] = None, error
        return are_held

    async def _empty(self, leaving: _Leaving, path: str) -> None:
        """Removes a directory that is out of sight, a few files at a time."""
        for pause in (*_RETRY_SECS, None):
            try:
                removing = _removals(path)
                while await loop.to_worker(_remove_some, removing):
                    await self._rest()
                break
            except OSError as error:
                if pause is None:
                    logger.warning(
                        "%s, an old step, can't be removed, and is left to a later time: %s",
                        path,
                        error,
                    )
                    with self._lock:
                        self._stuck.append(leaving)
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


def _settle(future: concurrent.futures.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _removals(path: str) -> Iterator[None]:
    """Removes a tree, one entry at a time; what is gone is fine."""
    for directory, folders, names in os.walk(path, topdown=False, onerror=_unless_gone):
        paths = [os.path.join(directory, name) for name in names]
        inner = [os.path.join(directory, folder) for folder in folders]
        for each in [*paths, *filter(os.path.islink, inner)]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each)
            yield
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(directory)
        yield


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _remove_some(removing: Iterator[None]) -> bool:
    """Goes on with a removal; returns whether there may be more."""
    return sum(1 for _ in itertools.islice(removing, _FILES_AT_ONCE)) == _FILES_AT_ONCE
