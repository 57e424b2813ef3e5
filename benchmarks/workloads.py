"""The states that are saved and loaded, each made at a scale: 1 is the size of its name."""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import orbax_async as ocp

State = Any
HostArray = np.ndarray[Any, Any]
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A state to save and load.

    Attributes:
      name: what it is called on the command line and in the results.
      about: what it stands for.
      make: builds the state at a scale.
      settings: options by dot path, for the libraries that have Orbax's options.
      devices: how many host devices it needs.
    """

    name: str
    about: str
    make: Callable[[float], State]
    settings: Mapping[str, Any] = field(default_factory=dict)
    devices: int = 1

    def build(self, scale: float = 1) -> State:
        """Returns the state, on the devices that it needs; to be called before jax is used."""
        flag = f"--xla_force_host_platform_device_count={self.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        # So that a step runs on the thread that calls it, which `pace` holds to one core.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        return self.make(scale)


class _Draw:
    """Seeded values of float32."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def normal(self, *shape: int) -> HostArray:
        """Independent values: nothing to gain by compression but the exponents."""
        return self._rng.standard_normal(shape, np.float32)

    def weights(self, *shape: int) -> HostArray:
        """What a layer looks like: scaled for its inputs, each channel with a scale of its own."""
        values = self.normal(*shape)
        values *= np.float32(1 / math.sqrt(shape[0]))
        values *= np.exp(0.5 * self.normal(shape[-1]))
        return values


def _owned(tree: State, sharding: jax.sharding.Sharding | None = None) -> State:
    """Returns NumPy leaves as jax arrays with buffers of their own, like computed ones."""
    return jax.block_until_ready(jax.device_put(tree, sharding, may_alias=False))


def many(count: int, scale: float) -> State:
    """`count` leaves of 1 KiB, a hundred to a layer."""
    rows = _Draw().normal(max(8, round(count * scale)), 256)
    layers: dict[str, dict[str, HostArray]] = {}
    for index, row in enumerate(rows):
        layers.setdefault(f"layer_{index // 100}", {})[f"leaf_{index % 100}"] = row
    return _owned(layers)


def large(count: int, nbytes: int, dtype: Any, kind: str, scale: float) -> State:
    """`count` matrices of `nbytes`; `kind` is a method of `_Draw`."""
    draw = getattr(_Draw(), kind)
    itemsize = np.dtype(dtype).itemsize
    rows = max(1, round(math.sqrt(nbytes * scale / itemsize)))
    columns = max(1, round(nbytes * scale / itemsize / rows))
    # One at a time: the host copy of a leaf is gone before the next is drawn.
    return {
        f"kernel_{index}": _owned(draw(rows, columns).astype(dtype, copy=False))
        for index in range(count)
    }


def gpt2(scale: float) -> State:
    """GPT-2 of 124M parameters with Adam's moments, float32."""
    optax = importlib.import_module("optax")

    draw = _Draw()
    layers, width = max(1, round(12 * scale)), max(8, round(768 * scale) // 8 * 8)
    vocabulary, context = max(16, round(50257 * scale)), max(8, round(1024 * scale))

    def dense(inputs: int, outputs: int) -> dict[str, HostArray]:
        return {"kernel": draw.weights(inputs, outputs), "bias": 0.02 * draw.normal(outputs)}

    def norm() -> dict[str, HostArray]:
        return {"scale": 1 + 0.1 * draw.normal(width), "bias": 0.02 * draw.normal(width)}

    def block() -> dict[str, Any]:
        attention = {"c_attn": dense(width, 3 * width), "c_proj": dense(width, width)}
        mlp = {"c_fc": dense(width, 4 * width), "c_proj": dense(4 * width, width)}
        return {"ln_1": norm(), "attn": attention, "ln_2": norm(), "mlp": mlp}

    params = _owned(
        {
            "wte": {"embedding": 0.02 * draw.normal(vocabulary, width)},
            "wpe": {"embedding": 0.01 * draw.normal(context, width)},
            **{f"h_{index}": block() for index in range(layers)},
            "ln_f": norm(),
        }
    )
    adam, *rest = optax.adam(3e-4).init(params)
    # Moments of a run that has been going for a while, not the zeros that it starts from.
    mu = jax.tree.map(lambda leaf: _owned(1e-3 * draw.normal(*leaf.shape)), params)
    nu = jax.tree.map(lambda leaf: _owned(1e-6 * draw.normal(*leaf.shape) ** 2), params)
    adam = adam._replace(count=jnp.asarray(1000, jnp.int32), mu=mu, nu=nu)
    return {"params": params, "opt_state": (adam, *rest), "step": 1000}


def sharded(scale: float) -> State:
    """Matrices over a mesh of 4 x 2 devices: by both axes, by one, and replicated vectors.

    Raises:
      RuntimeError: there are fewer than 8 devices.
    """
    if len(jax.devices()) < 8:
        raise RuntimeError("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    draw, side = _Draw(), max(8, round(4096 * math.sqrt(scale)) // 8 * 8)

    def over(array: HostArray, *axes: str) -> jax.Array:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        placed: jax.Array = _owned(array, sharding)
        return placed

    kernels = {f"both_{i}": over(draw.weights(side, side), "x", "y") for i in range(6)}
    rows = {f"rows_{i}": over(draw.weights(side, side), "x") for i in range(2)}
    vectors = {f"vector_{i}": over(draw.normal(side)) for i in range(32)}
    return {**kernels, **rows, **vectors}


def by_function(name: str, devices: int = 1) -> Workload:
    """Returns the workload that a user's `module:function` makes; it is called without arguments.

    Raises:
      ValueError: the name has no colon, or nothing callable is there.
    """
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute, None) if attribute else None
    if not callable(function):
        raise ValueError(f"{name!r} is no module:function that returns a state")
    return Workload(
        name=name, about="a state of your own", make=lambda _: function(), devices=devices
    )


def by_checkpoint(path: str, devices: int = 1) -> Workload:
    """Returns the workload that saves again what a checkpoint holds."""
    return Workload(
        name=Path(path).name,
        about=f"what {path} holds",
        make=lambda _: ocp.load(path),
        devices=devices,
    )


def _built_in() -> Iterator[Workload]:
    f32, bf16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)
    for count in (2_000, 10_000, 100_000):
        yield Workload(
            name=f"leaves-{count}",
            about=f"{count:,} leaves of 1 KiB",
            make=functools.partial(many, count),
        )
    yield Workload(name="gpt2", about="GPT-2 124M with Adam, float32, 1.5 GB", make=gpt2)
    for dtype, short in ((f32, "f32"), (bf16, "bf16")):
        for kind, suffix in (("normal", ""), ("weights", "-weights")):
            yield Workload(
                name=f"large-{short}{suffix}",
                about=f"16 x 64 MiB of {dtype.name}, {kind}",
                make=functools.partial(large, 16, 64 * MIB, dtype, kind),
            )
    yield Workload(
        name="large-f32-plain",
        about="16 x 64 MiB of float32, normal, compression off",
        make=functools.partial(large, 16, 64 * MIB, f32, "normal"),
        settings={"array.saving.use_compression": False},
    )
    yield Workload(
        name="one-leaf",
        about="one leaf of 4 GiB",
        make=functools.partial(large, 1, 4096 * MIB, f32, "normal"),
    )
    yield Workload(
        name="sharded", about="512 MiB of float32 over 8 host devices", make=sharded, devices=8
    )


WORKLOADS = {workload.name: workload for workload in _built_in()}
