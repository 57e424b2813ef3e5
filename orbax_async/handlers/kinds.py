"""The kinds of leaf: how each is stored, asked for, loaded and reported.

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

`TABLE` has one entry a kind. A new kind is a subclass of `Kind` and an entry of the table, and
nothing else. A kind raises a ValueError with the reason; `encode` and `want` name the leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orbax_async import arrays, errors
from orbax_async._engine import transfer
from orbax_async._engine.leaf import Leaf
from orbax_async._storage import zarr
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.keypath import KeyPath

__all__ = [
    "SKIPPED",
    "STORED",
    "TABLE",
    "Encoded",
    "Kind",
    "LeafRecord",
    "Request",
    "disk_dtype",
    "encode",
    "is_prng_key",
    "of_stored",
    "result_kind",
    "signature_of",
    "want",
]

_UINT8 = np.dtype(np.uint8)

Encoded = tuple[Leaf, Any]  # with its array, its text, or None


class Request(NamedTuple):
    """What is asked for in place of a stored leaf: an abstract leaf, understood.

    What is None is as it was saved.
    """

    kind: Kind | None
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    sharding: jax.sharding.Sharding | None = None
    type: Any = None  # the class of a value that is no array
    is_weak: bool = False  # of a jax scalar


class LeafRecord(NamedTuple):
    """What the documents of a checkpoint say of one leaf."""

    entry: schema.Entry
    array: zarr.ArrayDocument = zarr.plain_document((), _UINT8)
    prng_impl: str | None = None  # of typed PRNG keys, the name of their implementation
    sharding: Mapping[str, Any] | None = None  # the document of the saved one
    nbytes: int | None = None  # on disk

    @property
    def label(self) -> str:
        """The leaf's key path, for messages."""
        return keypath.label(self.entry.keys)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of what was saved, which zarr may not have."""
        logical = self.entry.private.get("logical_dtype")
        return self.array.dtype if logical is None else zarr.dtype_named(logical)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.array.shape)}"


class Kind:
    """One kind of leaf. What is not overridden suits values that are stored as NumPy arrays.

    Attributes:
      types: of its values and abstract values, which each of them, and each subclass, also is.
      value_type: what the tree's document calls it.
      python_type: what only we record of it, where kinds have a `value_type` in common.
      is_numeric: whether options may cast what is stored, and any array can be loaded as this.
      is_on_devices: whether it is a jax array once it is loaded.
    """

    types: tuple[Any, ...] = ()  # classes
    value_type: str = schema.NUMPY_ARRAY
    python_type: str | None = None
    is_numeric: bool = False
    is_on_devices: bool = False

    def encode(self, keys: KeyPath, value: Any) -> Encoded | None:
        """Returns what is stored of a value of `types`; None if it is of another kind.

        It raises a ValueError if that can't be, and a RuntimeError if its values are gone.
        """
        raise NotImplementedError

    def encoded(
        self, keys: KeyPath, array: np.ndarray[Any, Any], value_type: str | None = None
    ) -> Encoded:
        """Returns what is stored of a value, given as an array."""
        dtype, logical = disk_dtype(array.dtype)
        private = {} if self.python_type is None else {"python_type": self.python_type}
        if logical is not None:
            private["logical_dtype"] = logical
        return Leaf(keys, value_type or self.value_type, array.shape, dtype, private=private), array

    def signature(self, value: Any) -> Hashable:
        """Returns quickly all on which `encode` depends but the values; raises if it can't."""
        raise ValueError

    def want(self, leaf: Any) -> Request | None:
        """Understands an abstract leaf; returns None if it asks for another kind.

        It raises a ValueError if nothing can be loaded as this.
        """
        return Request(self, type=leaf if isinstance(leaf, type) else type(leaf))

    def check(self, record: LeafRecord, request: Request) -> None:
        """Raises a DtypeMismatchError or ShapeMismatchError if what is stored can't be this."""
        if not self.is_numeric and of_stored(record.entry) is not self:
            raise errors.DtypeMismatchError(
                record.label,
                f"{self.types[0].__name__} was asked for, but the checkpoint holds {record}",
            )

    def decode(self, stored: Any, record: LeafRecord, request: Request) -> Any:
        """Makes a leaf of what was read: an array, or a text."""
        return stored

    def describe(self, record: LeafRecord) -> Any:
        """Returns what `metadata` reports of a stored leaf."""
        array = record.array
        if record.entry.kind == schema.SCALAR:
            return {"b": False, "i": 0, "u": 0, "c": 0j}.get(array.dtype.kind, 0.0)
        storage = arrays.StorageMetadata(array.chunk_shape, None, record.nbytes)
        return arrays.NumpyMetadata(array.shape, array.dtype, storage)


