"""The verbs by their older names, which Orbax has deprecated too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from orbax_async._api import load, metadata, save
from orbax_async._api.metadata import CheckpointMetadata, PyTreeMetadata
from orbax_async._response import AsyncResponse

__all__ = [
    "load_pytree",
    "load_pytree_async",
    "older_method",
    "pytree_metadata",
    "save_pytree",
    "save_pytree_async",
]


def save_pytree(*args: Any, **kwargs: Any) -> None:
    """Does what `save` does; deprecated."""
    _warn_of_new_name("save")
    save.save(*args, **kwargs)


def save_pytree_async(*args: Any, **kwargs: Any) -> AsyncResponse[None]:
    """Does what `save_async` does; deprecated."""
    _warn_of_new_name("save_async")
    return save.save_async(*args, **kwargs)


def load_pytree(*args: Any, **kwargs: Any) -> Any:
    """Does what `load` does; deprecated."""
    _warn_of_new_name("load")
    return load.load(*args, **kwargs)


def load_pytree_async(*args: Any, **kwargs: Any) -> AsyncResponse[Any]:
    """Does what `load_async` does; deprecated."""
    _warn_of_new_name("load_async")
    return load.load_async(*args, **kwargs)


def pytree_metadata(*args: Any, **kwargs: Any) -> CheckpointMetadata[PyTreeMetadata]:
    """Does what `metadata` does; deprecated."""
    _warn_of_new_name("metadata")
    return metadata.metadata(*args, **kwargs)


def older_method(name: str) -> Callable[..., Any]:
    """Returns a method that does what the one of another name does, and says so."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warn_of_new_name(name)
        return getattr(self, name)(*args, **kwargs)

    method.__doc__ = f"Does what `{name}` does; deprecated."
    return method


def _warn_of_new_name(name: str) -> None:
    warnings.warn(f"Use `{name}` instead.", DeprecationWarning, stacklevel=3)
