"""The kinds of leaf: how each is stored, and which are refused.

| leaf | stored as | what Orbax loads |
|---|---|---|
| `jax.Array` | zarr array, sharding beside it | the same |
| typed PRNG keys | their integers, implementation beside them | the same |
| `np.ndarray` | zarr array | the same |
| `int`, `float`, `bool` | 0-d zarr array | the same |
| `str` | an entry of one JSON document | the same |
| NumPy scalars, `complex` | 0-d zarr array | a 0-d array |
| `bytes` | zarr array of uint8 | that array |
| narrow types that zarr lacks, such as uint4 | zarr array of uint8 | that array |
| None, empty containers | only the tree's metadata | the same |
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from orbax_async import _names as names
from orbax_async import arrays, errors
from orbax_async._engine import plan
from orbax_async._engine.leaf import Leaf
from orbax_async._storage import zarr
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.keypath import KeyPath

__all__ = [
    "Described",
    "describe",
    "describe_all",
    "disk_dtype",
    "is_prng_key",
    "shards_of",
    "summary",
]


_UINT8 = np.dtype(np.uint8)
_DOCUMENTS = {names.TREE_METADATA, names.SHARDINGS, names.STRINGS, names.ARRAY_METADATAS}


Described = tuple[Leaf, Any]  # with its array, its text, or None


def is_prng_key(value: Any) -> bool:
    """Says whether an array, real or abstract, holds typed PRNG keys."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(dtype, np.dtype):  # quicker than to ask jax
        return False
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


@functools.lru_cache(maxsize=4096)
def shards_of(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> tuple[plan.ShardSpec, ...]:
    """Returns each device's box of an array, over all processes."""
    devices = arrays.devices_of(sharding)
    if len(devices) == 1:
        (device,) = devices
        return (plan.ShardSpec(device.id, device.process_index, plan.whole(shape)),)
    boxes = sharding.devices_indices_map(shape)
    return tuple(
        plan.ShardSpec(
            device.id,
            device.process_index,
            tuple(each.indices(side)[:2] for each, side in zip(index or (), shape, strict=True)),
        )
        for device in devices
        for index in (boxes[device],)
    )


class _Unsupported(ValueError):
    """Why a leaf can't be stored."""


def describe(keys: KeyPath, value: Any) -> Described:
    """Describes one leaf or empty node.

    Returns:
      Its form, and its value as it is stored: a jax or NumPy array, a str, or None.

    Raises:
      UnsupportedLeafError: a checkpoint can't hold it.
      StagingError: it is a jax array whose buffer is gone.
    """
    kind = structure.empty_kind(value)
    if kind is not None:
        return Leaf(keys, kind), None
    try:
        if isinstance(value, jax.Array):
            return _describe_jax(keys, value)
        if isinstance(value, np.ndarray):
            return _describe_numpy(keys, value)
        return _describe_scalar(keys, value)
    except _Unsupported as reason:
        raise errors.UnsupportedLeafError(keypath.label(keys), str(reason)) from None


def _describe_jax(keys: KeyPath, value: jax.Array) -> Described:
    if isinstance(value, jax.core.Tracer):
        raise _Unsupported(
            "Unsupported leaf type for saving: a tracer. Save outside of jit, grad and vmap."
        )
    if value.is_deleted():
        raise errors.StagingError(
            keypath.label(keys),
            f"Array has been deleted with shape={value.dtype}{list(value.shape)}: it was donated "
            "or deleted before the save. Save before that, or save the array that replaced it.",
        )
    impl = None
    if is_prng_key(value):
        impl = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    shape, sharding = value.shape, value.sharding
    dtype, private = _recorded(value.dtype, sharding, not shape and value.weak_type)
    return Leaf(
        keys, schema.JAX_ARRAY, shape, dtype, sharding, prng_impl=impl, private=private
    ), value


@functools.lru_cache(maxsize=4096)
def _recorded(
    dtype: np.dtype[Any], sharding: jax.sharding.Sharding, is_weak: bool
) -> tuple[np.dtype[Any], Mapping[str, Any]]:
    """Returns the dtype on disk of a jax array, and what only we record of it."""
    stored, logical = disk_dtype(dtype)
    private = {
        "logical_dtype": logical,
        "weak_type": is_weak or None,
        "memory_kind": _special_memory_kind(sharding),
    }
    return stored, {name: value for name, value in private.items() if value is not None}


def _special_memory_kind(sharding: jax.sharding.Sharding) -> str | None:
    """Returns the memory kind to record: none for that in which a device puts arrays anyway."""
    kind = sharding.memory_kind
    if kind in (None, "device") or kind == arrays.devices_of(sharding)[0].default_memory().kind:
        return None
    return str(kind)


def _describe_numpy(keys: KeyPath, value: np.ndarray[Any, Any]) -> Described:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise _Unsupported(
            "a masked array would lose its mask; save `.data` and `.mask`, or `.filled()`"
        )
    array = np.asarray(value)
    is_mutable = True
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not np.little_endian):
        array, is_mutable = array.astype(array.dtype.newbyteorder("<")), False
    return _host_leaf(keys, schema.NUMPY_ARRAY, array, is_mutable=is_mutable)


