"""Handlers at work: what a user's may do on the engine's loop, and what the built-in ones store."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import struct_pb2, timestamp_pb2
from points import Point, PointHandler, typestrs, using

import orbax_async as ocp
from orbax_async import errors, registration
from orbax_async._engine import loop
from orbax_async.handlers import user_code
from orbax_async.handlers.phases import TYPESTRS

# Users' code on the engine's loop.


def test_handlers_see_the_callers_context(tmp_path: Path) -> None:
    """B6.13: options that are active at the call hold in both phases."""
    seen = []

    class Looking(PointHandler):
        """Notes an option."""

        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            from orbax_async import context

            seen.append(context.current().array.saving.use_ocdbt)
            return self._later()

        async def _later(self) -> None:
            from orbax_async import context

            seen.append(context.current().array.saving.use_ocdbt)

    context = using(Looking)
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2)})
    assert seen == [False, False]


@pytest.mark.leaves_threads
def test_handlers_may_use_asyncio(tmp_path: Path) -> None:
    """`asyncio.to_thread`, `create_task`, `gather`, `sleep` and locks work in both phases."""

    class Busy(PointHandler):
        """Uses what asyncio has."""

        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            text = await asyncio.to_thread(json.dumps, dataclasses.asdict(checkpointable))

            async def write() -> None:
                path = await directory.await_creation()
                async with asyncio.Lock():
                    await asyncio.gather(
                        asyncio.to_thread((path / self.file).write_text, text), asyncio.sleep(0.01)
                    )

            return asyncio.create_task(write())

        async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any:
            return asyncio.ensure_future(self._read(directory))

    with using(Busy):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2)})
        assert ocp.load_checkpointables(tmp_path / "c") == {"p": Point(1, 2)}


def test_a_handler_that_blocks_works_and_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocking in a coroutine is allowed; the log names the handler once, not each time."""

    class Blocking(PointHandler):
        """Takes its time."""

        async def _write(self, directory: Any, text: str) -> None:
            time.sleep(1.5 * user_code._LONG_SECS)  # noqa: ASYNC251 - what it must not do
            await super()._write(directory, text)

    with using(Blocking), caplog.at_level(logging.WARNING):
        for name in "ab":
            ocp.save_checkpointables(tmp_path / name, {"p": Point(1, 2)})
    told = [each for each in caplog.messages if "blocked the engine's loop" in each]
    assert len(told) == 1
    assert told[0].startswith("Blocking.save blocked")
    assert "asyncio.to_thread" in told[0]


def test_waiting_is_not_blocking(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that awaits for long is not told of."""

    class Waiting(PointHandler):
        """Awaits."""

        async def _write(self, directory: Any, text: str) -> None:
            await asyncio.sleep(1.5 * user_code._LONG_SECS)
            await super()._write(directory, text)

    with using(Waiting), caplog.at_level(logging.WARNING):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2)})
    assert not [each for each in caplog.messages if "blocked" in each]


def test_a_handler_must_not_wait_for_the_engine(tmp_path: Path) -> None:
    """A blocking verb inside a handler would never end, and is refused with the reason."""

    class Nested(PointHandler):
        """Saves another checkpoint, blocking."""

        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            ocp.save(tmp_path / "other", {"a": 1})
            return asyncio.sleep(0)

    with using(Nested), pytest.raises(errors.LoopError, match="engine's own thread"):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2)})
    assert list(tmp_path.iterdir()) == []


async def test_awaitables_of_every_kind_are_stepped_through() -> None:
    """What a user's coroutine returns, receives and raises passes through unchanged."""

    async def works() -> int:
        await asyncio.sleep(0)
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, 7)
        return 1 + await future

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("inner")

    async def catches() -> str:
        try:
            await fails()
        except KeyError:
            return "caught"
        raise AssertionError

    class Own:
        """An awaitable that is no coroutine."""

        def __await__(self) -> Any:
            return works().__await__()

    assert await user_code.awaited(works(), "it") == 8
    assert await user_code.awaited(Own(), "it") == 8
    assert await user_code.awaited(asyncio.ensure_future(works()), "it") == 8
    assert await user_code.awaited(catches(), "it") == "caught"
    with pytest.raises(KeyError, match="inner"):
        await user_code.awaited(fails(), "it")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(user_code.awaited(asyncio.sleep(60), "it"), 0.01)


# Built-in handlers.


