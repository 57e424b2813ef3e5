"""The directory of a run: its steps, what its user said of it, and what dead processes left there.

Everything here blocks, and nothing looks inside a step before it is asked what the step says.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import uuid
from typing import Any

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._storage import files
from orbax_async._storage.openers import open_directory
from orbax_async._trace import logger
from orbax_async.path import Path
from orbax_async.path.step import NameFormat, StepMetadata
from orbax_async.training.checkpoint_info import CheckpointMetadata

__all__ = ["ListedCheckpoint", "RunDirectory", "json_dict"]


class ListedCheckpoint(CheckpointMetadata[None]):
    """A step that lies in a run's directory; what it says is read when it is first asked for."""

    def __init__(self, found: StepMetadata) -> None:
        # Not the base class's: two thousand paths and times would be made and never looked at.
        self._found = found

    def __repr__(self) -> str:
        return f"<checkpoint of step {self.step} at {self._found.path}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ListedCheckpoint):
            return NotImplemented
        return self._found == other._found

    def __hash__(self) -> int:
        return hash(self._found)

    @property
    def step(self) -> int:
        """The step's number."""
        return self._found.step

    @property
    def path(self) -> Path:
        """The step's directory."""
        return self._found.path

    @property
    def metadata(self) -> None:
        """Always None: `Checkpointer.metadata` says what the step holds."""
        return None

    @property
    def time(self) -> datetime.datetime:
        """When the step was committed, in UTC; if it does not say, when its directory changed."""
        return self._found.time

    @property
    def metrics(self) -> Any:
        """The metrics that the step was saved with; None if it has none."""
        return self._found.metrics

    @property
    def custom_metadata(self) -> dict[str, Any] | None:
        """What the user gave to the save of this step; None if the step does not say."""
        return self._found.custom_metadata

    @property
    def init_timestamp_nsecs(self) -> int | None:
        """When the save began, in nanoseconds since the epoch; None if the step doesn't say."""
        return self._found.init_timestamp_nsecs

    @property
    def commit_timestamp_nsecs(self) -> int | None:
        """When the step was committed, in nanoseconds since the epoch."""
        stored = self._found.commit_timestamp_nsecs
        return int(self.time.timestamp() * 1e9) if stored is None else stored

    @property
    def init_timestamp(self) -> datetime.datetime | None:
        """When the save began, in UTC; None if the step does not say."""
        return self._found.init_timestamp

    @property
    def commit_timestamp(self) -> datetime.datetime | None:
        """When the step was committed, in UTC."""
        return self.time

    def read(self) -> None:
        """Reads what policies ask for, so that nobody waits for it later."""
        _ = self.time, self.metrics


class RunDirectory:
    """Where a run's steps lie.

    Args:
      path: the directory.
      name_format: how its steps are named.
      needs_proof: whether steps are written in place, so that only one that says it is committed
        is one.
    """

    def __init__(
        self, path: str, name_format: NameFormat[Any], *, needs_proof: bool = False
    ) -> None:
        self.path = path
        self._name_format = name_format
        self._needs_proof = needs_proof

    def create(self) -> None:
        """Makes the directory, if it is not there.

        Raises:
          CommitError: it can't be made; there is a file, or a parent can't be written to.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise errors.CommitError(
                f"cannot create the run's directory {self.path}: {error.strerror or error}. "
                "Check that the path is right and writable."
            ) from error

    def steps(self) -> list[ListedCheckpoint]:
        """Lists the steps, in ascending order."""
        found = [self._listed(each) for each in self._name_format.find_all(Path(self.path))]
        return sorted(filter(self._is_committed, found), key=lambda each: each.step)

    def _is_committed(self, listed: ListedCheckpoint) -> bool:
        proof = os.path.join(listed.path, names.COMMIT_MARKER)
        return not self._needs_proof or os.path.exists(proof)

    def step(self, step: int) -> ListedCheckpoint:
        """Looks for one step.

        Raises:
          StepNotFoundError: it is not there.
        """
        if step < 0:
            raise errors.StepNotFoundError(f"no checkpoint of step {step}: no step is negative")
        try:
            found = self._listed(self._name_format.find_step(Path(self.path), step))
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

    def path_of(self, step: int) -> str:
        """Returns where a step is saved to."""
        return os.path.join(self.path, self._name_format.build_name(step))

    def _listed(self, found: Any) -> ListedCheckpoint:
        if not isinstance(found, StepMetadata):
            path = getattr(found, "path", None)
            found = StepMetadata(found.step, self.path_of(found.step) if path is None else path)
        return ListedCheckpoint(found)

    # What the user said of the run when it began.

    def read_root_metadata(self) -> dict[str, Any]:
        """Returns it; an empty dict if nothing was said.

        Raises:
          InvalidLayoutError: the document is damaged.
        """
        folder = os.path.join(self.path, names.ROOT_METADATA_DIRECTORY)
        for name in (names.ROOT_METADATA, names.OLDER_ROOT_METADATA):
            path = os.path.join(folder, name)
            data = files.read_bytes(path)
            if data is None:
                continue
            try:
                said = json.loads(data).get("custom_metadata") or {}
                return dict(said)
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
            files.write_bytes(unfinished, json.dumps(document).encode())
            files.fsync_file(unfinished)
            _rename_unless_there(unfinished, path)
            files.fsync_directory(folder)
            files.fsync_directory(self.path)
        except OSError as error:
            raise errors.CommitError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)

    # What dead processes left.

    def clean(self) -> None:
        """Removes unfinished saves, but for those of processes that are alive.

        Orbax's do not tell whose they are; they are all removed, as Orbax does.
        """
        try:
            removed = leftovers.sweep(self.path)
            for entry in list(files.scan(self.path)):
                is_ours = names.OWNED_TEMPORARY.fullmatch(entry.name)
                if names.TEMPORARY_MARK in entry.name and not is_ours and not entry.is_symlink():
                    leftovers.discard(open_directory(entry.path))
                    removed.append(entry.path)
        except OSError as error:
            raise errors.CommitError(
                f"cannot clean up {self.path}: {error.strerror or error}"
            ) from error
        for path in removed:
            logger.info("removed %s, which was never finished", path)


def _rename_unless_there(unfinished: str, path: str) -> None:
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not os.path.exists(path):
            os.rename(unfinished, path)


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
