"""Finding out what lies at a path: a checkpoint, one of its parts, or something else."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import anyio

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._commit import leftovers, sessions
from orbax_async._engine import loop
from orbax_async._storage import files, safetensors
from orbax_async._storage.openers import open_directory
from orbax_async._trace import logger
from orbax_async.options import AtomicityMode, CheckpointLayout
from orbax_async.options._file_options import mode_of_temporary_path
from orbax_async.path import pathlike

__all__ = [
    "Contents",
    "Located",
    "check_deletable",
    "check_name",
    "commit_mode",
    "contents",
    "find",
    "in_deletion",
    "is_orbax_checkpoint",
    "locate",
    "may_be_replaced",
    "name_in_deletion",
    "read_whole",
    "survey",
    "when_settled",
]

T = TypeVar("T")

_AGAIN = "Copy it again from where the checkpoint came from."
_LOOKS = 50  # times that a reader looks for a checkpoint that is just being exchanged
_LOOK_SECS = 0.02


class Located(NamedTuple):
    """A checkpointable inside a checkpoint.

    Attributes:
      root: the checkpoint's directory.
      name: the checkpointable's name, None where the root itself is a flat, older checkpoint.
      directory: where it lies.
      document: the checkpoint's own metadata; empty where there is none.
      is_of_tensors: whether safetensors files lie there, and no Orbax checkpoint.
    """

    root: str
    name: str | None
    directory: str
    document: dict[str, Any]
    is_of_tensors: bool = False


class Problem(NamedTuple):
    """Something wrong with a checkpoint as a whole: where, what, and what to do."""

    path: str
    problem: str
    hint: str


class Contents(NamedTuple):
    """All checkpointables of a checkpoint.

    Attributes:
      root: the checkpoint's directory.
      document: the checkpoint's own metadata; empty where there is none.
      typestrs: by name the handler that saved each, None where the checkpoint does not say.
      pytrees: the names of those that look like pytrees.
      hidden: the name whose deletion was begun and not finished, if there is one.
      problems: what a survey found wrong with the checkpoint as a whole.
    """

    root: str
    document: dict[str, Any]
    typestrs: dict[str, str | None]
    pytrees: frozenset[str]
    hidden: str | None
    problems: tuple[Problem, ...] = ()

    def directory(self, name: str) -> str:
        """Returns where a checkpointable lies."""
        return os.path.join(self.root, name) if name else self.root


def check_name(name: Any, *, is_saved: bool) -> None:
    """Raises for a name that no checkpointable can have.

    Args:
      name: what the user gave.
      is_saved: whether it is to be written; reading also knows `AUTO` and None.
    """
    if not is_saved and name in (None, names.AUTO_CHECKPOINTABLE):
        return
    if not isinstance(name, str):
        raise TypeError(
            f"a checkpointable's name must be a str, got {type(name).__name__}: {name!r}"
        )
    if not name:
        raise ValueError("Empty string is not supported as a checkpointable name; leave it out")
    if name in names.RESERVED_CHECKPOINTABLES:
        raise ValueError(f"Provided reserved checkpointable key: {name}.")
    is_file = name in (names.CHECKPOINT_METADATA, names.COMMIT_MARKER, names.CHECKPOINT_MARKER)
    if "/" in name or name in (".", "..") or is_file or names.TEMPORARY_MARK in name:
        raise ValueError(
            f"{name!r} can't name a checkpointable: it must be one directory name that the format "
            "does not use itself"
        )


def _is_checkpointable(path: str) -> bool:
    return os.path.exists(os.path.join(path, names.TREE_METADATA))


def _has(path: str, name: str) -> bool:
    return os.path.exists(os.path.join(path, name))


def find(path: str) -> list[str]:
    """Returns the names of the pytrees in a checkpoint, the default name first.

    Raises:
      InvalidLayoutError: the path holds no checkpoint.
    """
    found = [name for name in _directories(path) if _is_checkpointable(os.path.join(path, name))]
    return sorted(found, key=lambda name: name != names.DEFAULT_CHECKPOINTABLE)


def _directories(path: str) -> list[str]:
    """Returns the directories of a checkpoint that may be checkpointables, by name."""
    problem = _problem(path)
    if problem is not None:
        if ambient.current().checkpoint_layout is CheckpointLayout.AUTO:
            raise errors.InvalidLayoutError(
                f"Could not auto-detect the layout of the checkpoint at {path}: there are no "
                f"{names.SAFETENSORS} files; and as an Orbax checkpoint: {problem}"
            )
        if safetensors.find(open_directory(path)):
            problem += " It holds safetensors files: set context.checkpoint_layout = 'safetensors'."
        raise errors.InvalidLayoutError(
            f"Could not recognize the checkpoint at {path} as a valid Orbax checkpoint: {problem}"
        )
    return _scanned(path)


def _is_of_tensors(path: str) -> bool:
    """Says whether what lies at a path is to be read as safetensors files."""
    layout = ambient.current().checkpoint_layout
    if layout is CheckpointLayout.ORBAX:
        return False
    is_there = bool(safetensors.find(open_directory(path)))
    if layout is CheckpointLayout.AUTO:
        return is_there and _problem(path) is not None
    if not is_there:
        raise errors.InvalidLayoutError(
            f"Could not recognize the checkpoint at {path} as a valid Safetensors checkpoint: it "
            f"is no {names.SAFETENSORS} file, and no directory with such in it. Check the path, or "
            "leave context.checkpoint_layout at 'orbax'."
        )
    return True


def _scanned(path: str) -> list[str]:
    return sorted(
        entry.name
        for entry in files.scan(path)
        if entry.is_dir()
        and entry.name not in names.RESERVED_CHECKPOINTABLES
        and names.TEMPORARY_MARK not in entry.name
        and not _has(entry.path, names.CHECKPOINT_METADATA)
    )


def contents(path: str) -> Contents:
    """Finds all checkpointables of a checkpoint; blocks.

    A directory counts as one where the checkpoint records its handler, or records none at all, and
    where it looks like a pytree; others were put there by somebody else.

    Raises:
      InvalidLayoutError: there is no checkpoint, or a flat, older one.
      UnsupportedOptionError: safetensors files are to be read, which hold none.
    """
    if _is_of_tensors(path):
        raise errors.UnsupportedOptionError(
            f"{path} is read as safetensors files, which hold no checkpointables: use `load` and "
            "`metadata`, or leave context.checkpoint_layout at 'orbax'"
        )
    directories = _directories(path)
    if _is_checkpointable(path) and not _has(path, names.CHECKPOINT_MARKER):
        raise errors.InvalidLayoutError(
            f"{path} is a flat (direct) checkpoint with no named checkpointables: load it with "
            "load(path, checkpointable_name=None)"
        )
    document = _read_document(path)
    recorded = document.get("item_handlers")
    if not isinstance(recorded, dict):
        recorded = {}
    hidden = name_in_deletion(path)
    pytrees = {name for name in directories if _is_checkpointable(os.path.join(path, name))}
    known = {
        name: recorded.get(name)
        for name in directories
        if name != hidden and (not recorded or name in recorded or name in pytrees)
    }
    return Contents(path, document, known, frozenset(pytrees & known.keys()), hidden)


def survey(path: str) -> Contents:
    """Looks at a checkpoint that may be damaged, and lists all that it holds or should hold.

    A flat, older checkpoint has the name ''. Blocks.

    Raises:
      InvalidLayoutError: there is none, not even a damaged one.
    """
    if _is_of_tensors(path):
        return Contents(path, {}, {"": None}, frozenset({""}), None)
    problems = []
    file = os.path.join(path, names.CHECKPOINT_METADATA)
    is_there = _has(path, names.CHECKPOINT_METADATA)
    if not is_there and _has(path, names.CHECKPOINT_MARKER):
        problems.append(Problem(file, "it is missing", _AGAIN))
        directories = _scanned(path)
    else:
        directories = _directories(path)
    data = files.read_bytes(file)
    document: dict[str, Any] = {}
    try:
        if data is not None:
            document = _parsed(data)
    except ValueError as error:
        problems.append(Problem(file, f"it is damaged: {error}", _AGAIN))
    hidden = None
    try:
        hidden = name_in_deletion(path)
    except errors.DeletionRecoveryError as error:
        record = os.path.join(path, names.DELETION_RECORD)
        problems.append(Problem(record, str(error).removeprefix(f"{record} is "), ""))
    if hidden is not None:
        directory = os.path.join(path, hidden)
        problems.append(Problem(directory, "its deletion was not finished", "Delete it again."))
    recorded = document.get("item_handlers")
    recorded = recorded if isinstance(recorded, dict) else {}
    if _has(path, names.METRICS):
        directories.append(names.METRICS)
    for name in recorded:
        if name not in directories and name != hidden:
            directory = os.path.join(path, name)
            problems.append(Problem(directory, "it is recorded, and missing", _AGAIN))
    if _is_checkpointable(path) and not _has(path, names.CHECKPOINT_MARKER):
        directories = [""]
    pytrees = {name for name in directories if _is_checkpointable(os.path.join(path, name))}
    typestrs = {name: recorded.get(name) for name in directories if name != hidden}
    return Contents(path, document, typestrs, frozenset(pytrees), hidden, tuple(problems))


def check_deletable(path: str) -> None:
    """Raises if a directory is no checkpoint, not even a damaged one, and not empty.

    Raises:
      InvalidLayoutError: it is none.
    """
    is_marked = _has(path, names.CHECKPOINT_METADATA) or _has(path, names.CHECKPOINT_MARKER)
    problem = None if is_marked else _problem(path)
    if problem is not None and any(True for _ in files.scan(path)):
        raise errors.InvalidLayoutError(
            f"Not an Orbax checkpoint root: {path}: {problem} Delete it yourself if it must go."
        )


def commit_mode(options: ambient.Context) -> AtomicityMode:
    """Returns how checkpoints are committed, and recognized as such, under some options.

    Raises:
      ValueError: the older option and the newer one ask for different things.
    """
    mode, older = options.atomicity.mode, options.file.temporary_path_class
    if older is None:
        return mode
    older_mode = mode_of_temporary_path(older)
    if mode not in (AtomicityMode.AUTO, older_mode):
        raise ValueError(
            f"file.temporary_path_class asks for {older_mode!r}, and atomicity.mode for {mode!r}; "
            "leave out the former, which is deprecated"
        )
    return older_mode


def may_be_replaced(path: str) -> bool:
    """Says whether a path holds a checkpoint, or what a save of Orbax in place has left of one."""
    if _contents_problem(path) is None:
        return True
    is_in_place = commit_mode(ambient.current()) is AtomicityMode.COMMIT_FILE
    marker = files.read_bytes(os.path.join(path, names.CHECKPOINT_MARKER)) if is_in_place else None
    return marker == b"" and not _has(path, names.COMMIT_MARKER)


def _problem(path: str) -> str | None:
    """Returns why a path holds no checkpoint, or None if it does."""
    problem = _contents_problem(path)
    options = ambient.current()
    if (
        problem is None
        and commit_mode(options) is AtomicityMode.COMMIT_FILE
        and not options.atomicity.allow_legacy_atomic_rename
        and not _has(path, names.COMMIT_MARKER)
    ):
        return (
            f"it has no {names.COMMIT_MARKER}, which atomicity.mode = 'commit_file' asks for: its "
            "save has not finished, or has renamed it into place. Set "
            "atomicity.allow_legacy_atomic_rename to load the latter."
        )
    return problem


def _contents_problem(path: str) -> str | None:
    if not os.path.lexists(path):
        if sessions.find_parts(open_directory(sessions.session_path(path))):
            return "its partial saves are not finalized. Call partial.finalize first."
        return "there is no such directory. Check the path."
    if not os.path.isdir(path):
        return "it is a file, not a directory."
    if names.TEMPORARY_MARK in os.path.basename(path):
        return "its name says that it is unfinished: a save is under way or was interrupted."
    parent = os.path.dirname(path)
    if _has(parent, names.CHECKPOINT_METADATA) and not _has(path, names.CHECKPOINT_METADATA):
        return (
            f"it appears to be a subdirectory of the checkpoint {parent}. Load that, with "
            f"checkpointable_name={os.path.basename(path)!r}."
        )
    if _has(path, names.CHECKPOINT_METADATA):
        return None
    if _has(path, names.CHECKPOINT_MARKER):
        return f"{names.CHECKPOINT_METADATA} is missing."
    if _is_checkpointable(path):
        return None
    if path.endswith(names.SESSION_SUFFIX) and sessions.find_parts(open_directory(path)):
        return "it holds partial saves. Call partial.finalize, and load the checkpoint beside it."
    inside = sorted(entry.name for entry in files.scan(path) if entry.is_dir())
    if any(
        _is_checkpointable(os.path.join(path, name))
        and not _has(os.path.join(path, name), names.CHECKPOINT_METADATA)
        for name in inside
    ):
        return None
    steps = [name for name in inside if _has(os.path.join(path, name), names.CHECKPOINT_METADATA)]
    if steps:
        return f"it holds checkpoints, and is none itself. Load one of {steps[:10]} in it."
    return f"it has none of the files of one; it holds {inside[:10] or 'no directories'}."


def locate(path: str, name: str | None) -> Located:
    """Finds one pytree of a checkpoint; blocks.

    Args:
      path: the checkpoint.
      name: a checkpointable's name, `AUTO` to choose, None for a flat, older checkpoint.

    Raises:
      InvalidLayoutError: there is no checkpoint, or no such pytree in it.
      DeletionInProgressError: its deletion was begun and not finished.
    """
    if _is_of_tensors(path):
        return Located(path, None, path, {}, is_of_tensors=True)
    found = find(path)
    document = _read_document(path)
    hidden = name_in_deletion(path)
    found = [each for each in found if each != hidden]
    is_flat = _is_checkpointable(path) and not _has(path, names.CHECKPOINT_MARKER)
    if name == names.AUTO_CHECKPOINTABLE:
        if found:
            return Located(path, found[0], os.path.join(path, found[0]), document)
        if is_flat:
            return Located(path, None, path, document)
        raise errors.InvalidLayoutError(
            f"Failed to interpret path {path} as an Orbax checkpoint of a pytree: no directory in "
            f"it has a {names.TREE_METADATA}"
        )
    if name is None:
        if is_flat:
            return Located(path, None, path, document)
        cause = ValueError(f"the name must be given; the checkpoint holds {found}")
        raise errors.InvalidLayoutError(
            f"{path} is no flat checkpoint: checkpointable_name must be one of {found}"
        ) from cause
    if name == hidden:
        raise in_deletion(path, name)
    if name not in found:
        flat = "; it is a flat checkpoint, load it with checkpointable_name=None" if is_flat else ""
        cause_missing = FileNotFoundError(
            f"checkpointable {name!r} is not in {path}; it holds {found}{flat}"
        )
        raise errors.InvalidLayoutError(
            f"Failed to interpret path {path} as an Orbax checkpoint of a pytree: {cause_missing}"
        ) from cause_missing
    return Located(path, name, os.path.join(path, name), document)


def _read_document(path: str) -> dict[str, Any]:
    """Reads a checkpoint's own metadata; damage there costs only what it says."""
    file = os.path.join(path, names.CHECKPOINT_METADATA)
    data = files.read_bytes(file)
    if not data:
        return {}
    try:
        return _parsed(data)
    except ValueError as error:
        logger.error("%s is damaged and ignored: %s", file, error)
        return {}


