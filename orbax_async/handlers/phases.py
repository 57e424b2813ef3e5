"""Which handler takes a checkpointable, and the two phases of all of them.

Rules of the choice, of Orbax and in this order
  To save: an object that saves itself goes to the newest handler that takes it. For any other the
  handler bound to its name is used, unasked; else the newest that takes it.

  To load: an object that loads itself, from what such an object has saved; the handler bound to the
  name, if it can load what is asked for; the one that the checkpoint names, unless it says that it
  can't; the newest that says that it can; the one bound to the name after all. What looks like a
  pytree is loaded as one if everything else fails.

  A handler that is bound to a name serves no other. Checkpoints name Orbax's own handler classes.
  Those names stand for the classes here, and these write those names.

Theory of operation
  Each phase runs concurrently for all checkpointables, and has one end for all. The first failure
  cancels the others, and disposes of second phases that will not be awaited any more. It leaves
  with a note that names its checkpointable; its class and message stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple

import anyio
import jax

from orbax_async import _names as names
from orbax_async import errors, registration
from orbax_async._trace import logger
from orbax_async.handlers import user_code
from orbax_async.handlers.documents import JsonHandler, MetricsHandler, ProtoHandler
from orbax_async.handlers.parts import PartsHandler
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.handlers.read_plan import ShardingFunction
from orbax_async.handlers.user_code import StatefulCheckpointableHandler
from orbax_async.tree.keypath import Select

__all__ = [
    "TYPESTRS",
    "Part",
    "Phase",
    "first",
    "for_loading",
    "for_saving",
    "naming",
    "second",
    "state_for_loading",
]


class Phase(NamedTuple):
    """One phase of one checkpointable."""

    name: str
    begin: Callable[[], Any]  # returns what is to be awaited
    code: str | None  # what users call the code behind it, "PointHandler.save"; None for our own


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Notes a checkpointable's name on an error that leaves the block."""
    try:
        yield
    except Exception as error:
        if name:  # a flat, older checkpoint has none
            error.add_note(f"checkpointable: {name!r}")
        raise


async def first(
    phases: Iterable[Phase], *, when_done: Callable[[str], None] = lambda name: None
) -> dict[str, Phase]:
    """Runs the first phases, tells of each that has ended well, and returns the second ones."""
    second_phases: dict[str, Phase] = {}

    async def run(phase: Phase) -> None:
        name, begin, code = phase
        with naming(name):
            if code is None:
                awaitable = await begin()
            else:
                awaitable = user_code.checked(await user_code.awaited(begin(), code), code)
        second_phases[name] = Phase(name, lambda: awaitable, code)
        when_done(name)

    phases = list(phases)
    await _run_all(run, phases, unused=second_phases)
    return {name: second_phases[name] for name, _, _ in phases}


async def second(phases: dict[str, Phase]) -> dict[str, Any]:
    """Runs the second phases, and returns their results in the same order."""
    results = dict[str, Any].fromkeys(phases)
    not_begun = dict(phases)

    async def run(phase: Phase) -> None:
        name, begin, code = not_begun.pop(phase.name)
        with naming(name):
            awaitable = begin()
            results[name] = await (
                awaitable if code is None else user_code.awaited(awaitable, code)
            )

    await _run_all(run, list(phases.values()), unused=not_begun)
    return results


async def _run_all(
    run: Callable[[Phase], Coroutine[Any, Any, None]],
    phases: list[Phase],
    *,
    unused: dict[str, Phase],
) -> None:
    """Runs phases concurrently; after a failure it disposes of the `unused` second ones."""
    try:
        if len(phases) == 1:  # the usual case needs no task of its own
            await run(phases[0])
            return
        with errors.ungrouped():
            async with anyio.create_task_group() as group:
                for phase in phases:
                    group.start_soon(run, phase)
    except BaseException:
        with anyio.CancelScope(shield=True):
            for phase in unused.values():
                await user_code.dispose(phase.begin())
        raise


# Choosing.


Registry = registration.CheckpointableHandlerRegistry

_MODULES = names.PYTREE_TYPESTR.removesuffix("pytree_handler.PyTreeHandler")
TYPESTRS: dict[type, str] = {
    PyTreeHandler: names.PYTREE_TYPESTR,
    PartsHandler: names.PYTREE_TYPESTR,
    JsonHandler: f"{_MODULES}json_handler.JsonHandler",
    MetricsHandler: f"{_MODULES}json_handler.MetricsHandler",
    ProtoHandler: f"{_MODULES}proto_handler.ProtoHandler",
    StatefulCheckpointableHandler: (
        f"{_MODULES}stateful_checkpointable_handler.StatefulCheckpointableHandler"
    ),
}
"""What the package's handlers are called on disk."""


