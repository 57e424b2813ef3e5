"""What is written of a tree: its leaves, how each is stored, in which pieces, and its documents.

All of that follows from the tree's structure and from options, not from its values. A training
loop saves the same structure again and again, so its plan is kept, and found again by the tree's
definition, each leaf's type, shape, dtype and sharding, and the options.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, get_args

import jax

from orbax_async import _names as names
from orbax_async import arrays as array_records
from orbax_async import context as ambient
from orbax_async import errors, multihost
from orbax_async._engine import plan
from orbax_async._engine.leaf import Leaf, WriteBatch, write_batches
from orbax_async._engine.save_pipeline import Event
from orbax_async.handlers import kinds, leaves
from orbax_async.options import TransferPriority
from orbax_async.tree import schema, structure
from orbax_async.tree.keypath import JaxKeyPath

__all__ = ["PreparedTree", "WritePlan", "prepare"]

_KEPT = 8  # plans; a program saves few structures


class WritePlan:
    """What is written of a tree of one structure under given options.

    `leaves` are its leaves and empty nodes, in order; `arrays` those that are stored as arrays.
    """

    def __init__(self, all_leaves: list[Leaf], state: Any, options: ambient.Context) -> None:
        memory = options.memory
        self.leaves = all_leaves
        self.arrays = [leaf for leaf in all_leaves if leaf.shape is not None]
        self.saving = options.array.saving
        self._with_values = [leaf for leaf in all_leaves if leaf.has_value]
        # The arrays of all others are stored as they are.
        self._to_encode = [
            (index, leaf.keys)
            for index, leaf in enumerate(self._with_values)
            if not leaf.is_mutable and (leaf.sharding is None or leaf.prng_impl is not None)
        ]
        self._may_delay = (
            memory.transfer_concurrent_bytes is not None or memory.regulator_options is not None
        )
        self._policy = _replica_parallel(options)
        self._containers: Any = None
        if _records_containers(options):
            self._containers, empty_named_tuples = schema.describe_rich(state)
            for place in empty_named_tuples:
                all_leaves[place].kind = schema.EMPTY_NAMED_TUPLE
        named: list[tuple[JaxKeyPath, Any]] = []
        if _asks_user(options):
            pairs, _ = structure.flatten_with_path(state)
            named = [
                pair for pair, leaf in zip(pairs, all_leaves, strict=True) if leaf.shape is not None
            ]
        leaves.choose_storage(self.arrays, options, self._policy, named)
        # Whether a part of them goes to databases of their own.
        self.is_separate = any([leaf.storage.is_separate for leaf in self.arrays])
        self._status_callback = memory.serialization_status_callback
        self._told_of: dict[int, JaxKeyPath] = {}  # by the index of an array
        if self._status_callback is not None:
            self._told_of = {
                index: path
                for index, (path, _) in enumerate(named)
                if self.arrays[index].sharding is not None
            }
            self._set_priorities()
        if memory.is_prioritized_key_fn is not None:
            for leaf, (path, _) in zip(self.arrays, named, strict=True):
                if memory.is_prioritized_key_fn(path):
                    leaf.priority = 0
        self._batches: tuple[int | None, list[WriteBatch]] | None = None

    def _set_priorities(self) -> None:
        """Asks the status callback for the priority of each leaf that it is told of.

        What it lets wait is captured behind everything else; where transfers are limited,
        `save_async` does not wait for it either. A callback that lacks a method is refused here.
        """
        callback: Any = self._status_callback
        for event in get_args(Event):
            getattr(callback, f"on_{event}")
        refused: list[errors.LeafError] = []
        for index, path in self._told_of.items():
            answer = callback.key_priority(path)
            priority = _PRIORITIES.get(getattr(answer, "name", ""))
            if priority is None:
                message = f"Prioritization is unknown: key_priority({path}) returned {answer!r}"
                refused.append(errors.UnsupportedLeafError(self.arrays[index].label, message))
            else:
                self.arrays[index].priority = priority
        if refused:
            raise leaves.summary(refused)

    def batches(
        self, processes: multihost.Processes, limits: Iterable[int | None]
    ) -> list[WriteBatch]:
        """Returns what this process writes, in batches; the same under the same limits."""
        limit_nbytes = min([limit for limit in limits if limit is not None], default=None)
        if self._batches is None or self._batches[0] != limit_nbytes:
            requests = plan.plan_writes(self.arrays, process=processes.index, policy=self._policy)
            made = write_batches(
                self.arrays,
                requests,
                limit_nbytes=limit_nbytes,
                may_delay=self._may_delay,
                writes_documents=processes.is_primary,
            )
            self._batches = limit_nbytes, made
        return self._batches[1]

    def reporter(self, batches: list[WriteBatch]) -> Callable[[Event, Sequence[int]], None] | None:
        """Returns what tells the status callback of events of a save; None without a callback.

        It is given the leaf of each piece that an event is about. It calls back for the first piece
        of a leaf that starts and the last one that ends.
        """
        callback, paths = self._status_callback, self._told_of
        if callback is None:
            return None
        pieces = Counter(request.leaf for batch in batches for request in batch.requests)
        counts: Counter[tuple[str, int]] = Counter()
        lock = threading.Lock()

        def report(event: Event, told: Sequence[int]) -> None:
            for leaf in told:
                if leaf not in paths:
                    continue
                due = 1 if event.endswith("_start") else pieces[leaf]
                with lock:
                    counts[event, leaf] += 1
                    is_due = counts[event, leaf] == due
                if is_due:
                    getattr(callback, f"on_{event}")(paths[leaf])

        return report

    def prepared(self, stored: list[Any]) -> PreparedTree:
        """Returns a state of this structure, given what is stored of its leaves."""
        if len(stored) == len(self.arrays):
            return PreparedTree(self, stored, None)
        pairs = list(zip(self._with_values, stored, strict=True))
        try:
            strings = schema.dump_strings(
                {leaf.name: text for leaf, text in pairs if leaf.shape is None}
            )
        except ValueError as error:
            raise errors.DuplicateLeafError(
                "", f"the string leaves can't be stored together: {error}; rename a key"
            ) from None
        return PreparedTree(
            self, [array for leaf, array in pairs if leaf.shape is not None], strings
        )

    def fits(self, values: list[Any]) -> bool:
        """Says whether these are as many leaves as the plan has."""
        return len(values) == len(self._with_values)

    def prepare(self, values: list[Any]) -> PreparedTree:
        """Takes a state apart whose leaves are known to be like those of the plan."""
        for index, keys in self._to_encode:
            values[index] = kinds.encode(keys, values[index])[1]
        return self.prepared(values)

    @functools.cached_property
    def documents(self) -> dict[str, bytes]:
        """The documents that describe the tree, by file name, but for that of its strings."""
        saving = self.saving
        records_arrays = saving.array_metadata_store is not None
        jax_leaves = [leaf for leaf in self.arrays if leaf.sharding is not None]
        entries = [
            leaf.entry(
                leaf.storage.write_shape if records_arrays and leaf.sharding is not None else None
            )
            for leaf in self.leaves
        ]
        tree = schema.TreeDocument(
            entries=tuple(entries),
            containers=self._containers,
            uses_zarr3=saving.use_zarr3,
            uses_ocdbt=saving.use_ocdbt,
        )
        documents = {names.TREE_METADATA: tree.dump()}
        if jax_leaves and saving.enable_write_sharding_file:
            describe = functools.cache(array_records.sharding_document)
            documents[names.SHARDINGS] = schema.dump_shardings(
                {leaf.name: describe(leaf.sharding) for leaf in jax_leaves}
            )
        if jax_leaves and records_arrays:
            name = os.path.join(names.ARRAY_METADATAS, names.PROCESS_METADATA.format(0))
            documents[name] = schema.dump_array_metadatas(
                (leaf.name, leaf.storage.write_shape, leaf.storage.chunk_shape, leaf.prng_impl)
                for leaf in jax_leaves
            )
        return documents


# By name, so that Orbax's own members are understood.
_PRIORITIES = {
    TransferPriority.SYNCHRONOUS.name: 1,
    TransferPriority.ASYNCHRONOUS_PRIORITIZED.name: 2,
    TransferPriority.ASYNCHRONOUS_DEPRIORITIZED.name: 3,
}


def _records_containers(options: ambient.Context) -> bool:
    return options.pytree.saving.pytree_metadata_options.support_rich_types


def _replica_parallel(options: ambient.Context) -> plan.ReplicaParallel | None:
    saving = options.array.saving
    is_on = saving.use_replica_parallel
    if is_on is None:
        is_on = jax.default_backend() != "gpu"
    if not is_on:
        return None
    return plan.ReplicaParallel(
        min_slice_nbytes=saving.min_slice_bytes_for_replica_parallel,
        max_replicas=saving.max_replicas_for_replica_parallel,
    )


def _asks_user(options: ambient.Context) -> bool:
    """Says whether functions of the user's decide too, who may decide otherwise next time."""
    return (
        options.memory.is_prioritized_key_fn is not None
        or options.memory.serialization_status_callback is not None
        or options.array.saving.scoped_storage_options_creator is not None
    )


