"""Temporary directories, and the one step that makes them visible.

Rules
  I4   A reader sees a whole checkpoint, old or new, or none; an overwrite never leaves none.

Theory of operation
  A save writes to a sibling of its destination, `<name>.orbax-checkpoint-tmp-<owner>-new`. Every
  Orbax reader takes a name with that mark for unfinished. `<owner>` is the host (and pid
  namespace), the process, when that process started, and a serial number: enough to tell a
  leftover of a dead process from a save that is under way.

  Publishing renames it to the destination. Over an old checkpoint the two names are exchanged in
  one system call where there is one; the old checkpoint is then the temporary directory, and is
  removed. Elsewhere the old one is first set aside as `...-old`. A process that dies between the
  two renames leaves no destination but a whole `...-old`: `recover`, which every reader and every
  save calls first, puts it back.

  Leftovers of dead processes are swept after a commit, in the background. A leftover of another
  host is only swept once it has not changed for a day.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._storage import files

__all__ = [
    "clear_abandoned",
    "clear_asides",
    "create",
    "discard",
    "is_abandoned_in_place",
    "publish",
    "recover",
    "remove_empty",
    "retire",
    "sweep",
    "temporary_path",
]

_FOREIGN_LEFTOVER_SECS = 24 * 3600
_serials = itertools.count()
_own_starts: dict[int, int] = {}  # by process number: a forked child has another


@functools.cache
def _host() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()}/{namespace}".encode()).hexdigest()[:8]


def _started(pid: int) -> int:
    """Returns when a process started, in the kernel's ticks; 0 where that can't be known.

    A process that has died and that nobody has waited for, a zombie, gives 0 too.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rsplit(b")", 1)[1].split()
            return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def _is_alive(pid: int, started: int) -> bool:
    """Says whether a process is alive; one that could not say when it started may be any."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return started in (0, _started(pid))


def temporary_path(final: str, use: str = "new") -> str:
    """Returns a new temporary name beside `final` that says who owns it."""
    return f"{final}{names.TEMPORARY_MARK}-{_owner(os.getpid())}-{next(_serials)}-{use}"


def _owner(pid: int) -> str:
    """Says who this process is, its number given; asks the system only until it has said."""
    started = _own_starts.get(pid) or _started(pid)
    if started:
        _own_starts[pid] = started
    return f"{_host()}-{pid}-{started}"


class _Leftover(NamedTuple):
    """A temporary directory, and what its name and its owner tell of it."""

    path: str
    final: str
    use: str
    is_owned_here: bool
    is_abandoned: bool


def _parse(path: str) -> _Leftover | None:
    parent, name = os.path.split(path)
    match = names.OWNED_TEMPORARY.fullmatch(name)
    if match is None:
        return None
    return _Leftover(
        path=path,
        final=os.path.join(parent, match["checkpoint"]),
        use=match["use"],
        is_owned_here=match["host"] == _host() and int(match["pid"]) == os.getpid(),
        is_abandoned=_is_abandoned(match, path),
    )


def _is_abandoned(owned: re.Match[str], path: str) -> bool:
    """Says whether the owner of what lies at `path` is gone, as far as that can be known."""
    if owned["host"] == _host():
        return not _is_alive(int(owned["pid"]), int(owned["started"]))
    return _is_older_than(path, _FOREIGN_LEFTOVER_SECS)


def _is_older_than(path: str, secs: float) -> bool:
    try:
        newest = max(os.stat(each).st_mtime for group in files.walk(path) for each in group)
    except (OSError, ValueError):
        return False
    return time.time() - newest > secs


def create(temporary: str, names_inside: Sequence[str], *, mode: int | None = None) -> list[str]:
    """Creates a temporary directory, directories inside it, and its parents.

    Args:
      temporary: the directory.
      names_inside: what to create in it.
      mode: its permission bits; None leaves them to the process's umask.

    Returns:
      The parents that had to be made, outermost first: their entries need syncing too.

    Raises:
      CommitError: a directory can't be made; nothing is left of those that could.
    """
    made: list[str] = []
    parent = os.path.dirname(temporary)
    missing = [temporary]
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    wanted = missing[::-1] + [os.path.join(temporary, name) for name in names_inside]
    try:
        for path in wanted:
            try:
                os.mkdir(path)
            except FileExistsError:
                if path.startswith(temporary):
                    raise
                continue  # another save has just made the same parent
            made.append(path)
        if mode is not None:
            os.chmod(temporary, mode)
    except OSError as error:
        remove_empty(made)
        raise errors.CommitError(
            f"cannot create a directory in {os.path.dirname(temporary)}: "
            f"{error.strerror or error}. Check that the path is right, writable and not full."
        ) from error
    return [path for path in made if not path.startswith(temporary)]


def remove_empty(made: Sequence[str]) -> None:
    """Removes directories that a save made, innermost first, as far as they are empty."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def publish(temporary: str, final: str, *, overwrite: bool) -> str | None:
    """Makes a complete temporary directory visible at `final` (I4), and durable.

    Returns:
      Where the checkpoint that was replaced lies now, or None if there was none.

    Raises:
      DestinationExistsError: something came to be at `final`, and `overwrite` is not set.
      CommitError: the file system refuses; the old checkpoint, if any, is where it was.
    """
    try:
        replaced = None
        if os.path.lexists(final):
            if not overwrite:
                raise errors.DestinationExistsError(
                    f"Destination {final} already exists: it appeared while the save was under "
                    "way. Save elsewhere, or with overwrite=True."
                )
            replaced = _replace(temporary, final)
        else:
            os.rename(temporary, final)
        try:
            files.fsync_directory(os.path.dirname(final))
        except OSError:
            _take_back(temporary, final, replaced)
            raise
    except errors.CheckpointError:
        raise
    except OSError as error:
        raise errors.CommitError(f"cannot publish {final}: {error.strerror or error}") from error
    return replaced


