"""What each stored leaf is loaded as.

`want` reads an abstract leaf, on the caller's thread, where a mesh may be set. `resolve` meets it
with what is stored, once the checkpoint's documents are read. `Target.finish` makes the value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from orbax_async import arrays, errors
from orbax_async._engine import plan, transfer
from orbax_async._engine.load_pipeline import ReadForm
from orbax_async._storage import zarr
from orbax_async._trace import logger
from orbax_async.handlers.leaves import is_prng_key, shards_of
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.keypath import KeyPath

__all__ = ["Target", "Wanted", "resolve", "want"]

Form = Literal["stored", "jax", "numpy", "scalar", "string", "skip"]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An abstract leaf, understood.

    Attributes:
      form: what to return; `stored` for whatever was saved.
      shape: the shape that must be stored, None for any.
      dtype: the dtype to cast to, None for the stored one.
      sharding: where a jax array goes, None for where it was saved.
      scalar_type: the Python or NumPy type of a scalar.
      is_weak: whether a jax scalar is weakly typed.
      original: what `...` and None give back.
    """

    form: Form
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    sharding: jax.sharding.Sharding | None = None
    scalar_type: type | None = None
    is_weak: bool = False
    original: Any = None


STORED = Wanted("stored")
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
        return Wanted("skip", original=leaf)
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
            _concrete(keys, getattr(leaf, "sharding", None)),
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


def _concrete(
    keys: KeyPath, sharding: jax.sharding.Sharding | None
) -> jax.sharding.Sharding | None:
    """Replaces an abstract mesh by the one that is set."""
    sharding = getattr(sharding, "sharding", sharding)  # a Format holds one
    if not isinstance(sharding, jax.sharding.NamedSharding) or not isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.shape != sharding.mesh.shape:
        raise errors.AbstractLeafError(
            keypath.label(keys),
            f"its sharding {sharding.spec} is over an abstract mesh {dict(sharding.mesh.shape)}, "
            "and no such mesh is set; load inside `with jax.set_mesh(mesh):`",
        )
    return jax.sharding.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


@dataclasses.dataclass(slots=True)
class Target:
    """What leaves become that are stored alike and asked for alike.

    Attributes:
      form: how they are read.
      regions: what is read of each.
      finish: makes a leaf's value of its entry and its pieces.
    """

    form: ReadForm
    regions: tuple[plan.Region, ...]
    finish: Callable[[schema.Entry, Sequence[Any]], Any]


def resolve(
    entry: schema.Entry,
    document: Mapping[str, Any],
    wanted: Wanted,
    *,
    saved_sharding: Mapping[str, Any] | None,
    prng_impl: str | None,
    process: int,
    enable_x64: bool,
) -> Target:
    """Decides how one stored array is read and what is made of it.

    Raises:
      ShapeMismatchError: another shape was asked for.
      DtypeMismatchError: the dtype can't be had without losing values.
    """
    label = keypath.label(entry.keys)
    stored = zarr.stored_dtype(document)
    logical = entry.private.get("logical_dtype")
    view_dtype = None if logical is None else zarr.dtype_named(logical)
    shape = tuple(document["shape"])
    form = wanted.form
    if form == "stored":
        form = "jax" if entry.kind == schema.JAX_ARRAY else "numpy"
    wants_key = is_prng_key(wanted)
    impl = prng_impl or (_impl_of(wanted.dtype) if wants_key else None)
    expected = shape[:-1] if wants_key else shape
    if wanted.shape is not None and wanted.shape != expected:
        raise errors.ShapeMismatchError(
            label,
            f"Requested shape: {wanted.shape} is not compatible with the stored shape: "
            f"{expected}. Ask for the stored shape; padding and truncation are never implied.",
        )
    if form == "string":
        raise errors.DtypeMismatchError(
            label, f"str was asked for, but the checkpoint holds {stored.name}{list(shape)}"
        )
    dtype = view_dtype or stored
    if wanted.dtype is not None and not wants_key and impl is None:
        dtype = wanted.dtype
    sharding: jax.sharding.Sharding | None = None
    local: dict[int, jax.sharding.Sharding] = {}
    if form == "jax":
        _check_width(label, dtype, enable_x64)
        sharding = wanted.sharding or _saved(label, entry, saved_sharding)
        shards = shards_of(sharding, shape)
        if len(shards) > 1:
            kind = sharding.memory_kind
            local = {
                device.id: jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
                for device in arrays.devices_of(sharding, local=True)
            }
    else:
        shards = (plan.ShardSpec(-1, process, plan.whole(shape)),)
    read_form = ReadForm(document, dtype, view_dtype, sharding, local)
    regions = plan.read_regions(
        shards,
        dtype.itemsize,
        process=process,
        shape=shape,
        chunk_shape=zarr.chunk_shape(document),
        is_raw=read_form.raw is not None,
    )
    is_weak = wanted.is_weak or (wanted.form == "stored" and "weak_type" in entry.private)

    def finish(entry: schema.Entry, pieces: Sequence[Any]) -> Any:
        if sharding is not None:
            array = transfer.assemble(shape, sharding, pieces)
            if impl is not None:
                return _wrap_key(keypath.label(entry.keys), array, impl, wanted)
            return _weak(array, sharding) if is_weak and not shape else array
        (piece,) = pieces
        if form == "scalar" or (wanted.form == "stored" and _is_scalar(entry)):
            return _scalar(keypath.label(entry.keys), piece, entry, wanted)
        return piece

    return Target(read_form, regions, finish)


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


def _wrap_key(label: str, array: jax.Array, impl: str, wanted: Wanted) -> jax.Array:
    keys: jax.Array = jax.random.wrap_key_data(array, impl=impl)
    if is_prng_key(wanted) and keys.dtype != wanted.dtype:
        raise errors.DtypeMismatchError(
            label, f"keys of {wanted.dtype} were asked for, but the checkpoint holds {keys.dtype}"
        )
    return keys


def _weak(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns a weakly typed scalar, if jax makes one of that dtype."""
    is_wide = array.dtype.name in _WIDE
    with jax.transfer_guard("allow"), jax.enable_x64(is_wide):
        weak = jnp.asarray(array.item())
        return jax.device_put(weak, sharding) if weak.dtype == array.dtype else array


def _is_scalar(entry: schema.Entry) -> bool:
    return entry.kind == schema.SCALAR or "python_type" in entry.private


def _scalar(label: str, piece: np.ndarray[Any, Any], entry: schema.Entry, wanted: Wanted) -> Any:
    stored_as = entry.private.get("python_type")
    kind = wanted.scalar_type
    if stored_as == "bytes" and kind in (None, bytes):
        return piece.tobytes()
    if piece.shape != ():
        raise errors.ShapeMismatchError(
            label,
            f"a scalar was asked for, but the checkpoint holds {piece.dtype}{list(piece.shape)}",
        )
    if kind is None:
        return piece[()] if stored_as == "numpy_scalar" else piece.item()
    if issubclass(kind, np.generic):
        cast = piece.astype(kind)
        return cast[()] if stored_as == "numpy_scalar" else cast
    value = piece.item()
    if kind in (int, float, bool) and isinstance(value, complex):
        raise errors.DtypeMismatchError(label, f"a complex number can't be loaded as {kind}")
    if kind is bytes:
        raise errors.DtypeMismatchError(
            label, f"bytes were asked for, but the checkpoint holds {piece.dtype}"
        )
    cast_to: Any = kind
    return cast_to(value)
