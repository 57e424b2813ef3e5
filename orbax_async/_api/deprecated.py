"""The verbs by their older names, which Orbax has deprecated too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from orbax_async._api import load, metadata, save

__all__ = [
    "load_pytree",
    "load_pytree_async",
    "older_method",
    "pytree_metadata",
    "save_pytree",
    "save_pytree_async",
]

P = ParamSpec("P")
T = TypeVar("T")


def _older(newer: Callable[P, T]) -> Callable[P, T]:
    name = newer.__name__

    def function(*args: P.args, **kwargs: P.kwargs) -> T:
        _warn_of_new_name(name)
        return newer(*args, **kwargs)

    function.__doc__ = f"Does what `{name}` does; deprecated."
    return function


save_pytree = _older(save.save)
save_pytree_async = _older(save.save_async)
load_pytree = _older(load.load)
load_pytree_async = _older(load.load_async)
pytree_metadata = _older(metadata.metadata)


def older_method(name: str) -> Callable[..., Any]:
    """Returns a method that does what the one of another name does, and says so."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warn_of_new_name(name)
        return getattr(self, name)(*args, **kwargs)

    method.__doc__ = f"Does what `{name}` does; deprecated."
    return method


def _warn_of_new_name(name: str) -> None:
    warnings.warn(f"Use `{name}` instead.", DeprecationWarning, stacklevel=3)
