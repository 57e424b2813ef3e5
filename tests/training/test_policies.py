"""Policies: what they refuse, what they say of their reasons, and what a plan foretells."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orbax_async as ocp
from orbax_async import training
from orbax_async.training import preservation_policies as keep
from orbax_async.training import save_decision_policies as save

START = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
NAN = float("nan")


def checkpoint(step: int, metrics: Any = None, secs: float | None = None) -> Any:
    """A checkpoint of a run that makes a step a second."""
    time = START + datetime.timedelta(seconds=step if secs is None else secs)
    return training.CheckpointMetadata(
        step,
        f"/run/{step}",
        metadata=None,
        commit_timestamp_nsecs=int(time.timestamp() * 1e9),
        metrics=metrics,
    )


def kept(policy: Any, checkpoints: Sequence[Any]) -> list[int]:
    """The steps that a policy keeps."""
    return list(training.retain(policy, checkpoints).kept)


def context(*, is_saving: bool = False, is_preempted: bool = False) -> save.DecisionContext:
    """What a save policy may need to know."""
    return save.DecisionContext(
        is_saving_in_progress=is_saving,
        reached_preemption=is_preempted,
        multiprocessing_options=ocp.options.MultiprocessingOptions(),
    )


def get_loss(metrics: Any) -> Any:
    """What BestN compares here."""
    return metrics["loss"]


# -------------------------------------------------------------------------------- bad input

BEST = {"get_metric_fn": get_loss}
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (save.FixedIntervalPolicy, {"interval": 0}, ValueError, "interval must be a whole number of"),
    (save.FixedIntervalPolicy, {"interval": -5}, ValueError, "at least 1, not -5"),
    (save.FixedIntervalPolicy, {"interval": 2.5}, ValueError, "not 2.5"),
    (save.FixedIntervalPolicy, {"interval": "3"}, TypeError, "not '3'"),
    (save.SpecificStepsPolicy, {"steps": 3}, TypeError, "a collection of ints"),
    (save.SpecificStepsPolicy, {"steps": "13"}, TypeError, "a collection of ints"),
    (save.SpecificStepsPolicy, {"steps": iter([1])}, TypeError, "a collection of ints"),
    (save.ContinuousCheckpointingPolicy, {"minimum_interval_secs": -1}, ValueError, "at least 0"),
    (save.ContinuousCheckpointingPolicy, {"minimum_interval_secs": "3"}, TypeError, "a number"),
    (save.AnySavePolicy, {"policies": None}, TypeError, "a sequence of policies, not None"),
    (save.AnySavePolicy, {"policies": [1]}, TypeError, "should_save, or be a function, not 1"),
    (save.AnySavePolicy, {"policies": [save.InitialSavePolicy]}, TypeError, "not <class"),
    (save.AllSavePolicy, {"policies": []}, ValueError, "AllSavePolicy needs at least one"),
    (keep.LatestN, {"n": -1}, ValueError, "n must be a whole number of at least 0, not -1"),
    (keep.LatestN, {"n": 2.5}, ValueError, "not 2.5"),
    (keep.LatestN, {"n": True}, TypeError, "not True"),
    (keep.EveryNSeconds, {"interval_secs": -1}, ValueError, "interval_secs"),
    (keep.EveryNSeconds, {"interval_secs": None}, TypeError, "interval_secs"),
    (keep.EveryNSteps, {"interval_steps": 0}, ValueError, "interval_steps must not be 0."),
    (keep.EveryNSteps, {"interval_steps": -3}, ValueError, "at least 1, not -3"),
    (keep.EveryNSteps, {"interval_steps": 1, "max_to_keep": 0}, ValueError, "max_to_keep"),
    (keep.EveryNSteps, {"interval_steps": 1, "exact_interval": "no"}, TypeError, "exact_interval"),
    (keep.EveryNStepsClosest, {"interval_steps": 0}, ValueError, "interval_steps must not be 0."),
    (keep.EveryNStepsClosest, {"interval_steps": 1, "max_to_keep": -1}, ValueError, "max_to_keep"),
    (keep.CustomSteps, {"steps": None}, TypeError, "steps"),
    (keep.CustomSteps, {"steps": "13"}, TypeError, "steps"),
    (keep.CustomSteps, {"steps": ["1"]}, TypeError, "each member of steps"),
    (keep.BestN, {"get_metric_fn": None}, TypeError, "get_metric_fn must be callable"),
    (keep.BestN, BEST | {"n": -1}, ValueError, "at least 0, not -1"),
    (keep.BestN, BEST | {"n": 1.5}, ValueError, "not 1.5"),
    (keep.BestN, BEST | {"reverse": "loss"}, TypeError, "reverse must be True or False"),
    (keep.LatestDuration, {"duration": 5}, TypeError, "duration must be of type timedelta"),
    (keep.LatestDuration, {"duration": datetime.timedelta(-1)}, ValueError, "not be negative"),
    (keep.AnyPreservationPolicy, {"policies": []}, ValueError, "at least one to say what is kept"),
    (keep.AnyPreservationPolicy, {"policies": 1}, TypeError, "a sequence of policies, not 1"),
    (keep.AllPreservationPolicy, {"policies": [1]}, TypeError, "should_preserve, or be a function"),
    (training.CheckpointMetadata, {"step": 1.5, "path": "/x", "metadata": None}, TypeError, "1.5"),
]


@pytest.mark.parametrize(("make", "values", "error", "text"), REFUSED)
def test_what_can_not_work_is_refused_when_it_is_made(
    make: Callable[..., Any], values: dict[str, Any], error: type[Exception], text: str
) -> None:
    """Bad values are refused at once, by name, and not in the middle of a run."""
    with pytest.raises(error, match=re.escape(text)):
        make(**values)


def test_numbers_may_come_from_numpy() -> None:
    """NumPy integers and whole floats are numbers of steps, and kept as Python's."""
    policy = keep.EveryNSteps(np.int32(4), max_to_keep=np.int64(2))  # type: ignore[arg-type]
    assert (policy.interval_steps, type(policy.interval_steps)) == (4, int)
    assert save.FixedIntervalPolicy(1e3) == save.FixedIntervalPolicy(1000)  # type: ignore[arg-type]
    assert training.CheckpointMetadata(np.int64(3), "/x", metadata=None).step == 3  # type: ignore[arg-type]


