"""Both tiers of all checkpointables of an operation: concurrent, and with one end for all.

The first failure cancels the others, and disposes of second tiers that will not be awaited any
more. It leaves with a note that names its checkpointable; its class and message stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import anyio

from orbax_async import errors
from orbax_async.handlers import foreign

__all__ = ["Tier", "first", "naming", "second"]


class Tier(NamedTuple):
    """One tier of one checkpointable.

    Attributes:
      name: the checkpointable's.
      begin: returns what is to be awaited.
      code: what a user calls the code behind it, "PointHandler.save"; None for code of ours.
    """

    name: str
    begin: Callable[[], Any]
    code: str | None

    async def run(self) -> Any:
        """Awaits it."""
        with naming(self.name):
            awaitable = self.begin()
            if self.code is None:
                return await awaitable
            return await foreign.awaited(awaitable, self.code)


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
    tiers: Sequence[Tier], *, when_done: Callable[[str], None] = lambda name: None
) -> list[Tier]:
    """Runs the first tiers, and returns the second ones.

    Args:
      tiers: of all checkpointables.
      when_done: called with the name of each that has ended well.

    Raises:
      HandlerError: a handler does not keep to its protocol.
      Exception: what a handler raised.
    """
    seconds: dict[str, Tier] = {}

    async def run(tier: Tier) -> None:
        awaitable = await tier.run()
        if tier.code is not None:
            with naming(tier.name):
                foreign.checked(awaitable, tier.code)
        seconds[tier.name] = Tier(tier.name, lambda: awaitable, tier.code)
        when_done(tier.name)

    try:
        await _all(run, tiers)
    except BaseException:
        await _dispose(seconds.values())
        raise
    return [seconds[tier.name] for tier in tiers]


async def second(tiers: Sequence[Tier]) -> dict[str, Any]:
    """Runs the second tiers, and returns their results by name.

    Raises:
      Exception: what a handler raised.
    """
    results: dict[str, Any] = {}
    not_begun = {tier.name: tier for tier in tiers}

    async def run(tier: Tier) -> None:
        results[tier.name] = await not_begun.pop(tier.name).run()

    try:
        await _all(run, tiers)
    except BaseException:
        await _dispose(not_begun.values())
        raise
    return {tier.name: results[tier.name] for tier in tiers}


async def _all(run: Callable[[Tier], Coroutine[Any, Any, None]], tiers: Sequence[Tier]) -> None:
    if len(tiers) == 1:  # the usual case needs no task of its own
        await run(tiers[0])
        return
    with errors.ungrouped():
        async with anyio.create_task_group() as group:
            for tier in tiers:
                group.start_soon(run, tier)


async def _dispose(tiers: Iterable[Tier]) -> None:
    with anyio.CancelScope(shield=True):
        for tier in tiers:
            await foreign.dispose(tier.begin())
