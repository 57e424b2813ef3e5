"""Loading a state, or several checkpointables, whole or in part."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from orbax_async import _names as names
from orbax_async._api.metadata import CheckpointMetadata
from orbax_async._engine import loop
from orbax_async._layouts.layout import Checkpointable, Layout, reading
from orbax_async._layouts.orbax import check_name
from orbax_async._layouts.reader import Reader
from orbax_async._operation import Operation, older, starting
from orbax_async._response import AsyncResponse
from orbax_async._storage import seal
from orbax_async._storage.local import open_directory
from orbax_async.handlers import phases
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.handlers.read_plan import ShardingFunction
from orbax_async.path import Path, PathLike
from orbax_async.tree.keypath import Select

Selects = Select | Mapping[str, Select]
Shardings = jax.sharding.Sharding | ShardingFunction | Mapping[str, Any]


def load(
    path: PathLike,
    abstract_state: Any | None = None,
    *,
    checkpointable_name: str | None = names.AUTO_CHECKPOINTABLE,
    select: Select | None = None,
    sharding: jax.sharding.Sharding | ShardingFunction | None = None,
) -> Any:
    """Loads a state and returns it.

    Takes and raises what `load_async` does.

    Example:
      ::

        state = ocp.load("/checkpoints/7", jax.eval_shape(init, key))
    """
    return load_async(
        path,
        abstract_state,
        checkpointable_name=checkpointable_name,
        select=select,
        sharding=sharding,
    )._finish()


def load_async(
    path: PathLike,
    abstract_state: Any | None = None,
    *,
    checkpointable_name: str | None = names.AUTO_CHECKPOINTABLE,
    select: Select | None = None,
    sharding: jax.sharding.Sharding | ShardingFunction | None = None,
) -> AsyncResponse[Any]:
    """Loads a state in the background; an ordinary function whose result can be awaited.

    Example:
      ::

        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
        )
        state = await ocp.load_async("/checkpoints/7", abstract)

    Args:
      path: the checkpoint; with `context.checkpoint_layout = "safetensors"` such a file, or a
        directory with such files.
      abstract_state: what to load: a tree with the containers wanted back, whose leaves say what
        each leaf becomes. `jax.ShapeDtypeStruct` or an array gives shape, dtype (values are cast)
        and sharding (values are resharded; the saved sharding where none is given); `np.ndarray`
        values and types give NumPy; Python types give scalars; None and `...` skip the leaf. What
        `metadata` returns is accepted. Without it, everything is loaded as it was saved, into
        plain dicts and lists, on one device where the devices that saved it are not here. Of
        safetensors files, a flat dict of some of the tensors; without it, NumPy arrays.
      checkpointable_name: which pytree of the checkpoint; `AUTO` takes `state` or the first, None
        a flat checkpoint of older Orbax versions. Safetensors files have no names for it.
      select: which leaves to load: patterns of key paths such as `"params/*/kernel"`, where `*`
        stands for any part of a key and `**` for any keys, and what lies below counts; with a `!`
        before it, a pattern takes away. Or a function of the key path. Only the bytes of these
        leaves are read. Other leaves are left out of dicts, and are `...` in lists and where there
        is an abstract tree.
      sharding: where jax arrays go of which the abstract tree says nothing: one sharding for all,
        or a function of key path, shape and dtype, called on a thread of the engine; where it
        returns None the saved sharding is used. Safetensors files say nothing of shardings: with
        one here, all of their tensors become jax arrays, and without any, those that do are
        replicated on all devices.

    Returns:
      A response whose result is the state.

    Raises:
      AbstractLeafError: the abstract tree holds what nothing can be loaded as.
      TypeError, ValueError: `select` or `sharding` is something else.
      InvalidLayoutError: (when awaited, as all below) there is no such checkpoint.
      TreeMismatchError: the trees differ, or a pattern matches nothing; every difference is
        listed, those of shapes and dtypes too.
      UnknownTensorError: likewise, of safetensors files.
      ShapeMismatchError: a leaf has another shape.
      DtypeMismatchError: a leaf can't be had in that dtype without losing values.
      ShardingMismatchError: a sharding does not fit its array.
      CorruptDataError: stored bytes do not match their checksum.
      ReadError: a leaf can't be read.
    """
    with starting("load") as operation:
        reader = Reader(operation, path)
        check_name(checkpointable_name, is_saved=False)
        if isinstance(abstract_state, CheckpointMetadata):
            abstract_state = abstract_state.metadata
        registry = operation.context.checkpointables.registry
        part = phases.state_for_loading(
            checkpointable_name, abstract_state, registry, select=select, sharding=sharding
        )

        def find(layout: Layout) -> _Found:
            name, directory = layout.tree(checkpointable_name)
            return part._replace(name=name), Path(directory.path)

        async def read(found: _Found) -> Any:
            (state,) = (await _load([found], operation)).values()
            return state

        return reader.start("load from", find, read)


def load_checkpointables(
    path: PathLike,
    abstract_checkpointables: dict[str, Any] | CheckpointMetadata[dict[str, Any]] | None = None,
    *,
    select: Selects | None = None,
    sharding: Shardings | None = None,
) -> dict[str, Any]:
    """Loads several checkpointables of one checkpoint, and returns them by name.

    Takes and raises what `load_checkpointables_async` does.

    Example:
      ::

        loaded = ocp.load_checkpointables("/checkpoints/7", {"state": abstract, "data": iterator})
        state = loaded["state"]
    """
    return load_checkpointables_async(
        path, abstract_checkpointables, select=select, sharding=sharding
    )._finish()


def load_checkpointables_async(
    path: PathLike,
    abstract_checkpointables: dict[str, Any] | CheckpointMetadata[dict[str, Any]] | None = None,
    *,
    select: Selects | None = None,
    sharding: Shardings | None = None,
) -> AsyncResponse[dict[str, Any]]:
    """Loads several checkpointables of one checkpoint in the background.

    They are loaded concurrently, under the memory limits of one load.

    Example:
      ::

        loaded = await ocp.load_checkpointables_async("/checkpoints/7", {"config": None})
        loaded = await ocp.load_checkpointables_async(
            "/checkpoints/7", select={"state": "params/**"}, sharding=replicated
        )

    Args:
      path: the checkpoint.
      abstract_checkpointables: what to load by name, and as what: an abstract tree for a pytree,
        the class for a protobuf message, the object itself for one that loads itself, None for
        what is stored as it is. Names that are left out are not loaded. Without it, or with an
        empty dict, all are. What `checkpointables_metadata` returns is accepted.
      select: which leaves of pytrees to load, as for `load_async`: for all pytrees alike, or a dict
        by name. What it does not name is loaded whole, and so is all that is no pytree.
      sharding: where jax arrays go of which the abstract trees say nothing, as for `load_async`:
        for all pytrees alike, or a dict by name.

    Returns:
      A response whose result is a dict of what was loaded.

    Raises:
      ValueError: `abstract_checkpointables` is no dict, or has a name that can't be one; or
        (when awaited) `select` or `sharding` names what is not loaded or is no pytree, or is given
        where nothing is.
      TypeError, ValueError: `select` or `sharding` is something else.
      InvalidLayoutError: (when awaited, as all below) there is no such checkpoint, or it is a flat
        one of older Orbax versions.
      UnknownCheckpointableError: the checkpoint has no checkpointable of that name.
      DeletionInProgressError: its deletion was begun and not finished.
      NoEntryError: no registered handler can load it.
      MissingAbstractError: it can't be loaded without an abstract form.
      Exception: what a handler raises; a note on it, and on the above, names the checkpointable.
      TreeMismatchError and others: as for `load_async`.
    """
    with starting("load") as operation:
        reader = Reader(operation, path)
        wanted = _wanted(abstract_checkpointables)
        options = _options_of_reading(select, sharding)
        registry = operation.context.checkpointables.registry

        def resolved(stored: dict[str, Checkpointable]) -> list[_Found]:
            parts = {}
            for name, each in stored.items():
                with phases.naming(name):
                    parts[name] = phases.for_loading(
                        name,
                        wanted.get(name),
                        registry,
                        typestr=each.typestr,
                        is_pytree=each.is_pytree,
                        path=reader.directory.path,
                    )
            found = _subset(parts, wanted, options).items()
            return [(part, Path(stored[name].directory.path)) for name, part in found]

        async def read(stored: dict[str, Checkpointable]) -> dict[str, Any]:
            return await _load(await loop.to_worker(resolved, stored), operation)

        return reader.start("load from", lambda layout: layout.checkpointables(wanted), read)


def _wanted(abstract: Any) -> dict[str, Any]:
    """Returns what to load, by name, and as what; nothing for all."""
    if isinstance(abstract, CheckpointMetadata):
        abstract = abstract.metadata
    if abstract is None:
        return {}
    if not isinstance(abstract, Mapping):
        raise ValueError(
            "`abstract_checkpointables` must be a valid mapping of names to abstract "
            f"checkpointables, got {type(abstract).__name__}: {abstract!r:.100}"
        )
    for name in abstract:
        check_name(name, is_saved=True)
    return dict(abstract)


_Found = tuple[phases.Part, Path]
"""What to load, and where it lies."""


async def _load(found: list[_Found], operation: Operation) -> dict[str, Any]:
    """Runs both phases of all that is to be loaded."""
    operation.expect(part.name or "" for part, _ in found)
    for part, directory in found:
        if part.code("load") is not None:  # our own handlers prove what they read
            with phases.naming(part.name or ""):
                await loop.to_worker(_prove, directory)
    seconds = await phases.first(
        [
            phases.Phase(
                part.name or "",
                functools.partial(part.handler.load, directory, part.value),
                part.code("load"),
            )
            for part, directory in found
        ],
        when_done=operation.release_caller,
    )
    return await phases.second(seconds)


def _prove(path: Path) -> None:
    """Raises if the files of a checkpointable are not what was saved; blocks."""
    with reading(str(path)):
        seal.of_tree(open_directory(path)).check_all()


def _options_of_reading(select: Any, sharding: Any) -> dict[str, Any]:
    """Returns `select` and `sharding`, kept and checked; each is one for all, or a dict by name."""
    options = {"select": _kept(select), "sharding": _kept(sharding)}
    for what, given in options.items():
        for one in given.values() if isinstance(given, Mapping) else [given]:
            only: dict[str, Any] = {what: one}
            PyTreeHandler().read_abstract(None, **only)
    return options


def _kept(given: Any) -> Any:
    """Returns patterns that can be read several times, unlike those of a generator."""
    if isinstance(given, Mapping):
        return {name: _kept(each) for name, each in given.items()}
    return list(given) if isinstance(given, Iterator) else given


def _subset(
    parts: dict[str, phases.Part], abstracts: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, phases.Part]:
    """Returns what is to be loaded, pytrees without the leaves that are not selected."""
    trees = [name for name, part in parts.items() if isinstance(part.handler, PyTreeHandler)]
    subset = dict(parts)
    for what, given in options.items():
        named = given if isinstance(given, Mapping) else dict.fromkeys(trees or parts, given)
        wrong = [name for name in named if name not in trees and given is not None]
        if wrong:
            raise ValueError(
                f"{what}: {wrong} can't be loaded in part, as nothing but pytrees can; of what "
                f"is to be loaded these are pytrees: {trees}"
            )
    for name in trees:
        of_tree = {
            what: given.get(name) if isinstance(given, Mapping) else given
            for what, given in options.items()
        }
        if any(each is not None for each in of_tree.values()):
            abstract = parts[name].handler.read_abstract(abstracts.get(name), **of_tree)
            subset[name] = parts[name]._replace(value=abstract)
    return subset


# Older names, which Orbax has deprecated too.

load_pytree = older(load)
load_pytree_async = older(load_async)
