"""Reading a stored tree: what is asked of it, and its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from orbax_async import _operation as operation
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._engine import loop, plan
from orbax_async._engine.load_pipeline import LoadPipeline
from orbax_async._layouts.protocol import StoredTree
from orbax_async._layouts.table import layout_of
from orbax_async._storage import zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.openers import open_directory
from orbax_async.handlers import leaves, targets
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.selection import Selection
from orbax_async.tree.structure import FlatTree

__all__ = ["AbstractTree", "Loading", "ShardingFunction"]

ShardingFunction = Callable[
    [tuple[Any, ...], tuple[int, ...], np.dtype[Any]], jax.sharding.Sharding | None
]

_BATCH_NBYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class AbstractTree:
    """What is asked for, understood.

    Attributes:
      flat: the abstract tree; None for what is stored.
      wanted: its leaves.
      selection: which leaves are loaded; None for all.
      sharding: of jax arrays of which the tree says none: one for all, or a function.
    """

    flat: FlatTree | None
    wanted: list[targets.Wanted]
    selection: Selection | None = None
    sharding: jax.sharding.Sharding | ShardingFunction | None = None


class Loading:
    """One load of one tree; building it reads documents, so it is built on a worker."""

    def __init__(
        self,
        directory: str,
        abstract: AbstractTree,
        options: ambient.Context,
        doing: operation.Operation,
    ) -> None:
        self._abstract = abstract
        self._problems: list[str] = []
        self._refused: list[errors.LeafError] = []
        layout = layout_of(open_directory(directory), doing.context)
        stored = self._stored = layout.open_tree(is_for_jax=abstract.sharding is not None)
        self._nest = stored.nest_for(options)
        self._wanted = self._matched(stored.entries, is_partial=options.pytree.loading.partial_load)
        to_load = self._without_data(stored)
        self._targets: dict[int, targets.Target] = {}
        store = stored.open_store() if to_load else None
        if store is not None:
            terms = _terms(options, doing, is_tight=stored.lies_plainly)
            self._resolve(stored, store, to_load, terms)
        self._raise_problems(directory)
        self._pipeline: LoadPipeline | None = None
        if store is None:
            return
        limit = options.memory.read_concurrent_bytes
        broadcast = options.array.loading.load_and_broadcast_options
        self._pipeline = LoadPipeline(
            to_load,
            {index: target.form for index, target in self._targets.items()},
            [
                plan.ReadRequest(index, region, region.nbytes)
                for index, target in self._targets.items()
                for region in target.regions
            ],
            store,
            batch_nbytes=_BATCH_NBYTES if limit is None else min(limit, _BATCH_NBYTES),
            read_budget=doing.read_budget,
            recorder=doing.recorder,
            broadcast_nbytes=broadcast.broadcast_memory_limit_bytes,
            broadcast_share=broadcast.broadcast_memory_scaling_factor or 1.0,
        )
        self._pipeline.map_memory()

    def _matched(
        self, entries: Sequence[schema.Entry], *, is_partial: bool
    ) -> Sequence[targets.Wanted]:
        """Finds what is stored for each leaf, notes all differences; returns what is asked for."""
        flat, selection = self._abstract.flat, self._abstract.selection
        by_keys = {entry.keys: entry for entry in entries}
        selected = by_keys
        if selection is not None:
            selected = {keys: entry for keys, entry in by_keys.items() if selection.has(keys)}
            self._problems += selection.problems(by_keys)
        if flat is None:
            self._entries: list[schema.Entry | None] = list(entries)
            self._values: list[Any] = [
                None if entry.keys in selected else structure.LEFT_OUT for entry in entries
            ]
            return [
                targets.STORED if entry.keys in selected else targets.SKIPPED for entry in entries
            ]
        if selection is not None:
            flat = flat._replace(
                leaves=[
                    leaf
                    if keys in selected or structure.empty_kind(leaf) or selection.has(keys)
                    else ...
                    for keys, leaf in flat.entries
                ],
            )
        if self._stored.may_be_asked_in_part:
            asked = set(flat.keys)
            selected = {keys: entry for keys, entry in selected.items() if keys in asked}
        self._entries, problems = structure.match(
            flat,
            selected,
            is_stored_empty=lambda entry: bool(entry.is_empty),
            is_partial=is_partial,
        )
        self._problems += problems
        self._values = list(flat.leaves)
        return self._abstract.wanted

    def _without_data(self, stored: StoredTree) -> dict[int, schema.Entry]:
        """Sets the values that are in the documents; returns the leaves that are not."""
        to_load: dict[int, schema.Entry] = {}
        texts: list[tuple[int, schema.Entry]] = []
        for index, (entry, wanted) in enumerate(zip(self._entries, self._wanted, strict=True)):
            if entry is None or wanted is targets.SKIPPED:
                continue
            if entry.is_empty:
                self._values[index] = entry.empty_value()
            elif entry.kind != schema.STRING:
                to_load[index] = entry
            elif wanted.form in ("string", "stored"):
                texts.append((index, entry))
            else:
                self._refused.append(
                    errors.DtypeMismatchError(
                        keypath.label(entry.keys),
                        "the checkpoint holds a str, and something else was asked for",
                    )
                )
        strings = stored.strings([entry for _, entry in texts]) if texts else {}
        for index, entry in texts:
            self._values[index] = strings[entry.name]
        return to_load

    def _resolve(
        self,
        stored: StoredTree,
        store: ArrayStore,
        to_load: Mapping[int, schema.Entry],
        terms: targets.Terms,
    ) -> None:
        """Decides how each array is read; those that are alike share what is decided."""
        documents = stored.documents(store, list(to_load.values()))
        given = self._abstract.sharding
        function = given if callable(given) else None
        for_all = None if callable(given) else given
        default = stored.default_sharding()
        needs_shardings = for_all is None and any(
            wanted.form == "stored" or (wanted.form == "jax" and wanted.sharding is None)
            for wanted in (self._wanted[index] for index in to_load)
        )
        shardings = stored.shardings() if needs_shardings else {}
        # Typed keys are stored as uint32; nothing else needs the records of arrays.
        distinct = {id(document): document for document in documents.values()}.values()
        may_hold_keys = any(zarr.stored_dtype(each).name == "uint32" for each in distinct)
        impls = stored.prng_impls() if may_hold_keys else {}
        alike: dict[Any, targets.Target] = {}
        for index, entry in to_load.items():
            wanted = self._wanted[index]
            document, saved = documents[entry.name], shardings.get(entry.name)
            impl = impls.get(entry.name)
            private = tuple(sorted(entry.private.items())) if entry.private else ()
            sharding = for_all
            if function is not None and wanted.sharding is None:
                sharding = _asked_of(function, entry, document, wanted)
            sharding = sharding or default
            key = (id(document), id(wanted), id(saved), entry.kind, impl, private, sharding)
            target = alike.get(key)
            if target is None:
                try:
                    target = alike[key] = targets.resolve(
                        entry,
                        document,
                        wanted,
                        terms,
                        sharding=sharding,
                        saved_sharding=saved,
                        prng_impl=impl,
                    )
                except errors.LeafError as error:
                    self._refused.append(error)
                    continue
            self._targets[index] = target

    def _raise_problems(self, directory: str) -> None:
        """Reports everything at once that keeps the tree from being loaded as it is asked for.

        Raises:
          TreeMismatchError: the trees differ.
          LeafError: they don't, but leaves can't be had so; all but the first hang on it.
        """
        if not self._problems:
            if self._refused:
                raise leaves.summary(self._refused)
            return
        lines = [
            *self._problems,
            *(str(error).removeprefix("leaf ") for error in self._refused),
        ]
        listing = "\n  ".join(lines)
        raise self._stored.mismatch(
            f"the abstract tree does not match the checkpoint at {directory}:\n  {listing}\n"
            f"{self._stored.mismatch_hint}",
            tuple(lines),
        )

    async def run(self) -> Any:
        """Reads the data and rebuilds the tree."""
        if self._pipeline is not None:
            await self._pipeline.run()
        return await loop.to_worker(self._finish)

    def _finish(self) -> Any:
        for index, target in self._targets.items():
            assert self._pipeline is not None
            entry = self._entries[index]
            assert entry is not None
            self._values[index] = target.finish(entry, self._pipeline.pieces_of(index))
        if self._abstract.flat is not None:
            return self._abstract.flat.rebuild(self._values)
        # What is left out leaves gaps that only plain containers can have.
        has_gaps = any(value is structure.LEFT_OUT for value in self._values)
        nest = structure.nest if has_gaps else self._nest
        return nest(
            (entry.keys, value)
            for entry, value in zip(self._entries, self._values, strict=True)
            if entry is not None
        )


def _terms(
    options: ambient.Context, doing: operation.Operation, *, is_tight: bool
) -> targets.Terms:
    loading = options.array.loading
    broadcast = loading.load_and_broadcast_options
    return targets.Terms(
        process=doing.processes.index,
        enable_x64=doing.enable_x64,
        pads=loading.enable_padding_and_truncation,
        fills_missing=not loading.raise_array_data_missing_error,
        broadcast=targets.Broadcast(
            broadcast.replica_axis_index or 0, broadcast.primary_replica_id or 0
        )
        if loading.use_load_and_broadcast
        else None,
        is_tight=is_tight,
    )


def _asked_of(
    function: ShardingFunction,
    entry: schema.Entry,
    document: Mapping[str, Any],
    wanted: targets.Wanted,
) -> jax.sharding.Sharding | None:
    """Asks a user's function where an array goes, if it goes to devices."""
    if not targets.is_for_jax(entry, wanted):
        return None
    label = keypath.label(entry.keys)
    shape = wanted.shape if wanted.shape is not None else tuple(document["shape"])
    dtype = wanted.dtype if wanted.dtype is not None else zarr.stored_dtype(document)
    try:
        sharding = function(keypath.jax_path(entry.keys), shape, dtype)
    except Exception as error:
        error.add_note(f"while asking for the sharding of leaf {label}")
        raise
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(f"the sharding function returned {sharding!r} for leaf {label}")
    return targets.concrete(label, sharding)
