"""How processes act together, on a coordination service that is a dict."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import jax
import numpy as np
import pytest

import orbax_async as ocp
from orbax_async import errors, multihost
from orbax_async._engine import loop
from orbax_async._operation import Operation


class Service:
    """The part of jax's coordination client that we use; names like `a//b` become `a/b`."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        key = "/".join(part for part in key.split("/") if part)
        if key in self.values:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
        self.values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        folder = "/".join(part for part in folder.split("/") if part) + "/"
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def key_value_delete(self, folder: str) -> None:
        for key, _ in self.key_value_dir_get(folder):
            del self.values[key]


class Job:
    """Several processes in one; each counts its operations for itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.service = Service()
        self._monkeypatch = monkeypatch
        self._serials = [collections.defaultdict[str, Any](itertools.count) for _ in range(count)]
        monkeypatch.setattr(multihost, "_client", lambda: self.service)
        monkeypatch.setattr(multihost, "process_count", lambda: count)
        monkeypatch.setattr(multihost, "_finished", {})

    def become(self, index: int) -> None:
        """Makes what follows happen on one process."""
        self._monkeypatch.setattr(multihost, "process_index", lambda: index)
        self._monkeypatch.setattr(multihost, "_serials", self._serials[index])

    def begin(self, index: int, **options: Any) -> multihost.Processes:
        """Begins an operation on one process."""
        self.become(index)
        leave_secs = options.pop("leave_secs", None)
        processes = multihost.Processes(**{"is_joint": True, "timeout_secs": 60.0} | options)
        if leave_secs is not None:
            processes.leave_secs = leave_secs
        return processes

    def begin_all(self, **options: Any) -> list[multihost.Processes]:
        """Begins an operation on every process."""
        return [self.begin(index, **options) for index in range(len(self._serials))]


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Job]]:
    """Makes jobs of some number of processes."""
    yield lambda count: Job(monkeypatch, count)


JobOf = Callable[[int], Job]


# ----------------------------------------------------------------------------------- steps


async def test_the_leader_tells_and_the_others_hear(job_of: JobOf) -> None:
    """A broadcast gives every process the leader's value, whoever comes first."""
    processes = job_of(3).begin_all(primary=1)
    heard: dict[int, str] = {}

    async def take(each: multihost.Processes) -> None:
        heard[each.index] = await each.broadcast("the path/of it", f"from {each.index}")

    async with anyio.create_task_group() as group:
        for each in processes:
            group.start_soon(take, each)
    assert heard == dict.fromkeys(range(3), "from 1")


async def test_only_the_leader_waits_for_all(job_of: JobOf) -> None:
    """In a gather the others say that they are done and go on; the leader comes out last."""
    leader, *others = job_of(3).begin_all()
    order: list[int] = []

    async def take(each: multihost.Processes) -> None:
        await each.gather("written")
        order.append(each.index)

    async with anyio.create_task_group() as group:
        group.start_soon(take, leader)
        group.start_soon(take, others[0])
        await anyio.wait_all_tasks_blocked()
        assert order == [1]
        await take(others[1])
    assert order == [1, 2, 0]


async def test_a_wait_is_bounded_and_names_who_is_missing(job_of: JobOf) -> None:
    """I8: the leader names those that did not come, the others name the leader."""
    leader, other, _ = job_of(3).begin_all(timeout_secs=0.05)
    await other.gather("written")
    with pytest.raises(errors.BarrierTimeoutError, match=r"'written'.*processes \[2\]") as caught:
        await leader.gather("written")
    assert caught.value.missing == (2,)
    with pytest.raises(errors.BarrierTimeoutError, match=r"'committed'.*processes \[0\]") as caught:
        await other.broadcast("committed")
    assert caught.value.missing == (0,)
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("timeout_secs, share", [(10.0, 8.0), (None, 960.0), (0, 0.0)])
def test_the_bound_comes_from_the_options(
    job_of: JobOf, timeout_secs: float | None, share: float
) -> None:
    """An operation stops waiting for others before its own asynchronous.timeout_secs is over."""
    context = ocp.Context()
    context.asynchronous.timeout_secs = timeout_secs
    job = job_of(2)
    with context:
        job.become(0)
        assert Operation("save").processes._timeout_secs == pytest.approx(share)
        job.become(1)
        assert Operation("save").processes._timeout_secs >= share


# -------------------------------------------------------------------------------- failures


async def test_a_failure_ends_what_the_others_do(job_of: JobOf) -> None:
    """I8: one raises, the work of the rest is cancelled, and the leader comes out last."""
    seen: dict[int, BaseException] = {}
    order: list[int] = []

    async def work(each: multihost.Processes) -> None:
        try:
            async with each.together():
                if each.index == 2:
                    raise OSError(28, "No space left on device")
                await anyio.sleep_forever()
        except (OSError, errors.MultihostError) as error:
            seen[each.index] = error
            order.append(each.index)

    async with anyio.create_task_group() as group:
        for each in job_of(3).begin_all():
            group.start_soon(work, each)
    assert type(seen[2]) is OSError
    for index in (0, 1):
        assert type(seen[index]) is errors.MultihostError
        assert str(seen[index]) == "process 2 failed: OSError: [Errno 28] No space left on device"
    assert sorted(order) == [0, 1, 2]
    assert order[-1] == 0


