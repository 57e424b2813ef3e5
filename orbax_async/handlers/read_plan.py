"""What a load reads of a stored tree, and what it makes of that.

`AbstractTree` says what is asked for. `Loading` matches it with what is stored, plans what is read
of each array (`plan_leaf`), reports everything at once that can't be had, reads, and rebuilds the
tree. Leaves that are stored alike and asked for alike share one plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._engine import loop, plan, transfer
from orbax_async._engine.load_pipeline import ArrayRead, LoadPipeline
from orbax_async._layouts.layout import StoredTree, reading
from orbax_async._layouts.reader import layout_of
from orbax_async._operation import Operation
from orbax_async._storage import zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.local import open_directory
from orbax_async._trace import logger
from orbax_async.handlers import kinds, leaves
from orbax_async.handlers.kinds import LeafRecord, Request
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.keypath import Select, Selection
from orbax_async.tree.structure import FlatTree

__all__ = ["AbstractTree", "Loading", "ShardingFunction", "describe", "understand"]

ShardingFunction = Callable[
    [tuple[Any, ...], tuple[int, ...], np.dtype[Any]], jax.sharding.Sharding | None
]


class AbstractTree(NamedTuple):
    """What is asked for, understood."""

    flat: FlatTree | None  # None asks for what is stored
    requests: Sequence[Request]
    selection: Selection | None = None  # None for all leaves
    sharding: jax.sharding.Sharding | ShardingFunction | None = None  # where the tree says none


def understand(
    abstract: Any,
    select: Select | None = None,
    sharding: jax.sharding.Sharding | ShardingFunction | None = None,
) -> AbstractTree:
    """Understands an abstract tree; see `PyTreeHandler.read_abstract`."""
    selection = None if select is None else Selection(select)
    if isinstance(sharding, jax.sharding.Sharding):
        try:
            sharding = transfer.concrete(sharding)
        except ValueError as reason:
            raise errors.AbstractLeafError("", str(reason)) from None
    elif sharding is not None and not callable(sharding):
        raise TypeError(f"sharding must be a jax.sharding.Sharding or a function, not {sharding!r}")
    if abstract is None:
        return AbstractTree(None, (), selection, sharding)
    flat = structure.flatten(abstract)
    alike: dict[Hashable, Request] = {}  # by what makes leaves alike, and by themselves
    requests: list[Request] = []
    refused: list[errors.LeafError] = []
    for keys, leaf in flat.entries:
        key: Hashable = None
        if type(leaf) is jax.ShapeDtypeStruct or isinstance(leaf, jax.Array):
            key = (leaf.shape, leaf.dtype, leaf.sharding, getattr(leaf, "weak_type", False))
        elif type(leaf) is np.ndarray:
            key = (np.ndarray, leaf.shape, leaf.dtype)
        request = alike.get(key)
        if request is None:
            try:
                request = kinds.want(keys, leaf)
            except errors.LeafError as error:
                refused.append(error)
                continue
            request = alike.setdefault(request, request)
            if key is not None:
                alike[key] = request
        requests.append(request)
    if refused:
        raise leaves.summary(refused)
    return AbstractTree(flat, requests, selection, sharding)


# What is read of leaves that are stored alike and asked for alike, and what makes a value of it.
LeafPlan = tuple[ArrayRead, Callable[[Sequence[Any]], Any]]


class Loading:
    """One load of one tree; building it reads documents, so it is built on a worker."""

    def __init__(
        self,
        directory: str,
        abstract: AbstractTree,
        options: ambient.Context,
        operation: Operation,
    ) -> None:
        self._abstract = abstract
        self._options = options.array.loading
        self._operation = operation
        self._problems: list[str] = []
        self._refused: list[errors.LeafError] = []
        layout = layout_of(open_directory(directory), operation.context)
        self._stored = layout.open_tree(is_for_jax=abstract.sharding is not None)
        self._nest = self._stored.nest_for(options)
        self._requests = self._matched(is_partial=options.pytree.loading.partial_load)
        to_load = self._without_data()
        self._reads: dict[int, ArrayRead] = {}
        self._finishers: dict[int, Callable[[Sequence[Any]], Any]] = {}
        self._pipeline: LoadPipeline | None = None
        if not to_load:
            self._raise_problems(directory)
            return
        store = self._stored.open_store()
        self._plan(store, to_load)
        self._raise_problems(directory)
        self._pipeline = LoadPipeline(
            to_load,
            self._reads,
            store,
            read_budget=operation.read_budget,
            recorder=operation.recorder,
            broadcast=self._options.load_and_broadcast_options,
        )
        self._pipeline.map_memory()

    def _matched(self, *, is_partial: bool) -> Sequence[Request]:
        """Finds what is stored for each leaf, notes all differences; returns what is asked for."""
        flat, selection = self._abstract.flat, self._abstract.selection
        entries = self._stored.entries
        by_keys = {entry.keys: entry for entry in entries}
        selected = by_keys
        if selection is not None:
            selected = {keys: entry for keys, entry in by_keys.items() if selection.has(keys)}
            self._problems += selection.problems(by_keys)
        if flat is None:
            self._entries: list[schema.Entry | None] = []  # None where nothing is to be loaded
            self._values: list[Any] = []
            for entry in entries:
                is_selected = selection is None or entry.keys in selected
                has_data = is_selected and not entry.is_empty
                self._entries.append(entry if has_data else None)
                if has_data:
                    self._values.append(None)
                elif is_selected:
                    self._values.append(entry.empty_value())
                else:  # only plain containers can have gaps
                    self._values.append(structure.LEFT_OUT)
                    self._nest = structure.nest
            return [kinds.STORED] * len(entries)
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
        self._entries, problems = structure.match(flat, selected, is_partial=is_partial)
        self._problems += problems
        self._values = list(flat.leaves)
        return self._abstract.requests

    def _without_data(self) -> dict[int, schema.Entry]:
        """Sets the values that are in the documents; returns the leaves that are not."""
        to_load: dict[int, schema.Entry] = {}
        texts: dict[int, schema.Entry] = {}
        for index, (entry, request) in enumerate(zip(self._entries, self._requests, strict=True)):
            if entry is None or request is kinds.SKIPPED:
                continue
            if entry.kind != schema.STRING:
                to_load[index] = entry
            elif (request.kind or kinds.TEXT).value_type == schema.STRING:
                texts[index] = entry
            else:
                self._refused.append(
                    errors.DtypeMismatchError(
                        keypath.label(entry.keys),
                        "the checkpoint holds a str, and something else was asked for",
                    )
                )
        found = self._stored.strings(list(texts.values())) if texts else {}
        for index, entry in texts.items():
            request = self._requests[index]
            kind = request.kind or kinds.TEXT
            self._values[index] = kind.decode(found[entry.name], LeafRecord(entry), request)
        return to_load

    def _plan(self, store: ArrayStore, to_load: Mapping[int, schema.Entry]) -> None:
        """Decides how each array is read."""
        documents = self._stored.documents(store, list(to_load.values()))
        self._stored.prove(list(to_load.values()))
        # Typed keys are stored as uint32; nothing else needs the records of arrays.
        may_hold_keys = any([document.dtype == np.uint32 for document in documents.values()])
        impls = self._stored.prng_impls() if may_hold_keys else {}
        given = self._abstract.sharding
        of_all = given if isinstance(given, jax.sharding.Sharding) else None
        needs_saved = of_all is None and any(
            [
                each.kind is None or (each.kind.is_on_devices and each.sharding is None)
                for each in map(self._requests.__getitem__, to_load)
            ]
        )
        saved = self._stored.shardings() if needs_saved else {}
        alike: dict[Hashable, LeafPlan] = {}
        for index, entry in to_load.items():
            request, document = self._requests[index], documents[entry.name]
            if document.nbytes > zarr.LARGE_NBYTES and self._options.raise_array_data_missing_error:
                absence = store.find_absence(entry.name, document)
                if absence is not None:
                    label = keypath.label(entry.keys)
                    self._refused.append(errors.CorruptDataError(label, absence))
                    continue
            impl, saved_sharding = impls.get(entry.name), saved.get(entry.name)
            private = tuple(sorted(entry.private.items())) if entry.private else ()
            sharding, told = request.sharding or of_all, None
            if given is not None and sharding is None:
                record = LeafRecord(entry, document, impl, saved_sharding)
                sharding = told = self._ask_for_sharding(record, request)
            # Any other sharding follows from the request, and would be slow to compare.
            key = (id(request), told, id(document), entry.kind, private, impl, id(saved_sharding))
            found = alike.get(key)
            if found is None:
                record = LeafRecord(entry, document, impl, saved_sharding)
                try:
                    found = alike[key] = self._plan_leaf(record, request, sharding)
                except errors.LeafError as error:
                    self._refused.append(error)
                    continue
            self._reads[index], self._finishers[index] = found

    def _ask_for_sharding(
        self, record: LeafRecord, request: Request
    ) -> jax.sharding.Sharding | None:
        """Asks the caller's function where an array goes, if that goes to devices."""
        given: Any = self._abstract.sharding
        if not kinds.result_kind(record, request).is_on_devices:
            return None
        shape = record.array.shape if request.shape is None else request.shape
        dtype = record.dtype if request.dtype is None else request.dtype
        try:
            sharding = given(keypath.jax_path(record.entry.keys), shape, dtype)
        except Exception as error:
            error.add_note(f"while asking for the sharding of leaf {record.label}")
            raise
        if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
            raise TypeError(f"the sharding function returned {sharding!r} for leaf {record.label}")
        try:
            return transfer.concrete(sharding)
        except ValueError as reason:
            raise errors.AbstractLeafError(record.label, str(reason)) from None

    def _plan_leaf(
        self, record: LeafRecord, request: Request, sharding: jax.sharding.Sharding | None
    ) -> LeafPlan:
        """Decides how one array is read, and what is made of it; refuses what can't be had."""
        kind = kinds.result_kind(record, request)
        kind.check(record, request)
        are_keys = record.prng_impl is not None or kind is kinds.RANDOM_KEYS
        pads = self._options.enable_padding_and_truncation and not are_keys
        shape = _shape(record, request, may_differ=pads)
        dtype = record.dtype if request.dtype is None or are_keys else request.dtype
        if not kind.is_on_devices:
            sharding = None
        elif kinds.is_wide(dtype) and not self._operation.enable_x64:
            raise errors.DtypeMismatchError(
                record.label,
                f"a jax array of dtype {dtype.name} needs jax_enable_x64, which is off; values "
                "would be narrowed. Turn it on, or ask for a narrower dtype or for np.ndarray.",
            )
        else:
            sharding = sharding or self._saved_sharding(record)
        read = self._array_read(record, shape, dtype, sharding)

        def finish(pieces: Sequence[Any]) -> Any:
            if sharding is None:
                (array,) = pieces
            else:
                array = transfer.assemble(shape, sharding, pieces)
            return kind.decode(array, record, request)

        return read, finish

    def _array_read(
        self,
        record: LeafRecord,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        sharding: jax.sharding.Sharding | None,
    ) -> ArrayRead:
        """Returns what is read of an array to get it in a shape, a dtype and a sharding."""
        stored, process = record.array, self._operation.processes.index
        try:
            placement = transfer.placement(sharding, shape, process, self._options)
        except ValueError as error:
            raise errors.ShardingMismatchError(record.label, str(error)) from None
        piece_shape = None
        if shape != stored.shape:
            # Every shard has one shape; what lies beyond the stored array is not read.
            piece_shape = plan.box_shape(placement.shards[0].box)
            placement = placement.clipped(stored.shape)
        is_viewed = "logical_dtype" in record.entry.private
        read = ArrayRead(
            stored,
            dtype,
            view_dtype=record.dtype if is_viewed else None,
            sharding=sharding,
            device_shardings=placement.devices,
            piece_shape=piece_shape,
            copies=placement.copies,
            fills_missing=not self._options.raise_array_data_missing_error,
        )
        itemsize = dtype.itemsize
        if is_viewed and record.dtype != dtype:
            itemsize += stored.dtype.itemsize  # both are there at once
        read.regions = plan.read_regions(
            placement.shards,
            itemsize,
            plan.ChunkGrid(stored.shape, stored.chunk_shape, read.raw is not None),
            process=process,
            is_tight=self._stored.lies_plainly,
        )
        if piece_shape is not None and read.regions:  # what is filled up takes memory, too
            count = sum(len(devices) for region in read.regions for _, devices in region.parts)
            nbytes = math.prod(piece_shape) * dtype.itemsize * count // len(read.regions)
            read.regions = tuple(
                region._replace(nbytes=max(region.nbytes, nbytes)) for region in read.regions
            )
        return read

    def _saved_sharding(self, record: LeafRecord) -> jax.sharding.Sharding:
        """Returns the saved sharding, or this process's first device where that can't be had."""
        default = self._stored.default_sharding()
        if default is not None:
            return default
        if record.sharding is not None:
            memory_kind = record.entry.private.get("memory_kind")
            try:
                return transfer.saved_sharding(record.sharding, memory_kind)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.info("leaf %s: %s; it is loaded on one device", record.label, error)
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def _raise_problems(self, directory: str) -> None:
        """Reports everything at once that keeps the tree from being loaded as it is asked for."""
        if self._problems:
            lines = *self._problems, *(str(each).removeprefix("leaf ") for each in self._refused)
            listing = "\n  ".join(lines)
            raise self._stored.mismatch(
                f"the abstract tree does not match the checkpoint at {directory}:\n  {listing}\n"
                f"{self._stored.mismatch_hint}",
                lines,
            )
        if self._refused:
            raise leaves.summary(self._refused)

    async def run(self) -> Any:
        """Reads the data and rebuilds the tree."""
        if self._pipeline is not None:
            await self._pipeline.run()
        return await loop.to_worker(self._finish)

    def _finish(self) -> Any:
        if self._pipeline is not None:
            pieces = self._pipeline.pieces
            for index, finish in self._finishers.items():
                self._values[index] = finish(pieces.get(index, ()))
        if self._abstract.flat is not None:
            return self._abstract.flat.rebuild(self._values)
        keys = [entry.keys for entry in self._stored.entries]
        return self._nest(zip(keys, self._values, strict=True))


