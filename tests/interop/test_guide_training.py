"""Orbax's guide to training loops, and its way from a run to a model: both libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_same
from flax import nnx
from guide import EITHER, described, laid_out, put
from jax.sharding import PartitionSpec as P

import orbax_async as ocp


def state(step: int) -> dict[str, Any]:
    """Returns a state over all devices, whose step is a number."""
    arrays = {"params": {"layer": np.arange(16).reshape(8, 2)}, "moments": [np.arange(16)]}
    return {**put(arrays), "step": step}


def steps(checkpointer: Any) -> list[int]:
    """Returns the steps that a Checkpointer knows."""
    return [each.step for each in checkpointer.checkpoints]


@EITHER
def test_every_step(library: ModuleType, tmp_path: Path) -> None:
    """By default each step is saved and kept; loading without a step gives the latest."""
    with library.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.latest is None
        assert all(checkpointer.save(step, state(step)) for step in range(4))
        assert steps(checkpointer) == [0, 1, 2, 3]
    with library.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert_same(checkpointer.load(), state(3))


@EITHER
def test_some_steps_with_what_is_known_of_them(library: ModuleType, tmp_path: Path) -> None:
    """A policy chooses, `force` overrules it; metrics and metadata are told afterwards."""
    policies = library.training.save_decision_policies
    with library.training.Checkpointer(
        tmp_path / "run",
        save_decision_policy=policies.FixedIntervalPolicy(3),
        custom_metadata={"experiment": "first"},
    ) as checkpointer:
        saved = [
            checkpointer.save(
                step,
                state(step),
                force=step == 7,
                metrics={"accuracy": step / 10},
                custom_metadata={"is_final": step == 7},
            )
            for step in range(8)
        ]
    assert saved == [True, False, False, True, False, False, True, True]
    directories = {path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()}
    assert directories == {"0", "3", "6", "7"}

    with library.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert steps(checkpointer) == [0, 3, 6, 7]
        assert checkpointer.latest.step == 7
        final = checkpointer.metadata()
        assert (final.metrics, final.custom_metadata) == ({"accuracy": 0.7}, {"is_final": True})
        assert checkpointer.metadata(checkpointer.checkpoints[0]).metrics == {"accuracy": 0.0}
        form = checkpointer.metadata(3).metadata
        assert form["step"] == 0
        assert form["params"]["layer"].shape == (8, 2)
        assert form["params"]["layer"].sharding == laid_out(P())
        root = checkpointer.root_metadata()
        assert root.custom_metadata == {"experiment": "first"}
        assert root.directory == tmp_path / "run"
        assert [each.metrics["accuracy"] for each in checkpointer.checkpoints] == [0, 0.3, 0.6, 0.7]


@EITHER
def test_old_steps_go(library: ModuleType, tmp_path: Path) -> None:
    """A policy of preservation acts with the next save, not before."""
    with library.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in range(10):
            checkpointer.save(step, {"step": step})
        assert steps(checkpointer) == [*range(10)]
    keep = library.training.preservation_policies
    policy = keep.AnyPreservationPolicy([keep.LatestN(2), keep.EveryNSteps(4)])
    with library.training.Checkpointer(
        tmp_path / "run", preservation_policy=policy
    ) as checkpointer:
        assert steps(checkpointer) == [*range(10)]
        checkpointer.save(10, {"step": 10})
        assert steps(checkpointer) == [0, 4, 8, 9, 10]
    directories = {path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()}
    assert directories == {"0", "4", "8", "9", "10"}


@EITHER
def test_ways_to_load(library: ModuleType, tmp_path: Path) -> None:
    """The latest step, one by its number, one by its description; cast and laid out as asked."""
    with library.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in (2, 5, 9):
            checkpointer.save(step, state(step))
        assert checkpointer.load()["step"] == 9
        assert checkpointer.load(5)["step"] == 5
        assert checkpointer.load(checkpointer.checkpoints[0])["step"] == 2
        with pytest.raises(library.training.errors.StepNotFoundError):
            checkpointer.load(4)
        with pytest.raises(library.training.errors.StepAlreadyExistsError):
            checkpointer.save(9, state(9))

        def spread(leaf: Any) -> Any:
            if isinstance(leaf, int):
                return 0
            return described(leaf, dtype=np.float32, sharding=laid_out(P("x")))

        loaded = checkpointer.load(None, jax.tree.map(spread, state(0)))

    def expected(leaf: Any) -> Any:
        return leaf if isinstance(leaf, int) else put(leaf.astype(np.float32), P("x"))

    assert_same(loaded, jax.tree.map(expected, state(9)))


@EITHER
def test_the_data_goes_with_the_steps(library: ModuleType, tmp_path: Path) -> None:
    """At each step the iterator's place is saved; loading step 2 puts a new one there."""

    def batches() -> Any:
        return iter(grain.MapDataset.range(30).batch(3).map(lambda batch: batch.tolist()))

    data = batches()
    with library.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in range(5):
            checkpointer.save_checkpointables(step, {"model": state(step), "data": data})
            next(data)
    fresh = batches()
    assert next(fresh) == [0, 1, 2]
    with library.training.Checkpointer(tmp_path / "run") as checkpointer:
        loaded = checkpointer.load_checkpointables(2, {"model": None, "data": fresh})
    assert loaded["model"]["step"] == 2
    assert next(fresh) == [6, 7, 8]


