"""The ambient configuration: a `Context` holds the options of the operations called inside it.

**Does**: hold one group of each options class, make them the current ones for a thread or task,
freeze them while they are, hand an operation a snapshot of its own.
**Does not**: act on options; below this room everything receives plain values.

Rules:

- The contexts that are active in a flow of execution form a stack in a context variable, so tasks
  and `asyncio.to_thread` inherit them and other threads do not.
- Invariant I7: an operation sees options as they were when it was called. It takes a `snapshot`
  first and never looks at the caller's `Context` again.
"""

from __future__ import annotations

import copy
import operator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, final

from orbax_async import errors, registration
from orbax_async._trace import logger
from orbax_async.options import (
    ArrayOptions,
    AsyncOptions,
    AtomicityOptions,
    CheckpointablesOptions,
    CheckpointLayout,
    DeletionOptions,
    FileOptions,
    MemoryOptions,
    MultiprocessingOptions,
    PathwaysOptions,
    PyTreeOptions,
    SafetensorsOptions,
)
from orbax_async.options._group import ACTIVE, Freeze, OptionGroup, adopt, member_of, option

__all__ = ["Context", "current", "refuse_unbuilt", "snapshot"]


def _older_name(name: str) -> property:
    return property(operator.attrgetter(name), doc=f"The older name of `{name}`.")


@final
class Context(OptionGroup):
    """The options of the operations that are called inside its `with` block.

    Configure it by dots, then enter it. While it is active anywhere its options are frozen, for
    every thread; after the last block is left they can be changed again. It can be entered again
    inside itself and in several threads at once. A context created inside another starts from the
    defaults; pass the other one to inherit a copy of its options.

    Tasks and `asyncio.to_thread` inherit the active context; other threads see the defaults.

    Example:
      ```python
      context = Context()
      context.array.saving.use_compression = False
      with context:
          save(path, state)

      child = Context(context)
      child.memory.write_concurrent_bytes = 2**30
      ```

    Attributes:
      pytree: how trees are saved and loaded, apart from the arrays in them.
      array: how arrays are stored and loaded.
      asynchronous: how a save runs in the background.
      multiprocessing: which processes take part, and how they meet.
      file: how checkpoint directories are made.
      checkpointables: which handlers save and load checkpointables.
      pathways: how checkpointing works on Pathways.
      deletion: how checkpoints are deleted.
      memory: how much memory an operation may take.
      safetensors: how safetensors files are read.
      atomicity: how a save commits, and what a load accepts as committed.
      checkpoint_layout: the format of checkpoints: a `CheckpointLayout`, or its value when it is
        assigned. It alone can be assigned; of a group its options can.
    """

    _when_frozen = (
        "Cannot mutate an active Context. Ensure all configuration options are set before "
        "entering the `with` context block."
    )

    pytree: PyTreeOptions = option(default_factory=PyTreeOptions)
    array: ArrayOptions = option(default_factory=ArrayOptions)
    asynchronous: AsyncOptions = option(default_factory=AsyncOptions)
    multiprocessing: MultiprocessingOptions = option(default_factory=MultiprocessingOptions)
    file: FileOptions = option(default_factory=FileOptions)
    checkpointables: CheckpointablesOptions = option(default_factory=CheckpointablesOptions)
    pathways: PathwaysOptions = option(default_factory=PathwaysOptions)
    deletion: DeletionOptions = option(default_factory=DeletionOptions)
    memory: MemoryOptions = option(default_factory=MemoryOptions)
    safetensors: SafetensorsOptions = option(default_factory=SafetensorsOptions)
    atomicity: AtomicityOptions = option(default_factory=AtomicityOptions)
    if TYPE_CHECKING:

        @property
        def checkpoint_layout(self) -> CheckpointLayout:
            """What is assigned may be spelled as a string."""

        @checkpoint_layout.setter
        def checkpoint_layout(self, value: CheckpointLayout | str) -> None: ...
    else:
        checkpoint_layout: CheckpointLayout = option(
            default=CheckpointLayout.ORBAX, check=member_of(CheckpointLayout)
        )

    # The older names of the same groups.
    pytree_options = _older_name("pytree")
    array_options = _older_name("array")
    async_options = _older_name("asynchronous")
    multiprocessing_options = _older_name("multiprocessing")
    file_options = _older_name("file")
    checkpointables_options = _older_name("checkpointables")
    pathways_options = _older_name("pathways")
    deletion_options = _older_name("deletion")
    memory_options = _older_name("memory")
    safetensors_options = _older_name("safetensors")

    def __init__(  # noqa: PLR0913 - Orbax's arguments
        self,
        context: Context | None = None,
        *,
        pytree_options: PyTreeOptions | None = None,
        array_options: ArrayOptions | None = None,
        async_options: AsyncOptions | None = None,
        multiprocessing_options: MultiprocessingOptions | None = None,
        file_options: FileOptions | None = None,
        checkpointables_options: CheckpointablesOptions | None = None,
        pathways_options: PathwaysOptions | None = None,
        checkpoint_layout: CheckpointLayout | str | None = None,
        deletion_options: DeletionOptions | None = None,
        memory_options: MemoryOptions | None = None,
        safetensors_options: SafetensorsOptions | None = None,
        atomicity_options: AtomicityOptions | None = None,
    ) -> None:
        """Copy another context, or start from the defaults; callbacks in it are shared.

        The other arguments are copied in place of what is inherited. Groups as arguments are the
        older way to configure; prefer the attributes.

        Raises:
          TypeError: `context` is no `Context`, or a group is of the wrong class.
          ValueError: `checkpoint_layout` names no layout.
        """
        if context is not None and not isinstance(context, Context):
            raise TypeError(f"Context() inherits from another Context, not from {context!r}")
        given = {
            "pytree": pytree_options,
            "array": array_options,
            "asynchronous": async_options,
            "multiprocessing": multiprocessing_options,
            "file": file_options,
            "checkpointables": checkpointables_options,
            "pathways": pathways_options,
            "deletion": deletion_options,
            "memory": memory_options,
            "safetensors": safetensors_options,
            "atomicity": atomicity_options,
        }
        vars(self).update(vars((_DEFAULTS if context is None else context)._copied()))
        if checkpoint_layout is not None:
            self.checkpoint_layout = checkpoint_layout
        older = [name for name, group in given.items() if group is not None]
        for name in older:
            OptionGroup.__setattr__(self, name, copy.deepcopy(given[name]))
        if older:
            logger.warning(
                "groups of options as arguments of Context() are deprecated; set context.%s, and "
                "what is in it, by dots",
                ", context.".join(older),
            )

    __eq__, __hash__ = object.__eq__, object.__hash__  # who holds one means that one

    if not TYPE_CHECKING:  # a type checker would take it as leave to assign any name

        def __setattr__(self, name: str, value: Any) -> None:
            if name != "checkpoint_layout" and hasattr(self, name):
                raise AttributeError(
                    f"{name!r} of 'Context' object has no setter; change the options in it"
                )
            super().__setattr__(name, value)

    def __enter__(self) -> Self:
        assert self._freeze is not None
        self._freeze.enter()
        ACTIVE.set((*ACTIVE.get(), self))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._freeze is not None
        self._freeze.leave()
        # By search, not by a token: a generator or fixture may be left in another task than it was
        # entered in, where this context is not on the stack at all.
        stack = list(ACTIVE.get())
        for index in reversed(range(len(stack))):
            if stack[index] is self:
                del stack[index]
                ACTIVE.set(tuple(stack))
                break

    def _copied(self, freeze: Freeze | None = None) -> Self:
        return super()._copied(freeze or Freeze())

    __copy__ = _copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        adopt(self, Freeze())