def _host_leaf(
    keys: KeyPath,
    kind: str,
    array: np.ndarray[Any, Any],
    python_type: str | None = None,
    *,
    is_mutable: bool = False,
) -> Described:
    dtype, logical = disk_dtype(array.dtype)
    private = {"python_type": python_type, "logical_dtype": logical}
    private = {name: text for name, text in private.items() if text}
    form = Leaf(keys, kind, array.shape, dtype, is_mutable=is_mutable, private=private)
    return form, array


def _describe_scalar(keys: KeyPath, value: Any) -> Described:
    match value:
        case str():
            if "~" in keypath.stored_name(keys):
                raise _Unsupported(
                    "a string's key can't hold '~', which readers take for an escape; rename it"
                )
            return Leaf(keys, schema.STRING), str(value)
        case bytes():
            array = np.frombuffer(value, np.uint8)
            return _host_leaf(keys, schema.NUMPY_ARRAY, array, "bytes")
        case np.generic():
            # np.float64 is a float, and Orbax takes it for one.
            kind = schema.SCALAR if isinstance(value, float) else schema.NUMPY_ARRAY
            return _host_leaf(keys, kind, np.asarray(value), "numpy_scalar")
        case bool():
            return _host_leaf(keys, schema.SCALAR, np.asarray(bool(value)))
        case int():
            if not -(2**63) <= value < 2**64:
                raise _Unsupported(f"the int {value} is outside of int64 and uint64")
            wide = np.uint64 if value >= 2**63 else np.int64
            return _host_leaf(keys, schema.SCALAR, np.asarray(int(value), wide))
        case float():
            return _host_leaf(keys, schema.SCALAR, np.asarray(float(value)))
        case complex():
            array = np.asarray(value, np.complex128)
            return _host_leaf(keys, schema.NUMPY_ARRAY, array, "complex")
    raise _Unsupported(
        f"Unsupported leaf type for saving: {type(value)}. Supported leaf types are: jax.Array, "
        "numpy.ndarray, NumPy scalars, int, float, complex, bool, bytes, str and None. Convert "
        "it, or take it out of the tree (equinox: `eqx.filter(model, eqx.is_array)`)."
    )


@functools.cache
def disk_dtype(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], str | None]:
    """Returns the dtype on disk, and the name to record where it differs from the leaf's own.

    Raises:
      ValueError: zarr can't hold it.
    """
    if zarr.is_storable(dtype):
        return dtype, None
    try:
        is_narrow = dtype.itemsize == 1 and zarr.dtype_named(dtype.name) == dtype
    except TypeError:
        is_narrow = False
    if not is_narrow:
        raise _Unsupported(f"zarr has no data type for arrays of dtype {dtype}; cast it")
    return _UINT8, dtype.name


def describe_all(
    entries: Iterable[tuple[KeyPath, Any]], *, as_files: bool, are_several: bool = False
) -> list[Described]:
    """Describes every leaf of a flattened tree, and refuses it as a whole if any can't be held.

    Args:
      entries: leaves and empty nodes by key path.
      as_files: whether each leaf becomes a directory, whose name then has to be a legal one.
      are_several: whether several processes save the tree together.

    Raises:
      UnsupportedLeafError: leaves that can't be held, all named in one message.
      DuplicateLeafError: two leaves would be stored under the same name.
      StagingError: a jax array was deleted or donated.
    """
    described: list[Described] = []
    refused: list[errors.LeafError] = []
    for keys, value in entries:
        try:
            form, stored = describe(keys, value)
            if are_several and isinstance(stored, jax.Array):
                _check_shared(form.label, stored)
            described.append((form, stored))
        except errors.LeafError as error:
            refused.append(error)
    if refused:
        raise summary(refused)
    _check_names([form for form, _ in described], as_files=as_files)
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


def _check_names(forms: list[Leaf], *, as_files: bool) -> None:
    by_name: dict[str, Leaf] = {}
    for leaf in forms:
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
    for leaf in forms:
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
