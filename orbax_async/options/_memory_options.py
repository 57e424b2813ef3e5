"""How much memory an operation may take, and in which order it takes it."""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from orbax_async.options._group import (
    FROM_1,
    OptionGroup,
    function,
    instance_of,
    number,
    option,
)

_GIB = 1024**3
_LONGEST_INTEGRAL = 50.0


class TransferPriority(enum.Enum):
    """When the values of a leaf are copied from its device.

    Where transfers are limited (`MemoryOptions.transfer_concurrent_bytes`, `regulator_options`),
    `save_async` returns before asynchronous leaves are copied; leave them as they are until the
    response is `staged`. Without a limit the priorities are an order alone.

    Attributes:
      SYNCHRONOUS: before `save_async` returns.
      ASYNCHRONOUS_PRIORITIZED: after those, in the background.
      ASYNCHRONOUS_DEPRIORITIZED: last, in the background.
      UNKNOWN: undecided, which is an error.
    """

    SYNCHRONOUS = 0
    ASYNCHRONOUS_PRIORITIZED = 1
    ASYNCHRONOUS_DEPRIORITIZED = 2
    UNKNOWN = 3


class SerializationStatusCallback(Protocol):
    """Orders the jax arrays of a save, and is told how far each is.

    Calls may come from any thread. What they raise fails the save.
    """

    def key_priority(self, keypath: tuple[Any, ...]) -> TransferPriority:
        """Choose when the leaf at a key path is copied from its device."""

    def on_transfer_start(self, keypath: tuple[Any, ...]) -> None:
        """Learn that copying the leaf from its device begins."""

    def on_transfer_end(self, keypath: tuple[Any, ...]) -> None:
        """Learn that the leaf is in host memory."""

    def on_write_start(self, keypath: tuple[Any, ...]) -> None:
        """Learn that writing the leaf begins."""

    def on_write_end(self, keypath: tuple[Any, ...]) -> None:
        """Learn that the leaf is written."""


class MemoryProfiler(Protocol):
    """Measures the host memory that a save takes, for `MemoryOptions.RegulatorOptions`."""

    @property
    def peak_usage_bytes(self) -> int:
        """The highest use of host memory during the last save, in bytes."""

    @property
    def total_memory_gib(self) -> float:
        """The host's memory, in GiB."""

    def profiler_start(self) -> None:
        """Begin to measure."""

    def profiler_end(self) -> None:
        """Stop measuring."""

    def get_expected_surge_gib(self) -> float:
        """Return how much other memory the next save will have to leave free, in GiB."""

    def get_prev_blocking_time_sec(self) -> float:
        """Return how long the last save waited for memory, in seconds."""


