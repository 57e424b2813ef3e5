"""Choosing the handler of a checkpointable."""

from __future__ import annotations

from typing import Any

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async.handlers.pytree import PyTreeHandler

__all__ = ["pytree_handler"]


def pytree_handler(name: str | None, options: ambient.Context) -> PyTreeHandler:
    """Returns the handler of a state: the one that the registry binds to its name, or a new one.

    Raises:
      UnsupportedOptionError: the registry binds the name to a handler of something else.
    """
    registry = options.checkpointables.registry
    if name is None or not registry.has(name):
        return PyTreeHandler()
    bound: Any = registry.get(name)
    handler = bound() if isinstance(bound, type) else bound
    if isinstance(handler, PyTreeHandler):
        return handler
    raise errors.UnsupportedOptionError(
        f"checkpointables.registry binds {name!r} to {type(handler).__name__}, and states are "
        "saved and loaded by a PyTreeHandler; use another name"
    )
