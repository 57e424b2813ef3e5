"""Orbax's guide to customization: objects that save themselves, and handlers, in both libraries.

The classes name the protocols of either library, as code that was written for Orbax does; each
is used with both. Handlers of leaves, a further guide, have gone from the public names.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import aiofiles
import jax
import numpy as np
import pytest
from equality import assert_same
from guide import EITHER, LIBRARIES
from orbax.checkpoint import v1

import orbax_async as ocp


@dataclasses.dataclass
class Range:
    """An object that neither library knows."""

    low: int | float
    high: int | float


@dataclasses.dataclass
class AbstractRange:
    """Says as what the bounds of a range are loaded."""

    low: type
    high: type


def tree() -> dict[str, Any]:
    """Returns a state to save beside the objects."""
    return {"params": np.arange(6, dtype=np.float32), "moments": np.ones(6)}


async def write(file: Path, content: Any) -> None:
    """Writes JSON with the library that the guide uses."""
    async with aiofiles.open(file, "w") as stream:
        await stream.write(json.dumps(content))


async def read(file: Path) -> Any:
    """Reads JSON likewise."""
    async with aiofiles.open(file) as stream:
        return json.loads(await stream.read())


class _SavesItself(Range):
    async def save(self, directory: Any) -> Awaitable[None]:
        return self._write(directory, dataclasses.asdict(self))

    async def load(self, directory: Any) -> Awaitable[None]:
        return self._read(directory)

    async def _write(self, directory: Any, content: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            await write(await directory.await_creation() / "range.txt", content)

    async def _read(self, directory: Any) -> None:
        content = await read(directory / "range.txt")
        self.low, self.high = content["low"], content["high"]


class OursStateful(_SavesItself, ocp.StatefulCheckpointable):
    """Names the protocol of ours."""


class OrbaxStateful(_SavesItself, v1.StatefulCheckpointable):
    """Names the protocol of Orbax."""


class RangeHandler:
    """Saves ranges, with metadata that is cheap to read; casts what it loads."""

    file: ClassVar[str] = "range.txt"

    async def save(self, directory: Any, checkpointable: Range) -> Awaitable[None]:
        return self._write(directory, dataclasses.asdict(checkpointable))

    async def load(
        self, directory: Any, abstract_checkpointable: AbstractRange | None = None
    ) -> Awaitable[Range]:
        return self._read(directory, abstract_checkpointable)

    async def metadata(self, directory: Any) -> AbstractRange:
        types = {"int": int, "float": float}
        content = await read(directory / "types.txt")
        return AbstractRange(**{name: types[value] for name, value in content.items()})

    def is_handleable(self, checkpointable: Any) -> bool:
        return isinstance(checkpointable, Range)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        return isinstance(abstract_checkpointable, AbstractRange)

    async def _write(self, directory: Any, content: dict[str, Any]) -> None:
        path = await directory.await_creation()
        types = {name: type(value).__name__ for name, value in content.items()}
        await asyncio.gather(write(path / self.file, content), write(path / "types.txt", types))

    async def _read(self, directory: Any, wanted: AbstractRange | None) -> Range:
        content = await read(directory / self.file)
        if wanted is None:
            return Range(**content)
        return Range(wanted.low(content["low"]), wanted.high(content["high"]))


class OursHandler(RangeHandler, ocp.CheckpointableHandler[Range, AbstractRange]):
    """Names the protocol of ours."""


class OrbaxHandler(RangeHandler, v1.CheckpointableHandler[Range, AbstractRange]):
    """Names the protocol of Orbax."""


class RenamedHandler(RangeHandler):
    """The same handler, after a refactoring."""


class OtherFileHandler(RangeHandler):
    """Another way to save the same objects."""

    file: ClassVar[str] = "other.txt"


HANDLERS = pytest.mark.parametrize("handler", [RangeHandler, OursHandler, OrbaxHandler])


def knowing(library: ModuleType, *handlers: type, **named: type) -> Any:
    """Returns a context with handlers of its own."""
    registry = library.handlers.local_registry()
    for handler in handlers:
        registry.add(handler)
    for name, handler in named.items():
        registry.add(handler, checkpointable_name=name)
    context = library.Context()
    context.checkpointables.registry = registry
    return context


@EITHER
def test_an_object_nobody_knows(library: ModuleType, tmp_path: Path) -> None:
    """The save fails with the object's name and type, and nothing is written."""
    with pytest.raises(KeyError, match=r"limits[\s\S]*Range"):
        library.save_checkpointables(tmp_path / "c", {"model": tree(), "limits": Range(1, 2)})
    assert list(tmp_path.iterdir()) == []


# Objects that save themselves.


