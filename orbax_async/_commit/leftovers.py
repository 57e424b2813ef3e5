"""What unfinished work has left beside a checkpoint: whose it is, and what becomes of it.

Rules
  I4   The only copy of a checkpoint is never removed, and never out of sight for long.
  I15  What is held is released, whatever was raised; what could not be removed is released, too.

Theory of operation
  Work that is under way lies beside its destination, at
  `<name>.orbax-checkpoint-tmp-<machine>-<process>-00-<serial>-<use>`. Every Orbax reader takes a
  name with that mark for unfinished. `new` is what is being written or removed: its owner needs
  it, and nobody else ever will. `old` is a checkpoint that was set aside while its place is taken
  by two renames: it is whole as long as it has that name.

  **Put back.** Whoever finds nothing at a name, and an `old` of it beside, puts that back at once,
  whoever set it aside; its owner sets it aside again (`rename`). Nobody has to be judged.

  **Alive or dead.** An owner holds a lock on what it owns. A lock ends with its process, so who can
  take one on the same machine (told by the kernel's boot id, which containers and namespaces share)
  has found an owner that is dead. On another machine, or where nothing can be locked, an owner is
  taken for dead when it has been silent for two minutes by the file system's clock; a save that is
  under way touches its directory every ten seconds.

  **Sweep.** After a commit what dead owners have left beside it is renamed, so that it is out of
  their reach, and removed. An `old` is removed only while a proven checkpoint has its name.

  Names of the version before have the time at which the process began in place of `00`, and the
  hash of a host's name and pid namespace in place of the machine's. Their owners held no lock: a
  process of this host is looked up, and one of another is dead after a day without a change.

  Every function blocks.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import re
import secrets
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._storage.directory import Capability, Directory, Lock
from orbax_async._storage.local import open_directory
from orbax_async._trace import logger

_SILENT_SECS = 120.0
_SILENT_SECS_BEFORE = 24 * 3600.0  # of owners of the version before, who do not touch anything
_HOLDS_LOCKS = "00"  # in a name, in place of the time at which its process began
_BUSY_SECS, _PAUSE_SECS, _TRIES = 10.0, 0.01, 3
_CANNOT_LOCK = frozenset(
    {
        *(errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK),
        *(errno.EBADF, errno.EACCES),  # NFS of a directory; one that can't be opened to read
    }
)

_serials = itertools.count(secrets.randbits(40))  # no two processes share a name
_looked_after: set[str] = set()  # paths that sweeps of this process leave alone


# Names.


@functools.cache
def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            identity = file.read()
    except OSError:
        identity = f"{socket.gethostname()}/{uuid.getnode()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def temporary(final: Directory, use: str = "new") -> Directory:
    """Returns a new name beside a checkpoint that says who owns it."""
    owner = f"{_machine()}-{os.getpid()}-{_HOLDS_LOCKS}-{next(_serials)}"
    return final.parent / f"{final.name}{names.TEMPORARY_MARK}-{owner}-{use}"


def temporary_path(final: str, use: str = "new") -> str:
    """Returns a new path beside a checkpoint's that says who owns it."""
    return temporary(open_directory(final), use).path


class _Leftover(NamedTuple):
    """What lies at a name of ours, and what the name tells."""

    directory: Directory
    final: Directory
    owner: re.Match[str]

    @property
    def is_aside(self) -> bool:
        """Whether it is a checkpoint that was set aside."""
        return self.owner["use"] == "old"


def _find(parent: Directory, final: str | None = None) -> Iterator[_Leftover]:
    for entry in parent.entries():
        owner = names.OWNED_TEMPORARY.fullmatch(entry.name)
        if owner is not None and final in (None, owner["checkpoint"]):
            yield _Leftover(parent / entry.name, parent / owner["checkpoint"], owner)


# Holding.


def look_after(path: str) -> None:
    """Has the sweeps of this process leave a temporary path alone, although nothing holds it."""
    _looked_after.add(path)


def leave(path: str) -> None:
    """Leaves a path that was looked after to any sweep."""
    _looked_after.discard(path)


