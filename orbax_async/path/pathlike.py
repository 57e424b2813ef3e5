"""Path-likes, and a path to a directory that is still to be made."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from etils import epath

__all__ = ["Path", "PathAwaitingCreation", "PathLike", "absolute"]

Path = epath.Path
PathLike: TypeAlias = str | os.PathLike[str]


@runtime_checkable
class PathAwaitingCreation(Protocol):
    """A directory that a handler will write to, and that may not exist yet.

    Handlers get one in the first phase of a save. `path` is where the directory will be;
    `directory / "name"` is the same promise for an entry below it; `await
    directory.await_creation()` waits until the directory is there and returns its path.
    """

    @property
    def path(self) -> epath.Path:
        """Where the directory will be."""
        ...

    def __truediv__(self, other: PathLike) -> PathAwaitingCreation:
        """Returns the entry `other` below this directory; its parents are not created for it."""
        ...

    async def await_creation(self) -> epath.Path:
        """Waits until the directory that the engine creates exists."""
        ...


def absolute(path: Any, path_class: Callable[..., Any] = epath.Path) -> str:
    """Returns any local path as one absolute string.

    Accepts `str`, `pathlib` and `epath` paths, relative or with `~`, and `file://` URLs.

    Args:
      path: the path.
      path_class: makes a path of it first, where it is not the usual class.

    Raises:
      TypeError: it is no path.
      ValueError: it is empty, or names storage that is not a local file system.
    """
    if path_class is not epath.Path:
        path = path_class(path)
    if isinstance(path, bytes) or not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"a checkpoint path must be a str or a path object, got {type(path).__name__}: {path!r}"
        )
    text = os.fspath(path)
    if not text:
        raise ValueError("the checkpoint path is empty; give the directory to use")
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    scheme, separator, _ = text.partition("://")
    if separator and scheme.isalnum():
        raise ValueError(
            f"{text}: only local file systems are supported by this version, not {scheme}://"
        )
    return os.path.abspath(pathlib.Path(text).expanduser())