async def test_a_late_comer_hears_before_it_does_anything(job_of: JobOf) -> None:
    """What has failed before a process comes ends it there, with the names of the missing."""
    leader, late = job_of(2).begin_all(timeout_secs=0.01, leave_secs=0.01)
    with pytest.raises(errors.BarrierTimeoutError):
        async with leader.together():
            await leader.gather("written")
    with pytest.raises(errors.BarrierTimeoutError, match="process 0 failed") as caught:
        async with late.together():
            pytest.fail("it came in")
    assert caught.value.missing == (1,)


async def test_a_failure_of_the_call_is_told(job_of: JobOf) -> None:
    """What a process refuses before its operation runs ends the others' too."""
    leader, other = job_of(2).begin_all()
    with pytest.raises(ValueError, match="a bad leaf"), other.telling():
        raise ValueError("a bad leaf")
    with pytest.raises(errors.MultihostError, match="process 1 failed: ValueError: a bad leaf"):
        async with leader.together():
            await leader.gather("written")


async def test_nothing_ends_what_is_decided(job_of: JobOf) -> None:
    """After its point of no return the leader's operation ends well, whatever others meet."""
    leader, other = job_of(2).begin_all()
    async with leader.together():
        leader.decide()
        with pytest.raises(KeyError):
            async with other.together():
                raise KeyError("late")
        await anyio.sleep(0.05)
        await leader.broadcast("committed")


async def test_what_has_failed_is_not_decided(job_of: JobOf) -> None:
    """The leader can't pass its point of no return once it has heard of a failure."""
    leader, other = job_of(2).begin_all()
    with pytest.raises(ValueError), other.telling():
        raise ValueError("early")
    with pytest.raises(errors.MultihostError, match="early"):
        await leader._listen()
    with pytest.raises(errors.MultihostError, match="early"):
        leader.decide()


async def test_a_cancelled_process_tells_the_others(job_of: JobOf) -> None:
    """Cancelling an operation on one process ends it on all."""
    leader, other = job_of(2).begin_all()
    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:
            async with other.together():
                scope.cancel()
                await anyio.sleep_forever()
        with pytest.raises(errors.MultihostError, match="process 1 failed: it was cancelled"):
            async with leader.together():
                await leader.gather("written")
        group.cancel_scope.cancel()


