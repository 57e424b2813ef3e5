"""Acting together: process indices, barriers and messages over JAX's coordination service.

Rules
  I8   Every process meets the same barriers in the same order, also after a failure of its own;
       every wait is bounded, and names who is missing.

A single process touches no coordination service. No device collective is ever used: they need
idle devices and give no answer when one process has died.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from orbax_async import errors

__all__ = [
    "Processes",
    "is_pathways_backend",
    "is_primary_host",
    "process_count",
    "process_index",
    "sync_global_processes",
]

_BARRIER_SECS = 600.0
_serials = itertools.count()


def is_pathways_backend() -> bool:
    """Says whether jax runs on Pathways."""
    return bool(jax.devices()) and "pathways" in str(jax.devices()[0].client.platform_version)


def process_index() -> int:
    """Returns the index of this process among all of the job."""
    return jax.process_index()


def process_count() -> int:
    """Returns how many processes the job has."""
    return jax.process_count()


def is_primary_host(primary_host: int | None) -> bool:
    """Says whether this process does the work that only one may do; None makes every one do it."""
    return primary_host is None or primary_host == process_index()


def _client() -> Any:
    # jax's public namespace has no handle on its coordination client; this module re-exports it.
    client = multihost_utils.distributed.global_state.client
    if client is None:
        raise errors.MultihostError(
            "several processes must act together, but jax.distributed is not initialized; "
            "call jax.distributed.initialize() first"
        )
    return client


class Processes:
    """The processes that take part in one operation.

    Every process makes its operations in the same order, so a counter names each operation alike
    everywhere. All methods block; call them on a worker.
    """

    def __init__(
        self,
        *,
        primary: int | None = 0,
        active: Collection[int] | None = None,
        prefix: str | None = None,
    ) -> None:
        self.index = process_index()
        self.members: Sequence[int] = sorted(active) if active else range(process_count())
        self.primary = primary
        self._name = f"{prefix or 'orbax_async'}/{next(_serials)}"
        if self.index not in self.members:
            raise errors.MultihostError(
                f"process {self.index} is not in multiprocessing.active_processes "
                f"{list(self.members)}; only those may call"
            )
        if primary is not None and primary not in self.members:
            raise errors.MultihostError(
                f"multiprocessing.primary_host is {primary}, but the processes are "
                f"{list(self.members)}; name one of them"
            )

    @property
    def are_several(self) -> bool:
        """Whether more than one process takes part."""
        return len(self.members) > 1

    @property
    def is_primary(self) -> bool:
        """Whether this process does the work that only one may do."""
        return self.primary is None or self.index == self.primary

    def agree(
        self, step: str, failure: BaseException | None = None, timeout: float = _BARRIER_SECS
    ) -> None:
        """Meets all processes at a step, and fails on all if it failed on any (I8).

        Args:
          step: what was just done, the same words on every process.
          failure: what went wrong here, or None.
          timeout: seconds to wait for the others.

        Raises:
          BarrierTimeoutError: some process did not come; the message names it.
          MultihostError: some other process failed at this step.
        """
        if failure is not None and not self.are_several:
            raise failure
        if not self.are_several:
            return
        client, name = _client(), f"{self._name}/{step}"
        report = "ok" if failure is None else f"{type(failure).__name__}: {failure}"[:2000]
        client.key_value_set(f"{name}/reports/{self.index}", report)
        try:
            client.wait_at_barrier(name, int(timeout * 1000), list(self.members))
        except Exception as error:
            reports = self._reports(name)
            missing = tuple(index for index in self.members if index not in reports)
            raise BarrierErrors.timeout(step, timeout, missing, error) from error
        if failure is not None:
            raise failure
        failed = {index: text for index, text in self._reports(name).items() if text != "ok"}
        if failed:
            listing = "; ".join(f"process {index}: {text}" for index, text in failed.items())
            raise errors.MultihostError(f"'{step}' failed elsewhere: {listing}")

    def broadcast(self, what: str, value: str | None, timeout: float = _BARRIER_SECS) -> str:
        """Returns the primary's `value` on every process."""
        if not self.are_several:
            assert value is not None
            return value
        client, key = _client(), f"{self._name}/{what}"
        if self.is_primary and value is not None:
            client.key_value_set(key, value)
            return value
        try:
            return str(client.blocking_key_value_get(key, int(timeout * 1000)))
        except Exception as error:
            missing = () if self.primary is None else (self.primary,)
            raise BarrierErrors.timeout(what, timeout, missing, error) from error

    def _reports(self, name: str) -> dict[int, str]:
        found = _client().key_value_dir_get(f"{name}/reports/")
        return {int(key.rsplit("/", 1)[1]): text for key, text in found}


class BarrierErrors:
    """How a wait that failed is told."""

    @staticmethod
    def timeout(
        step: str, timeout: float, missing: tuple[int, ...], cause: Exception
    ) -> errors.BarrierTimeoutError:
        """Makes the error that names who is missing."""
        who = f"processes {list(missing)} did not arrive" if missing else str(cause)
        return errors.BarrierTimeoutError(f"'{step}' was not met in {timeout:g} s: {who}", missing)


async def sync_global_processes(
    key: str,
    *,
    operation_id: str | None = None,
    timeout: float | None = None,
    processes: Collection[int] | None = None,
    record_event_name: str | None = None,
) -> None:
    """Waits until every process has called this with the same key; a single one returns at once.

    Args:
      key: names the barrier; each (key, operation_id) serves once.
      operation_id: tells uses of one key apart.
      timeout: seconds; 600 unless given.
      processes: the processes that take part, all unless given.
      record_event_name: the `jax.monitoring` event under which the wait is recorded.

    Raises:
      BarrierTimeoutError: some process did not come in time.
    """
    import time

    import anyio.to_thread

    members = sorted(processes) if processes else list(range(process_count()))
    if len(members) < 2:
        return
    began = time.monotonic()
    timeout = _BARRIER_SECS if timeout is None else timeout
    name = f"orbax_async/sync/{key}/{operation_id or ''}"
    client = _client()
    try:
        await anyio.to_thread.run_sync(client.wait_at_barrier, name, int(timeout * 1000), members)
    except Exception as error:
        raise BarrierErrors.timeout(key, timeout, (), error) from error
    if record_event_name is not None:
        jax.monitoring.record_event_duration_secs(record_event_name, time.monotonic() - began)
