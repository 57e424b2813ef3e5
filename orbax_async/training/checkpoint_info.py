"""What is known of a step, and of the run it belongs to."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any, Protocol, TypeVar, runtime_checkable

from orbax_async._api import metadata as described
from orbax_async.path import Path, PathLike
from orbax_async.path.step import as_step

__all__ = ["CheckpointInfo", "CheckpointMetadata", "RootMetadata", "named"]

T = TypeVar("T")


@runtime_checkable
class CheckpointInfo(Protocol):
    """A step as policies see it: its number, its time, its metrics."""

    @property
    def step(self) -> int:
        """The step's number."""
        ...

    @property
    def time(self) -> datetime.datetime:
        """When the step was saved; for one still to be saved, the time now. With a time zone."""
        ...

    @property
    def metrics(self) -> Any:
        """The metrics it was saved with; None if it has none."""
        ...


class CheckpointMetadata(described.CheckpointMetadata[T]):
    """What is known of one step of a run.

    Args:
      step: its number.
      path: its directory.
      metadata: the abstract form of what it holds; None where that was not asked for.
      init_timestamp_nsecs: when the save began, in nanoseconds since the epoch.
      commit_timestamp_nsecs: when it was committed.
      custom_metadata: what the user gave to `save`.
      metrics: the metrics that the user gave to `save`.
    """

    def __init__(
        self,
        step: int,
        path: PathLike,
        *,
        metadata: T,
        init_timestamp_nsecs: int | None = None,
        commit_timestamp_nsecs: int | None = None,
        custom_metadata: dict[str, Any] | None = None,
        metrics: Any = None,
    ) -> None:
        super().__init__(
            path,
            metadata=metadata,
            init_timestamp_nsecs=init_timestamp_nsecs,
            commit_timestamp_nsecs=commit_timestamp_nsecs,
            custom_metadata=custom_metadata,
        )
        self._step = as_step(step)
        self._metrics = metrics

    def __repr__(self) -> str:
        return (
            f"CheckpointMetadata({self.step}, {str(self.path)!r}, metadata={self.metadata!r}, "
            f"commit_timestamp={self.commit_timestamp}, custom_metadata={self.custom_metadata}, "
            f"metrics={self.metrics})"
        )

    @property
    def step(self) -> int:
        """The step's number."""
        return self._step

    @property
    def metrics(self) -> Any:
        """The metrics that the user gave to `save`; None if there are none."""
        return self._metrics

    @property
    def time(self) -> datetime.datetime:
        """When the step was committed, in UTC.

        Raises:
          TypeError: that is not known.
        """
        if self.commit_timestamp is None:
            raise TypeError(f"step {self.step} at {self.path} has no commit_timestamp_nsecs")
        return self.commit_timestamp


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootMetadata:
    """What is known of a whole run.

    Attributes:
      directory: where its steps lie.
      custom_metadata: what the user said of it when it began.
    """

    directory: Path
    custom_metadata: dict[str, Any] | None = None


def named(policy: object) -> str:
    """Returns how reasons call a policy: by what makes it, or else by the name of what it is."""
    if isinstance(name := getattr(policy, "__qualname__", None), str):
        return name
    kind = type(policy)
    if kind.__repr__ is object.__repr__:
        return kind.__qualname__
    if not dataclasses.is_dataclass(policy):
        return repr(policy)
    told = [
        f"{field.name}={getattr(policy, field.name)!r}"
        for field in dataclasses.fields(policy)
        if field.repr and getattr(policy, field.name) != field.default
    ]
    return f"{kind.__name__}({', '.join(told)})"
