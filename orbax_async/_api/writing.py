"""Carrying a save out: its directory, both tiers of its handlers, and its commit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from orbax_async import errors
from orbax_async._api import layout
from orbax_async._commit import atomicity, finalize
from orbax_async._commit.places import Beside, InPlace, Place
from orbax_async._engine import loop
from orbax_async._operation import Operation, PathLock
from orbax_async._storage import files
from orbax_async._trace import logger
from orbax_async.handlers import tiers
from orbax_async.handlers.resolve import Part
from orbax_async.options import AtomicityMode
from orbax_async.path import Path

__all__ = ["Save", "WhenCommitted", "check_destination", "check_parent"]

_SYNCS_AT_ONCE = 4
_SWEEP_GRACE_SECS = 1.0
_CLAIM_SECS = 0.02  # between two looks whether another process has finished


def check_destination(final: str, *, overwrite: bool) -> None:
    """Raises what can be known to go wrong before any value is captured."""
    atomicity.recover(final)
    atomicity.clear_abandoned(final)
    if os.path.lexists(final):
        if layout.name_in_deletion(final) is not None:
            raise errors.DeletionInProgressError(
                f"{final} has a deletion that was begun and not finished: finish it before saving "
                "there, or delete the checkpoint"
            )
        if not overwrite:
            raise errors.DestinationExistsError(
                f"Destination {final} already exists. Save elsewhere, or with overwrite=True."
            )
        is_empty = os.path.isdir(final) and not any(True for _ in files.scan(final))
        if os.path.islink(final) or not (is_empty or layout.may_be_replaced(final)):
            raise errors.DestinationExistsError(
                f"Destination {final} already exists and is no checkpoint: overwrite=True replaces "
                "checkpoints only. Remove it yourself, or save elsewhere."
            )
    check_parent(final)


def check_parent(final: str) -> None:
    """Raises if no directory can be made at a path."""
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


WhenCommitted = Callable[[], Awaitable[None]]


class Save:
    """One save: from the first value captured to the last name synced.

    Args:
      doing: the operation.
      final: where to.
      parts: what to save, and how.
      custom_metadata: the user's.
      overwrite: whether it may replace a checkpoint.
      lock: its place in the queue for the path.
      place: where it writes until it commits; None for what the options say.
      inherit: returns when what is saved was begun, and custom metadata that comes with it; asked
        when the save may look at what is there.
    """

    def __init__(
        self,
        doing: Operation,
        final: str,
        parts: list[Part],
        custom_metadata: dict[str, Any],
        overwrite: bool,
        lock: PathLock,
        *,
        place: Place | None = None,
        inherit: Callable[[], tuple[int, dict[str, Any]]] | None = None,
    ) -> None:
        self._doing = doing
        self._options = doing.context
        self.final = final
        self._parts = parts
        self._typestrs = {str(part.name): part.typestr for part in parts}
        self._custom_metadata = custom_metadata
        self._overwrite = overwrite
        self._lock = lock
        self._init_nsecs = time.time_ns()
        self._inherit = inherit
        self._place = place or _place(doing, final)

    async def run(self, when_committed: WhenCommitted | None = None) -> None:
        """The whole operation; leaves nothing behind unless it commits."""
        processes = self._doing.processes
        try:
            async with processes.together():
                await self._agree_on_paths()
                await self._write()
                await self._commit()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._doing.end_background()
                await loop.to_worker(self._undo)
            raise
        if when_committed is not None:
            with anyio.CancelScope(shield=True):
                await when_committed()
        callback = self._options.asynchronous.post_finalization_callback
        if callback is not None and self._place.makes_checkpoint:
            await loop.to_worker(callback)

    async def _agree_on_paths(self) -> None:
        processes = self._doing.processes
        own = [self.final, self._place.directory]
        told = json.loads(await processes.broadcast("paths", json.dumps(own)))
        final, self._place.directory = told
        if final != self.final:
            raise errors.MultihostError(
                f"Directory path mismatch in multi-process save: {final} on process "
                f"{processes.primary}, {self.final} on process {processes.index}"
            )

    async def _write(self) -> None:
        created = anyio.Event()
        directory = _Awaited(Path(self._place.directory), created)
        if not self._options.asynchronous.create_directories_asynchronously:
            await self._create(created)
        self._doing.expect(self._typestrs)
        async with anyio.create_task_group() as group:
            if not created.is_set():
                group.start_soon(self._create, created)
            seconds = await tiers.first(
                [_first_tier(part, directory) for part in self._parts],
                when_done=self._doing.release_caller,
            )
            self._parts.clear()  # all is captured: nothing here keeps the caller's objects alive
            await tiers.second(seconds)

    async def _create(self, created: anyio.Event) -> None:
        await self._lock.acquire()
        processes = self._doing.processes
        if processes.is_primary:
            with self._doing.recorder.span("create"):
                if not await loop.to_worker(self._create_directories):
                    await self._claim_later()
        await processes.broadcast("directory created")
        created.set()

    async def _claim_later(self) -> None:
        logger.info("%s: waiting until another process has finished there", self.final)
        is_claimed = False
        while not is_claimed:
            await anyio.sleep(_CLAIM_SECS)
            is_claimed = await loop.to_worker(self._place.claim)

    def _create_directories(self) -> bool:
        """Makes them, and says whether what is written may depend on what is there already."""
        if self._place.is_in_place:  # what is set aside must be one that may be replaced
            check_destination(self.final, overwrite=self._overwrite)
        self._place.create(
            list(self._typestrs),
            mode=self._options.file.path_permission_mode,
            overwrite=self._overwrite,
        )
        return self._place.claim()

    async def _commit(self) -> None:
        """Steps 2 to 5 of `_commit.finalize`; the primary takes them once nobody can back out."""
        processes, recorder = self._doing.processes, self._doing.recorder
        await processes.gather("written")  # by handlers that write on every process
        if not processes.is_primary:
            self._doing.cancel_switch.pass_commit_point()
            await processes.gather("ready to commit")
            await processes.broadcast("committed")
            return
        await self._make_durable()
        await processes.gather("ready to commit")
        self._doing.cancel_switch.pass_commit_point()
        processes.decide()
        with anyio.CancelScope(shield=True), recorder.span("publish"):
            replaced = await loop.to_worker(self._publish)
            await processes.broadcast("committed")
            if replaced is not None:
                await loop.to_worker(_remove_replaced, replaced)
        loop.spawn(self._sweep, label="sweep", exit_grace_secs=_SWEEP_GRACE_SECS, is_told_of=False)

    async def _make_durable(self) -> None:
        found, directories = await loop.to_worker(self._complete)
        with self._doing.recorder.span("sync"):
            share = max(1, -(-len(found) // _SYNCS_AT_ONCE))
            async with anyio.create_task_group() as group:
                for start in range(0, len(found), share):
                    group.start_soon(
                        loop.to_worker,
                        finalize.sync_files,
                        found[start : start + share],
                        self.final,
                    )
            await loop.to_worker(finalize.sync_directories, directories, self.final)

    def _complete(self) -> tuple[list[str], list[str]]:
        """Writes what is still missing, and returns all files and directories."""
        if not self._place.is_in_place:
            with self._doing.recorder.span("documents"):
                self._write_documents()
                finalize.write_marker(self._place.directory)
                finalize.write_commit_marker(self._place.directory, self.final)
        return files.walk(self._place.directory)

    def _write_documents(self) -> None:
        init_nsecs, custom_metadata = self._init_nsecs, self._custom_metadata
        if self._inherit is not None:
            init_nsecs, custom_metadata = self._inherit()
        finalize.write_root_documents(
            self._place.directory,
            self.final,
            self._typestrs,
            init_nsecs=init_nsecs,
            custom_metadata=custom_metadata,
        )

    def _publish(self) -> str | None:
        # What is there now may have come after the first look, or without one.
        if self._overwrite and not self._place.is_in_place:
            check_destination(self.final, overwrite=True)
        return self._place.publish(self._write_documents, overwrite=self._overwrite)

    def _undo(self) -> None:
        """Leaves everything as it was."""
        if not self._doing.processes.is_primary:
            return
        try:
            self._place.undo()
        except OSError as error:
            logger.warning("%s could not be removed: %s", self._place.directory, error)

    async def _sweep(self) -> None:
        try:
            swept = await loop.to_worker(atomicity.sweep, os.path.dirname(self.final))
        except OSError as error:
            logger.warning("leftovers beside %s could not be swept: %s", self.final, error)
        else:
            for path in swept:
                logger.info("removed %s, left by a process that has died", path)


def _place(doing: Operation, final: str) -> Place:
    is_in_place = layout.commit_mode(doing.context) is AtomicityMode.COMMIT_FILE
    return InPlace(final) if is_in_place else Beside(final)


def _first_tier(part: Part, directory: _Awaited) -> tiers.Tier:
    name = str(part.name)
    return tiers.Tier(
        name, lambda: part.handler.save(directory / name, part.value), part.code("save")
    )


def _remove_replaced(path: str) -> None:
    try:
        atomicity.discard(path)
    except OSError as error:
        logger.warning("the replaced checkpoint %s could not be removed: %s", path, error)
