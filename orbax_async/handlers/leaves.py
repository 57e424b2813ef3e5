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

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from orbax_async import arrays, errors
from orbax_async._engine import plan
from orbax_async._engine.transfer import DeviceSource, HostSource, Source
from orbax_async._storage import zarr
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.keypath import KeyPath

__all__ = ["SaveLeaf", "describe", "describe_all", "is_prng_key", "shards_of", "summary"]


_UINT8 = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class SaveLeaf:
    """A leaf, or an empty node, ready to be planned.

    Attributes:
      keys: where it is in the tree.
      kind: as `schema.Entry.kind`.
      text: the value of a string.
      array: the value of anything stored as an array: a jax or a NumPy array.
      is_mutable: whether the caller could change `array` in place.
      dtype: the dtype on disk.
      prng_impl: of typed PRNG keys, the name of their implementation.
      private: what only we record.
    """

    keys: KeyPath
    kind: str
    text: str | None = None
    array: jax.Array | np.ndarray[Any, Any] | None = None
    is_mutable: bool = False
    dtype: np.dtype[Any] = _UINT8
    prng_impl: str | None = None
    private: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name under which it is stored."""
        return keypath.stored_name(self.keys)

    @property
    def label(self) -> str:
        """Its key path, for messages."""
        return keypath.label(self.keys)

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape of its array."""
        assert self.array is not None
        return tuple(self.array.shape)

    def source(self, *, use_pinned_host: bool | None, copies_host_arrays: bool) -> Source:
        """Returns where the engine captures its values."""
        if isinstance(self.array, jax.Array):
            return DeviceSource(self.array, use_pinned_host)
        assert self.array is not None
        return HostSource(self.array, self.is_mutable and copies_host_arrays)

    def spec(self, index: int, *, host_process: int, is_prioritized: bool) -> plan.LeafSpec:
        """Returns what the plan needs to know; host arrays belong to `host_process`."""
        assert self.array is not None
        if isinstance(self.array, jax.Array):
            shards = shards_of(self.array.sharding, self.shape)
        else:
            shards = (plan.ShardSpec(-1, host_process, plan.whole(self.shape)),)
        return plan.LeafSpec(index, self.shape, self.dtype.itemsize, shards, is_prioritized)


def is_prng_key(value: Any) -> bool:
    """Says whether an array, real or abstract, holds typed PRNG keys."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


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


class _Unsupported(Exception):
    """Why a leaf can't be stored."""


def describe(keys: KeyPath, value: Any) -> SaveLeaf:
    """Describes one leaf or empty node.

    Raises:
      UnsupportedLeafError: a checkpoint can't hold it.
      StagingError: it is a jax array whose buffer is gone.
    """
    kind = structure.empty_kind(value)
    if kind is not None:
        return SaveLeaf(keys, kind)
    label = keypath.label(keys)
    try:
        if isinstance(value, jax.Array):
            return _describe_jax(keys, value)
        if isinstance(value, np.ndarray):
            return _describe_numpy(keys, value)
        return _describe_scalar(keys, value)
    except _Unsupported as reason:
        raise errors.UnsupportedLeafError(label, str(reason)) from None


def _describe_jax(keys: KeyPath, value: jax.Array) -> SaveLeaf:
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
    private: dict[str, Any] = {}
    if is_prng_key(value):
        impl = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    dtype, logical = _disk_dtype(value.dtype)
    if logical:
        private["logical_dtype"] = logical
    if value.weak_type and not value.shape:
        private["weak_type"] = True
    memory_kind = value.sharding.memory_kind
    if memory_kind not in (None, "device"):
        device = arrays.devices_of(value.sharding)[0]
        if memory_kind != device.default_memory().kind:
            private["memory_kind"] = memory_kind
    return SaveLeaf(
        keys, schema.JAX_ARRAY, array=value, dtype=dtype, prng_impl=impl, private=private
    )