class _NoLock:
    def release(self) -> None:
        pass


_NO_LOCK = _NoLock()


class Held:
    """A directory that is held: everybody else leaves it alone until it is released.

    Attributes:
      directory: where it lies now.
    """

    def __init__(self, directory: Directory, lock: Lock) -> None:
        self.directory = directory
        self._lock = lock

    @property
    def is_locked(self) -> bool:
        """Whether a lock holds it; else it is held by what changes in it."""
        return self._lock is not _NO_LOCK

    def release(self) -> None:
        """Lets others have it; once more does nothing."""
        self._lock.release()

    def rename(self, target: Directory) -> None:
        """Gives it another name, or releases it."""
        try:
            self.directory.rename(target)
        except BaseException:
            self.release()
            raise
        self.directory = target

    def hide(self, final: Directory) -> None:
        """Takes it out of sight in one step, beside a name; or releases it."""
        self.rename(temporary(final))

    def remove_where_it_lies(self) -> None:
        """Removes a checkpoint durably where nothing can be renamed, and releases it.

        Its marker says first whose work that is, and goes last: if that one dies, `clear` goes on.
        """
        final = self.directory
        try:
            if owner_in_place(final) is None:
                final.write(names.CHECKPOINT_MARKER, temporary(final).name.encode())
                final.sync([names.CHECKPOINT_MARKER, ""])
            for name in (names.COMMIT_MARKER, names.CHECKPOINT_METADATA):
                final.remove(name)
                final.sync([""])
            for entry in final.entries():
                if entry.name != names.CHECKPOINT_MARKER:
                    final.remove(entry.name)
            final.sync([""])
            final.remove()
            final.parent.sync([""])
        finally:
            self.release()

    def dispose(self) -> bool:
        """Removes what is out of sight; what can't be removed is left to any later sweep."""
        try:
            discard(self.directory)
        except OSError as error:
            logger.warning("%s could not be removed: %s", self.directory.path, error)
            return False
        finally:
            self.release()
        return True


def hold(directory: Directory, *, busy_secs: float = 0.0) -> Held | None:
    """Holds a directory; None while somebody else does, or if it is gone.

    Args:
      directory: it can be held, if by nothing but the look of it, where it can't be locked.
      busy_secs: how long to wait for whoever has it.
    """
    waiting = threading.Event()  # never set: its wait is a pause
    for _ in range(1 + round(busy_secs / _PAUSE_SECS)):
        if not directory.can(Capability.LOCK):
            return Held(directory, _NO_LOCK)
        try:
            lock = directory.lock()
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise
            return Held(directory, _NO_LOCK)
        if lock is not None:
            return Held(directory, lock)
        if directory.status() is None:
            return None
        if busy_secs:
            waiting.wait(_PAUSE_SECS)
    return None


def make_held(directory: Directory, marker: bytes, *, mode: int | None = None) -> Held:
    """Makes a directory with the marker of a checkpoint in it, and holds it.

    Raises:
      FileExistsError: somebody else has made it.
      OSError: it can't be made.
    """
    look_after(directory.path)
    try:
        for _ in range(_TRIES):
            directory.make(mode=mode)
            directory.write(names.CHECKPOINT_MARKER, marker, only_if_absent=True)
            held = hold(directory, busy_secs=_BUSY_SECS)
            if held is not None:
                return held
            # Another process has seen it before it was locked, and has removed it.
    finally:
        leave(directory.path)
    raise OSError(errno.EBUSY, "other processes take it for a leftover", directory.path)


def hold_own(directory: Directory) -> Held:
    """Holds a directory; raises OSError if it is gone, or somebody else goes on holding it."""
    held = hold(directory, busy_secs=_BUSY_SECS)
    if held is None:
        code = errno.ENOENT if directory.status() is None else errno.EBUSY
        raise OSError(code, os.strerror(code), directory.path)
    return held


def hide(directory: Directory) -> Held:
    """Takes a directory out of sight in one step, and holds it; its parent is still to be synced.

    Raises:
      OSError: it can't be renamed, is gone, or somebody else holds it.
    """
    held = hold_own(directory)
    held.hide(directory)
    return held


