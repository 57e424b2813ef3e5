"""What is trained: a flax nnx network that reads handwritten digits, with optax's Adam.

The training is a pure function of the step: the batch of step n depends on n alone, so that a run
that was killed and resumed has to end with the same bytes as one that was not.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

HIDDEN = 1536  # 2.5 million parameters: 30 MB together with Adam's moments
BATCH = 128
TRAINED_ON = 1500  # of 1,797 pictures; the others tell how well it reads
SEED = 7

State = dict[str, Any]

_optimizer = optax.adam(3e-4)


class Reader(nnx.Module):
    """Two hidden layers over the 64 pixels of a digit."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, 10, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Returns the logits of the ten digits."""
        return self.last(nnx.relu(self.second(nnx.relu(self.first(pixels)))))


def start() -> State:
    """Returns the state before the first step: parameters and Adam's moments."""
    params = nnx.state(Reader(nnx.Rngs(SEED)), nnx.Param)
    return {"params": params, "opt_state": _optimizer.init(params)}


@functools.cache
def abstract_state() -> State:
    """Returns the shapes and dtypes of `start`, without computing anything."""
    return jax.eval_shape(start)


@functools.cache
def _graph() -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: Reader(nnx.Rngs(SEED))))


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(labels))
    return (pixels[order] / 16).astype(np.float32), labels[order].astype(np.int32)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pictures and labels of one step."""
    chosen = np.random.default_rng([SEED, step]).integers(0, TRAINED_ON, BATCH)
    pixels, labels = _digits()
    return pixels[chosen], labels[chosen]


def _loss(params: Any, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    logits = nnx.merge(_graph(), params)(pixels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def gradients(state: State, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    """Forward and backward: reads the state and leaves it alone."""
    return jax.value_and_grad(_loss)(state["params"], pixels, labels)


@functools.partial(jax.jit, donate_argnums=0)
def update(state: State, grads: Any) -> State:
    """Adam's step: donates the old state, whose memory the new one takes over."""
    changes, opt_state = _optimizer.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], changes), "opt_state": opt_state}


def accuracy(state: State) -> float:
    """Returns the share of unseen digits that are read right."""
    pixels, labels = _digits()
    logits = nnx.merge(_graph(), state["params"])(jnp.asarray(pixels[TRAINED_ON:]))
    return float((np.asarray(logits).argmax(axis=1) == labels[TRAINED_ON:]).mean())


def nbytes(state: State) -> int:
    """Returns the bytes of all arrays of a state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def same_bytes(one: State, other: State) -> bool:
    """Says whether two states are equal bit for bit, leaf by leaf."""
    ours, theirs = jax.tree.leaves_with_path(one), jax.tree.leaves_with_path(other)
    return [path for path, _ in ours] == [path for path, _ in theirs] and all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )
