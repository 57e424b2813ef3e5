"""A directory in memory, which TensorStore sees as well: like a file system, or like a bucket."""

from __future__ import annotations

import errno
import itertools
import os
import posixpath
import threading
import time
import weakref
from collections.abc import Collection, Iterable
from typing import Any, Self

import tensorstore as ts

from orbax_async._storage.array_store import shared_context
from orbax_async._storage.directory import Capability, Entry, Status

LIKE_A_FILE_SYSTEM = frozenset(Capability) - {Capability.MAP}
LIKE_A_BUCKET: frozenset[Capability] = frozenset()

_serials = itertools.count()


class MemoryStore:
    """What lies in memory, under absolute paths; `open` opens directories.

    A store that can't rename is like a bucket: what is no empty directory is there for as long as
    something lies in it.
    """

    def __init__(self, capabilities: Collection[Capability] = LIKE_A_FILE_SYSTEM) -> None:
        assert Capability.MAP not in capabilities, "no file of the local system holds it"
        self.capabilities = frozenset(capabilities)
        self.mutex = threading.RLock()
        self.directories = {"/"}
        self.touched: dict[str, int] = {}
        self.locks: dict[str, _MemoryLock] = {}
        self.prefix = f"test-{next(_serials)}"
        self.files = ts.KvStore.open(
            {"driver": "memory", "path": self.prefix}, context=shared_context()
        ).result()
        self._changes: dict[str, tuple[bytes, int]] = {}
        weakref.finalize(self, self.files.delete_range, ts.KvStore.KeyRange()).atexit = False

    def open(self, path: str) -> MemoryDirectory:
        """Returns the directory of an absolute path."""
        return MemoryDirectory(path, self)

    def paths(self, below: str) -> list[str]:
        """Returns the files below a directory."""
        prefix = _inside(below).encode()
        keys = self.files.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + b"0")).result()
        return sorted(key.decode() for key in keys)

    def has_file(self, path: str) -> bool:
        """Says whether there is a file."""
        return self.files.read(path).result().state == "value"

    def has_directory(self, path: str) -> bool:
        """Says whether there is a directory, or something in it."""
        return (
            path in self.directories
            or bool(self.paths(path))
            or any(each.startswith(_inside(path)) for each in self.directories)
        )

    def modified_nsecs(self, path: str, generation: bytes) -> int:
        """Returns when a file was found to be another; TensorStore does not tell."""
        known = self._changes.get(path)
        if known is None or known[0] != generation:
            known = self._changes[path] = (generation, time.time_ns())
        return known[1]

    def forget(self, path: str) -> None:
        """Removes a file, or a directory with all that is in it."""
        for each in (path, *self.paths(path)):
            self.files.write(each, None).result()
        self.directories -= {
            each for each in self.directories if each == path or each.startswith(_inside(path))
        }

    def move(self, source: str, target: str) -> None:
        """Gives a directory another name, with its lock."""

        def renamed(path: str) -> str:
            is_inside = path == source or path.startswith(_inside(source))
            return target + path[len(source) :] if is_inside else path

        for each in self.paths(source):
            self.files.write(renamed(each), self.files.read(each).result().value).result()
            self.files.write(each, None).result()
        self.directories = {renamed(each) for each in self.directories}
        self.locks = {renamed(each): lock for each, lock in self.locks.items()}


class _MemoryLock:
    def __init__(self, store: MemoryStore, path: str) -> None:
        self._store = store
        store.locks[path] = self

    def release(self) -> None:
        with self._store.mutex:
            for path, lock in list(self._store.locks.items()):
                if lock is self:
                    del self._store.locks[path]


