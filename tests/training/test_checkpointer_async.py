"""The Checkpointer from coroutines, on asyncio and uvloop; in threads; and as in a notebook."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from runs import WAIT_SECS, Gate, on_disk, state, steps

import orbax_async as ocp
from orbax_async import errors
from orbax_async.training import Checkpointer
from orbax_async.training import preservation_policies as keep


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run's directory."""
    return tmp_path / "run"


async def until(condition: Callable[[], Any]) -> None:
    """Waits for something that happens in the background."""
    with anyio.fail_after(WAIT_SECS):
        while not condition():  # noqa: ASYNC110 - it is not a loop's
            await anyio.sleep(0.002)


async def test_a_run_is_saved_and_loaded(run: Path) -> None:
    """Every response can be awaited, and the block waits for what it began."""
    async with Checkpointer(run) as checkpointer:
        response = checkpointer.save_async(0, state(0), metrics={"loss": 1}, force=True)
        assert isinstance(response, ocp.AsyncResponse)
        assert await response is True
        assert checkpointer.latest is not None
        assert checkpointer.latest.metrics == {"loss": 1}
        assert (await checkpointer.load_async())["step"] == 0
        template = {"w": np.zeros(4), "step": 0}
        assert (await checkpointer.load_async(0, template))["w"].dtype == np.float64
        several = checkpointer.save_checkpointables_async(1, {"a": state(1), "b": state(2)})
        assert several is not None
        await several.staged()
        assert await several is True
        loaded = await checkpointer.load_checkpointables_async(1, {"b": None})
        assert loaded["b"]["step"] == 2
        assert (await checkpointer.load_checkpointables_async()).keys() == {"a", "b"}
        assert (await checkpointer.load_async(1, checkpointable_name="a"))["step"] == 1
        checkpointer.save_async(2, state(2))
    assert steps(checkpointer) == on_disk(run) == [0, 1, 2]


async def test_every_response_is_of_its_own_save(run: Path) -> None:
    """Saves that overlap end one by one, each with its own result."""
    gates = [Gate() for _ in range(3)]
    failure = RuntimeError("no room")
    gates[1] = Gate(failure=failure)
    async with Checkpointer(run, max_saves_in_flight=3) as checkpointer:
        responses = [
            checkpointer.save_checkpointables_async(step, {"gate": gate})
            for step, gate in enumerate(gates)
        ]
        assert [response is not None and response.done() for response in responses] == [False] * 3
        for gate in gates:
            gate.open()
        results = await asyncio.gather(*map(_awaited, responses), return_exceptions=True)
        assert results == [True, failure, True]
    assert steps(checkpointer) == [0, 2]


async def _awaited(response: Awaitable[Any] | None) -> Any:
    assert response is not None
    return await response


async def test_waiting_leaves_the_loop_alone(run: Path) -> None:
    """While `wait_async`, `ready` and `aclose` wait, the caller's loop goes on."""
    for name in ("wait_async", "ready", "aclose"):
        checkpointer = Checkpointer(run / name)
        gate = Gate()
        checkpointer.save_checkpointables_async(0, {"gate": gate})
        async with anyio.create_task_group() as group:
            waited = anyio.Event()

            async def wait(name: str = name, waited: anyio.Event = waited) -> None:
                await getattr(checkpointer, name)()  # noqa: B023
                waited.set()

            group.start_soon(wait)
            await until(gate.reached.is_set)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            assert not waited.is_set()
            gate.open()
            with anyio.fail_after(WAIT_SECS):
                await waited.wait()
        assert steps(checkpointer) == [0]
        await checkpointer.aclose()


async def test_a_trainer_waits_for_room(run: Path) -> None:
    """With `ready` before each save, none is skipped, and no loop is blocked."""
    async with Checkpointer(run, max_saves_in_flight=2) as checkpointer:
        for step in range(6):
            await checkpointer.ready()
            assert checkpointer.save_async(step, state(step)) is not None
    assert steps(checkpointer) == list(range(6))


async def test_cancelling_who_waits_cancels_no_save(run: Path) -> None:
    """A task that gives up waiting leaves the save, and the others who wait, alone."""
    gate = Gate()
    async with Checkpointer(run) as checkpointer:
        response = checkpointer.save_checkpointables_async(0, {"gate": gate})
        for wait in (checkpointer.wait_async, checkpointer.ready):
            with anyio.move_on_after(0.01) as scope:
                await wait()
            assert scope.cancelled_caught
        gate.open()
        assert await _awaited(response) is True
    assert steps(checkpointer) == [0]


async def test_cancelling_a_save(run: Path) -> None:
    """W19: a cancelled save raises, and that it was is no error of a later call."""
    async with Checkpointer(run) as checkpointer:
        gate = Gate()
        response = checkpointer.save_checkpointables_async(0, {"gate": gate})
        await until(gate.reached.is_set)
        assert checkpointer.cancel() is True
        with pytest.raises(errors.OperationCancelledError):
            await _awaited(response)
        await checkpointer.wait_async()
        assert not checkpointer.is_saving_in_progress()
    assert on_disk(run) == []


@pytest.mark.parametrize("name", ["wait_async", "aclose"])
async def test_a_failure_that_nobody_asked_for(name: str, run: Path) -> None:
    """B13.20, W20: `wait_async` and `aclose` tell of it, once."""
    checkpointer = Checkpointer(run)
    gate = Gate(is_open=True, failure=RuntimeError("no room"))
    response = checkpointer.save_checkpointables_async(0, {"gate": gate})
    assert response is not None
    await until(response.done)
    with pytest.raises(RuntimeError, match="no room"):
        await getattr(checkpointer, name)()
    await checkpointer.wait_async()
    await checkpointer.aclose()


