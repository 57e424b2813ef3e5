"""The steps of a run: one record for each, the directory that they lie in, and the list of them.

A step is one `Step` from the call that saves it until its last file is removed. It says at first
what `save` was given; once it is committed, what its documents say. The queue of saves and the
removal of old steps note on it how far it has come.

All looks at the run's directory, and all changes there, are those of `RunDirectory`. They block.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._api import metadata as described
from orbax_async._commit import leftovers
from orbax_async._response import AsyncResponse
from orbax_async._storage.directory import Directory, Status, damage_in, read_json
from orbax_async._storage.local import open_directory
from orbax_async._trace import logger
from orbax_async.path import Path, PathLike
from orbax_async.path.step import NameFormat, StepMetadata, as_step

__all__ = [
    "CheckpointMetadata",
    "Promise",
    "RootMetadata",
    "RunDirectory",
    "Step",
    "Steps",
    "promise",
    "step_number",
]

T = TypeVar("T")
Promise: TypeAlias = "concurrent.futures.Future[None]"


def promise() -> Promise:
    """Returns a future that can be waited for, and not cancelled by who waits."""
    made: Promise = concurrent.futures.Future()
    made.set_running_or_notify_cancel()
    return made


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False, kw_only=True)
class CheckpointMetadata(described.CheckpointMetadata[T]):
    """What is known of one step of a run.

    Attributes:
      step: its number.
      metrics: the metrics that the user gave to `save`; None if there are none.
      path: its directory.
      metadata: the abstract form of what it holds; None where that was not asked for.
      init_timestamp_nsecs: when the save began, in nanoseconds since the epoch.
      commit_timestamp_nsecs: when it was committed.
      custom_metadata: what the user gave to `save`.
      nbytes: the bytes of all its files; None where they were not counted.
    """

    step: int
    metrics: Any

    def __init__(  # noqa: PLR0913 - Orbax's arguments
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
        vars(self).update(step=as_step(step), metrics=metrics)

    def __repr__(self) -> str:
        return (
            f"CheckpointMetadata({self.step}, {str(self.path)!r}, metadata={self.metadata!r}, "
            f"commit_timestamp={self.commit_timestamp}, custom_metadata={self.custom_metadata}, "
            f"metrics={self.metrics})"
        )

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


class Step(StepMetadata, CheckpointMetadata[None]):
    """A step of a run. Two are equal that have one number and one directory.

    Args:
      step: its number.
      path: its directory.
      time: the time now, of a step that is to be saved; None of one that is there.
      metrics: what a step that is to be saved is saved with.
      custom_metadata: likewise.

    Attributes:
      may_write: done once the saves before its own have ended.
      ended: done once its save has, well or not, and the run knows.
      response: what the caller of its save has; None until that has started.
      is_withdrawn: whether its save gives way to a later one.
      hidden: where it lies once it is out of sight, on its way out.
      out_of_sight: done once it is, or is kept after all.
      gone: done once its files are removed, or left to a later time.
    """

    may_write: Promise
    ended: Promise
    response: AsyncResponse[bool] | None = None
    is_withdrawn = False

    hidden: Directory | None = None
    out_of_sight: Promise
    gone: Promise

    def __init__(
        self,
        step: int,
        path: PathLike,
        *,
        time: datetime.datetime | None = None,
        metrics: Any = None,
        custom_metadata: Any = None,
    ) -> None:
        # Not the second base's: two thousand paths and times would be made and never looked at.
        StepMetadata.__init__(self, step, path)
        if time is not None:
            vars(self).update(time=time, metrics=metrics, custom_metadata=custom_metadata)
            self.may_write, self.ended = promise(), promise()

    def __repr__(self) -> str:
        return f"<checkpoint of step {self.step} at {self._path}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Step, (self.step, self._path)  # a copy says what lies on disk

    @property
    def directory(self) -> Directory:
        """Where it lies."""
        return open_directory(self._path)

    @property
    def commit_timestamp_nsecs(self) -> int:
        """When the step was committed, in nanoseconds since the epoch."""
        stored = super().commit_timestamp_nsecs
        return int(self.time.timestamp() * 1e9) if stored is None else stored

    @property
    def commit_timestamp(self) -> datetime.datetime:
        """When the step was committed, in UTC."""
        return self.time

    def read_documents(self) -> None:
        """Has a step that is committed say what its documents say, and reads what policies ask."""
        for name in ("time", "metrics", "custom_metadata"):
            vars(self).pop(name, None)
            with contextlib.suppress(errors.CheckpointError):  # raised again for who asks
                getattr(self, name)


class RunDirectory:
    """Where a run's steps lie.

    Args:
      path: the directory.
      name_format: how its steps are named.
      needs_proof: whether a step must say that it is committed. Where steps are written in place,
        others are unfinished.
    """

    def __init__(
        self, path: str, name_format: NameFormat[Any], *, needs_proof: bool = False
    ) -> None:
        if not isinstance(name_format, NameFormat):
            raise TypeError(
                "step_name_format must have build_name, find_all and find_step; "
                f"{name_format!r} has not"
            )
        self.path = path
        self._directory = open_directory(path)
        self._metadata = self._directory / names.ROOT_METADATA_DIRECTORY
        self._name_format = name_format
        self._needs_proof = needs_proof

    def create(self) -> None:
        """Makes the directory, if it is not there.

        Raises:
          CommitError: it can't be made; there is a file, or a parent can't be written to.
        """
        problem = f"cannot create the run's directory {self.path}"
        advice = "Check that the path is right and writable."
        with errors.reported_as(errors.CommitError, problem, advice):
            _make_with_parents(self._directory)

    # Its steps.

    def path_of(self, step: int) -> str:
        """Returns where a step is saved to."""
        return os.path.join(self.path, self._name_format.build_name(step))

    def listed(self) -> list[Step]:
        """Lists the steps, in ascending order.

        Raises:
          UnreadableError: the directory can't be read.
        """
        found = [self._as_step(each) for each in self._name_format.find_all(Path(self.path))]
        return sorted(filter(self._is_committed, found), key=lambda each: each.step)

    def find(self, step: int) -> Step:
        """Looks for one step.

        Raises:
          StepNotFoundError: it is not there.
          UnreadableError: it can't be looked at.
        """
        if step < 0:
            raise errors.StepNotFoundError(f"no checkpoint of step {step}: no step is negative")
        try:
            found = self._as_step(self._name_format.find_step(Path(self.path), step))
        except errors.CheckpointError:
            raise
        except (ValueError, FileNotFoundError) as error:  # a name format of the user, or of Orbax
            raise errors.StepNotFoundError(f"no checkpoint of step {step}: {error}") from error
        if not self._is_committed(found):
            raise errors.StepNotFoundError(
                f"no checkpoint of step {step}: {found.path} has no {names.COMMIT_MARKER}, so its "
                "save is under way or was interrupted"
            )
        return found

    def has(self, step: Step) -> bool:
        """Says whether a step is still where it was found; raises UnreadableError."""
        status = _look(step)
        return status is not None and status.kind == "directory"

    def _is_committed(self, step: Step) -> bool:
        return not self._needs_proof or _look(step, names.COMMIT_MARKER) is not None

    def _as_step(self, found: Any) -> Step:
        if isinstance(found, StepMetadata):
            return Step(found.step, found._path)
        path = getattr(found, "path", None)
        return Step(found.step, self.path_of(found.step) if path is None else path)

    # Removing a step: it is renamed, that is made durable, and then its files go. Each of these
    # raises OSError, and is tried again by its caller.

    def hide(self, step: Step) -> None:
        """Gives a step a temporary name, which no reader takes for one."""
        hidden = leftovers.temporary(step.directory)
        leftovers.look_after(hidden.path)
        try:
            with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
                step.directory.rename(hidden)
        except OSError:
            leftovers.leave(hidden.path)
            raise
        step.hidden = hidden

    def show(self, step: Step) -> None:
        """Undoes `hide`."""
        assert step.hidden is not None
        step.hidden.rename(step.directory)
        self.leave(step)
        step.hidden = None

    def sync(self) -> None:
        """Makes the names of the steps durable."""
        self._directory.sync([""])

    def removal(self, hidden: Directory) -> Iterator[None]:
        """Removes what is hidden, a file at a time; what is gone is fine."""
        for name in hidden.walk()[0]:
            hidden.remove(name)
            yield
        hidden.remove()  # its directories, and whatever else there may be
        yield

    def leave(self, step: Step) -> None:
        """Leaves what there is of a hidden step to any later sweep."""
        if step.hidden is not None:
            leftovers.leave(step.hidden.path)

    def clean(self) -> None:
        """Removes unfinished saves, but for those of processes that are alive.

        Orbax's do not tell whose they are. They all go, as in Orbax.

        Raises:
          CommitError: something can't be removed.
        """
        with errors.reported_as(errors.CommitError, f"cannot clean up {self.path}"):
            removed = leftovers.sweep(self.path)
            for name, _ in self._directory.entries():
                if names.TEMPORARY_MARK not in name or names.OWNED_TEMPORARY.fullmatch(name):
                    continue
                status = self._directory.status(name)
                if status is not None and status.kind != "link":
                    leftovers.discard(self._directory / name)
                    removed.append((self._directory / name).path)
        for path in removed:
            logger.info("removed %s, which was never finished", path)

    # What the user said of the run when it began.

    def read_root_metadata(self) -> dict[str, Any]:
        """Returns it; an empty dict if nothing was said.

        Raises:
          InvalidLayoutError: the document is damaged, or can't be read.
        """
        for name in _ROOT_DOCUMENTS:
            file = (self._metadata / name).path
            problem = f"cannot read the metadata of the run, {file}"
            with errors.reported_as(errors.UnreadableError, problem), damage_in(file):
                document = read_json(self._metadata, name)
                if document is not None:
                    return dict(document.get("custom_metadata") or {})
        return {}

    def write_root_metadata(self, custom_metadata: dict[str, Any]) -> None:
        """Writes it durably; what was said first stays.

        Raises:
          CommitError: it can't be written.
        """
        metadata, name = self._metadata, names.ROOT_METADATA
        document = {"internal_metadata": {}, "custom_metadata": custom_metadata}
        unfinished = f"{name}.{uuid.uuid4().hex}"
        with errors.reported_as(errors.CommitError, f"cannot write {(metadata / name).path}"):
            if any(metadata.status(each) is not None for each in _ROOT_DOCUMENTS):
                return
            try:
                metadata.write(unfinished, json.dumps(document).encode())
                metadata.sync([unfinished])
                with contextlib.suppress(FileExistsError):  # another process was quicker
                    metadata.link(unfinished, metadata, name)
                metadata.sync([""])
                self._directory.sync([""])
            finally:
                with contextlib.suppress(OSError):
                    metadata.remove(unfinished)


_ROOT_DOCUMENTS = (names.ROOT_METADATA, names.OLDER_ROOT_METADATA)


def _look(step: Step, name: str = "") -> Status | None:
    with errors.reported_as(errors.UnreadableError, f"cannot look at {step.path}"):
        return step.directory.status(name, follow_links=True)


def _make_with_parents(directory: Directory) -> None:
    try:
        directory.make()
    except FileNotFoundError:
        _make_with_parents(directory.parent)
        _make_with_parents(directory)
    except FileExistsError:
        status = directory.status(follow_links=True)
        if status is None or status.kind != "directory":
            raise


class Steps:
    """The steps that a run has, as this process knows them; safe from any thread.

    A step that is given up is none of them, although it stays in sight until nobody reads it.

    Args:
      directory: where they lie.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._lock = threading.RLock()
        self._known: dict[int, Step] | None = None  # in ascending order; None: not listed yet
        self._given_up: list[Step] = []  # and still in sight
        self._readers: collections.Counter[int] = collections.Counter()

    def at_hand(self, step: Any, metrics: Any = None, custom_metadata: Any = None) -> Step:
        """Returns a step that may be saved now, with what it would be saved with."""
        number, now = as_step(step), datetime.datetime.now(tz=datetime.UTC)
        path = self.directory.path_of(number)
        return Step(number, path, time=now, metrics=metrics, custom_metadata=custom_metadata)

    def reload(self) -> None:
        """Lists the directory anew."""
        with self._lock:
            given_up = {each.step for each in self._given_up}
            listed = self.directory.listed()
            self._known = {each.step: each for each in listed if each.step not in given_up}

    def all(self) -> list[Step]:
        """Returns the steps in ascending order; lists the directory if nobody has."""
        with self._lock:
            if self._known is None:
                self.reload()
            assert self._known is not None
            return list(self._known.values())

    def find(self, wanted: Any) -> Step:
        """Returns a step.

        Args:
          wanted: its number, something that has it, or None for the latest.

        Raises:
          StepNotFoundError: it is not there, or there are none.
          TypeError: it is no step.
        """
        if wanted is None:
            while steps := self.all():
                if self.directory.has(steps[-1]):
                    return steps[-1]
                self.drop(steps[-1].step)
            raise errors.StepNotFoundError(
                f"no checkpoints were found under {self.directory.path}, and step=None asks for "
                "the latest"
            )
        number = step_number(wanted)
        known = next((each for each in self.all() if each.step == number), None)
        if known is not None and self.directory.has(known):
            return known
        self.drop(number)
        if self._is_given_up(number):
            raise errors.StepNotFoundError(
                f"the checkpoint of step {number} under {self.directory.path} is being removed: "
                "the preservation policy does not keep it"
            )
        found = self.directory.find(number)
        self.add(found)
        return found

    def add(self, step: Step) -> None:
        """Adds a step, in place of an older one of the same number."""
        with self._lock:
            if self._known is not None:
                self._known = dict(sorted({**self._known, step.step: step}.items()))

    def drop(self, number: int) -> None:
        """Forgets a step."""
        with self._lock:
            if self._known is not None:
                self._known.pop(number, None)

    def put_back(self, number: int) -> None:
        """Adds a step that was dropped, if it is still there, as far as that can be seen."""
        with contextlib.suppress(errors.StepNotFoundError, errors.UnreadableError):
            self.add(self.directory.find(number))

    def follow(self, numbers: Iterable[int]) -> None:
        """Takes over the list of another process."""
        wanted = set(numbers)
        if wanted != {each.step for each in self.all()}:
            with self._lock:
                self.reload()
                for each in self.all():
                    if each.step not in wanted:
                        self.drop(each.step)

    # Reading a step, and giving one up.

    def hold(self, wanted: Any) -> tuple[Step, Callable[[], None]]:
        """Finds a step like `find`, and keeps it in sight until the function returned is called."""
        while True:
            found = self.find(wanted)
            with self._lock:
                if self._is_given_up(found.step):
                    continue  # just now; `find` tells of it
                self._readers[found.step] += 1
            release = functools.partial(self._release, found.step)
            try:
                if self.directory.has(found):
                    return found, release
            except BaseException:
                release()
                raise
            release()  # it has gone just now

    def _release(self, number: int) -> None:
        with self._lock:
            self._readers[number] -= 1
            self._readers += collections.Counter()  # forgets those that nobody reads

    def is_read(self, step: Step) -> bool:
        """Says whether somebody reads a step. Nobody begins to read one that is given up."""
        with self._lock:
            return self._readers[step.step] > 0

    def give_up(self, steps: Iterable[Step]) -> None:
        """Makes steps none of the run's, though they are in sight until they are forgotten."""
        with self._lock:
            for each in steps:
                self.drop(each.step)
                self._given_up.append(each)

    def forget(self, step: Step) -> None:
        """Notes that a step that was given up is out of sight."""
        with self._lock:
            self._given_up = [each for each in self._given_up if each is not step]

    def keep(self, step: Step) -> None:
        """Makes a step that was given up one of the run's again."""
        self.forget(step)
        self.put_back(step.step)

    def _is_given_up(self, number: int) -> bool:
        with self._lock:
            return any(each.step == number for each in self._given_up)


def step_number(step: Any) -> int:
    """Returns the number of a step that is given as such, or as what is known of it.

    Raises:
      TypeError: it is neither.
    """
    number = getattr(step, "step", step)
    try:
        return as_step(number)
    except ValueError:
        return int(number)  # a negative one, which no run has