def test_policies_are_values() -> None:
    """Policies can't be changed, compare by what they say, and can be pickled."""
    policy = save.AnySavePolicy([save.InitialSavePolicy(), save.FixedIntervalPolicy(3)])
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert keep.CustomSteps([3, 1]) == keep.CustomSteps({1, 3})
    assert hash(policy) == hash(save.AnySavePolicy(policy.policies))
    for one, name in ((policy, "policies"), (keep.LatestN(3), "n"), (context(), "now")):
        with pytest.raises(AttributeError):
            setattr(one, name, 1)


# ----------------------------------------------------------------------------- save policies


def test_a_skip_says_which_policies_said_no() -> None:
    """A decision names the policy that saves, or all of those that do not."""
    policy = save.AnySavePolicy([save.FixedIntervalPolicy(4), save.PreemptionCheckpointingPolicy()])
    asked = save.decide(policy, checkpoint(3), [], context=context())
    assert (asked.is_saved, str(asked)) == (
        False,
        "skipped: FixedIntervalPolicy(interval=4), PreemptionCheckpointingPolicy()",
    )
    asked = save.decide(policy, checkpoint(4), [], context=context(is_preempted=True))
    assert str(asked) == "saved: FixedIntervalPolicy(interval=4)"
    asked = save.decide(policy, checkpoint(5), [], context=context(is_preempted=True))
    assert str(asked) == "saved: PreemptionCheckpointingPolicy()"
    asked = save.decide(save.AnySavePolicy([]), checkpoint(4), [], context=context())
    assert str(asked) == "skipped: no policies"


