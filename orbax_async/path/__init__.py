"""Paths as users give them, and the steps of a run.

Does:
  - turn any path-like into one absolute path (`pathlike`);
  - stand for a directory that does not exist yet (`pathlike.PathAwaitingCreation`);
  - name the directories of steps, and find them with one look at their run's (`step`).

Does not:
  - change anything on disk;
  - look inside a step before it is asked what the step says.
"""

from __future__ import annotations

from orbax_async.path import step as step
from orbax_async.path.pathlike import Path as Path
from orbax_async.path.pathlike import PathAwaitingCreation as PathAwaitingCreation
from orbax_async.path.pathlike import PathLike as PathLike

__all__ = ["Path", "PathAwaitingCreation", "PathLike", "step"]
