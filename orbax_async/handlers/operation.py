"""The operation that a handler works for: its options, its processes, its recorder."""

from __future__ import annotations

import contextvars
import dataclasses

import jax
import numpy as np

from orbax_async import context as ambient
from orbax_async import multihost
from orbax_async._trace import Recorder

__all__ = ["Operation", "current"]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One save or load.

    Attributes:
      context: the options as they were when the operation was called (invariant I7).
      processes: who takes part.
      recorder: counts and times what is done.
      enable_x64: whether the caller's jax holds 64-bit values; the setting belongs to a thread.
    """

    context: ambient.Context
    processes: multihost.Processes
    recorder: Recorder
    enable_x64: bool

    @classmethod
    def begin(cls) -> Operation:
        """Starts an operation under the caller's context."""
        snapshot = ambient.snapshot()
        options = snapshot.multiprocessing
        processes = multihost.Processes(
            primary=options.primary_host,
            active=options.active_processes,
            prefix=options.barrier_sync_key_prefix,
        )
        return cls(snapshot, processes, Recorder(), _holds_64_bits())


def _holds_64_bits() -> bool:
    return np.dtype(jax.dtypes.canonicalize_dtype(np.float64)) == np.float64


_current: contextvars.ContextVar[Operation] = contextvars.ContextVar("orbax_async.operation")


def current() -> Operation:
    """Returns the operation under way; a handler that is used by itself begins its own."""
    return _current.get(None) or Operation.begin()


def enter(operation: Operation) -> None:
    """Makes an operation the current one for the rest of this task."""
    _current.set(operation)