_DEFAULTS = object.__new__(Context)
_DEFAULTS.__setstate__({name: each.make() for name, each in Context._options.items()})


def current(default: Context | None = None) -> Context:
    """Return the context that is active in this thread or task.

    Args:
      default: returned if none is active; None means a new one with the defaults.
    """
    stack = ACTIVE.get()
    if stack:
        assert isinstance(stack[-1], Context)
        return stack[-1]
    return Context() if default is None else default


def snapshot(default: Context | None = None) -> Context:
    """Return a private copy of the current context for one operation (invariant I7).

    Nothing that the user changes later reaches it: neither options nor handlers registered since.

    Args:
      default: copied if no context is active; None means the defaults.
    """
    private = current(_DEFAULTS if default is None else default)._copied()
    group = private.checkpointables
    if type(group.registry) is not registration.HandlerRegistry:
        vars(group)["registry"] = registration.HandlerRegistry(group.registry)
    return private


# Options whose effect does not exist: every value but the default is refused.
_UNBUILT = ("pathways.checkpointing_impl", "safetensors.ignore_load_sharding")


def refuse_unbuilt(context: Context, *, operation: Literal["save", "load", "metadata"]) -> None:
    """Refuse options that ask for an effect which this version does not have.

    Args:
      context: the options of the operation, usually its `snapshot`.
      operation: what is about to start, for the message.

    Raises:
      UnsupportedOptionError: At least one such option differs from its default; the message lists
        each with its dot path, the value found and the default.
    """
    found = []
    for path in _UNBUILT:
        value, default = map(operator.attrgetter(path), (context, _DEFAULTS))
        if value != default:
            found.append(f"context.{path} = {value!r}; leave it at its default, {default!r}")
    if found:
        raise errors.UnsupportedOptionError(
            f"{operation} does not start, because these options have no effect in this version: "
            + "; ".join(found)
        )
