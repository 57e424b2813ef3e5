"""The asyncio-native checkpoint engine for JAX: Orbax v1's API and format, with a new inside.

import orbax_async as ocp

response = ocp.save_async("/checkpoints/7", state)   # returns once every value is captured
await response                                       # or response.result()
state = ocp.load("/checkpoints/7", abstract_state)
"""

from __future__ import annotations

from orbax_async import arrays as arrays
from orbax_async import errors as errors
from orbax_async import handlers as handlers
from orbax_async import multihost as multihost
from orbax_async import options as options
from orbax_async import path as path
from orbax_async import tree as tree
from orbax_async._api.layout import is_orbax_checkpoint as is_orbax_checkpoint
from orbax_async._api.load import load as load
from orbax_async._api.load import load_async as load_async
from orbax_async._api.metadata import CheckpointMetadata as CheckpointMetadata
from orbax_async._api.metadata import PyTreeMetadata as PyTreeMetadata
from orbax_async._api.metadata import metadata as metadata
from orbax_async._api.response import AsyncResponse as AsyncResponse
from orbax_async._api.save import save as save
from orbax_async._api.save import save_async as save_async
from orbax_async.context import Context as Context
from orbax_async.handlers import PLACEHOLDER as PLACEHOLDER
from orbax_async.handlers import CheckpointableHandler as CheckpointableHandler

__all__ = [
    "PLACEHOLDER",
    "AsyncResponse",
    "CheckpointMetadata",
    "CheckpointableHandler",
    "Context",
    "PyTreeMetadata",
    "arrays",
    "errors",
    "handlers",
    "is_orbax_checkpoint",
    "load",
    "load_async",
    "metadata",
    "multihost",
    "options",
    "path",
    "save",
    "save_async",
    "tree",
]
