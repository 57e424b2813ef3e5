"""Trees of the interop proof that optax, flax and equinox make."""

# ruff: noqa: D103 - the name of a tree says what it is

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import on, tree, values


def _params(mesh: Mesh) -> Any:
    return {
        "dense": {"kernel": on(mesh, P("x", "y"), (8, 4)), "bias": on(mesh, P(), (4,))},
        "scale": jnp.asarray(values("float32", (4,))),
    }


def _after_one_step(optimizer: optax.GradientTransformation, params: Any) -> Any:
    gradients = jax.tree.map(lambda x: x * 0.5 + 1, params)
    return optimizer.update(gradients, optimizer.init(params), params)[1]


@tree
def optax_adam(mesh: Mesh) -> Any:
    params = _params(mesh)
    return {"params": params, "opt": _after_one_step(optax.adam(1e-3), params)}


@tree
def optax_sgd_momentum(mesh: Mesh) -> Any:
    return _after_one_step(optax.sgd(0.1, momentum=0.9, nesterov=True), _params(mesh))


@tree
def optax_chain_with_masked(mesh: Mesh) -> Any:
    params = _params(mesh)
    mask = {"dense": {"kernel": True, "bias": False}, "scale": False}
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), mask),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 10)),
    )
    return _after_one_step(chain, params)


@tree
def optax_multi_steps(mesh: Mesh) -> Any:
    return _after_one_step(optax.MultiSteps(optax.adafactor(1e-3), 4), _params(mesh))


@tree
def flax_train_state(mesh: Mesh) -> Any:
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 5)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))


@tree
def flax_frozen_dict(mesh: Mesh) -> Any:
    return {"variables": freeze({"params": _params(mesh), "stats": {"mean": np.arange(3.0)}})}


@struct.dataclass
class Run:
    params: Any
    step: int
    name: str = struct.field(pytree_node=False, default="run")


@tree
def flax_struct(mesh: Mesh) -> Any:
    return Run(params=_params(mesh), step=11)


class _Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@tree
def nnx_state(mesh: Mesh) -> Any:
    kernel = nnx.Param(on(mesh, P("x", "y"), (8, 4)))
    return nnx.State({"kernel": kernel, "count": nnx.Variable(jnp.asarray(3))})


@tree
def nnx_model_state(mesh: Mesh) -> Any:
    return nnx.state(_Net(nnx.Rngs(0)))


@tree
def nnx_optimizer_state(mesh: Mesh) -> Any:
    optimizer = nnx.Optimizer(_Net(nnx.Rngs(1)), optax.adam(1e-3), wrt=nnx.Param)
    return nnx.state(optimizer)


@tree
def nnx_pure_dict(mesh: Mesh) -> Any:
    return nnx.to_pure_dict(nnx.state(_Net(nnx.Rngs(2))))


@tree
def equinox_mlp(mesh: Mesh) -> Any:
    model = eqx.nn.MLP(3, 2, width_size=8, depth=2, key=jax.random.key(0))
    return eqx.filter(model, eqx.is_array)


@tree
def equinox_sharded_layers(mesh: Mesh) -> Any:
    model = eqx.nn.Linear(8, 8, key=jax.random.key(1))
    model = jax.device_put(eqx.filter(model, eqx.is_array), NamedSharding(mesh, P("x")))
    return {"model": model, "opt": optax.adam(1e-3).init(model)}


@tree
def whole_train_state(mesh: Mesh) -> Any:
    params = _params(mesh)
    return {
        "params": params,
        "opt_state": _after_one_step(optax.adamw(1e-3), params),
        "step": 1200,
        "rng": jax.random.key(5),
        "epoch": np.full((), 3),
        "config": {"name": "run-7", "learning_rate": 3e-4, "layers": [64, 64], "bias": None},
    }
