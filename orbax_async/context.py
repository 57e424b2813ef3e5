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
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast, final

from orbax_async import errors, options, registration
from orbax_async._trace import logger
from orbax_async.options._checks import member_of, must_be
from orbax_async.options._group import ACTIVE, Freeze, OptionGroup, adopt, unknown_name

__all__ = ["Context", "current", "refuse_unbuilt", "snapshot"]


@dataclass(kw_only=True)
class _Groups(OptionGroup):
    """All that a context holds, as one tree of groups."""

    __qualname__ = "Context"  # for messages, which should name what the user sees

    pytree: options.PyTreeOptions = field(default_factory=options.PyTreeOptions)
    array: options.ArrayOptions = field(default_factory=options.ArrayOptions)
    asynchronous: options.AsyncOptions = field(default_factory=options.AsyncOptions)
    multiprocessing: options.MultiprocessingOptions = field(
        default_factory=options.MultiprocessingOptions
    )
    file: options.FileOptions = field(default_factory=options.FileOptions)
    checkpointables: options.CheckpointablesOptions = field(
        default_factory=options.CheckpointablesOptions
    )
    pathways: options.PathwaysOptions = field(default_factory=options.PathwaysOptions)
    deletion: options.DeletionOptions = field(default_factory=options.DeletionOptions)
    memory: options.MemoryOptions = field(default_factory=options.MemoryOptions)
    safetensors: options.SafetensorsOptions = field(default_factory=options.SafetensorsOptions)
    atomicity: options.AtomicityOptions = field(default_factory=options.AtomicityOptions)
    checkpoint_layout: options.CheckpointLayout = field(
        default=options.CheckpointLayout.ORBAX,
        metadata=must_be(member_of(options.CheckpointLayout)),
    )


