"""The table of layouts, and the one rule that tells which of them lies in a directory.

A layout that the options name is taken at its word. AUTO takes the first of the table that is
there, and where none is, the first, which then tells what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._layouts.orbax import OrbaxLayout
from orbax_async._layouts.protocol import Layout
from orbax_async._layouts.safetensors import SafetensorsLayout
from orbax_async._storage.directory import Directory
from orbax_async.options import CheckpointLayout

__all__ = ["TABLE", "find_checkpoint", "layout_of"]

TABLE: Sequence[type[Layout]] = (OrbaxLayout, SafetensorsLayout)


def layout_of(directory: Directory, options: ambient.Context) -> Layout:
    """Returns the layout under which a directory is read, whatever lies there; blocks."""
    found = [layout(directory, options) for layout in TABLE]
    asked = options.checkpoint_layout
    if asked is CheckpointLayout.AUTO:
        return next((layout for layout in found if layout.is_there), found[0])
    return next(layout for layout in found if layout.name == asked.value)


def find_checkpoint(
    directory: Directory, options: ambient.Context, *, may_be_damaged: bool = False
) -> Layout:
    """Returns the layout of the checkpoint that lies in a directory; blocks.

    Args:
      directory: where to look.
      options: those of the operation.
      may_be_damaged: whether one counts that can't be loaded.

    Raises:
      InvalidLayoutError: there is no checkpoint.
    """
    layout = layout_of(directory, options)
    problem = layout.problem()
    if problem is None or (may_be_damaged and layout.is_damaged):
        return layout
    others = [other(directory, options) for other in TABLE if other is not type(layout)]
    kind = layout.name.capitalize()
    if options.checkpoint_layout is CheckpointLayout.AUTO:
        missing = "".join(f"there are no {other.what}; " for other in others if not other.is_there)
        raise errors.InvalidLayoutError(
            f"Could not auto-detect the layout of the checkpoint at {directory.path}: {missing}"
            f"and as an {kind} checkpoint: {problem}"
        )
    for other in others:
        if other.is_there:
            problem += f" It holds {other.what}: set context.checkpoint_layout = {other.name!r}."
    raise errors.InvalidLayoutError(
        f"Could not recognize the checkpoint at {directory.path} as a valid {kind} checkpoint: "
        f"{problem}"
    )
