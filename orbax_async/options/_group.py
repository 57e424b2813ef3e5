"""What every group of options shares: its values are checked, copied, and frozen while in use.

**Does**: refuse unknown names and impossible values at the assignment that brings them, refuse
changes while the owning context is active, copy groups.
**Does not**: know a single option.

A check takes an option's name and the value assigned to it, and returns the value to keep. A value
of the wrong kind is a TypeError, one out of range a ValueError; both name the option.
"""

from __future__ import annotations

import contextvars
import dataclasses
import difflib
import enum
import functools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    NamedTuple,
    Self,
    TypeAlias,
    dataclass_transform,
)

Check: TypeAlias = Callable[[str, Any], Any]


# Checks.


def anything(name: str, value: Any) -> Any:
    """Accept every value."""
    return value


def optional(check: Check) -> Check:
    """Accept None beside what another check accepts."""
    return lambda name, value: None if value is None else check(name, value)


def flag(name: str, value: Any) -> bool:
    """Accept True and False, also as numbers and NumPy booleans."""
    if value not in (True, False):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def function(name: str, value: Any) -> Any:
    """Accept anything that can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {value!r}")
    return value


def instance_of(kind: type) -> Check:
    """Accept instances of a class."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__qualname__}, not {value!r}")
        return value

    return check


def number(*, at_least: float = -math.inf, may_be_infinite: bool = False) -> Check:
    """Accept real numbers from a minimum on, but no NaN."""

    def check(name: str, value: Any) -> Any:
        if not _is_real(value):
            raise TypeError(f"{name} must be a number, not {value!r}")
        if not value >= at_least or (math.isinf(value) and not may_be_infinite):
            bound = "" if at_least == -math.inf else f" of at least {at_least:g}"
            raise ValueError(f"{name} must be a finite number{bound}, not {value!r}")
        return value

    return check


def whole(*, at_least: int) -> Check:
    """Accept whole numbers from a minimum on, also as floats (2e9) and NumPy integers."""

    def check(name: str, value: Any) -> int:
        if not _is_real(value):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
        if not value >= at_least or value % 1:
            raise ValueError(f"{name} must be a whole number of at least {at_least}, not {value!r}")
        return int(value)

    return check


FROM_0 = whole(at_least=0)
FROM_1 = whole(at_least=1)


def one_of(*choices: str) -> Check:
    """Accept some strings."""

    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        return value

    return check


def member_of(kind: type[enum.Enum]) -> Check:
    """Accept the members of an enumeration, also as their values."""

    def check(name: str, value: Any) -> enum.Enum:
        try:
            return kind(value)
        except ValueError:
            values = ", ".join(repr(member.value) for member in kind)
            raise ValueError(
                f"{name}: {value!r} is not a valid {kind.__name__}; use one of {values}"
            ) from None

    return check


