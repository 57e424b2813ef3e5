"""Policies: those of either library decide alike, on many histories, and serve the other."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1

import orbax_async as ocp
from orbax_async import training

OURS, THEIRS = training, v1.training
NOW = datetime.datetime.now(tz=datetime.UTC)
HOUR = 3600

Make = Callable[[Any, np.random.Generator], Any]


def loss(metrics: Any) -> float:
    """What BestN compares."""
    return float(metrics["loss"])


def maybe(rng: np.random.Generator, low: int, high: int) -> int | None:
    """None, or a number."""
    return None if rng.random() < 0.2 else int(rng.integers(low, high))


def best(module: Any, rng: np.random.Generator) -> Any:
    """A BestN of any options."""
    return module.preservation_policies.BestN(
        get_metric_fn=loss,
        reverse=bool(rng.integers(2)),
        n=maybe(rng, 0, 9),
        keep_checkpoints_without_metrics=bool(rng.integers(2)),
    )


def numbers(rng: np.random.Generator) -> list[int]:
    """Some steps."""
    return [int(one) for one in rng.integers(0, 40, rng.integers(0, 9))]


PRESERVING: dict[str, Make] = {
    "PreserveAll": lambda m, rng: m.preservation_policies.PreserveAll(),
    "LatestN": lambda m, rng: m.preservation_policies.LatestN(maybe(rng, 0, 20)),
    "EveryNSeconds": lambda m, rng: m.preservation_policies.EveryNSeconds(
        int(rng.integers(0, 12)) * HOUR
    ),
    "EveryNSteps": lambda m, rng: m.preservation_policies.EveryNSteps(
        int(rng.integers(1, 9)), bool(rng.integers(2)), maybe(rng, 1, 6)
    ),
    "EveryNStepsClosest": lambda m, rng: m.preservation_policies.EveryNStepsClosest(
        int(rng.integers(1, 12)), maybe(rng, 1, 6)
    ),
    "CustomSteps": lambda m, rng: m.preservation_policies.CustomSteps(numbers(rng)),
    "BestN": best,
    # Ages are whole hours and a half, so that the moment of asking makes no difference.
    "LatestDuration": lambda m, rng: m.preservation_policies.LatestDuration(
        datetime.timedelta(hours=int(rng.integers(0, 40)))
    ),
    "AnyPreservationPolicy": lambda m, rng: m.preservation_policies.AnyPreservationPolicy(
        [PRESERVING[str(name)](m, rng) for name in rng.choice(sorted(PRESERVING)[1:], 2)]
    ),
}
SAVING: dict[str, Make] = {
    "FixedIntervalPolicy": lambda m, rng: m.save_decision_policies.FixedIntervalPolicy(
        int(rng.integers(1, 9))
    ),
    "SpecificStepsPolicy": lambda m, rng: m.save_decision_policies.SpecificStepsPolicy(
        numbers(rng)
    ),
    "ContinuousCheckpointingPolicy": (
        lambda m, rng: m.save_decision_policies.ContinuousCheckpointingPolicy(
            minimum_interval_secs=None if rng.random() < 0.2 else int(rng.integers(0, 5)) * HOUR
        )
    ),
    "InitialSavePolicy": lambda m, rng: m.save_decision_policies.InitialSavePolicy(),
    "PreemptionCheckpointingPolicy": (
        lambda m, rng: m.save_decision_policies.PreemptionCheckpointingPolicy()
    ),
    "AnySavePolicy": lambda m, rng: m.save_decision_policies.AnySavePolicy(
        [SAVING[str(name)](m, rng) for name in rng.choice(sorted(SAVING)[1:], rng.integers(4))]
    ),
}


def history(library: Any, rng: np.random.Generator) -> list[Any]:
    """Checkpoints of a run: some steps, at some times, of which some have metrics."""
    count = int(rng.integers(0, 20))
    steps = np.sort(rng.choice(60, count, replace=False))
    if rng.random() < 0.2:
        rng.shuffle(steps)
    ages = np.sort(rng.integers(0, 40, count))[::-1] + 0.5
    values = [0.0, 1.0, 1.5, 2.0, -3.0, float("inf"), float("-inf"), None, None]
    found = []
    for step, age in zip(steps, ages, strict=True):
        value = values[rng.integers(len(values))]
        found.append(
            library.CheckpointMetadata(
                int(step),
                v1.path.Path("/run") / str(step),
                metadata=None,
                commit_timestamp_nsecs=int((NOW.timestamp() - age * HOUR) * 1e9),
                metrics=None if value is None else {"loss": value},
            )
        )
    return found


def contexts(rng: np.random.Generator) -> tuple[Any, Any]:
    """Our context of a decision and Orbax's."""
    state = {
        "is_saving_in_progress": bool(rng.integers(2)),
        "reached_preemption": bool(rng.integers(2)),
    }
    ours = OURS.save_decision_policies.DecisionContext(
        **state, multiprocessing_options=ocp.options.MultiprocessingOptions()
    )
    theirs = THEIRS.save_decision_policies.DecisionContext(
        **state, multiprocessing_options=v1.options.MultiprocessingOptions()
    )
    return ours, theirs


