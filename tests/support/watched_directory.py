"""A directory whose every call goes through watchers: logs, delays, faults, crashes, waits.

    with opened_by(watched(log := Log(), Fault(errno.ENOSPC, on("write", path="*/_METADATA")))):
        ocp.save(path, state)

A watcher is any function of a `Call` and of what carries it out. What TensorStore writes goes past
them all; a test sees it in the files.
"""

from __future__ import annotations

import fnmatch
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, Self

from orbax_async._storage.directory import Capability, Directory, Entry, Lock, Status
from orbax_async._storage.local import LocalDirectory

CHANGES = ("make", "write", "remove", "remove_if_empty", "rename", "replace", "exchange", "link")
"""The verbs after which something else is in the directory."""


class Call(NamedTuple):
    """One call of a directory's method; of `sync` one for each name.

    Attributes:
      verb: the method.
      path: what it is about.
      target: the other path of `rename`, `replace`, `exchange` and `link`.
    """

    verb: str
    path: str
    target: str | None = None


Watcher = Callable[[Call, Callable[[], Any]], Any]


def watched(
    *watchers: Watcher,
    inner: Callable[[str], Directory] = LocalDirectory,
    lacking: Collection[Capability] = (),
) -> Callable[[str], WatchedDirectory]:
    """Returns what opens a path as a directory with watchers, the first of them outermost.

    Args:
      watchers: they see every call, and may do something else.
      inner: opens the directories that are watched.
      lacking: what they can't do, although the inner ones can.
    """

    def carry_out(call: Call, proceed: Callable[[], Any]) -> Any:
        for watcher in reversed(watchers):
            proceed = _bound(watcher, call, proceed)
        return proceed()

    return lambda path: WatchedDirectory(inner(path), carry_out, frozenset(lacking))


def _bound(watcher: Watcher, call: Call, proceed: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: watcher(call, proceed)


class WatchedDirectory:
    """Forwards each call to another directory, through a watcher."""

    def __init__(
        self, inner: Directory, watcher: Watcher, lacking: frozenset[Capability] = frozenset()
    ) -> None:
        self.inner = inner
        self._watcher = watcher
        self._lacking = lacking

    def __repr__(self) -> str:
        return f"WatchedDirectory({self.inner!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WatchedDirectory) and self.inner == other.inner

    def __hash__(self) -> int:
        return hash(self.inner)

    @property
    def path(self) -> str:
        return self.inner.path

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def parent(self) -> Self:
        return type(self)(self.inner.parent, self._watcher, self._lacking)

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.inner / name, self._watcher, self._lacking)

    def can(self, capability: Capability) -> bool:
        return capability not in self._lacking and self.inner.can(capability)

    def _call(self, verb: str, name: str, proceed: Callable[[], Any], target: Any = None) -> Any:
        return self._watcher(Call(verb, (self.inner / name).path, target), proceed)

    # Looking.

    def status(self, name: str = "", *, follow_links: bool = False) -> Status | None:
        return self._call(
            "status", name, lambda: self.inner.status(name, follow_links=follow_links)
        )

    def entries(self) -> list[Entry]:
        return self._call("entries", "", self.inner.entries)

    def outward_links(self) -> list[str]:
        return self._call("outward_links", "", self.inner.outward_links)

    def walk(self) -> tuple[list[str], list[str]]:
        return self._call("walk", "", self.inner.walk)

    def read(self, name: str, start: int = 0, nbytes: int | None = None) -> bytes | None:
        return self._call("read", name, lambda: self.inner.read(name, start, nbytes))

    def is_writable(self) -> bool:
        return self._call("is_writable", "", self.inner.is_writable)

    # Changing.

    def make(self, *, mode: int | None = None) -> None:
        self._call("make", "", lambda: self.inner.make(mode=mode))

    def write(self, name: str, data: bytes, *, only_if_absent: bool = False) -> None:
        self._call(
            "write", name, lambda: self.inner.write(name, data, only_if_absent=only_if_absent)
        )

    def touch(self) -> None:
        self._call("touch", "", self.inner.touch)

    def remove(self, name: str = "") -> None:
        self._call("remove", name, lambda: self.inner.remove(name))

    def remove_if_empty(self) -> None:
        self._call("remove_if_empty", "", self.inner.remove_if_empty)

    # Lasting.

    def sync(self, names: Iterable[str]) -> None:
        for name in names:
            self._call("sync", name, lambda name=name: self.inner.sync([name]))

    def start_writeback(self, name: str) -> None:
        self._call("start_writeback", name, lambda: self.inner.start_writeback(name))

    def kvstore(self) -> dict[str, Any]:
        return self._call("kvstore", "", self.inner.kvstore)

    # Capabilities.

    def rename(self, target: Self) -> None:
        self._call("rename", "", lambda: self.inner.rename(target.inner), target.path)

    def replace(self, name: str, target: str) -> None:
        other = (self.inner / target).path
        self._call("replace", name, lambda: self.inner.replace(name, target), other)

    def exchange(self, other: Self) -> bool:
        return self._call("exchange", "", lambda: self.inner.exchange(other.inner), other.path)

    def link(self, name: str, target: Self, target_name: str) -> None:
        other = (target.inner / target_name).path
        self._call("link", name, lambda: self.inner.link(name, target.inner, target_name), other)

    def lock(self) -> Lock | None:
        return self._call("lock", "", self.inner.lock)


