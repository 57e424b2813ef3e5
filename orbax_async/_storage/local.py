"""The directory of a local file system, and which directory a path means."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import errno
import functools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self, cast, final

from orbax_async._storage.directory import Capability, Directory, Entry, Kind, Lock, Status

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_SYNC_FILE_RANGE_WRITE = 2
_AT_CWD, _RENAME_EXCHANGE = -100, 2
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_NO_EMPTY_DIRECTORY = (errno.ENOTEMPTY, errno.EEXIST, *_NOTHING_THERE)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class LocalDirectory:
    """A directory of a local file system, by its absolute path."""

    path: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return os.path.basename(self.path)

    @property
    def parent(self) -> Self:
        """The directory that holds it."""
        return type(self)(os.path.dirname(self.path))

    def __truediv__(self, name: str) -> Self:
        return type(self)(os.path.join(self.path, name) if name else self.path)

    def can(self, capability: Capability) -> bool:
        """Says whether it has a capability; an exchange may turn out impossible all the same."""
        match capability:
            case Capability.EXCHANGE:
                return _renameat2() is not None
            case Capability.LOCK:
                return fcntl is not None
            case _:
                return True

    # Looking.

    def status(self, name: str = "", *, follow_links: bool = False) -> Status | None:
        """Returns what is known of a name, or of what a link leads to; None where nothing is."""
        try:
            path = f"{self.path}/{name}" if name else self.path
            found = os.stat(path, follow_symlinks=follow_links)
        except (FileNotFoundError, NotADirectoryError):
            return None
        kind: Kind = "file"
        if stat.S_ISDIR(found.st_mode):
            kind = "directory"
        elif stat.S_ISLNK(found.st_mode):
            kind = "link"
        identity = (found.st_dev, found.st_ino, found.st_mtime_ns)
        return Status(kind, found.st_size, found.st_mtime_ns, identity)

    def entries(self) -> list[Entry]:
        """Returns what lies directly inside, by name; nothing where there is no directory."""
        try:
            with os.scandir(self.path) as found:
                return sorted(Entry(each.name, each.is_dir()) for each in found)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self) -> tuple[list[str], list[str]]:
        """Returns (files, directories) below it by relative name, deepest directories first."""
        files: list[str] = []
        directories: list[str] = []
        for directory, _, names in os.walk(self.path, topdown=False, onerror=_unless_gone):
            below = os.path.relpath(directory, self.path).replace(os.sep, "/")
            prefix = "" if below == "." else f"{below}/"
            files += [prefix + name for name in names]
            directories.append(prefix[:-1])
        return files, directories

    def outward_links(self) -> list[str]:
        """Returns links below it that lead out of it, pipes and devices, by relative name."""
        root, found, pending = "", [], [self.path]
        while pending:
            try:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        if entry.is_symlink():
                            root = root or os.path.join(os.path.realpath(self.path), "")
                            if not os.path.realpath(entry.path).startswith(root):
                                found.append(os.path.relpath(entry.path, self.path))
                        elif entry.is_dir():
                            pending.append(entry.path)
                        elif not entry.is_file():
                            found.append(os.path.relpath(entry.path, self.path))
            except (FileNotFoundError, NotADirectoryError):
                continue
        return sorted(found)

    def read(self, name: str, start: int = 0, nbytes: int | None = None) -> bytes | None:
        """Returns the bytes of a file, or a range of them; None where there is no such file."""
        path = f"{self.path}/{name}"
        try:
            with open(path, "rb", buffering=0, opener=_open_at_once) as file:
                if start:
                    file.seek(start)
                if nbytes is None:
                    return file.read()
                # A read with a limit takes memory for all of it, and may end before it.
                nbytes = min(nbytes, max(0, os.fstat(file.fileno()).st_size - start))
                data = file.read(nbytes)
                while len(data) < nbytes and (more := file.read(nbytes - len(data))):
                    data += more
                return data
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            error.filename = path  # a read itself names no file
            raise

    def is_writable(self) -> bool:
        """Says whether permission bits let this process make something in it."""
        return os.access(self.path, os.W_OK | os.X_OK)

    # Changing.

    def make(self, *, mode: int | None = None) -> None:
        """Makes the directory, but not its parents."""
        os.mkdir(self.path)
        if mode is not None:
            os.chmod(self.path, mode)

    def write(self, name: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """Writes a whole file, and makes the directories above it.

        In as few system calls as can be: for each Python lets go of the GIL, and beside a program
        that computes in Python it takes 5 ms to get it back.
        """
        path, how = f"{self.path}/{name}", "xb" if only_if_absent else "wb"
        for is_second in (False, True):
            try:
                with open(path, how, buffering=0) as file:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[file.write(rest) :]
                return
            except FileNotFoundError:
                if is_second:
                    raise
                os.makedirs(os.path.dirname(path), exist_ok=True)

    def touch(self) -> None:
        """Renews the time at which the directory was last changed, by the file system's clock."""
        try:
            os.utime(self.path)
        except OSError as error:
            error.filename = self.path
            raise

    def remove(self, name: str = "") -> None:
        """Removes a file, or a directory with all that is in it; what is gone already is fine."""
        path = (self / name).path
        try:
            os.unlink(path)
        except (IsADirectoryError, PermissionError):  # what some systems say of a directory
            if not os.path.isdir(path) or os.path.islink(path):
                raise
            _remove_tree(path)
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise

    def remove_if_empty(self) -> None:
        """Removes the directory, unless there is something in it, or no directory."""
        try:
            os.rmdir(self.path)
        except OSError as error:
            if error.errno not in _NO_EMPTY_DIRECTORY:
                raise

    # Lasting.

    def sync(self, names: Iterable[str]) -> None:
        """Makes files, and the entries of directories, durable, in the order given."""
        for name in names:
            path = f"{self.path}/{name}" if name else self.path
            if os.name == "nt" and os.path.isdir(path):
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                error.filename = path
                raise
            finally:
                os.close(descriptor)

    def start_writeback(self, name: str) -> None:
        """Has the system begin to write a file to its disk, where it can be told to.

        It waits for nothing but room in the disk's queue. Errors are for `sync` to tell: this
        marks none of them as told.
        """
        sync_file_range = _sync_file_range()
        if sync_file_range is not None:
            descriptor = os.open(f"{self.path}/{name}", os.O_RDONLY)
            try:
                sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)  # all of it
            finally:
                os.close(descriptor)

    def kvstore(self) -> dict[str, Any]:
        """Returns TensorStore's specification of the key-value store that lies here."""
        return {"driver": "file", "path": os.path.join(self.path, "")}

    # Capabilities.

    def rename(self, target: Self) -> None:
        """Gives the directory another name, which nothing may have."""
        os.rename(self.path, target.path)

    def replace(self, name: str, target: str) -> None:
        """Gives a file another name, in place of what has it."""
        os.replace((self / name).path, (self / target).path)

    def exchange(self, other: Self) -> bool:
        """Exchanges its name with another's in one step; False where the system can't."""
        renameat2 = _renameat2()
        if renameat2 is None:
            return False
        first, second = os.fsencode(self.path), os.fsencode(other.path)
        if renameat2(_AT_CWD, first, _AT_CWD, second, _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            return False
        raise OSError(code, os.strerror(code), other.path)

    def link(self, name: str, target: Self, target_name: str) -> None:
        """Gives a file a second name in another directory; copies it where that can't be."""
        source, new = (self / name).path, (target / target_name).path
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, "two files of the same name", new)
        os.makedirs(os.path.dirname(new), exist_ok=True)
        try:
            os.link(source, new)
        except OSError:
            shutil.copyfile(source, new)

    def lock(self) -> Lock | None:
        """Locks the directory for this process; None while another lock is held, or it is gone."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        lock = _FileLock(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            lock.release()
            raise
        lock.release()
        return None


_opener: contextvars.ContextVar[Callable[[str], Directory]] = contextvars.ContextVar(
    "orbax_async.opener", default=LocalDirectory
)


def open_directory(path: str | os.PathLike[str]) -> Directory:
    """Returns the directory that a path means; it need not be there."""
    text = os.fspath(path)
    # To ask for the working directory blocks, and may fail.
    return _opener.get()(text if os.path.isabs(text) else os.path.abspath(text))


@contextlib.contextmanager
def opened_by(opener: Callable[[str], Directory]) -> Iterator[None]:
    """Has another function open directories, for operations that begin inside the block.

    This is how tests count, delay and fail what an operation asks of its storage.
    """
    token = _opener.set(opener)
    try:
        yield
    finally:
        _opener.reset(token)


class _FileLock:
    """A lock on the open file of a descriptor."""

    _held: ClassVar[set[_FileLock]] = set()

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._held.add(self)

    def release(self) -> None:
        """Ends it, also where a forked child has the file open."""
        self._held.discard(self)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except OSError:
            pass  # to close it ends the lock as well
        finally:
            os.close(descriptor)

    @classmethod
    def forget_all(cls) -> None:
        """Closes the files in a forked child, which would else hold its parent's locks for it."""
        for lock in cls._held:
            if lock._descriptor is not None:
                os.close(lock._descriptor)
                lock._descriptor = None
        cls._held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_FileLock.forget_all)


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file; a pipe that nobody writes to is empty, and not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _remove_tree(path: str) -> None:
    failures: list[BaseException] = []

    def go_on(function: object, name: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            failures.append(error)

    if sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=go_on)
    else:
        shutil.rmtree(path, onerror=lambda f, n, info: go_on(f, n, info[1]))
    if failures:
        raise failures[0]


@functools.cache
def _c_function(name: str) -> Any:
    """Returns a function of the C library of Linux; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None


def _renameat2() -> Any:
    return _c_function("renameat2")


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = _c_function("sync_file_range")
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int] | None", function)