def _older(*classes: str) -> list[str]:
    """Returns the names of handlers of older Orbax versions, which lay in two places."""
    return [
        f"orbax.checkpoint.{version}_src.handlers.{name}"
        for name in classes
        for version in ("", "v0.")
    ]


_OLDER_TREES = _older(
    "pytree_checkpoint_handler.PyTreeCheckpointHandler",
    "standard_checkpoint_handler.StandardCheckpointHandler",
)
_OLDER_JSON = _older("json_checkpoint_handler.JsonCheckpointHandler")
_OLDER_PROTO = _older("proto_checkpoint_handler.ProtoCheckpointHandler")

# The newest is asked first: most of what is saved is a pytree.
registration.begin_with(
    registration.HandlerRegistry()
    .add(ProtoHandler, secondary_typestrs=_OLDER_PROTO)
    .add(JsonHandler, secondary_typestrs=_OLDER_JSON)
    .add(StatefulCheckpointableHandler)
    .add(MetricsHandler, checkpointable_name=names.METRICS)
    .add(PyTreeHandler, secondary_typestrs=_OLDER_TREES)
    .add(
        PyTreeHandler,
        checkpointable_name=names.DEFAULT_CHECKPOINTABLE,
        secondary_typestrs=_OLDER_TREES,
    )
)

# What takes a value apart before any work starts, and refuses what can't be saved.
_PREPARE_TO_SAVE: dict[type, Callable[[Any, Any], Any]] = {
    PyTreeHandler: PyTreeHandler.flatten,
    JsonHandler: JsonHandler.encode,
    MetricsHandler: MetricsHandler.encode,
    ProtoHandler: ProtoHandler.encode,
}


class Part(NamedTuple):
    """One checkpointable of an operation, and what saves or loads it."""

    name: str | None  # None for a flat, older checkpoint
    handler: Any
    value: Any  # what the handler is given: the object or its abstract form, prepared or not

    @property
    def typestr(self) -> str:
        """What the handler is called on disk."""
        return _typestr(type(self.handler))

    def code(self, verb: str) -> str | None:
        """Names a user's code behind a verb of the handler; None if that is our own."""
        saves_itself = isinstance(self.handler, StatefulCheckpointableHandler)
        if not saves_itself and type(self.handler) in TYPESTRS:
            return None
        return f"{type(self.value if saves_itself else self.handler).__name__}.{verb}"


def for_saving(
    name: str, checkpointable: Any, registry: Registry, *, is_state: bool = False
) -> Part:
    """Chooses what saves an object, and lets it refuse the object before any work starts.

    Raises:
      NoEntryError: no handler takes the object.
      HandlerError: the handler bound to the name can't be made.
      LeafError: it is a state, or bound to a handler of such, and holds what can't be stored.
    """
    saves_itself = not is_state and user_code.is_stateful(checkpointable)
    if not saves_itself and registry.has(name):
        handler = _made(registry.get(name))
        prepare = _PREPARE_TO_SAVE.get(type(handler))
        return Part(name, handler, prepare(handler, checkpointable) if prepare else checkpointable)
    refusals: list[str] = []
    of_leaf: errors.LeafError | None = None
    for handler in _newest_first(registry, refusals):
        prepare = _PREPARE_TO_SAVE.get(type(handler))
        if prepare is None:
            if handler.is_handleable(checkpointable):
                return Part(name, handler, checkpointable)
            continue
        try:
            prepared = prepare(handler, checkpointable)
        except (errors.LeafError, errors.NotJsonError) as refusal:
            refusals.append(f"{type(handler).__name__}: {refusal}")
            if type(handler) is PyTreeHandler and isinstance(refusal, errors.LeafError):
                of_leaf = refusal
                if is_state:
                    raise
        else:
            if of_leaf is not None and type(handler) is JsonHandler:
                raise of_leaf  # a tree like any other, and what is wrong with it is known
            return Part(name, handler, prepared)
    raise registration.NoEntryError(
        f"Could not identify a valid handler for the checkpointable {name!r} of type "
        f"{type(checkpointable).__name__}: register a CheckpointableHandler for it with "
        "handlers.register_handler, or add one to a handlers.local_registry() and assign that to "
        f"context.checkpointables.registry. {_because(refusals)}"
    ) from of_leaf


