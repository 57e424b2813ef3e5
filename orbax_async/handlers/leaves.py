"""The leaves of a state: what each is, how its array is stored, and which trees are refused.

The storage options of a leaf are what `scoped_storage_options_creator` returns for it, and where
that says nothing, `storage_options`. Two kinds of leaves keep their dtype: typed PRNG keys and
`bytes` are not numbers. Nothing is cast here; a save casts each piece when it writes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import errors, multihost
from orbax_async._engine import plan, transfer
from orbax_async._engine.leaf import Leaf, Storage
from orbax_async._storage import codecs, zarr
from orbax_async.handlers import kinds
from orbax_async.handlers.kinds import Encoded
from orbax_async.options import ArrayOptions
from orbax_async.tree.keypath import JaxKeyPath, KeyPath

__all__ = ["choose_storage", "describe", "summary"]

_Saving = ArrayOptions.Saving
_StorageOptions = ArrayOptions.Saving.StorageOptions

_DOCUMENTS = {names.TREE_METADATA, names.SHARDINGS, names.STRINGS, names.ARRAY_METADATAS}
_DATA_FILE_NBYTES = 2 << 30  # as much as one data file of OCDBT holds unless another size is set
_STORED_NBYTES = 64 << 10  # chunks up to this size are encoded by us, without opening an array


def describe(
    entries: Iterable[tuple[KeyPath, Any]], *, as_files: bool, are_several: bool
) -> list[Encoded]:
    """Describes every leaf of a flattened tree, and refuses it as a whole if any can't be held.

    Where leaves are stored as files, their names have to be legal ones. `are_several` says that
    several processes save the tree together.

    Raises:
      UnsupportedLeafError: leaves that can't be held, all named in one message.
      DuplicateLeafError: two leaves would be stored under the same name.
      StagingError: a jax array was deleted or donated.
    """
    described: list[Encoded] = []
    refused: list[errors.LeafError] = []
    for keys, value in entries:
        try:
            leaf, stored = kinds.encode(keys, value)
            if are_several and isinstance(stored, jax.Array):
                _check_shared(leaf.label, stored)
            described.append((leaf, stored))
        except errors.LeafError as error:
            refused.append(error)
    if refused:
        raise summary(refused)
    _check_names([leaf for leaf, _ in described], as_files=as_files)
    return described


def summary(refused: list[errors.LeafError]) -> errors.LeafError:
    """Makes one error of several, of the class and the key path of the first."""
    first, *others = refused
    if not others:
        return first
    listing = "".join(f"\n  {error}" for error in others)
    message = str(first).split(": ", 1)[1] + f"\nand {len(others)} more:{listing}"
    summary = type(first)(first.keypath, message)
    summary.others = tuple(others)
    return summary


def _check_shared(label: str, array: jax.Array) -> None:
    if array.is_fully_addressable:
        raise errors.UnsupportedLeafError(
            label,
            "a host-local jax.Array: its devices all belong to this process, and each process "
            "would store its own under the same name. Make it one array of all processes "
            "(`jax.make_array_from_process_local_data`), or a NumPy array, which the primary saves",
        )


def _check_names(leaves: list[Leaf], *, as_files: bool) -> None:
    by_name: dict[str, Leaf] = {}
    for leaf in leaves:
        if not leaf.has_value:
            continue
        other = by_name.setdefault(leaf.name, leaf)
        if other is not leaf:
            raise errors.DuplicateLeafError(
                leaf.label,
                f"would be stored as {leaf.name!r}, which is also the name of leaf {other.label}: "
                "the format joins keys with '.', and one of the two would be lost. Rename a key.",
            )
    if not as_files:
        return
    for leaf in leaves:
        parts = leaf.name.split("/")
        if leaf.shape is not None and parts[0] in _DOCUMENTS:
            raise errors.UnsupportedLeafError(
                leaf.label,
                f"{parts[0]!r} is the name of a document, beside which use_ocdbt=False can't hold "
                "this leaf; rename the key or leave use_ocdbt on",
            )
        if leaf.name and any(part in ("", ".", "..") for part in parts):
            raise errors.UnsupportedLeafError(
                leaf.label,
                f"its name {leaf.name!r} is no relative file path, which use_ocdbt=False needs; "
                "rename the key or leave use_ocdbt on",
            )
        for count in range(1, len(parts)):
            above = by_name.get("/".join(parts[:count]))
            if above is not None and above.shape is not None:
                raise errors.DuplicateLeafError(
                    leaf.label,
                    f"its directory would lie inside that of leaf {above.label}, which "
                    "use_ocdbt=False can't hold; rename a key or leave use_ocdbt on",
                )


# How arrays are stored.


def choose_storage(
    arrays: Sequence[Leaf],
    options: ambient.Context,
    policy: plan.ReplicaParallel | None,
    named: Sequence[tuple[JaxKeyPath, Any]] = (),
) -> None:
    """Decides how each array is stored: sets its `storage`, and what is recorded of a cast.

    `named` has jax's key path and the user's own leaf for each, where callbacks are asked.

    Raises:
      UnsupportedLeafError: what the options ask of a leaf can't be; all such leaves are named.
      TypeError: `scoped_storage_options_creator` returned something else.
      Exception: what it raised.
    """
    general = options.array.saving.storage_options
    creator = options.array.saving.scoped_storage_options_creator
    wanted: Iterable[_StorageOptions] = itertools.repeat(general, len(arrays))
    if creator is not None:
        wanted = [_merged(creator(path, value), general) for path, value in named]
    shared: dict[Hashable, Storage] = {}
    refused: list[errors.LeafError] = []
    for leaf, own in zip(arrays, wanted, strict=True):
        cast = np.dtype(own.dtype) if own.dtype is not None and _is_numeric(leaf) else None
        what = (leaf.shape, leaf.dtype, _values_dtype(leaf), leaf.sharding, leaf.is_mutable)
        alike = (*what, cast, own.chunk_byte_size, own.shard_axes)
        storage = shared.get(alike)
        if storage is None:
            try:
                storage = shared[alike] = _storage(leaf, cast, own, options, policy)
            except ValueError as error:
                refused.append(errors.UnsupportedLeafError(leaf.label, str(error)))
                continue
        leaf.storage = storage
        if cast is not None:
            leaf.private = _recorded(leaf, cast)
    if refused:
        raise summary(refused)


def _merged(scoped: Any, general: _StorageOptions) -> _StorageOptions:
    if scoped is None:
        return general
    if not isinstance(scoped, _StorageOptions):
        raise TypeError(
            "array.saving.scoped_storage_options_creator must return StorageOptions or None, "
            f"not {scoped!r}"
        )
    own = {field.name: getattr(scoped, field.name) for field in dataclasses.fields(scoped)}
    given = {name: value for name, value in own.items() if value is not None}
    return dataclasses.replace(general, **given)


def _storage(
    leaf: Leaf,
    cast: np.dtype[Any] | None,
    own: _StorageOptions,
    options: ambient.Context,
    policy: plan.ReplicaParallel | None,
) -> Storage:
    """Decides how an array is stored; raises ValueError for what can't be."""
    assert leaf.shape is not None
    saving, processes = options.array.saving, options.multiprocessing
    dtype = leaf.dtype if cast is None else _cast(leaf, cast)
    max_count = _max_count(leaf, dtype, own, saving)
    itemsize = max(leaf.dtype.itemsize, dtype.itemsize)
    if leaf.sharding is None:  # the primary's own
        host = plan.ShardSpec(-1, processes.primary_host or 0, plan.whole(leaf.shape))
        shards: tuple[plan.ShardSpec, ...] = (host,)
    else:
        shards = transfer.shards_of(leaf.sharding, leaf.shape)
    write_shape = plan.write_shape(shards, itemsize, policy)
    chunk_shape = plan.chunk_shape(
        leaf.shape, write_shape, max_count=max_count, axes=own.shard_axes or ()
    )
    mode = transfer.capture_mode(
        leaf.sharding,
        is_mutable=leaf.is_mutable and options.memory.deepcopy_host_arrays,
        use_pinned_host=saving.enable_pinned_host_transfer,
    )
    is_divided = write_shape != plan.write_shape(shards, itemsize, None)
    storage = Storage(
        dtype=dtype,
        cast=cast,
        itemsize=itemsize,
        shards=shards,
        write_shape=write_shape,
        chunk_shape=chunk_shape,
        mode=mode,
        # Of another dtype than on disk are elements narrower than a byte.
        is_small=mode == "view"
        and leaf.dtype == _values_dtype(leaf)
        and transfer.is_small(leaf.shape, leaf.dtype, leaf.sharding),
        encoding=_encoding(math.prod(chunk_shape) * dtype.itemsize, saving),
        min_saving=saving.compression_min_saving,
        is_separate=is_divided
        and saving.use_ocdbt
        and saving.enable_replica_parallel_separate_folder,
        zarr3=saving.use_zarr3,
    )
    if len(multihost.participants(processes.active_processes)) > 1:
        # None of several may look at its own values, for all must choose alike.
        return storage._replace(encoding=storage.likely_encoding)
    return storage


