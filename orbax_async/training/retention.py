"""What policies come to: which step is due, which checkpoints go, and what becomes of a whole run.

Nothing here saves or deletes, or asks the clock more than once.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from orbax_async.options import MultiprocessingOptions
from orbax_async.options._group import number
from orbax_async.path.step import as_step
from orbax_async.training import preservation_policies, save_decision_policies
from orbax_async.training.policy import CheckpointInfo
from orbax_async.training.preservation_policies import PreservationContext, PreserveAll, judge
from orbax_async.training.save_decision_policies import DEFAULT, Decision, DecisionContext, decide

__all__ = ["Plan", "PlannedStep", "due", "plan", "retain"]

SavePolicy: TypeAlias = save_decision_policies.AnyPolicy
KeepPolicy: TypeAlias = preservation_policies.AnyPolicy


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """What becomes of a step.

    Attributes:
      step: its number.
      is_saved: whether it is saved, or was there before.
      why_saved: why, or why not.
      is_kept: whether it is there in the end.
      why_kept: why, or why not; empty for a step that was not saved.
      deleted_after: the step after whose save it goes, if that is known.
    """

    step: int
    is_saved: bool
    why_saved: str
    is_kept: bool = False
    why_kept: str = ""
    deleted_after: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of steps; printed, a table.

    Attributes:
      steps: what becomes of each: those that were there before, then the run's, in their order.
    """

    steps: tuple[PlannedStep, ...]

    @property
    def saved(self) -> tuple[int, ...]:
        """The steps that are saved, or were there before."""
        return tuple(one.step for one in self.steps if one.is_saved)

    @property
    def skipped(self) -> tuple[int, ...]:
        """The steps that are not saved."""
        return tuple(one.step for one in self.steps if not one.is_saved)

    @property
    def kept(self) -> tuple[int, ...]:
        """The steps that are there in the end."""
        return tuple(one.step for one in self.steps if one.is_kept)

    @property
    def deleted(self) -> tuple[int, ...]:
        """The steps that are there first and go then."""
        return tuple(one.step for one in self.steps if one.is_saved and not one.is_kept)

    def __str__(self) -> str:
        rows = [("step", "saved", "kept")]
        for one in self.steps:
            after = "" if one.deleted_after is None else f" after {one.deleted_after}"
            kept = f"yes: {one.why_kept}" if one.is_kept else f"deleted{after}: {one.why_kept}"
            saved = f"{'yes' if one.is_saved else 'no'}: {one.why_saved}"
            rows.append((str(one.step), saved, kept if one.is_saved else ""))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def due(
    policy: SavePolicy,
    step: CheckpointInfo,
    present: Iterable[CheckpointInfo],
    *,
    context: DecisionContext,
    force: bool = False,
) -> Decision:
    """Says whether a run saves a step.

    Args:
      policy: a save policy, or a plain function of the same arguments.
      step: the step at hand.
      present: the steps that the run has, or is saving, in ascending order.
      context: given to the policy.
      force: whether the step is saved whatever the policy says, and even if a later one is there.
    """
    if force:
        return Decision(True, "force=True")
    previous = [one for one in present if one.step != step.step]
    if previous and step.step < previous[-1].step:
        return Decision(
            False,
            f"step {previous[-1].step} is there already, and later; force=True saves it anyway",
        )
    return decide(policy, step, previous, context=context)


def retain(
    policy: KeepPolicy,
    checkpoints: Iterable[CheckpointInfo],
    *,
    context: PreservationContext | None = None,
) -> Plan:
    """Says which of a run's checkpoints a policy keeps, and why.

    Example:
      ::

        found = path.step.standard_name_format().find_all("/run")
        print(training.retain(LatestN(3), found))

    Args:
      policy: a preservation policy, or a plain function of the same arguments.
      checkpoints: the run's checkpoints, in any order; what is found in a directory reads what
        the policy asks for.
      context: given to the policy.

    Raises:
      TypeError: the policy is none.
      ValueError: two checkpoints have the same step, or the policy does not say one thing of each.
    """
    present = _ordered(checkpoints)
    verdicts = judge(policy, present, context=context)
    return Plan(
        tuple(
            PlannedStep(one.step, True, _BEFORE, verdict.is_kept, verdict.why)
            for one, verdict in zip(present, verdicts, strict=True)
        )
    )


