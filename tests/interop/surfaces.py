"""The public surface of a library, and how that of another differs from it.

Differences are spelled as docs/parity.md has them:

    +name=default   a parameter, or a field, that is here and not in Orbax
    -name           one that is in Orbax and not here
    name=default    another default here
    name: kind      a parameter of another kind here
    +.name  -.name  a member of a class or an enumeration; what a class can do, by `+.__await__`
    +(Error)        a builtin error that the class here also is; `-(Error)` one that it is not
    async  sync     a function that has to be awaited here, or needs not
    a class         it is something else here
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

__all__ = ["differences", "find", "public_names", "spelled"]

THEIRS, OURS = "orbax.checkpoint", "orbax_async"
PRIVATE = f"{THEIRS}.experimental.v1._src"

# What a class can do that has no name of its own.
ABILITIES = ["__aenter__", "__await__", "__call__", "__enter__", "__truediv__"]


def public_names(module: types.ModuleType, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every public name of a library and of its public modules, with what it stands for.

    Some modules that Orbax shows are private ones under another name, and hold what they have
    imported, too; of these only Orbax's own classes and functions count. A module of ours counts
    where it lies, not where it is shown again.
    """
    is_private = module.__name__.startswith(PRIVATE)
    for name in sorted(getattr(module, "__all__", None) or vars(module)):
        value = getattr(module, name)
        if name.startswith("_"):
            continue
        if isinstance(value, types.ModuleType):
            here = value.__name__ == f"{module.__name__}.{name}"
            there = value.__name__.startswith(f"{THEIRS}.experimental.v1") and not is_private
            if here or there:
                yield from public_names(value, f"{prefix}{name}.")
        elif not is_private or getattr(value, "__module__", "").startswith(THEIRS):
            yield f"{prefix}{name}", value


def find(root: Any, name: str) -> Any:
    """Returns what a dotted name stands for, None if there is nothing."""
    for part in name.split("."):
        root = getattr(root, part, None)
    return root


