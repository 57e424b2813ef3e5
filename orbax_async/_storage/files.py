"""Plain files: written whole, read whole, synced, removed. Every function blocks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import cast

__all__ = [
    "fsync_directory",
    "fsync_file",
    "link_tree",
    "read_bytes",
    "remove_tree",
    "sizes",
    "start_writeback",
    "walk",
    "write_bytes",
]

_SYNC_FILE_RANGE_WRITE = 2


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Creates `path` (and its parents) with `data`; durability is the commit's business.

    In as few system calls as can be: for each Python lets go of the GIL, and beside a program that
    computes in Python it takes 5 ms to get it back.
    """
    try:
        _write(path, data)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _write(path, data)


def _write(path: str | os.PathLike[str], data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def read_bytes(path: str | os.PathLike[str]) -> bytes | None:
    """Returns the bytes of `path`, or None where there is no such file."""
    try:
        return pathlib.Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def fsync_file(path: str) -> None:
    """Makes the contents of one file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writeback(path: str) -> None:
    """Has the system begin to write a file to its disk, where it can be told to.

    Waits for nothing but room in the disk's queue. Errors are for `fsync_file` to tell: this marks
    none of them as told.
    """
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)  # all of it
        finally:
            os.close(descriptor)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Returns Linux's function of that name; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int]", function)


def fsync_directory(path: str) -> None:
    """Makes the entries of one directory durable, where the platform can sync a directory."""
    if os.name == "nt":
        return
    fsync_file(path)


def link_tree(source: str, target: str) -> None:
    """Gives a file, or each file below a directory, a second name; copies it where that can't be.

    Raises:
      FileExistsError: there is a file of that name already.
    """
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
        for entry in scan(source):
            link_tree(entry.path, os.path.join(target, entry.name))
    elif os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "two files of the same name", target)
    else:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def walk(root: str) -> tuple[list[str], list[str]]:
    """Returns (files, directories) below and including `root`, deepest directories first."""
    files: list[str] = []
    directories: list[str] = []
    for directory, _, names in os.walk(root, topdown=False):
        files.extend(os.path.join(directory, name) for name in names)
        directories.append(directory)
    return files, directories


def sizes(root: str) -> dict[str, int]:
    """Returns the bytes of each file below a directory, by its path from there, with `/`."""
    found = {}
    for path in walk(root)[0]:
        with contextlib.suppress(FileNotFoundError):
            name = os.path.relpath(path, root).replace(os.sep, "/")
            found[name] = os.path.getsize(path)
    return found


def remove_tree(path: str) -> None:
    """Removes a directory tree; what is already gone is fine."""

    def retry_or_raise(function: object, name: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    if sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=retry_or_raise)
    else:
        shutil.rmtree(path, onerror=lambda f, n, info: retry_or_raise(f, n, info[1]))


def scan(path: str) -> Iterator[os.DirEntry[str]]:
    """Yields the entries of a directory; nothing where there is no such directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        yield from entries
