"""What each stored leaf is loaded as.

`want` reads an abstract leaf, on the caller's thread, where a mesh may be set. `resolve` meets it
with what is stored, once the checkpoint's documents are read. `Target.finish` makes the value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orbax_async import arrays, errors
from orbax_async._engine import place, plan
from orbax_async._engine.load_pipeline import ReadForm
from orbax_async._storage import zarr
from orbax_async._trace import logger
from orbax_async.handlers.leaves import is_prng_key, shards_of
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.keypath import KeyPath

__all__ = ["Broadcast", "Target", "Terms", "Wanted", "is_for_jax", "resolve", "want"]

Form = Literal["stored", "jax", "numpy", "scalar", "string", "skip"]


class Wanted(NamedTuple):
    """An abstract leaf, understood.

    Attributes:
      form: what to return; `stored` for whatever was saved.
      shape: the shape that must be stored, None for any.
      dtype: the dtype to cast to, None for the stored one.
      sharding: where a jax array goes, None for where it was saved.
      scalar_type: the Python or NumPy type of a scalar.
      is_weak: whether a jax scalar is weakly typed.
    """

    form: Form
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    sharding: jax.sharding.Sharding | None = None
    scalar_type: type | None = None
    is_weak: bool = False


STORED = Wanted("stored")
SKIPPED = Wanted("skip")
_WIDE = ("int64", "uint64", "float64", "complex128")


def want(keys: KeyPath, leaf: Any, alike: dict[Hashable, Wanted]) -> Wanted:
    """Reads one abstract leaf; `alike` keeps what was made of others, for those that are the same.

    Raises:
      AbstractLeafError: nothing can be loaded as this.
    """
    if type(leaf) is not jax.ShapeDtypeStruct and not isinstance(leaf, jax.Array):
        return _want(keys, leaf)
    key = (leaf.shape, leaf.dtype, leaf.sharding, getattr(leaf, "weak_type", False))
    wanted = alike.get(key)
    if wanted is None:
        wanted = alike[key] = _want(keys, leaf)
    return wanted


def _want(keys: KeyPath, leaf: Any) -> Wanted:
    if leaf is ... or structure.empty_kind(leaf) is not None:
        return SKIPPED
    if isinstance(leaf, type):
        return _want_type(keys, leaf)
    if isinstance(leaf, str):
        # What `metadata` reports of a string is a string, too.
        return Wanted("string")
    if isinstance(leaf, (np.generic, bool, int, float, complex, bytes)):
        return Wanted("scalar", scalar_type=type(leaf))
    if isinstance(leaf, (np.ndarray, arrays.NumpyMetadata)):
        # An empty array is the usual way to say "NumPy, whatever its shape".
        return Wanted("numpy", tuple(leaf.shape) if 0 not in leaf.shape else None, leaf.dtype)
    if isinstance(leaf, arrays.ArrayMetadata):
        # Its devices may not be here: the saved sharding is looked up as if nothing were given.
        return Wanted("jax", tuple(leaf.shape), leaf.dtype)
    # The protocol alone would do, but is slow to check.
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, arrays.AbstractArray)):
        return Wanted(
            "jax",
            None if leaf.shape is None else tuple(leaf.shape),
            leaf.dtype if leaf.dtype is None or is_prng_key(leaf) else np.dtype(leaf.dtype),
            concrete(keypath.label(keys), getattr(leaf, "sharding", None)),
            is_weak=bool(getattr(leaf, "weak_type", False)),
        )
    raise errors.AbstractLeafError(
        keypath.label(keys),
        f"Unsupported abstract leaf type for loading: {type(leaf)}. Give a jax.ShapeDtypeStruct, "
        "an array, a NumPy array, a scalar, str, or `...` to skip the leaf.",
    )


def _want_type(keys: KeyPath, leaf: type) -> Wanted:
    if issubclass(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return Wanted("jax")
    if issubclass(leaf, np.ndarray):
        return Wanted("numpy")
    if issubclass(leaf, str):
        return Wanted("string")
    if issubclass(leaf, (np.generic, bool, int, float, complex, bytes)):
        return Wanted("scalar", scalar_type=leaf)
    raise errors.AbstractLeafError(
        keypath.label(keys),
        f"Unsupported abstract leaf type for loading: the type {leaf}. Types that say what to "
        "load are jax.Array, np.ndarray, int, float, complex, bool, bytes, str and NumPy scalars.",
    )


def concrete(label: str, sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """Replaces an abstract mesh by the one that is set.

    Raises:
      AbstractLeafError: none is set, or another.
    """
    sharding = getattr(sharding, "sharding", sharding)  # a Format holds one
    if not isinstance(sharding, jax.sharding.NamedSharding) or not isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.shape != sharding.mesh.shape:
        raise errors.AbstractLeafError(
            label,
            f"its sharding {sharding.spec} is over an abstract mesh {dict(sharding.mesh.shape)}, "
            "and no such mesh is set; load inside `with jax.set_mesh(mesh):`",
        )
    return jax.sharding.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


class Broadcast(NamedTuple):
    """Which replica reads, where one reads for all: its axis of the mesh, and its index there."""

    axis: int
    primary: int


class Terms(NamedTuple):
    """What holds for all leaves of a load.

    Attributes:
      process: whose devices are loaded to.
      enable_x64: whether the caller's jax holds 64-bit values.
      pads: whether arrays are padded and cut to the shape that is asked for.
      fills_missing: whether chunks that are missing read as zeros.
      broadcast: how one replica reads for all; None where each gets its values from the host.
      is_tight: whether nothing may be read that no device needs.
    """

    process: int
    enable_x64: bool
    pads: bool = False
    fills_missing: bool = False
    broadcast: Broadcast | None = None
    is_tight: bool = False


class Target(NamedTuple):
    """What leaves become that are stored alike and asked for alike.

    Attributes:
      form: how they are read.
      regions: what is read of each.
      finish: makes a leaf's value of its entry and its pieces.
    """

    form: ReadForm
    regions: tuple[plan.Region, ...]
    finish: Callable[[schema.Entry, Sequence[Any]], Any]


def is_for_jax(entry: schema.Entry, wanted: Wanted) -> bool:
    """Says whether a stored array becomes a jax array."""
    return wanted.form == "jax" or (wanted.form == "stored" and entry.kind == schema.JAX_ARRAY)


def resolve(
    entry: schema.Entry,
    document: Mapping[str, Any],
    wanted: Wanted,
    terms: Terms,
    *,
    sharding: jax.sharding.Sharding | None,
    saved_sharding: Mapping[str, Any] | None,
    prng_impl: str | None,
) -> Target:
    """Decides how one stored array is read and what is made of it.

    Args:
      entry: the leaf.
      document: of its array.
      wanted: what is asked for.
      terms: of the load.
      sharding: for a jax array that nothing more specific is said of.
      saved_sharding: what the checkpoint says of its sharding.
      prng_impl: of typed keys, what the checkpoint says of their implementation.

    Raises:
      ShapeMismatchError: another shape was asked for.
      DtypeMismatchError: the dtype can't be had without losing values.
      ShardingMismatchError: a sharding does not fit.
    """
    label = keypath.label(entry.keys)
    stored = zarr.stored_dtype(document)
    logical = entry.private.get("logical_dtype")
    view_dtype = None if logical is None else zarr.dtype_named(logical)
    stored_shape = tuple(document["shape"])
    wants_key = is_prng_key(wanted)
    impl = prng_impl or (_impl_of(wanted.dtype) if wants_key else None)
    if wants_key:
        _check_keys(label, stored, stored_shape, wanted.dtype, prng_impl)
    shape = _shape(label, stored_shape, wanted, may_differ=terms.pads and impl is None)
    if wanted.form == "string":
        raise errors.DtypeMismatchError(
            label, f"str was asked for, but the checkpoint holds {stored.name}{list(shape)}"
        )
    is_scalar = wanted.form == "scalar" or (wanted.form == "stored" and _is_scalar(entry))
    if is_scalar and not is_for_jax(entry, wanted):
        _check_scalar(label, view_dtype or stored, stored_shape, entry, wanted)
    dtype = view_dtype or stored
    if wanted.dtype is not None and not wants_key and impl is None:
        dtype = wanted.dtype
    if is_for_jax(entry, wanted):
        _check_width(label, dtype, terms.enable_x64)
        sharding = wanted.sharding or sharding or _saved(label, entry, saved_sharding)
        placing = _placing(label, sharding, shape, terms)
    else:
        sharding = None
        placing = _Placing((plan.ShardSpec(-1, terms.process, plan.whole(shape)),), {}, {})
    piece_shape = None
    if shape != stored_shape:
        # Every shard has one shape; what lies beyond the stored array is not read.
        piece_shape = plan.box_shape(placing.shards[0].box)
        placing.clip(stored_shape)
    form = ReadForm(
        document,
        dtype,
        view_dtype,
        sharding,
        placing.devices,
        piece_shape=piece_shape,
        copies=placing.copies,
        fills_missing=terms.fills_missing,
    )
    is_cast = view_dtype is not None and view_dtype != dtype
    regions = plan.read_regions(
        placing.shards,
        dtype.itemsize + (stored.itemsize if is_cast else 0),  # both are there at once
        process=terms.process,
        shape=stored_shape,
        chunk_shape=zarr.chunk_shape(document),
        is_raw=form.raw is not None,
        is_tight=terms.is_tight,
    )
    if piece_shape is not None and regions:  # what is filled up takes memory, too
        count = sum(len(devices) for region in regions for _, devices in region.parts)
        nbytes = math.prod(piece_shape) * dtype.itemsize * count // len(regions)
        regions = tuple(region._replace(nbytes=max(region.nbytes, nbytes)) for region in regions)
    is_weak = wanted.is_weak or (wanted.form == "stored" and "weak_type" in entry.private)

    def finish(entry: schema.Entry, pieces: Sequence[Any]) -> Any:
        if sharding is not None:
            array = place.assemble(shape, sharding, pieces)
            if impl is not None:
                return jax.random.wrap_key_data(array, impl=impl)
            return _weak(array, sharding) if is_weak and not shape else array
        (piece,) = pieces
        return _scalar(piece, entry, wanted) if is_scalar else piece

    return Target(form, regions, finish)


@dataclasses.dataclass
class _Placing:
    """Where the pieces of an array go.

    Attributes:
      shards: what is read, for which device.
      devices: single-device shardings by device id, where there are several pieces.
      copies: by the id of a device, where its piece is sent from there.
    """

    shards: tuple[plan.ShardSpec, ...]
    devices: dict[int, jax.sharding.Sharding]
    copies: dict[int, tuple[jax.sharding.Sharding, ...]]

    def clip(self, shape: tuple[int, ...]) -> None:
        """Leaves only what lies inside a shape to be read."""
        self.shards = tuple(
            shard._replace(
                box=tuple(
                    (min(start, side), min(stop, side))
                    for (start, stop), side in zip(shard.box, shape, strict=True)
                ),
            )
            for shard in self.shards
        )


def _placing(
    label: str, sharding: jax.sharding.Sharding, shape: tuple[int, ...], terms: Terms
) -> _Placing:
    try:
        shards = shards_of(sharding, shape)
    except (ValueError, IndexError) as error:  # jax looks at the rank only in passing
        raise errors.ShardingMismatchError(
            label, f"its shape {shape} does not fit the sharding {sharding}: {error}"
        ) from None
    devices: dict[int, jax.sharding.Sharding] = {}
    if len(shards) > 1:
        kind = sharding.memory_kind
        devices = {
            device.id: jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
            for device in arrays.devices_of(sharding, local=True)
        }
    if terms.broadcast is None:
        return _Placing(shards, devices, {})
    primary = _primary_devices(label, sharding, terms.broadcast)
    sources: dict[plan.Box, plan.ShardSpec] = {}
    local = [shard for shard in shards if shard.process == terms.process]
    for shard in sorted(local, key=lambda shard: shard.device_id not in primary):
        sources.setdefault(shard.box, shard)
    copies: dict[int, tuple[jax.sharding.Sharding, ...]] = {}
    for shard in local:
        source = sources[shard.box]
        if shard is not source:
            sent = copies.get(source.device_id, ())
            copies[source.device_id] = (*sent, devices[shard.device_id])
    return _Placing(tuple(sources.values()), devices, copies)


def _primary_devices(label: str, sharding: jax.sharding.Sharding, broadcast: Broadcast) -> set[int]:
    """Returns the ids of the devices of the replica that reads.

    Raises:
      ShardingMismatchError: there are no replicas along that axis.
    """
    options = "array.loading.use_load_and_broadcast"
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise errors.ShardingMismatchError(
            label,
            f"{options}: Must provide `sharding`, a NamedSharding, for every jax array; this one "
            f"would go to {sharding}",
        )
    mesh = sharding.mesh.devices
    if broadcast.axis >= mesh.ndim or broadcast.primary >= mesh.shape[broadcast.axis]:
        raise errors.ShardingMismatchError(
            label,
            f"{options}: the mesh {dict(sharding.mesh.shape)} has no replica {broadcast.primary} "
            f"along axis {broadcast.axis}",
        )
    name = sharding.mesh.axis_names[broadcast.axis]
    used = [part if isinstance(part, tuple) else (part,) for part in sharding.spec]
    if any(name in part for part in used):
        raise errors.ShardingMismatchError(
            label,
            f"{options}: the array is divided along {name!r}, so there are no replicas along it: "
            f"{sharding.spec}. Set load_and_broadcast_options.replica_axis_index to another axis",
        )
    return {device.id for device in mesh.take(broadcast.primary, axis=broadcast.axis).flat}


def _shape(
    label: str, stored: tuple[int, ...], wanted: Wanted, *, may_differ: bool
) -> tuple[int, ...]:
    """Returns the shape that an array gets."""
    expected = stored[:-1] if is_prng_key(wanted) else stored
    if wanted.shape is None or wanted.shape == expected:
        return stored
    if may_differ and len(wanted.shape) == len(stored):
        return wanted.shape
    if may_differ:
        why = "Ranks do not match, and padding and truncation keep the rank."
    else:
        why = (
            "Ask for the stored shape, or allow padding and truncation: "
            "array.loading.enable_padding_and_truncation."
        )
    raise errors.ShapeMismatchError(
        label,
        f"Requested shape: {wanted.shape} is not compatible with the stored shape: {expected}. "
        f"{why}",
    )


def _saved(
    label: str, entry: schema.Entry, document: Mapping[str, Any] | None
) -> jax.sharding.Sharding:
    """Returns the saved sharding, or this process's first device where that can't be had."""
    if document is not None:
        try:
            sharding = arrays.ShardingMetadata(document).to_jax_sharding()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.info("leaf %s: %s; it is loaded on one device", label, error)
        else:
            kind = entry.private.get("memory_kind")
            device = arrays.devices_of(sharding)[0]
            kinds = {memory.kind for memory in device.addressable_memories()}
            return sharding.with_memory_kind(str(kind)) if kind in kinds else sharding
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _check_width(label: str, dtype: Any, enable_x64: bool) -> None:
    if not enable_x64 and dtype.name in _WIDE:
        raise errors.DtypeMismatchError(
            label,
            f"a jax array of dtype {dtype.name} needs jax_enable_x64, which is off; values would "
            "be narrowed. Turn it on, or ask for a narrower dtype or for np.ndarray.",
        )


def _impl_of(dtype: Any) -> str:
    """Returns the name of the PRNG implementation of a key dtype."""
    with jax.transfer_guard("allow"):
        return str(jax.random.key_impl(jnp.zeros((), dtype)))


def _check_keys(
    label: str, stored: np.dtype[Any], shape: tuple[int, ...], wanted: Any, impl: str | None
) -> None:
    """Raises where an array does not hold keys of the dtype that is asked for."""
    if impl is not None and impl != _impl_of(wanted):
        raise errors.DtypeMismatchError(
            label, f"keys of {wanted} were asked for, but the checkpoint holds keys of {impl}"
        )
    with jax.transfer_guard("allow"):
        data = jax.random.key_data(jnp.zeros((), wanted))
    if data.dtype != stored or shape[-1:] != data.shape:
        raise errors.DtypeMismatchError(
            label,
            f"keys of {wanted} were asked for, which are {data.dtype}[..., {data.shape[0]}], but "
            f"the checkpoint holds {stored}{list(shape)}",
        )


def _weak(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns a weakly typed scalar, if jax makes one of that dtype."""
    is_wide = array.dtype.name in _WIDE
    with jax.transfer_guard("allow"), jax.enable_x64(is_wide):
        weak = jnp.asarray(array.item())
        return jax.device_put(weak, sharding) if weak.dtype == array.dtype else array


