"""The trees of the interop proof: every leaf kind, container, sharding and key spelling.

A factory takes the 4x2 mesh of eight host devices and returns the same tree each time. Trees made
by optax, flax and equinox are in `library_trees.py`.
"""

# ruff: noqa: D103 - the name of a tree says what it is

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

Factory = Callable[[Mesh], Any]

TREES: dict[str, Factory] = {}
"""What Orbax saves too."""

ONLY_OURS: dict[str, Factory] = {}
"""What Orbax refuses to save, and loads as `handlers/kinds.py` says."""

JAX_DTYPES = (
    *("bool", "int2", "int4", "int8", "int16", "int32"),
    *("uint8", "uint16", "uint32"),
    *("float16", "bfloat16", "float32", "complex64"),
    *("float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn"),
)
NUMPY_DTYPES = (*JAX_DTYPES, "int64", "uint64", "float64", "complex128")


def tree(factory: Factory) -> Factory:
    """Registers a tree that both libraries save."""
    TREES[factory.__name__] = factory
    return factory


def only_ours(factory: Factory) -> Factory:
    """Registers a tree that only orbax_async saves."""
    ONLY_OURS[factory.__name__] = factory
    return factory


def dtype_named(name: str) -> np.dtype[Any]:
    """Returns a dtype of NumPy or of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def values(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Returns seeded values that use the range of a dtype and are exact in it."""
    rng = np.random.default_rng([seed, *shape])
    kind = dtype_named(dtype)
    if dtype == "bool":
        return np.asarray(rng.integers(0, 2, shape)).astype(bool)
    if dtype in ("int2", "int4"):
        half = 2 ** (int(dtype[-1]) - 1)
        return np.asarray(rng.integers(-half, half, shape)).astype(kind)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return np.asarray(rng.integers(limits.min, limits.max, shape, kind, endpoint=True))
    if kind.kind == "c":
        parts = rng.standard_normal((2, *shape))
        return np.asarray(parts[0] + 1j * parts[1], kind)
    return np.asarray(rng.standard_normal(shape)).astype(kind)


def on(mesh: Mesh, spec: P, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Returns a seeded array sharded over a mesh."""
    return jax.device_put(values(dtype, shape), NamedSharding(mesh, spec))


def base_state() -> dict[str, Any]:
    """A state with each kind of leaf; `w` and `large` are big enough for no shortcut."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    return {
        "w": on(mesh, P("x", "y"), (8, 16)),
        "b": jnp.asarray(values("bfloat16", (6,))),
        "large": jnp.asarray(values("float32", (200, 120))),
        "k": jax.random.key(5),
        "np": np.arange(4, dtype=np.int32),
        "i": 3,
        "s": "text",
        "none": None,
    }


# Dtypes and values.


@tree
def jax_dtypes(mesh: Mesh) -> Any:
    return {dtype: jnp.asarray(values(dtype, (3, 5))) for dtype in JAX_DTYPES}


@tree
def jax_dtypes_sharded(mesh: Mesh) -> Any:
    return {dtype: on(mesh, P("x", "y"), (8, 6), dtype) for dtype in JAX_DTYPES}


@tree
def jax_dtypes_0d(mesh: Mesh) -> Any:
    return {dtype: jnp.asarray(values(dtype, ())) for dtype in JAX_DTYPES}


@tree
def numpy_dtypes(mesh: Mesh) -> Any:
    return {dtype: values(dtype, (4, 3)) for dtype in NUMPY_DTYPES}


@tree
def numpy_dtypes_0d(mesh: Mesh) -> Any:
    return {dtype: values(dtype, ()) for dtype in NUMPY_DTYPES}


@tree
def special_floats(mesh: Mesh) -> Any:
    bits = np.array([0x7FC00001, 0xFFC00000, 0x7F800000, 0xFF800000, 0x80000000, 1], np.uint32)
    floats = bits.view(np.float32)
    halves = np.array([0x7E01, 0xFE00, 0x7C00, 0xFC00, 0x8000, 1], np.uint16)
    return {
        "f32": jax.device_put(floats, NamedSharding(mesh, P("y"))),
        "bf16": jnp.asarray(halves.view(ml_dtypes.bfloat16)),
        "f16": halves.view(np.float16),
        "f64": np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 5e-324]),
    }


@tree
def zeros_only(mesh: Mesh) -> Any:
    zeros = np.zeros((8, 4), np.float32)
    return {
        "sharded": jax.device_put(zeros, NamedSharding(mesh, P("x", "y"))),
        "numpy": zeros,
        "large": jnp.zeros((300, 300)),
        "int": 0,
        "false": jnp.asarray(False),
    }