class PreparedTree(NamedTuple):
    """A state taken apart: what phase 1 starts from."""

    plan: WritePlan
    arrays: list[Any]  # to store, in the order of `plan.arrays`
    strings: bytes | None  # the document of its strings, if it has any


def prepare(state: Any, options: ambient.Context) -> PreparedTree:
    """Takes a state apart, and refuses what can't be stored; see `leaves.describe`."""
    are_several = len(multihost.participants(options.multiprocessing.active_processes)) > 1
    values, treedef = jax.tree_util.tree_flatten(state)
    key: Hashable | None = None
    if not _asks_user(options):
        # Nothing is kept of a definition that can't be hashed or compared.
        with contextlib.suppress(Exception), _lock:
            found = _kept.get(asked := _key(values, treedef, options, are_several))
            key = asked
    if key is not None and found is not None:
        return found.prepare(values)
    flat = structure.flatten(state)
    if not any(flat.keys) and (not flat.leaves or structure.empty_kind(flat.leaves[0]) is not None):
        raise errors.UnsupportedLeafError(
            "", f"Found empty item. There is nothing to save in {state!r}."
        )
    described = leaves.describe(
        flat.entries, as_files=not options.array.saving.use_ocdbt, are_several=are_several
    )
    made = WritePlan([leaf for leaf, _ in described], state, options)
    if key is not None and made.fits(values):
        with _lock:
            _kept[key] = made
            while len(_kept) > _KEPT:
                del _kept[next(iter(_kept))]
    return made.prepared([stored for leaf, stored in described if leaf.has_value])


_kept: dict[Hashable, WritePlan] = {}
_lock = threading.Lock()


def _key(values: list[Any], treedef: Any, options: ambient.Context, are_several: bool) -> Hashable:
    """Returns what the plan of a state depends on; raises where that can't be told quickly."""
    classes = set(map(type, values))
    for cls in classes - _signatures.keys():
        _signatures[cls] = kinds.signature_of(cls)
    settings = (
        repr(options.array.saving),
        _records_containers(options),
        options.memory.deepcopy_host_arrays,
        options.multiprocessing.primary_host,
        are_several,
    )
    return treedef, settings, tuple([_signatures[type(value)](value) for value in values])


_signatures: dict[type, Callable[[Any], Hashable]] = {}  # by the class of a leaf