@pytest.mark.parametrize("name", PRESERVING)
def test_both_keep_the_same(name: str, soak: Callable[[int, int], int]) -> None:
    """On random histories each policy keeps what Orbax's does, given either's checkpoints."""
    deleted = 0
    for seed in range(soak(150, 20_000)):
        ours, theirs = (PRESERVING[name](m, np.random.default_rng(seed)) for m in (OURS, THEIRS))
        here, there = (history(m, np.random.default_rng([seed, 1])) for m in (OURS, THEIRS))
        expected = theirs.should_preserve(
            there, context=THEIRS.preservation_policies.PreservationContext()
        )
        context = OURS.preservation_policies.PreservationContext()
        kept = ours.should_preserve(here, context=context)
        assert kept == list(expected), (ours, [(one.step, one.time, one.metrics) for one in here])
        assert {type(one) for one in kept} <= {bool}
        assert ours.should_preserve(there, context=None) == kept
        assert ours(here, context=context) == kept
        assert list(theirs.should_preserve(here, context=context)) == kept
        deleted += len(kept) - sum(kept)
    assert deleted or name == "PreserveAll"


@pytest.mark.parametrize("name", SAVING)
def test_both_save_the_same(name: str, soak: Callable[[int, int], int]) -> None:
    """On random histories each policy saves when Orbax's does, given either's checkpoints."""
    answers = set()
    for seed in range(soak(150, 20_000)):
        ours, theirs = (SAVING[name](m, np.random.default_rng(seed)) for m in (OURS, THEIRS))
        here, there = (history(m, np.random.default_rng([seed, 1])) for m in (OURS, THEIRS))
        if not here:
            continue
        cut = int(np.random.default_rng([seed, 2]).integers(len(here)))
        context, their_context = contexts(np.random.default_rng([seed, 3]))
        expected = theirs.should_save(there[cut], there[:cut], context=their_context)
        assert ours.should_save(here[cut], here[:cut], context=context) is expected
        assert ours.should_save(there[cut], there[:cut], context=their_context) is expected
        assert ours(here[cut], here[:cut], context=context) is expected
        answers.add(expected)
    assert answers == {True, False}


NAMES = [("preservation_policies", name) for name in [*PRESERVING, "PreservationContext"]] + [
    ("save_decision_policies", name) for name in [*SAVING, "DecisionContext"]
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_fields_are_those_of_orbax(module: str, name: str) -> None:
    """Every policy and context takes what Orbax's takes, in the same order, with the defaults."""
    ours, theirs = (getattr(getattr(m, module), name) for m in (OURS, THEIRS))
    if not dataclasses.is_dataclass(theirs):
        assert not inspect.signature(ours).parameters
        return
    taken, expected = (inspect.signature(each).parameters for each in (ours, theirs))
    added = {("PreservationContext", "now")}
    assert [(p.name, p.kind, p.default) for p in taken.values() if (name, p.name) not in added] == [
        (p.name, p.kind, p.default) for p in expected.values()
    ]
    fields = {field.name for field in dataclasses.fields(theirs) if field.name[0] != "_"}
    assert fields <= {field.name for field in dataclasses.fields(ours)}


@pytest.mark.parametrize("module", ["preservation_policies", "save_decision_policies"])
def test_every_policy_of_orbax_is_there(module: str) -> None:
    """No policy is left out, neither here nor in the comparisons above."""
    theirs = {
        name
        for name, value in vars(getattr(THEIRS, module)).items()
        if inspect.isclass(value) and {"should_save", "should_preserve"} & {*dir(value)}
    }
    assert theirs <= set(getattr(OURS, module).__all__)
    assert theirs - {"PreservationPolicy", "SaveDecisionPolicy"} == {*PRESERVING, *SAVING} & theirs
    assert len(theirs) >= 7


def test_metadata_is_that_of_orbax() -> None:
    """CheckpointMetadata and RootMetadata are made alike and have the same properties."""
    for name in ("CheckpointMetadata", "RootMetadata"):
        ours, theirs = (getattr(m, name) for m in (OURS, THEIRS))
        taken, expected = (inspect.signature(each).parameters for each in (ours, theirs))
        assert [(p.name, p.kind, p.default) for p in taken.values()] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ]
    here, there = (
        m.CheckpointMetadata(
            3, v1.path.Path("/run/3"), metadata=None, commit_timestamp_nsecs=10**18, metrics=[1]
        )
        for m in (OURS, THEIRS)
    )
    for name in dir(there):
        if not name.startswith("_"):
            assert getattr(here, name) == getattr(there, name), name
    assert isinstance(here, ocp.CheckpointMetadata)
    assert OURS.CheckpointMetadata[dict](0, "/run/0", metadata={}).metadata == {}
    for library in (OURS, THEIRS):
        with pytest.raises(TypeError):
            _ = library.CheckpointMetadata(0, v1.path.Path("/run/0"), metadata=None).time


