"""How trees and other checkpointables are saved and loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Self

from orbax_async import registration
from orbax_async.options._group import OptionGroup


@dataclass(kw_only=True)
class PyTreeMetadataOptions(OptionGroup):
    """What is recorded about the structure of a tree.

    Attributes:
      support_rich_types: whether tuples and namedtuples are recorded as such, not as lists and
        dicts.
    """

    support_rich_types: bool = False


@dataclass(kw_only=True)
class PyTreeOptions(OptionGroup):
    """How trees are saved and loaded, apart from the arrays in them.

    Attributes:
      saving: options of saving.
      loading: options of loading.
    """

    @dataclass(kw_only=True)
    class Saving(OptionGroup):
        """How trees are saved.

        Attributes:
          pytree_metadata_options: what is recorded about the structure.
        """

        pytree_metadata_options: PyTreeMetadataOptions = field(
            default_factory=PyTreeMetadataOptions
        )

    @dataclass(kw_only=True)
    class Loading(OptionGroup):
        """How trees are loaded.

        Attributes:
          partial_load: whether the abstract tree may leave out parts of the stored tree, which
            are then not loaded.
        """

        partial_load: bool = False

    saving: Saving = field(default_factory=Saving)
    loading: Loading = field(default_factory=Loading)


def _registry(name: str, value: Any) -> Any:
    missing = [m for m in ("add", "get", "has", "get_all_entries") if not hasattr(value, m)]
    if missing:
        raise TypeError(f"{name} must be a handler registry, but {value!r} has no {missing[0]!r}")
    return value


@dataclass(kw_only=True)
class CheckpointablesOptions(OptionGroup):
    """Which handlers save and load checkpointables.

    Attributes:
      registry: the handlers to choose from; by default a read-only view of the global registry.
    """

    registry: registration.CheckpointableHandlerRegistry = field(
        default_factory=lambda: registration.ReadOnlyHandlerRegistry(
            registration.global_registry()
        ),
        metadata={"check": _registry},
    )

    @classmethod
    def create_with_handlers(cls, *handlers: Any, **named_handlers: Any) -> Self:
        """Create options whose registry holds further handlers after the global ones.

        Args:
          *handlers: handler classes, or ready handlers, for checkpointables of any name.
          **named_handlers: the same, each for the checkpointable of its keyword only.

        Raises:
          AlreadyExistsError: A handler or a name is registered globally already.
          ValueError: Something given is neither a class nor a handler.
        """
        registry = registration.local_registry()
        for handler in handlers:
            registry.add(handler)
        for name, handler in named_handlers.items():
            registry.add(handler, checkpointable_name=name)
        return cls(registry=registry)

    def copied(self) -> Self:
        """Return a copy with a registry of its own, or with the same view of the global one."""
        twin = super().copied()
        twin.registry = copy.deepcopy(self.registry)
        return twin
