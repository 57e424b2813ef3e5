"""Registries of handlers: rules B9.1 to B9.3 of Orbax, both spellings, and the live global view."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from orbax.checkpoint import v1 as ocp

from orbax_async import errors, registration
from orbax_async.context import Context, snapshot
from orbax_async.options import CheckpointablesOptions


class Handler:
    """A handler in shape; no test here saves anything."""

    async def save(self, directory: Any, checkpointable: Any) -> None: ...

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> None: ...


class PointHandler(Handler): ...


class TableHandler(Handler): ...


@pytest.fixture(autouse=True)
def global_entries() -> Iterator[None]:
    """Leaves the global registry as it was."""
    entries = registration.global_registry()._entries
    before = list(entries)
    yield
    entries[:] = before


@pytest.fixture
def registry() -> registration.HandlerRegistry:
    """An empty registry."""
    return registration.local_registry(include_global_registry=False)


LIBRARIES = pytest.mark.parametrize("handlers", [registration, ocp.handlers], ids=["ours", "orbax"])


@LIBRARIES
def test_b9_1_one_class_takes_several_names_after_its_unnamed_entry(handlers: Any) -> None:
    """Adding returns the registry, and the entries stay in order, oldest first."""
    registry = handlers.local_registry(include_global_registry=False)
    assert registry.add(PointHandler) is registry
    registry.add(PointHandler, checkpointable_name="a").add(PointHandler, checkpointable_name="b")
    assert list(registry.get_all_entries()) == [
        (PointHandler, None),
        (PointHandler, "a"),
        (PointHandler, "b"),
    ]


@LIBRARIES
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((PointHandler, None), (PointHandler, None)),
        ((PointHandler, "a"), (PointHandler, None)),
        ((PointHandler, "a"), (PointHandler, "a")),
        ((PointHandler, "a"), (TableHandler, "a")),
    ],
)
def test_b9_1_what_is_registered_already_is_refused(handlers: Any, first: Any, second: Any) -> None:
    """A second unnamed entry of a class, and a second handler of a name, leave no trace."""
    registry = handlers.local_registry(include_global_registry=False)
    registry.add(first[0], checkpointable_name=first[1])
    with pytest.raises(ValueError, match="already") as refused:
        registry.add(second[0], checkpointable_name=second[1])
    assert type(refused.value).__name__ == "AlreadyExistsError"
    assert list(registry.get_all_entries()) == [first]


@LIBRARIES
@pytest.mark.parametrize("junk", [5, "PointHandler", None, object()])
def test_b9_1_what_is_no_handler_is_refused(handlers: Any, junk: Any) -> None:
    """Neither values nor names of classes can be added."""
    registry = handlers.local_registry(include_global_registry=False)
    with pytest.raises(ValueError, match="handler_type"):
        registry.add(junk)
    assert not registry.get_all_entries()


@LIBRARIES
def test_b9_2_a_name_leads_to_its_handler_and_no_other_name_does(handlers: Any) -> None:
    """`get` and `has` know bound names only; an unnamed handler answers to none."""
    registry = handlers.local_registry(include_global_registry=False)
    registry.add(TableHandler).add(PointHandler, checkpointable_name="point")
    assert registry.get("point") is PointHandler
    assert registry.has("point")
    assert not registry.has("table")
    with pytest.raises(KeyError, match="table") as missing:
        registry.get("table")
    assert type(missing.value).__name__ == "NoEntryError"


def test_b9_3_a_local_registry_starts_with_the_global_entries() -> None:
    """Or without them, when told so; adding to it does not touch the global registry."""
    registration.register_handler(PointHandler)
    local = registration.local_registry().add(TableHandler)
    assert [handler for handler, _ in local.get_all_entries()][-2:] == [PointHandler, TableHandler]
    assert (TableHandler, None) not in registration.global_registry().get_all_entries()
    assert not registration.local_registry(include_global_registry=False).get_all_entries()


def test_b9_3_a_registry_that_holds_the_global_entries_is_not_added_to_them() -> None:
    """The conflict is reported; without the global entries the other registry is copied."""
    registration.register_handler(PointHandler)
    other = registration.local_registry().add(TableHandler, secondary_typestrs=["old.Table"])
    with pytest.raises(registration.AlreadyExistsError):
        registration.local_registry(other)
    merged = registration.local_registry(other, include_global_registry=False)
    assert merged.get_all_entries() == other.get_all_entries()
    assert merged.get_secondary_typestrs(TableHandler) == ["old.Table"]


def test_errors_are_ours_and_the_builtin_ones() -> None:
    """Existing except clauses go on working, and the message of a KeyError is readable."""
    assert issubclass(registration.NoEntryError, errors.CheckpointError)
    assert issubclass(registration.NoEntryError, KeyError)
    assert issubclass(registration.AlreadyExistsError, errors.CheckpointError)
    assert issubclass(registration.AlreadyExistsError, ValueError)
    assert str(registration.NoEntryError("no 'a'")) == "no 'a'"


def test_the_older_spelling_is_understood(registry: registration.HandlerRegistry) -> None:
    """The name may be positional, and may be called `checkpointable`."""
    registry.add(PointHandler, "a").add(TableHandler, checkpointable="b")
    assert registry.get(checkpointable="a") is registry.get("a") is PointHandler
    assert registry.get(checkpointable_name="b") is TableHandler
    assert registry.has(checkpointable="b")
    with pytest.raises(TypeError, match="older spelling"):
        registry.add(PointHandler, "c", checkpointable_name="d")
    with pytest.raises(TypeError, match="name"):
        registry.get()


def test_secondary_typestrs_belong_to_the_handler(registry: registration.HandlerRegistry) -> None:
    """The last ones given count, whichever entry brought them; the caller gets a copy."""
    registry.add(PointHandler, secondary_typestrs=["old.Point"])
    registry.add(PointHandler, checkpointable_name="a", secondary_typestrs=["older.Point"])
    registry.add(PointHandler, checkpointable_name="b")
    registry.get_secondary_typestrs(PointHandler).append("junk")
    assert registry.get_secondary_typestrs(PointHandler) == ["older.Point"]
    assert registry.get_secondary_typestrs(TableHandler) == []


def test_one_string_is_no_list_of_typestrs(registry: registration.HandlerRegistry) -> None:
    """A string would be taken letter by letter, so it is refused."""
    with pytest.raises(TypeError, match=r"\['old.Point'\]"):
        registry.add(PointHandler, secondary_typestrs="old.Point")


def test_a_ready_handler_is_kept_as_it_is(registry: registration.HandlerRegistry) -> None:
    """An instance, even one that can't be hashed, is held, found and copied by identity."""

    class Unhashable(Handler):
        __hash__ = None

        def __eq__(self, other: object) -> bool:
            return True

    ready, other = Unhashable(), Unhashable()
    registry.add(ready, secondary_typestrs=["old.Point"]).add(other)
    with pytest.raises(registration.AlreadyExistsError):
        registry.add(ready)
    assert copy.deepcopy(registry).get_all_entries()[0][0] is ready
    assert registry.get_secondary_typestrs(ready) == ["old.Point"]
    assert registry.get_secondary_typestrs(other) == []