@final
class Context:
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
    """

    __slots__ = ("__weakref__", "_freeze", "_groups")

    _freeze: Freeze
    _groups: _Groups

    def __init__(
        self,
        context: Context | None = None,
        *,
        pytree_options: options.PyTreeOptions | None = None,
        array_options: options.ArrayOptions | None = None,
        async_options: options.AsyncOptions | None = None,
        multiprocessing_options: options.MultiprocessingOptions | None = None,
        file_options: options.FileOptions | None = None,
        checkpointables_options: options.CheckpointablesOptions | None = None,
        pathways_options: options.PathwaysOptions | None = None,
        checkpoint_layout: options.CheckpointLayout | str | None = None,
        deletion_options: options.DeletionOptions | None = None,
        memory_options: options.MemoryOptions | None = None,
        safetensors_options: options.SafetensorsOptions | None = None,
        atomicity_options: options.AtomicityOptions | None = None,
    ) -> None:
        """Copy another context, or start from the defaults.

        Args:
          context: the context to inherit from; its options are copied, callbacks in them shared.
          pytree_options: a group to copy in place of the inherited one. This and the other group
            keywords are the older way to configure; prefer the attributes.
          array_options: see `pytree_options`.
          async_options: see `pytree_options`.
          multiprocessing_options: see `pytree_options`.
          file_options: see `pytree_options`.
          checkpointables_options: see `pytree_options`.
          pathways_options: see `pytree_options`.
          checkpoint_layout: a `CheckpointLayout` or its value.
          deletion_options: see `pytree_options`.
          memory_options: see `pytree_options`.
          safetensors_options: see `pytree_options`.
          atomicity_options: see `pytree_options`.

        Raises:
          TypeError: `context` is no `Context`, or a group is of the wrong class.
          ValueError: `checkpoint_layout` names no layout.
        """
        if context is not None and not isinstance(context, Context):
            raise TypeError(f"Context() inherits from another Context, not from {context!r}")
        groups = _Groups() if context is None else context._groups.copied()
        older = []
        for name, given in (
            ("pytree", pytree_options),
            ("array", array_options),
            ("asynchronous", async_options),
            ("multiprocessing", multiprocessing_options),
            ("file", file_options),
            ("checkpointables", checkpointables_options),
            ("pathways", pathways_options),
            ("checkpoint_layout", checkpoint_layout),
            ("deletion", deletion_options),
            ("memory", memory_options),
            ("safetensors", safetensors_options),
            ("atomicity", atomicity_options),
        ):
            if given is not None:
                setattr(groups, name, copy.deepcopy(given))
                older += [] if name == "checkpoint_layout" else [name]
        if older:
            logger.warning(
                "groups of options as arguments of Context() are deprecated; set context.%s, and "
                "what is in it, by dots",
                ", context.".join(older),
            )
        self._own(groups)

    def _own(self, groups: _Groups) -> None:
        self._freeze = Freeze()
        self._groups = groups
        adopt(groups, self._freeze)

    @property
    def pytree(self) -> options.PyTreeOptions:
        """How trees are saved and loaded, apart from the arrays in them."""
        return self._groups.pytree

    @property
    def array(self) -> options.ArrayOptions:
        """How arrays are stored and loaded."""
        return self._groups.array

    @property
    def asynchronous(self) -> options.AsyncOptions:
        """How a save runs in the background."""
        return self._groups.asynchronous

    @property
    def multiprocessing(self) -> options.MultiprocessingOptions:
        """Which processes take part, and how they meet."""
        return self._groups.multiprocessing

    @property
    def file(self) -> options.FileOptions:
        """How checkpoint directories are made."""
        return self._groups.file

    @property
    def checkpointables(self) -> options.CheckpointablesOptions:
        """Which handlers save and load checkpointables."""
        return self._groups.checkpointables

    @property
    def pathways(self) -> options.PathwaysOptions:
        """How checkpointing works on Pathways."""
        return self._groups.pathways

    @property
    def deletion(self) -> options.DeletionOptions:
        """How checkpoints are deleted."""
        return self._groups.deletion

    @property
    def memory(self) -> options.MemoryOptions:
        """How much memory an operation may take."""
        return self._groups.memory

    @property
    def safetensors(self) -> options.SafetensorsOptions:
        """How safetensors files are read."""
        return self._groups.safetensors

    @property
    def atomicity(self) -> options.AtomicityOptions:
        """How a save commits, and what a load accepts as committed."""
        return self._groups.atomicity

    # The older names of the same groups.
    pytree_options = pytree
    array_options = array
    async_options = asynchronous
    multiprocessing_options = multiprocessing
    file_options = file
    checkpointables_options = checkpointables
    pathways_options = pathways
    deletion_options = deletion
    memory_options = memory
    safetensors_options = safetensors

    @property
    def checkpoint_layout(self) -> options.CheckpointLayout:
        """The format of checkpoints: a `CheckpointLayout`; assigning its value works too.

        Raises:
          RuntimeError: When assigned while the context is active.
          ValueError: When something is assigned that is no layout.
        """
        return self._groups.checkpoint_layout

    @checkpoint_layout.setter
    def checkpoint_layout(self, value: options.CheckpointLayout | str) -> None:
        if self._freeze.is_on():
            raise RuntimeError(
                "Cannot mutate an active Context. Ensure all configuration options are set before "
                "entering the `with` context block."
            )
        # The group turns a string into the member.
        self._groups.checkpoint_layout = cast("options.CheckpointLayout", value)

    if not TYPE_CHECKING:  # a type checker would take it as leave to assign any name

        def __setattr__(self, name: str, value: Any) -> None:
            if not hasattr(type(self), name):
                raise AttributeError(unknown_name("Context", name, self._groups.__getstate__()))
            object.__setattr__(self, name, value)

    def __enter__(self) -> Self:
        self._freeze.enter()
        ACTIVE.set((*ACTIVE.get(), self))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._freeze.leave()
        # By search, not by a token: a generator or fixture may be left in another task than it was
        # entered in, where this context is not on the stack at all.
        stack = list(ACTIVE.get())
        for index in reversed(range(len(stack))):
            if stack[index] is self:
                del stack[index]
                ACTIVE.set(tuple(stack))
                break

    def __copy__(self) -> Context:
        return Context(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        return Context(self)

    def __getstate__(self) -> dict[str, Any]:
        return self._groups.__getstate__()

    def __setstate__(self, groups: dict[str, Any]) -> None:
        self._own(_Groups(**groups))


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
    active = current(default) if default is not None or ACTIVE.get() else None
    private = Context(active)
    if not isinstance(private.checkpointables.registry, registration.HandlerRegistry):
        private.checkpointables.registry = registration.HandlerRegistry(
            private.checkpointables.registry
        )
    return private


# Options whose effect does not exist: a field, or a group with all its fields. Every value but the
# default is refused.
_UNBUILT = ("pathways", "safetensors.ignore_load_sharding")


def refuse_unbuilt(context: Context, *, operation: Literal["save", "load", "metadata"]) -> None:
    """Refuse options that ask for an effect which this version does not have.

    Args:
      context: the options of the operation, usually its `snapshot`.
      operation: what is about to start, for the message.

    Raises:
      UnsupportedOptionError: At least one such option differs from its default; the message lists
        each with its dot path, the value found and the default.
    """
    found = [
        f"context.{path} = {value!r}; leave it at its default, {default!r}"
        for unbuilt in _UNBUILT
        for path, value, default in _fields(unbuilt, *_resolve(unbuilt, context))
        if not (value is default or value == default)
    ]
    if found:
        raise errors.UnsupportedOptionError(
            f"{operation} does not start, because these options have no effect in this version: "
            + "; ".join(found)
        )


_DEFAULTS = _Groups()


def _resolve(path: str, context: Context) -> tuple[Any, Any]:
    """Return what is at a dot path in a context, and what is there by default."""
    value: Any = context._groups
    default: Any = _DEFAULTS
    for name in path.split("."):
        value, default = getattr(value, name), getattr(default, name)
    return value, default


def _fields(path: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, value, default) of a field, or of each field inside a group."""
    if not isinstance(default, OptionGroup):
        yield path, value, default
        return
    for name, inner in vars(default).items():
        yield from _fields(f"{path}.{name}", getattr(value, name), inner)
