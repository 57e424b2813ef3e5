"""The states that are saved and loaded: how they are made, what they take and what they hold."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import orbax_async as ocp

State = Any
HostArray = np.ndarray[Any, Any]
MIB = 1 << 20


@dataclass(frozen=True)
class Workload:
    """A state to save and load."""

    name: str
    about: str
    make: Callable[[float], State]  # at a scale; 1 is the size of its name
    settings: Mapping[str, Any] = field(default_factory=dict)  # options of ours and Orbax's
    devices: int = 1  # how many host devices it needs

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


def many(count: int, scale: float = 1) -> State:
    """`count` leaves of 1 KiB, a hundred to a layer."""
    layers: dict[str, dict[str, HostArray]] = {}
    for index, row in enumerate(_Draw().normal(max(8, round(count * scale)), 256)):
        layers.setdefault(f"layer_{index // 100}", {})[f"leaf_{index % 100}"] = row
    return _owned(layers)


def large(count: int, nbytes: int, dtype: str, kind: str = "normal", scale: float = 1) -> State:
    """`count` matrices of `nbytes`; `kind` is a method of `_Draw`."""
    draw, itemsize = getattr(_Draw(), kind), jnp.dtype(dtype).itemsize
    rows = max(1, round(math.sqrt(nbytes * scale / itemsize)))
    columns = max(1, round(nbytes * scale / itemsize / rows))
    # One at a time: the host copy of a leaf is gone before the next is drawn.
    return {
        f"kernel_{index}": _owned(draw(rows, columns).astype(dtype, copy=False))
        for index in range(count)
    }


def gpt2(scale: float) -> State:
    """GPT-2 of 124M parameters with Adam's moments, float32."""
    optax, draw = importlib.import_module("optax"), _Draw()
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

    wte, wpe = 0.02 * draw.normal(vocabulary, width), 0.01 * draw.normal(context, width)
    blocks = {f"h_{index}": block() for index in range(layers)}
    ends = {"wte": {"embedding": wte}, "wpe": {"embedding": wpe}, "ln_f": norm()}
    params = _owned(ends | blocks)
    adam, *rest = optax.adam(3e-4).init(params)
    # Moments of a run that has been going for a while, not the zeros that it starts from.
    mu = jax.tree.map(lambda leaf: _owned(1e-3 * draw.normal(*leaf.shape)), params)
    nu = jax.tree.map(lambda leaf: _owned(1e-6 * draw.normal(*leaf.shape) ** 2), params)
    adam = adam._replace(count=jnp.asarray(1000, jnp.int32), mu=mu, nu=nu)
    return {"params": params, "opt_state": (adam, *rest), "step": 1000}


def sharded(scale: float) -> State:
    """Matrices over a mesh of 4 x 2 devices: by both axes, by one, and replicated vectors."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    draw, side = _Draw(), max(8, round(4096 * math.sqrt(scale)) // 8 * 8)

    def over(array: HostArray, *axes: str) -> State:
        spec = jax.sharding.PartitionSpec(*axes)
        return _owned(array, jax.sharding.NamedSharding(mesh, spec))

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
    return Workload(name, "a state of your own", lambda _: function(), devices=devices)


def by_checkpoint(path: str, devices: int = 1) -> Workload:
    """Returns the workload that saves again what a checkpoint holds."""
    return Workload(
        Path(path).name, f"what {path} holds", lambda _: ocp.load(path), devices=devices
    )


def _large(name: str, dtype: str, kind: str, **more: Any) -> Workload:
    about = f"16 x 64 MiB of {dtype}, {kind}{', compression off' if more else ''}"
    return Workload(f"large-{name}", about, partial(large, 16, 64 * MIB, dtype, kind), **more)


_ALL = [
    Workload("leaves-2000", "2,000 leaves of 1 KiB", partial(many, 2_000)),
    Workload("leaves-10000", "10,000 leaves of 1 KiB", partial(many, 10_000)),
    Workload("leaves-100000", "100,000 leaves of 1 KiB", partial(many, 100_000)),
    Workload("gpt2", "GPT-2 124M with Adam, float32, 1.5 GB", gpt2),
    _large("f32", "float32", "normal"),
    _large("f32-weights", "float32", "weights"),
    _large("bf16", "bfloat16", "normal"),
    _large("bf16-weights", "bfloat16", "weights"),
    _large("f32-plain", "float32", "normal", settings={"array.saving.use_compression": False}),
    Workload("one-leaf", "one leaf of 4 GiB", partial(large, 1, 4096 * MIB, "float32", "normal")),
    Workload("sharded", "512 MiB of float32 over 8 host devices", sharded, devices=8),
]
WORKLOADS = {workload.name: workload for workload in _ALL}


def abstract_of(state: State) -> State:
    """Returns what a load is asked for: shapes, dtypes and shardings, no values."""

    def abstract(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        return np.empty_like(leaf) if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(abstract, state)


def host_pieces(tree: State) -> Iterator[HostArray]:
    """Yields every stored byte once, flat: arrays, and of sharded ones each distinct shard."""
    for piece in _stored(tree):
        if isinstance(piece, jax.Array) and next(iter(piece.devices())).platform != "cpu":
            piece = jnp.copy(piece)  # jax keeps a host copy of what is asked for one
        yield np.ascontiguousarray(np.asarray(piece)).reshape(-1).view(np.uint8)


def stored_nbytes(tree: State) -> int:
    """Returns the bytes that a save has to keep: each element once."""
    return sum(x.nbytes if hasattr(x, "nbytes") else np.asarray(x).nbytes for x in _stored(tree))


def _stored(tree: State) -> Iterator[Any]:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            yield from (shard.data for shard in leaf.addressable_shards if shard.replica_id == 0)
        else:
            yield leaf


def resident_nbytes(tree: State) -> int:
    """Returns the bytes that the tree takes in memory: each buffer once, replicas may share one."""
    sizes: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                sizes[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        else:
            sizes[id(leaf)] = np.asarray(leaf).nbytes
    return sum(sizes.values())


def same_values(loaded: State, wanted: State) -> bool:
    """Says whether two trees have the same containers, leaves and bits."""

    def kinds(tree: State) -> list[Any]:
        return [
            (isinstance(leaf, jax.Array), getattr(leaf, "dtype", type(leaf)), np.shape(leaf))
            for leaf in jax.tree.leaves(tree)
        ]

    if jax.tree.structure(loaded) != jax.tree.structure(wanted):  # type: ignore[operator]
        return False
    return kinds(loaded) == kinds(wanted) and same_bytes(loaded, wanted)


def same_bytes(loaded: State, wanted: State) -> bool:
    """Says whether the bytes of two trees are the same, one leaf after the other."""

    def digest(tree: State) -> bytes:
        whole = hashlib.sha256()
        for piece in host_pieces(tree):
            whole.update(piece.data)
        return whole.digest()

    return digest(loaded) == digest(wanted)