class MemoryDirectory:
    """A directory of a `MemoryStore`."""

    def __init__(self, path: str, store: MemoryStore) -> None:
        self.path = path
        self._store = store

    def __repr__(self) -> str:
        return f"MemoryDirectory({self.path!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MemoryDirectory) and (
            (self.path, self._store) == (other.path, other._store)
        )

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> Self:
        return type(self)(posixpath.dirname(self.path), self._store)

    def __truediv__(self, name: str) -> Self:
        return type(self)(self._at(name), self._store)

    def _at(self, name: str) -> str:
        return posixpath.join(self.path, name) if name else self.path

    def can(self, capability: Capability) -> bool:
        return capability in self._store.capabilities

    # Looking.

    def status(self, name: str = "", *, follow_links: bool = False) -> Status | None:
        path = self._at(name)
        with self._store.mutex:
            found = self._store.files.read(path).result()
            if found.state == "value":
                generation = found.stamp.generation
                nsecs = self._store.modified_nsecs(path, generation)
                return Status("file", len(found.value), nsecs, generation)
            if not self._store.has_directory(path):
                return None
            return Status("directory", 0, self._store.touched.get(path, 0), path)

    def entries(self) -> list[Entry]:
        with self._store.mutex:
            inside = _inside(self.path)
            files = {path[len(inside) :] for path in self._store.paths(self.path)}
            directories = {
                path[len(inside) :]
                for path in self._store.directories
                if path.startswith(inside) and path != inside
            }
            directories |= {name for name in files if "/" in name}
            are_directories = dict.fromkeys(files - directories, False) | {
                name.split("/")[0]: True for name in directories
            }
            return sorted(Entry(*each) for each in are_directories.items())

    def walk(self) -> tuple[list[str], list[str]]:
        with self._store.mutex:
            files: list[str] = []
            directories: list[str] = []
            for name, is_directory in self.entries():
                if not is_directory:
                    files.append(name)
                    continue
                below = (self / name).walk()
                files += [f"{name}/{each}" for each in below[0]]
                directories += [f"{name}/{each}".rstrip("/") for each in below[1]]
            is_there = self._store.has_directory(self.path)
            return files, directories + ([""] if is_there else [])

    def outward_links(self) -> list[str]:
        return []

    def read(self, name: str, start: int = 0, nbytes: int | None = None) -> bytes | None:
        found = self._store.files.read(self._at(name)).result()
        if found.state != "value":
            return None
        data: bytes = found.value
        return data[start : None if nbytes is None else start + nbytes]

    def is_writable(self) -> bool:
        return self.status() is not None

    # Changing.

    def make(self, *, mode: int | None = None) -> None:
        with self._store.mutex:
            if self._store.has_file(self.path) or self._store.has_directory(self.path):
                raise _error(errno.EEXIST, self.path)
            if not self._store.has_directory(self.parent.path):
                raise _error(errno.ENOENT, self.path)
            self._store.directories.add(self.path)

    def write(self, name: str, data: bytes, *, only_if_absent: bool = False) -> None:
        path = self._at(name)
        with self._store.mutex:
            if self._store.has_directory(path):
                raise _error(errno.EISDIR, path)
            if only_if_absent and self._store.has_file(path):
                raise _error(errno.EEXIST, path)
            if self.can(Capability.RENAME):
                above = posixpath.dirname(path)
                while above not in self._store.directories:
                    if self._store.has_file(above):
                        raise _error(errno.ENOTDIR, path)
                    self._store.directories.add(above)
                    above = posixpath.dirname(above)
            self._store.files.write(path, data).result()

    def touch(self) -> None:
        self._need_directory(self.path)
        self._store.touched[self.path] = time.time_ns()

    def remove(self, name: str = "") -> None:
        with self._store.mutex:
            self._store.forget(self._at(name))

    def remove_if_empty(self) -> None:
        with self._store.mutex:
            if not self.entries():
                self._store.directories.discard(self.path)

    # Lasting.

    def sync(self, names: Iterable[str]) -> None:
        for name in names:
            if self.status(name) is None:
                raise _error(errno.ENOENT, self._at(name))

    def start_writeback(self, name: str) -> None:
        pass

    def kvstore(self) -> dict[str, Any]:
        return {"driver": "memory", "path": self._store.prefix + _inside(self.path)}

    # Capabilities.

    def rename(self, target: Self) -> None:
        self._need(Capability.RENAME)
        with self._store.mutex:
            self._need_directory(self.path)
            if target.status() is not None:
                raise _error(errno.EEXIST, target.path)
            self._need_directory(target.parent.path)
            self._store.move(self.path, target.path)

    def replace(self, name: str, target: str) -> None:
        self._need(Capability.RENAME)
        with self._store.mutex:
            data = self.read(name)
            if data is None:
                raise _error(errno.ENOENT, self._at(name))
            self.write(target, data)
            self.remove(name)

    def exchange(self, other: Self) -> bool:
        self._need(Capability.EXCHANGE)
        with self._store.mutex:
            self._need_directory(self.path)
            self._need_directory(other.path)
            beside = f"{self.path}.exchanged"
            self._store.move(self.path, beside)
            self._store.move(other.path, self.path)
            self._store.move(beside, other.path)
        return True

    def link(self, name: str, target: Self, target_name: str) -> None:
        self._need(Capability.LINK)
        with self._store.mutex:
            data = self.read(name)
            if data is None:
                raise _error(errno.ENOENT, self._at(name))
            target.write(target_name, data, only_if_absent=True)

    def lock(self) -> _MemoryLock | None:
        self._need(Capability.LOCK)
        with self._store.mutex:
            is_free = self.path not in self._store.locks and self._store.has_directory(self.path)
            return _MemoryLock(self._store, self.path) if is_free else None

    def _need(self, capability: Capability) -> None:
        assert self.can(capability), f"{capability} was not asked for"

    def _need_directory(self, path: str) -> None:
        if not self._store.has_directory(path):
            raise _error(errno.ENOENT, path)


def _inside(path: str) -> str:
    return path if path.endswith("/") else f"{path}/"


def _error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)