class _Nothing(Kind):
    """None and empty containers. They ask for nothing; so does `...`."""

    types = (type(None), type(...), tuple, list, Mapping)
    value_type = "None"

    def encode(self, keys: KeyPath, value: Any) -> Encoded | None:
        name = structure.empty_kind(value)
        return None if name is None else (Leaf(keys, name), None)

    def want(self, leaf: Any) -> Request | None:
        return SKIPPED if leaf is ... or structure.is_empty(leaf) else None

    def describe(self, record: LeafRecord) -> Any:
        return record.entry.empty_value()


class _Text(Kind):
    """Strings. What is reported of one, also asks for one."""

    types = (str,)
    value_type = schema.STRING

    def encode(self, keys: KeyPath, value: str) -> Encoded:
        leaf = Leaf(keys, self.value_type)
        if "~" in leaf.name:
            raise ValueError(
                "a string's key can't hold '~', which readers take for an escape; rename it"
            )
        return leaf, str(value)

    def signature(self, value: str) -> Hashable:
        return str

    def describe(self, record: LeafRecord) -> str:
        return "string"


class _Bytes(Kind):
    types = (bytes,)
    python_type = "bytes"

    def encode(self, keys: KeyPath, value: bytes) -> Encoded:
        return self.encoded(keys, np.frombuffer(value, np.uint8))

    def signature(self, value: bytes) -> Hashable:
        return bytes, len(value)

    def decode(self, stored: Any, record: LeafRecord, request: Request) -> bytes:
        return bytes(stored.tobytes())


class _Number(Kind):
    """Numbers of one Python type."""

    is_numeric = True

    def __init__(
        self, number: type, value_type: str = schema.SCALAR, python_type: str | None = None
    ) -> None:
        self.types = (number,)
        self.value_type = value_type
        self.python_type = python_type

    def encode(self, keys: KeyPath, value: Any) -> Encoded:
        array = np.asarray(self.types[0](value))
        if array.dtype == object:
            raise ValueError(f"the int {value} is outside of int64 and uint64")
        return self.encoded(keys, array)

    def signature(self, value: Any) -> Hashable:
        return type(value), self.types == (int,) and value >= 2**63

    def check(self, record: LeafRecord, request: Request) -> None:
        if record.array.shape:
            raise errors.ShapeMismatchError(
                record.label, f"a scalar was asked for, but the checkpoint holds {record}"
            )
        is_real = self.types[0] in (bool, int, float)
        if is_real and request.type is not None and record.dtype.kind == "c":
            raise errors.DtypeMismatchError(
                record.label, f"a complex number can't be loaded as {request.type}"
            )

    def decode(self, stored: Any, record: LeafRecord, request: Request) -> Any:
        number = stored.item()
        return number if request.type is None else request.type(number)


