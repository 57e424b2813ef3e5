"""Registries of checkpointable handlers: which class saves and loads which object.

**Does**: hold handlers in the order of their registration, bind some to one checkpointable name,
map renamed handlers to the type strings of old checkpoints, keep the global registry.
**Does not**: know a handler. `orbax_async.handlers` chooses one for an object, puts its own into
the global registry, and shows this module's functions to users.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, TypeVar, overload

from orbax_async import errors

__all__ = [
    "AlreadyExistsError",
    "CheckpointableHandlerRegistry",
    "HandlerRegistry",
    "NoEntryError",
    "ReadOnlyHandlerRegistry",
    "begin_with",
    "global_registry",
    "local_registry",
    "register_handler",
]

Handler: TypeAlias = Any
"""A handler class or a ready handler. The protocol itself lives in `orbax_async.handlers`."""

_AnyHandler = TypeVar("_AnyHandler")

# One lock for every registry: adding is rare, and registries without a lock of their own pickle.
_adding = threading.Lock()


class NoEntryError(errors.CheckpointError, KeyError):
    """No registered handler has the name asked for or fits the object at hand."""

    # KeyError shows the repr of its argument, quotes and escapes included.
    __str__ = Exception.__str__


class AlreadyExistsError(errors.CheckpointError, ValueError):
    """The handler, or the checkpointable name, is registered already."""


class CheckpointableHandlerRegistry(Protocol):
    """What a registry of handlers can do; any object with these methods will serve."""

    def add(
        self,
        handler_type: Handler,
        *,
        checkpointable_name: str | None = None,
        secondary_typestrs: Sequence[str] | None = None,
    ) -> CheckpointableHandlerRegistry:
        """Add a handler, for one checkpointable name or for any, and return the registry."""

    def get(self, checkpointable_name: str) -> Handler:
        """Return the handler bound to a name, or raise `NoEntryError`."""

    def has(self, checkpointable_name: str) -> bool:
        """Say whether a handler is bound to a name."""

    def get_all_entries(self) -> Sequence[tuple[Handler, str | None]]:
        """Return (handler, name or None) pairs, oldest first."""

    def get_secondary_typestrs(self, handler_type: Handler) -> Sequence[str]:
        """Return the further type strings under which a handler is known on disk."""


class _Entry(NamedTuple):
    handler: Handler
    name: str | None
    secondary_typestrs: tuple[str, ...] | None


class HandlerRegistry:
    """An ordered, growing collection of checkpointable handlers.

    Entries are kept oldest first; where several handlers can handle an object the newest wins, and
    a handler bound to a name serves that name only. Handlers are usually classes, constructed
    without arguments when they are needed; a ready instance is accepted too and used as it is.

    Example:
      ```python
      registry = local_registry().add(PointHandler).add(TableHandler, checkpointable_name="table")
      context.checkpointables.registry = registry
      ```
    """

    def __init__(self, other: CheckpointableHandlerRegistry | None = None) -> None:
        """Start empty, or with the entries of another registry.

        Args:
          other: any object with `get_all_entries`; `get_secondary_typestrs` is used if it exists.
        """
        self._entries: list[_Entry] = []
        if isinstance(other, HandlerRegistry):
            self._entries += other._entries
            if _waiting and any(each._entries is other._entries for each in _waiting):
                _waiting.append(self)
        elif other is not None:
            # Registries written for older releases know no secondary type strings.
            typestrs_of = getattr(other, "get_secondary_typestrs", lambda _: None)
            for handler, name in other.get_all_entries():
                typestrs = typestrs_of(handler)
                self._entries.append(_Entry(handler, name, tuple(typestrs) if typestrs else None))

    def add(
        self,
        handler_type: Handler,
        checkpointable: str | None = None,
        *,
        checkpointable_name: str | None = None,
        secondary_typestrs: Sequence[str] | None = None,
    ) -> Self:
        """Add a handler as the newest entry.

        Args:
          handler_type: a handler class, or a handler that is ready for use.
          checkpointable: the older spelling of `checkpointable_name`.
          checkpointable_name: the only checkpointable that the handler serves; None means any.
          secondary_typestrs: type strings, beside the handler's own, that checkpoints on disk may
            name and that this handler can load.

        Returns:
          The registry itself.

        Raises:
          AlreadyExistsError: The name is taken; or no name is given and the handler is in the
            registry already, under a name or not.
          ValueError: `handler_type` is neither a class nor a handler.
          TypeError: Both spellings of the name are given, or `secondary_typestrs` is one string.
        """
        name = _one_name(checkpointable, checkpointable_name)
        if not isinstance(handler_type, type) and not _looks_like_handler(handler_type):
            raise ValueError(
                "handler_type must be a handler class, or an object with `save` and `load`, "
                f"but is {handler_type!r}"
            )
        if isinstance(secondary_typestrs, str):
            raise TypeError(
                f"secondary_typestrs must be a sequence of strings: [{secondary_typestrs!r}]"
            )
        typestrs = None if secondary_typestrs is None else tuple(secondary_typestrs)
        with _adding:
            if name is not None and self.has(name):
                raise AlreadyExistsError(
                    f"{self.get(name)!r} is registered for the checkpointable {name!r} already; "
                    "choose another name or start from "
                    "local_registry(include_global_registry=False)"
                )
            if name is None and any(entry.handler is handler_type for entry in self._entries):
                raise AlreadyExistsError(
                    f"{handler_type!r} is in this registry already; pass checkpointable_name to "
                    "bind it to a name as well"
                )
            self._entries.append(_Entry(handler_type, name, typestrs))
        return self

    def get(
        self, checkpointable_name: str | None = None, *, checkpointable: str | None = None
    ) -> Handler:
        """Return the handler bound to a name; `checkpointable` is the older spelling.

        Raises:
          NoEntryError: No handler is bound to that name.
        """
        entry = self._find(checkpointable, checkpointable_name)
        if entry is None:
            bound = sorted(entry.name for entry in self._entries if entry.name is not None)
            name = checkpointable_name or checkpointable
            raise NoEntryError(
                f"no handler is bound to the checkpointable {name!r}; bound: {bound}"
            )
        return entry.handler

    def has(
        self, checkpointable_name: str | None = None, *, checkpointable: str | None = None
    ) -> bool:
        """Say whether a handler is bound to a name; `checkpointable` is the older spelling."""
        return self._find(checkpointable, checkpointable_name) is not None

    def _find(self, older: str | None, newer: str | None) -> _Entry | None:
        name = _one_name(older, newer)
        if name is None:
            raise TypeError("the name of a checkpointable is missing")
        for entry in self._entries:
            if entry.name == name:
                return entry
        return None

    def get_all_entries(self) -> list[tuple[Handler, str | None]]:
        """Return (handler, name or None) pairs, oldest first, as a list of the caller's own."""
        return [(entry.handler, entry.name) for entry in self._entries]

    def get_secondary_typestrs(self, handler_type: Handler) -> list[str]:
        """Return the further type strings of a handler: those given last, or none."""
        for entry in reversed(self._entries):
            if entry.handler is handler_type and entry.secondary_typestrs is not None:
                return list(entry.secondary_typestrs)
        return []

    def __deepcopy__(self, memo: Any = None) -> HandlerRegistry:
        # Entries are copied, handlers shared: a ready instance must stay the one that was given.
        return HandlerRegistry(self)

    __copy__ = __deepcopy__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The global registry travels by name: in another process it is that process's own.
        return (global_registry, ()) if self is _GLOBAL else super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_all_entries()})"


