"""Saves that are held at one place, or fail there, for tests of responses and their options."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest
from watched_directory import Fault, before, on, watched

import orbax_async as ocp
from orbax_async._commit import sequence
from orbax_async._storage.local import opened_by
from orbax_async.handlers.pytree import PyTreeHandler

STATE = {"a": np.arange(1000), "b": 1}


class Gate:
    """Holds a save at one place until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def open(self) -> None:
        """Lets what waits go on."""
        self.opened.set()

    async def wait(self) -> None:
        """Waits on the engine's loop; can be cancelled."""
        self.reached.set()
        while not self.opened.is_set():  # noqa: ASYNC110 - opened from another thread
            await anyio.sleep(0.002)


@pytest.fixture
def before_commit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Holds every save when its data is written and nothing is durable yet."""
    gate = Gate()
    original = sequence.Save._make_durable

    async def held(self: sequence.Save) -> None:
        await gate.wait()
        await original(self)

    monkeypatch.setattr(sequence.Save, "_make_durable", held)
    yield gate
    gate.open()


@pytest.fixture
def at_commit() -> Iterator[Gate]:
    """Holds a save once it has passed its commit point, when it takes its name."""
    gate = Gate()

    def hold() -> None:
        gate.reached.set()
        gate.opened.wait(30)

    with opened_by(watched(before(on("rename", "exchange"), hold))):
        yield gate
    gate.open()


@pytest.fixture
def before_staging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Holds every save before it captures anything."""
    gate = Gate()
    original = PyTreeHandler.save

    async def held(self: PyTreeHandler, *args: Any) -> Any:
        await gate.wait()
        return await original(self, *args)

    monkeypatch.setattr(PyTreeHandler, "save", held)
    yield gate
    gate.open()


@pytest.fixture
def failing() -> Iterator[None]:
    """Makes every save fail when it should become durable."""
    with opened_by(watched(Fault(errno.ENOSPC, on("sync"), times=None))):
        yield


def with_async(**asynchronous: Any) -> ocp.Context:
    """Returns a context with some options of the background part."""
    context = ocp.Context()
    for name, value in asynchronous.items():
        setattr(context.asynchronous, name, value)
    return context
