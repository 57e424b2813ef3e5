"""The table of layouts, and the one rule that tells which of them lies in a directory.

A layout that the options name is taken at its word. AUTO takes the first of the table that holds
what lies there. Where none does, the first tells what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._layouts.orbax import OrbaxLayout
from orbax_async._layouts.protocol import Checkpoint, Layout, StoredTree
from orbax_async._layouts.safetensors import SafetensorsLayout
from orbax_async._storage.directory import Directory
from orbax_async.options import CheckpointLayout

__all__ = ["TABLE", "layout_of", "open_checkpoint", "open_tree"]

TABLE: Sequence[Layout] = (OrbaxLayout(), SafetensorsLayout())


def layout_of(directory: Directory, options: ambient.Context) -> Layout:
    """Returns the layout under which a checkpoint, or a tree of one, is read."""
    asked = options.checkpoint_layout
    if asked is CheckpointLayout.AUTO:
        return next((layout for layout in TABLE if layout.holds(directory)), TABLE[0])
    return next(layout for layout in TABLE if layout.name == asked.value)


def open_checkpoint(
    directory: Directory, options: ambient.Context, *, may_be_damaged: bool = False
) -> Checkpoint:
    """Finds the checkpoint that lies in a directory; blocks.

    Args:
      directory: where to look.
      options: of the operation.
      may_be_damaged: whether one counts that can't be loaded.

    Raises:
      InvalidLayoutError: there is none.
    """
    layout = layout_of(directory, options)
    found = layout.find(directory, options, may_be_damaged=may_be_damaged)
    if isinstance(found, Checkpoint):
        return found
    kind = layout.name.capitalize()
    others = [other for other in TABLE if other is not layout]
    if options.checkpoint_layout is CheckpointLayout.AUTO:
        missing = "".join(f"it holds no {other.what}; " for other in others)
        raise errors.InvalidLayoutError(
            f"Could not auto-detect the layout of the checkpoint at {directory.path}: {missing}"
            f"and as an {kind} checkpoint: {found}"
        )
    for other in others:
        if other.holds(directory):
            found += f" It holds {other.what}: set context.checkpoint_layout = {other.name!r}."
    raise errors.InvalidLayoutError(
        f"Could not recognize the checkpoint at {directory.path} as a valid {kind} checkpoint: "
        f"{found}"
    )


def open_tree(
    directory: Directory, options: ambient.Context, *, is_for_jax: bool = False
) -> StoredTree:
    """Opens the stored tree that lies in a directory; blocks.

    Raises:
      InvalidLayoutError: there is none, or it is damaged.
    """
    return layout_of(directory, options).open_tree(directory, options, is_for_jax=is_for_jax)