class _NumpyScalar(_Number):
    def __init__(self) -> None:
        super().__init__(np.generic, schema.NUMPY_ARRAY, "numpy_scalar")

    def encode(self, keys: KeyPath, value: np.generic) -> Encoded:
        # np.float64 is a float, and Orbax takes it for one.
        value_type = schema.SCALAR if isinstance(value, float) else self.value_type
        return self.encoded(keys, np.asarray(value), value_type)

    def signature(self, value: np.generic) -> Hashable:
        if not isinstance(value, (np.number, np.bool_)):  # others have more than a type
            raise ValueError
        return type(value), None

    def decode(self, stored: Any, record: LeafRecord, request: Request) -> Any:
        array = stored if request.type is None else stored.astype(request.type)
        return array[()] if of_stored(record.entry) is self else array


class _NumpyArray(Kind):
    """NumPy arrays. What is reported of one, also asks for one."""

    types = (np.ndarray, arrays.NumpyMetadata)
    is_numeric = True

    def encode(self, keys: KeyPath, value: Any) -> Encoded | None:
        if isinstance(value, arrays.NumpyMetadata):
            return None
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise ValueError(
                "a masked array would lose its mask; save `.data` and `.mask`, or `.filled()`"
            )
        array = np.asarray(value)
        little = array.dtype.newbyteorder("<")
        leaf, stored = self.encoded(keys, array.astype(little, copy=False))
        leaf.is_mutable = stored is array
        return leaf, stored

    def signature(self, value: np.ndarray[Any, Any]) -> Hashable:
        if type(value) is not np.ndarray:
            raise ValueError
        return value.shape, value.dtype

    def want(self, leaf: Any) -> Request | None:
        if isinstance(leaf, type):
            return Request(self)
        # An empty array is the usual way to say "NumPy, whatever its shape".
        return Request(self, tuple(leaf.shape) if 0 not in leaf.shape else None, leaf.dtype)


class _JaxArray(Kind):
    """jax arrays. Whatever has a shape and a dtype asks for one."""

    types = (jax.Array, jax.core.Tracer, jax.ShapeDtypeStruct, arrays.ArrayMetadata)
    value_type = schema.JAX_ARRAY
    is_numeric = True
    is_on_devices = True

    def encode(self, keys: KeyPath, value: Any) -> Encoded | None:
        if isinstance(value, (jax.ShapeDtypeStruct, arrays.ArrayMetadata)):
            return None
        if isinstance(value, jax.core.Tracer):
            raise ValueError(
                "Unsupported leaf type for saving: a tracer. Save outside of jit, grad and vmap."
            )
        if value.is_deleted():
            raise RuntimeError(
                f"Array has been deleted with shape={value.dtype}{list(value.shape)}: it was "
                "donated or deleted before the save. Save before that, or save the array that "
                "replaced it."
            )
        shape, sharding = value.shape, value.sharding
        dtype, private = _recorded(value.dtype, sharding, not shape and value.weak_type)
        return Leaf(keys, schema.JAX_ARRAY, shape, dtype, sharding, private=private), value

    def signature(self, value: Any) -> Hashable:
        if value.is_deleted():
            raise ValueError
        return value.aval, value.sharding

    def want(self, leaf: Any) -> Request | None:
        if isinstance(leaf, type):
            return Request(self)
        if isinstance(leaf, arrays.ArrayMetadata):
            # Its devices may not be here: the saved sharding is looked up as if nothing were given.
            return Request(self, tuple(leaf.shape), leaf.dtype)
        return Request(
            self,
            None if leaf.shape is None else tuple(leaf.shape),
            leaf.dtype if leaf.dtype is None or self is RANDOM_KEYS else np.dtype(leaf.dtype),
            transfer.concrete(getattr(leaf, "sharding", None)),
            is_weak=bool(getattr(leaf, "weak_type", False)),
        )

    def decode(self, stored: Any, record: LeafRecord, request: Request) -> Any:
        if stored.shape:
            return stored
        is_weak = request.is_weak or (request.kind is None and "weak_type" in record.entry.private)
        return _weak(stored) if is_weak else stored

    def describe(self, record: LeafRecord) -> arrays.ArrayMetadata:
        array, saved = record.array, record.sharding
        sharding = None if saved is None else arrays.ShardingMetadata(saved)
        storage = arrays.StorageMetadata(array.chunk_shape, record.entry.write_shape, record.nbytes)
        return arrays.ArrayMetadata(array.shape, array.dtype, sharding, storage)