@EITHER
@pytest.mark.parametrize("kind", [OursStateful, OrbaxStateful])
@pytest.mark.parametrize("by", ["functions", "checkpointer"])
def test_a_stateful_object(library: ModuleType, kind: type, by: str, tmp_path: Path) -> None:
    """It is saved without any registration, and loaded into the object that is handed over."""
    assert isinstance(kind(0, 0), library.StatefulCheckpointable)
    objects = {"model": tree(), "limits": kind(-1, 2.5)}
    blank = kind(0, 0)
    if by == "functions":
        library.save_checkpointables(tmp_path / "c", objects)
        loaded = library.load_checkpointables(tmp_path / "c", {"limits": blank})
    else:
        with library.training.Checkpointer(tmp_path / "c") as checkpointer:
            checkpointer.save_checkpointables(0, objects)
            loaded = checkpointer.load_checkpointables(0, {"limits": blank})
    assert loaded["limits"] is blank
    assert loaded.keys() == {"limits"}
    assert (blank.low, blank.high) == (-1, 2.5)


@EITHER
def test_a_stateful_object_is_captured(library: ModuleType, tmp_path: Path) -> None:
    """What its first phase copies is saved, though the object changes before it is written."""
    moving = OursStateful(1, 2)
    response = library.save_checkpointables_async(tmp_path / "c", {"limits": moving})
    moving.low = 99
    response.result()
    blank = OursStateful(0, 0)
    library.load_checkpointables(tmp_path / "c", {"limits": blank})
    assert (blank.low, blank.high) == (1, 2)


@EITHER
def test_a_stateful_object_needs_an_object(library: ModuleType, tmp_path: Path) -> None:
    """Nothing can be loaded into nothing: an error, by which the rest is not affected."""
    library.save_checkpointables(tmp_path / "c", {"model": tree(), "limits": OursStateful(1, 2)})
    with pytest.raises(ValueError, match=r"(?i)instance|object"):
        library.load_checkpointables(tmp_path / "c", {"limits": None})
    assert_same(library.load_checkpointables(tmp_path / "c", {"model": None})["model"], tree())


# Handlers.


@EITHER
@HANDLERS
@pytest.mark.parametrize("by", ["functions", "checkpointer"])
def test_a_handler(library: ModuleType, handler: type, by: str, tmp_path: Path) -> None:
    """All comes back as saved, by itself cast as asked, and described without being loaded."""
    objects = {"model": tree(), "limits": Range(1, 2.4)}
    with knowing(library, handler):
        if by == "functions":
            library.save_checkpointables(tmp_path / "c", objects)
            path = tmp_path / "c"
        else:
            with library.training.Checkpointer(tmp_path / "run") as checkpointer:
                checkpointer.save_checkpointables(3, objects)
            path = tmp_path / "run" / "3"
    # In a block of its own: Orbax's Checkpointer ends the block it was used in (W23).
    with knowing(library, handler):
        loaded = library.load_checkpointables(path)
        assert loaded["limits"] == Range(1, 2.4)
        assert_same(loaded["model"], tree())
        cast = library.load_checkpointables(path, {"limits": AbstractRange(float, int)})
        assert repr(cast) == "{'limits': Range(low=1.0, high=2)}"
        form = library.checkpointables_metadata(path).metadata["limits"]
        assert form == AbstractRange(int, float)
        assert library.load_checkpointables(path, {"limits": form})["limits"] == Range(1, 2.4)


@EITHER
def test_without_the_handler(library: ModuleType, tmp_path: Path) -> None:
    """Where the handler is not known, the rest can be loaded, and the object not described."""
    with knowing(library, RangeHandler):
        library.save_checkpointables(tmp_path / "c", {"model": tree(), "limits": Range(1, 2)})
    with pytest.raises(KeyError):
        library.load_checkpointables(tmp_path / "c")
    assert_same(library.load_checkpointables(tmp_path / "c", {"model": None}), {"model": tree()})
    assert library.checkpointables_metadata(tmp_path / "c").metadata["limits"] is None


@pytest.fixture
def globally(library: ModuleType) -> Iterator[ModuleType]:
    """The handlers of a library, whose global registry is as it was afterwards."""
    registry = library.handlers.global_registry()
    before = list(registry._entries) if library is ocp else list(registry._registry)
    yield library.handlers
    (registry._entries if library is ocp else registry._registry)[:] = before


@EITHER
def test_a_handler_for_everybody(library: ModuleType, globally: ModuleType, tmp_path: Path) -> None:
    """Registered globally, also as a decorator, it needs no context."""

    @globally.register_handler
    class EverybodysHandler(RangeHandler):
        """Registered where it is defined."""

    assert EverybodysHandler in {kind for kind, _ in globally.global_registry().get_all_entries()}
    library.save_checkpointables(tmp_path / "c", {"limits": Range(3, 4)})
    assert library.load_checkpointables(tmp_path / "c") == {"limits": Range(3, 4)}
    with library.Context():
        assert library.load_checkpointables(tmp_path / "c") == {"limits": Range(3, 4)}


