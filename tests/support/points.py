"""An object of a user's, the handler for it, and contexts that have such handlers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import orbax_async as ocp


@dataclasses.dataclass
class Point:
    """An object that no built-in handler takes."""

    x: float
    y: float


class AbstractPoint:
    """Asks for a point."""


class PointHandler:
    """As users write them for Orbax: JSON written where the coroutine stands."""

    file = "point.json"

    async def save(
        self, directory: ocp.path.PathAwaitingCreation, checkpointable: Point
    ) -> Awaitable[None]:
        return self._write(directory, json.dumps(dataclasses.asdict(checkpointable)))

    async def _write(self, directory: ocp.path.PathAwaitingCreation, text: str) -> None:
        path = await directory.await_creation()
        (path / self.file).write_text(text)

    async def load(
        self, directory: ocp.path.Path, abstract_checkpointable: AbstractPoint | None = None
    ) -> Awaitable[Point]:
        return self._read(directory)

    async def _read(self, directory: ocp.path.Path) -> Point:
        return Point(**json.loads((directory / self.file).read_text()))

    async def metadata(self, directory: ocp.path.Path) -> AbstractPoint:
        return AbstractPoint()

    def is_handleable(self, checkpointable: Any) -> bool:
        return isinstance(checkpointable, Point)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        return isinstance(abstract_checkpointable, AbstractPoint)


def using(*handlers: Any, alone: bool = False, **bound: Any) -> ocp.Context:
    """Returns a context whose registry has further handlers."""
    registry = ocp.handlers.local_registry(include_global_registry=not alone)
    for handler in handlers:
        registry.add(handler)
    for name, handler in bound.items():
        registry.add(handler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def typestrs(path: Path) -> dict[str, str]:
    """Returns the handlers that a checkpoint names."""
    document = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    return {name: typestr.rsplit(".", 1)[1] for name, typestr in document["item_handlers"].items()}
