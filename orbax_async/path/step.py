"""The names of a run's steps, and finding them in the run's directory.

    names = step.standard_name_format(step_prefix="step", step_format_fixed_length=6)
    names.build_name(42)                              # 'step_000042'
    [found.step for found in names.find_all("/run")]  # one look at the directory

A format lists a directory once and looks at nothing inside the steps. What it finds reads a step's
documents when they are first asked for. Temporary directories, files, and names of another format
are not steps. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from orbax_async import _names as names
from orbax_async import errors, multihost
from orbax_async._storage import seal
from orbax_async._storage.directory import Entry, parse_json, read_json
from orbax_async._storage.local import open_directory
from orbax_async.path.pathlike import Path, PathLike, absolute

__all__ = [
    "NameFormat",
    "StepMetadata",
    "as_step",
    "composite_name_format",
    "standard_name_format",
]

MetadataT_co = TypeVar("MetadataT_co", covariant=True)

_STEPS_SHOWN = 5  # in an error


def as_step(value: Any) -> int:
    """Returns a step number as a Python int; NumPy integers are step numbers too.

    Raises:
      TypeError: it is no integer.
      ValueError: it is negative; such a step would be written and never found again.
    """
    if isinstance(value, bool):
        raise TypeError(f"a step must be an integer, not {value!r}")
    try:
        step = operator.index(value)
    except TypeError:
        raise TypeError(
            f"a step must be an integer, not {value!r} of type {type(value).__name__}"
        ) from None
    if step < 0:
        raise ValueError(f"a step must not be negative, and is {step}")
    return step


class StepMetadata:
    """A step that lies in a run's directory.

    The number comes from the directory's name. Everything else is read from the step's documents
    when it is first asked for, which blocks, and is then kept.

    Args:
      step: its number.
      path: its directory.
    """

    def __init__(self, step: int, path: PathLike) -> None:
        self._step = step
        self._path = os.fspath(path)

    def __repr__(self) -> str:
        return f"StepMetadata({self._step}, {self._path!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepMetadata):
            return NotImplemented
        return (self._step, self._path) == (other._step, other._path)

    def __hash__(self) -> int:
        return hash((self._step, self._path))

    @property
    def step(self) -> int:
        """The step's number."""
        return self._step

    @property
    def path(self) -> Path:
        """The step's directory."""
        return Path(self._path)

    @property
    def metadata(self) -> None:
        """Always None: what the step holds is told by `metadata(found.path)`."""
        return None

    @property
    def init_timestamp_nsecs(self) -> int | None:
        """When the save began, in nanoseconds since the epoch; None if the step does not say."""
        return self._timestamp("init_timestamp_nsecs")

    @property
    def commit_timestamp_nsecs(self) -> int | None:
        """When the step was committed, in nanoseconds since the epoch; None if it doesn't say."""
        return self._timestamp("commit_timestamp_nsecs")

    @property
    def init_timestamp(self) -> datetime.datetime | None:
        """When the save began, in UTC; None if the step does not say."""
        return _as_datetime(self.init_timestamp_nsecs)

    @property
    def commit_timestamp(self) -> datetime.datetime | None:
        """When the step was committed, in UTC; None if it does not say."""
        return _as_datetime(self.commit_timestamp_nsecs)

    @functools.cached_property
    def time(self) -> datetime.datetime:
        """When the step was committed, in UTC; if it does not say, when its directory changed.

        Raises:
          StepNotFoundError: the step is gone.
          UnreadableError: it can't be read.
        """
        committed = _as_datetime(self._timestamp("commit_timestamp_nsecs"))
        if committed is not None:
            return committed
        with _reading(self._path):
            status = open_directory(self._path).status(follow_links=True)
        if status is None:
            raise errors.StepNotFoundError(
                f"step {self._step} is gone from {self._path}; it was there when the run's "
                "directory was listed"
            )
        return datetime.datetime.fromtimestamp(status.modified_nsecs / 1e9, tz=datetime.UTC)

    @functools.cached_property
    def custom_metadata(self) -> dict[str, Any] | None:
        """What the user gave to the save of this step; None if the step does not say."""
        value = self._document.get("custom_metadata")
        return value if isinstance(value, dict) else None

    @functools.cached_property
    def metrics(self) -> Any:
        """The metrics that the step was saved with; None if it has none.

        Raises:
          InvalidLayoutError: it has, and they can't be read.
        """
        directory = open_directory(self._path) / names.METRICS
        with _reading(self._path):
            data = seal.of_tree(directory).read(names.METRICS)
        if data is None:
            return self._document.get("metrics") or None
        file = (directory / names.METRICS).path
        return parse_json(data, f"the file of the metrics of step {self._step} at {file}", object)

    @functools.cached_property
    def _document(self) -> dict[str, Any]:
        try:
            with _reading(self._path):
                return read_json(open_directory(self._path), names.CHECKPOINT_METADATA) or {}
        except errors.UnreadableError:
            raise
        except errors.InvalidLayoutError:  # a damaged document counts as none, as in Orbax
            return {}

    def _timestamp(self, key: str) -> int | None:
        value = self._document.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_datetime(nsecs: int | None) -> datetime.datetime | None:
    return None if nsecs is None else datetime.datetime.fromtimestamp(nsecs / 1e9, tz=datetime.UTC)


