"""How much memory an operation may take, and in which order it takes it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from orbax_async.options._checks import (
    function,
    instance_of,
    must_be,
    number,
    whole,
)
from orbax_async.options._group import OptionGroup
from orbax_async.options._memory_regulator import MemoryRegulator


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
        ...

    def on_transfer_start(self, keypath: tuple[Any, ...]) -> None:
        """Learn that copying the leaf from its device begins."""
        ...

    def on_transfer_end(self, keypath: tuple[Any, ...]) -> None:
        """Learn that the leaf is in host memory."""
        ...

    def on_write_start(self, keypath: tuple[Any, ...]) -> None:
        """Learn that writing the leaf begins."""
        ...

    def on_write_end(self, keypath: tuple[Any, ...]) -> None:
        """Learn that the leaf is written."""
        ...


class MemoryProfiler(Protocol):
    """Measures the host memory that a save takes, for `MemoryOptions.RegulatorOptions`."""

    @property
    def peak_usage_bytes(self) -> int:
        """The highest use of host memory during the last save, in bytes."""
        ...

    @property
    def total_memory_gib(self) -> float:
        """The host's memory, in GiB."""
        ...

    def profiler_start(self) -> None:
        """Begin to measure."""
        ...

    def profiler_end(self) -> None:
        """Stop measuring."""
        ...

    def get_expected_surge_gib(self) -> float:
        """Return how much other memory the next save will have to leave free, in GiB."""
        ...

    def get_prev_blocking_time_sec(self) -> float:
        """Return how long the last save waited for memory, in seconds."""
        ...


@dataclass(kw_only=True)
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
            regulator = MemoryRegulator(
                self.profiler,
                max_memory_limit_gib=self.max_memory_limit_gib,
                min_memory_limit_gib=self.min_memory_limit_gib,
                target_ratio=self.target_ratio,
                coefficients=(self.kp, self.ki, self.kd),
            )
            object.__setattr__(self, "_regulator", regulator)

        def __deepcopy__(self, memo: dict[int, Any]) -> MemoryOptions.RegulatorOptions:
            return self  # frozen, and its state is shared

        @property
        def regulator(self) -> MemoryRegulator:
            """The controller itself, with its `current_limit_bytes`."""
            return self._regulator

    write_concurrent_bytes: int | None = field(default=None, metadata=must_be(whole(at_least=1)))
    read_concurrent_bytes: int | None = field(default=None, metadata=must_be(whole(at_least=1)))
    transfer_concurrent_bytes: int | None = field(default=None, metadata=must_be(whole(at_least=1)))
    regulator_options: RegulatorOptions | None = field(
        default=None, metadata=must_be(instance_of(RegulatorOptions))
    )
    expected_surge_bytes: float | None = field(
        default=None, metadata=must_be(number(at_least=0, may_be_infinite=True))
    )
    is_prioritized_key_fn: Callable[[tuple[Any, ...]], Any] | None = field(
        default=None, metadata=must_be(function)
    )
    serialization_status_callback: SerializationStatusCallback | None = None
    deepcopy_host_arrays: bool = True
