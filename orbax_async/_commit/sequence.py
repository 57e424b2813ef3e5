"""The sequence of a save, whatever commits it: from the first value captured to the last sync.

Rules
  I4, I5, as `commits` has them: durable, then visible, then durably visible.
  I15  However it ends, nothing is held afterwards, and nothing of it left that is not visible.

Theory of operation
  1. The primary process makes the directory (`Commit.begin`) and waits until it may depend on what
     is there (`claim`). Handlers capture meanwhile, and write when the directory is there.
  2. The checkpoint's own documents are written, if they may be there by now (`complete`).
  3. Every file is synced, several at once, then every directory, the deepest first: an entry is
     durable only once its directory is.
  4. This is the commit point: what was asked to stop before it leaves nothing, what fails after it
     is already committed.
  5. The checkpoint is made visible (`publish`), and what it has replaced is removed.
  6. What dead owners have left beside it is swept, in the background.

  With several processes each syncs what it wrote before it says that it has written; the primary
  alone takes the other steps. Meanwhile it renews the sign that its directory is in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import anyio

from orbax_async import errors
from orbax_async._commit import leftovers, removal
from orbax_async._commit.commits import Commit, MarkerCommit, RenameCommit
from orbax_async._commit.leftovers import Held
from orbax_async._engine import loop
from orbax_async._operation import Operation
from orbax_async._storage import seal
from orbax_async._storage.directory import Capability, Directory
from orbax_async._trace import logger
from orbax_async.path import Path, PathAwaitingCreation

_SYNCS_AT_ONCE, _SYNCED_IN_A_ROW = 4, 8
_SWEEP_GRACE_SECS = 1.0
_CLAIM_SECS = 0.02  # between two looks whether another process has finished
_CLAIM_LIMIT_SECS = 1200.0  # where the operation has no limit of its own
_CLAIM_SHARE = 0.8  # of the operation's limit: it ends before that, and says who is waited for
_RENEW_SECS = 10.0


class _Awaited:
    """A directory that handlers may write to once it is there."""

    def __init__(self, path: Path, wanted: anyio.Event, created: anyio.Event) -> None:
        self._path = path
        self._wanted = wanted
        self._created = created

    @property
    def path(self) -> Path:
        return self._path

    def __truediv__(self, other: Any) -> _Awaited:
        if not isinstance(other, (str, os.PathLike)):
            raise TypeError(f"Expected PathLike, got {type(other)}.")
        return _Awaited(self._path / other, self._wanted, self._created)

    async def await_creation(self) -> Path:
        self._wanted.set()
        await self._created.wait()
        return self._path


@dataclasses.dataclass(eq=False, kw_only=True)
class Save:
    """One save.

    Attributes:
      operation: its options, processes and recorder, and its place in the queue for the path.
      final: where to.
      commit: where it writes until it is committed, and how it is.
      handlers: by the name of each checkpointable what the metadata call its handler.
      write: has all handlers capture and write; it is given the directory, which is still to be.
      custom_metadata: the user's.
      inherit: returns when what is saved was begun, and custom metadata that comes with it; asked
        once the directory is claimed.
    """

    operation: Operation
    final: str
    commit: Commit
    handlers: Mapping[str, str]
    write: Callable[[PathAwaitingCreation], Awaitable[None]]
    custom_metadata: dict[str, Any]
    inherit: Callable[[], tuple[int, dict[str, Any]]] | None = None

    def __post_init__(self) -> None:
        self._begun_nsecs = time.time_ns()
        self._documents: dict[str, bytes] = {}
        self._renewed_secs = time.monotonic()

    async def run(self, when_committed: Callable[[], Awaitable[None]] | None = None) -> None:
        """The whole operation; leaves nothing behind unless it commits."""
        options, processes = self.operation.context.asynchronous, self.operation.processes
        try:
            async with processes.together():
                await self._until_ready()
                await self._commit()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self.operation.end_background()
                await loop.to_worker(self._undo, error)
            raise
        if when_committed is not None:
            with anyio.CancelScope(shield=True):
                await when_committed()
        if options.post_finalization_callback is not None and self.commit.makes_checkpoint:
            await loop.to_worker(options.post_finalization_callback)

    async def _until_ready(self) -> None:
        """Has all written, and durable; shows meanwhile that the save is alive."""
        processes = self.operation.processes
        with errors.ungrouped():
            async with anyio.create_task_group() as group:
                if processes.is_primary:
                    group.start_soon(self._renew)
                await self._write()
                await processes.gather("written")  # by handlers that write on every process
                if processes.is_primary:
                    await self._make_durable()
                else:
                    self.operation.cancel_switch.pass_commit_point()
                await processes.gather("ready to commit")
                group.cancel_scope.cancel()

    # Writing.

    async def _write(self) -> None:
        where = await self._agree_on_paths()
        wanted, created = anyio.Event(), anyio.Event()
        directory = _Awaited(Path(where), wanted, created)
        if not self.operation.context.asynchronous.create_directories_asynchronously:
            await self._create(created)
        async with anyio.create_task_group() as group:
            if not created.is_set():
                # Not before somebody wants it: the caller is waiting for values to be captured.
                group.start_soon(self._create, created, wanted)
            await self.write(directory)
            wanted.set()

    async def _agree_on_paths(self) -> str:
        processes = self.operation.processes
        own = json.dumps([self.final, self.commit.directory.path])
        final, directory = json.loads(await processes.broadcast("paths", own))
        if final != self.final:
            raise errors.MultihostError(
                f"Directory path mismatch in multi-process save: {final} on process "
                f"{processes.primary}, {self.final} on process {processes.index}"
            )
        return str(directory)

    async def _create(self, created: anyio.Event, wanted: anyio.Event | None = None) -> None:
        if wanted is not None:
            await wanted.wait()
        if self.operation.path_lock is not None:
            await self.operation.path_lock.acquire()
        if self.operation.processes.is_primary:
            with self.operation.recorder.span("create"):
                await loop.to_worker(self._begin)
                await self._claim()
        await self.operation.processes.broadcast("directory created")
        created.set()

    def _begin(self) -> None:
        mode = self.operation.context.file.path_permission_mode
        self.commit.begin(list(self.handlers), mode=mode)

    async def _claim(self) -> None:
        limit_secs = self.operation.context.asynchronous.timeout_secs
        limit_secs = _CLAIM_LIMIT_SECS if limit_secs is None else _CLAIM_SHARE * limit_secs
        began = time.monotonic()
        while (holder := await loop.to_worker(self.commit.claim)) is not None:
            if time.monotonic() - began > limit_secs:
                raise errors.OperationTimeoutError(
                    f"{self.operation.cancel_switch.label} has waited for {limit_secs:g} s: "
                    f"{holder}. Wait for that to end, or end it, and try again."
                )
            await anyio.sleep(_CLAIM_SECS)

    async def _renew(self) -> None:
        while True:
            await anyio.sleep(_RENEW_SECS)
            await loop.to_worker(self._renew_now)

    def _renew_now(self) -> None:
        self._renewed_secs = time.monotonic()
        self.commit.renew()

    # Committing.

    async def _commit(self) -> None:
        processes = self.operation.processes
        if not processes.is_primary:
            await processes.broadcast("committed")
            return
        self.operation.cancel_switch.pass_commit_point()
        processes.decide()
        with anyio.CancelScope(shield=True), self.operation.recorder.span("publish"):
            replaced = await loop.to_worker(self._publish)
            try:
                await processes.broadcast("committed")
            finally:
                if replaced is not None:
                    await loop.to_worker(replaced.dispose)
        loop.spawn(self._sweep, label="sweep", exit_grace_secs=_SWEEP_GRACE_SECS, is_told_of=False)

    async def _make_durable(self) -> None:
        problem = f"cannot make what was written for {self.final} durable"
        with errors.reported_as(errors.CommitError, problem), errors.ungrouped():
            files, directories = await loop.to_worker(self._complete)
            with self.operation.recorder.span("sync"):
                share = max(1, -(-len(files) // _SYNCS_AT_ONCE))
                async with anyio.create_task_group() as group:
                    for start in range(0, len(files), share):
                        group.start_soon(loop.to_worker, self._sync, files[start : start + share])
                await loop.to_worker(self._sync, directories)

    def _complete(self) -> tuple[list[str], list[str]]:
        """Makes the documents, and returns all files and directories."""
        with self.operation.recorder.span("documents"):
            begun_nsecs, custom_metadata = self._begun_nsecs, self.custom_metadata
            if self.inherit is not None:
                begun_nsecs, custom_metadata = self.inherit()
            document = {
                "item_handlers": dict(self.handlers),
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": begun_nsecs,
                "commit_timestamp_nsecs": time.time_ns(),
                "custom_metadata": custom_metadata,
            }
            directory = self.commit.directory
            files, directories = directory.walk()
            proof = f"Checkpoint commit was successful to {self.final}"
            self._documents = (
                seal.documents(directory, files, document, proof)
                if self.commit.makes_checkpoint
                else seal.unsealed(document, proof)
            )
            self.commit.complete(self._documents)
            files += [name for name in self._documents if directory.status(name) is not None]
        return files, directories

    def _sync(self, written: list[str]) -> None:
        for start in range(0, len(written), _SYNCED_IN_A_ROW):
            self.commit.directory.sync(written[start : start + _SYNCED_IN_A_ROW])
            if time.monotonic() - self._renewed_secs >= _RENEW_SECS:
                self._renew_now()  # the loop's own turn may be late: syncs keep all workers

    def _publish(self) -> Held | None:
        return self.commit.publish(self._documents)

    def _undo(self, failure: BaseException) -> None:
        """Leaves everything as it was."""
        if not self.operation.processes.is_primary:
            return
        try:
            self.commit.undo()
        except OSError as error:
            where = self.commit.directory.path
            logger.warning("%s could not be removed: %s", where, error)
            failure.add_note(f"{where} could not be removed, and is left to a later save: {error}")
        finally:
            self.commit.release()

    async def _sweep(self) -> None:
        try:
            swept = await loop.to_worker(leftovers.sweep, os.path.dirname(self.final))
        except OSError as error:
            logger.warning("leftovers beside %s could not be swept: %s", self.final, error)
        else:
            for path in swept:
                logger.info("removed %s, left by a process that has died", path)


# What may lie at the path that a save is given, and which commit it takes.


class Destination(NamedTuple):
    """Where a save is to be committed; every method blocks.

    Attributes:
      final: the path.
      overwrite: whether a checkpoint there may be replaced.
      is_in_place: whether a first save is written at the path itself.
      is_replaceable: says whether what lies at a path is a checkpoint, or was to be one.
    """

    final: Directory
    overwrite: bool
    is_in_place: bool
    is_replaceable: Callable[[str], bool]

    def commit(self, *, may_look: bool) -> Commit:
        """Chooses how to commit: in place what overwrites nothing, or where nothing can be renamed.

        Args:
          may_look: whether it may look at the path. It is of no use before another save there.
        """
        with self._looking():
            is_first = not self.overwrite or (may_look and self._is_free())
        if self._begins_in_place() and (is_first or not self.final.can(Capability.RENAME)):
            return MarkerCommit(self.final)
        return RenameCommit(self.final, self.check if self.overwrite else None)

    def _looking(self) -> contextlib.AbstractContextManager[None]:
        return errors.reported_as(errors.CommitError, f"cannot save to {self.final.path}")

    def _begins_in_place(self) -> bool:
        return self.is_in_place or not self.final.can(Capability.RENAME)

    def _is_free(self) -> bool:
        return self.final.status() is None or leftovers.is_hollow(self.final)

    def check(self) -> None:
        """Raises what can be known to go wrong before any value is captured.

        Raises:
          DestinationExistsError: something lies there that may not be replaced.
          DeletionInProgressError: a deletion there was begun and not finished.
          CommitError: no directory can be made there.
        """
        with self._looking():
            self._check()

    def _check(self) -> None:
        final = self.final
        leftovers.settle(final.path)
        leftovers.clear(final)
        status = final.status()
        if status is not None and not (self._begins_in_place() and leftovers.is_hollow(final)):
            self._check_replaceable(is_directory=status.kind == "directory")
        check_parent(final)

    def _check_replaceable(self, *, is_directory: bool) -> None:
        path = self.final.path
        if removal.name_in_deletion(self.final) is not None:
            raise errors.DeletionInProgressError(
                f"{path} has a deletion that was begun and not finished: finish it before saving "
                "there, or delete the checkpoint"
            )
        if leftovers.is_unfinished(self.final) and leftovers.owner_in_place(self.final):
            raise errors.DestinationExistsError(
                f"Destination {path} is being written by another save, or one of another machine "
                "has died there within the last two minutes. Wait for it, or save elsewhere."
            )
        if not self.overwrite:
            raise errors.DestinationExistsError(
                f"Destination {path} already exists. Save elsewhere, or with overwrite=True."
            )
        is_empty = is_directory and not self.final.entries()
        if not is_empty and not (is_directory and self.is_replaceable(path)):
            raise errors.DestinationExistsError(
                f"Destination {path} already exists and is no checkpoint: overwrite=True replaces "
                "checkpoints only. Remove it yourself, or save elsewhere."
            )


def check_parent(final: Directory) -> None:
    """Raises if no directory can be made at a path.

    Raises:
      CommitError: there is a file above it, or nothing can be made there.
    """
    parent = final.parent
    with errors.reported_as(errors.CommitError, f"cannot create {final.path}"):
        while (status := parent.status()) is None:
            parent = parent.parent
        if status.kind == "file":
            raise errors.CommitError(
                f"cannot create {final.path}: {parent.path} is a file, not a directory. Check the "
                "path."
            )
        if not parent.is_writable():
            raise errors.CommitError(
                f"cannot create {final.path}: the directory {parent.path} is not writable. Change "
                "its permissions, or save elsewhere."
            )