def _is_scalar(entry: schema.Entry) -> bool:
    return entry.kind == schema.SCALAR or "python_type" in entry.private


def _check_scalar(
    label: str, dtype: np.dtype[Any], shape: tuple[int, ...], entry: schema.Entry, wanted: Wanted
) -> None:
    """Raises where a stored array can't become the scalar that is asked for."""
    kind = wanted.scalar_type
    if entry.private.get("python_type") == "bytes" and kind in (None, bytes):
        return
    if shape != ():
        raise errors.ShapeMismatchError(
            label, f"a scalar was asked for, but the checkpoint holds {dtype}{list(shape)}"
        )
    if kind in (int, float, bool) and dtype.kind == "c":
        raise errors.DtypeMismatchError(label, f"a complex number can't be loaded as {kind}")
    if kind is bytes:
        raise errors.DtypeMismatchError(
            label, f"bytes were asked for, but the checkpoint holds {dtype}"
        )


def _scalar(piece: np.ndarray[Any, Any], entry: schema.Entry, wanted: Wanted) -> Any:
    stored_as = entry.private.get("python_type")
    kind: Any = wanted.scalar_type
    if stored_as == "bytes" and kind in (None, bytes):
        return piece.tobytes()
    if kind is None:
        return piece[()] if stored_as == "numpy_scalar" else piece.item()
    if issubclass(kind, np.generic):
        cast = piece.astype(kind)
        return cast[()] if stored_as == "numpy_scalar" else cast
    return kind(piece.item())
