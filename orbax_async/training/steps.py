"""The steps of a run: one record for each, the directory that they lie in, and the list of them.

A step is one `Step` from the call that saves it until its last file is removed. It says at first
what `save` was given; once it is committed, what its documents say. The queue of saves and the
removal of old steps note on it how far it has come.

All calls of the file system that a run needs are those of `RunDirectory`. They block.
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
from orbax_async._commit import atomicity
from orbax_async._response import AsyncResponse
from orbax_async._storage import files
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
    "json_dict",
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

    hidden: str | None = None
    out_of_sight: Promise
    gone: Promise

    _nbytes = None  # of the base: nobody has counted

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
            self.time, self.metrics, self.custom_metadata = time, metrics, custom_metadata
            self.may_write, self.ended = promise(), promise()

    def __repr__(self) -> str:
        return f"<checkpoint of step {self.step} at {self._path}>"

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
        del self.time, self.metrics, self.custom_metadata
        for name in ("time", "metrics"):
            with contextlib.suppress(errors.CheckpointError):  # raised again for who asks
                getattr(self, name)


class RunDirectory:
    """Where a run's steps lie. Every method that looks at it, or changes it, blocks.

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
        self._name_format = name_format
        self._needs_proof = needs_proof

    def create(self) -> None:
        """Makes the directory, if it is not there.

        Raises:
          CommitError: it can't be made; there is a file, or a parent can't be written to.
        """
        with _reported(f"cannot create the run's directory {self.path}"):
            os.makedirs(self.path, exist_ok=True)

    # Its steps.

    def path_of(self, step: int) -> str:
        """Returns where a step is saved to."""
        return os.path.join(self.path, self._name_format.build_name(step))

    def listed(self) -> list[Step]:
        """Lists the steps, in ascending order.

        Raises:
          InvalidLayoutError: the directory can't be read.
        """
        found = [self._as_step(each) for each in self._name_format.find_all(Path(self.path))]
        return sorted(filter(self._is_committed, found), key=lambda each: each.step)

    def find(self, step: int) -> Step:
        """Looks for one step.

        Raises:
          StepNotFoundError: it is not there.
        """
        if step < 0:
            raise errors.StepNotFoundError(f"no checkpoint of step {step}: no step is negative")
        try:
            found = self._as_step(self._name_format.find_step(Path(self.path), step))
        except errors.StepNotFoundError:
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
        """Says whether a step is still where it was found."""
        return os.path.isdir(step._path)

    def _as_step(self, found: Any) -> Step:
        if isinstance(found, StepMetadata):
            return Step(found.step, found._path)
        path = getattr(found, "path", None)
        return Step(found.step, self.path_of(found.step) if path is None else path)

    def _is_committed(self, step: Step) -> bool:
        proof = os.path.join(step._path, names.COMMIT_MARKER)
        return not self._needs_proof or os.path.exists(proof)

    # Removing a step: it is renamed, that is made durable, and then its files go.

    def hide(self, step: Step) -> None:
        """Gives a step a temporary name, which no reader takes for one; raises OSError."""
        hidden = atomicity.temporary_path(step._path)
        with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
            os.rename(step._path, hidden)
        step.hidden = hidden

    def show(self, step: Step) -> None:
        """Undoes `hide`; raises OSError."""
        os.rename(str(step.hidden), step._path)
        step.hidden = None

    def sync(self) -> None:
        """Makes the names of the steps durable; raises OSError."""
        files.fsync_directory(self.path)

    def removal(self, hidden: str) -> Iterator[None]:
        """Removes what is hidden, one entry at a time; what is gone is fine. Raises OSError."""
        for directory, folders, inside in os.walk(hidden, topdown=False, onerror=_unless_gone):
            paths = [os.path.join(directory, name) for name in inside]
            links = filter(os.path.islink, [os.path.join(directory, name) for name in folders])
            for path in [*paths, *links]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                yield
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(directory)
            yield

    def clean(self) -> None:
        """Removes unfinished saves, but for those of processes that are alive.

        Orbax's do not tell whose they are. They all go, as in Orbax.

        Raises:
          CommitError: something can't be removed.
        """
        with _reported(f"cannot clean up {self.path}"):
            removed = atomicity.sweep(self.path)
            for entry in list(files.scan(self.path)):
                is_ours = names.OWNED_TEMPORARY.fullmatch(entry.name)
                if names.TEMPORARY_MARK in entry.name and not is_ours and not entry.is_symlink():
                    atomicity.discard(entry.path)
                    removed.append(entry.path)
        for path in removed:
            logger.info("removed %s, which was never finished", path)

    # What the user said of the run when it began.

    def read_root_metadata(self) -> dict[str, Any]:
        """Returns it; an empty dict if nothing was said.

        Raises:
          InvalidLayoutError: the document is damaged, or can't be read.
        """
        for name in (names.ROOT_METADATA, names.OLDER_ROOT_METADATA):
            path = os.path.join(self.path, names.ROOT_METADATA_DIRECTORY, name)
            try:
                data = files.read_bytes(path)
                if data is not None:
                    return dict(json.loads(data).get("custom_metadata") or {})
            except OSError as error:
                raise errors.InvalidLayoutError(
                    f"the metadata of the run can't be read: {path}: {error.strerror or error}"
                ) from error
            except (ValueError, TypeError, AttributeError) as error:
                raise errors.InvalidLayoutError(
                    f"the metadata of the run is damaged: {path} should be a JSON document: {error}"
                ) from error
        return {}

    def write_root_metadata(self, custom_metadata: dict[str, Any]) -> None:
        """Writes it durably; what was said first stays.

        Raises:
          CommitError: it can't be written.
        """
        folder = os.path.join(self.path, names.ROOT_METADATA_DIRECTORY)
        path = os.path.join(folder, names.ROOT_METADATA)
        if os.path.exists(path) or os.path.exists(os.path.join(folder, names.OLDER_ROOT_METADATA)):
            return
        document = {"internal_metadata": {}, "custom_metadata": custom_metadata}
        unfinished = f"{path}.{uuid.uuid4().hex}"
        try:
            with _reported(f"cannot write {path}"):
                files.write_bytes(unfinished, json.dumps(document).encode())
                files.fsync_file(unfinished)
                _rename_unless_there(unfinished, path)
                files.fsync_directory(folder)
                files.fsync_directory(self.path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


@contextlib.contextmanager
def _reported(problem: str) -> Iterator[None]:
    """Turns an OSError into a CommitError."""
    try:
        yield
    except errors.CheckpointError:
        raise
    except OSError as error:
        raise errors.CommitError(
            f"{problem}: {error.strerror or error}. Check that the path is right and writable."
        ) from error


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _rename_unless_there(unfinished: str, path: str) -> None:
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not os.path.exists(path):
            os.rename(unfinished, path)


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
        """Adds a step that was dropped, if it is still there."""
        with contextlib.suppress(errors.StepNotFoundError):
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
            if self.directory.has(found):
                return found, functools.partial(self._release, found.step)
            self._release(found.step)  # it has gone just now

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


def json_dict(name: str, value: Any) -> dict[str, Any]:
    """Returns a private copy of a dict of JSON values.

    Raises:
      NotJsonError: it is none.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise errors.NotJsonError(f"{name} must be a dict with str keys, not {value!r:.100}")
    try:
        return dict(json.loads(json.dumps(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.NotJsonError(f"{name} must hold JSON values: {error}") from None
