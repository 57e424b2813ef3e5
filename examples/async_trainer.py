"""A trainer in a coroutine: nothing blocks its loop, and the next step never waits for a disk.

    python examples/async_trainer.py --directory /tmp/digits --steps 400

Beside the training, each checkpoint is loaded as soon as it is durable, and evaluated. The values
of a save are captured in the background (lazy staging), while the next gradients are computed; only
before the update, which donates them, the trainer makes sure that they are.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import orbax_async as ocp
from orbax_async.training import Checkpointer, preemption
from orbax_async.training import preservation_policies as keep
from orbax_async.training import save_decision_policies as when

SEED, HIDDEN, BATCH, TRAINED_ON = 7, 128, 128, 1500
State = dict[str, Any]

# ------------------------------------------------------------------- a small model, and its data

pixels, labels = load_digits(return_X_y=True)
shuffled = np.random.default_rng(SEED).permutation(len(labels))
PIXELS = (pixels[shuffled] / 16).astype(np.float32)
LABELS = labels[shuffled].astype(np.int32)
optimizer = optax.adam(1e-3)


def initial_state() -> State:
    """Returns the state before the first step: weights, and Adam's moments."""
    first, second = jax.random.split(jax.random.key(SEED))
    params = {
        "hidden": {"w": jax.random.normal(first, (64, HIDDEN)) / 8, "b": jnp.zeros(HIDDEN)},
        "digits": {"w": jax.random.normal(second, (HIDDEN, 10)) / 8, "b": jnp.zeros(10)},
    }
    return {"params": params, "opt_state": optimizer.init(params)}


def logits(params: Any, pixels: jax.Array) -> jax.Array:
    """Returns how likely each digit is, for each picture."""
    hidden = jax.nn.relu(pixels @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["digits"]["w"] + params["digits"]["b"]


@jax.jit
def gradients(state: State, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    """Reads the state, and leaves it alone."""

    def loss_of(params: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, pixels), labels)
        return losses.mean()

    return jax.value_and_grad(loss_of)(state["params"])


@functools.partial(jax.jit, donate_argnums=0)
def update(state: State, grads: Any) -> State:
    """Makes one step of Adam. It donates the old state, whose memory the new one takes over."""
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the data of a step, which depend on nothing else: so a resumed run sees the same."""
    chosen = np.random.default_rng([SEED, step]).integers(0, TRAINED_ON, BATCH)
    return PIXELS[chosen], LABELS[chosen]


def accuracy(state: State) -> float:
    """Returns the share of unseen digits that are read right."""
    read = logits(state["params"], PIXELS[TRAINED_ON:]).argmax(axis=1)
    return float((read == LABELS[TRAINED_ON:]).mean())


# ------------------------------------------------------------------------- training, and saving


async def evaluate(
    checkpointer: Checkpointer, step: int, response: ocp.AsyncResponse[bool]
) -> None:
    """Waits until a step is durable, loads it, and tells how well it reads."""
    await response
    state = await checkpointer.load_async(step, jax.eval_shape(initial_state))
    right = await asyncio.to_thread(accuracy, state)
    print(f"step {step}: durable, {right:.4f} read right", flush=True)


async def train(directory: Path, steps: int) -> None:
    """Trains to a step, from the last checkpoint in the directory on."""
    context = ocp.Context()
    context.asynchronous.staging = "lazy"
    async with (
        Checkpointer(
            directory,
            context=context,
            save_decision_policy=when.AnySavePolicy(
                [
                    when.FixedIntervalPolicy(50),
                    when.SpecificStepsPolicy([steps]),
                    when.PreemptionCheckpointingPolicy(),
                ]
            ),
            preservation_policy=keep.LatestN(5),
        ) as checkpointer,
        asyncio.TaskGroup() as group,  # a save that fails ends the training
    ):
        step, state, response = 0, initial_state(), None
        if checkpointer.latest is not None:
            step = checkpointer.latest.step
            state = await checkpointer.load_async(step, jax.eval_shape(initial_state))
            print(f"resumed from step {step}", flush=True)

        is_last = False
        while step < steps and not is_last:
            _, grads = gradients(state, *batch(step))  # reads the state, and so may the save
            if response is not None:
                await response.staged()  # the update donates the state: it has to be captured
            state = await asyncio.to_thread(jax.block_until_ready, update(state, grads))
            step += 1
            is_last = preemption.is_noticed()  # the policy saves this step, whatever its number
            if checkpointer.should_save(step):
                await checkpointer.ready()  # for the save before; `save_async` would block the loop
                response = checkpointer.save_async(step, state)
                if response is not None:
                    group.create_task(evaluate(checkpointer, step, response))
    print(f"stopped at step {step}; kept {[each.step for each in checkpointer.checkpoints]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="for the checkpoints")
    parser.add_argument("--steps", type=int, default=400, help="the last step to train")
    given = parser.parse_args()
    with preemption.watched():  # SIGTERM saves, and ends the training
        asyncio.run(train(given.directory, given.steps))