class ReadOnlyHandlerRegistry(HandlerRegistry):
    """A live view of another registry: it shows what is added there and adds nothing itself."""

    def __init__(self, registry: HandlerRegistry) -> None:
        """Show what is in a registry."""
        self._registry = registry

    @property
    def _entries(self) -> list[_Entry]:  # type: ignore[override]
        return self._registry._entries

    def add(self, *args: Any, **kwargs: Any) -> Self:
        """Refuse: handlers are added to the registry behind the view, or to a local one.

        Raises:
          NotImplementedError: Always.
        """
        raise NotImplementedError(
            "nothing can be added to a read-only registry; register the handler for the whole "
            "process with handlers.register_handler, or assign a handlers.local_registry() to "
            "context.checkpointables.registry and add to that"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReadOnlyHandlerRegistry) and other._registry is self._registry

    def __hash__(self) -> int:
        return hash(id(self._registry))

    def __deepcopy__(self, memo: Any = None) -> Self:
        return self


_GLOBAL = HandlerRegistry()
# Until the built-in handlers are imported: the global registry, and what was copied from it.
_waiting = [_GLOBAL]


def begin_with(built_in: HandlerRegistry) -> None:
    """Put the built-in handlers before all others, wherever the global ones belong.

    Their room, which lies above this one, does so as it is imported. A name that a user has bound
    before stays with the user's handler.
    """
    for registry in _waiting:
        registry._entries[:0] = [
            entry
            for entry in built_in._entries
            if entry.name is None or not registry.has(entry.name)
        ]
    _waiting.clear()