def _max_count(
    leaf: Leaf, dtype: np.dtype[Any], own: _StorageOptions, saving: _Saving
) -> int | None:
    """Returns the most elements of a chunk; None for no limit."""
    assert leaf.shape is not None
    nbytes = own.chunk_byte_size
    if nbytes is not None and nbytes < dtype.itemsize:
        raise ValueError(
            f"storage_options.chunk_byte_size={nbytes} must be >= {dtype.itemsize}, the bytes of "
            f"one element of {dtype.name}"
        )
    if any(axis >= len(leaf.shape) for axis in own.shard_axes or ()):
        raise ValueError(
            f"All storage_options.shard_axes={own.shard_axes} must be non-negative and less than "
            f"rank={len(leaf.shape)}; give leaves of different rank their own by "
            "scoped_storage_options_creator"
        )
    file_nbytes = saving.ocdbt_target_data_file_size
    if saving.use_ocdbt and file_nbytes != 0:
        # A chunk is no larger than a data file, as Orbax reckons.
        limit = _DATA_FILE_NBYTES if file_nbytes is None else file_nbytes
        nbytes = max(dtype.itemsize, limit if nbytes is None else min(limit, nbytes))
    return None if nbytes is None else nbytes // dtype.itemsize


def _encoding(chunk_nbytes: int, saving: _Saving) -> codecs.Encoding | None:
    """Returns how chunks are encoded; None where a sample of the values decides."""
    if chunk_nbytes <= _STORED_NBYTES:
        return "stored"
    if not saving.use_compression:
        return "raw"
    return "zstd" if saving.compression_min_saving <= 0 else None


