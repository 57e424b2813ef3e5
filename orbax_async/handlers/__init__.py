"""Turning objects into files, and files into objects.

Does:
  - describe each kind of leaf for the plan, and refuse what can't be held (`leaves`);
  - resolve what each leaf should be loaded as (`targets`);
  - save and load pytrees in two tiers (`pytree`, with `saving` and `reading` behind it);
  - choose the handler of a checkpointable (`resolve`).

Does not:
  - schedule bytes (the engine does) or make anything visible (the commit does).
"""

from __future__ import annotations

from orbax_async.handlers.protocols import PLACEHOLDER as PLACEHOLDER
from orbax_async.handlers.protocols import CheckpointableHandler as CheckpointableHandler
from orbax_async.handlers.pytree import PyTreeHandler as PyTreeHandler
from orbax_async.registration import (
    CheckpointableHandlerRegistry as CheckpointableHandlerRegistry,
)
from orbax_async.registration import global_registry as global_registry
from orbax_async.registration import local_registry as local_registry
from orbax_async.registration import register_handler as register_handler

__all__ = [
    "PLACEHOLDER",
    "CheckpointableHandler",
    "CheckpointableHandlerRegistry",
    "PyTreeHandler",
    "global_registry",
    "local_registry",
    "register_handler",
]