# Shardings.


@tree
def sharded_on_both_axes(mesh: Mesh) -> Any:
    return {"w": on(mesh, P("x", "y"), (16, 12)), "t": on(mesh, P("y", "x"), (6, 8))}


@tree
def sharded_on_first_axis(mesh: Mesh) -> Any:
    return {"w": on(mesh, P("x"), (16, 12)), "narrow": on(mesh, P("x"), (4, 1))}


@tree
def sharded_on_second_axis(mesh: Mesh) -> Any:
    return {"w": on(mesh, P(None, "y"), (7, 12)), "u": on(mesh, P(None, "y"), (16, 2), "int8")}


@tree
def replicated(mesh: Mesh) -> Any:
    return {"w": on(mesh, P(), (16, 3)), "b": on(mesh, P(), (24,), "bfloat16")}


@tree
def axis_pair(mesh: Mesh) -> Any:
    return {"w": on(mesh, P(("x", "y")), (16, 3)), "t": on(mesh, P(("y", "x"), None), (8, 5))}


@tree
def odd_shapes_replicated(mesh: Mesh) -> Any:
    shapes = ((7, 5), (1,), (1, 1, 1), (13,), ())
    return [on(mesh, P(), shape) for shape in shapes]


@tree
def non_default_device(mesh: Mesh) -> Any:
    return {"w": jax.device_put(values("float32", (5, 4)), SingleDeviceSharding(jax.devices()[5]))}


@tree
def one_device_each(mesh: Mesh) -> Any:
    return [
        jax.device_put(values("int32", (3,), seed), device)
        for seed, device in enumerate(jax.devices()[:8])
    ]


@tree
def sub_mesh(mesh: Mesh) -> Any:
    half = Mesh(np.array(jax.devices()[2:6]).reshape(2, 2), ("a", "b"))
    return {"w": on(half, P("a", "b"), (4, 6)), "r": on(half, P(), (8,))}


@tree
def reversed_mesh(mesh: Mesh) -> Any:
    backwards = Mesh(np.array(jax.devices()[:8][::-1]), ("d",))
    return {"w": on(backwards, P("d"), (16, 3)), "t": on(backwards, P(None, "d"), (3, 8))}


@tree
def three_axis_mesh(mesh: Mesh) -> Any:
    cube = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    return {
        "w": on(cube, P("fsdp", None, "tensor"), (4, 3, 6)),
        "v": on(cube, P(("data", "fsdp"), "tensor"), (8, 4)),
        "r": on(cube, P(None, "tensor"), (5, 4)),
    }


@tree
def explicit_axis_types(mesh: Mesh) -> Any:
    kinds = (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto)
    explicit = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"), axis_types=kinds)
    return {"w": on(explicit, P("x", "y"), (8, 4))}


@tree
def several_meshes(mesh: Mesh) -> Any:
    line = Mesh(np.array(jax.devices()[:8]), ("d",))
    return {
        "grid": on(mesh, P("x", "y"), (8, 4)),
        "line": on(line, P("d"), (8, 4)),
        "one": jnp.arange(6.0),
        "host": values("float32", (8, 4)),
    }


@tree
def sharded_1d_and_4d(mesh: Mesh) -> Any:
    return {"v": on(mesh, P("x"), (32,)), "k": on(mesh, P(None, None, "x", "y"), (3, 3, 8, 4))}


# PRNG keys.


@tree
def key_threefry(mesh: Mesh) -> Any:
    return {"key": jax.random.key(7, impl="threefry2x32")}


@tree
def key_rbg(mesh: Mesh) -> Any:
    return {"rbg": jax.random.key(7, impl="rbg"), "unsafe": jax.random.key(8, impl="unsafe_rbg")}


@tree
def key_batches(mesh: Mesh) -> Any:
    return {
        "batch": jax.random.split(jax.random.key(1), 6),
        "grid": jax.random.split(jax.random.key(2, impl="rbg"), (2, 3)),
        "sharded": jax.device_put(
            jax.random.split(jax.random.key(3), 8), NamedSharding(mesh, P("x"))
        ),
        "replicated": jax.device_put(jax.random.key(4), NamedSharding(mesh, P())),
    }


@tree
def key_legacy(mesh: Mesh) -> Any:
    return {"key": jax.random.PRNGKey(3), "batch": jax.random.split(jax.random.PRNGKey(4), 3)}


# NumPy arrays.


