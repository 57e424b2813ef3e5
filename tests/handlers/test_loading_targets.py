"""What a checkpoint is loaded as and where to: shardings, leaves and containers asked for."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import saved_states
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from saved_states import Pair, Sds

import orbax_async as ocp
from orbax_async import errors

saved = saved_states.saved


# Shardings for all.


def test_one_sharding_for_all_jax_arrays(tmp_path: Path, mesh8: Mesh) -> None:
    """It holds for jax arrays of which nothing else is said; the rest stays on the host."""
    single = SingleDeviceSharding(jax.devices()[3])
    ocp.save(
        tmp_path / "c", {"j": jnp.arange(8.0), "k": jnp.arange(4.0), "n": np.arange(3), "s": 1}
    )
    replicated = NamedSharding(mesh8, P())
    loaded = ocp.load(tmp_path / "c", sharding=replicated)
    assert loaded["j"].sharding == loaded["k"].sharding == replicated
    assert type(loaded["n"]) is np.ndarray and type(loaded["s"]) is int
    abstract = {
        "j": Sds((8,), np.float32, sharding=single),
        "k": Sds((4,), np.float32),
        "n": Sds((3,), np.int32),
        "s": 0,
    }
    loaded = ocp.load(tmp_path / "c", abstract, sharding=replicated)
    assert loaded["j"].sharding == single
    assert loaded["k"].sharding == loaded["n"].sharding == replicated
    # What `metadata` says of the saved sharding gives way, too.
    loaded = ocp.load(tmp_path / "c", ocp.metadata(tmp_path / "c"), sharding=replicated)
    assert loaded["j"].sharding == replicated


def test_a_function_chooses_shardings(tmp_path: Path, mesh8: Mesh) -> None:
    """It gets key path, shape and dtype of each jax array as it will be; None: where it was."""
    saved_on = SingleDeviceSharding(jax.devices()[5])
    value = {
        "w": jax.device_put(jnp.ones((8, 2)), saved_on),
        "l": [jax.device_put(jnp.ones(3, jnp.int32), saved_on)],
        "n": np.ones(3),
    }
    ocp.save(tmp_path / "c", value)
    asked = []

    def choose(path: Any, shape: Any, dtype: Any) -> Any:
        asked.append((jax.tree_util.keystr(path), shape, dtype))
        return NamedSharding(mesh8, P("x")) if shape[0] % 4 == 0 else None

    loaded = ocp.load(tmp_path / "c", sharding=choose)
    assert loaded["w"].sharding == NamedSharding(mesh8, P("x"))
    assert loaded["l"][0].sharding == saved_on
    assert sorted(asked) == [
        ("['l'][0]", (3,), np.dtype(np.int32)),
        ("['w']", (8, 2), np.dtype(np.float32)),
    ]
    asked.clear()
    ocp.load(tmp_path / "c", {"w": Sds((8, 2), np.float16), "l": [...], "n": ...}, sharding=choose)
    assert asked == [("['w']", (8, 2), np.dtype(np.float16))]


def test_what_a_sharding_function_does_wrong_names_the_leaf(saved: Path, mesh8: Mesh) -> None:
    """What it raises passes as it is, with a note; what it returns must be a sharding."""

    def fails(path: Any, shape: Any, dtype: Any) -> Any:
        raise RuntimeError("no idea")

    with pytest.raises(RuntimeError, match="no idea") as caught:
        ocp.load(saved, sharding=fails)
    assert any("['params']['dense']" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match=r"returned 'x' for leaf \['params'\]"):
        ocp.load(saved, sharding=lambda *_: "x")
    with pytest.raises(TypeError, match="sharding must be"):
        ocp.load_async(saved, sharding="x")
    with pytest.raises(errors.ShardingMismatchError, match="does not fit") as refused:
        ocp.load(saved, sharding=NamedSharding(mesh8, P(None, None, "x")))
    assert len(refused.value.others) == 3


def test_an_abstract_mesh_becomes_the_one_that_is_set(saved: Path, mesh8: Mesh) -> None:
    """B3.35: a sharding for all may be over an abstract mesh while a mesh is set."""
    abstract = NamedSharding(mesh8.abstract_mesh, P())
    with jax.set_mesh(mesh8):
        loaded = ocp.load(saved, sharding=abstract, select="params")
    assert loaded["params"]["out"]["bias"].sharding.mesh == mesh8
    with pytest.raises(errors.AbstractLeafError, match="set_mesh"):
        ocp.load(saved, sharding=abstract)


# One report.


def test_all_mismatches_are_in_one_report(saved: Path, mesh8: Mesh) -> None:
    """W29: missing and extra keys, shapes, dtypes, scalars, strings and shardings, at once."""
    abstract = {
        "params": {
            "dense": {"kernel": Sds((4, 3), np.float32), "bias": str},
            "out": {
                "kernel": Sds((4, 2), np.float32, sharding=NamedSharding(mesh8, P(None, "x"))),
                "bias": 0,
            },
        },
        "opt": [np.ndarray, np.ndarray, jax.random.key(0)],
        "stop": 0,
        "name": 5,
        "empty": 0,
    }
    with pytest.raises(errors.TreeMismatchError) as caught:
        ocp.load(saved, abstract)
    lines = caught.value.mismatches
    assert [line.split(": ")[0] for line in lines] == [
        "['empty']",
        "['stop']",
        "['step']",
        "['name']",
        "['opt'][2]",
        "['params']['dense']['bias']",
        "['params']['dense']['kernel']",
        "['params']['out']['bias']",
        "['params']['out']['kernel']",
    ]
    assert all(line in str(caught.value) for line in lines)


def test_scalars_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    """B3.13: what can't become a scalar is in the report, though its data could be read."""
    ocp.save(tmp_path / "c", {"a": np.ones(3), "c": 1j, "f": 1.5, "k": jax.random.key(0)})
    response = ocp.load_async(
        tmp_path / "c",
        {"a": int, "c": float, "f": bytes, "k": Sds((), jax.random.key(0, impl="rbg").dtype)},
    )
    with pytest.raises(errors.LeafError) as caught:
        response.result()
    found = {caught.value.keypath, *(error.keypath for error in caught.value.others)}
    assert found == {"['a']", "['c']", "['f']", "['k']"}
    assert not [span for span in response.timeline if span.name == "read"]