class Net(nnx.Module):
    """Two layers of flax nnx."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.second = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.relu(self.first(x)))


ADAM = optax.adamw(1e-2)


def fresh_net() -> tuple[Net, nnx.Optimizer[Net]]:
    """Returns a network and its optimizer, always the same."""
    net = Net(nnx.Rngs(0))
    return net, nnx.Optimizer(net, ADAM, wrt=nnx.Param)


def parts(net: Net, optimizer: nnx.Optimizer[Net]) -> dict[str, Any]:
    """Returns what is saved of both."""
    return {"params": nnx.state(net), "optimizer": nnx.state(optimizer)}


@nnx.jit
def learn(net: Net, optimizer: nnx.Optimizer[Net], seed: Any) -> None:
    """Takes one step on inputs that depend on the step alone."""
    x = jax.random.normal(jax.random.key(seed), (16, 4))

    def loss(net: Net) -> Any:
        return jnp.mean((net(x) - x.sum(axis=1, keepdims=True)) ** 2)

    optimizer.update(net, nnx.grad(loss)(net))


@EITHER
def test_a_network_survives_a_failure(library: ModuleType, tmp_path: Path) -> None:
    """Stopped at step 12, resumed from 10, fine-tuned from 15 elsewhere: as if never stopped."""
    policies = library.training.save_decision_policies
    forms = jax.tree.map(described, parts(*fresh_net()))

    def train(
        run: str, stop: int, fails: Callable[[int], bool] = lambda _: False, source: Any = None
    ) -> tuple[int, Any]:
        net, optimizer = fresh_net()
        with library.training.Checkpointer(
            tmp_path / run, save_decision_policy=policies.FixedIntervalPolicy(5)
        ) as checkpointer:
            loaded = None
            if checkpointer.latest:
                loaded = checkpointer.load(abstract_state=forms)
            elif source:
                loaded = library.load(source, abstract_state=forms)
            if loaded:
                nnx.update(net, loaded["params"])
                nnx.update(optimizer, loaded["optimizer"])
            begin = int(optimizer.step[...])
            for step in range(begin + 1, stop + 1):
                if fails(step):
                    break
                learn(net, optimizer, step)
                checkpointer.save(step, parts(net, optimizer))
            return begin, parts(net, optimizer)

    train("run", 20, fails=lambda step: step == 12)
    begin, _ = train("run", 15)
    assert begin == 10
    with library.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert steps(checkpointer) == [5, 10, 15]
    begin, tuned = train("tuned", 18, source=tmp_path / "run" / "15")
    assert begin == 15
    _, straight = train("straight", 18)
    assert_same(jax.tree.leaves(tuned), jax.tree.leaves(straight))

    # What serves the model needs its parameters alone, as NumPy arrays of a plain tree.
    library.save(tmp_path / "model", nnx.to_pure_dict(tuned["params"]))
    plain = library.metadata(tmp_path / "model").metadata
    loaded = library.load(tmp_path / "model", jax.tree.map(lambda _: np.ndarray, plain))
    assert_same(loaded, jax.tree.map(np.asarray, nnx.to_pure_dict(tuned["params"])))


async def test_a_trainer_that_awaits(tmp_path: Path) -> None:
    """Ours alone: the same loop in a coroutine, where saves are awaited when they are done."""
    async with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in range(3):
            response = checkpointer.save_async(step, state(step))
            assert response is not None
            assert await response is True
        assert_same(await checkpointer.load_async(1), state(1))
        assert steps(checkpointer) == [0, 1, 2]