async def test_a_block_that_fails_beside_a_save(run: Path) -> None:
    """The block's own error comes out of `async with`, with a note on the save's."""
    with pytest.raises(ZeroDivisionError) as caught:
        async with Checkpointer(run) as checkpointer:
            gate = Gate(is_open=True, failure=RuntimeError("no room"))
            checkpointer.save_checkpointables_async(0, {"gate": gate})
            raise ZeroDivisionError
    assert any("no room" in note for note in caught.value.__notes__)
    with pytest.raises(errors.ClosedError):
        async with checkpointer:
            pass


async def test_old_steps_go_while_the_loop_goes_on(run: Path) -> None:
    """Retention and deletion from coroutines: what is kept is listed, and all that is there."""
    async with Checkpointer(run, preservation_policy=keep.LatestN(2)) as checkpointer:
        for step in range(5):
            await _awaited(checkpointer.save_async(step, state(step)))
            await checkpointer.wait_async()
            assert steps(checkpointer) == on_disk(run) == [max(0, step - 1), step][-step - 1 :]
        assert await checkpointer.delete_async(3) is True
        assert await checkpointer.delete_async(3, missing_ok=True) is False
    assert [path.name for path in run.iterdir()] == ["4"]


CALLS: dict[str, Callable[[Checkpointer], Any]] = {
    "save": lambda checkpointer: checkpointer.save(1, state(1)),
    "save_checkpointables": lambda checkpointer: checkpointer.save_checkpointables(
        1, {"a": state(1)}
    ),
    "load": lambda checkpointer: checkpointer.load(0)["step"] == 0,
    "load_checkpointables": lambda checkpointer: checkpointer.load_checkpointables(0)["state"],
    "metadata": lambda checkpointer: checkpointer.metadata().metrics == [1],
    "checkpointables_metadata": lambda checkpointer: (
        checkpointer.checkpointables_metadata(0).metadata
    ),
    "root_metadata": lambda checkpointer: checkpointer.root_metadata().custom_metadata == {"a": 1},
    "should_save": lambda checkpointer: checkpointer.should_save(1),
    "latest": lambda checkpointer: checkpointer.latest.step == 0,
    "checkpoints": lambda checkpointer: len(checkpointer.checkpoints) == 1,
    "metrics": lambda checkpointer: checkpointer.checkpoints[0].metrics == [1],
    "directory": lambda checkpointer: checkpointer.directory.name == "run",
    "reload": lambda checkpointer: checkpointer.reload() is None,
    "delete": lambda checkpointer: checkpointer.delete(0),
    "cancel": lambda checkpointer: checkpointer.cancel() is False,
    "is_saving_in_progress": lambda checkpointer: not checkpointer.is_saving_in_progress(),
    "wait": lambda checkpointer: checkpointer.wait() is None,
    "close": lambda checkpointer: checkpointer.close() is None,
}


@pytest.mark.parametrize("name", CALLS)
async def test_plain_methods_under_a_running_loop(name: str, run: Path) -> None:
    """As in a notebook: what blocks works in a coroutine too, though the loop waits for it."""
    with Checkpointer(run, custom_metadata={"a": 1}) as checkpointer:
        checkpointer.save(0, state(0), metrics=[1])
        checkpointer.reload()
        assert CALLS[name](checkpointer)


@pytest.mark.parametrize("name", CALLS)
async def test_plain_methods_in_a_worker_thread(name: str, run: Path) -> None:
    """The same in a thread, while the loop goes on."""
    with Checkpointer(run, custom_metadata={"a": 1}) as checkpointer:
        checkpointer.save(0, state(0), metrics=[1])
        assert await asyncio.to_thread(CALLS[name], checkpointer)


async def test_a_server_loads_while_a_trainer_saves(run: Path) -> None:
    """One Checkpointer, one loop: steps are loaded and listed while others are saved and go."""
    served: list[int] = []
    async with Checkpointer(
        run, preservation_policy=keep.LatestN(3), max_saves_in_flight=2
    ) as checkpointer:
        await _awaited(checkpointer.save_async(0, state(0)))
        is_over = False

        async def serve() -> None:
            while not is_over:
                loaded = await checkpointer.load_async()
                assert loaded["w"].tolist() == [loaded["step"]] * 4
                served.append(loaded["step"])

        async with anyio.create_task_group() as group:
            group.start_soon(serve)
            for step in range(1, 15):
                await checkpointer.ready()
                checkpointer.save_async(step, state(step))
            await checkpointer.wait_async()
            is_over = True
    assert served == sorted(served)
    assert steps(checkpointer) == on_disk(run) == [12, 13, 14]


async def test_nothing_waits_on_the_engine_itself(run: Path) -> None:
    """A call that would block the engine's own thread is refused, not hung."""
    refused: list[BaseException] = []
    checkpointer = Checkpointer(run)

    class Reckless(Gate):
        async def _write(self, directory: Any) -> None:
            await directory.await_creation()
            for call in (
                checkpointer.wait,
                checkpointer.close,
                lambda: checkpointer.save(1, state(1), force=True),
            ):
                try:
                    call()
                except errors.LoopError as error:
                    refused.append(error)

    response = checkpointer.save_checkpointables_async(0, {"gate": Reckless()})
    assert await _awaited(response) is True
    assert len(refused) == 3
    assert threading.current_thread() is threading.main_thread()
    assert checkpointer.save(1, state(1)) is True
    await checkpointer.aclose()
