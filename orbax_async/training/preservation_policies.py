"""Which checkpoints of a run are kept.

    policy = AnyPreservationPolicy([LatestN(3), EveryNSteps(10_000)])

A policy is anything with the method `should_preserve` of `PreservationPolicy`, or a plain function
of the same arguments; those here are both. It is asked after each save, with the new checkpoint
among those it is given, and answers True for each that is to be kept. It deletes nothing itself.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from orbax_async.options._group import FROM_0, FROM_1, each, function, instance_of, number, option
from orbax_async.training import policy as shared
from orbax_async.training.policy import CheckpointInfo, named

__all__ = [
    "AllPreservationPolicy",
    "AnyPreservationPolicy",
    "BestN",
    "CustomSteps",
    "EveryNSeconds",
    "EveryNSteps",
    "EveryNStepsClosest",
    "LatestDuration",
    "LatestN",
    "PreservationContext",
    "PreservationPolicy",
    "PreserveAll",
    "Verdict",
    "judge",
]

Infos: TypeAlias = Sequence[CheckpointInfo]


@dataclass(frozen=True, kw_only=True)
class PreservationContext:
    """What a policy may need to know beside the checkpoints.

    Attributes:
      now: the time that ages are counted from; None for the clock's.
    """

    now: datetime.datetime | None = None


@runtime_checkable
class PreservationPolicy(Protocol):
    """Decides which checkpoints are kept.

    Example:
      ::

        class KeepEvenSteps(PreservationPolicy):
            def should_preserve(self, checkpoints, *, context):
                return [checkpoint.step % 2 == 0 for checkpoint in checkpoints]
    """

    def should_preserve(
        self, checkpoints: Sequence[CheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Says of each checkpoint whether to keep it.

        Args:
          checkpoints: the run's checkpoints by ascending step.
          context: all else that there is to know.
        """
        ...


AnyPolicy: TypeAlias = PreservationPolicy | Callable[..., Sequence[bool]]


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is kept.

    Attributes:
      is_kept: whether it is.
      why: the policies that said so.
    """

    is_kept: bool
    why: str


def judge(
    policy: AnyPolicy, checkpoints: Infos, *, context: PreservationContext | None = None
) -> list[Verdict]:
    """Asks a policy, or a plain function, which checkpoints are kept, and notes why.

    Raises:
      TypeError: it is no policy, or one that must be awaited.
      ValueError: it does not say one thing of each checkpoint.
    """
    context = PreservationContext() if context is None else context

    def ask(one: Any) -> list[Any]:
        method = getattr(one, "should_preserve", one)
        answers = list(shared.decided(one, method(checkpoints, context=context)))
        if len(answers) != len(checkpoints):
            raise ValueError(
                f"{named(one)} was asked about {len(checkpoints)} checkpoints and gave "
                f"{len(answers)} answers; it must give one for each. Nothing was deleted"
            )
        return answers

    return [Verdict(*opinion) for opinion in shared.judge(policy, "should_preserve", ask)]


class _Policy(shared.Policy):
    """A policy that can be used as a plain function, too."""

    def __call__(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        return [verdict.is_kept for verdict in judge(self, checkpoints, context=context)]


@dataclass(frozen=True)
class PreserveAll(_Policy):
    """Keeps every checkpoint."""

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it."""
        return [True] * len(checkpoints)


@dataclass(frozen=True)
class LatestN(_Policy):
    """Keeps the last checkpoints.

    Attributes:
      n: how many; None for all.
    """

    n: int | None = option(default=None, check=FROM_0)

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it."""
        return _newest([True] * len(checkpoints), self.n)


@dataclass(frozen=True)
class EveryNSeconds(_Policy):
    """Keeps the first checkpoint, and each that comes some time after the last one kept.

    Attributes:
      interval_secs: that time.
    """

    interval_secs: float = field(metadata={"check": number(at_least=0)})

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it."""
        interval = datetime.timedelta(seconds=self.interval_secs)
        return _spaced([checkpoint.time for checkpoint in checkpoints], interval)


def _interval(name: str, value: Any) -> Any:
    if value == 0:
        raise ValueError(f"{name} must not be 0.")
    return FROM_1(name, value)


@dataclass(frozen=True)
class EveryNSteps(_Policy):
    """Keeps checkpoints at an interval of steps.

    Attributes:
      interval_steps: the interval; at least 1.
      exact_interval: whether to keep the steps that are divisible by it; otherwise the first, and
        each that comes at least so much after the last one kept.
      max_to_keep: how many of these to keep, the newest; None for all.
    """

    interval_steps: int = field(metadata={"check": _interval})
    exact_interval: bool = True
    max_to_keep: int | None = option(default=None, check=FROM_1)

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        if self.exact_interval:
            return _newest([step % self.interval_steps == 0 for step in steps], self.max_to_keep)
        return _newest(_spaced(steps, self.interval_steps), self.max_to_keep)


