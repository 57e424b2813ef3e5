"""When a step is saved.

    policy = AnySavePolicy([FixedIntervalPolicy(1000), PreemptionCheckpointingPolicy()])

A policy is anything with the method `should_save` of `SaveDecisionPolicy`, or a plain function of
the same arguments; those here are both. They only decide: the clock is in the steps they are given,
and all else in the context. Among several processes the primary decides for all.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from orbax_async.options import MultiprocessingOptions
from orbax_async.options._group import FROM_1, number, option
from orbax_async.training import policy as shared
from orbax_async.training.policy import CheckpointInfo

__all__ = [
    "DEFAULT",
    "AllSavePolicy",
    "AnySavePolicy",
    "ContinuousCheckpointingPolicy",
    "Decision",
    "DecisionContext",
    "FixedIntervalPolicy",
    "InitialSavePolicy",
    "PreemptionCheckpointingPolicy",
    "SaveDecisionPolicy",
    "SpecificStepsPolicy",
    "decide",
]

Info: TypeAlias = CheckpointInfo
Infos: TypeAlias = Sequence[CheckpointInfo]


@dataclass(frozen=True, kw_only=True)
class DecisionContext:
    """What a policy may need to know beside the steps.

    Attributes:
      is_saving_in_progress: whether an earlier step is still being saved.
      reached_preemption: whether the job is about to be preempted.
      multiprocessing_options: which processes take part.
    """

    is_saving_in_progress: bool
    reached_preemption: bool
    multiprocessing_options: MultiprocessingOptions


@runtime_checkable
class SaveDecisionPolicy(Protocol):
    """Decides when a step is saved.

    Example:
      ::

        class WhenMetricsAreNew(SaveDecisionPolicy):
            def should_save(self, step, previous_steps, *, context):
                return not previous_steps or step.metrics != previous_steps[-1].metrics
    """

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save.

        Args:
          step: the step at hand; its time is now.
          previous_steps: the run's checkpoints, the latest last.
          context: all else that there is to know.
        """
        ...


AnyPolicy: TypeAlias = SaveDecisionPolicy | Callable[..., bool]


@dataclass(frozen=True)
class Decision:
    """Whether a step is saved.

    Attributes:
      is_saved: whether it is.
      why: the policies that said so, or what else did.
    """

    is_saved: bool
    why: str

    def __str__(self) -> str:
        return f"{'saved' if self.is_saved else 'skipped'}: {self.why}"

    def __bool__(self) -> bool:
        return self.is_saved


def decide(
    policy: AnyPolicy, step: Info, previous_steps: Infos, *, context: DecisionContext
) -> Decision:
    """Asks a policy, or a plain function, whether a step is saved, and notes why.

    Raises:
      TypeError: it is no policy, or one that must be awaited.
    """

    def ask(one: Any) -> list[bool]:
        method = getattr(one, "should_save", None)
        if method is not None:  # as Orbax calls it: users' policies may take it by keyword alone
            answer = method(step, previous_steps=previous_steps, context=context)
        else:
            answer = one(step, previous_steps, context=context)
        return [shared.decided(one, answer)]

    (opinion,) = shared.judge(policy, "should_save", ask)
    return Decision(*opinion)


class _Policy(shared.Policy):
    """A policy that can be used as a plain function, too."""

    def __call__(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        return decide(self, step, previous_steps, context=context).is_saved


@dataclass(frozen=True)
class FixedIntervalPolicy(_Policy):
    """Saves every step that is divisible by an interval.

    Attributes:
      interval: in steps; at least 1.
    """

    interval: int = field(metadata={"check": FROM_1})

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return step.step % self.interval == 0


def _collection(name: str, value: Any) -> Any:
    if isinstance(value, (str, bytes, Iterator)) or not isinstance(value, Container):
        raise TypeError(f"{name} must be a collection of ints, such as a set: {value!r}")
    return value


@dataclass(frozen=True)
class SpecificStepsPolicy(_Policy):
    """Saves the steps of a collection.

    Attributes:
      steps: the collection, such as a set or a range.
    """

    steps: Container[int] = field(metadata={"check": _collection})

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return step.step in self.steps


@dataclass(frozen=True, kw_only=True)
class ContinuousCheckpointingPolicy(_Policy):
    """Saves as often as it can: whenever no save is running.

    Attributes:
      minimum_interval_secs: how long after the last checkpoint the next one comes at the earliest.
    """

    minimum_interval_secs: float | None = option(default=None, check=number(at_least=0))

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        if context.is_saving_in_progress:
            return False
        if not previous_steps or self.minimum_interval_secs is None:
            return True
        interval = datetime.timedelta(seconds=self.minimum_interval_secs)
        return step.time - previous_steps[-1].time >= interval


@dataclass(frozen=True)
class InitialSavePolicy(_Policy):
    """Saves when the run has no checkpoint yet."""

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return not previous_steps


@dataclass(frozen=True)
class PreemptionCheckpointingPolicy(_Policy):
    """Saves when the job is about to be preempted."""

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return context.reached_preemption


@dataclass(frozen=True)
class _Several(shared.Several, _Policy):
    _method = "should_save"
    _fate = "saved"
    _stops_early = True

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return decide(self, step, previous_steps, context=context).is_saved


@dataclass(frozen=True)
class AnySavePolicy(_Several):
    """Saves when one of several policies does; the first that does ends the asking.

    Attributes:
      policies: policies and plain functions, in the order in which they are asked. Without any,
        nothing is ever saved.
    """

    policies: Sequence[AnyPolicy]
    _is_decisive = True
    _may_be_empty = True


@dataclass(frozen=True)
class AllSavePolicy(_Several):
    """Saves when every one of several policies does; the first that does not ends the asking.

    Attributes:
      policies: policies and plain functions, in the order in which they are asked; at least one.
    """

    policies: Sequence[AnyPolicy]
    _is_decisive = False


DEFAULT = AnySavePolicy(
    [InitialSavePolicy(), ContinuousCheckpointingPolicy(), PreemptionCheckpointingPolicy()]
)
