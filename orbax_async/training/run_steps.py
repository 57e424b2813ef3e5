"""The committed steps of a run, as this process knows them; safe from any thread."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from orbax_async import errors
from orbax_async.path.step import as_step
from orbax_async.training.retirement import Retirement
from orbax_async.training.run_directory import ListedCheckpoint, RunDirectory

__all__ = ["RunSteps", "step_number"]


class RunSteps:
    """The steps that a run has; those that are being removed are none of them.

    Args:
      directory: where they lie.
      retirement: removes steps.
    """

    def __init__(self, directory: RunDirectory, retirement: Retirement) -> None:
        self._directory = directory
        self._retirement = retirement
        self._lock = threading.RLock()
        self._steps: dict[int, ListedCheckpoint] | None = None  # None: not listed yet
        self._ascending: list[ListedCheckpoint] | None = None

    def reload(self) -> None:
        """Lists the directory anew."""
        with self._lock:
            leaving = self._retirement.steps()
            self._steps = {
                each.step: each for each in self._directory.steps() if each.step not in leaving
            }
            self._ascending = None

    def all(self) -> list[ListedCheckpoint]:
        """Returns the steps in ascending order; lists the directory if nobody has."""
        with self._lock:
            if self._steps is None:
                self.reload()
            assert self._steps is not None
            if self._ascending is None:
                self._ascending = [self._steps[step] for step in sorted(self._steps)]
            return list(self._ascending)

    def find(self, wanted: Any) -> ListedCheckpoint:
        """Returns a step.

        Args:
          wanted: its number, something that has it, or None for the latest.

        Raises:
          StepNotFoundError: it is not there, or there are none.
          TypeError: it is no step.
        """
        if wanted is None:
            while steps := self.all():
                if os.path.isdir(steps[-1].path):
                    return steps[-1]
                self.drop(steps[-1].step)
            raise errors.StepNotFoundError(
                f"no checkpoints were found under {self._directory.path}, and step=None asks for "
                "the latest"
            )
        step = step_number(wanted)
        known = {each.step: each for each in self.all()}.get(step)
        if known is not None and os.path.isdir(known.path):
            return known
        self.drop(step)
        if step in self._retirement.steps():
            raise errors.StepNotFoundError(
                f"the checkpoint of step {step} under {self._directory.path} is being removed: "
                "the preservation policy does not keep it"
            )
        found = self._directory.step(step)
        self.add(found)
        return found

    def hold(self, wanted: Any) -> tuple[ListedCheckpoint, Callable[[], None]]:
        """Finds a step like `find`, and keeps it until the function returned is called."""
        while True:
            found = self.find(wanted)
            release = self._retirement.hold(found.step)
            if os.path.isdir(found.path):
                return found, release
            release()  # it has gone just now

    def add(self, found: ListedCheckpoint) -> None:
        """Adds a step, in place of an older one of the same number."""
        with self._lock:
            self.all()
            assert self._steps is not None
            self._steps[found.step] = found
            self._ascending = None

    def drop(self, step: int) -> None:
        """Forgets a step."""
        with self._lock:
            self.all()
            assert self._steps is not None
            if self._steps.pop(step, None) is not None:
                self._ascending = None

    def put_back(self, step: int) -> None:
        """Adds a step that was dropped, and is still there."""
        with contextlib.suppress(errors.StepNotFoundError):
            self.add(self._directory.step(step))

    def follow(self, steps: Iterable[int]) -> None:
        """Takes over the list of another process."""
        wanted = set(steps)
        if wanted != {each.step for each in self.all()}:
            with self._lock:
                self.reload()
                for each in self.all():
                    if each.step not in wanted:
                        self.drop(each.step)


def step_number(step: Any) -> int:
    """Returns the number of a step that is given as such, or as what is known of it.

    Raises:
      TypeError: it is neither.
    """
    number = getattr(step, "step", step)
    try:
        return as_step(number)
    except ValueError:
        return int(number)  # a negative one, which no run has
