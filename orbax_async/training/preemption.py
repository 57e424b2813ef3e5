"""Whether the job is about to be preempted.

    with preemption.watched():                       # SIGTERM no longer ends the program at once
        for step in range(steps):
            ...
            checkpointer.save(step, state)           # saves, whatever the interval
            if preemption.is_noticed():
                break                                # and the program ends within the grace period

`PreemptionCheckpointingPolicy`, a part of the default policy, saves when it is. A notice comes from
jax, where `jax.distributed` is initialized and its preemption service is on; it makes all processes
agree on the step. Without it, a signal may be watched for; that is each process's own.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

from orbax_async._trace import logger

__all__ = ["is_noticed", "noticed_at", "reached", "watched"]

_noticed_at: float | None = None


@contextlib.contextmanager
def watched(*signals: signal.Signals) -> Iterator[None]:
    """Takes signals as notices, inside a `with` block, instead of ending the program.

    A handler that a user had installed is called too. Only the main thread can install handlers.

    Args:
      signals: the signals; SIGTERM, unless any are given.

    Raises:
      ValueError: it is not called in the main thread, or a signal can't be handled.
    """
    global _noticed_at
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        global _noticed_at
        _noticed_at = _noticed_at or time.time()
        handler = before.get(signal.Signals(number))
        if callable(handler):
            handler(number, frame)

    try:
        for each in signals or (signal.SIGTERM,):
            before[each] = signal.getsignal(each)
            signal.signal(each, note)
        yield
    finally:
        for each, handler in before.items():
            if handler is not None:  # one that was not installed from Python can't be put back
                signal.signal(each, handler)
        _noticed_at = None


def is_noticed() -> bool:
    """Says whether a signal that is watched for has come."""
    return _noticed_at is not None


def noticed_at() -> float | None:
    """Returns when it came, in seconds since the epoch; None if it has not."""
    return _noticed_at


def reached(step: int) -> bool:
    """Says whether a checkpoint should be saved now, because the job is about to be preempted.

    Args:
      step: the step at hand. Where jax gives notice, every process asks at every step.
    """
    if is_noticed():
        return True
    known: Any = multihost_utils
    state = known.distributed.global_state
    if state.client is None or state.preemption_sync_manager is None:
        return False
    has_come = bool(multihost_utils.reached_preemption_sync_point(step))
    if has_come:
        logger.warning("jax says that the job is about to be preempted; step %d is saved", step)
    return has_come