def test_the_list_of_entries_is_a_copy(registry: registration.HandlerRegistry) -> None:
    """Changing what `get_all_entries` returned changes nothing in the registry."""
    registry.add(PointHandler).get_all_entries().clear()
    assert registry.get_all_entries() == [(PointHandler, None)]


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
)
def test_a_copy_goes_its_own_way(registry: registration.HandlerRegistry, duplicate: Any) -> None:
    """Entries and type strings are copied; additions flow neither way."""
    registry.add(PointHandler, secondary_typestrs=["old.Point"])
    twin = duplicate(registry)
    registry.add(TableHandler)
    twin.add(TableHandler, checkpointable_name="t")
    assert twin.get_all_entries() == [(PointHandler, None), (TableHandler, "t")]
    assert registry.get_all_entries() == [(PointHandler, None), (TableHandler, None)]
    assert twin.get_secondary_typestrs(PointHandler) == ["old.Point"]


def test_the_global_registry_pickles_by_name() -> None:
    """Unpickled it is the process's own registry; a deep copy of it is independent."""
    everything = registration.global_registry()
    assert pickle.loads(pickle.dumps(everything)) is everything
    assert copy.deepcopy(everything) is not everything


def test_register_handler_is_a_function_and_a_decorator() -> None:
    """All three spellings return the class and register it once."""

    @registration.register_handler
    class Plain(Handler): ...

    @registration.register_handler(checkpointable_name="named", secondary_typestrs=["old.Named"])
    class Named(Handler): ...

    assert registration.register_handler(PointHandler, checkpointable_name="p") is PointHandler
    everything = registration.global_registry()
    assert everything.get_all_entries()[-3:] == [
        (Plain, None),
        (Named, "named"),
        (PointHandler, "p"),
    ]
    assert everything.get_secondary_typestrs(Named) == ["old.Named"]


