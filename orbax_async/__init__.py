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
    from orbax_async._api.public import *

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

_MODULES = frozenset(
    ["arrays", "errors", "handlers", "multihost", "options", "partial", "path", "training", "tree"]
)


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'orbax_async' has no attribute {name!r}")
    if name == "options":  # a registry that is made there begins with the built-in handlers
        importlib.import_module("orbax_async.handlers")
    home = name if name in _MODULES else "_api.public"
    value: Any = importlib.import_module(f"orbax_async.{home}")
    if name not in _MODULES:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
