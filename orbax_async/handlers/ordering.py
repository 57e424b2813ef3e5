"""What callbacks of `MemoryOptions` say of the order of leaves, and what they are told.

`serialization_status_callback` orders jax arrays alone, as in Orbax. What it lets wait is captured
behind everything else; where transfers are limited, `save_async` does not wait for it either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orbax_async import errors
from orbax_async._engine.status import Reporter
from orbax_async.handlers import leaves
from orbax_async.handlers.forms import PreparedTree
from orbax_async.options import MemoryOptions, SerializationStatusCallback, TransferPriority
from orbax_async.tree.keypath import JaxKeyPath

__all__ = ["delays", "may_delay", "prioritized", "reporter"]

_EVENTS = ("on_transfer_start", "on_transfer_end", "on_write_start", "on_write_end")
# By name, so that Orbax's own members are understood.
_DELAYS = {
    TransferPriority.SYNCHRONOUS.name: 0,
    TransferPriority.ASYNCHRONOUS_PRIORITIZED.name: 1,
    TransferPriority.ASYNCHRONOUS_DEPRIORITIZED.name: 2,
}


def prioritized(
    prepared: PreparedTree, is_prioritized: Callable[[JaxKeyPath], Any] | None
) -> set[int]:
    """Returns the indices of the arrays that are transferred first."""
    if is_prioritized is None:
        return set()
    paths = enumerate(path for path, _ in prepared.array_leaves())
    return {index for index, path in paths if is_prioritized(path)}


def delays(prepared: PreparedTree, callback: SerializationStatusCallback) -> dict[int, int]:
    """Asks for the priority of each jax array; returns how far behind each is captured.

    Raises:
      AttributeError: the callback lacks a method.
      UnsupportedLeafError: the priority of leaves is unknown; all of them are named.
      Exception: what the callback raises.
    """
    for method in ("key_priority", *_EVENTS):
        getattr(callback, method)
    found: dict[int, int] = {}
    refused: list[errors.LeafError] = []
    for index, path in _jax_arrays(prepared).items():
        priority = callback.key_priority(path)
        delay = _DELAYS.get(getattr(priority, "name", ""))
        if delay is None:
            label = prepared.form.arrays[index].label
            message = f"Prioritization is unknown: key_priority({path}) returned {priority!r}"
            refused.append(errors.UnsupportedLeafError(label, message))
        else:
            found[index] = delay
    if refused:
        raise leaves.summary(refused)
    return found


def may_delay(options: MemoryOptions) -> bool:
    """Says whether a caller goes on before what may wait is captured."""
    return options.transfer_concurrent_bytes is not None or options.regulator_options is not None


def reporter(
    prepared: PreparedTree,
    callback: SerializationStatusCallback | None,
    pieces: Mapping[int, int],
) -> Reporter | None:
    """Returns what tells a callback of each jax array of which this process writes pieces."""
    if callback is None:
        return None
    events = {event: getattr(callback, event) for event in _EVENTS}
    return Reporter(events, _jax_arrays(prepared), pieces)


def _jax_arrays(prepared: PreparedTree) -> dict[int, JaxKeyPath]:
    return {
        index: path
        for index, (path, _) in enumerate(prepared.array_leaves())
        if prepared.form.arrays[index].sharding is not None
    }