def _parsed(data: bytes) -> dict[str, Any]:
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__}")
    return document


def in_deletion(path: str, name: str) -> errors.DeletionInProgressError:
    """Makes the error for a checkpointable whose deletion was begun and not finished."""
    return errors.DeletionInProgressError(
        f"checkpointable {name!r} of {path} is being deleted, or its deletion was interrupted; "
        f"delete it again to finish: delete({path!r}, checkpointable_name={name!r})"
    )


def name_in_deletion(path: str) -> str | None:
    """Returns the name whose deletion was begun and not finished.

    Raises:
      DeletionRecoveryError: the record of the deletion is damaged.
    """
    file = os.path.join(path, names.DELETION_RECORD)
    data = files.read_bytes(file)
    if data is None:
        return None
    try:
        return str(json.loads(data)["checkpointable_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise errors.DeletionRecoveryError(
            f"{file} is damaged: {error!r}. It is the record of a deletion that was begun: remove "
            "it if every checkpointable is whole, or delete the checkpoint."
        ) from error


async def when_settled(path: str, look: Callable[[str], T]) -> T:
    """Looks at a checkpoint, once what an interrupted overwrite had set aside is put back."""
    for _ in range(_LOOKS):
        if not await loop.to_worker(leftovers.settle, path):
            break
        await anyio.sleep(_LOOK_SECS)
    return await loop.to_worker(look, path)


async def read_whole(path: str, read: Callable[[], Awaitable[T]]) -> T:
    """Returns what `read` makes of a checkpoint that an overwrite may replace meanwhile (I4).

    What is read while a checkpoint gives way to the next may belong to either, or be gone; then it
    is read again.
    """
    for _ in range(_LOOKS):
        before = await loop.to_worker(_identity, path)
        try:
            result = await read()
        except Exception:
            if await loop.to_worker(_identity, path) == before:
                raise
        else:
            if await loop.to_worker(_identity, path) == before:
                return result
    raise errors.InvalidLayoutError(
        f"{path} was overwritten each of the {_LOOKS} times that it was read; read it again later"
    )


def _identity(path: str) -> tuple[int, ...] | None:
    """Returns what tells a checkpoint from the one before it at the same path."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def is_orbax_checkpoint(path: pathlike.PathLike | os.PathLike[str]) -> bool:
    """Says whether a path holds a finished Orbax checkpoint.

    An empty directory, a file, an unfinished save, a part of a checkpoint, and a directory of
    checkpoints are none.

    Example:
      ::

        steps = [p for p in run.iterdir() if ocp.is_orbax_checkpoint(p)]
    """
    return _problem(pathlike.absolute(path)) is None
