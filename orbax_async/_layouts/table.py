"""The table of layouts, and the one rule that tells which of them lies in a directory.

A layout that the options name is taken at its word. AUTO takes the first of the table that is
there, and where none is, the first, which then tells what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._layouts.layout import Layout
from orbax_async._layouts.orbax import OrbaxLayout
from orbax_async._layouts.tensors import SafetensorsLayout
from orbax_async._storage.directory import Directory
from orbax_async.options import CheckpointLayout

__all__ = ["TABLE", "find_checkpoint", "layout_of"]

TABLE: Mapping[str, type[Layout]] = {"orbax": OrbaxLayout, "safetensors": SafetensorsLayout}
"""Each under the name by which `context.checkpoint_layout` asks for it."""


def layout_of(directory: Directory, options: ambient.Context) -> Layout:
    """Returns the layout under which a directory is read, whatever lies there; blocks."""
    asked = options.checkpoint_layout
    if asked is not CheckpointLayout.AUTO:
        return TABLE[asked.value](directory, options)
    first, *others = (layout(directory, options) for layout in TABLE.values())
    return next((layout for layout in (first, *others) if layout.is_there), first)


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
    name = next(name for name, each in TABLE.items() if each is type(layout))
    others = {each: TABLE[each](directory, options) for each in TABLE if each != name}
    if options.checkpoint_layout is CheckpointLayout.AUTO:
        missing = [f"there are no {each.what}; " for each in others.values() if not each.is_there]
        raise errors.InvalidLayoutError(
            f"Could not auto-detect the layout of the checkpoint at {directory.path}: "
            f"{''.join(missing)}and as an {name.capitalize()} checkpoint: {problem}"
        )
    for other, found in others.items():
        if found.is_there:
            problem += f" It holds {found.what}: set context.checkpoint_layout = {other!r}."
    raise errors.InvalidLayoutError(
        f"Could not recognize the checkpoint at {directory.path} as a valid {name.capitalize()} "
        f"checkpoint: {problem}"
    )
