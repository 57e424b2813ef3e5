"""What people train with, through every way to save and load: it comes back, and it goes on.

Each object is taken one step further after it was loaded, which has to give the very bits that the
original gives.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_same
from flax import nnx
from flax.training.train_state import TrainState
from google.protobuf import struct_pb2
from guide import LIBRARIES

import orbax_async as ocp

PAIRS = pytest.mark.parametrize(
    ("writer", "reader"), [("ours", "ours"), ("ours", "orbax"), ("orbax", "ours")]
)
X = jnp.asarray(np.random.default_rng(1).normal(size=(16, 4)), jnp.float32)
Y = X.sum(axis=1, keepdims=True)


def error(predicted: Any) -> Any:
    """Returns what training makes smaller."""
    return jnp.mean((predicted - Y) ** 2)


# A chain with empty, masked, injected, scheduled and collected states.
CHAIN = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(
        optax.add_decayed_weights(1e-3), lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    ),
    optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1e-2, 0.0, 9)),
    optax.ema(0.9),
)
EVERY_OTHER = optax.MultiSteps(CHAIN, 2)


class Kind(abc.ABC):
    """A kind of object: how it is made, trained, taken apart and put together."""

    @abc.abstractmethod
    def make(self, seed: int) -> Any:
        """Returns a new one."""

    @abc.abstractmethod
    def learn(self, made: Any) -> Any:
        """Returns it one step later."""

    def take_apart(self, made: Any) -> Any:
        """Returns what is saved."""
        return made

    def put_together(self, made: Any, loaded: Any) -> Any:
        """Returns another one with the saved state in it."""
        del made
        return loaded


DENSE = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(1)])


class Linen(Kind):
    """A TrainState of flax linen."""

    def make(self, seed: int) -> TrainState:
        params = DENSE.init(jax.random.key(seed), X)["params"]
        state = TrainState.create(apply_fn=DENSE.apply, params=params, tx=CHAIN)
        return state.replace(step=jnp.asarray(state.step))

    @functools.partial(jax.jit, static_argnums=0)
    def learn(self, made: TrainState) -> TrainState:
        def loss(params: Any) -> Any:
            return error(made.apply_fn({"params": params}, X))

        return made.apply_gradients(grads=jax.grad(loss)(made.params))


class _Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 1, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.layers[1](self.dropout(nnx.relu(self.norm(self.layers[0](x)))))


@nnx.jit
def _learn_nnx(net: _Net, optimizer: nnx.Optimizer[_Net]) -> None:
    optimizer.update(net, nnx.grad(lambda net: error(net(X)))(net))


class Nnx(Kind):
    """A module of flax nnx with its optimizer, batch statistics and random state."""

    def make(self, seed: int) -> Any:
        net = _Net(nnx.Rngs(seed))
        return net, nnx.Optimizer(net, CHAIN, wrt=nnx.Param)

    def learn(self, made: Any) -> Any:
        _learn_nnx(*made)
        return made

    def take_apart(self, made: Any) -> Any:
        net, optimizer = made
        return {"net": nnx.state(net), "optimizer": nnx.state(optimizer)}

    def put_together(self, made: Any, loaded: Any) -> Any:
        nnx.update(made[0], loaded["net"])
        nnx.update(made[1], loaded["optimizer"])
        return made


class Optax(Kind):
    """A chain of optax over plain parameters."""

    def make(self, seed: int) -> Any:
        params = {"w": jax.random.normal(jax.random.key(seed), (4, 1)), "b": jnp.zeros(1)}
        return {"params": params, "moments": EVERY_OTHER.init(params)}

    @functools.partial(jax.jit, static_argnums=0)
    def learn(self, made: Any) -> Any:
        params = made["params"]
        gradients = jax.grad(lambda tree: error(X @ tree["w"] + tree["b"]))(params)
        updates, moments = EVERY_OTHER.update(gradients, made["moments"], params)
        return {"params": optax.apply_updates(params, updates), "moments": moments}


class Equinox(Kind):
    """A module of equinox, whose functions and settings stay in the program."""

    def make(self, seed: int) -> Any:
        model = eqx.nn.MLP(4, 1, width_size=6, depth=1, key=jax.random.key(seed))
        return model, CHAIN.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def learn(self, made: Any) -> Any:
        model, moments = made
        gradients = eqx.filter_grad(lambda model: error(jax.vmap(model)(X)))(model)
        params = eqx.filter(model, eqx.is_array)
        updates, moments = CHAIN.update(gradients, moments, params)
        return eqx.apply_updates(model, updates), moments

    def take_apart(self, made: Any) -> Any:
        return {"model": eqx.filter(made[0], eqx.is_array), "moments": made[1]}

    def put_together(self, made: Any, loaded: Any) -> Any:
        static = eqx.filter(made[0], eqx.is_array, inverse=True)
        return eqx.combine(loaded["model"], static), loaded["moments"]


KINDS: dict[str, Kind] = {
    "linen": Linen(),
    "nnx": Nnx(),
    "optax": Optax(),
    "equinox": Equinox(),
}


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@functools.cache
def original(name: str) -> tuple[Any, Any]:
    """Returns what is saved of an object two steps in, and what it is one step later."""
    kind = KINDS[name]
    made = kind.learn(kind.learn(kind.make(0)))
    tree = _copied(kind.take_apart(made))
    return tree, _copied(kind.take_apart(kind.learn(made)))


# Ways to save and load a tree: each takes a library, a path and a tree.


def _save(library: ModuleType, path: Path, tree: Any) -> None:
    library.save(path, tree)


def _load(library: ModuleType, path: Path, abstract: Any) -> Any:
    return library.load(path, abstract)


def _save_among_others(library: ModuleType, path: Path, tree: Any) -> None:
    library.save_checkpointables(path, {"model": tree, "other": {"n": 1}})


def _load_among_others(library: ModuleType, path: Path, abstract: Any) -> Any:
    return library.load_checkpointables(path, {"model": abstract})["model"]


def _save_step(library: ModuleType, path: Path, tree: Any) -> None:
    with library.training.Checkpointer(path) as checkpointer:
        assert checkpointer.save(4, tree)


def _load_step(library: ModuleType, path: Path, abstract: Any) -> Any:
    with library.training.Checkpointer(path) as checkpointer:
        return checkpointer.load(4, abstract)


def _save_step_among_others(library: ModuleType, path: Path, tree: Any) -> None:
    with library.training.Checkpointer(path) as checkpointer:
        response = checkpointer.save_checkpointables_async(4, {"model": tree, "other": {"n": 1}})
        assert response.result() is True


def _load_step_among_others(library: ModuleType, path: Path, abstract: Any) -> Any:
    with library.training.Checkpointer(path) as checkpointer:
        return checkpointer.load_checkpointables(None, {"model": abstract})["model"]


ROUTES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "alone": (_save, _load),
    "among others": (_save_among_others, _load_among_others),
    "a step": (_save_step, _load_step),
    "a step among others": (_save_step_among_others, _load_step_among_others),
}


@PAIRS
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", KINDS)
def test_it_goes_on(name: str, route: str, writer: str, reader: str, tmp_path: Path) -> None:
    """Loaded into one that was made with other values, it has all of the first, and goes on."""
    kind, (save, load) = KINDS[name], ROUTES[route]
    tree, following = original(name)
    save(LIBRARIES[writer], tmp_path / "c", tree)
    other = kind.make(1)
    abstract = jax.tree.map(ocp.arrays.to_shape_dtype_struct, kind.take_apart(other))
    loaded = load(LIBRARIES[reader], tmp_path / "c", abstract)
    assert jax.tree.structure(loaded) == jax.tree.structure(kind.take_apart(other))
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(tree))
    later = kind.take_apart(kind.learn(kind.put_together(other, loaded)))
    assert_same(jax.tree.leaves(later), jax.tree.leaves(following))


@pytest.mark.parametrize("writer", LIBRARIES)
def test_a_module_of_nnx_itself(writer: str, tmp_path: Path) -> None:
    """A module is a tree; what either library saves of it, ours loads.

    Orbax does not load a list of modules, neither its own nor ours, and fails with an assertion.
    """
    net = _Net(nnx.Rngs(0))
    LIBRARIES[writer].save(tmp_path / "c", net)
    loaded = ocp.load(tmp_path / "c", _Net(nnx.Rngs(1)))
    assert type(loaded) is _Net
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(net))
    loaded.eval()
    net.eval()
    assert_same(loaded(X), net(X))


# Objects that are not trees.


def batches() -> Any:
    """Returns an iterator over shuffled batches of Grain."""
    dataset = grain.MapDataset.range(60).shuffle(seed=5).repeat(2).map(lambda n: n + 0.5).batch(4)
    return iter(dataset.to_iter_dataset())


def message() -> struct_pb2.Struct:
    """Returns a protobuf message."""
    made = struct_pb2.Struct()
    made.update({"width": 6, "tags": ["a", "é"], "nested": {"on": False, "nothing": None}})
    return made


@PAIRS
@pytest.mark.parametrize("route", ["a checkpoint", "a step"])
def test_all_in_one(route: str, writer: str, reader: str, tmp_path: Path) -> None:
    """Models of all kinds, an iterator and a message beside each other, in one checkpoint."""
    data = batches()
    for _ in range(7):
        next(data)
    trees = {name: original(name)[0] for name in KINDS}
    objects = {**trees, "data": data, "message": message()}
    saving, loading, fresh = LIBRARIES[writer], LIBRARIES[reader], batches()
    forms = {
        name: jax.tree.map(ocp.arrays.to_shape_dtype_struct, tree) for name, tree in trees.items()
    }
    wanted = {**forms, "data": fresh, "message": struct_pb2.Struct}
    if route == "a checkpoint":
        saving.save_checkpointables(tmp_path / "c", objects)
        loaded = loading.load_checkpointables(tmp_path / "c", wanted)
        described = loading.checkpointables_metadata(tmp_path / "c").metadata
    else:
        with saving.training.Checkpointer(tmp_path / "c") as checkpointer:
            assert checkpointer.save_checkpointables(0, objects)
        with loading.training.Checkpointer(tmp_path / "c") as checkpointer:
            loaded = checkpointer.load_checkpointables(0, wanted)
            described = checkpointer.checkpointables_metadata(0).metadata
    assert loaded.keys() == objects.keys()
    for name, tree in trees.items():
        assert_same(jax.tree.leaves(loaded[name]), jax.tree.leaves(tree))
    assert loaded["data"] is fresh
    assert next(fresh).tolist() == next(data).tolist()
    assert loaded["message"] == message()
    assert {name for name, form in described.items() if form is None} == {"data", "message"}


async def test_all_in_one_awaited(tmp_path: Path) -> None:
    """The same objects by ours, saved and loaded from a coroutine while the data runs on."""
    trees = {name: original(name)[0] for name in KINDS}
    data, fresh = batches(), batches()
    next(data)
    async with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        objects = {**trees, "data": data, "message": message()}
        response = checkpointer.save_checkpointables_async(0, objects)
        assert response is not None
        following = next(data).tolist()
        assert await response is True
        forms = jax.tree.map(jnp.zeros_like, trees)
        wanted = {**forms, "data": fresh, "message": struct_pb2.Struct}
        loaded = await checkpointer.load_checkpointables_async(0, wanted)
    for name, tree in trees.items():
        assert_same(loaded[name], tree)
    assert next(fresh).tolist() == following
    assert loaded["message"] == message()
