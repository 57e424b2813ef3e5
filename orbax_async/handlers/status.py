"""`serialization_status_callback`: what it says of the order of leaves, and what it is told.

It orders jax arrays alone, as in Orbax. What it lets wait is captured behind everything else;
where transfers are limited, `save_async` does not wait for it either.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import get_args

from orbax_async import errors
from orbax_async._engine.leaf import Leaf
from orbax_async._engine.save_pipeline import Event
from orbax_async.handlers import leaves
from orbax_async.options import SerializationStatusCallback, TransferPriority
from orbax_async.tree.keypath import JaxKeyPath

__all__ = ["StatusReporter", "set_priorities"]

# By name, so that Orbax's own members are understood.
_PRIORITIES = {
    TransferPriority.SYNCHRONOUS.name: 1,
    TransferPriority.ASYNCHRONOUS_PRIORITIZED.name: 2,
    TransferPriority.ASYNCHRONOUS_DEPRIORITIZED.name: 3,
}


def set_priorities(
    callback: SerializationStatusCallback, named: Iterable[tuple[JaxKeyPath, Leaf]]
) -> None:
    """Asks for the priority of each leaf.

    Raises:
      AttributeError: the callback lacks a method.
      UnsupportedLeafError: the priority of leaves is unknown; all of them are named.
      Exception: what the callback raises.
    """
    for event in get_args(Event):
        getattr(callback, f"on_{event}")
    refused: list[errors.LeafError] = []
    for path, leaf in named:
        answer = callback.key_priority(path)
        priority = _PRIORITIES.get(getattr(answer, "name", ""))
        if priority is None:
            message = f"Prioritization is unknown: key_priority({path}) returned {answer!r}"
            refused.append(errors.UnsupportedLeafError(leaf.label, message))
        else:
            leaf.priority = priority
    if refused:
        raise leaves.summary(refused)


class StatusReporter:
    """Counts the pieces of leaves, and calls back for the first that starts and the last that ends.

    Args:
      callback: what to call.
      paths: the key path of each leaf to tell of.
      pieces: how many pieces of each leaf there are.
    """

    def __init__(
        self,
        callback: SerializationStatusCallback,
        paths: Mapping[int, JaxKeyPath],
        pieces: Mapping[int, int],
    ) -> None:
        self._callback = callback
        self._paths = paths
        self._pieces = pieces
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()

    def __call__(self, event: Event, leaves: Iterable[int]) -> None:
        """Notes an event of a piece of each of these leaves, with repetitions."""
        for leaf in leaves:
            if leaf not in self._paths:
                continue
            due = 1 if event.endswith("_start") else self._pieces[leaf]
            with self._lock:
                self._counts[event, leaf] += 1
                is_due = self._counts[event, leaf] == due
            if is_due:
                getattr(self._callback, f"on_{event}")(self._paths[leaf])