@pytest.mark.parametrize("value", [{"a": [1, None, {"b": True}]}, [1, 2.5], "text", 7, True, [[]]])
def test_json_values(value: Any, tmp_path: Path) -> None:
    """B10.7: every JSON value comes back; its abstract form and its metadata are None."""
    with using(config=ocp.handlers.JsonHandler):
        ocp.save_checkpointables(tmp_path / "c", {"config": value})
        assert ocp.load_checkpointables(tmp_path / "c") == {"config": value}
        with pytest.raises(errors.AbstractLeafError, match="ask for None"):
            ocp.load_checkpointables(tmp_path / "c", {"config": {}})
    # The checkpoint names the handler, so nothing needs to be bound for loading.
    assert ocp.load_checkpointables(tmp_path / "c", {"config": None}) == {"config": value}
    assert ocp.checkpointables_metadata(tmp_path / "c").metadata == {"config": None}
    with pytest.raises(errors.InvalidLayoutError):
        ocp.load(tmp_path / "c", checkpointable_name="config")


def test_json_becomes_json(tmp_path: Path) -> None:
    """Tuples come back as lists, keys as strings."""
    with using(config=ocp.handlers.JsonHandler):
        ocp.save_checkpointables(tmp_path / "c", {"config": {1: (2, 3)}})
        assert ocp.load_checkpointables(tmp_path / "c") == {"config": {"1": [2, 3]}}


def test_json_under_another_name(tmp_path: Path) -> None:
    """A handler made with a file name uses that one, and finds the older one without."""
    with using(config=ocp.handlers.JsonHandler("metadata")):
        ocp.save_checkpointables(tmp_path / "c", {"config": {"a": 1}})
    assert (tmp_path / "c" / "config" / "metadata").read_text() == '{"a": 1}'
    assert ocp.load_checkpointables(tmp_path / "c") == {"config": {"a": 1}}


def test_protobuf_messages(tmp_path: Path) -> None:
    """A message comes back as its class, which must be given; its metadata is None."""
    message = timestamp_pb2.Timestamp(seconds=5, nanos=7)
    ocp.save_checkpointables(tmp_path / "c", {"when": message, "state": {"a": 1}})
    assert typestrs(tmp_path / "c")["when"] == "ProtoHandler"
    loaded = ocp.load_checkpointables(tmp_path / "c", {"when": timestamp_pb2.Timestamp})
    assert loaded == {"when": message}
    assert ocp.checkpointables_metadata(tmp_path / "c").metadata["when"] is None
    with pytest.raises(ValueError, match="give that as the abstract form") as caught:
        ocp.load_checkpointables(tmp_path / "c")
    assert caught.value.__notes__ == ["checkpointable: 'when'"]
    with pytest.raises(errors.InvalidLayoutError, match="it is no Struct"):
        ocp.load_checkpointables(tmp_path / "c", {"when": struct_pb2.Struct})
    with pytest.raises(registration.NoEntryError, match="ProtoHandler"):
        ocp.load_checkpointables(tmp_path / "c", {"when": message})


def test_protobuf_is_captured_when_the_call_returns(tmp_path: Path) -> None:
    """W24: a message that is changed after the call is saved as it was."""
    message = timestamp_pb2.Timestamp(seconds=5)
    response = ocp.save_checkpointables_async(tmp_path / "c", {"when": message})
    message.seconds = 6
    response.result()
    loaded = ocp.load_checkpointables(tmp_path / "c", {"when": timestamp_pb2.Timestamp})
    assert loaded["when"].seconds == 5


def test_protobuf_is_imported_when_it_is_used(tmp_path: Path) -> None:
    """A program without messages never imports it, whatever it saves and loads."""
    program = f"""
        import sys
        import orbax_async as ocp
        ocp.save_checkpointables({str(tmp_path / "c")!r}, {{"state": {{"a": 1}}, "b": {{"c": 2}}}})
        ocp.load_checkpointables({str(tmp_path / "c")!r})
        assert ocp.handlers.ProtoHandler().is_handleable({{}}) is False
        print(any(name.startswith("google.protobuf") for name in sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kind", TYPESTRS)
def test_built_in_handlers_keep_to_the_protocol(kind: type) -> None:
    """Each is a CheckpointableHandler, made without arguments."""
    assert isinstance(kind(), ocp.CheckpointableHandler)


def test_nothing_is_left_on_the_loop() -> None:
    """What these tests have begun has ended."""
    assert not loop._current().running