def global_registry() -> HandlerRegistry:
    """Return the registry of the whole process, which `register_handler` adds to."""
    return _GLOBAL


def local_registry(
    other_registry: CheckpointableHandlerRegistry | None = None,
    *,
    include_global_registry: bool = True,
) -> HandlerRegistry:
    """Create a registry to add to without touching the global one.

    Args:
      other_registry: entries to add after the global ones.
      include_global_registry: whether to start with the handlers registered globally so far.

    Raises:
      AlreadyExistsError: `other_registry` repeats a global entry; pass
        `include_global_registry=False` if it holds the global handlers itself.
    """
    registry = HandlerRegistry(_GLOBAL if include_global_registry else None)
    if other_registry is not None:
        for handler, name, typestrs in HandlerRegistry(other_registry)._entries:
            registry.add(handler, checkpointable_name=name, secondary_typestrs=typestrs)
    return registry


@overload
def register_handler(
    cls: None = None,
    *,
    checkpointable_name: str | None = None,
    secondary_typestrs: Sequence[str] | None = None,
) -> Callable[[_AnyHandler], _AnyHandler]: ...


@overload
def register_handler(
    cls: _AnyHandler,
    *,
    checkpointable_name: str | None = None,
    secondary_typestrs: Sequence[str] | None = None,
) -> _AnyHandler: ...


def register_handler(
    cls: Any = None,
    *,
    checkpointable_name: str | None = None,
    secondary_typestrs: Sequence[str] | None = None,
) -> Any:
    """Register a handler for the whole process; also a decorator, with or without arguments.

    Every context that keeps its default registry sees the handler at once, also those created
    before. The handler registered last is asked first.

    Args:
      cls: the handler class; None returns a decorator.
      checkpointable_name: the only checkpointable that the handler serves; None means any.
      secondary_typestrs: further type strings on disk that this handler can load.

    Returns:
      The handler class, unchanged.

    Raises:
      AlreadyExistsError: The name is taken, or the class is registered already.
      ValueError: `cls` is neither a class nor a handler.

    Example:
      ```python
      @register_handler(secondary_typestrs=["old_project.checkpoints.PointHandler"])
      class PointHandler: ...
      ```
    """

    def register(handler: _AnyHandler) -> _AnyHandler:
        _GLOBAL.add(
            handler,
            checkpointable_name=checkpointable_name,
            secondary_typestrs=secondary_typestrs,
        )
        return handler

    return register if cls is None else register(cls)


def _looks_like_handler(handler: Any) -> bool:
    return all(callable(getattr(handler, verb, None)) for verb in ("save", "load"))


def _one_name(older: str | None, newer: str | None) -> str | None:
    if older is not None and newer is not None:
        raise TypeError(
            "checkpointable is the older spelling of checkpointable_name; give one of them"
        )
    return newer if older is None else older