class _RandomKeys(_JaxArray):
    """Typed PRNG keys, stored as the integers of which they are made."""

    def encode(self, keys: KeyPath, value: Any) -> Encoded | None:
        if not is_prng_key(value):
            return None
        data = value if value.is_deleted() else jax.random.key_data(value)
        encoded = super().encode(keys, data)
        if encoded is not None:
            encoded[0].prng_impl = str(jax.random.key_impl(value))
        return encoded

    def want(self, leaf: Any) -> Request | None:
        return super().want(leaf) if is_prng_key(leaf) else None

    def check(self, record: LeafRecord, request: Request) -> None:
        if request.kind is not self:  # some jax array was asked for, and keys were found
            return
        impl = record.prng_impl
        if impl is not None and impl != _impl_of(request.dtype):
            raise errors.DtypeMismatchError(
                record.label,
                f"keys of {request.dtype} were asked for, but the checkpoint holds keys of {impl}",
            )
        with jax.transfer_guard("allow"):
            data = jax.random.key_data(jnp.zeros((), request.dtype))
        if data.dtype != record.dtype or record.array.shape[-1:] != data.shape:
            raise errors.DtypeMismatchError(
                record.label,
                f"keys of {request.dtype} were asked for, which are {data.dtype}[..., "
                f"{data.shape[0]}], but the checkpoint holds {record}",
            )

    def decode(self, stored: Any, record: LeafRecord, request: Request) -> Any:
        impl = record.prng_impl or _impl_of(request.dtype)
        return jax.random.wrap_key_data(stored, impl=impl)


NOTHING, TEXT, NUMPY_ARRAY = _Nothing(), _Text(), _NumpyArray()
JAX_ARRAY, RANDOM_KEYS = _JaxArray(), _RandomKeys()
STORED, SKIPPED = Request(None), Request(NOTHING)

TABLE: tuple[Kind, ...] = (
    NOTHING,
    TEXT,
    _Bytes(),
    _NumpyScalar(),  # some of which are Python numbers, too
    _Number(bool),
    _Number(int),
    _Number(float),
    _Number(complex, schema.NUMPY_ARRAY, "complex"),
    NUMPY_ARRAY,
    RANDOM_KEYS,
    JAX_ARRAY,
)
"""All kinds, in the order in which they are asked: the first that fits is taken."""


@functools.lru_cache(maxsize=256)
def _of_class(table: tuple[Kind, ...], cls: Any) -> tuple[Kind, ...]:
    """Returns the kinds of which values of a class may be."""
    return tuple(kind for kind in table if issubclass(cls, kind.types))


def encode(keys: KeyPath, value: Any) -> Encoded:
    """Returns what a leaf or empty node is, and its value as it is stored.

    Raises:
      UnsupportedLeafError: a checkpoint can't hold it.
      StagingError: it is a jax array whose buffer is gone.
    """
    cls: Any = type(value)
    try:
        for kind in _of_class(TABLE, cls):
            encoded = kind.encode(keys, value)
            if encoded is not None:
                return encoded
    except ValueError as reason:
        raise errors.UnsupportedLeafError(keypath.label(keys), str(reason)) from None
    except RuntimeError as reason:
        raise errors.StagingError(keypath.label(keys), str(reason)) from None
    raise errors.UnsupportedLeafError(
        keypath.label(keys),
        f"Unsupported leaf type for saving: {cls}. Supported leaf types are: jax.Array, "
        "numpy.ndarray, NumPy scalars, int, float, complex, bool, bytes, str and None. Convert "
        "it, or take it out of the tree (equinox: `eqx.filter(model, eqx.is_array)`).",
    )


def signature_of(cls: Any) -> Callable[[Any], Hashable]:
    """Returns the `Kind.signature` of values of a class; kinds that share a class share it."""
    kind, *_ = *_of_class(TABLE, cls), Kind()
    return kind.signature


