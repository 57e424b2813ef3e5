"""The comparison of two libraries finds every kind of difference."""

from __future__ import annotations

import dataclasses
import enum
import types
from typing import Any, Protocol

from surfaces import differences


def compare(theirs: Any, ours: Any) -> dict[str, list[str]]:
    """Compares two things as if each were a library's."""
    theirs.__module__, ours.__module__ = "orbax.checkpoint.x", "orbax_async.x"
    return differences("it", theirs, ours)


def test_functions() -> None:
    """Parameters that are more, fewer, of another default, kind or order; coroutines."""

    def theirs(a, b=1, *, c=None): ...
    def same(a, b=1, *, c=None): ...
    def more(a, b=1, *, c=None, d=2): ...
    def fewer(a, b=1): ...
    def default(a, b=2, *, c=None): ...
    def kind(a, b=1, c=None): ...
    def order(b, a=1, *, c=None): ...
    async def coroutine(a, b=1, *, c=None): ...

    assert compare(theirs, same) == {}
    assert compare(theirs, more) == {"it": ["+d=2"]}
    assert compare(theirs, fewer) == {"it": ["-c"]}
    assert compare(theirs, default) == {"it": ["b=2"]}
    assert compare(theirs, kind) == {"it": ["c: positional or keyword"]}
    assert compare(theirs, order) == {"it": ["a=1", "another order", "b=required"]}
    assert compare(theirs, coroutine) == {"it": ["async"]}
    assert compare(coroutine, theirs) == {"it": ["sync"]}
    assert compare(theirs, type("Class", (), {})) == {"it": ["a class"]}


def test_classes() -> None:
    """Constructors, methods below, members, abilities."""

    class Theirs:
        def __init__(self, a): ...
        def method(self, x): ...
        def gone(self): ...
        @property
        def value(self): ...
        def __enter__(self): ...

    class Ours:
        def __init__(self, a, b=0): ...
        def method(self, y): ...
        def value(self): ...
        def more(self): ...
        def __await__(self): ...

    assert compare(Theirs, Ours) == {
        "it": ["+.__await__", "+.more", "+b=0", "-.__enter__", "-.gone"],
        "it.method": ["+y=required", "-x"],
        "it.value": ["a function"],
    }
    assert compare(Theirs, Theirs) == {}


def test_dataclasses() -> None:
    """Fields and their defaults, made by factories too; nested classes below."""

    class Nested:
        def method(self, a): ...

    class Another:
        def method(self, b): ...

    @dataclasses.dataclass
    class Theirs:
        a: int
        b: list = dataclasses.field(default_factory=list)
        c: int | None = None
        hidden: int = dataclasses.field(init=False, default=0)

    @dataclasses.dataclass(kw_only=True)
    class Ours:
        a: int
        b: list = dataclasses.field(default_factory=lambda: [1])
        d: int = 0

    for kind, nested in ((Theirs, Nested), (Ours, Another)):
        nested.__module__ = "orbax.checkpoint.x"
        kind.Nested = nested
    assert compare(Theirs, Ours) == {
        "it": ["+d=0", "-.hidden", "-c", "a: keyword-only", "b: keyword-only", "b=[1]"],
        "it.Nested.method": ["+b=required", "-a"],
    }


def test_enumerations_and_errors() -> None:
    """Members and values; the builtin errors that a class is."""

    class Theirs(enum.Enum):
        ONE = 1
        TWO = 2

    class Ours(enum.Enum):
        ONE = 1
        TWO = "two"
        THREE = 3

    assert compare(Theirs, Ours) == {"it": ["+.THREE", "TWO='two'"]}
    assert compare(Ours, Theirs) == {"it": ["-.THREE", "TWO=2"]}

    class Broad(ValueError): ...

    class Narrow(KeyError): ...

    assert compare(Broad, Narrow) == {"it": ["+(KeyError)", "+(LookupError)", "-(ValueError)"]}


def test_protocols_and_values() -> None:
    """What is declared is like what is computed; types are compared by how they are written."""

    class Theirs(Protocol):
        shape: int

        def method(self) -> None: ...

    class Ours:
        def __init__(self, anything): ...
        @property
        def shape(self): ...

    assert compare(Theirs, Ours) == {"it": ["-.method"]}
    assert differences("it", int | str, int | str) == {}
    assert differences("it", int | str, int | bytes) == {"it": ["a value of its own"]}
    assert differences("it", list[types.FunctionType], 5) == {"it": ["a value of its own"]}
    assert differences("it", dict, dict) == {}
    assert differences("it", dict, list) == {"it": ["a class of its own"]}
