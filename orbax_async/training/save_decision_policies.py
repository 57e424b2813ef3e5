"""When a step is saved.

    policy = AnySavePolicy([FixedIntervalPolicy(1000), PreemptionCheckpointingPolicy()])

A policy is anything with the method `should_save` of `SaveDecisionPolicy`, or a plain function of
the same arguments; those here are both. They only decide: the clock is in the steps they are given,
and all else in the context. Among several processes the primary decides for all.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from orbax_async.options import MultiprocessingOptions
from orbax_async.options._group import number, optional, whole
from orbax_async.training.checkpoint_info import CheckpointInfo, named

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


@dataclasses.dataclass(frozen=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True)
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
    if isinstance(policy, _Several):
        asked = []
        for each in policy.policies:
            asked.append(decide(each, step, previous_steps, context=context))
            if asked[-1].is_saved is policy._decisive:
                return asked[-1]
        return Decision(not policy._decisive, ", ".join(one.why for one in asked) or "no policies")
    check_policy("policy", policy)
    method: Any = getattr(policy, "should_save", None)
    if method is not None:  # as Orbax calls it: users' policies may take it by keyword alone
        answer = method(step, previous_steps=previous_steps, context=context)
    else:
        function: Any = policy
        answer = function(step, previous_steps, context=context)
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError(f"{named(policy)} is asynchronous; a policy must decide without waiting")
    return Decision(bool(answer), named(policy))


def check_policy(name: str, value: Any) -> None:
    """Raises TypeError if `value` is neither a policy nor a function."""
    if isinstance(value, type) or not (callable(value) or isinstance(value, SaveDecisionPolicy)):
        raise TypeError(f"{name} must have a method should_save, or be a function, not {value!r}")


class _Callable:
    """Lets a policy be used as a plain function."""

    def __call__(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        return decide(self, step, previous_steps, context=context).is_saved


@dataclasses.dataclass(frozen=True)
class FixedIntervalPolicy(_Callable):
    """Saves every step that is divisible by an interval.

    Attributes:
      interval: in steps; at least 1.
    """

    interval: int

    def __post_init__(self) -> None:
        _keep(self, interval=whole(at_least=1)("interval", self.interval))

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return step.step % self.interval == 0


@dataclasses.dataclass(frozen=True)
class SpecificStepsPolicy(_Callable):
    """Saves the steps of a collection.

    Attributes:
      steps: the collection, such as a set or a range.
    """

    steps: Container[int]

    def __post_init__(self) -> None:
        refused = isinstance(self.steps, (str, bytes, Iterator))
        if refused or not isinstance(self.steps, Container):
            raise TypeError(f"steps must be a collection of ints, such as a set: {self.steps!r}")

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return step.step in self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousCheckpointingPolicy(_Callable):
    """Saves as often as it can: whenever no save is running.

    Attributes:
      minimum_interval_secs: how long after the last checkpoint the next one comes at the earliest.
    """

    minimum_interval_secs: float | None = None

    def __post_init__(self) -> None:
        check = optional(number(at_least=0))
        secs = check("minimum_interval_secs", self.minimum_interval_secs)
        _keep(self, minimum_interval_secs=secs)

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        if context.is_saving_in_progress:
            return False
        if not previous_steps or self.minimum_interval_secs is None:
            return True
        interval = datetime.timedelta(seconds=self.minimum_interval_secs)
        return step.time - previous_steps[-1].time >= interval


@dataclasses.dataclass(frozen=True)
class InitialSavePolicy(_Callable):
    """Saves when the run has no checkpoint yet."""

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return not previous_steps


@dataclasses.dataclass(frozen=True)
class PreemptionCheckpointingPolicy(_Callable):
    """Saves when the job is about to be preempted."""

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return context.reached_preemption


@dataclasses.dataclass(frozen=True)
class _Several(_Callable):
    policies: Sequence[AnyPolicy]
    _decisive: ClassVar[bool]  # the answer of one policy that is the answer of all

    def __post_init__(self) -> None:
        if not isinstance(self.policies, Iterable):
            raise TypeError(f"policies must be a sequence of policies, not {self.policies!r}")
        _keep(self, policies=tuple(self.policies))
        for each in self.policies:
            check_policy("each of policies", each)

    def should_save(self, step: Info, previous_steps: Infos, *, context: DecisionContext) -> bool:
        """Says whether to save."""
        return decide(self, step, previous_steps, context=context).is_saved


@dataclasses.dataclass(frozen=True)
class AnySavePolicy(_Several):
    """Saves when one of several policies does; the first that does ends the asking.

    Attributes:
      policies: policies and plain functions, in the order in which they are asked. Without any,
        nothing is ever saved.
    """

    _decisive = True


@dataclasses.dataclass(frozen=True)
class AllSavePolicy(_Several):
    """Saves when every one of several policies does; the first that does not ends the asking.

    Attributes:
      policies: policies and plain functions, in the order in which they are asked; at least one.
    """

    _decisive = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.policies:
            raise ValueError("policies is empty: AllSavePolicy needs at least one policy")


def _keep(policy: object, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(policy, name, value)


DEFAULT = AnySavePolicy(
    [InitialSavePolicy(), ContinuousCheckpointingPolicy(), PreemptionCheckpointingPolicy()]
)
