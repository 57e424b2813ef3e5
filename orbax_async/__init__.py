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
    from orbax_async._api.metadata import CheckpointMetadata as CheckpointMetadata
    from orbax_async._api.metadata import PyTreeMetadata as PyTreeMetadata
    from orbax_async._api.metadata import checkpointables_metadata as checkpointables_metadata
    from orbax_async._api.metadata import is_orbax_checkpoint as is_orbax_checkpoint
    from orbax_async._api.metadata import metadata as metadata
    from orbax_async._api.older_names import load_pytree as load_pytree
    from orbax_async._api.older_names import load_pytree_async as load_pytree_async
    from orbax_async._api.older_names import pytree_metadata as pytree_metadata
    from orbax_async._api.older_names import save_pytree as save_pytree
    from orbax_async._api.older_names import save_pytree_async as save_pytree_async
    from orbax_async._api.save import save as save
    from orbax_async._api.save import save_async as save_async
    from orbax_async._api.save import save_checkpointables as save_checkpointables
    from orbax_async._api.save import save_checkpointables_async as save_checkpointables_async
    from orbax_async._api.verify import Damage as Damage
    from orbax_async._api.verify import VerificationReport as VerificationReport
    from orbax_async._api.verify import verify as verify
    from orbax_async._api.verify import verify_async as verify_async
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

_HOMES = {
    "PLACEHOLDER": "handlers",
    "AbstractCheckpointable": "handlers",
    "AsyncResponse": "_response",
    "CheckpointMetadata": "_api.metadata",
    "Checkpointable": "handlers",
    "CheckpointableHandler": "handlers",
    "Context": "context",
    "Damage": "_api.verify",
    "PyTreeMetadata": "_api.metadata",
    "StatefulCheckpointable": "handlers",
    "VerificationReport": "_api.verify",
    "checkpointables_metadata": "_api.metadata",
    "delete": "_api.delete",
    "delete_async": "_api.delete",
    "is_orbax_checkpoint": "_api.metadata",
    "load": "_api.load",
    "load_async": "_api.load",
    "load_checkpointables": "_api.load",
    "load_checkpointables_async": "_api.load",
    "load_pytree": "_api.older_names",
    "load_pytree_async": "_api.older_names",
    "metadata": "_api.metadata",
    "pytree_metadata": "_api.older_names",
    "save": "_api.save",
    "save_async": "_api.save",
    "save_checkpointables": "_api.save",
    "save_checkpointables_async": "_api.save",
    "save_pytree": "_api.older_names",
    "save_pytree_async": "_api.older_names",
    "verify": "_api.verify",
    "verify_async": "_api.verify",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'orbax_async' has no attribute {name!r}")
    value: Any = importlib.import_module(f"orbax_async.{_HOMES.get(name, name)}")
    if name in _HOMES:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