def plan(  # noqa: PLR0913 - a public tool for people
    steps: Iterable[int | CheckpointInfo],
    *,
    save_decision_policy: SavePolicy | None = None,
    preservation_policy: KeepPolicy | None = None,
    existing: Iterable[CheckpointInfo] = (),
    metrics: Callable[[int], Any] | Mapping[int, Any] | None = None,
    step_secs: float = 1.0,
    preempted_at: Container[int] = (),
) -> Plan:
    """Says which steps of a run would be saved and kept, and why, without a run.

    Each step asks the save policy. Each save asks the preservation policy, and what that gives up
    is gone for the next step. A save is taken to have ended before the next step begins.

    Example:
      ::

        print(training.plan(
            range(0, 100, 10),
            save_decision_policy=save_decision_policies.FixedIntervalPolicy(20),
            preservation_policy=preservation_policies.LatestN(2),
        ))

    Args:
      steps: the steps at which the run would call `save`, in order: numbers, or anything with a
        `step`, a `time` and `metrics`.
      save_decision_policy: a policy, or a plain function of the same arguments; None for the
        default, which saves whenever no save is running.
      preservation_policy: likewise; None keeps all.
      existing: the checkpoints that the run begins with.
      metrics: the metrics of the steps that are given as numbers.
      step_secs: how long after the step before it a step comes that is given as a number; the
        first of all comes now.
      preempted_at: the steps at which the job is about to be preempted.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: a step occurs twice, or a policy does not say one thing of each checkpoint.
    """
    saving = DEFAULT if save_decision_policy is None else save_decision_policy
    keeping = PreserveAll() if preservation_policy is None else preservation_policy
    present = _ordered(existing)
    planned = {one.step: PlannedStep(one.step, True, _BEFORE, True, _UNASKED) for one in present}
    for now in _timed(steps, present[-1:], metrics, step_secs):
        if now.step in planned:
            raise ValueError(f"step {now.step} occurs twice; a run saves each step once")
        context = DecisionContext(
            is_saving_in_progress=False,
            reached_preemption=now.step in preempted_at,
            multiprocessing_options=MultiprocessingOptions(),
        )
        decision = due(saving, now, present, context=context)
        planned[now.step] = PlannedStep(now.step, decision.is_saved, decision.why)
        if decision.is_saved:
            present = _kept(keeping, [*present, now], planned)
    return Plan(tuple(planned.values()))


def _kept(
    policy: KeepPolicy, present: list[CheckpointInfo], planned: dict[int, PlannedStep]
) -> list[CheckpointInfo]:
    """Returns what a policy keeps once the last of some checkpoints is saved, and notes why."""
    now = present[-1]
    verdicts = judge(policy, present, context=PreservationContext(now=now.time))
    for one, verdict in zip(present, verdicts, strict=True):
        planned[one.step] = dataclasses.replace(
            planned[one.step],
            is_kept=verdict.is_kept,
            why_kept=verdict.why,
            deleted_after=None if verdict.is_kept else now.step,
        )
    return [one for one in present if planned[one.step].is_kept]


_BEFORE = "it was there before"
_UNASKED = "nothing was saved"


def _ordered(checkpoints: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
    ordered = sorted(checkpoints, key=lambda one: one.step)
    for one, following in itertools.pairwise(ordered):
        if one.step == following.step:
            raise ValueError(f"step {one.step} occurs twice among the checkpoints")
    return ordered


def _timed(
    steps: Iterable[int | CheckpointInfo],
    before: Sequence[CheckpointInfo],
    metrics: Callable[[int], Any] | Mapping[int, Any] | None,
    step_secs: float,
) -> Iterator[CheckpointInfo]:
    """Yields each step with its time and metrics."""
    pace = datetime.timedelta(seconds=number(at_least=0)("step_secs", step_secs))
    last = before[-1].time if before else datetime.datetime.now(tz=datetime.UTC) - pace
    of = metrics.get if isinstance(metrics, Mapping) else metrics or (lambda step: None)
    if not callable(of):
        raise TypeError(f"metrics must be a mapping or a function, not {metrics!r}")
    for each in steps:
        now: Any = each
        if not hasattr(each, "step"):
            step = as_step(each)
            now = types.SimpleNamespace(step=step, time=last + pace, metrics=of(step))
        last = now.time
        yield now