async def test_a_service_that_fails(job_of: JobOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error becomes ours in a step, and hides no other error where an operation ends."""
    job = job_of(2)
    leader, other = job.begin_all(leave_secs=0.01)

    def unavailable(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")

    for name in ("key_value_set", "key_value_dir_get"):
        monkeypatch.setattr(job.service, name, unavailable)
    with pytest.raises(errors.MultihostError, match="UNAVAILABLE: failed to connect"):
        await other.gather("written")
    with pytest.raises(KeyError), leader.telling():
        raise KeyError("the first problem")


# ----------------------------------------------------------------------------------- names


def names_of(processes: list[multihost.Processes]) -> set[str]:
    """The names that processes gave one operation."""
    return {each._name for each in processes}


def test_every_process_names_an_operation_alike(job_of: JobOf) -> None:
    """Serial numbers agree, also after one process made operations that need no agreement."""
    job = job_of(3)
    first = names_of(job.begin_all())
    for _ in range(5):
        assert job.begin(0, is_joint=False)._name == ""
    second = names_of(job.begin_all())
    assert len(first) == len(second) == 1
    assert first != second


def test_groups_and_prefixes_are_counted_apart(job_of: JobOf) -> None:
    """Operations of a subset, or under another prefix, bring nobody out of step."""
    job = job_of(3)
    pair = {job.begin(index, active={0, 1})._name for index in (0, 1)}
    other = {job.begin(index, prefix="eval")._name for index in (0, 1, 2)}
    everyone = names_of(job.begin_all())
    assert len(pair) == len(other) == len(everyone) == 1
    assert len(pair | other | everyone) == 3


async def test_the_prefix_and_the_group_come_from_the_options(
    job_of: JobOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`barrier_sync_key_prefix` begins every key, and `active_processes` are all that meet."""
    monkeypatch.setattr(loop, "to_worker", multihost._in_place)  # this loop is not the engine's
    job = job_of(3)
    context = ocp.Context()
    context.multiprocessing.barrier_sync_key_prefix = "eval"
    context.multiprocessing.active_processes = {0, 2}
    with context:
        meeting = []
        for index in (0, 2):
            job.become(index)
            meeting.append(Operation("save").processes)
        async with anyio.create_task_group() as group:
            for each in meeting:
                group.start_soon(each.gather, "looked")
    assert job.service.values
    assert all(key.startswith("eval/") for key in job.service.values)


async def test_keys_are_removed_once_all_have_left(job_of: JobOf) -> None:
    """The store does not grow: each operation's keys go when the next one ends at the latest."""
    job = job_of(2)

    async def work(each: multihost.Processes) -> None:
        async with each.together():
            await each.gather("written")
            await each.broadcast("committed")

    for _ in range(5):
        processes = job.begin_all()
        async with anyio.create_task_group() as group:
            for each in processes:
                group.start_soon(work, each)
        (name,) = names_of(processes)
        assert all(key.startswith(f"{name}/") for key in job.service.values)


def test_who_takes_part(job_of: JobOf) -> None:
    """A process that does not take part, and a primary that does not, are told so."""
    job = job_of(3)
    with pytest.raises(errors.MultihostError, match=r"process 2 is not in .* \[0, 1\]"):
        job.begin(2, active={0, 1})
    with pytest.raises(errors.MultihostError, match=r"primary_host is 0, .* \[1, 2\]"):
        job.begin(1, active={1, 2})
    with pytest.raises(errors.UnsupportedOptionError, match="primary_host = None"):
        job.begin(0, primary=None)
    assert job.begin(2, primary=2, active={2}).is_primary
    assert not job.begin(2, primary=2, active={2}).are_several


# -------------------------------------------------------------------- sync_global_processes


async def test_everybody_comes(job_of: JobOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public barrier lets nobody through before the last, each time its key is used."""
    job = job_of(2)
    events: list[str] = []
    monkeypatch.setattr(
        jax.monitoring, "record_event_duration_secs", lambda name, secs: events.append(name)
    )
    through: list[int] = []

    async def come(index: int) -> None:
        job.become(index)
        await multihost.sync_global_processes("a/b: c", operation_id="7", record_event_name="/e")
        through.append(index)

    for use in (1, 2):
        async with anyio.create_task_group() as group:
            group.start_soon(come, 0)
            await anyio.wait_all_tasks_blocked()
            assert len(through) == 2 * (use - 1)
            group.start_soon(come, 1)
        assert len(through) == 2 * use
    assert events == ["/e"] * 4


async def test_somebody_does_not_come(job_of: JobOf) -> None:
    """The public barrier ends in time and names who is missing."""
    job_of(3).become(0)
    with pytest.raises(errors.BarrierTimeoutError) as caught:
        await multihost.sync_global_processes("key", processes=[0, 2], timeout=0.01)
    assert caught.value.missing == (2,)
    assert "processes [2] did not come" in str(caught.value)


async def test_a_barrier_that_can_not_be(job_of: JobOf) -> None:
    """A timeout that is not positive, and a barrier of others only, are refused."""
    job_of(3).become(0)
    with pytest.raises(ValueError, match="timeout must be positive"):
        await multihost.sync_global_processes("key", timeout=0)
    with pytest.raises(ValueError, match=r"process 0 is not one of processes \[1, 2\]"):
        await multihost.sync_global_processes("key", processes=[1, 2])


# ------------------------------------------------------------------------------ one process


async def test_a_single_process_needs_no_coordination_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that one process does asks for the client of jax.distributed."""

    def refuse() -> None:
        raise AssertionError("the coordination service was asked for")

    monkeypatch.setattr(multihost, "_client", refuse)
    monkeypatch.setattr(multihost, "_serials", None)
    await ocp.save_async(tmp_path / "a", {"w": np.arange(4), "step": 1})
    await ocp.save_async(tmp_path / "a", {"w": np.arange(5), "step": 2}, overwrite=True)
    loaded = await ocp.load_async(tmp_path / "a")
    np.testing.assert_array_equal(loaded["w"], np.arange(5))
    assert (await anyio.to_thread.run_sync(ocp.metadata, tmp_path / "a")).custom_metadata == {}
    with pytest.raises(errors.DestinationExistsError):
        ocp.save_async(tmp_path / "a", {"w": 1})
    await multihost.sync_global_processes("key")


def test_several_processes_without_jax_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the service is needed and was not started, the error says what to call."""
    with pytest.raises(errors.MultihostError, match=r"jax\.distributed\.initialize\(\) first"):
        multihost._client()


def test_a_note_of_a_failure_is_short(job_of: JobOf) -> None:
    """A message of a million leaves does not burden the coordination service."""
    job = job_of(2)
    _, other = job.begin_all()
    with pytest.raises(ValueError), other.telling():
        raise ValueError("leaf " * 100_000)
    (note,) = (value for key, value in job.service.values.items() if "/failed/" in key)
    assert len(json.loads(note)["text"]) == 2000
