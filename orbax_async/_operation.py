"""The operation that a handler works for: its options, its processes, its recorder."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Awaitable, Callable

import jax
import numpy as np

from orbax_async import context as ambient
from orbax_async import multihost
from orbax_async._engine import loop
from orbax_async._engine.budget import ByteBudget
from orbax_async._trace import Recorder
from orbax_async.options import MemoryOptions

__all__ = ["Operation", "current"]


# Joint operations of several processes stop waiting for each other somewhat before they time out.
_LONGEST_SECS = 1200.0
_WAITING_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Operation:
    """One save or load, of one checkpointable or of several.

    Attributes:
      context: the options as they were when the operation was called (invariant I7).
      processes: who takes part.
      recorder: counts and times what is done.
      enable_x64: whether the caller's jax holds 64-bit values; the setting belongs to a thread.
      write_budget: bytes that are being written, of all its handlers together.
      transfer_budget: bytes that capturing has copied and that are not written yet. A limit on
        writes limits them too: a copy lives until it is written.
      read_budget: bytes that are being read.
    """

    context: ambient.Context
    processes: multihost.Processes
    recorder: Recorder
    enable_x64: bool
    write_budget: ByteBudget
    transfer_budget: ByteBudget
    read_budget: ByteBudget
    _running: set[loop.Background] = dataclasses.field(default_factory=set, repr=False)
    _when_let_go: list[Callable[[str, bool], None]] = dataclasses.field(
        default_factory=list, repr=False
    )

    @classmethod
    def begin(cls, *, is_joint: bool = False) -> Operation:
        """Starts an operation under the caller's context.

        Args:
          is_joint: whether all processes act together in it, and therefore all begin it.
        """
        snapshot = ambient.snapshot()
        options = snapshot.multiprocessing
        timeout_secs = snapshot.asynchronous.timeout_secs
        processes = multihost.Processes(
            primary=options.primary_host,
            active=options.active_processes,
            prefix=options.barrier_sync_key_prefix,
            is_joint=is_joint,
            timeout_secs=_WAITING_SHARE * (_LONGEST_SECS if timeout_secs is None else timeout_secs),
            call=loop.to_worker,
        )
        memory = snapshot.memory
        return cls(
            snapshot,
            processes,
            Recorder(),
            _holds_64_bits(),
            write_budget=ByteBudget(memory.write_concurrent_bytes),
            transfer_budget=ByteBudget(_transfer_limit(memory)),
            read_budget=ByteBudget(memory.read_concurrent_bytes),
        )

    def regulated(self) -> tuple[Operation, Callable[[], None] | None]:
        """Moves the limit of transfers, if a regulator governs it, and begins to measure memory.

        Returns:
          The operation under the new limit; and what ends the measurement, if it has begun.
        """
        memory = self.context.memory
        if memory.regulator_options is None:
            return self, None
        limit, end = memory.regulator_options.regulator.begin(memory.expected_surge_bytes)
        return dataclasses.replace(self, transfer_budget=ByteBudget(limit)), end

    def let_go(self, name: str, *, is_held: bool) -> None:
        """Says that the caller need not wait any longer for the first tier of a checkpointable.

        Args:
          name: the checkpointable's.
          is_held: whether all its values are captured, not just those that had to be.
        """
        for callback in self._when_let_go:
            callback(name, is_held)

    def when_let_go(self, callback: Callable[[str, bool], None]) -> None:
        """Calls `callback` with what `let_go` is told of each checkpointable."""
        self._when_let_go.append(callback)

    def background(self, function: Callable[[], Awaitable[None]]) -> loop.Background:
        """Runs a coroutine beside the handler that calls this, until it is joined.

        One that is not joined, because the operation fails elsewhere, ends with the operation.
        """

        async def run() -> None:
            try:
                await function()
            finally:
                self._running.discard(running)

        running = loop.Background(run)
        self._running.add(running)
        return running

    async def end_background(self) -> None:
        """Cancels what no handler has joined, and waits for its end."""
        for running in list(self._running):
            await running.cancel()
        self._running.clear()


def _transfer_limit(memory: MemoryOptions) -> int | None:
    if memory.regulator_options is not None:
        return memory.regulator_options.regulator.current_limit_bytes
    if memory.transfer_concurrent_bytes is not None:
        return memory.transfer_concurrent_bytes
    return memory.write_concurrent_bytes


def _holds_64_bits() -> bool:
    return np.dtype(jax.dtypes.canonicalize_dtype(np.float64)) == np.float64


_current: contextvars.ContextVar[Operation] = contextvars.ContextVar("orbax_async.operation")


def current(*, is_joint: bool = False) -> Operation:
    """Returns the operation under way; a handler that is used by itself begins its own."""
    return _current.get(None) or Operation.begin(is_joint=is_joint)


def enter(operation: Operation) -> None:
    """Makes an operation the current one for the rest of this task."""
    _current.set(operation)