# Watchers.


def on(*verbs: str, path: str = "*") -> Callable[[Call], bool]:
    """Says of a call whether it has one of some verbs (none: any) and a path like a pattern."""
    return lambda call: (
        (not verbs or call.verb in verbs)
        and any(fnmatch.fnmatch(each, path) for each in (call.path, call.target) if each)
    )


ANY = on()
A_CHANGE = on(*CHANGES)


class Log:
    """Remembers the calls that have been begun."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        self.calls.append(call)
        return proceed()

    def of(self, *verbs: str, path: str = "*") -> list[Call]:
        """Returns the calls of some verbs about paths like a pattern."""
        return [call for call in self.calls if on(*verbs, path=path)(call)]

    def paths(self, *verbs: str) -> list[str]:
        """Returns what the calls of some verbs were about."""
        return [call.path for call in self.of(*verbs)]


class Latency:
    """Has calls take longer."""

    def __init__(self, secs: float, when: Callable[[Call], bool] = ANY) -> None:
        self._secs = secs
        self._when = when

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if self._when(call):
            time.sleep(self._secs)
        return proceed()


class _Count:
    """Counts the calls of a kind; on any thread."""

    def __init__(self, when: Callable[[Call], bool]) -> None:
        self._when = when
        self._mutex = threading.Lock()
        self.count = 0

    def includes(self, call: Call) -> bool:
        """Says whether a call is of the kind, and counts it."""
        if not self._when(call):
            return False
        with self._mutex:
            self.count += 1
        return True


class Fault:
    """Has calls of a kind fail with an errno.

    Args:
      code: the errno.
      when: says which calls are meant.
      nth: the first of them that fails, from 1.
      times: how many fail, None for all from then on.
    """

    def __init__(
        self,
        code: int,
        when: Callable[[Call], bool],
        *,
        nth: int = 1,
        times: int | None = 1,
    ) -> None:
        self._code = code
        self._meant = _Count(when)
        self._nth = nth
        self.left = times

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if self._meant.includes(call) and self._meant.count >= self._nth and self.left != 0:
            if self.left is not None:
                self.left -= 1
            raise OSError(self._code, os.strerror(self._code), call.path)
        return proceed()

    def end(self) -> None:
        """Has everything work from now on."""
        self.left = 0


class Crashed(BaseException):
    """The process of a test is as good as dead: what it still tries is not done."""


class Crash:
    """Has the process die at a call of a kind: from then on nothing is done any more.

    Args:
      nth: the call at which it dies, from 1; a count that is not reached changes nothing.
      when: says which calls are counted.
      is_done: whether that call itself is still carried out.
    """

    def __init__(
        self, nth: int, when: Callable[[Call], bool] = A_CHANGE, *, is_done: bool = False
    ) -> None:
        self._counted = _Count(when)
        self._nth = nth
        self._is_done = is_done
        self.has_come = False

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if self.has_come:
            raise Crashed(call)
        if self._counted.includes(call) and self._counted.count >= self._nth:
            self.has_come = True
            if self._is_done:
                proceed()
            raise Crashed(call)
        return proceed()


class Held:
    """Has the first call of a kind wait until it is released; for a test that looks meanwhile."""

    def __init__(self, when: Callable[[Call], bool]) -> None:
        self._when = when
        self.is_reached = threading.Event()
        self.is_released = threading.Event()

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if self._when(call) and not self.is_reached.is_set():
            self.is_reached.set()
            assert self.is_released.wait(60), f"{call} was never released"
        return proceed()


def instead(when: Callable[[Call], bool], answer: Any) -> Watcher:
    """Returns a watcher that has calls of a kind do nothing, and return something."""
    return lambda call, proceed: answer if when(call) else proceed()


def before(when: Callable[[Call], bool], action: Callable[[], Any]) -> Watcher:
    """Returns a watcher that does something before each call of a kind."""

    def watcher(call: Call, proceed: Callable[[], Any]) -> Any:
        if when(call):
            action()
        return proceed()

    return watcher