def test_all_of_several_policies_must_save() -> None:
    """AllSavePolicy is the other composition; it stops at the first policy that says no."""
    asked: list[int] = []

    def spy(step: Any, previous_steps: Any, *, context: Any) -> bool:
        asked.append(step.step)
        return step.step > 4

    policy = save.AllSavePolicy([save.FixedIntervalPolicy(2), spy])
    saved = [step for step in range(9) if policy(checkpoint(step), [], context=context())]
    assert saved == [6, 8]
    assert asked == [0, 2, 4, 6, 8]
    why = save.decide(policy, checkpoint(4), [], context=context()).why
    assert why == "test_all_of_several_policies_must_save.<locals>.spy"
    both = save.decide(policy, checkpoint(6), [], context=context()).why
    assert both == f"FixedIntervalPolicy(interval=2), {why}"


def test_a_policy_of_ours_may_be_built_upon() -> None:
    """A subclass may decide otherwise, and keep count of what it is asked."""

    class Patient(save.FixedIntervalPolicy):
        def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
            vars(self).setdefault("asked", 0)
            self.asked += 1  # type: ignore[attr-defined]
            return super().should_save(step, previous_steps, context=context) and self.asked > 2

    policy = Patient(2)
    asked = [policy(checkpoint(step), [], context=context()) for step in range(5)]
    assert asked == [False, False, True, False, True]
    with pytest.raises(ValueError, match="interval must be a whole number"):
        Patient(0)


def test_any_stops_at_the_first_policy_that_saves() -> None:
    """The order of policies is the order of asking."""

    def never(*_: Any, **__: Any) -> bool:
        raise AssertionError("asked")

    policy = save.AnySavePolicy([save.FixedIntervalPolicy(1), never])
    assert policy.should_save(checkpoint(3), [], context=context())
    with pytest.raises(AssertionError, match="asked"):
        save.AllSavePolicy(policy.policies).should_save(checkpoint(3), [], context=context())


def test_a_policy_that_must_be_awaited_is_refused() -> None:
    """A coroutine is true: a policy written as one would save each step and keep every one."""

    async def decide(*_: Any, **__: Any) -> bool:
        return False

    with pytest.raises(TypeError, match="decide is asynchronous; a policy must decide"):
        save.decide(decide, checkpoint(1), [], context=context())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decide is asynchronous; a policy must decide"):
        training.retain(decide, [checkpoint(1)])  # type: ignore[arg-type]


def test_the_default_saves_whenever_nothing_is_being_saved() -> None:
    """The first step, a preemption, and any step while no save runs."""
    previous = [checkpoint(0)]
    for before, state, is_saved in (
        ([], context(is_saving=True), True),
        (previous, context(), True),
        (previous, context(is_saving=True), False),
        (previous, context(is_saving=True, is_preempted=True), True),
    ):
        assert save.decide(save.DEFAULT, checkpoint(1), before, context=state).is_saved is is_saved


# --------------------------------------------------------------------- preservation policies


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("reverse", [False, True])
def test_a_metric_that_is_no_number_is_the_worst(seed: int, reverse: bool) -> None:
    """NaN loses to every number wherever it stands; of several, the later counts as better."""
    rng = np.random.default_rng(seed)
    values = [float(one) for one in rng.permutation(6)]
    for place in sorted(rng.integers(0, 7, 3)):
        values.insert(int(place), NAN)
    run = [checkpoint(step, {"loss": value}) for step, value in enumerate(values)]
    policy = keep.BestN(get_metric_fn=get_loss, reverse=reverse, n=4)
    best = sorted((v for v in values if v == v), reverse=not reverse)[:4]
    assert kept(policy, run) == [step for step, value in enumerate(values) if value in best]
    beyond = dataclasses.replace(policy, n=7)
    nans = [step for step, value in enumerate(values) if value != value]
    assert [step for step in nans if step not in kept(beyond, run)] == nans[:2]