class EvenSteps(THEIRS.save_decision_policies.SaveDecisionPolicy):  # type: ignore[misc]
    """A save policy written for Orbax."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        spaced = not previous_steps or step.time - previous_steps[-1].time >= datetime.timedelta(0)
        return step.step % 2 == 0 and spaced and not context.is_saving_in_progress


class KeepThirds(THEIRS.preservation_policies.PreservationPolicy):  # type: ignore[misc]
    """A preservation policy written for Orbax."""

    def should_preserve(self, checkpoints: Any, *, context: Any) -> Sequence[bool]:
        return [checkpoint.step % 3 == 0 for checkpoint in checkpoints]


def test_policies_written_for_orbax_work_unchanged() -> None:
    """A user's subclass of Orbax's protocols serves here, alone and among ours."""
    save = training.save_decision_policies
    keep = training.preservation_policies
    assert isinstance(EvenSteps(), save.SaveDecisionPolicy)
    assert isinstance(KeepThirds(), keep.PreservationPolicy)
    plan = training.plan(
        range(10),
        save_decision_policy=save.AnySavePolicy([EvenSteps(), save.SpecificStepsPolicy([9])]),
        preservation_policy=keep.AnyPreservationPolicy([KeepThirds(), keep.LatestN(1)]),
    )
    assert plan.saved == (0, 2, 4, 6, 8, 9)
    assert plan.kept == (0, 6, 9)
    assert training.plan(range(5), save_decision_policy=EvenSteps()).saved == (0, 2, 4)


class Spaced:
    """A policy that takes what Orbax passes by keyword, by keyword alone; of no base class."""

    def should_save(self, step: Any, *, previous_steps: Any, context: Any) -> bool:
        del context
        return not previous_steps or step.step - previous_steps[-1].step >= 3


class KeepLastTwo:
    """The like for preservation."""

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        return [len(checkpoints) - index <= 2 for index in range(len(checkpoints))]


@pytest.mark.parametrize("library", [OURS, THEIRS], ids=["ours", "orbax"])
def test_policies_that_take_keywords_only_serve_both_libraries(
    library: Any, tmp_path: Path
) -> None:
    """`previous_steps` may be keyword-only: alone, and in AnySavePolicy, as Orbax calls them."""
    save = library.save_decision_policies
    for name, policy in {
        "alone": Spaced(),
        "among others": save.AnySavePolicy([save.SpecificStepsPolicy([0]), Spaced()]),
    }.items():
        with library.Checkpointer(
            tmp_path / name, save_decision_policy=policy, preservation_policy=KeepLastTwo()
        ) as checkpointer:
            saved = [step for step in range(8) if checkpointer.save(step, {"a": np.arange(2)})]
            assert saved == [0, 3, 6]
            assert not checkpointer.should_save(8)
            assert checkpointer.should_save(9)
        assert sorted(int(each.name) for each in (tmp_path / name).iterdir()) == [3, 6]


RUNS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "defaults": lambda save, keep: (None, None),
    "intervals": lambda save, keep: (
        save.AnySavePolicy([save.SpecificStepsPolicy({3, 7}), save.FixedIntervalPolicy(2)]),
        keep.AnyPreservationPolicy([keep.LatestN(2), keep.EveryNSteps(6)]),
    ),
    "best": lambda save, keep: (
        save.FixedIntervalPolicy(1),
        keep.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=3),
    ),
    "closest": lambda save, keep: (
        save.SpecificStepsPolicy([0, 1, 4, 6, 7, 9]),
        keep.EveryNStepsClosest(5),
    ),
    "none": lambda save, keep: (
        save.FixedIntervalPolicy(4),
        keep.BestN(get_metric_fn=lambda metrics: metrics["loss"], n=0),
    ),
}
LOSSES = {step: {"loss": [5, 3, 4, 1, 1, 2, 9, 3, 1, 8][step]} for step in range(10)}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("library", [OURS, THEIRS], ids=["our policies", "their policies"])
def test_a_run_of_orbax_ends_as_planned(run: str, library: Any, tmp_path: Path) -> None:
    """`plan` foretells which steps Orbax's Checkpointer saves and keeps, with either's policies."""
    saving, keeping = RUNS[run](library.save_decision_policies, library.preservation_policies)
    saved = []
    with v1.training.Checkpointer(
        tmp_path, save_decision_policy=saving, preservation_policy=keeping
    ) as checkpointer:
        for step in range(10):
            if checkpointer.save(step, {"a": np.arange(2)}, metrics=LOSSES[step]):
                saved.append(step)
    plan = training.plan(
        range(10), save_decision_policy=saving, preservation_policy=keeping, metrics=LOSSES
    )
    assert plan.saved == tuple(saved)
    found = list(ocp.path.step.standard_name_format().find_all(tmp_path))
    assert plan.kept == tuple(one.step for one in found)
    assert {one.step: one.metrics for one in found} == {step: LOSSES[step] for step in plan.kept}