def discard(directory: Directory) -> None:
    """Removes what lies at a temporary name; what is gone already is fine."""
    if names.TEMPORARY_MARK not in directory.name:
        raise AssertionError(f"{directory.path} has no temporary mark and is not ours to remove")
    directory.remove()


def living_owners(final: Directory) -> str:
    """Says which other processes are at work beside a checkpoint; nothing if it knows of none."""
    owners = []
    for each in _find(final.parent, final.name):
        held = hold(each.directory)
        if held is not None:
            held.release()
        elif int(each.owner["pid"]) != os.getpid():
            owners.append(f"process {each.owner['pid']}")
    return " and ".join(owners)


# Alive or dead.


def _take(directory: Directory, owner: re.Match[str] | None) -> Held | None:
    """Holds what a dead owner has left; None while there may be one that is alive.

    Args:
      directory: what is to be taken.
      owner: what says whose it is; None where nothing does.
    """
    held = None if directory.path in _looked_after else hold(directory)
    if held is None or owner is None:
        return held
    is_dead = False
    try:
        is_dead = _is_dead(owner, held)
    finally:
        if not is_dead:
            held.release()
    return held if is_dead else None


def _remove(directory: Directory, final: Directory, owner: re.Match[str] | None) -> bool:
    """Removes what a dead owner has left; returns whether it did.

    It is renamed first, so that what is called `old` is always whole, and a late owner finds
    nothing.
    """
    held = _take(directory, owner)
    if held is None:
        return False
    if not final.can(Capability.RENAME):
        held.remove_where_it_lies()
        return True
    try:
        held.hide(final)
    except FileNotFoundError:  # another process was quicker
        return False
    return held.dispose()


def _is_dead(owner: re.Match[str], held: Held) -> bool:
    directory = held.directory
    if owner["started"] == _HOLDS_LOCKS:
        if owner["host"] == _machine() and held.is_locked:
            return True
        status = directory.status()
        return status is None or _is_past(directory, status.modified_nsecs, _SILENT_SECS)
    if owner["host"] == _host_before():
        return not _is_running(int(owner["pid"]), int(owner["started"]))
    files, directories = directory.walk()
    found = [directory.status(name) for name in (*files, *directories)]
    newest = max((each.modified_nsecs for each in found if each is not None), default=0)
    return _is_past(directory, newest, _SILENT_SECS_BEFORE)


def _is_past(directory: Directory, nsecs: int, secs: float) -> bool:
    """Says whether a time has passed by, by the clock of the file system."""
    clock = temporary(directory.parent / "clock")
    try:
        clock.make()
        now = clock.status()
        clock.remove_if_empty()
    except OSError:  # nothing can be changed here: nothing will be removed either
        return False
    return now is not None and abs(now.modified_nsecs - nsecs) > secs * 1e9


@functools.cache
def _host_before() -> str:
    """Returns what the version before called this host, and pid namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()}/{namespace}".encode()).hexdigest()[:8]


def _is_running(pid: int, started: int) -> bool:
    """Says whether a process runs; one that could not say when it began may be any of its number.

    A process that has died and that nobody has waited for, a zombie, does not run.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    began = 0
    with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/stat", "rb") as f:
        fields = f.read().rsplit(b")", 1)[1].split()
        began = 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    return started in (0, began)


# What is found at a checkpoint's own name.


def owner_in_place(final: Directory) -> re.Match[str] | None:
    """Returns who is writing, or was, at a checkpoint's own name; None for nobody that it says."""
    marker = final.read(names.CHECKPOINT_MARKER)
    return names.OWNED_TEMPORARY.fullmatch((marker or b"").decode(errors="replace"))


def _is_proven(final: Directory) -> bool:
    return final.status(names.COMMIT_MARKER) is not None


