"""The two phases of all checkpointables of an operation: concurrent, and with one end for all.

The first failure cancels the others, and disposes of second phases that will not be awaited any
more. It leaves with a note that names its checkpointable; its class and message stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple

import anyio

from orbax_async import errors
from orbax_async.handlers import user_code

__all__ = ["Phase", "first", "naming", "second"]


class Phase(NamedTuple):
    """One phase of one checkpointable."""

    name: str
    begin: Callable[[], Any]  # returns what is to be awaited
    code: str | None  # what users call the code behind it, "PointHandler.save"; None for our own


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Notes a checkpointable's name on an error that leaves the block."""
    try:
        yield
    except Exception as error:
        if name:  # a flat, older checkpoint has none
            error.add_note(f"checkpointable: {name!r}")
        raise


async def first(
    phases: Iterable[Phase], *, when_done: Callable[[str], None] = lambda name: None
) -> dict[str, Phase]:
    """Runs the first phases, tells of each that has ended well, and returns the second ones."""
    second_phases: dict[str, Phase] = {}

    async def run(phase: Phase) -> None:
        name, begin, code = phase
        with naming(name):
            if code is None:
                awaitable = await begin()
            else:
                awaitable = user_code.checked(await user_code.awaited(begin(), code), code)
        second_phases[name] = Phase(name, lambda: awaitable, code)
        when_done(name)

    phases = list(phases)
    await _run_all(run, phases, unused=second_phases)
    return {name: second_phases[name] for name, _, _ in phases}


async def second(phases: dict[str, Phase]) -> dict[str, Any]:
    """Runs the second phases, and returns their results in the same order."""
    results = dict[str, Any].fromkeys(phases)
    not_begun = dict(phases)

    async def run(phase: Phase) -> None:
        name, begin, code = not_begun.pop(phase.name)
        with naming(name):
            awaitable = begin()
            results[name] = await (
                awaitable if code is None else user_code.awaited(awaitable, code)
            )

    await _run_all(run, list(phases.values()), unused=not_begun)
    return results


async def _run_all(
    run: Callable[[Phase], Coroutine[Any, Any, None]],
    phases: list[Phase],
    *,
    unused: dict[str, Phase],
) -> None:
    """Runs phases concurrently; after a failure it disposes of the `unused` second ones."""
    try:
        if len(phases) == 1:  # the usual case needs no task of its own
            await run(phases[0])
            return
        with errors.ungrouped():
            async with anyio.create_task_group() as group:
                for phase in phases:
                    group.start_soon(run, phase)
    except BaseException:
        with anyio.CancelScope(shield=True):
            for phase in unused.values():
                await user_code.dispose(phase.begin())
        raise