def _is_numeric(leaf: Leaf) -> bool:
    return leaf.prng_impl is None and kinds.of_stored(leaf.entry()).is_numeric


def _values_dtype(leaf: Leaf) -> np.dtype[Any]:
    """Returns the dtype of a leaf's values, which zarr may not have."""
    name = leaf.private.get("logical_dtype")
    return leaf.dtype if name is None else zarr.dtype_named(name)


def _cast(leaf: Leaf, cast: np.dtype[Any]) -> np.dtype[Any]:
    """Returns the dtype on disk of a leaf that is cast."""
    own = _values_dtype(leaf)
    if own.kind == "c" and cast.kind != "c":
        raise ValueError(
            f"storage_options.dtype={cast.name} would drop the imaginary part of {own.name}; give "
            "the leaf a complex dtype by scoped_storage_options_creator"
        )
    return kinds.disk_dtype(cast)[0]


def _recorded(leaf: Leaf, cast: np.dtype[Any]) -> Mapping[str, Any]:
    """Returns what only we record of a leaf that is cast."""
    dropped = {"logical_dtype"} if _values_dtype(leaf) == cast else {"logical_dtype", "weak_type"}
    private = {name: value for name, value in leaf.private.items() if name not in dropped}
    logical = kinds.disk_dtype(cast)[1]
    return private if logical is None else private | {"logical_dtype": logical}
