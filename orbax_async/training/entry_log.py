"""Telling a user's logger of the saves that have begun."""

from __future__ import annotations

import time
from typing import Any, Protocol

from orbax_async.training import preemption

__all__ = ["EntryLog", "EntryLogger"]


class EntryLogger(Protocol):
    """What a Checkpointer tells of each save that has begun."""

    def log_entry(self, entry: dict[str, Any]) -> None:
        """Takes a dict about a save."""
        ...


class EntryLog:
    """Makes the entries of one run.

    Args:
      directory: the run's.
      logger: takes the entries; None to make none.
    """

    def __init__(self, directory: str, logger: EntryLogger | None) -> None:
        self._directory = directory
        self._logger = logger
        self._last_began: float | None = None

    def begun(self, step: int, *, began: float, began_capture: float) -> None:
        """Tells of a save whose values are captured, under the keys that Orbax has for it.

        Args:
          step: the step's number.
          began: when `save` was called, in seconds since the epoch.
          began_capture: when no earlier save was in the way any more.
        """
        now = time.time()
        before, self._last_began = self._last_began, began
        if self._logger is None:
            return
        self._logger.log_entry(
            {
                "step": step,
                "event_type": "save",
                "directory": self._directory,
                "reached_preemption": preemption.is_noticed(),
                "preemption_received_at": preemption.noticed_at(),
                "synchronous": False,
                "wait_for_prev_start_time": began,
                "wait_for_prev_duration_secs": began_capture - began,
                "time_between_consecutive_saves_sec": None if before is None else began - before,
                "checkpointer_blocking_start_time": began_capture,
                "checkpointer_blocking_duration_secs": now - began_capture,
                "checkpoint_manager_blocking_start_time": began,
                "checkpoint_manager_blocking_duration_secs": now - began,
            }
        )
