"""What every group of options shares: checked, spelled right, and frozen while in use.

**Does**: refuse unknown names and impossible values at the assignment that brings them, refuse
changes while the owning context is active, copy groups.
**Does not**: know a single option.
"""

from __future__ import annotations

import contextvars
import dataclasses
import difflib
import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, cast

from orbax_async.options._checks import anything, flag, instance_of, optional

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Freeze:
    """The state that all option groups of one context share: whether they may be changed.

    Invariant: `_depth` is the number of `with` blocks, in all threads and tasks, that are inside
    the context right now. It is guarded by `_lock`, because `+=` is not atomic.
    """

    __slots__ = ("_depth", "_lock")

    def __init__(self) -> None:
        self._depth = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Count one more block that is inside the context."""
        with self._lock:
            self._depth += 1

    def leave(self) -> None:
        """Count one block less.

        Raises:
          RuntimeError: No block is inside the context.
        """
        with self._lock:
            if not self._depth:
                raise RuntimeError("a Context was left that had not been entered")
            self._depth -= 1

    def is_on(self) -> bool:
        """Say whether changes are refused here and now.

        They are while any block is inside the context, seen from every thread; and in a task that
        started inside such a block, for as long as the context stays active in that task.
        """
        return self._depth > 0 or any(holder._freeze is self for holder in ACTIVE.get())


class _Holder(Protocol):
    _freeze: Freeze


ACTIVE: contextvars.ContextVar[tuple[_Holder, ...]] = contextvars.ContextVar(
    "orbax_async_active_contexts", default=()
)
"""The contexts that are active in this thread or task, innermost last."""


class OptionGroup:
    """The base of every option dataclass.

    Subclasses are keyword-only dataclasses in which each field has a default. Every assignment is
    checked: by the field's own check (`must_be`), or by one that follows from its default, where a
    bool stands for a bool and a nested group for a group of that class. A field whose default is
    None takes None as well. Deleting a field restores its default.
    """

    _freeze: ClassVar[Freeze | None] = None  # replaced on the instance once a context owns it

    def copied(self) -> Self:
        """Return a deep copy that no context owns.

        Nested groups and plain containers are copied; functions, callbacks and other objects are
        shared, so that a callback still reports to the object that the caller holds.
        """
        twin = object.__new__(type(self))
        vars(twin).update({name: _copied(value) for name, value in self.__getstate__().items()})
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copied()

    def __getstate__(self) -> dict[str, Any]:
        # For pickle and copy: a copy is nobody's, so the freeze stays behind.
        return {name: value for name, value in vars(self).items() if name != "_freeze"}

    # Hidden from type checkers, which would take these as leave to assign any name.
    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            field = self._field_to_change(name)
            value = field.check(value)
            if self._freeze is not None and isinstance(value, OptionGroup):
                value = adopt(value, self._freeze)
            object.__setattr__(self, name, value)

        def __delattr__(self, name: str) -> None:
            setattr(self, name, self._field_to_change(name).default())

    def _field_to_change(self, name: str) -> _Field:
        if self._freeze is not None and self._freeze.is_on():
            raise RuntimeError(
                "Cannot mutate options of an active context. "
                "Configure before entering the `with` block."
            )
        group: type = type(self)
        fields = _fields(group)
        if name not in fields:
            raise AttributeError(unknown_name(group.__qualname__, name, fields))
        return fields[name]


def adopt(group: OptionGroup, freeze: Freeze) -> OptionGroup:
    """Make a context the owner of a group and of all groups inside it.

    A group that another context owns stays with it; a copy is adopted in its place.
    """
    if group._freeze is not freeze:
        if group._freeze is not None:
            group = group.copied()
        object.__setattr__(group, "_freeze", freeze)
    for name, value in vars(group).items():
        if isinstance(value, OptionGroup):
            object.__setattr__(group, name, adopt(value, freeze))
    return group


def unknown_name(owner: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that an owner of options does not have."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
    return f"{owner} has no option {name!r}; {advice}"


class _Field(NamedTuple):
    check: Callable[[Any], Any]
    default: Callable[[], Any]


@functools.cache
def _fields(group: type) -> Mapping[str, _Field]:
    """Return for each field of a group what checks its values and what makes its default."""
    fields = {}
    for field in dataclasses.fields(cast("type[DataclassInstance]", group)):
        default, factory = field.default, field.default_factory
        if factory is dataclasses.MISSING:
            factory = functools.partial(_itself, default)
        check = field.metadata.get("check", anything)
        if isinstance(default, bool):
            check = flag
        elif isinstance(factory, type):
            check = instance_of(factory)
        elif default is None:
            check = optional(check)
        check = functools.partial(check, f"{group.__qualname__}.{field.name}")
        fields[field.name] = _Field(check, factory)
    return fields


def _itself(value: Any) -> Any:
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, OptionGroup):
        return value.copied()
    return value.copy() if isinstance(value, (set, list, dict)) else value