def differences(name: str, theirs: Any, ours: Any) -> dict[str, list[str]]:
    """Returns by name how what we have differs from what Orbax has, with all that lies below."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    if (what := _what(ours)) != _what(theirs):
        found[name].append(f"a {what}")
    elif inspect.isfunction(theirs):
        found[name] += _of_functions(theirs, ours)
    elif inspect.isclass(theirs) and theirs.__module__.startswith(THEIRS):
        found[name] += _of_classes(theirs, ours)
        for member in _members(theirs) & _members(ours):
            found |= differences(f"{name}.{member}", _member(theirs, member), _member(ours, member))
    elif (
        what in ("class", "value")
        and ours is not theirs
        and _unqualified(ours) != _unqualified(theirs)
    ):
        found[name].append(f"a {what} of its own")
    return {name: sorted(each) for name, each in found.items() if each}


def spelled(value: Any) -> str:
    """Returns a default as one writes it."""
    if value is inspect.Parameter.empty:
        return "required"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (type, types.FunctionType)):
        return value.__name__
    is_of_library = type(value).__module__.startswith((THEIRS, OURS))
    return f"{type(value).__name__}()" if is_of_library else repr(value)


def _what(value: Any) -> str:
    match value:
        case property() | types.EllipsisType() | types.MemberDescriptorType():
            return "attribute"  # declared, computed, or kept in a slot: it makes no difference
        case enum.Enum():
            return "member"
        case type() if issubclass(value, enum.Enum):
            return "enumeration"
        case type():
            return "class"
        case types.FunctionType():
            return "function"
        case _:
            return "value"


def _member(kind: type, name: str) -> Any:
    """Returns a function, a property, and so on; `...` of what is only declared."""
    value = inspect.getattr_static(kind, name, ...)
    if name in getattr(kind, "__annotations__", ()):
        return ...
    return value.__func__ if isinstance(value, (classmethod, staticmethod)) else value


def _unqualified(value: Any) -> str:
    """Returns how a type, or a union of types, is written; each library has its own classes."""
    text = re.sub(r"\w+\.", "", repr(value))
    return re.sub(r"Union\[([^]]*)\]", lambda union: union[1].replace(", ", " | "), text)


def _members(kind: type) -> set[str]:
    """The public members that a class declares, or a class of its library that it derives from."""
    declared = set()
    for each in kind.__mro__:
        if each.__module__.startswith((THEIRS, OURS)):
            declared |= {*vars(each), *vars(each).get("__annotations__", ())}
    if _takes_its_fields(kind):
        declared -= {*inspect.signature(kind).parameters}
    return {name for name in declared if not name.startswith("_")}


def _of_classes(theirs: type, ours: type) -> Iterator[str]:
    yield from _added_and_missing(_members(theirs), _members(ours), ".{}")
    yield from _added_and_missing(_abilities(theirs), _abilities(ours), ".{}")
    if issubclass(theirs, BaseException):
        yield from _added_and_missing(_builtin_errors(theirs), _builtin_errors(ours), "({})")
    elif issubclass(theirs, enum.Enum) and issubclass(ours, enum.Enum):
        for member in theirs:
            mine = ours.__members__.get(member.name, member)
            if mine.value != member.value:
                yield f"{mine.name}={mine.value!r}"
    elif "_is_protocol" not in vars(theirs) or not theirs._is_protocol:
        yield from _of_parameters(_constructor(theirs), _constructor(ours))


def _abilities(kind: type) -> set[str]:
    generic = {"__class_getitem__"} if getattr(kind, "__parameters__", ()) else set()
    own = {name for each in kind.__mro__ for name in vars(each)}  # each class can be called
    return own & set(ABILITIES) | generic


def _builtin_errors(kind: type) -> set[str]:
    found = {each.__name__ for each in kind.__mro__ if each.__module__ == "builtins"}
    return found - {"BaseException", "Exception", "object"}


def _added_and_missing(theirs: set[str], ours: set[str], form: str) -> Iterator[str]:
    yield from ("-" + form.format(name) for name in theirs - ours)
    yield from ("+" + form.format(name) for name in ours - theirs)


_Parameters = dict[str, tuple[str, str]]
"""By name, the kind and the spelled default."""


def _of_functions(theirs: Any, ours: Any) -> Iterator[str]:
    is_async = inspect.iscoroutinefunction(ours)
    if is_async is not inspect.iscoroutinefunction(theirs):
        yield "async" if is_async else "sync"
    yield from _of_parameters(_parameters(theirs), _parameters(ours))


def _parameters(function: Any) -> _Parameters:
    if function is object.__init__ or function.__module__ == "typing":
        return {}  # of a class without a constructor of its own, and of a protocol
    found = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return {p.name: (p.kind.description, spelled(p.default)) for p in found}


def _constructor(kind: type) -> _Parameters:
    found = _parameters(kind.__init__)  # type: ignore[misc]
    if _takes_its_fields(kind):
        for field in dataclasses.fields(kind):
            if field.init and field.default_factory is not dataclasses.MISSING:
                found[field.name] = (found[field.name][0], spelled(field.default_factory()))
    return found


def _takes_its_fields(kind: type) -> bool:
    """Whether a class is a dataclass, and its constructor takes what it is made of."""
    if not dataclasses.is_dataclass(kind):
        return False
    parameters = inspect.signature(kind).parameters
    return all(field.name in parameters for field in dataclasses.fields(kind) if field.init)


def _of_parameters(theirs: _Parameters, ours: _Parameters) -> Iterator[str]:
    yield from (f"-{name}" for name in theirs if name not in ours)
    for name, (kind, default) in ours.items():
        if name not in theirs:
            yield f"+{name}={default}"
            continue
        if kind != theirs[name][0]:
            yield f"{name}: {kind}"
        if default != theirs[name][1]:
            yield f"{name}={default}"
    if [name for name in theirs if name in ours] != [name for name in ours if name in theirs]:
        yield "another order"
