"""What a power cut may leave of local files: all that was synced, and of the rest anything.

A model of a file system of POSIX: the data of a file last once the file was synced, a name lasts
once its directory was synced, and a directory that is renamed keeps its old name until then.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from watched_directory import Call

Tree = dict[str, "bytes | None"]
"""What lies below a root by relative path: the bytes of a file, None for a directory."""


class PowerCuts:
    """A watcher that knows what is durable below a root; what is there at first is.

    It has to see every sync. To forget nothing, it keeps the files that it knows open: `close`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._data: dict[int, bytes] = {}
        self._entries: dict[int, dict[str, int]] = {}
        self._open: dict[int, int] = {}  # by inode, which nothing else takes meanwhile
        for directory, _, files in os.walk(root):
            for each in (directory, *(os.path.join(directory, name) for name in files)):
                self._sync(each)

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        result = proceed()
        if call.verb == "sync" and Path(call.path).is_relative_to(self._root):
            self._sync(call.path)
        return result

    def close(self) -> None:
        """Lets go of what was there."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _sync(self, path: str) -> None:
        inode = self._inode(path)
        if os.path.isdir(path):
            self._entries[inode] = self._present(path)
        else:
            self._data[inode] = Path(path).read_bytes()

    def _present(self, path: str) -> dict[str, int]:
        return {name: self._inode(os.path.join(path, name)) for name in sorted(os.listdir(path))}

    def _inode(self, path: str) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        inode = os.fstat(descriptor).st_ino
        if self._open.setdefault(inode, descriptor) != descriptor:
            os.close(descriptor)
        return inode

    def states(self) -> Iterator[tuple[str, Tree]]:
        """Yields what may be there after a cut that comes now, with words for it.

        Nothing that isn't synced; the names without their data, or with zeros for it; the names of
        a single directory, or without those of one; and everything.
        """
        now = {}
        for directory, _, _ in os.walk(self._root):
            now[self._inode(directory)] = self._present(directory)
        yield "only what is synced", self._tree(self._entries)
        yield "all names, no data", self._tree(self._entries | now)
        data = {
            inode: Path(directory, name).read_bytes()
            for directory, _, files in os.walk(self._root)
            for name in files
            for inode in [self._inode(os.path.join(directory, name))]
        }
        zeros = {inode: bytes(len(each)) for inode, each in data.items()}
        yield "all names, zeros", self._tree(self._entries | now, zeros | self._data)
        for inode, names in now.items():
            synced = self._entries.get(inode, {})
            if names != synced:
                where = os.readlink(f"/proc/self/fd/{self._open[inode]}")
                alone, others = {**self._entries, inode: names}, {**self._entries, **now}
                others[inode] = synced
                yield f"the names in {where}", self._tree(alone)
                yield f"all names but those in {where}", self._tree(others, self._data | data)
        yield "everything", self._tree(self._entries | now, self._data | data)

    def random_states(self, moments: random.Random, count: int) -> Iterator[tuple[str, Tree]]:
        """Yields states that are drawn: each directory has its old or its new names.

        Each file has the data that were synced, or all, or zeros, or the first half.
        """
        inodes = [(self._inode(at), self._present(at)) for at, _, _ in os.walk(self._root)]
        files = {
            self._inode(os.path.join(at, name)): Path(at, name).read_bytes()
            for at, _, names in os.walk(self._root)
            for name in names
        }
        for _ in range(count):
            entries = {inode: names for inode, names in inodes if moments.random() < 0.5}
            data = {}
            for inode, now in files.items():
                if inode not in self._data:
                    lost = [b"", now, bytes(len(now)), now[: len(now) // 2]]
                    data[inode] = moments.choice(lost)
            yield "drawn", self._tree(self._entries | entries, self._data | data)

    def _tree(
        self, entries: dict[int, dict[str, int]], data: dict[int, bytes] | None = None
    ) -> Tree:
        known = self._data if data is None else data
        tree: Tree = {}

        def fill(inode: int, prefix: str) -> None:
            for name, each in entries.get(inode, {}).items():
                path = prefix + name
                if stat.S_ISDIR(os.fstat(self._open[each]).st_mode):
                    tree[path] = None
                    fill(each, f"{path}/")
                else:
                    tree[path] = known.get(each, b"")

        fill(self._inode(str(self._root)), "")
        return tree


def lay_out(tree: Tree, folder: Path) -> Path:
    """Writes what a cut has left to a new folder, and returns that."""
    folder.mkdir(parents=True)
    for name, data in tree.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    return folder
