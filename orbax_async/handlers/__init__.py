"""Turning objects into files, and files into objects.

Does:
  - say of each kind of leaf how it is stored, asked for and given back (`kinds`), and how arrays
    are divided (`leaves`);
  - plan what is written of a tree, and in which order, and what is read of one (`write_plan`,
    `read_plan`);
  - save and load pytrees in two phases (`pytree`), and put those of partial saves together
    (`parts`);
  - save and load documents (`documents`), and objects that do so themselves (`user_code`);
  - choose the handler of a checkpointable, from the package's and the users', and run both phases
    of several at once (`phases`), users' code among them (`user_code`).

Does not:
  - schedule bytes (the engine does) or make anything visible (the commit does).
"""

from __future__ import annotations

from orbax_async.handlers import phases as phases
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