def _describe_numpy(keys: KeyPath, value: np.ndarray[Any, Any]) -> SaveLeaf:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise _Unsupported(
            "a masked array would lose its mask; save `.data` and `.mask`, or `.filled()`"
        )
    array = np.asarray(value)
    is_mutable = True
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not np.little_endian):
        array, is_mutable = array.astype(array.dtype.newbyteorder("<")), False
    dtype, logical = _disk_dtype(array.dtype)
    private = {"logical_dtype": logical} if logical else {}
    return SaveLeaf(
        keys, schema.NUMPY_ARRAY, array=array, is_mutable=is_mutable, dtype=dtype, private=private
    )


def _describe_scalar(keys: KeyPath, value: Any) -> SaveLeaf:
    match value:
        case str():
            if "~" in keypath.stored_name(keys):
                raise _Unsupported(
                    "a string's key can't hold '~', which readers take for an escape; rename it"
                )
            return SaveLeaf(keys, schema.STRING, text=str(value))
        case bytes():
            array = np.frombuffer(value, np.uint8)
            return SaveLeaf(keys, schema.NUMPY_ARRAY, array=array, private={"python_type": "bytes"})
        case np.generic():
            array = np.asarray(value)
            dtype, logical = _disk_dtype(array.dtype)
            private = {"python_type": "numpy_scalar"} | (
                {"logical_dtype": logical} if logical else {}
            )
            # np.float64 is a float, and Orbax takes it for one.
            kind = schema.SCALAR if isinstance(value, float) else schema.NUMPY_ARRAY
            return SaveLeaf(keys, kind, array=array, dtype=dtype, private=private)
        case bool():
            return _python_scalar(keys, np.asarray(bool(value)))
        case int():
            if not -(2**63) <= value < 2**64:
                raise _Unsupported(f"the int {value} is outside of int64 and uint64")
            wide = np.uint64 if value >= 2**63 else np.int64
            return _python_scalar(keys, np.asarray(int(value), wide))
        case float():
            return _python_scalar(keys, np.asarray(float(value)))
        case complex():
            array = np.asarray(value, np.complex128)
            return SaveLeaf(
                keys,
                schema.NUMPY_ARRAY,
                array=array,
                dtype=array.dtype,
                private={"python_type": "complex"},
            )
    raise _Unsupported(
        f"Unsupported leaf type for saving: {type(value)}. Supported leaf types are: jax.Array, "
        "numpy.ndarray, NumPy scalars, int, float, complex, bool, bytes, str and None. Convert "
        "it, or take it out of the tree (equinox: `eqx.filter(model, eqx.is_array)`)."
    )


def _python_scalar(keys: KeyPath, array: np.ndarray[Any, Any]) -> SaveLeaf:
    return SaveLeaf(keys, schema.SCALAR, array=array, dtype=array.dtype)


@functools.cache
def _disk_dtype(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], str | None]:
    """Returns the dtype on disk, and the name to record where it differs from the leaf's own."""
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
) -> list[SaveLeaf]:
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
    described: list[SaveLeaf] = []
    refused: list[errors.LeafError] = []
    for keys, value in entries:
        try:
            leaf = describe(keys, value)
            if are_several and isinstance(leaf.array, jax.Array):
                _check_shared(leaf.label, leaf.array)
            described.append(leaf)
        except errors.LeafError as error:
            refused.append(error)
    if refused:
        raise summary(refused)
    _check_names(described, as_files=as_files)
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


def _check_names(described: list[SaveLeaf], *, as_files: bool) -> None:
    by_name: dict[str, SaveLeaf] = {}
    for leaf in described:
        if leaf.array is None and leaf.text is None:
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
    for leaf in described:
        parts = leaf.name.split("/")
        if leaf.name and any(part in ("", ".", "..") for part in parts):
            raise errors.UnsupportedLeafError(
                leaf.label,
                f"its name {leaf.name!r} is no relative file path, which use_ocdbt=False needs; "
                "rename the key or leave use_ocdbt on",
            )
        for count in range(1, len(parts)):
            above = by_name.get("/".join(parts[:count]))
            if above is not None and above.array is not None:
                raise errors.DuplicateLeafError(
                    leaf.label,
                    f"its directory would lie inside that of leaf {above.label}, which "
                    "use_ocdbt=False can't hold; rename a key or leave use_ocdbt on",
                )
