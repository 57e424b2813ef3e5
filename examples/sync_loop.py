"""A plain training loop that saves in the background, keeps the best, and resumes.

    python examples/sync_loop.py --directory /tmp/digits --steps 400
    python examples/sync_loop.py --directory /tmp/digits --steps 800     # goes on from step 400

Stop it with `kill` at any moment: it saves the step it is at, and the next start goes on there.
However often it is stopped, it ends with the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

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


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: State, pixels: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    """Makes one step of Adam. It donates the old state, whose memory the new one takes over."""

    def loss_of(params: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, pixels), labels)
        return losses.mean()

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, loss


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the data of a step, which depend on nothing else: so a resumed run sees the same."""
    chosen = np.random.default_rng([SEED, step]).integers(0, TRAINED_ON, BATCH)
    return PIXELS[chosen], LABELS[chosen]


def accuracy(state: State) -> float:
    """Returns the share of unseen digits that are read right."""
    read = logits(state["params"], PIXELS[TRAINED_ON:]).argmax(axis=1)
    return float((read == LABELS[TRAINED_ON:]).mean())


# ------------------------------------------------------------------------- training, and saving


def train(directory: Path, steps: int) -> None:
    """Trains to a step, from the last checkpoint in the directory on."""
    with (
        preemption.watched(),  # SIGTERM is noticed, and no longer ends the program at once
        Checkpointer(
            directory,
            save_decision_policy=when.AnySavePolicy(
                [
                    when.FixedIntervalPolicy(50),
                    when.SpecificStepsPolicy([steps]),
                    when.PreemptionCheckpointingPolicy(),
                ]
            ),
            preservation_policy=keep.AnyPreservationPolicy(
                [
                    keep.LatestN(2),
                    keep.EveryNSteps(200),
                    keep.BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1),
                ]
            ),
        ) as checkpointer,
    ):
        latest = checkpointer.latest
        if latest is None:
            step, state = 0, initial_state()
        else:
            # The abstract state says what to load as: its containers, shapes and dtypes.
            step, state = latest.step, checkpointer.load(latest, jax.eval_shape(initial_state))
            print(f"resumed from step {step}", flush=True)

        is_last = False
        while step < steps and not is_last:
            state, loss = train_step(state, *batch(step))
            step += 1
            is_last = preemption.is_noticed()  # the policy saves this step, whatever its number
            if checkpointer.should_save(step):
                # It returns as soon as every value is captured: the next step may donate the
                # state, while the checkpoint is written beside the training.
                metrics = {"accuracy": accuracy(state), "loss": float(loss)}
                checkpointer.save_async(step, state, metrics=metrics)
                print(f"step {step}: {metrics['accuracy']:.4f} read right", flush=True)
    # The end of the `with` block has waited for the last save, and would have raised its failure.
    print(f"stopped at step {step}; kept {[each.step for each in checkpointer.checkpoints]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="for the checkpoints")
    parser.add_argument("--steps", type=int, default=400, help="the last step to train")
    given = parser.parse_args()
    train(given.directory, given.steps)