def _reading(path: str) -> contextlib.AbstractContextManager[None]:
    return errors.reported_as(
        errors.UnreadableError, f"cannot read {path}", "Check that this process may read it."
    )


def _entries(base: str) -> list[Entry]:
    with _reading(base):
        return open_directory(base).entries()


def _kind(path: str) -> str | None:
    """Returns what lies at a path, or at what a link there leads to; None for nothing."""
    with _reading(path):
        status = open_directory(path).status(follow_links=True)
    return None if status is None else status.kind


@runtime_checkable
class NameFormat(Protocol[MetadataT_co]):
    """How the directories of steps are named and found; any class with these methods will do."""

    def build_name(self, step: int) -> str:
        """Returns the name of the directory that a step is saved to."""
        ...

    def find_all(self, base_path: PathLike) -> Iterator[MetadataT_co]:
        """Yields what is known of every step that lies in a run's directory."""
        ...

    def find_step(self, base_path: PathLike, step: int) -> MetadataT_co:
        """Returns what is known of one step, or raises a ValueError if it is not there."""
        ...


@dataclasses.dataclass(frozen=True)
class _StandardNameFormat:
    step_prefix: str | None
    step_format_fixed_length: int | None
    single_host_load_and_broadcast: bool

    def __post_init__(self) -> None:
        prefix, length = self.step_prefix, self.step_format_fixed_length
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"step_prefix must be a str or None, not {prefix!r}")
        if prefix is not None and ({*"/\0", os.sep, os.altsep} & {*prefix}):
            raise ValueError(f"step_prefix must be a part of one directory name, not {prefix!r}")
        if names.TEMPORARY_MARK in (prefix or ""):
            raise ValueError(
                f"step_prefix {prefix!r} holds {names.TEMPORARY_MARK!r}, the mark of unfinished "
                "checkpoints; no step would ever be found"
            )
        if length is None:
            return
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"step_format_fixed_length must be an int or None, not {length!r}")
        if length < 0:
            raise ValueError(f"step_format_fixed_length must not be negative, and is {length}")

    def __str__(self) -> str:
        return f"StandardNameFormat({self.build_name(1234)!r})"

    def build_name(self, step: int) -> str:
        """Returns the name of the directory that a step is saved to."""
        prefix = "" if self.step_prefix is None else f"{self.step_prefix}_"
        return f"{prefix}{as_step(step):0{self.step_format_fixed_length or 0}d}"

    def find_all(self, base_path: PathLike) -> Iterator[StepMetadata]:
        """Returns an iterator over the steps in a directory, in ascending order."""
        base = absolute(base_path)
        if not self.single_host_load_and_broadcast:
            return iter(self.select(base, _entries(base)))

        def say() -> str:
            return json.dumps([found.step for found in self.select(base, _entries(base))])

        heard = json.loads(multihost.tell("the steps of a run", say))
        return iter([self._at(base, step) for step in heard])

    def find_step(self, base_path: PathLike, step: int) -> StepMetadata:
        """Returns one step, or raises StepNotFoundError."""
        base = absolute(base_path)
        found = self._at(base, as_step(step))
        if _kind(found._path) == "directory":
            return found
        raise errors.StepNotFoundError(self._absence(base, found))

    def select(self, base: str, entries: Iterable[Entry]) -> list[StepMetadata]:
        """Returns those of a directory's entries that are steps, in ascending order."""
        found = [
            (int(match[1]), name)
            for name, is_directory in entries
            if is_directory and (match := self._pattern.fullmatch(name))
        ]
        return [StepMetadata(step, os.path.join(base, name)) for step, name in sorted(found)]

    def _at(self, base: str, step: int) -> StepMetadata:
        return StepMetadata(step, os.path.join(base, self.build_name(step)))

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Matches exactly what `build_name` makes: "007" is no step without a fixed length."""
        prefix = "" if self.step_prefix is None else re.escape(f"{self.step_prefix}_")
        length = self.step_format_fixed_length or 0
        longer = f"[1-9][0-9]{{{max(length, 1)},}}"
        padded = f"[0-9]{{{length}}}" if length else "[0-9]"
        return re.compile(f"{prefix}({padded}|{longer})")

    def _absence(self, base: str, missing: StepMetadata) -> str:
        """Says why a step is not there: what was looked for, and what was found instead."""
        name = self.build_name(missing.step)
        what = f"no checkpoint of step {missing.step} under {base}"
        if _kind(base) != "directory":
            return f"{what}: that is no directory; give the directory of the run"
        entries = _entries(base)
        if any(entry.name == name for entry in entries):
            return f"{what}: {name} is there, but is no directory"
        steps = [found.step for found in self.select(base, entries)]
        shown = ", ".join(map(str, steps[-_STEPS_SHOWN:]))
        has = f"the last steps there are {shown}" if steps else "there are no steps"
        other = re.compile(rf".*?(?<![0-9])0*{missing.step}")
        alike = sorted(entry.name for entry in entries if other.fullmatch(entry.name))
        hint = f"; {alike[0]} is a name of another format" if alike else ""
        return f"{what}: expected a directory {name} ({self}), and {has}{hint}"


@dataclasses.dataclass(frozen=True)
class _CompositeNameFormat:
    write_name_format: NameFormat[Any]
    read_name_formats: Sequence[NameFormat[Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "read_name_formats", tuple(self.read_name_formats))
        for each in (self.write_name_format, *self.read_name_formats):
            if not isinstance(each, NameFormat):
                raise TypeError(
                    f"a name format has build_name, find_all and find_step; {each!r} has not"
                )
        if self.write_name_format not in self.read_name_formats:
            raise ValueError(
                f"write_name_format {self.write_name_format} must be present in "
                f"read_name_formats [{', '.join(map(str, self.read_name_formats))}]: what is "
                "written must be found again"
            )

    def __str__(self) -> str:
        return f"Composite([{', '.join(map(str, self.read_name_formats))}])"

    def build_name(self, step: int) -> str:
        """Returns the name of the directory that a step is saved to."""
        return self.write_name_format.build_name(step)

    def find_all(self, base_path: PathLike) -> Iterator[Any]:
        """Returns an iterator over the steps of any format, in ascending order, each once."""
        base, entries = absolute(base_path), None
        found: dict[int, Any] = {}
        for each in self.read_name_formats:
            if isinstance(each, _StandardNameFormat) and not each.single_host_load_and_broadcast:
                entries = _entries(base) if entries is None else entries
                steps: Iterable[Any] = each.select(base, entries)
            else:
                steps = each.find_all(base_path)
            for one in steps:
                found.setdefault(one.step, one)
        return iter([found[step] for step in sorted(found)])

    def find_step(self, base_path: PathLike, step: int) -> Any:
        """Returns one step from the first format that has it, or raises StepNotFoundError."""
        as_step(step)
        absences = []
        for each in self.read_name_formats:
            try:
                return each.find_step(base_path, step)
            except ValueError as error:
                absences.append(str(error))
        raise errors.StepNotFoundError("\n".join(absences))


def standard_name_format(
    *,
    step_prefix: str | None = None,
    step_format_fixed_length: int | None = None,
    single_host_load_and_broadcast: bool = False,
) -> NameFormat[StepMetadata]:
    """Returns the format of names such as `23`, `0023`, `step_23` and `step_0023`.

    Args:
      step_prefix: what precedes the number, with an underscore between them; None for nothing.
      step_format_fixed_length: up to how many digits numbers are filled with zeros; None or 0 for
        no filling. Longer numbers stay as they are.
      single_host_load_and_broadcast: whether process 0 alone lists the directory and tells the
        others. Then every process has to call `find_all`, in the same order. A single process
        just lists it.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: the prefix can't be a part of a step's name, or the length is negative.
    """
    return _StandardNameFormat(
        step_prefix, step_format_fixed_length, bool(single_host_load_and_broadcast)
    )


def composite_name_format(
    write_name_format: NameFormat[MetadataT_co],
    read_name_formats: Sequence[NameFormat[MetadataT_co]],
) -> NameFormat[MetadataT_co]:
    """Returns a format that writes names of one format and finds those of several.

    With it a run can change its names and go on with the steps that it has.

    Args:
      write_name_format: names new steps; one of the formats to read.
      read_name_formats: find steps; where several find the same step, the first one counts.

    Raises:
      TypeError: something is no name format.
      ValueError: the format to write is not one of those to read.
    """
    return _CompositeNameFormat(write_name_format, read_name_formats)