def is_hollow(directory: Directory, *, may_have: str = names.CHECKPOINT_MARKER) -> bool:
    """Says whether what is there holds nothing: directories, and perhaps a marker without an owner.

    A power cut leaves such a marker: empty, or with a part of what was written to it.
    """
    status = directory.status()
    if status is None or status.kind != "directory":
        return False
    for name, is_directory in directory.entries():
        if is_directory and is_hollow(directory / name, may_have=""):
            continue
        if name != may_have:
            return False
    return not may_have or owner_in_place(directory) is None


def is_unfinished(final: Directory) -> bool:
    """Says whether what lies at a checkpoint's name is what a save in place has not finished."""
    status = final.status()
    if status is None or status.kind != "directory" or _is_proven(final):
        return False
    if owner_in_place(final) is not None:
        return True
    if final.status(names.CHECKPOINT_METADATA) is not None:
        return False
    return final.status(names.CHECKPOINT_MARKER) is not None or is_hollow(final)


def settle(path: str) -> bool:
    """Puts a checkpoint back that an overwrite had set aside; whoever looks at a path calls this.

    Returns:
      True where somebody else is changing names just now: look again in a moment.

    Raises:
      CommitError: what was set aside can't be put back, and nobody else is at it.
    """
    final = open_directory(path)
    with errors.reported_as(errors.CommitError, f"cannot find out what lies at {path}"):
        if final.status() is None:
            return _put_back(final)
        if is_unfinished(final):
            _undo_overwrite_in_place(final)
        return False


def _put_back(final: Directory) -> bool:
    asides = [each.directory for each in _find(final.parent, final.name) if each.is_aside]
    if not asides:
        return False
    aside = max(asides, key=_modified_nsecs)
    try:
        aside.rename(final)
    except OSError as error:
        if final.status() is not None or aside.status() is None:
            return True  # somebody else was faster
        held = hold(aside)
        if held is None:
            return True  # its owner is at it
        held.release()
        raise errors.CommitError(
            f"an overwrite of {final.path} was interrupted, and its old checkpoint at "
            f"{aside.path} can't be renamed back: {error.strerror or error}"
        ) from error
    with contextlib.suppress(OSError):  # after a power cut it is put back again
        final.parent.sync([""])
    return False


def _modified_nsecs(directory: Directory) -> int:
    status = directory.status()
    return 0 if status is None else status.modified_nsecs


def _undo_overwrite_in_place(final: Directory) -> None:
    """Puts back what the version before had set aside, to write in its place, and died."""
    for each in _find(final.parent, final.name):
        aside = _take(each.directory, each.owner) if each.is_aside else None
        if aside is not None:
            try:
                if _remove(final, final, owner_in_place(final)):
                    aside.directory.rename(final)
                    final.parent.sync([""])
            finally:
                aside.release()
            return


def clear(final: Directory, *, is_in_place: bool = False) -> None:
    """Removes what a dead save in place has left; whoever is to write at a path calls this.

    It goes if it says whose it was, and that owner is dead; or if it holds nothing but an empty
    marker.

    Args:
      final: the path.
      is_in_place: whether a save in place is to begin there; then what holds no byte at all, with
        which it begins, goes too.
    """
    if is_unfinished(final):
        owner = owner_in_place(final)
        may_go = is_in_place or final.status(names.CHECKPOINT_MARKER) is not None
        if owner is not None or (may_go and is_hollow(final)):
            _remove(final, final, owner)


def retire(final: Directory) -> None:
    """Removes what was set aside of a checkpoint that is proven, so that nobody puts it back."""
    for each in _find(final.parent, final.name):
        if each.is_aside and _is_proven(final):
            _remove(*each)


def sweep(path: str) -> list[str]:
    """Removes what dead owners have left in a directory; returns what was removed.

    Nothing is removed that may still be needed: a checkpoint set aside goes back to its place
    first, and what has no mark of ours, or an owner that may be alive, is never touched.
    """
    removed = []
    for each in _find(open_directory(path)):
        try:
            if each.is_aside and not _is_proven(each.final):
                settle(each.final.path)
            elif _remove(*each):
                removed.append(each.directory.path)
        except OSError as error:
            logger.warning("%s could not be swept: %s", each.directory.path, error)
    return removed