# Leaves of every kind.

NUMBERS = [True, 5, 2.5]
CASTS: list[tuple[Any, Any, Any]] = [
    # saved, abstract, loaded
    (5, float, 5.0),
    (2.5, int, 2),
    (5, bool, True),
    (5, 0.0, 5.0),
    (True, int, 1),
    (5, complex, 5 + 0j),
    (5, np.float32, np.asarray(5, np.float32)),
    (5, np.int8(0), np.asarray(5, np.int8)),
    (5, np.zeros(()), np.asarray(5.0)),
    (5, np.ndarray, np.asarray(5)),
    (np.arange(3), np.zeros(3, np.float16), np.arange(3, dtype=np.float16)),
    (np.arange(3), np.array([], np.int8), np.arange(3, dtype=np.int8)),
    (np.arange(3.0), Sds((3,), np.int32), jnp.arange(3, dtype=np.int32)),
    (np.array([0.0, 2.0]), Sds((2,), bool), jnp.array([False, True])),
    (np.array([1.5]), Sds((1,), np.complex64), jnp.array([1.5 + 0j])),
    (np.array([1.5]), Sds((1,), ml_dtypes.bfloat16), jnp.array([1.5], jnp.bfloat16)),
    (5, Sds((), np.float32), jnp.asarray(5.0)),
    ("text", str, "text"),
    ("text", "", "text"),
    ("text", ..., ...),
    (5, None, None),
    (b"raw", bytes, b"raw"),
]


@pytest.mark.parametrize(
    ("value", "abstract", "expected"), CASTS, ids=[f"{a!r:.30}-{b!r:.40}" for a, b, _ in CASTS]
)
def test_a_leaf_becomes_what_is_asked_for(
    tmp_path: Path, value: Any, abstract: Any, expected: Any
) -> None:
    """B3.4 to B3.18: the kind, the dtype and the value of each."""
    ocp.save(tmp_path / "c", {"x": value, "y": 0})
    loaded = ocp.load(tmp_path / "c", {"x": abstract, "y": 0})["x"]
    assert isinstance(loaded, jax.Array) == isinstance(expected, jax.Array)
    if isinstance(expected, (np.ndarray, jax.Array)):
        assert loaded.dtype == expected.dtype
        assert loaded.shape == expected.shape
        assert np.array_equal(loaded, expected)
    else:
        assert type(loaded) is type(expected)
        assert loaded == expected


