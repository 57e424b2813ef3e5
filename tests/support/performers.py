"""Checkpointables that save and load themselves, and note it, wait for each other or fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import orbax_async as ocp


class Counter:
    """Saves and loads itself; a list tells when each of its tiers begins and how it ends."""

    def __init__(self, value: int = 0, log: list[str] | None = None, name: str = "") -> None:
        self.value = value
        self.log = [] if log is None else log
        self.name = name

    async def save(self, directory: Any) -> Awaitable[None]:
        self.log.append(f"{self.name}1")
        await asyncio.sleep(0)
        value = self.value

        async def write() -> None:
            self.log.append(f"{self.name}2")
            path = await directory.await_creation()
            (path / "value.txt").write_text(str(value))

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        self.log.append(f"{self.name}1")
        await asyncio.sleep(0)

        async def read() -> None:
            self.log.append(f"{self.name}2")
            self.value = int((directory / "value.txt").read_text())

        return read()


class Meeting:
    """Saves and loads itself; in the tier given it goes on only when all have come there."""

    def __init__(self, tier: int, parties: int) -> None:
        self.tier = tier
        self.barrier = asyncio.Barrier(parties)

    def member(self) -> Meeting:
        twin = object.__new__(Meeting)
        twin.__dict__ = self.__dict__
        return twin

    async def _both(self) -> Awaitable[None]:
        async def second() -> None:
            if self.tier == 2:
                await asyncio.wait_for(self.barrier.wait(), 20)

        if self.tier == 1:
            await asyncio.wait_for(self.barrier.wait(), 20)
        return second()

    async def save(self, directory: Any) -> Awaitable[None]:
        return await self._both()

    async def load(self, directory: Any) -> Awaitable[None]:
        return await self._both()


class Trap:
    """Saves and loads itself; at one place it does what it is told to."""

    def __init__(self, place: str, act: Callable[[], Any]) -> None:
        self.place = place
        self.act = act

    async def _both(self, verb: str) -> Awaitable[None]:
        async def second() -> None:
            if self.place == f"{verb}2":
                result = self.act()
                if asyncio.iscoroutine(result):
                    await result

        if self.place == f"{verb}1":
            result = self.act()
            if asyncio.iscoroutine(result):
                await result
        return second()

    async def save(self, directory: Any) -> Awaitable[None]:
        return await self._both("save")

    async def load(self, directory: Any) -> Awaitable[None]:
        return await self._both("load")


class Patient:
    """Saves and loads itself, and waits in both tiers for a cancellation that it notes."""

    def __init__(self, places: set[str]) -> None:
        self.places = places
        self.ended: list[str] = []

    async def _wait(self, place: str) -> None:
        if place not in self.places:
            return
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.ended.append(place)
            raise

    async def save(self, directory: Any) -> Awaitable[None]:
        await self._wait("save1")
        return self._wait("save2")

    async def load(self, directory: Any) -> Awaitable[None]:
        await self._wait("load1")
        return self._wait("load2")


class Boom(Exception):
    """What a trap raises."""


def boom() -> None:
    """Fails."""
    raise Boom("as told")


@pytest.fixture
def json_named_config() -> Iterator[ocp.Context]:
    """A context, active, in which what is called `config` is JSON."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context.checkpointables.registry = registry
    with context:
        yield context


def notes(error: BaseException) -> str:
    """Returns what an error says, with the notes on it."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])
