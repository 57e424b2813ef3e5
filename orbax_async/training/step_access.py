"""What is done with a step that a run has: reading it, describing it, deleting it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from orbax_async import errors
from orbax_async._api import delete as deleting
from orbax_async._api import metadata as describing
from orbax_async._response import AsyncResponse
from orbax_async.path import Path
from orbax_async.training.checkpoint_info import CheckpointMetadata
from orbax_async.training.run import Run
from orbax_async.training.run_steps import step_number

__all__ = ["delete", "describe", "load"]

T = TypeVar("T")


def load(
    run: Run, verb: str, step: Any, how: Callable[[Path], AsyncResponse[T]]
) -> AsyncResponse[T]:
    """Begins to load a step, under the options of the call; it is not removed meanwhile.

    Raises:
      ClosedError: the run is closed.
      StepNotFoundError: there is no such step, or none at all.
    """
    run.check_open(verb)
    found, release = run.steps.hold(step)
    try:
        with run.options():
            response = how(found.path)
    except BaseException:
        release()
        raise
    response.add_done_callback(lambda _: release())
    return response


def describe(
    run: Run, verb: str, step: Any, how: Callable[[Path], describing.CheckpointMetadata[T]]
) -> CheckpointMetadata[T]:
    """Adds to what a checkpoint says of itself what its run knows; raises like `load`."""
    run.check_open(verb)
    found, release = run.steps.hold(step)
    try:
        with run.options():
            described = how(found.path)
        return CheckpointMetadata(
            found.step,
            found.path,
            metadata=described.metadata,
            init_timestamp_nsecs=described.init_timestamp_nsecs,
            commit_timestamp_nsecs=found.commit_timestamp_nsecs,
            custom_metadata=described.custom_metadata,
            metrics=found.metrics,
        )
    finally:
        release()


def delete(run: Run, step: Any, name: str | None, missing_ok: bool) -> AsyncResponse[bool]:
    """Begins to delete a step, or one checkpointable of it; raises like `load`."""
    run.check_open("delete")
    number = step_number(step)
    try:
        path = str(run.steps.find(number).path)
    except errors.StepNotFoundError:
        if not missing_ok or number < 0:
            raise
        path = run.directory.path_of(number)
    if name is None:
        run.steps.drop(number)
    try:
        with run.context:
            response = deleting.delete_async(path, checkpointable_name=name, missing_ok=missing_ok)
    except BaseException:
        run.steps.put_back(number)
        raise
    if name is None:  # it is still there if it can't be deleted
        response.add_done_callback(lambda _: run.steps.put_back(number))
    return response