@dataclass(frozen=True)
class EveryNStepsClosest(_Policy):
    """Keeps, for each multiple of an interval, the step closest to it; and the last one.

    Of two steps equally close, the later is kept.

    Attributes:
      interval_steps: the interval; at least 1.
      max_to_keep: how many of these to keep, the newest; None for all.
    """

    interval_steps: int = field(metadata={"check": _interval})
    max_to_keep: int | None = option(default=None, check=FROM_1)

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it."""
        closest: dict[int, tuple[int, int]] = {}
        for index, checkpoint in enumerate(checkpoints):
            multiple = round(checkpoint.step / self.interval_steps)
            distance = abs(checkpoint.step - multiple * self.interval_steps)
            if multiple not in closest or distance <= closest[multiple][0]:
                closest[multiple] = (distance, index)
        kept = {index for _, index in closest.values()} | {len(checkpoints) - 1}
        return _newest([index in kept for index in range(len(checkpoints))], self.max_to_keep)


def _steps(name: str, value: Any) -> Any:
    return value if isinstance(value, range) else frozenset(each(FROM_0, set)(name, value))


@dataclass(frozen=True)
class CustomSteps(_Policy):
    """Keeps the steps of a collection.

    Attributes:
      steps: the collection, such as a list, a set or a range.
    """

    steps: Collection[int] = field(metadata={"check": _steps})

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it."""
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


@dataclass(frozen=True, kw_only=True)
class BestN(_Policy):
    """Keeps the checkpoints with the best metrics; of equals, the later.

    As long as there are no more than `n` checkpoints, all are kept. A metric that is not a number
    (NaN) is worse than any other.

    Example:
      ::

        BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=3)

    Attributes:
      get_metric_fn: takes what a step was saved with as its metrics, and returns what to compare.
      reverse: whether less is better.
      n: how many to keep; None for all, 0 for none, not even the one just saved.
      keep_checkpoints_without_metrics: whether to keep, beside those, every checkpoint that has
        no metrics. If there are more than `n`, and `n` is not 0.
    """

    get_metric_fn: Callable[[Any], Any] = field(repr=False, metadata={"check": function})
    reverse: bool = False
    n: int | None = option(default=None, check=FROM_0)
    keep_checkpoints_without_metrics: bool = True

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it.

        Raises:
          Exception: what `get_metric_fn` raises, with a note that names the step.
          TypeError: metrics can't be compared.
        """
        count = len(checkpoints)
        if self.n is None or count <= self.n:
            return [True] * count
        if self.n == 0:
            return [False] * count
        metrics = {
            index: self._metric(checkpoint)
            for index, checkpoint in enumerate(checkpoints)
            if checkpoint.metrics is not None
        }
        # The best last, the later of equals after the earlier; sorting keeps their order.
        ranked = [index for index, metric in metrics.items() if _is_nan(metric)]
        comparable = [index for index, metric in metrics.items() if not _is_nan(metric)]
        ranked += sorted(comparable, key=metrics.__getitem__, reverse=self.reverse)
        kept = set(ranked[-self.n :])
        if self.keep_checkpoints_without_metrics:
            kept.update(set(range(count)) - metrics.keys())
        return [index in kept for index in range(count)]

    def _metric(self, checkpoint: CheckpointInfo) -> Any:
        try:
            metric = self.get_metric_fn(checkpoint.metrics)
        except Exception as error:
            error.add_note(
                f"{named(self.get_metric_fn)} failed on the metrics of step {checkpoint.step}: "
                f"{checkpoint.metrics!r}"
            )
            raise
        if metric is None:
            raise TypeError(
                f"{named(self.get_metric_fn)} must return a number, and returned None for the "
                f"metrics of step {checkpoint.step}: {checkpoint.metrics!r}"
            )
        return metric


def _age(name: str, value: Any) -> Any:
    if instance_of(datetime.timedelta)(name, value) < datetime.timedelta(0):
        raise ValueError(f"{name} must not be negative, and is {value}")
    return value


@dataclass(frozen=True)
class LatestDuration(_Policy):
    """Keeps the first checkpoint that is not too old, and all that come after it.

    Attributes:
      duration: how old it may be.
    """

    duration: datetime.timedelta = field(metadata={"check": _age})

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it."""
        # Orbax's own context has no such field.
        now = getattr(context, "now", None) or datetime.datetime.now(tz=datetime.UTC)
        is_young, kept = False, []
        for checkpoint in checkpoints:
            is_young = is_young or now - checkpoint.time <= self.duration
            kept.append(is_young)
        return kept


@dataclass(frozen=True)
class _Several(shared.Several, _Policy):
    _method = "should_preserve"
    _fate = "kept"
    _stops_early = False

    def should_preserve(self, checkpoints: Infos, *, context: PreservationContext) -> list[bool]:
        """Says of each checkpoint whether to keep it."""
        return self(checkpoints, context=context)


@dataclass(frozen=True)
class AnyPreservationPolicy(_Several):
    """Keeps what any of several policies keeps.

    Attributes:
      policies: policies and plain functions; at least one.
    """

    policies: Sequence[AnyPolicy]
    _is_decisive = True


@dataclass(frozen=True)
class AllPreservationPolicy(_Several):
    """Keeps what all of several policies keep.

    Attributes:
      policies: policies and plain functions; at least one.
    """

    policies: Sequence[AnyPolicy]
    _is_decisive = False


def _spaced(values: Sequence[Any], interval: Any) -> list[bool]:
    """Marks the first value, and each that is at least `interval` above the last one marked."""
    marks: list[bool] = []
    last = None
    for value in values:
        marks.append(last is None or value >= last + interval)
        last = value if marks[-1] else last
    return marks


def _newest(kept: Sequence[bool], count: int | None) -> list[bool]:
    """Clears all marks but the last `count`."""
    if count is None:
        return list(kept)
    surplus = sum(kept) - count
    ranks = itertools.accumulate(kept, initial=0)
    return [is_kept and rank >= surplus for is_kept, rank in zip(kept, ranks, strict=False)]


def _is_nan(value: Any) -> bool:
    try:
        return bool(value != value)
    except ValueError:  # an array: not to be compared anyway
        return False
