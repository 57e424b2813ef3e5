"""The asyncio-native checkpoint engine for JAX: Orbax v1's API and format, with a new inside.

    import orbax_async as ocp

    response = ocp.save_async("/checkpoints/7", state)   # returns once every value is captured
    await response                                       # or response.result()
    state = ocp.load("/checkpoints/7", abstract_state)

A name is imported when it is first used, so that importing the package costs next to nothing. Where
a running event loop must not wait for that once, import the names at the top of the module:

    from orbax_async import load_async, save_async
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orbax_async import arrays as arrays
    from orbax_async import errors as errors
    from orbax_async import handlers as handlers
    from orbax_async import multihost as multihost
    from orbax_async import options as options
    from orbax_async import partial as partial
    from orbax_async import path as path
    from orbax_async import training as training
    from orbax_async import tree as tree
    from orbax_async._api.delete import delete as delete
    from orbax_async._api.delete import delete_async as delete_async
    from orbax_async._api.load import load as load
    from orbax_async._api.load import load_async as load_async
    from orbax_async._api.load import load_checkpointables as load_checkpointables
    from orbax_async._api.load import load_checkpointables_async as load_checkpointables_async
    from orbax_async._api.load import load_pytree as load_pytree
    from orbax_async._api.load import load_pytree_async as load_pytree_async
    from orbax_async._api.metadata import CheckpointMetadata as CheckpointMetadata
    from orbax_async._api.metadata import PyTreeMetadata as PyTreeMetadata
    from orbax_async._api.metadata import checkpointables_metadata as checkpointables_metadata
    from orbax_async._api.metadata import is_orbax_checkpoint as is_orbax_checkpoint
    from orbax_async._api.metadata import metadata as metadata
    from orbax_async._api.metadata import pytree_metadata as pytree_metadata
    from orbax_async._api.save import save as save
    from orbax_async._api.save import save_async as save_async
    from orbax_async._api.save import save_checkpointables as save_checkpointables
    from orbax_async._api.save import save_checkpointables_async as save_checkpointables_async
    from orbax_async._api.save import save_pytree as save_pytree
    from orbax_async._api.save import save_pytree_async as save_pytree_async
    from orbax_async._api.verify import VerificationReport as VerificationReport
    from orbax_async._api.verify import verify as verify
    from orbax_async._api.verify import verify_async as verify_async
    from orbax_async._layouts.layout import Damage as Damage
    from orbax_async._response import AsyncResponse as AsyncResponse
    from orbax_async.context import Context as Context
    from orbax_async.handlers import PLACEHOLDER as PLACEHOLDER
    from orbax_async.handlers import AbstractCheckpointable as AbstractCheckpointable
    from orbax_async.handlers import Checkpointable as Checkpointable
    from orbax_async.handlers import CheckpointableHandler as CheckpointableHandler
    from orbax_async.handlers import StatefulCheckpointable as StatefulCheckpointable

__all__ = [
    "PLACEHOLDER",
    "AbstractCheckpointable",
    "AsyncResponse",
    "CheckpointMetadata",
    "Checkpointable",
    "CheckpointableHandler",
    "Context",
    "Damage",
    "PyTreeMetadata",
    "StatefulCheckpointable",
    "VerificationReport",
    "arrays",
    "checkpointables_metadata",
    "delete",
    "delete_async",
    "errors",
    "handlers",
    "is_orbax_checkpoint",
    "load",
    "load_async",
    "load_checkpointables",
    "load_checkpointables_async",
    "load_pytree",
    "load_pytree_async",
    "metadata",
    "multihost",
    "options",
    "partial",
    "path",
    "pytree_metadata",
    "save",
    "save_async",
    "save_checkpointables",
    "save_checkpointables_async",
    "save_pytree",
    "save_pytree_async",
    "training",
    "tree",
    "verify",
    "verify_async",
]

# Where a name is taken from that is no module itself.
_HOMES = {
    "_api.delete": ["delete", "delete_async"],
    "_api.load": [
        "load",
        "load_async",
        "load_checkpointables",
        "load_checkpointables_async",
        "load_pytree",
        "load_pytree_async",
    ],
    "_api.metadata": [
        "CheckpointMetadata",
        "PyTreeMetadata",
        "checkpointables_metadata",
        "is_orbax_checkpoint",
        "metadata",
        "pytree_metadata",
    ],
    "_api.save": [
        "save",
        "save_async",
        "save_checkpointables",
        "save_checkpointables_async",
        "save_pytree",
        "save_pytree_async",
    ],
    "_layouts.layout": ["Damage"],
    "_api.verify": ["VerificationReport", "verify", "verify_async"],
    "_response": ["AsyncResponse"],
    "context": ["Context"],
    "handlers": [
        "PLACEHOLDER",
        "AbstractCheckpointable",
        "Checkpointable",
        "CheckpointableHandler",
        "StatefulCheckpointable",
    ],
}

# It can't be imported any more when the main thread has ended, and another begins to save.
importlib.import_module("concurrent.futures.thread")


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'orbax_async' has no attribute {name!r}")
    if name in ("Context", "options"):  # a registry that is made begins with built-in handlers
        importlib.import_module("orbax_async.handlers")
    home = next((module for module, names in _HOMES.items() if name in names), name)
    value: Any = importlib.import_module(f"orbax_async.{home}")
    if home != name:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
