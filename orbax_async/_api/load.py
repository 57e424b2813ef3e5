"""Loading a state."""

from __future__ import annotations

import os
from typing import Any

from orbax_async import context as ambient
from orbax_async._api import layout, perform
from orbax_async._api.metadata import CheckpointMetadata
from orbax_async._api.response import AsyncResponse
from orbax_async._storage import names
from orbax_async.handlers import resolve
from orbax_async.handlers.operation import Operation
from orbax_async.path import Path, PathLike, pathlike

__all__ = ["load", "load_async"]


def load(
    path: PathLike,
    abstract_state: Any | None = None,
    *,
    checkpointable_name: str | None = names.AUTO_CHECKPOINTABLE,
) -> Any:
    """Loads a state and returns it.

    Takes and raises what `load_async` does.

    Example:
      ::

        state = ocp.load("/checkpoints/7", jax.eval_shape(init, key))
    """
    return load_async(path, abstract_state, checkpointable_name=checkpointable_name).result()


def load_async(
    path: PathLike,
    abstract_state: Any | None = None,
    *,
    checkpointable_name: str | None = names.AUTO_CHECKPOINTABLE,
) -> AsyncResponse[Any]:
    """Loads a state in the background; an ordinary function whose result can be awaited.

    Example:
      ::

        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
        )
        state = await ocp.load_async("/checkpoints/7", abstract)

    Args:
      path: the checkpoint.
      abstract_state: what to load: a tree with the containers wanted back, whose leaves say what
        each leaf becomes. `jax.ShapeDtypeStruct` or an array gives shape, dtype (values are cast)
        and sharding (values are resharded; the saved sharding where none is given); `np.ndarray`
        values and types give NumPy; Python types give scalars; None and `...` skip the leaf. What
        `metadata` returns is accepted. Without it, everything is loaded as it was saved, into
        plain dicts and lists, on one device where the devices that saved it are not here.
      checkpointable_name: which pytree of the checkpoint; `AUTO` takes `state` or the first, None
        a flat checkpoint of older Orbax versions.

    Returns:
      A response whose result is the state.

    Raises:
      AbstractLeafError: the abstract tree holds what nothing can be loaded as.
      InvalidLayoutError: (when awaited, as all below) there is no such checkpoint.
      TreeMismatchError: the trees differ; every difference is listed.
      ShapeMismatchError: a leaf has another shape.
      DtypeMismatchError: a leaf can't be had in that dtype without losing values.
      CorruptDataError: stored bytes do not match their checksum.
      ReadError: a leaf can't be read.
    """
    doing = Operation.begin()
    ambient.refuse_unbuilt(doing.context, operation="load")
    where = pathlike.absolute(path, doing.context.file.path_class)
    layout.check_name(checkpointable_name, is_saved=False)
    if isinstance(abstract_state, CheckpointMetadata):
        abstract_state = abstract_state.metadata
    with doing.context:
        handler = resolve.pytree_handler(checkpointable_name, doing.context)
    abstract = handler.read_abstract(abstract_state)

    async def body(control: perform.Control, response: AsyncResponse[Any]) -> Any:
        async def read() -> Any:
            located = await layout.locate_when_settled(where, checkpointable_name)
            loading = await handler.load(Path(os.fspath(located.directory)), abstract)
            response._set_staged()
            return await loading

        return await layout.read_whole(where, read)

    response = perform.start(f"load from {where}", doing, body)
    doing.recorder.unblock()
    return response