class Protocol:
    """An abstract leaf of a user's own making."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> None:
        self.shape, self.dtype, self.sharding = shape, np.dtype(dtype), sharding


@pytest.mark.parametrize("sharded", [True, False])
def test_anything_like_an_abstract_array_is_one(tmp_path: Path, mesh8: Mesh, sharded: bool) -> None:
    """B3.34: shape and dtype make an abstract array, a sharding places it."""
    ocp.save(tmp_path / "c", {"x": jnp.arange(8.0)})
    where = NamedSharding(mesh8, P("x")) if sharded else None
    loaded = ocp.load(tmp_path / "c", {"x": Protocol((8,), np.float16, where)})["x"]
    assert loaded.dtype == np.float16
    assert loaded.sharding == (where or SingleDeviceSharding(jax.devices()[0]))


# Containers.


@dataclasses.dataclass
class Model:
    w: Any
    inner: Any
    name: str = dataclasses.field(default="m", metadata={"static": True})


jax.tree_util.register_dataclass(Model, ["w", "inner"], ["name"])


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.first(x))


def nnx_net(seed: int) -> Any:
    """A module."""
    net = Net(nnx.Rngs(seed))
    net.eval()
    return net


DENSE = nn.Dense(3)


def train_state(seed: int) -> Any:
    """A train state as linen's examples make it."""
    params = DENSE.init(jax.random.key(seed), jnp.ones((1, 5)))["params"]
    return TrainState.create(apply_fn=DENSE.apply, params=params, tx=OPTIMIZER)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
TREES: dict[str, Callable[[int], Any]] = {
    "nnx module": nnx_net,
    "nnx state": lambda seed: nnx.state(nnx_net(seed)),
    "nnx optimizer": lambda seed: nnx.state(nnx.Optimizer(nnx_net(seed), OPTIMIZER, wrt=nnx.Param)),
    "linen TrainState": train_state,
    "optax": lambda seed: OPTIMIZER.init({"w": jnp.full((3,), seed, jnp.float32)}),
    "optax masked": lambda seed: optax.masked(OPTIMIZER, {"w": True, "b": False}).init(
        {"w": jnp.full((3,), seed, jnp.float32), "b": jnp.ones(2)}
    ),
    "equinox": lambda seed: eqx.filter(
        eqx.nn.MLP(2, 2, width_size=4, depth=1, key=jax.random.key(seed)), eqx.is_array
    ),
    "dataclass": lambda seed: Model(jnp.full(3, seed), Pair(seed, [np.full(2, seed)])),
    "OrderedDict": lambda seed: OrderedDict(b=jnp.full(2, seed), a=(seed, {"x": 2.5})),
    "int keys": lambda seed: {0: jnp.full(2, seed), 10: {2: 1}},
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("form", ["shapes", "values"])
def test_containers_come_back(tmp_path: Path, name: str, form: str) -> None:
    """B2.20: nnx, linen, optax, equinox and plain containers come back as they are."""
    make = TREES[name]
    value, other = make(1), make(2)
    ocp.save(tmp_path / "c", value)
    abstract: Any = other
    if form == "shapes":
        abstract = jax.tree.map(
            lambda x: Sds(x.shape, x.dtype) if isinstance(x, jax.Array) else type(x), other
        )
    loaded = ocp.load(tmp_path / "c", abstract)
    assert jax.tree.structure(loaded) == jax.tree.structure(value)
    assert type(loaded) is type(value)
    for mine, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(value), strict=True):
        assert np.array_equal(_plain(mine), _plain(theirs))


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    return np.asarray(leaf)


def test_a_module_computes_the_same_after_a_load(tmp_path: Path) -> None:
    """An nnx module, loaded into one that was never initialized, gives the same outputs."""
    net = nnx_net(0)
    ocp.save(tmp_path / "c", nnx.state(net))
    graph, abstract = nnx.split(nnx.eval_shape(lambda: nnx_net(0)))
    again = nnx.merge(graph, ocp.load(tmp_path / "c", abstract))
    x = jnp.ones((2, 3))
    assert np.array_equal(again(x), net(x))