def test_of_equal_metrics_the_later_are_kept() -> None:
    """Ties go to the later step, whether more or less is better; steps without metrics stay."""
    run = [checkpoint(step, {"loss": 1.0}) for step in range(4)] + [checkpoint(4)]
    for reverse in (False, True):
        policy = keep.BestN(get_metric_fn=get_loss, reverse=reverse, n=2)
        assert kept(policy, run) == [2, 3, 4]
        only = dataclasses.replace(policy, keep_checkpoints_without_metrics=False)
        assert kept(only, run) == [2, 3]


def test_metrics_may_be_compared_by_several_values() -> None:
    """What `get_metric_fn` returns is only compared: a tuple decides ties by its second value."""
    run = [checkpoint(step, {"loss": 1, "size": size}) for step, size in enumerate([3, 9, 5])]
    policy = keep.BestN(get_metric_fn=lambda m: (m["loss"], m["size"]), n=1)
    assert kept(policy, run) == [1]


def test_metrics_that_lack_the_one_compared_name_their_step() -> None:
    """An error in `get_metric_fn` keeps its type and says at which step and metrics it arose."""
    run = [checkpoint(0, {"loss": 1}), checkpoint(1, {"acc": 2}), checkpoint(2, {"loss": 3})]
    with pytest.raises(KeyError) as caught:
        kept(keep.BestN(get_metric_fn=get_loss, n=1), run)
    assert caught.value.__notes__ == ["get_loss failed on the metrics of step 1: {'acc': 2}"]
    with pytest.raises(TypeError, match=r"returned None for the metrics of step 0: \{'loss': 1\}"):
        kept(keep.BestN(get_metric_fn=lambda metrics: None, n=1), run)


def test_ages_count_from_the_time_that_is_given() -> None:
    """LatestDuration asks the clock unless its context says what time it is."""
    run = [checkpoint(step, secs=10 * step) for step in range(6)]
    policy = keep.LatestDuration(datetime.timedelta(seconds=20))
    now = keep.PreservationContext(now=START + datetime.timedelta(seconds=55))
    assert training.retain(policy, run, context=now).kept == (4, 5)
    assert training.retain(policy, run).kept == ()


def test_all_and_any_of_several_policies() -> None:
    """Kept is what any, or what all, of several policies keep; plain functions are among them."""

    def even(checkpoints: Any, *, context: Any) -> list[bool]:
        return [one.step % 2 == 0 for one in checkpoints]

    run = [checkpoint(step) for step in range(8)]
    several = [keep.LatestN(3), even]
    assert kept(keep.AnyPreservationPolicy(several), run) == [0, 2, 4, 5, 6, 7]
    assert kept(keep.AllPreservationPolicy(several), run) == [6]
    nested = keep.AllPreservationPolicy([keep.AnyPreservationPolicy(several), keep.LatestN(5)])
    assert kept(nested, run) == [4, 5, 6, 7]
    assert nested(run, context=keep.PreservationContext()) == [one.step > 3 for one in run]
    name = even.__qualname__
    assert [one.why_kept for one in training.retain(nested, run).steps][2:6] == [
        "LatestN(n=5)",
        f"LatestN(n=3), {name}",
        f"{name}, LatestN(n=5)",
        "LatestN(n=3), LatestN(n=5)",
    ]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_an_answer_too_few_or_too_many_deletes_nothing(count: int) -> None:
    """A policy must say one thing of each checkpoint, alone and among others."""

    def wrong(checkpoints: Any, *, context: Any) -> list[bool]:
        return [False] * count

    run = [checkpoint(step) for step in range(3)]
    for policy in (wrong, keep.AnyPreservationPolicy([keep.LatestN(1), wrong])):
        with pytest.raises(ValueError, match=rf"wrong was asked about 3 .* gave {count} answers"):
            training.retain(policy, run)


def test_answers_may_be_arrays() -> None:
    """A policy may answer with a NumPy array; what comes out are Python's own."""
    policy = lambda checkpoints, *, context: np.arange(len(checkpoints)) > 1  # noqa: E731
    verdicts = keep.judge(policy, [checkpoint(step) for step in range(4)])
    assert [one.is_kept for one in verdicts] == [False, False, True, True]
    assert all(type(one.is_kept) is bool for one in verdicts)


