"""Acting together: messages, waits and failures over JAX's coordination service.

Rules
  I8   Every process takes the same steps in the same order. A failure on one of them ends the
       operation on all; every wait is bounded, and names who is missing.

Theory of operation
  A joint operation is a star. Its *leader*, the primary host, tells the others what they need to
  know (`broadcast`), and waits where it needs something of each (`gather`); the others never wait
  for one another. Both are keys in the coordination service's store, at which a waiting process
  looks with growing pauses: a wait holds no thread, and can be cancelled.

  A process that fails leaves a note. Beside its own work each looks for such notes (`together`),
  and stops at once when there is one, be it writing or waiting. On its way out it says that it
  has left; the leader removes what they wrote only then. Later it removes the keys, too.

  Every process begins its joint operations in the same order, so a serial number, counted for
  each group of processes, names them alike everywhere. What needs no agreement draws no number:
  any process may load, or ask for metadata, by itself, and a failure to is its own.

  A single process touches no coordination service. No device collective is ever used: they need
  idle devices and give no answer when one process has died.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import itertools
import json
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any

import anyio
import jax
from jax.experimental import multihost_utils

from orbax_async import errors
from orbax_async._trace import logger

__all__ = [
    "is_pathways_backend",
    "is_primary_host",
    "process_count",
    "process_index",
    "sync_global_processes",
]

_WAIT_SECS = 600.0
_LEAVE_SECS = 5.0
_PAUSE_SECS = 0.002
_LONGEST_PAUSE_SECS = 0.25

_serials: collections.defaultdict[str, Iterator[int]] = collections.defaultdict(itertools.count)
_finished: dict[str, int] = {}  # operations led here whose keys remain: how many took part


def is_pathways_backend() -> bool:
    """Says whether jax runs on Pathways."""
    return bool(jax.devices()) and "pathways" in str(jax.devices()[0].client.platform_version)


def process_index() -> int:
    """Returns the index of this process among all of the job."""
    return int(jax.process_index())


def process_count() -> int:
    """Returns how many processes the job has."""
    return int(jax.process_count())


def is_primary_host(primary_host: int | None) -> bool:
    """Says whether this process does the work that only one may do; None makes every one do it."""
    return primary_host is None or primary_host == process_index()


def participants(active: Collection[int] | None) -> list[int]:
    """Returns the indices of the processes that take part; None stands for all."""
    return sorted(active) if active else list(range(process_count()))


def _client() -> Any:
    # jax's public namespace has no handle on its coordination client, but this module holds one.
    client = multihost_utils.distributed.global_state.client  # type: ignore[attr-defined]
    if client is None:
        raise errors.MultihostError(
            "several processes must act together, but jax.distributed is not initialized; "
            "call jax.distributed.initialize() first"
        )
    return client


async def _in_place(function: Callable[..., Any], *args: Any) -> Any:
    # A question to the coordination service takes a fraction of a millisecond.
    return function(*args)


class Processes:
    """The processes that take part in one operation.

    Args:
      primary: the process that does what only one may do; None makes every one do it.
      active: who takes part; None stands for all.
      prefix: put before the names of the keys.
      is_joint: whether they will act together. All of them then have to begin it.
      timeout_secs: how long after its beginning a joint operation goes on waiting for a process.
      call: how a coroutine makes a blocking call.

    Attributes:
      index, members, primary: this process, those that take part, and the primary.
      is_primary: whether this process does the work that only one may do.
      are_several: whether more than one process takes part.
      leave_secs: how long, after a failure, the leader waits for the others to stop.

    Raises:
      MultihostError: this process, or the primary, does not take part.
      UnsupportedOptionError: a joint operation of several processes has no single primary.
    """

    def __init__(
        self,
        *,
        primary: int | None = 0,
        active: Collection[int] | None = None,
        prefix: str | None = None,
        is_joint: bool = False,
        timeout_secs: float = _WAIT_SECS,
        call: Callable[..., Awaitable[Any]] = _in_place,
    ) -> None:
        self.index = process_index()
        self.members = participants(active)
        self.primary = primary
        self.is_primary = primary in (None, self.index)
        self.are_several = len(self.members) > 1
        if self.index not in self.members:
            raise errors.MultihostError(
                f"process {self.index} is not in multiprocessing.active_processes {self.members}; "
                "only those may call"
            )
        if primary is not None and primary not in self.members:
            raise errors.MultihostError(
                f"multiprocessing.primary_host is {primary}, but the processes are "
                f"{self.members}; name one of them"
            )
        self._call = call
        self.leave_secs = _LEAVE_SECS
        self._name = ""
        self._heard: errors.MultihostError | None = None
        self._is_decided = False
        if not is_joint or not self.are_several:
            return
        if primary is None:
            raise errors.UnsupportedOptionError(
                "multiprocessing.primary_host = None, which gives each process storage of its "
                "own, has no effect in this version; name the process that commits"
            )
        group = hashlib.sha256(repr(self.members).encode()).hexdigest()[:8]
        name = f"{prefix or 'orbax_async'}/{group}"
        self._name = f"{name}/{next(_serials[name])}"
        self._leader = primary
        # The others go on a little longer, to be told by the leader who was missing.
        self._timeout_secs = timeout_secs * (1.0 if self.is_primary else 1.1)
        self._began = time.monotonic()

    # Steps. A single process takes them at once.

    async def broadcast(self, what: str, value: str = "") -> str:
        """Returns the leader's `value` on every process; the values of the others don't count.

        Args:
          what: names the step, in the same words on every process.
          value: what the leader has to tell.

        Raises:
          BarrierTimeoutError: the leader did not come.
        """
        if not self.are_several:
            return value
        if self.is_primary:
            await self._call(self._post, f"news/{_as_key(what)}", value)
            return value
        key = _as_key(what)
        news = await self._wait("news", {key: self._leader}, f"'{what}' was not told")
        return news[key]

    async def gather(self, what: str) -> None:
        """Says that `what` is done here; on the leader, waits until it is done by all.

        Raises:
          BarrierTimeoutError: (on the leader) some did not come; the message names them.
        """
        if not self.are_several:
            return
        folder = f"done/{_as_key(what)}"
        await self._call(self._post, f"{folder}/{self.index}")
        if self.is_primary:
            keys = {str(index): index for index in self.members}
            await self._wait(folder, keys, f"'{what}' was not met")

    # Failures.

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Encloses what precedes `together`: the others hear of a failure in it."""
        try:
            yield
        except BaseException as error:
            self._note(error)
            self._leave()
            raise

    @contextlib.asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Encloses a joint operation: a failure in it ends it on every process.

        After a failure the leader does not come out before the others, unless they take too long.

        Raises:
          MultihostError: another process has failed; the message says how.
          BarrierTimeoutError: another process has found that some are missing.
        """
        if not self._name:
            yield
            return
        try:
            with errors.ungrouped():
                await self._listen()
                async with anyio.create_task_group() as group:
                    group.start_soon(self._watch)
                    yield
                    group.cancel_scope.cancel()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._call(self._note, error)
                await self._others_left()
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self._call(self._leave)

    def decide(self) -> None:
        """Takes the point of no return: from here on no other process can end the operation.

        Raises:
          MultihostError: one already has.
        """
        if self._heard is not None:
            raise self._heard
        self._is_decided = True

    async def _watch(self) -> None:
        for pause in _pauses():
            await anyio.sleep(pause)
            await self._listen()

    async def _listen(self) -> None:
        """Raises what another process has failed with."""
        self._heed(await self._call(self._list, "failed"))

    def _heed(self, notes: dict[str, str]) -> None:
        notes.pop(str(self.index), None)
        if not notes or self._is_decided:
            return
        index, note = min(notes.items())
        told = json.loads(note)
        text, missing = f"process {index} failed: {told['text']}", tuple(told["missing"])
        self._heard = (
            errors.BarrierTimeoutError(text, missing) if missing else errors.MultihostError(text)
        )
        raise self._heard

    def _note(self, failure: BaseException) -> None:
        """Tells the others what has failed here, unless it is what failed elsewhere."""
        if not self._name or self._heard is not None:
            return
        text = f"{type(failure).__name__}: {failure}"[:2000]
        if isinstance(failure, asyncio.CancelledError):
            text = "it was cancelled, or ran out of time"
        missing = failure.missing if isinstance(failure, errors.BarrierTimeoutError) else ()
        with _logged():
            self._post(f"failed/{self.index}", json.dumps({"text": text, "missing": missing}))

    async def _others_left(self) -> None:
        if not self.is_primary or not self.leave_secs:
            return
        others = {str(index): index for index in self.members if index != self.index}
        with _logged():
            await self._wait("left", others, "what has failed was not left", self.leave_secs)

    def _leave(self) -> None:
        """Says that this process looks at no key of the operation any more."""
        if not self._name:
            return
        with _logged():
            self._post(f"left/{self.index}")
            if self.is_primary:
                _finished[self._name] = len(self.members)
                _tidy()

    # The coordination service.

    async def _wait(
        self, folder: str, keys: Mapping[str, int], problem: str, secs: float | None = None
    ) -> dict[str, str]:
        """Waits until a folder holds all `keys`, each set by the process given with it."""
        began = self._began if secs is None else time.monotonic()
        secs = self._timeout_secs if secs is None else secs
        for pause in _pauses():
            found: dict[str, str] = await self._call(self._list, folder)
            missing = tuple(index for key, index in keys.items() if key not in found)
            if not missing:
                return found
            if time.monotonic() - began > secs:
                raise errors.BarrierTimeoutError(
                    f"{problem} in {secs:g} s: processes {list(missing)} did not come", missing
                )
            await anyio.sleep(pause)
        raise AssertionError("the pauses have no end")

    def _post(self, key: str, value: str = "") -> None:
        with _answering():
            _client().key_value_set(f"{self._name}/{key}", value)

    def _list(self, folder: str) -> dict[str, str]:
        return _list(f"{self._name}/{folder}/")


def tell(
    what: str,
    say: Callable[[], str],
    *,
    primary: int | None = 0,
    active: Collection[int] | None = None,
    prefix: str | None = None,
) -> str:
    """Returns what one process has to say, on every process; blocks, but no loop may wait for it.

    Every process of the job calls it, in the same order.

    Args:
      what: names the step, in the same words on every process.
      say: makes the text; called on the primary process alone.
      primary: the process that says it.
      active: who takes part; None stands for all.
      prefix: put before the names of the keys.

    Raises:
      MultihostError: the primary failed to say it; the message tells how.
      BarrierTimeoutError: the primary did not come.
    """
    prefix = f"{prefix or 'orbax_async'}/tell"
    meeting = Processes(primary=primary, active=active, prefix=prefix, is_joint=True)
    if not meeting.are_several:
        return say()
    key = _as_key(what)
    if meeting.is_primary:
        with meeting.telling():
            text = say()
            meeting._post(f"news/{key}", text)
        meeting._leave()
        return text
    waiting = threading.Event()  # never set: its wait is a pause
    try:
        for pause in _pauses():
            meeting._heed(meeting._list("failed"))
            if (news := meeting._list("news").get(key)) is not None:
                return news
            if time.monotonic() - meeting._began > _WAIT_SECS:
                raise errors.BarrierTimeoutError(
                    f"'{what}' was not told in {_WAIT_SECS:g} s: process {primary} did not come",
                    (meeting._leader,),
                )
            waiting.wait(pause)
        raise AssertionError("the pauses have no end")
    finally:
        meeting._leave()


def _pauses() -> Iterator[float]:
    """Yields the pauses between looks: a short wait ends soon, a long one costs little."""
    pause = _PAUSE_SECS
    while True:
        yield pause
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECS)


def _list(folder: str) -> dict[str, str]:
    with _answering():
        return {key.rsplit("/", 1)[1]: value for key, value in _client().key_value_dir_get(folder)}


def _as_key(what: str) -> str:
    return urllib.parse.quote(what, safe=" ")


def _tidy() -> None:
    """Removes the keys of operations that every process has left."""
    for name, count in list(_finished.items()):
        if len(_list(f"{name}/left/")) == count:
            with _answering():
                _client().key_value_delete(f"{name}/")
            _finished.pop(name, None)


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Logs what goes wrong while something else has already ended, well or not."""
    try:
        yield
    except errors.MultihostError as error:
        logger.warning("%s", error)


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise errors.MultihostError(
            f"jax's coordination service did not do what it was asked to: {error}"
        ) from error


