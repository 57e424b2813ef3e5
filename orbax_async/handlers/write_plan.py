"""What is written of a tree: its leaves, how each is stored, in which pieces, and its documents.

All of that follows from the tree's structure and from options, not from its values. A training
loop saves the same structure again and again, so its plan is kept, and found again by the tree's
definition, each leaf's type, shape, dtype and sharding, and the options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, get_args

import jax

from orbax_async import _names as names
from orbax_async import arrays as array_records
from orbax_async import context as ambient
from orbax_async import errors, multihost
from orbax_async._engine import plan
from orbax_async._engine.batches import WriteBatch, write_batches
from orbax_async._engine.leaf import Leaf
from orbax_async._engine.save_pipeline import Event
from orbax_async.handlers import kinds, leaves
from orbax_async.handlers.leaves import choose_storage
from orbax_async.options import SerializationStatusCallback, TransferPriority
from orbax_async.tree import rich, schema, structure
from orbax_async.tree.keypath import JaxKeyPath

__all__ = ["PreparedTree", "StatusReporter", "WritePlan", "prepare"]

_KEPT = 8  # plans; a program saves few structures


class WritePlan:
    """What is written of a tree of one structure under given options.

    Args:
      leaves: its leaves and empty nodes, in order.
      state: the tree.
      options: those of the save.

    Attributes:
      leaves: all of them.
      arrays: those that are stored as arrays.
      saving: how arrays are stored.
      status_callback: is told of the save, unless it is None.
      paths: jax's key path of each jax array, if there is such a callback.
    """

    def __init__(self, leaves: list[Leaf], state: Any, options: ambient.Context) -> None:
        memory = options.memory
        self.leaves = leaves
        self.arrays = [leaf for leaf in leaves if leaf.shape is not None]
        self.saving = options.array.saving
        self.status_callback = memory.serialization_status_callback
        self._may_delay = (
            memory.transfer_concurrent_bytes is not None or memory.regulator_options is not None
        )
        self.paths: dict[int, JaxKeyPath] = {}
        self._policy = _replica_parallel(options)
        self._containers: Any = None
        if _records_containers(options):
            self._containers, empty_named_tuples = rich.describe(state)
            for place in empty_named_tuples:
                leaves[place].kind = rich.EMPTY_NAMED_TUPLE
        named: list[tuple[JaxKeyPath, Any]] = []
        if _asks_user(options):
            pairs, _ = structure.flatten_with_path(state)
            named = [
                pair for pair, leaf in zip(pairs, leaves, strict=True) if leaf.shape is not None
            ]
        choose_storage(self.arrays, options, self._policy, named)
        if self.status_callback is not None:
            self.paths = {
                index: path
                for index, (path, _) in enumerate(named)
                if self.arrays[index].sharding is not None
            }
            set_priorities(
                self.status_callback,
                [(path, self.arrays[index]) for index, path in self.paths.items()],
            )
        if memory.is_prioritized_key_fn is not None:
            for leaf, (path, _) in zip(self.arrays, named, strict=True):
                if memory.is_prioritized_key_fn(path):
                    leaf.priority = 0
        self._batches: tuple[int | None, list[WriteBatch]] | None = None
        self._with_values = [leaf for leaf in leaves if leaf.has_value]

    def batches(
        self, processes: multihost.Processes, limits: Sequence[int | None]
    ) -> list[WriteBatch]:
        """Returns what this process writes, in batches; the same under the same limits.

        Args:
          processes: who takes part.
          limits: of the budgets of the save; None for none.
        """
        limit_nbytes = min([limit for limit in limits if limit is not None], default=None)
        if self._batches is None or self._batches[0] != limit_nbytes:
            requests = plan.plan_writes(self.arrays, process=processes.index, policy=self._policy)
            self._batches = (
                limit_nbytes,
                write_batches(
                    self.arrays,
                    requests,
                    limit_nbytes=limit_nbytes,
                    may_delay=self._may_delay,
                    writes_documents=processes.is_primary,
                ),
            )
        return self._batches[1]

    def has_values_for(self, values: list[Any]) -> bool:
        """Says whether these are as many leaves as the plan has."""
        return len(values) == len(self._with_values)

    def describe(self, values: list[Any]) -> list[tuple[Leaf, Any]]:
        """Pairs the plan's leaves with the values that are stored of a state."""
        return [
            # Only these arrays are stored as they are.
            (leaf, value)
            if leaf.sharding is not None and leaf.prng_impl is None
            else (leaf, leaves.describe(leaf.keys, value)[1])
            for leaf, value in zip(self._with_values, values, strict=True)
        ]

    @functools.cached_property
    def documents(self) -> dict[str, bytes]:
        """The documents that describe the tree, by file name, but for that of its strings."""
        saving = self.saving
        records_arrays = saving.array_metadata_store is not None
        jax_leaves = [leaf for leaf in self.arrays if leaf.sharding is not None]
        tree = schema.TreeDocument(
            entries=tuple(
                leaf.entry(
                    leaf.storage.write_shape
                    if records_arrays and leaf.sharding is not None
                    else None
                )
                for leaf in self.leaves
            ),
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


@dataclasses.dataclass(frozen=True)
class PreparedTree:
    """A state taken apart: what tier 1 starts from.

    Attributes:
      plan: what is written of it.
      arrays: the arrays to store, in the order of `plan.arrays`.
      strings: the document of its strings, if it has any.
    """

    plan: WritePlan
    arrays: list[Any]
    strings: bytes | None


def prepare(state: Any, options: ambient.Context) -> PreparedTree:
    """Takes a state apart, and refuses what can't be stored; see `leaves.describe_all`."""
    are_several = len(multihost.participants(options.multiprocessing.active_processes)) > 1
    values, treedef = jax.tree_util.tree_flatten(state)
    key: Hashable | None = None
    if not _asks_user(options):
        # Nothing is kept of a definition that can't be hashed or compared.
        with contextlib.suppress(Exception), _lock:
            found = _kept.get(asked := _key(values, treedef, options, are_several))
            key = asked
    if key is not None and found is not None:
        return _prepared(found, found.describe(values))
    flat = structure.flatten(state)
    if not any(flat.keys) and (not flat.leaves or structure.empty_kind(flat.leaves[0]) is not None):
        raise errors.UnsupportedLeafError(
            "", f"Found empty item. There is nothing to save in {state!r}."
        )
    described = leaves.describe_all(
        flat.entries, as_files=not options.array.saving.use_ocdbt, are_several=are_several
    )
    made = WritePlan([leaf for leaf, _ in described], state, options)
    if key is not None and made.has_values_for(values):
        with _lock:
            _kept[key] = made
            while len(_kept) > _KEPT:
                del _kept[next(iter(_kept))]
    return _prepared(made, described)


def _prepared(made: WritePlan, described: list[tuple[Leaf, Any]]) -> PreparedTree:
    texts = {leaf.name: value for leaf, value in described if leaf.kind == schema.STRING}
    try:
        strings = schema.dump_strings(texts) if texts else None
    except ValueError as error:
        raise errors.DuplicateLeafError(
            "", f"the string leaves can't be stored together: {error}; rename a key"
        ) from None
    arrays = [value for leaf, value in described if leaf.shape is not None]
    return PreparedTree(made, arrays, strings)


_kept: dict[Hashable, WritePlan] = {}
_lock = threading.Lock()


def _key(values: list[Any], treedef: Any, options: ambient.Context, are_several: bool) -> Hashable:
    """Returns what the plan of a state depends on; raises where that can't be told quickly."""
    for cls in {type(value) for value in values} - _signatures.keys():
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


# By name, so that Orbax's own members are understood.
_PRIORITIES = {
    TransferPriority.SYNCHRONOUS.name: 1,
    TransferPriority.ASYNCHRONOUS_PRIORITIZED.name: 2,
    TransferPriority.ASYNCHRONOUS_DEPRIORITIZED.name: 3,
}


def set_priorities(
    callback: SerializationStatusCallback, named: Iterable[tuple[JaxKeyPath, Leaf]]
) -> None:
    """Asks for the priority of each leaf.

    Raises:
      AttributeError: the callback lacks a method.
      UnsupportedLeafError: the priority of leaves is unknown; all of them are named.
      Exception: what the callback raises.
    """
    for event in get_args(Event):
        getattr(callback, f"on_{event}")
    refused: list[errors.LeafError] = []
    for path, leaf in named:
        answer = callback.key_priority(path)
        priority = _PRIORITIES.get(getattr(answer, "name", ""))
        if priority is None:
            message = f"Prioritization is unknown: key_priority({path}) returned {answer!r}"
            refused.append(errors.UnsupportedLeafError(leaf.label, message))
        else:
            leaf.priority = priority
    if refused:
        raise leaves.summary(refused)


class StatusReporter:
    """Counts the pieces of leaves, and calls back for the first that starts and the last that ends.

    Args:
      callback: what to call.
      paths: the key path of each leaf to tell of.
      pieces: how many pieces of each leaf there are.
    """

    def __init__(
        self,
        callback: SerializationStatusCallback,
        paths: Mapping[int, JaxKeyPath],
        pieces: Mapping[int, int],
    ) -> None:
        self._callback = callback
        self._paths = paths
        self._pieces = pieces
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()

    def __call__(self, event: Event, leaves: Iterable[int]) -> None:
        """Notes an event of a piece of each of these leaves, with repetitions."""
        for leaf in leaves:
            if leaf not in self._paths:
                continue
            due = 1 if event.endswith("_start") else self._pieces[leaf]
            with self._lock:
                self._counts[event, leaf] += 1
                is_due = self._counts[event, leaf] == due
            if is_due:
                getattr(self._callback, f"on_{event}")(self._paths[leaf])