def test_long_histories_are_quick_to_judge() -> None:
    """No policy compares every checkpoint with every other: it looks at each a few times."""
    looks = 0

    class Counting:
        """A checkpoint that counts how often it is looked at."""

        def __init__(self, step: int) -> None:
            self._step = step

        def __getattr__(self, name: str) -> Any:
            nonlocal looks
            looks += 1
            value = {"step": self._step, "metrics": self._step % 97}
            return value.get(name, START + datetime.timedelta(seconds=self._step))

    run = [Counting(step) for step in range(5000)]
    for policy in (
        keep.LatestN(9),
        keep.EveryNSeconds(7),
        keep.EveryNSteps(7, False, 50),
        keep.EveryNStepsClosest(7, 50),
        keep.CustomSteps(range(10**12)),
        keep.BestN(get_metric_fn=lambda metrics: metrics, n=50),
        keep.LatestDuration(datetime.timedelta(1)),
    ):
        looks = 0
        assert len(keep.judge(policy, run)) == len(run)
        assert looks <= 3 * len(run), policy


# -------------------------------------------------------------------------------------- plan


def test_a_plan_prints_as_a_table() -> None:
    """A plan says of each step whether it is saved and kept, and which policies said so."""
    plan = training.plan(
        range(0, 60, 10),
        save_decision_policy=save.AnySavePolicy(
            [save.FixedIntervalPolicy(20), save.PreemptionCheckpointingPolicy()]
        ),
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(1), keep.EveryNSteps(40)]),
        preempted_at={50},
    )
    assert str(plan) == (
        """\
step  saved                                                                  kept
   0  yes: FixedIntervalPolicy(interval=20)                                  yes: EveryNSteps(interval_steps=40)
  10  no: FixedIntervalPolicy(interval=20), PreemptionCheckpointingPolicy()
  20  yes: FixedIntervalPolicy(interval=20)                                  deleted after 40: LatestN(n=1), EveryNSteps(interval_steps=40)
  30  no: FixedIntervalPolicy(interval=20), PreemptionCheckpointingPolicy()
  40  yes: FixedIntervalPolicy(interval=20)                                  yes: EveryNSteps(interval_steps=40)
  50  yes: PreemptionCheckpointingPolicy()                                   yes: LatestN(n=1)"""  # noqa: E501
    )
    assert (plan.saved, plan.skipped) == ((0, 20, 40, 50), (10, 30))
    assert (plan.kept, plan.deleted) == ((0, 40, 50), (20,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.steps = ()  # type: ignore[misc]


def test_the_plan_of_a_run_that_goes_on() -> None:
    """Existing checkpoints count as previous, are judged by each save and keep their times."""
    before = [checkpoint(step) for step in (10, 0, 20)]
    every = save.ContinuousCheckpointingPolicy(minimum_interval_secs=4)
    plan = training.plan(
        range(21, 30),
        save_decision_policy=every,
        preservation_policy=keep.LatestN(3),
        existing=before,
        step_secs=2,
    )
    assert plan.saved == (0, 10, 20, 22, 24, 26, 28)
    assert plan.kept == (24, 26, 28)
    gone = {one.step: one.deleted_after for one in plan.steps if one.deleted_after is not None}
    assert gone == {0: 22, 10: 24, 20: 26, 22: 28}
    assert [one.why_saved for one in plan.steps[:4]] == [
        "it was there before",
        "it was there before",
        "it was there before",
        "ContinuousCheckpointingPolicy(minimum_interval_secs=4)",
    ]
    idle = training.plan([21], save_decision_policy=save.AnySavePolicy([]), existing=before)
    assert idle.kept == (0, 10, 20)
    assert {one.why_kept for one in idle.steps} == {"nothing was saved", ""}


def test_a_step_below_the_last_is_skipped() -> None:
    """A run saves no step below its latest, as the table says."""
    plan = training.plan([5, 3, 6])
    assert plan.saved == (5, 6)
    assert plan.steps[1].why_saved == (
        "step 5 is there already, and later; force=True saves it anyway"
    )


def test_a_plan_takes_metrics_and_times() -> None:
    """Metrics come from a mapping, a function or the steps themselves, and times from the steps."""
    policy = keep.BestN(get_metric_fn=get_loss, reverse=True, n=2)
    losses = {step: {"loss": (step - 3) ** 2} for step in range(8)}
    steps = [checkpoint(step, losses[step], secs=step * 100) for step in losses]
    plans = [
        training.plan(range(8), preservation_policy=policy, metrics=losses),
        training.plan(range(8), preservation_policy=policy, metrics=losses.__getitem__),
        training.plan(steps, preservation_policy=policy),
    ]
    assert [plan.kept for plan in plans] == [(3, 4)] * 3
    spaced = training.plan(steps, preservation_policy=keep.EveryNSeconds(250))
    assert spaced.kept == (0, 3, 6)
    recent = keep.LatestDuration(datetime.timedelta(seconds=250))
    assert training.plan(steps, preservation_policy=recent).kept == (5, 6, 7)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"steps": [1, 1]}, ValueError, "step 1 occurs twice"),
        ({"steps": [1], "existing": [checkpoint(1)]}, ValueError, "step 1 occurs twice"),
        ({"steps": [], "existing": [checkpoint(1)] * 2}, ValueError, "step 1 occurs twice among"),
        ({"steps": ["a"]}, TypeError, "a step must be an integer, not 'a'"),
        ({"steps": [1], "step_secs": -1}, ValueError, "step_secs"),
        ({"steps": [1], "metrics": 3}, TypeError, "metrics must be a mapping or a function, not 3"),
        ({"steps": [1], "save_decision_policy": 3}, TypeError, "should_save, or be a function"),
        ({"steps": [1], "preservation_policy": 3}, TypeError, "should_preserve, or be a function"),
    ],
)
def test_a_plan_refuses_what_makes_no_run(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    """Steps that occur twice, and arguments of the wrong kind."""
    with pytest.raises(error, match=text):
        training.plan(**arguments)


def test_a_plan_asks_each_policy_once_for_each_step() -> None:
    """Policies that count or remember see a run as they would see the real one."""
    asked: list[tuple[Any, ...]] = []

    def saving(step: Any, previous_steps: Any, *, context: Any) -> bool:
        asked.append(("save", step.step, [one.step for one in previous_steps]))
        return True

    def keeping(checkpoints: Any, *, context: Any) -> list[bool]:
        asked.append(("keep", [one.step for one in checkpoints]))
        return [one.step != 0 for one in checkpoints]

    training.plan(
        range(3),
        save_decision_policy=save.AnySavePolicy([saving]),
        preservation_policy=keep.AnyPreservationPolicy([keeping]),
    )
    assert asked == [
        ("save", 0, []),
        ("keep", [0]),
        ("save", 1, []),
        ("keep", [1]),
        ("save", 2, [1]),
        ("keep", [1, 2]),
    ]


def test_an_existing_run_can_be_judged(tmp_path: Path) -> None:
    """What lies in a directory is judged by what its steps say of themselves."""
    for step in range(5):
        (tmp_path / str(step) / "metrics").mkdir(parents=True)
        (tmp_path / str(step) / "metrics" / "metrics").write_text(json.dumps({"loss": step % 3}))
    found = ocp.path.step.standard_name_format().find_all(tmp_path)
    policy = keep.BestN(get_metric_fn=get_loss, n=2)
    report = training.retain(policy, reversed(list(found)))
    assert (report.kept, report.deleted) == ((2, 4), (0, 1, 3))
    assert str(report).splitlines()[-2:] == [
        "   3  yes: it was there before  deleted: BestN(n=2)",
        "   4  yes: it was there before  yes: BestN(n=2)",
    ]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["0", "1", "2", "3", "4"]