def test_w40_contexts_see_handlers_registered_later() -> None:
    """The default registry is a live view of the global one, in children and copies too."""
    contexts = [Context()]
    contexts += [Context(contexts[0]), copy.deepcopy(contexts[0])]
    contexts += [pickle.loads(pickle.dumps(contexts[0]))]
    registration.register_handler(PointHandler, checkpointable_name="late")
    for context in contexts:
        assert context.checkpointables.registry.get("late") is PointHandler
        assert context.checkpointables.registry.has("late")
        assert (PointHandler, "late") in context.checkpointables.registry.get_all_entries()


def test_i7_an_operation_does_not_see_handlers_registered_later() -> None:
    """A snapshot holds the handlers as they were, with their type strings."""
    registration.register_handler(PointHandler, secondary_typestrs=["old.Point"])
    private = snapshot().checkpointables.registry
    registration.register_handler(TableHandler, checkpointable_name="late")
    assert not private.has("late")
    assert (PointHandler, None) in private.get_all_entries()
    assert private.get_secondary_typestrs(PointHandler) == ["old.Point"]


def test_i7_an_operation_has_its_own_copy_of_a_local_registry() -> None:
    """What is added to the context's registry after the snapshot does not reach it."""
    context = Context()
    local = context.checkpointables.registry = registration.local_registry().add(PointHandler)
    private = snapshot(context).checkpointables.registry
    local.add(TableHandler)
    assert private.get_all_entries()[-1] == (PointHandler, None)


def test_a_registry_of_the_users_own_making_will_serve() -> None:
    """Any object with the methods is accepted, also in the older shape without type strings."""

    class Own:
        def add(self, handler_type: Any, checkpointable: str | None = None) -> Own:
            return self

        def get(self, checkpointable: str) -> Any:
            return PointHandler

        def has(self, checkpointable: str) -> bool:
            return True

        def get_all_entries(self) -> list[tuple[Any, str | None]]:
            return [(PointHandler, "p")]

    context = Context()
    context.checkpointables.registry = Own()
    private = snapshot(context).checkpointables.registry
    assert private.get_all_entries() == [(PointHandler, "p")]
    assert private.get_secondary_typestrs(PointHandler) == []
    with pytest.raises(TypeError, match=r"CheckpointablesOptions\.registry .* 'add'"):
        context.checkpointables.registry = 5


def test_the_default_registry_is_read_only() -> None:
    """Adding to it is refused with the two ways that work."""
    view = Context().checkpointables.registry
    with pytest.raises(NotImplementedError, match=r"register_handler.*local_registry"):
        view.add(PointHandler)
    with pytest.raises(NotImplementedError):
        ocp.Context().checkpointables.registry.add(PointHandler)


def test_create_with_handlers_adds_to_the_global_ones() -> None:
    """Classes and ready handlers, with a name or without, come after the global entries."""
    ready = TableHandler()
    made = CheckpointablesOptions.create_with_handlers(PointHandler, ready, table=TableHandler)
    entries = made.registry.get_all_entries()
    assert entries[:-3] == registration.global_registry().get_all_entries()
    assert entries[-3:] == [(PointHandler, None), (ready, None), (TableHandler, "table")]
    context = Context(checkpointables_options=made)
    assert context.checkpointables.registry.get_all_entries() == entries


def test_of_many_threads_that_add_one_handler_one_succeeds() -> None:
    """The check for duplicates and the entry are one step, however often threads take turns."""

    def add(registry: registration.HandlerRegistry) -> bool:
        together.wait()
        try:
            registry.add(PointHandler)
        except registration.AlreadyExistsError:
            return False
        return True

    together = threading.Barrier(8)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            for _ in range(100):
                registry = registration.local_registry(include_global_registry=False)
                assert sum(threads.map(add, [registry] * 8)) == 1
                assert registry.get_all_entries() == [(PointHandler, None)]
    finally:
        sys.setswitchinterval(interval)


def test_registries_show_their_entries() -> None:
    """The repr names the handlers, of a view too."""
    registration.register_handler(PointHandler, checkpointable_name="shown")
    assert "PointHandler'>, 'shown')" in repr(registration.global_registry())
    assert "PointHandler'>, 'shown')" in repr(Context().checkpointables.registry)
