"""The checks that options put on their values.

Each takes an option's name and the value assigned to it, and returns the value to keep. A value of
the wrong kind is a TypeError, one out of range a ValueError; both name the option.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[str, Any], Any]


def must_be(check: Check) -> Mapping[str, Check]:
    """Return the dataclass field metadata that puts a check on an option."""
    return {"check": check}


def optional(check: Check) -> Check:
    """Accept None beside what another check accepts."""
    return lambda name, value: None if value is None else check(name, value)


def anything(name: str, value: Any) -> Any:
    """Accept every value."""
    return value


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
