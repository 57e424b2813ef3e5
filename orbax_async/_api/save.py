"""Saving a state."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import threading
import time
from typing import Any, ClassVar

import anyio

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._api import layout, perform
from orbax_async._api.response import AsyncResponse
from orbax_async._commit import atomicity, finalize
from orbax_async._engine import loop
from orbax_async._storage import files, names
from orbax_async._trace import logger
from orbax_async.handlers import resolve
from orbax_async.handlers.forms import PreparedTree
from orbax_async.handlers.operation import Operation
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.path import Path, PathLike, pathlike

__all__ = ["save", "save_async"]

_SYNCS_AT_ONCE = 4
_SWEEP_GRACE_SECS = 1.0


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
    doing = Operation.begin(is_joint=True)
    with doing.processes.telling():
        response = _start(doing, path, state, checkpointable_name, overwrite, custom_metadata)
    if doing.context.asynchronous.staging == "eager":
        response.wait_staged()
    doing.recorder.unblock()
    return response


def _start(
    doing: Operation,
    path: PathLike,
    state: Any,
    checkpointable_name: str,
    overwrite: bool,
    custom_metadata: Any,
) -> AsyncResponse[None]:
    """Checks what can be checked before any value is captured, and starts the save."""
    ambient.refuse_unbuilt(doing.context, operation="save")
    final = pathlike.absolute(path, doing.context.file.path_class)
    layout.check_name(checkpointable_name, is_saved=True)
    metadata = _json_metadata(custom_metadata)
    options = doing.context
    with options:
        handler = resolve.pytree_handler(checkpointable_name, options)
        prepared = handler.flatten(state)
    if not options.file.skip_sync_file_validations:
        _check_destination(final, overwrite=overwrite)
    turn = _Turn(final, overwrite=overwrite)
    saving = _Save(doing, final, checkpointable_name, handler, prepared, metadata, overwrite, turn)
    try:
        return perform.start(
            f"save to {final}",
            doing,
            saving.run,
            timeout_secs=options.asynchronous.timeout_secs,
            when_ended=turn.end,
        )
    except BaseException:
        turn.end()
        raise


def _json_metadata(custom_metadata: Any) -> dict[str, Any]:
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


def _check_destination(final: str, *, overwrite: bool) -> None:
    """Raises what can be known to go wrong before any value is captured."""
    atomicity.recover(final)
    if os.path.lexists(final):
        if not overwrite:
            raise errors.DestinationExistsError(
                f"Destination {final} already exists. Save elsewhere, or with overwrite=True."
            )
        is_empty = os.path.isdir(final) and not any(True for _ in files.scan(final))
        if os.path.islink(final) or not (is_empty or layout.is_orbax_checkpoint(final)):
            raise errors.DestinationExistsError(
                f"Destination {final} already exists and is no checkpoint: overwrite=True replaces "
                "checkpoints only. Remove it yourself, or save elsewhere."
            )
    parent = os.path.dirname(final)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise errors.CommitError(
            f"cannot create {final}: {parent} is a file, not a directory. Check the path."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise errors.CommitError(
            f"cannot create {final}: the directory {parent} is not writable. Change its "
            "permissions, or save elsewhere."
        )


class _Turn:
    """A save's place among the saves of this process to one path (W7)."""

    _lock = threading.Lock()
    _last: ClassVar[dict[str, _Turn]] = {}

    def __init__(self, final: str, *, overwrite: bool) -> None:
        self._final = final
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended.set_running_or_notify_cancel()
        with self._lock:
            before = self._last.get(final)
            if before is not None and not overwrite:
                raise errors.SaveInProgressError(
                    f"another save to {final} is under way; wait for its response, or save with "
                    "overwrite=True to follow it"
                )
            self._before = before
            self._last[final] = self

    async def come(self) -> None:
        """Waits until the save before this one has ended, well or not."""
        if self._before is not None:
            await asyncio.wrap_future(self._before._ended)
            self._before = None

    def end(self) -> None:
        """Lets the next save go on; if this one's turn never came, after the one before it."""
        before, self._before = self._before, None
        if before is None:
            self._leave()
        else:
            before._ended.add_done_callback(lambda _: self._leave())

    def _leave(self) -> None:
        with self._lock:
            if self._last.get(self._final) is self:
                del self._last[self._final]
        if not self._ended.done():
            self._ended.set_result(None)


if hasattr(os, "register_at_fork"):  # the saves of the parent are not the child's
    os.register_at_fork(after_in_child=_Turn._last.clear)


class _Awaited:
    """A directory that handlers may write to once it is there."""

    def __init__(self, path: Path, created: anyio.Event) -> None:
        self._path = path
        self._created = created

    @property
    def path(self) -> Path:
        return self._path

    def __truediv__(self, other: Any) -> _Awaited:
        if not isinstance(other, (str, os.PathLike)):
            raise TypeError(f"Expected PathLike, got {type(other)}.")
        return _Awaited(self._path / other, self._created)

    async def await_creation(self) -> Path:
        await self._created.wait()
        return self._path