@tree
def numpy_orders(mesh: Mesh) -> Any:
    whole = values("float64", (6, 8))
    frozen = values("int32", (4,))
    frozen.flags.writeable = False
    return {
        "fortran": np.asfortranarray(whole),
        "strided": whole[::2, 1::3],
        "reversed": whole[::-1],
        "transposed": whole.T,
        "broadcast": np.broadcast_to(whole[0], (3, 8)),
        "frozen": frozen,
        "matrix": np.asarray([[1.0, 2.0]]).view(np.matrix),
    }


@tree
def numpy_big_endian(mesh: Mesh) -> Any:
    return {kind: values("int32", (5, 2)).astype(f">{kind}") for kind in ("i4", "f8", "u2", "c16")}


# Scalars and strings.


class Level(enum.IntEnum):
    LOW = 3


@tree
def python_scalars(mesh: Mesh) -> Any:
    return {
        "int": 3,
        "ints": [0, -1, 2**31, -(2**63), 2**63 - 1, 2**63, 2**64 - 1],
        "floats": [0.5, -0.0, float("inf"), float("-inf"), float("nan"), 1e308, 5e-324],
        "enum": Level.LOW,
    }


@tree
def python_bools(mesh: Mesh) -> Any:
    return {"yes": True, "no": False, "w": on(mesh, P("x"), (4,))}


@tree
def strings(mesh: Mesh) -> Any:
    texts = ["", "plain", "two\nlines", 'a "quote"', "back\\slash", "ünïcödé ✓ 🙂", "\x00\x7f"]
    return {"texts": texts, "np": np.str_("numpy"), "nested": {"a": {"b": "deep"}}, "n": 1}


@tree
def strings_only(mesh: Mesh) -> Any:
    return {"name": "run", "notes": ["a", "b"]}


# Containers.


class Pair(NamedTuple):
    first: Any
    second: Any


class Nothing(NamedTuple):
    pass


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "inner"], meta_fields=["name"]
)
@dataclasses.dataclass
class Layer:
    w: Any
    inner: Any
    name: str = "layer"


@jax.tree_util.register_pytree_node_class
class Unkeyed:
    """A node whose children have no keys."""

    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Unkeyed:
        return cls(*children)


@tree
def bare_jax_array(mesh: Mesh) -> Any:
    return on(mesh, P("x", "y"), (8, 4))


@tree
def bare_numpy_array(mesh: Mesh) -> Any:
    return values("float64", (3, 2))


@tree
def bare_int(mesh: Mesh) -> Any:
    return 42


@tree
def list_root(mesh: Mesh) -> Any:
    return [on(mesh, P("x"), (4,)), 2, [3.5, {"a": np.arange(3)}]]


@tree
def empty_containers(mesh: Mesh) -> Any:
    return {
        "dict": {},
        "list": [],
        "tuple": (),
        "none": None,
        "empty_named_tuple": Nothing(),
        "inside": [{}, None, (), [], {"x": {}}],
        "leaf": np.arange(2),
    }


@tree
def only_empty_nodes(mesh: Mesh) -> Any:
    return {"e": {}, "n": None, "l": [[], ()]}


@tree
def long_lists(mesh: Mesh) -> Any:
    return {"ints": list(range(12)), "arrays": [np.full((2,), i, np.int16) for i in range(23)]}


@tree
def tuples(mesh: Mesh) -> Any:
    return (1, (jnp.arange(3), (np.arange(2), ("s",))), [(2.5,)])


@tree
def named_tuples(mesh: Mesh) -> Any:
    return {"p": Pair(jnp.arange(4), Pair(1, None)), "l": [Pair(np.arange(2), 0.5)]}


@tree
def dataclasses_and_nodes(mesh: Mesh) -> Any:
    inner = Layer(np.arange(3), None, "inner")
    return {"layer": Layer(on(mesh, P("x"), (8, 2)), inner), "node": Unkeyed(1, jnp.ones(2), [2])}


@tree
def ordered_and_default_dicts(mesh: Mesh) -> Any:
    ordered = collections.OrderedDict(z=jnp.arange(2), a=np.arange(3), m={"k": 1})
    counts = collections.defaultdict(list, {"b": [1, 2], "a": [np.arange(2)]})
    return {"ordered": ordered, "counts": counts}


@tree
def deep_nesting(mesh: Mesh) -> Any:
    node: Any = {"leaf": on(mesh, P("y"), (6,))}
    for depth in range(20):
        node = {f"level{depth}": node} if depth % 2 else [depth, node]
    return node


# Keys.


