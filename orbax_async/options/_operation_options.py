"""How an operation runs, and what it does with trees and other checkpointables."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from typing import Any, Literal, Self

from orbax_async import registration
from orbax_async.options._group import (
    FROM_0,
    Freeze,
    OptionGroup,
    each,
    function,
    instance_of,
    number,
    one_of,
    option,
    optional,
)


class AsyncOptions(OptionGroup):
    """How a save runs in the background.

    Attributes:
      timeout_secs: seconds for the background part of a save, after which it fails with
        `OperationTimeoutError`; zero or less fails at once, None means no limit. 20 minutes.
        Several processes wait for one another at most four fifths of it, or 16 minutes.
      post_finalization_callback: called without arguments after each commit, before the response
        is done; what it raises, the response raises. None means no call.
      create_directories_asynchronously: whether `save_async` may return before the temporary
        directory exists.
      staging: `'eager'` captures every value before `save_async` returns; `'lazy'` returns at once
        and captures in the background, and the caller promises to leave the values as they are
        until the response is `staged`.
      exit_grace_secs: seconds that the end of the interpreter waits for running saves to commit
        before it gives them up and says so on stderr.
    """

    timeout_secs: float | None = option(default=1200, check=optional(number()))
    post_finalization_callback: Callable[[], None] | None = option(default=None, check=function)
    create_directories_asynchronously: bool = True
    staging: Literal["eager", "lazy"] = option(default="eager", check=one_of("eager", "lazy"))
    exit_grace_secs: float = option(default=5.0, check=number(at_least=0))


class MultiprocessingOptions(OptionGroup):
    """Which processes take part, and how they meet.

    Attributes:
      primary_host: index of the process that creates directories, writes metadata and commits;
        None makes every process primary, each with storage of its own, which a save of several
        processes refuses in this version. Process 0.
      active_processes: indices of the processes that call the operation; None means all.
      barrier_sync_key_prefix: put before the name of each barrier, to keep apart operations that
        different subsets of processes run at the same time; None means no prefix.
    """

    primary_host: int | None = option(default=0, check=optional(FROM_0))
    active_processes: set[int] | None = option(default=None, check=each(FROM_0, set))
    barrier_sync_key_prefix: str | None = option(default=None, check=instance_of(str))


class CheckpointingImpl(enum.Enum):
    """The ways to checkpoint on Pathways."""

    COLOCATED_PYTHON = 1
    PERSISTENCE = 2
    NO_DISPATCHER = 3


class PathwaysOptions(OptionGroup):
    """How checkpointing works on Pathways.

    Attributes:
      checkpointing_impl: the way to use; None chooses by what the backend offers.
    """

    checkpointing_impl: CheckpointingImpl | None = option(
        default=None, check=instance_of(CheckpointingImpl)
    )


class PyTreeMetadataOptions(OptionGroup):
    """What is recorded about the structure of a tree.

    Attributes:
      support_rich_types: whether tuples and namedtuples are recorded as such, not as lists and
        dicts.
    """

    support_rich_types: bool = False


class PyTreeOptions(OptionGroup):
    """How trees are saved and loaded, apart from the arrays in them.

    Attributes:
      saving: options of saving.
      loading: options of loading.
    """

    class Saving(OptionGroup):
        """How trees are saved.

        Attributes:
          pytree_metadata_options: what is recorded about the structure.
        """

        pytree_metadata_options: PyTreeMetadataOptions = option(
            default_factory=PyTreeMetadataOptions
        )

    class Loading(OptionGroup):
        """How trees are loaded.

        Attributes:
          partial_load: whether the abstract tree may leave out parts of the stored tree, which
            are then not loaded.
        """

        partial_load: bool = False

    saving: Saving = option(default_factory=Saving)
    loading: Loading = option(default_factory=Loading)


def _registry(name: str, value: Any) -> Any:
    missing = [m for m in ("add", "get", "has", "get_all_entries") if not hasattr(value, m)]
    if missing:
        raise TypeError(f"{name} must be a handler registry, but {value!r} has no {missing[0]!r}")
    return value


class CheckpointablesOptions(OptionGroup):
    """Which handlers save and load checkpointables.

    Attributes:
      registry: the handlers to choose from; by default a read-only view of the global registry.
    """

    registry: registration.CheckpointableHandlerRegistry = option(
        default_factory=lambda: registration.ReadOnlyHandlerRegistry(
            registration.global_registry()
        ),
        check=_registry,
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

    def _copied(self, freeze: Freeze | None = None) -> Self:
        """Return a copy with a registry of its own, or with the same view of the global one."""
        twin = super()._copied(freeze)
        vars(twin)["registry"] = copy.deepcopy(self.registry)
        return twin
