"""Turning objects into files, and files into objects.

Does:
  - describe each kind of leaf, and refuse what can't be held (`leaves`); decide how each is stored
    (`leaf_storage`), and keep what a structure and options decide for later saves (`write_plan`);
  - resolve what each leaf should be loaded as (`targets`);
  - save and load pytrees in two tiers (`pytree`, with `tree_writer`, `stored` and `reading` behind
    it), tell callbacks of it (`status`), and look for damage in them (`inspection`);
  - put the trees of partial saves together (`additions`);
  - save and load documents (`documents`), and objects that do so themselves (`stateful`);
  - choose the handler of a checkpointable (`resolve`, from those in `builtin` and the users');
  - run both tiers of several handlers at once (`tiers`), users' code among them (`foreign`).

Does not:
  - schedule bytes (the engine does) or make anything visible (the commit does).
"""

from __future__ import annotations

from orbax_async.handlers import choose as choose
from orbax_async.handlers.documents import JsonHandler as JsonHandler
from orbax_async.handlers.documents import ProtoHandler as ProtoHandler
from orbax_async.handlers.protocol import PLACEHOLDER as PLACEHOLDER
from orbax_async.handlers.protocol import AbstractCheckpointable as AbstractCheckpointable
from orbax_async.handlers.protocol import Checkpointable as Checkpointable
from orbax_async.handlers.protocol import CheckpointableHandler as CheckpointableHandler
from orbax_async.handlers.protocol import StatefulCheckpointable as StatefulCheckpointable
from orbax_async.handlers.pytree import PyTreeHandler as PyTreeHandler
from orbax_async.registration import (
    CheckpointableHandlerRegistry as CheckpointableHandlerRegistry,
)
from orbax_async.registration import global_registry as global_registry
from orbax_async.registration import local_registry as local_registry
from orbax_async.registration import register_handler as register_handler

__all__ = [
    "PLACEHOLDER",
    "AbstractCheckpointable",
    "Checkpointable",
    "CheckpointableHandler",
    "CheckpointableHandlerRegistry",
    "JsonHandler",
    "ProtoHandler",
    "PyTreeHandler",
    "StatefulCheckpointable",
    "global_registry",
    "local_registry",
    "register_handler",
]