class _Save:
    """One save: from the first value captured to the last name synced."""

    def __init__(
        self,
        doing: Operation,
        final: str,
        name: str,
        handler: PyTreeHandler,
        prepared: PreparedTree,
        custom_metadata: dict[str, Any],
        overwrite: bool,
        turn: _Turn,
    ) -> None:
        self._doing = doing
        self._options = doing.context
        self._final = final
        self._name = name
        self._handler = handler
        self._prepared: PreparedTree | None = prepared
        self._custom_metadata = custom_metadata
        self._overwrite = overwrite
        self._turn = turn
        self._init_nsecs = time.time_ns()
        self._made_parents: list[str] = []
        self._temporary = ""

    async def run(self, control: perform.Control, response: AsyncResponse[None]) -> None:
        """The whole operation; leaves nothing behind unless it commits."""
        processes = self._doing.processes
        try:
            async with processes.together():
                await self._agree_on_paths()
                await self._write(response)
                await self._commit(control)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await loop.to_worker(self._undo)
            raise
        callback = self._options.asynchronous.post_finalization_callback
        if callback is not None:
            await loop.to_worker(callback)

    async def _agree_on_paths(self) -> None:
        processes = self._doing.processes
        own = [self._final, await loop.to_worker(atomicity.temporary_path, self._final)]
        final, self._temporary = json.loads(await processes.broadcast("paths", json.dumps(own)))
        if final != self._final:
            raise errors.MultihostError(
                f"Directory path mismatch in multi-process save: {final} on process "
                f"{processes.primary}, {self._final} on process {processes.index}"
            )

    async def _write(self, response: AsyncResponse[None]) -> None:
        created = anyio.Event()
        directory = _Awaited(Path(self._temporary), created) / self._name
        if not self._options.asynchronous.create_directories_asynchronously:
            await self._create(created)
        async with anyio.create_task_group() as group:
            if not created.is_set():
                group.start_soon(self._create, created)
            prepared, self._prepared = self._prepared, None
            writing = await self._handler.save(directory, prepared)
            del prepared  # the pieces are captured: nothing here keeps the caller's arrays alive
            response._set_staged()
            await writing

    async def _create(self, created: anyio.Event) -> None:
        await self._turn.come()
        processes = self._doing.processes
        if processes.is_primary:
            with self._doing.recorder.span("create"):
                await loop.to_worker(self._create_directories)
        await processes.broadcast("directory created")
        created.set()

    def _create_directories(self) -> None:
        mode = self._options.file.path_permission_mode
        self._made_parents = atomicity.create(self._temporary, [self._name], mode=mode)

    async def _commit(self, control: perform.Control) -> None:
        """Steps 2 to 5 of `_commit.finalize`; the primary takes them once nobody can back out."""
        processes, recorder = self._doing.processes, self._doing.recorder
        if not processes.is_primary:
            control.pass_commit_point()
            await processes.gather("ready to commit")
            await processes.broadcast("committed")
            return
        await self._make_durable()
        await processes.gather("ready to commit")
        control.pass_commit_point()
        processes.decide()
        with anyio.CancelScope(shield=True), recorder.span("publish"):
            replaced = await loop.to_worker(self._publish)
            await processes.broadcast("committed")
            if replaced is not None:
                await loop.to_worker(_remove_replaced, replaced)
        loop.spawn(self._sweep, label="sweep", exit_grace_secs=_SWEEP_GRACE_SECS, is_told_of=False)

    async def _make_durable(self) -> None:
        with self._doing.recorder.span("documents"):
            await loop.to_worker(self._write_documents)
        with self._doing.recorder.span("sync"):
            paths, directories = await loop.to_worker(files.walk, self._temporary)
            share = max(1, -(-len(paths) // _SYNCS_AT_ONCE))
            async with anyio.create_task_group() as group:
                for start in range(0, len(paths), share):
                    group.start_soon(
                        loop.to_worker,
                        finalize.sync_files,
                        paths[start : start + share],
                        self._final,
                    )
            await loop.to_worker(finalize.sync_directories, directories, self._final)

    def _write_documents(self) -> None:
        finalize.write_root_documents(
            self._temporary,
            self._final,
            {self._name: names.PYTREE_TYPESTR},
            init_nsecs=self._init_nsecs,
            custom_metadata=self._custom_metadata,
        )

    def _publish(self) -> str | None:
        parents = [os.path.dirname(made) for made in reversed(self._made_parents)]
        finalize.sync_directories(parents, self._final)
        if self._overwrite:  # what is there now may have come after the first look, or without one
            _check_destination(self._final, overwrite=True)
        return atomicity.publish(self._temporary, self._final, overwrite=self._overwrite)

    def _undo(self) -> None:
        """Removes what was written, and parents that were made for it."""
        if not self._temporary or not self._doing.processes.is_primary:
            return
        try:
            atomicity.discard(self._temporary)
        except OSError as error:
            logger.warning("%s could not be removed: %s", self._temporary, error)
        atomicity.remove_empty(self._made_parents)

    async def _sweep(self) -> None:
        try:
            swept = await loop.to_worker(atomicity.sweep, os.path.dirname(self._final))
        except OSError as error:
            logger.warning("leftovers beside %s could not be swept: %s", self._final, error)
        else:
            for path in swept:
                logger.info("removed %s, left by a process that has died", path)


def _remove_replaced(path: str) -> None:
    try:
        atomicity.discard(path)
    except OSError as error:
        logger.warning("the replaced checkpoint %s could not be removed: %s", path, error)