class MemoryOptions(OptionGroup):
    """How much memory an operation may take beside the state itself. None means no limit.

    Attributes:
      write_concurrent_bytes: the most bytes being written at a time, in each process. Without
        `transfer_concurrent_bytes` it limits what is copied and not yet written, too.
      read_concurrent_bytes: the most bytes being read at a time, in each process.
      transfer_concurrent_bytes: the most bytes copied from devices and not yet written, in each
        process; a save may then have to write some leaves before it is staged.
      regulator_options: adjusts the limit of transfers from save to save by measured memory, in
        place of `transfer_concurrent_bytes`; None keeps that limit.
      expected_surge_bytes: bytes that the regulator leaves free during the next save for a passing
        need of the program; None asks the profiler.
      is_prioritized_key_fn: called with each key path; leaves for which it returns true are
        transferred first and outside the limit of transfers. None means no such leaf.
      serialization_status_callback: orders leaves and is told how far each is; None means no calls.
      deepcopy_host_arrays: whether NumPy arrays are copied when they are staged; otherwise the
        caller must leave them unchanged until the save is done.
    """

    @dataclass(frozen=True, kw_only=True)
    class RegulatorOptions:
        """A PID controller of the limit of transfers. Contexts that inherit it share its state.

        Of saves that run at the same time under one regulator, the first is measured, and the
        others keep to the limit as it is.

        Attributes:
          max_memory_limit_gib: the highest limit, in GiB.
          profiler: measures each save.
          target_ratio: the fraction of the host's memory to use at the peak.
          min_memory_limit_gib: the lowest limit, which is also the first, in GiB.
          kp: proportional coefficient.
          ki: integral coefficient.
          kd: derivative coefficient.
        """

        max_memory_limit_gib: float
        profiler: MemoryProfiler
        target_ratio: float = 0.8
        min_memory_limit_gib: float = 10.0
        kp: float = 0.4
        ki: float = 0.05
        kd: float = 0.1
        _regulator: MemoryRegulator = field(init=False, repr=False, compare=False)

        def __post_init__(self) -> None:
            if self.profiler is None:
                raise ValueError("RegulatorOptions.profiler must be a MemoryProfiler, not None")
            for name in ("max_memory_limit_gib", "min_memory_limit_gib"):
                if not getattr(self, name) > 0:
                    raise ValueError(
                        f"RegulatorOptions.{name} must be positive, not {getattr(self, name)!r}"
                    )
            target = self.max_memory_limit_gib * self.target_ratio
            if not self.min_memory_limit_gib < target:
                raise ValueError(
                    "RegulatorOptions.min_memory_limit_gib must be less than "
                    f"max_memory_limit_gib * target_ratio = {target:g}, "
                    f"not {self.min_memory_limit_gib!r}"
                )
            object.__setattr__(self, "_regulator", MemoryRegulator(self))

        def __deepcopy__(self, memo: dict[int, Any]) -> MemoryOptions.RegulatorOptions:
            return self  # frozen, and its state is shared

        @property
        def regulator(self) -> MemoryRegulator:
            """The controller itself, with its `current_limit_bytes`."""
            return self._regulator

    write_concurrent_bytes: int | None = option(default=None, check=FROM_1)
    read_concurrent_bytes: int | None = option(default=None, check=FROM_1)
    transfer_concurrent_bytes: int | None = option(default=None, check=FROM_1)
    regulator_options: RegulatorOptions | None = option(
        default=None, check=instance_of(RegulatorOptions)
    )
    expected_surge_bytes: float | None = option(
        default=None, check=number(at_least=0, may_be_infinite=True)
    )
    is_prioritized_key_fn: Callable[[tuple[Any, ...]], Any] | None = option(
        default=None, check=function
    )
    serialization_status_callback: SerializationStatusCallback | None = None
    deepcopy_host_arrays: bool = True


class MemoryRegulator:
    """The limit of transfers, and what the controller remembers of earlier saves.

    Before each save the limit moves by a PID control of the distance between the peak that the
    last save reached and the peak to aim at: a share of the host's memory. A peak above all memory
    lowers it by at least the excess. An expected surge is taken off the limit, and given back by
    the next save; while it lasts the limit never rises otherwise, and the controller learns
    nothing. Readings that can't be are ignored. The arithmetic is that of Orbax.

    Attributes:
      current_limit_bytes: the limit of the last save, or the lowest one before the first.
    """

    def __init__(self, options: MemoryOptions.RegulatorOptions) -> None:
        self._options = options
        self._integral = 0.0
        self._last_error = 0.0
        self._last_surge = 0.0
        self._lock = threading.Lock()
        self._is_profiling = False
        self.current_limit_bytes = int(options.min_memory_limit_gib * _GIB)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_lock": threading.Lock(), "_is_profiling": False})

    def begin(self, expected_surge_bytes: float | None = None) -> tuple[int, Callable[[], None]]:
        """Move the limit for one save, and begin to profile that save.

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
        profiler = self._options.profiler
        try:
            surge = (
                profiler.get_expected_surge_gib()
                if expected_surge_bytes is None
                else expected_surge_bytes / _GIB
            )
            limit = self._next(
                self.current_limit_bytes / _GIB,
                peak=profiler.peak_usage_bytes / _GIB,
                total=profiler.total_memory_gib,
                surge=surge,
            )
            self.current_limit_bytes = int(limit * _GIB)
            profiler.profiler_start()
        except BaseException:
            self._is_profiling = False
            raise
        return self.current_limit_bytes, self._end

    def _end(self) -> None:
        try:
            self._options.profiler.profiler_end()
        finally:
            self._is_profiling = False

    def _next(self, limit: float, *, peak: float, total: float, surge: float) -> float:
        """Return the next limit; everything is in GiB."""
        if not (0 <= peak < math.inf and 0 <= total < math.inf and surge >= 0):
            return limit
        options = self._options
        error = total * options.target_ratio - peak
        change = (
            options.kp * error
            + options.ki * self._integral
            + options.kd * (error - self._last_error)
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
        options = self._options
        return max(options.min_memory_limit_gib, min(options.max_memory_limit_gib, limit))
