"""Which directory a path or a URL means."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator

from orbax_async._storage.directory import Directory
from orbax_async._storage.local import LocalDirectory

__all__ = ["open_directory", "opened_by"]

_opener: contextvars.ContextVar[Callable[[str], Directory]] = contextvars.ContextVar(
    "orbax_async.opener", default=LocalDirectory
)


def open_directory(path: str | os.PathLike[str]) -> Directory:
    """Returns the directory that a path means; it need not be there."""
    text = os.fspath(path)
    # To ask for the working directory blocks, and may fail.
    return _opener.get()(text if os.path.isabs(text) else os.path.abspath(text))


@contextlib.contextmanager
def opened_by(opener: Callable[[str], Directory]) -> Iterator[None]:
    """Has another function open directories, for operations that begin inside the block.

    This is how tests count, delay and fail what an operation asks of its storage.
    """
    token = _opener.set(opener)
    try:
        yield
    finally:
        _opener.reset(token)