async def sync_global_processes(
    key: str,
    *,
    operation_id: str | None = None,
    timeout: float | None = None,
    processes: Collection[int] | None = None,
    record_event_name: str = "/jax/checkpoint/sync_global_devices_duration_sec",
) -> None:
    """Waits until every process has called this with the same key; a single one returns at once.

    Args:
      key: names the barrier. It can be used again, by every process in the same order.
      operation_id: tells uses of one key apart.
      timeout: seconds; 600 unless given.
      processes: the processes that take part, all unless given.
      record_event_name: the `jax.monitoring` event under which the wait is recorded.

    Raises:
      ValueError: `timeout` is not positive, or this process is not one of `processes`.
      BarrierTimeoutError: some process did not come in time; the message names it.
    """
    members = participants(processes)
    if len(members) < 2:
        return
    timeout = _WAIT_SECS if timeout is None else timeout
    if timeout <= 0:
        raise ValueError(f"timeout must be positive, and is {timeout}")
    if process_index() not in members:
        raise ValueError(f"process {process_index()} is not one of processes {members}")
    began = time.monotonic()
    meeting = Processes(
        primary=members[0],
        active=members,
        prefix=f"orbax_async/sync/{_as_key(operation_id or '')}/{_as_key(key)}",
        is_joint=True,
        timeout_secs=timeout,
    )
    meeting.leave_secs = 0.0
    async with meeting.together():
        await meeting.gather(key)
        await meeting.broadcast(key)
    jax.monitoring.record_event_duration_secs(record_event_name, time.monotonic() - began)