def want(keys: KeyPath, leaf: Any) -> Request:
    """Understands an abstract leaf; raises AbstractLeafError if nothing can be loaded as it."""
    cls: Any = leaf if isinstance(leaf, type) else type(leaf)
    candidates = _of_class(TABLE, cls)
    if not candidates and cls is not leaf and isinstance(leaf, arrays.AbstractArray):
        candidates = RANDOM_KEYS, JAX_ARRAY
    try:
        for kind in candidates:
            request = kind.want(leaf)
            if request is not None:
                return request
    except ValueError as reason:
        raise errors.AbstractLeafError(keypath.label(keys), str(reason)) from None
    raise errors.AbstractLeafError(
        keypath.label(keys),
        f"Unsupported abstract leaf type for loading: {cls}. Give a jax.ShapeDtypeStruct, an "
        "array, a number, bytes or a str, or the type of one (jax.Array, np.ndarray, int, float, "
        "complex, bool, NumPy scalars, bytes, str), or `...` to skip the leaf.",
    )


def of_stored(entry: schema.Entry) -> Kind:
    """Returns the kind that was saved, as far as the tree's document tells."""
    if entry.is_empty:
        return NOTHING
    for recorded in (entry.private.get("python_type"), None):
        for kind in TABLE:
            fits = kind.python_type == recorded and (recorded or kind.value_type == entry.kind)
            if fits and kind is not RANDOM_KEYS:  # which `LeafRecord.prng_impl` tells
                return kind
    return NUMPY_ARRAY


def result_kind(record: LeafRecord, request: Request) -> Kind:
    """Returns the kind that a stored array becomes."""
    kind = request.kind or of_stored(record.entry)
    return RANDOM_KEYS if kind is JAX_ARRAY and record.prng_impl is not None else kind


@functools.cache
def disk_dtype(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], str | None]:
    """Returns the dtype on disk, and the name to record where it differs from the leaf's own."""
    if zarr.is_storable(dtype):
        return dtype, None
    try:
        is_narrow = dtype.itemsize == 1 and zarr.dtype_named(dtype.name) == dtype
    except TypeError:
        is_narrow = False
    if not is_narrow:
        raise ValueError(f"zarr has no data type for arrays of dtype {dtype}; cast it")
    return _UINT8, dtype.name


def is_prng_key(value: Any) -> bool:
    """Says whether an array, real or abstract, holds typed PRNG keys."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(dtype, np.dtype):  # quicker than to ask jax
        return False
    return not isinstance(value, type) and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _impl_of(dtype: Any) -> str:
    """Returns the name of the PRNG implementation of a key dtype."""
    with jax.transfer_guard("allow"):
        return str(jax.random.key_impl(jnp.zeros((), dtype)))


@functools.lru_cache(maxsize=4096)
def _recorded(
    dtype: np.dtype[Any], sharding: jax.sharding.Sharding, is_weak: bool
) -> tuple[np.dtype[Any], Mapping[str, Any]]:
    """Returns the dtype on disk of a jax array, and what only we record of it."""
    stored, logical = disk_dtype(dtype)
    private = {
        "logical_dtype": logical,
        "weak_type": is_weak or None,
        "memory_kind": transfer.special_memory_kind(sharding),
    }
    return stored, {name: value for name, value in private.items() if value is not None}


def is_wide(dtype: np.dtype[Any]) -> bool:
    """Says whether jax holds values of a dtype only while `jax_enable_x64` is on."""
    return dtype.name in ("int64", "uint64", "float64", "complex128")


def _weak(array: jax.Array) -> jax.Array:
    """Returns a weakly typed scalar, if jax makes one of that dtype."""
    with jax.transfer_guard("allow"), jax.enable_x64(is_wide(array.dtype)):
        weak = jnp.asarray(array.item())
        return jax.device_put(weak, array.sharding) if weak.dtype == array.dtype else array
