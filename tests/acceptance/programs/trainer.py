"""Trains for some steps, resuming from the latest checkpoint; killed at any moment by its parent.

    trainer.py DIRECTORY STEPS

Each step follows from the one before, bit for bit. It prints each step once it is over.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orbax_async.training import Checkpointer
from orbax_async.training import preservation_policies as keep
from orbax_async.training import save_decision_policies as when

SIZE = 20_000


def saving() -> Any:
    """Which steps are saved."""
    return when.AnySavePolicy([when.FixedIntervalPolicy(5), when.SpecificStepsPolicy([1, 2, 3])])


def keeping() -> Any:
    """Which steps are kept."""
    return keep.AnyPreservationPolicy(
        [
            keep.LatestN(3),
            keep.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=4),
            keep.EveryNSteps(50),
        ]
    )


def loss(step: int) -> float:
    """A loss that goes down, and up and down."""
    return float(np.round(10 / (1 + step) + abs(np.sin(step)), 9))


@jax.jit
def train(state: dict[str, Any]) -> dict[str, Any]:
    """One step."""
    key, noise = jax.random.split(state["key"])
    return {
        "w": jnp.sin(state["w"] * 1.25) + 0.01 * jax.random.normal(noise, (SIZE,)),
        "key": key,
        "momentum": state["momentum"] * 0.9 + state["w"].astype(jnp.bfloat16),
        "step": state["step"] + 1,
    }


def start() -> dict[str, Any]:
    """The state before the first step."""
    w = jnp.linspace(-1, 1, SIZE)
    return {
        "w": w,
        "key": jax.random.PRNGKey(0),
        "momentum": w.astype(jnp.bfloat16),
        "step": jnp.zeros((), jnp.int32),
    }


def main(directory: Path, steps: int) -> None:
    """Trains to the end, or until it is killed."""
    with Checkpointer(
        directory,
        save_decision_policy=saving(),
        preservation_policy=keeping(),
        custom_metadata={"steps": steps},
        max_saves_in_flight=2,
    ) as checkpointer:
        state = start()
        if checkpointer.latest is not None:
            state = checkpointer.load(abstract_state=jax.eval_shape(lambda: state))
        first = int(state["step"]) + 1
        for step in range(first, steps + 1):
            state = train(state)
            checkpointer.save_async(
                step, state, metrics={"loss": loss(step)}, custom_metadata={"at": step}
            )
            print(step, flush=True)
            time.sleep(0.003)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