@EITHER
def test_the_newest_handler_is_asked_first(library: ModuleType, tmp_path: Path) -> None:
    """Of those that could save an object, the one that was added last does."""
    with knowing(library, RangeHandler, OtherFileHandler):
        library.save_checkpointables(tmp_path / "c", {"limits": Range(1, 2)})
        assert (tmp_path / "c" / "limits" / "other.txt").exists()
    with knowing(library, OtherFileHandler, RangeHandler):
        # What saved it is recorded, and goes before what was added last.
        assert library.load_checkpointables(tmp_path / "c") == {"limits": Range(1, 2)}


@EITHER
def test_a_handler_for_a_name(library: ModuleType, tmp_path: Path) -> None:
    """A handler with a name serves that name, before all others, and no other name."""
    with knowing(library, RangeHandler, other=OtherFileHandler):
        objects = {"limits": Range(1, 2), "other": Range(3, 4)}
        library.save_checkpointables(tmp_path / "c", objects)
        assert library.load_checkpointables(tmp_path / "c") == objects
    files = {name: {path.name for path in (tmp_path / "c" / name).iterdir()} for name in objects}
    assert files["limits"] == {"range.txt", "types.txt"}
    assert files["other"] == {"other.txt", "types.txt"}


@EITHER
def test_a_handler_that_was_renamed(library: ModuleType, tmp_path: Path) -> None:
    """Old checkpoints load with a handler that answers to the recorded name."""
    with knowing(library, RangeHandler):
        library.save_checkpointables(tmp_path / "c", {"limits": Range(1, 2)})
    registry = library.handlers.local_registry()
    registry.add(
        RenamedHandler,
        secondary_typestrs=[f"{RangeHandler.__module__}.{RangeHandler.__qualname__}"],
    )
    context = library.Context()
    context.checkpointables.registry = registry
    with context:
        assert library.load_checkpointables(tmp_path / "c") == {"limits": Range(1, 2)}
    assert len(registry.get_secondary_typestrs(RenamedHandler)) == 1


@EITHER
def test_registries(library: ModuleType) -> None:
    """With the global entries or without; each kind once, each name once; the default is fixed."""
    handlers = library.handlers
    empty = handlers.local_registry(include_global_registry=False)
    assert empty.get_all_entries() == []
    assert len(handlers.local_registry().get_all_entries()) >= 5
    assert empty.add(RangeHandler) is empty
    with pytest.raises(ValueError, match="RangeHandler"):
        empty.add(RangeHandler)
    empty.add(RangeHandler, checkpointable_name="limits")
    assert empty.has("limits")
    assert empty.get("limits") is RangeHandler
    with pytest.raises(KeyError, match="other"):
        empty.get("other")
    with pytest.raises(NotImplementedError):
        library.Context().checkpointables.registry.add(RangeHandler)
    combined = handlers.local_registry(empty)
    assert combined.has("limits")
    assert not handlers.global_registry().has("limits")


@EITHER
@pytest.mark.parametrize("name", ["RangeHandler", "OrbaxHandler"])
def test_written_by_one_read_by_the_other(library: ModuleType, name: str, tmp_path: Path) -> None:
    """One handler class serves both libraries, and each reads what the other wrote with it."""
    handler = globals()[name]
    with knowing(library, handler):
        library.save_checkpointables(tmp_path / "c", {"model": tree(), "limits": Range(5, 6.5)})
    for reader in LIBRARIES.values():
        with knowing(reader, handler):
            loaded = reader.load_checkpointables(tmp_path / "c")
        assert loaded["limits"] == Range(5, 6.5)
        assert_same(loaded["model"], tree())


def test_handlers_given_as_objects_here(tmp_path: Path) -> None:
    """The older documentation hands over ready handlers, and names by position; ours takes both."""
    options = ocp.options.CheckpointablesOptions.create_with_handlers(
        RangeHandler(), other=OtherFileHandler()
    )
    objects = {"limits": Range(1, 2), "other": Range(3, 4)}
    with ocp.Context(checkpointables_options=options):
        ocp.save_checkpointables(tmp_path / "c", objects)
        assert ocp.load_checkpointables(tmp_path / "c") == objects
    registry = ocp.handlers.local_registry()
    registry.add(RangeHandler)
    registry.add(OtherFileHandler, "other")
    context = ocp.Context()
    context.checkpointables.registry = registry
    with context:
        assert ocp.load_checkpointables(tmp_path / "c") == objects
