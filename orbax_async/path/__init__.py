"""Paths as users give them.

Does:
  - turn any path-like into one absolute path (`pathlike`);
  - stand for a directory that does not exist yet (`pathlike.PathAwaitingCreation`).

Does not:
  - touch the file system beyond expanding `~` and the working directory.
"""

from __future__ import annotations

from orbax_async.path.pathlike import Path as Path
from orbax_async.path.pathlike import PathAwaitingCreation as PathAwaitingCreation
from orbax_async.path.pathlike import PathLike as PathLike

__all__ = ["Path", "PathAwaitingCreation", "PathLike"]