def for_loading(
    name: str, abstract: Any, registry: Registry, *, typestr: str | None, is_pytree: bool, path: str
) -> Part:
    """Chooses what loads a checkpointable, of which the checkpoint names the handler `typestr`.

    Raises:
      NoEntryError: no handler can load what is asked for.
      HandlerError: the handler bound to the name can't be made.
      AbstractLeafError: it is a pytree, and what is asked for is none.
    """
    if typestr == TYPESTRS[StatefulCheckpointableHandler]:
        if user_code.is_stateful(abstract):
            return Part(name, StatefulCheckpointableHandler(), abstract)
        if is_pytree:  # Orbax's partial saves call the handler of their trees so
            typestr = TYPESTRS[PyTreeHandler]
    bound = _made(registry.get(name)) if registry.has(name) else None
    if bound is not None:
        verdict, value = _asked(bound, abstract)
        if verdict:
            return Part(name, bound, value)
    refusals: list[str] = []
    others = [(each, *_asked(each, abstract)) for each in _newest_first(registry, refusals)]
    for other, verdict, value in others:
        if verdict is not False and typestr in _typestrs(other, registry):
            return Part(name, other, value)
    for other, verdict, value in others:
        can_read = is_pytree or type(other) is not PyTreeHandler
        if verdict and abstract is not None and can_read:
            return Part(name, other, value)
    if bound is not None:
        return Part(name, bound, abstract)
    if is_pytree:
        return Part(name, PyTreeHandler(), abstract)
    wanted = "" if abstract is None else f", as {type(abstract).__name__}"
    raise registration.NoEntryError(
        f"Could not resolve a handler that loads {name!r} of {path}{wanted}. It was saved by "
        f"{typestr or 'a handler that the checkpoint does not name'}: register that, or one with "
        "it among its secondary_typestrs, or ask for an abstract form that a registered handler "
        f"can load. {_because(refusals)}"
    )


def state_for_loading(
    name: str | None,
    abstract: Any,
    registry: Registry,
    *,
    select: Select | None = None,
    sharding: jax.sharding.Sharding | ShardingFunction | None = None,
) -> Part:
    """Chooses what loads a pytree: a handler of such that is bound to its name, or a new one."""
    bound = _made(registry.get(name)) if name is not None and registry.has(name) else None
    if not isinstance(bound, PyTreeHandler):
        bound = PyTreeHandler()
    if type(bound) is PyTreeHandler or select is not None or sharding is not None:
        abstract = bound.read_abstract(abstract, select=select, sharding=sharding)
    return Part(name, bound, abstract)


def _newest_first(registry: Registry, refusals: list[str]) -> Iterator[Any]:
    """Makes the handlers that are bound to no name; those that can't be made say why."""
    for handler, name in reversed(registry.get_all_entries()):
        if name is not None:
            continue
        try:
            made = _made(handler)
        except errors.HandlerError as error:
            logger.warning("a registered handler is left out: %s", error)
            refusals.append(str(error))
        else:
            yield made


def _asked(handler: Any, abstract: Any) -> tuple[bool | None, Any]:
    """Returns whether a handler can load what is asked for, and what to give to its `load`."""
    if abstract is None:
        return True, None
    if type(handler) is PyTreeHandler:
        try:
            return True, handler.read_abstract(abstract)
        except errors.LeafError:
            return False, abstract
    return handler.is_abstract_handleable(abstract), abstract


def _made(handler: Any) -> Any:
    """Returns a handler, made of its class unless it is registered ready for use."""
    if not isinstance(handler, type):
        return handler
    try:
        return handler()
    except Exception as error:
        raise errors.HandlerError(
            f"{handler.__name__} could not be default-constructed: {error!r}; register an "
            "instance, or give its arguments defaults"
        ) from error


def _typestr(handler_type: type) -> str:
    own = f"{handler_type.__module__}.{handler_type.__qualname__}"
    return TYPESTRS.get(handler_type, own)


def _typestrs(handler: Any, registry: Registry) -> list[str]:
    entries = (handler, type(handler))  # it may be registered as an instance
    secondary = [each for entry in entries for each in registry.get_secondary_typestrs(entry)]
    return [_typestr(type(handler)), *secondary]


def _because(refusals: list[str]) -> str:
    if not refusals:
        return "No handler of the registry says that it can."
    return f"Refused by {'; '.join(refusals)}"