def describe(stored: StoredTree, options: ambient.Context) -> Any:
    """Returns a stored tree with the metadata of each leaf; blocks."""
    if (told := stored.metadata()) is not None:
        return told
    store = stored.open_store() if stored.arrays else None
    documents = {} if store is None else stored.documents(store, stored.arrays)
    sizes = {} if store is None else _sizes(store, {entry.name for entry in stored.arrays})
    saved = stored.shardings()

    def leaf(entry: schema.Entry) -> Any:
        record = LeafRecord(entry, sharding=saved.get(entry.name), nbytes=sizes.get(entry.name))
        if entry.name in documents:
            record = record._replace(array=documents[entry.name])
        return kinds.of_stored(entry).describe(record)

    nest = stored.nest_for(options)
    return nest((entry.keys, leaf(entry)) for entry in stored.entries)


def _sizes(store: ArrayStore, array_names: set[str]) -> dict[str, int]:
    """Returns the bytes that each array takes on disk, where the store's index tells."""
    sizes = dict.fromkeys(array_names, 0)
    with reading(store.directory.path):
        stored = store.sizes().items()
    for key, nbytes in stored:
        name = zarr.array_of(key, array_names, zarr3=store.zarr3)
        if name is not None:
            sizes[name] += nbytes
    return {name: nbytes for name, nbytes in sizes.items() if nbytes}


def _shape(record: LeafRecord, request: Request, *, may_differ: bool) -> tuple[int, ...]:
    """Returns the shape that an array gets."""
    expected = record.array.shape[:-1] if request.kind is kinds.RANDOM_KEYS else record.array.shape
    if request.shape is None or request.shape == expected:
        return record.array.shape
    if may_differ and len(request.shape) == len(record.array.shape):
        return request.shape
    if may_differ:
        why = "Ranks do not match, and padding and truncation keep the rank."
    else:
        why = (
            "Ask for the stored shape, or allow padding and truncation: "
            "array.loading.enable_padding_and_truncation."
        )
    raise errors.ShapeMismatchError(
        record.label,
        f"Requested shape: {request.shape} is not compatible with the stored shape: {expected}. "
        f"{why}",
    )
