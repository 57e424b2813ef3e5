"""The handlers that every process begins with, and what they are called on disk.

Checkpoints name Orbax's own handler classes. Those names stand for these classes, and these
classes write those names, so that either library finds its own.
"""

from __future__ import annotations

from orbax_async import _names as names
from orbax_async import registration
from orbax_async.handlers.documents import JsonHandler, MetricsHandler, ProtoHandler
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.handlers.stateful import StatefulCheckpointableHandler

__all__ = ["STATEFUL_TYPESTR", "TYPESTRS"]

_HANDLERS = names.PYTREE_TYPESTR.removesuffix("pytree_handler.PyTreeHandler")
STATEFUL_TYPESTR = f"{_HANDLERS}stateful_checkpointable_handler.StatefulCheckpointableHandler"

TYPESTRS: dict[type, str] = {
    PyTreeHandler: names.PYTREE_TYPESTR,
    JsonHandler: f"{_HANDLERS}json_handler.JsonHandler",
    MetricsHandler: f"{_HANDLERS}json_handler.MetricsHandler",
    ProtoHandler: f"{_HANDLERS}proto_handler.ProtoHandler",
    StatefulCheckpointableHandler: STATEFUL_TYPESTR,
}


def _older(*classes: str) -> list[str]:
    """Returns the names of handlers of older Orbax versions, which lay in two places."""
    return [
        f"orbax.checkpoint.{version}_src.handlers.{name}"
        for name in classes
        for version in ("", "v0.")
    ]


_OLDER_TREES = _older(
    "pytree_checkpoint_handler.PyTreeCheckpointHandler",
    "standard_checkpoint_handler.StandardCheckpointHandler",
)

# The newest is asked first: most of what is saved is a pytree.
registration.begin_with(
    registration.HandlerRegistry()
    .add(ProtoHandler, secondary_typestrs=_older("proto_checkpoint_handler.ProtoCheckpointHandler"))
    .add(JsonHandler, secondary_typestrs=_older("json_checkpoint_handler.JsonCheckpointHandler"))
    .add(StatefulCheckpointableHandler)
    .add(MetricsHandler, checkpointable_name=names.METRICS)
    .add(PyTreeHandler, secondary_typestrs=_OLDER_TREES)
    .add(
        PyTreeHandler,
        checkpointable_name=names.DEFAULT_CHECKPOINTABLE,
        secondary_typestrs=_OLDER_TREES,
    )
)