def _replace(temporary: str, final: str) -> str:
    if _exchange(temporary, final):
        return temporary
    aside = temporary_path(final, "old")
    os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(aside, final)
        raise
    return aside


def _take_back(temporary: str, final: str, replaced: str | None) -> None:
    """Undoes a change of names that can't be made durable: a save that fails changes nothing."""
    if replaced == temporary:
        _exchange(temporary, final)
        return
    os.rename(final, temporary)
    if replaced is not None:
        os.rename(replaced, final)


def _exchange(first: str, second: str) -> bool:
    """Exchanges two names in one step; False where the system or the file system can't."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    if renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), second)


def recover(final: str) -> bool:
    """Puts a checkpoint back that an interrupted overwrite had set aside.

    Returns:
      True where somebody else is changing names just now: look again in a moment.

    Raises:
      CommitError: what was set aside can't be renamed back.
    """
    if os.path.lexists(final):
        if not is_abandoned_in_place(final):
            return False
        if not any(each.use == "old" and each.is_abandoned for each in _leftovers(final)):
            return False
        clear_abandoned(final)
    asides = [each for each in _leftovers(final) if each.use == "old"]
    for aside in asides:
        if aside.is_abandoned:
            try:
                os.rename(aside.path, final)
                files.fsync_directory(os.path.dirname(final))
            except FileNotFoundError:
                return False  # another process was quicker
            except OSError as error:
                if os.path.lexists(final) or not os.path.lexists(aside.path):
                    return True  # somebody else was faster
                raise errors.CommitError(
                    f"an overwrite of {final} was interrupted, and its old checkpoint at "
                    f"{aside.path} can't be renamed back: {error.strerror or error}"
                ) from error
            return False
    return bool(asides)


def retire(aside: str, temporary: str) -> None:
    """Gives up what was set aside: renamed, it is a leftover that nobody puts back any more.

    Raises:
      CommitError: the file system refuses.
    """
    try:
        os.rename(aside, temporary)
    except OSError as error:
        raise errors.CommitError(f"cannot rename {aside}: {error.strerror or error}") from error


def clear_asides(final: str) -> None:
    """Removes what interrupted overwrites have set aside, where something has taken its place."""
    for each in _leftovers(final):
        if each.use == "old" and each.is_abandoned:
            discard(each.path)


def is_abandoned_in_place(final: str) -> bool:
    """Says whether a process that has died was writing a checkpoint in place."""
    if os.path.lexists(os.path.join(final, names.COMMIT_MARKER)):
        return False
    try:
        owner = files.read_bytes(os.path.join(final, names.CHECKPOINT_MARKER))
    except OSError:
        return False
    match = names.OWNED_TEMPORARY.fullmatch((owner or b"").decode(errors="replace"))
    return match is not None and _is_abandoned(match, final)


def clear_abandoned(final: str) -> None:
    """Removes what a process that has died was writing in place, if it did."""
    if is_abandoned_in_place(final):
        hidden = temporary_path(final)
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            os.rename(final, hidden)
            discard(hidden)


def _leftovers(final: str | None, parent: str | None = None) -> list[_Leftover]:
    parent = parent if final is None else os.path.dirname(final)
    assert parent is not None
    found = []
    for entry in files.scan(parent):
        leftover = _parse(entry.path) if names.TEMPORARY_MARK in entry.name else None
        if leftover is not None and final in (None, leftover.final):
            found.append(leftover)
    return found


def discard(path: str) -> None:
    """Removes a temporary directory of ours; one that is already gone is fine."""
    if names.TEMPORARY_MARK not in os.path.basename(path):
        raise AssertionError(f"{path} carries no temporary mark and is not ours to remove")
    if os.path.lexists(path):
        files.remove_tree(path)


def sweep(parent: str) -> list[str]:
    """Removes what dead processes left in `parent`; returns what was removed.

    Nothing is removed that may still be needed: a checkpoint set aside goes back to its place
    first, and directories without our mark, or of a living owner, are never touched.
    """
    removed = []
    for leftover in _leftovers(None, parent):
        if not leftover.is_abandoned:
            continue
        if leftover.use == "old" and (
            not os.path.lexists(leftover.final) or is_abandoned_in_place(leftover.final)
        ):
            recover(leftover.final)
            continue
        discard(leftover.path)
        removed.append(leftover.path)
    return removed