@tree
def keys_with_slashes(mesh: Mesh) -> Any:
    return {"a/b": {"c/d": np.arange(3), "e": "text/with"}, "params/w": on(mesh, P("x"), (4,))}


@tree
def keys_with_dots(mesh: Mesh) -> Any:
    return {"a.b": np.arange(3), "a": {"c.d": 1}, ".": jnp.arange(2), "x..y": 2.5, "s.t": "text"}


@tree
def keys_with_spaces_and_quotes(mesh: Mesh) -> Any:
    names = ("a b", " lead", "q'uote", 'dou"ble', "(paren)", "back\\slash", "100%", "#?&=+")
    return {name: np.full((2,), index) for index, name in enumerate(names)}


@tree
def keys_with_unicode(mesh: Mesh) -> Any:
    return {
        "ключ": jnp.arange(2),
        "鍵": {"🙂": np.arange(3)},
        "é": "text",
        "ñ": on(mesh, P(), (8,)),
    }


@tree
def keys_not_strings(mesh: Mesh) -> Any:
    return {
        "ints": {0: np.arange(2), 1: 5, 10: jnp.arange(3)},
        "floats": {0.5: 1, 1.5: 2},
        "bools": {False: np.arange(1), True: np.arange(2)},
        "pairs": {("a", 1): 1, ("b", 2): 2},
    }


@tree
def key_empty_string(mesh: Mesh) -> Any:
    return {"": np.arange(3), "a": {"": jnp.arange(2)}}


@tree
def keys_like_files(mesh: Mesh) -> Any:
    names = ("zarr.json", "c", "d", "manifest.ocdbt", "_METADATA", "_sharding", "array_metadatas")
    return {name: np.full((2,), index) for index, name in enumerate(names)}


# Sizes.


@tree
def many_small_leaves(mesh: Mesh) -> Any:
    return {
        f"layer_{index:03}": {"w": jnp.full((2, 3), index), "b": np.full((3,), index, np.float32)}
        for index in range(150)
    }


@tree
def large_leaf(mesh: Mesh) -> Any:
    return {"w": values("float32", (1024, 1200)), "small": 1}


@tree
def large_sharded_leaf(mesh: Mesh) -> Any:
    return {"w": on(mesh, P("x", "y"), (1024, 1024)), "r": on(mesh, P(None, "y"), (600, 512))}


@tree
def large_compressible_leaf(mesh: Mesh) -> Any:
    counts = np.random.default_rng(1).integers(0, 50, (1000, 600), np.int32)
    return {"jax": jax.device_put(counts, NamedSharding(mesh, P("x"))), "numpy": counts}


@tree
def large_narrow_floats(mesh: Mesh) -> Any:
    return {"bf16": on(mesh, P("x"), (1024, 512), "bfloat16"), "fp8": jnp.asarray(_eights())}


def _eights() -> np.ndarray[Any, Any]:
    return values("float8_e4m3fn", (512, 512))


@tree
def same_array_twice(mesh: Mesh) -> Any:
    array, host = on(mesh, P("x"), (8, 2)), np.arange(5)
    return {"a": array, "b": array, "c": [host, host]}


# What only we save.


@only_ours
def zero_size(mesh: Mesh) -> Any:
    return {
        "jax": jnp.zeros((0, 3), jnp.bfloat16),
        "sharded": jax.device_put(np.zeros((8, 0), np.int8), NamedSharding(mesh, P("x"))),
        "numpy": np.zeros((3, 0, 2), np.float64),
        "w": on(mesh, P("x"), (4,)),
    }


@only_ours
def narrow_dtypes(mesh: Mesh) -> Any:
    names = ("uint2", "uint4", "float8_e4m3")
    kept = {name: np.arange(4).astype(dtype_named(name)) for name in names}
    return {
        "numpy": kept,
        "jax": {name: jnp.asarray(array) for name, array in kept.items()},
        "sharded": jax.device_put(kept["uint4"], NamedSharding(mesh, P("x"))),
    }


@only_ours
def numpy_scalars(mesh: Mesh) -> Any:
    kinds = (np.float32, np.float16, np.int8, np.int64, np.uint64, np.bool_, np.complex64)
    scalars: dict[str, Any] = {kind.__name__: kind(1) for kind in kinds}
    return scalars | {"bfloat16": ml_dtypes.bfloat16(1.5)}


@only_ours
def complex_and_bytes(mesh: Mesh) -> Any:
    return {"complex": 1.5 - 2j, "bytes": b"\x00\xffdata", "empty": b"", "w": jnp.arange(3)}
