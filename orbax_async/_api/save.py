"""Saving a state, or several checkpointables."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit.sequence import Destination, Save
from orbax_async._layouts.orbax import OrbaxLayout, check_name, writes_in_place
from orbax_async._operation import Operation, older, starting
from orbax_async._response import AsyncResponse
from orbax_async._storage.local import open_directory
from orbax_async.handlers import phases
from orbax_async.handlers.documents import MetricsHandler
from orbax_async.path import PathAwaitingCreation, PathLike, pathlike


def save(
    path: PathLike,
    state: Any,
    *,
    checkpointable_name: str = names.DEFAULT_CHECKPOINTABLE,
    overwrite: bool = False,
    custom_metadata: Any | None = None,
) -> None:
    """Saves a state and returns once it is durable and visible.

    Takes and raises what `save_async` does.

    Example:
      ::

        ocp.save("/checkpoints/7", {"params": params, "step": 7})
    """
    save_async(
        path,
        state,
        checkpointable_name=checkpointable_name,
        overwrite=overwrite,
        custom_metadata=custom_metadata,
    )._finish()


def save_async(
    path: PathLike,
    state: Any,
    *,
    checkpointable_name: str = names.DEFAULT_CHECKPOINTABLE,
    overwrite: bool = False,
    custom_metadata: Any | None = None,
) -> AsyncResponse[None]:
    """Saves a state in the background; an ordinary function whose result can be awaited.

    It returns once every value is captured, so that the caller may go on to mutate, donate or
    delete its inputs. With `asynchronous.staging = 'lazy'` it returns at once, and the caller
    leaves its inputs alone until `response.staged()`.

    Example:
      ::

        response = ocp.save_async("/checkpoints/7", state)
        state = train_step(state)     # may donate the old state
        await response                # or response.result()

    Args:
      path: the directory to create; its parents are created too.
      state: a pytree of arrays, scalars and strings, or one of them.
      checkpointable_name: the name of the state inside the checkpoint.
      overwrite: whether to replace a checkpoint at `path`. The old one stays visible and whole
        until the new one takes its place. A save to a path to which another is under way waits
        for it.
      custom_metadata: a dict of JSON values, returned by `metadata`.

    Returns:
      A response; cancelling it removes what was written, until the checkpoint is committed.

    Raises:
      DestinationExistsError: there is something at `path`, and `overwrite` is not set, or it is no
        checkpoint.
      SaveInProgressError: another save to `path` is under way, and `overwrite` is not set.
      UnsupportedLeafError: the state holds what can't be stored; all such leaves are named.
      DuplicateLeafError: two leaves would be stored under one name.
      StagingError: a value could not be captured.
      UnsupportedOptionError: an option asks for what this version does not do.
      CommitError: the directory can't be created (when `response` is awaited).
    """
    request = SaveRequest(
        path=path,
        checkpointables=[(checkpointable_name, state)],
        is_state=True,
        overwrite=overwrite,
        custom_metadata=custom_metadata,
    )
    return _start(request)


def save_checkpointables(
    path: PathLike,
    checkpointables: dict[str, Any],
    *,
    overwrite: bool = False,
    custom_metadata: Any | None = None,
) -> None:
    """Saves several objects into one checkpoint, and returns once that is durable and visible.

    Takes and raises what `save_checkpointables_async` does.

    Example:
      ::

        ocp.save_checkpointables("/checkpoints/7", {"state": state, "data": iterator})
    """
    save_checkpointables_async(
        path, checkpointables, overwrite=overwrite, custom_metadata=custom_metadata
    )._finish()


def save_checkpointables_async(
    path: PathLike,
    checkpointables: dict[str, Any],
    *,
    overwrite: bool = False,
    custom_metadata: Any | None = None,
) -> AsyncResponse[None]:
    """Saves several objects into one checkpoint in the background.

    Each is saved by a handler of its own: pytrees, JSON values, protobuf messages, objects that
    save themselves (Grain's iterators), and whatever a handler is registered for. They are captured
    and written concurrently, under the memory limits of one save, and become visible together.

    Example:
      ::

        response = ocp.save_checkpointables_async(
            "/checkpoints/7", {"state": state, "data": iterator, "config": config}
        )

    Args:
      path: the directory to create; its parents are created too.
      checkpointables: the objects by name.
      overwrite: as for `save_async`.
      custom_metadata: as for `save_async`.

    Returns:
      A response, as of `save_async`. It is staged when all objects are captured.

    Raises:
      ValueError: `checkpointables` is no dict, is empty, or has a name that can't be one.
      NoEntryError: no registered handler takes one of the objects.
      HandlerError: a handler can't be made, or does not keep to its protocol.
      NotJsonError: a value bound to a `JsonHandler` is not JSON.
      UnsupportedLeafError: a pytree holds what can't be stored.
      Exception: what a handler raises. A note on it, and on all of the above, names the
        checkpointable; nothing of any is left on disk.
      DestinationExistsError, SaveInProgressError, CommitError: as for `save_async`.
    """
    request = SaveRequest(
        path=path,
        checkpointables=checkpointables,
        is_state=False,
        overwrite=overwrite,
        custom_metadata=custom_metadata,
    )
    return _start(request)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """What is asked of a save, by a verb or by a Checkpointer."""

    path: PathLike
    checkpointables: Any  # by name; for a state one pair of its name and itself
    is_state: bool
    overwrite: bool
    custom_metadata: Any
    metrics: Any = None  # of a step
    may_write: concurrent.futures.Future[None] | None = None  # done once it may, after the capture


def _start(request: SaveRequest) -> AsyncResponse[None]:
    with starting("save") as operation:
        save = prepare(operation, request)
        return operation.start(f"save to {save.final}", save.run)


def prepare(operation: Operation, request: SaveRequest) -> Save:
    """Checks what can be checked before any value is captured, and queues for the path."""
    options, overwrite = operation.context, request.overwrite
    final = pathlike.absolute(request.path, options.file.path_class)
    named = request.checkpointables
    if not request.is_state:
        named = _pairs(named)
    for name, _ in named:
        check_name(name, is_saved=True)
    metadata = json_metadata(request.custom_metadata)
    parts = []
    for name, value in named:
        with phases.naming(name):
            registry = options.checkpointables.registry
            parts.append(phases.for_saving(name, value, registry, is_state=request.is_state))
    if request.metrics is not None:
        with phases.naming(names.METRICS):
            handler = MetricsHandler()
            parts.append(phases.Part(names.METRICS, handler, handler.encode(request.metrics)))
    destination = Destination(
        open_directory(final),
        overwrite=overwrite,
        is_in_place=writes_in_place(options),
        is_replaceable=lambda path: OrbaxLayout(open_directory(path), options).may_be_replaced(),
    )
    # In place, the primary may have begun to write while the others are still on their way here.
    may_look = operation.processes.is_primary or not destination.is_in_place
    if may_look and not options.file.skip_sync_file_validations:
        destination.check()
    lock = operation.lock_path(final, overwrite=overwrite, after=request.may_write)
    return Save(
        operation=operation,
        final=final,
        commit=destination.commit(may_look=may_look and lock.is_first),
        handlers={str(part.name): part.typestr for part in parts},
        write=writing(operation, parts),
        custom_metadata=metadata,
    )


def writing(
    operation: Operation, parts: list[phases.Part]
) -> Callable[[PathAwaitingCreation], Awaitable[None]]:
    """Returns what has the handlers of all parts capture, and then write, below a directory."""

    def first(part: phases.Part, directory: PathAwaitingCreation) -> phases.Phase:
        name = str(part.name)
        return phases.Phase(
            name, lambda: part.handler.save(directory / name, part.value), part.code("save")
        )

    async def write(directory: PathAwaitingCreation) -> None:
        operation.expect([str(part.name) for part in parts])
        seconds = await phases.first(
            [first(part, directory) for part in parts], when_done=operation.release_caller
        )
        parts.clear()  # all is captured: nothing here keeps the caller's objects alive
        await phases.second(seconds)

    return write


def _pairs(checkpointables: Any) -> list[tuple[Any, Any]]:
    if not isinstance(checkpointables, Mapping) or not checkpointables:
        raise ValueError(
            "`checkpointables` must be a valid dict of checkpointable names to what is to be "
            f"saved, and not empty; got {type(checkpointables).__name__}: {checkpointables!r:.100}"
        )
    return list(checkpointables.items())


def json_metadata(custom_metadata: Any) -> dict[str, Any]:
    """Returns a private copy of custom metadata, which must be a dict of JSON values."""
    if custom_metadata is None:
        return {}
    if not isinstance(custom_metadata, dict):
        raise errors.NotJsonError(
            f"custom_metadata: Object must be of type <class 'dict'>, got {type(custom_metadata)}."
        )
    for key in custom_metadata:
        if not isinstance(key, str):
            raise errors.NotJsonError(
                f"custom_metadata: Object must be of type <class 'str'>, got {type(key)}: {key!r}."
            )
    try:
        return dict(json.loads(json.dumps(custom_metadata)))
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.NotJsonError(f"custom_metadata: {error}") from None


# Older names, which Orbax has deprecated too.

save_pytree = older(save)
save_pytree_async = older(save_async)