def each(check: Check, into: type[set[Any]] | type[tuple[Any, ...]]) -> Check:
    """Accept collections of what another check accepts, and keep them as a set or tuple."""

    def check_each(name: str, value: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a {into.__name__}, not {value!r}")
        kept = into([check(f"each member of {name}", member) for member in value])
        # A set that is right already stays the caller's own object, as in Orbax.
        return value if type(value) is into and value == kept else kept

    return check_each


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# Freezing.


class Freeze:
    """The state that all option groups of one context share: whether they may be changed.

    Invariant: `_blocks` has an entry for each `with` block, in all threads and tasks, that is
    inside the context right now. Lists add and remove in one step, so it needs no lock.
    """

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: list[None] = []

    def enter(self) -> None:
        """Count one more block that is inside the context."""
        self._blocks.append(None)

    def leave(self) -> None:
        """Count one block less."""
        try:
            self._blocks.pop()
        except IndexError:
            raise RuntimeError("a Context was left that had not been entered") from None

    def is_on(self) -> bool:
        """Say whether changes are refused here and now.

        They are while any block is inside the context, seen from every thread; and in a task that
        started inside such a block, for as long as the context stays active in that task.
        """
        return bool(self._blocks) or any(context._freeze is self for context in ACTIVE.get())


ACTIVE: contextvars.ContextVar[tuple[OptionGroup, ...]] = contextvars.ContextVar(
    "orbax_async_active_contexts", default=()
)
"""The contexts that are active in this thread or task, innermost last."""


# Groups.


class _Option(NamedTuple):
    check: Callable[[Any], Any]
    default: Any  # to compare with; each group has one of its own, which `make` makes
    make: Callable[[], Any]


def option(
    *,
    check: Check = anything,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare an option whose values are checked."""
    return dataclasses.field(
        default=default, default_factory=default_factory, metadata={"check": check}
    )


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
class OptionGroup:
    """The base of every group of options; each is a keyword-only dataclass that compares by value.

    Every option has a default, and every assignment is checked: by the option's own check, or by
    one that follows from its default, where a bool stands for a bool and a nested group for a group
    of that class. An option whose default is None takes None as well. Deleting an option restores
    its default.
    """

    _freeze: ClassVar[Freeze | None] = None  # replaced on the instance once a context owns it
    _options: ClassVar[dict[str, _Option]] = {}
    _when_frozen: ClassVar[str] = (
        "Cannot mutate options of an active context. Configure before entering the `with` block."
    )

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(kw_only=True, eq=False, repr=False)(cls)
        fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
        cls._options = {field.name: _option_of(cls, field) for field in fields}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__getstate__() == other.__getstate__()

    def __repr__(self) -> str:
        """Show what differs from the defaults."""
        found = [
            f"{name}={value!r}"
            for name, value in self.__getstate__().items()
            if value != self._options[name].default
        ]
        return f"{type(self).__qualname__}({', '.join(found)})"

    def __getstate__(self) -> dict[str, Any]:
        # For pickle and copy: a copy is nobody's, so the freeze stays behind.
        options = vars(self).copy()
        options.pop("_freeze", None)
        return options

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._copied()

    def _copied(self, freeze: Freeze | None = None) -> Self:
        """Return a deep copy that `freeze` owns, without checking values again.

        Nested groups and plain containers are copied; functions, callbacks and other objects are
        shared, so that a callback still reports to the object that the caller holds.
        """
        twin = object.__new__(type(self))
        options = vars(twin)
        for name, value in vars(self).items():
            if isinstance(value, OptionGroup):
                value = value._copied(freeze)
            elif isinstance(value, (set, list, dict)):
                value = value.copy()
            options[name] = value
        options["_freeze"] = freeze
        return twin

    # Hidden from type checkers, which would take these as leave to assign any name.
    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            value = self._option_to_change(name).check(value)
            if self._freeze is not None and isinstance(value, OptionGroup):
                value = adopt(value, self._freeze)
            vars(self)[name] = value

        def __delattr__(self, name: str) -> None:
            setattr(self, name, self._option_to_change(name).make())

    def _option_to_change(self, name: str) -> _Option:
        if self._freeze is not None and self._freeze.is_on():
            raise RuntimeError(self._when_frozen)
        if name not in self._options:
            close = difflib.get_close_matches(name, self._options, n=1)
            known = f"it has {', '.join(self._options)}"
            advice = f"did you mean {close[0]!r}?" if close else known
            raise AttributeError(f"{type(self).__qualname__} has no option {name!r}; {advice}")
        return self._options[name]


def _option_of(group: type, field: dataclasses.Field[Any]) -> _Option:
    """Return what checks the values of a field, and what makes its default."""
    make: Any = field.default_factory
    if make is dataclasses.MISSING:
        make = lambda: field.default  # noqa: E731
    default, check = make(), field.metadata.get("check", anything)
    if isinstance(default, bool):
        check = flag
    elif isinstance(default, OptionGroup):
        check = instance_of(type(default))
    elif default is None:
        check = optional(check)
    return _Option(functools.partial(check, f"{group.__qualname__}.{field.name}"), default, make)


def adopt(group: OptionGroup, freeze: Freeze) -> OptionGroup:
    """Make a context the owner of a group and of all groups inside it.

    A group that another context owns stays with it; a copy is adopted in its place.
    """
    if group._freeze not in (None, freeze):
        return group._copied(freeze)
    options = vars(group)
    options["_freeze"] = freeze
    for name, value in options.items():
        if isinstance(value, OptionGroup):
            options[name] = adopt(value, freeze)
    return group
