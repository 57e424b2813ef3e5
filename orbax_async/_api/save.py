"""Saving a state, or several checkpointables."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import anyio

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._api import layout, perform
from orbax_async._api.turns import Turn
from orbax_async._api.writing import Save, WhenCommitted, check_destination
from orbax_async._engine import loop
from orbax_async._operation import Operation
from orbax_async._response import AsyncResponse
from orbax_async._trace import logger
from orbax_async.handlers import resolve, tiers
from orbax_async.handlers.documents import MetricsHandler
from orbax_async.options import AtomicityMode, CheckpointLayout
from orbax_async.path import PathLike, pathlike

__all__ = [
    "OfRun",
    "carry_out",
    "in_background",
    "json_metadata",
    "save",
    "save_async",
    "save_checkpointables",
    "save_checkpointables_async",
    "start_step",
]


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
    ).result()


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
    return _save(
        path,
        [(checkpointable_name, state)],
        overwrite=overwrite,
        custom_metadata=custom_metadata,
        is_state=True,
    )


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
    ).result()


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
      A response, as of `save_async`. Its first tier ends when all objects are captured.

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
    return _save(
        path,
        checkpointables,
        overwrite=overwrite,
        custom_metadata=custom_metadata,
        is_state=False,
    )


class OfRun(NamedTuple):
    """What the save of a step has besides: its place among the saves of its run.

    Attributes:
      metrics: the step's; None for none.
      begin: called first, and blocks until the save may begin.
      may_write: ends when the saves before it have; it is captured at once, and written then.
      around: awaits the save that it is given, and returns the result of the response. The save
        takes what is to be awaited once it is committed.
    """

    metrics: Any
    begin: Callable[[], None]
    may_write: concurrent.futures.Future[None]
    around: Callable[[Callable[[WhenCommitted], Awaitable[None]]], Awaitable[bool]]


def start_step(
    path: PathLike,
    checkpointables: Any,
    *,
    is_state: bool,
    overwrite: bool,
    custom_metadata: Any,
    of_run: OfRun,
) -> AsyncResponse[bool]:
    """Starts the save of a step, and does not wait until its values are captured.

    Takes and raises what `save_async` does, or `save_checkpointables_async`; a state is given as
    one pair of its name and itself.
    """
    doing = Operation.begin(is_joint=True)
    with doing.processes.telling():
        of_run.begin()
        return _start(
            doing, path, checkpointables, overwrite, custom_metadata, is_state, of_run=of_run
        )


def _pairs(checkpointables: Any) -> list[tuple[Any, Any]]:
    if not isinstance(checkpointables, Mapping) or not checkpointables:
        raise ValueError(
            "`checkpointables` must be a valid dict of checkpointable names to what is to be "
            f"saved, and not empty; got {type(checkpointables).__name__}: {checkpointables!r:.100}"
        )
    return list(checkpointables.items())


def _save(
    path: PathLike,
    checkpointables: Any,
    *,
    overwrite: bool,
    custom_metadata: Any,
    is_state: bool,
) -> AsyncResponse[None]:
    return in_background(
        lambda doing: _start(doing, path, checkpointables, overwrite, custom_metadata, is_state)
    )


def in_background(start: Callable[[Operation], AsyncResponse[None]]) -> AsyncResponse[None]:
    """Begins a joint operation of all processes, and waits until its values are captured.

    Args:
      start: starts it, and raises what can be known to go wrong before.
    """
    doing = Operation.begin(is_joint=True)
    if doing.context.checkpoint_layout is CheckpointLayout.SAFETENSORS:
        raise errors.UnsupportedOptionError(
            "save does not start: context.checkpoint_layout = CheckpointLayout.SAFETENSORS is for "
            "loading alone; leave it at CheckpointLayout.ORBAX, or at AUTO to load both"
        )
    with doing.processes.telling():
        response = start(doing)
    if doing.context.asynchronous.staging == "eager":
        response._wait_let_go()
    doing.recorder.unblock()
    return response


def _start(
    doing: Operation,
    path: PathLike,
    checkpointables: Any,
    overwrite: bool,
    custom_metadata: Any,
    is_state: bool,
    of_run: OfRun | None = None,
) -> AsyncResponse[Any]:
    """Checks what can be checked before any value is captured, and starts the save."""
    options = doing.context
    ambient.refuse_unbuilt(options, operation="save")
    final = pathlike.absolute(path, options.file.path_class)
    named = checkpointables if is_state else _pairs(checkpointables)
    for name, _ in named:
        layout.check_name(name, is_saved=True)
    metadata = json_metadata(custom_metadata)
    parts = []
    with options:
        for name, value in named:
            with tiers.naming(name):
                registry = options.checkpointables.registry
                parts.append(resolve.for_saving(name, value, registry, is_state=is_state))
    if of_run is not None and of_run.metrics is not None:
        with tiers.naming(names.METRICS):
            handler = MetricsHandler()
            parts.append(resolve.Part(names.METRICS, handler, handler.encode(of_run.metrics)))
    # In place, the primary may have begun to write while the others are still on their way here.
    is_in_place = layout.commit_mode(options) is AtomicityMode.COMMIT_FILE
    may_look = doing.processes.is_primary or not is_in_place
    if may_look and not options.file.skip_sync_file_validations:
        check_destination(final, overwrite=overwrite)
    after = None if of_run is None else of_run.may_write
    turn = Turn(final, overwrite=overwrite, after=after)

    def saving(doing: Operation) -> _Body:
        save = Save(doing, final, parts, metadata, overwrite, turn)
        return save.run if of_run is None else _of_run(save, of_run)

    return carry_out(f"save to {final}", doing, saving, turn)


def carry_out(
    label: str, doing: Operation, saving: Callable[[Operation], _Body], turn: Turn
) -> AsyncResponse[Any]:
    """Starts what a save does, under the limits of its options; ends its turn however it ends.

    Args:
      label: what it is, for messages.
      doing: the operation.
      saving: makes what is to be done, under the operation's own limit of memory.
      turn: its turn at the path.
    """
    end_profile = None
    try:
        doing, end_profile = doing.regulated()
        body = saving(doing)
        return perform.start(
            label,
            doing,
            body if end_profile is None else _profiled(body, end_profile),
            timeout_secs=doing.context.asynchronous.timeout_secs,
            when_ended=turn.end,
        )
    except BaseException:
        turn.end()
        if end_profile is not None:
            end_profile()
        raise


_Body = Callable[[perform.Control, AsyncResponse[Any]], Awaitable[Any]]


def _profiled(body: _Body, end_profile: Callable[[], None]) -> _Body:
    """Makes a save end the measurement of its memory, however it ends itself."""

    async def run(control: perform.Control, response: AsyncResponse[Any]) -> Any:
        try:
            return await body(control, response)
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await loop.to_worker(end_profile)
                except Exception:
                    logger.exception("the profiler of RegulatorOptions failed")

    return run


def _of_run(saving: Save, of_run: OfRun) -> _Body:
    async def run(control: perform.Control, response: AsyncResponse[Any]) -> bool:
        return await of_run.around(lambda then: saving.run(control, response, then))

    return run


def json_metadata(custom_metadata: Any) -> dict[str, Any]:
    """Returns a private copy of custom metadata; raises for what JSON can't hold (W27)."""
    if custom_metadata is None:
        return {}
    if not isinstance(custom_metadata, dict):
        raise ValueError(
            f"custom_metadata: Object must be of type <class 'dict'>, got {type(custom_metadata)}."
        )
    for key in custom_metadata:
        if not isinstance(key, str):
            raise ValueError(
                f"custom_metadata: Object must be of type <class 'str'>, got {type(key)}: {key!r}."
            )
    try:
        copied = json.loads(json.dumps(custom_metadata))
    except (TypeError, ValueError) as error:
        raise type(error)(f"custom_metadata: {error}") from None
    assert isinstance(copied, dict)
    return copied
