"""The controller behind `MemoryOptions.RegulatorOptions`: a limit that follows measured memory.

Theory of operation
  Before each save the limit moves by a PID control of the distance between the peak that the last
  save reached and the peak to aim at: a share of the host's memory. A peak above all memory lowers
  it by at least the excess. An expected surge is taken off the limit, and given back by the next
  save; while it lasts the limit never rises otherwise, and the controller learns nothing. Readings
  that can't be are ignored. The arithmetic is that of Orbax.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, Protocol

_GIB = 1024**3
_LONGEST_INTEGRAL = 50.0


class _Profiler(Protocol):
    @property
    def peak_usage_bytes(self) -> int: ...
    @property
    def total_memory_gib(self) -> float: ...
    def profiler_start(self) -> None: ...
    def profiler_end(self) -> None: ...
    def get_expected_surge_gib(self) -> float: ...


class MemoryRegulator:
    """The limit of transfers, and what the controller remembers of earlier saves.

    Attributes:
      current_limit_bytes: the limit of the last save, or the lowest one before the first.
    """

    def __init__(
        self,
        profiler: _Profiler,
        *,
        max_memory_limit_gib: float,
        min_memory_limit_gib: float,
        target_ratio: float,
        coefficients: tuple[float, float, float],
    ) -> None:
        self._profiler = profiler
        self._max = max_memory_limit_gib
        self._min = min_memory_limit_gib
        self._target_ratio = target_ratio
        self._coefficients = coefficients
        self._integral = 0.0
        self._last_error = 0.0
        self._last_surge = 0.0
        self._lock = threading.Lock()
        self._is_profiling = False
        self.current_limit_bytes = int(min_memory_limit_gib * _GIB)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_lock": threading.Lock(), "_is_profiling": False})

    def begin(self, expected_surge_bytes: float | None = None) -> tuple[int, Callable[[], None]]:
        """Moves the limit for one save, and begins to profile that save.

        A save that begins while another is profiled takes the limit as it is, for a profiler
        measures one at a time.

        Args:
          expected_surge_bytes: bytes to leave free; None asks the profiler.

        Returns:
          The limit in bytes, and what ends the profile.
        """
        with self._lock:
            if self._is_profiling:
                return self.current_limit_bytes, lambda: None
            self._is_profiling = True
        try:
            surge = (
                self._profiler.get_expected_surge_gib()
                if expected_surge_bytes is None
                else expected_surge_bytes / _GIB
            )
            limit = self._next(
                self.current_limit_bytes / _GIB,
                peak=self._profiler.peak_usage_bytes / _GIB,
                total=self._profiler.total_memory_gib,
                surge=surge,
            )
            self.current_limit_bytes = int(limit * _GIB)
            self._profiler.profiler_start()
        except BaseException:
            self._is_profiling = False
            raise
        return self.current_limit_bytes, self._end

    def _end(self) -> None:
        try:
            self._profiler.profiler_end()
        finally:
            self._is_profiling = False

    def _next(self, limit: float, *, peak: float, total: float, surge: float) -> float:
        """Returns the next limit; everything is in GiB."""
        if not (0 <= peak < math.inf and 0 <= total < math.inf and surge >= 0):
            return limit
        proportional, integral, derivative = self._coefficients
        error = total * self._target_ratio - peak
        change = (
            proportional * error
            + integral * self._integral
            + derivative * (error - self._last_error)
        )
        if surge == 0:
            reached = self._integral + error
            self._integral = max(-_LONGEST_INTEGRAL, min(_LONGEST_INTEGRAL, reached))
            self._last_error = error
        else:
            change = min(change, 0.0)
        if peak > total:
            change = min(change, total - peak)
        wanted = limit + self._last_surge + change
        chosen = self._clamped(wanted - surge)
        self._last_surge = self._clamped(wanted) - chosen
        return chosen

    def _clamped(self, limit: float) -> float:
        return max(self._min, min(self._max, limit))
