"""Lets the N-th call of one kind fail below Python, in every operation, and looks at what is left.

    python fault_loop.py LIBRARY DIRECTORY OPERATION[,OPERATION...] STRIDE [sticky]

LIBRARY is the compiled `faults.c`, and has to be preloaded. Every STRIDE-th call of an operation
fails, with each error in turn; `sticky` lets all later calls fail, too. The last line printed
is a JSON object: the number of cases, how many ended in an error, and what was wrong.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from errno import EACCES, EINTR, EIO, EMFILE, ENOSPC, errorcode
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import orbax_async as ocp
from orbax_async import errors
from orbax_async.training import Checkpointer, preservation_policies

KINDS = ["open", "read", "write", "sync", "rename", "mkdir", "unlink", "mmap", "link", "list"]
ERRORS = [ENOSPC, EIO, EACCES, EMFILE, EINTR]
HANG_SECS = 60
SETTLE_SECS = 5.0
OLD, NEW = 1, 2
READS = ("load", "metadata", "verify")


def state(serial: int) -> dict[str, Any]:
    """Returns a state with a large, a small, and a scalar leaf, all told by `serial`."""
    rng = np.random.default_rng(serial)
    return {"large": rng.standard_normal(50_000), "small": rng.integers(0, 9, 5), "serial": serial}


def serial_of(loaded: Any) -> int:
    """Returns which state was loaded, all of it bit for bit."""
    wanted = state(int(loaded["serial"]))
    assert loaded.keys() == wanted.keys()
    for name in ("large", "small"):
        assert np.asarray(loaded[name]).tobytes() == wanted[name].tobytes(), name
    return int(loaded["serial"])


class Operation(NamedTuple):
    """What is tried: what is done before, the call, who looks, and the states that may be there.

    Then the next call, which must work, and the names that lie there when it has ended.
    """

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    look: Callable[[Path], Any]
    states: set[Any]
    run_next: Callable[[Path], Any]
    names: set[str]


def in_place() -> ocp.Context:
    """Returns a context that commits by a file."""
    context = ocp.Context()
    context.atomicity.mode = "commit_file"
    return context


def save(serial: int, **options: Any) -> Callable[[Path], None]:
    """Returns a call that saves one state at `c`."""
    return lambda directory: ocp.save(directory / "c", state(serial), **options)


def save_in_place(serial: int, **options: Any) -> Callable[[Path], None]:
    """Returns a call that saves one state at `c` in place."""

    def run(directory: Path) -> None:
        with in_place():
            ocp.save(directory / "c", state(serial), **options)

    return run


def visible(directory: Path) -> int | None:
    """Returns the serial of the checkpoint at `c`, if there is one."""
    path = directory / "c"
    return serial_of(ocp.load(path)) if ocp.is_orbax_checkpoint(path) else None


def nothing(_: Path) -> None:
    """Prepares nothing."""


def save_checkpointables(serial: int) -> Callable[[Path], None]:
    """Returns a call that saves a state and a JSON document at `c`."""

    def run(directory: Path) -> None:
        content = {"state": state(serial), "notes": {"serial": serial}}
        ocp.save_checkpointables(directory / "c", content, overwrite=True)

    return run


def both_visible(directory: Path) -> int | None:
    """Returns the serial that the state and the document at `c` agree on."""
    path = directory / "c"
    if not path.exists():
        return None
    loaded = ocp.load_checkpointables(path, {"state": None, "notes": None})
    assert loaded["notes"]["serial"] == serial_of(loaded["state"])
    return int(loaded["notes"]["serial"])


def save_part(directory: Path) -> None:
    """Saves the second half of a state as a part."""
    values = state(NEW)
    ocp.partial.save(directory / "c", {name: values[name] for name in ("small", "serial")})


def first_part(directory: Path) -> None:
    """Saves the first half of a state as a part."""
    ocp.partial.save(directory / "c", {"large": state(NEW)["large"]})


def both_parts(directory: Path) -> None:
    """Saves a state in two parts."""
    first_part(directory)
    save_part(directory)


def finalize(directory: Path) -> None:
    """Makes a checkpoint of the parts."""
    ocp.partial.finalize(directory / "c")


def finalized(directory: Path) -> int | None:
    """Finalizes what there is, and returns whether both parts are in it."""
    if not (directory / "c").exists():
        ocp.partial.finalize(directory / "c")
    loaded = ocp.load(directory / "c")
    return serial_of(loaded) if "serial" in loaded else None


def all_anew(directory: Path) -> None:
    """Deletes what there is, saves both parts again, and makes a checkpoint of them."""
    ocp.delete(directory / "c")
    both_parts(directory)
    finalize(directory)


def save_step(serial: int) -> Callable[[Path], None]:
    """Returns a call that saves one step of a run that keeps the latest step alone."""

    def run(directory: Path) -> None:
        policy = preservation_policies.LatestN(1)
        with Checkpointer(directory / "run", preservation_policy=policy) as checkpointer:
            checkpointer.save(serial, state(serial))

    return run


def latest_step(directory: Path) -> int | None:
    """Returns the latest step of the run, all kept steps being whole."""
    with Checkpointer(directory / "run") as checkpointer:
        for found in checkpointer.checkpoints:
            assert serial_of(checkpointer.load(found.step)) == found.step
        return checkpointer.latest.step if checkpointer.latest else None


def delete(directory: Path) -> None:
    """Deletes the checkpoint at `c`, which may have to be saved first."""
    if not (directory / "c").exists():
        ocp.save(directory / "c", state(OLD))
    ocp.delete(directory / "c")


def load(directory: Path) -> None:
    """Loads the checkpoint at `c`."""
    assert serial_of(ocp.load(directory / "c")) == OLD


def describe(directory: Path) -> None:
    """Reads what is known of the checkpoint at `c`."""
    assert ocp.metadata(directory / "c").metadata["small"].shape == (5,)


def verify(directory: Path) -> None:
    """Verifies the checkpoint at `c`; what is reported counts as raised."""
    report = ocp.verify(directory / "c")
    if not report.is_intact:
        raise errors.InvalidLayoutError(str(report))


OPERATIONS = {
    "save": Operation(nothing, save(NEW), visible, {None, NEW}, save(OLD, overwrite=True), {"c"}),
    "overwrite": Operation(
        save(OLD), save(NEW, overwrite=True), visible, {OLD, NEW}, save(OLD, overwrite=True), {"c"}
    ),
    "in-place": Operation(
        nothing, save_in_place(NEW), visible, {None, NEW}, save(OLD, overwrite=True), {"c"}
    ),
    "overwrite-in-place": Operation(
        save_in_place(OLD),
        save_in_place(NEW, overwrite=True),
        visible,
        {OLD, NEW},
        save_in_place(OLD, overwrite=True),
        {"c"},
    ),
    "checkpointables": Operation(
        save_checkpointables(OLD),
        save_checkpointables(NEW),
        both_visible,
        {OLD, NEW},
        save_checkpointables(OLD),
        {"c"},
    ),
    "delete": Operation(save(OLD), delete, visible, {OLD, None}, delete, set()),
    "part": Operation(first_part, save_part, finalized, {None, NEW}, all_anew, {"c"}),
    "finalize": Operation(both_parts, finalize, finalized, {NEW}, all_anew, {"c"}),
    "step": Operation(
        save_step(OLD), save_step(NEW), latest_step, {OLD, NEW}, save_step(3), {"run", "run/3"}
    ),
    "load": Operation(save(OLD), load, visible, {OLD}, load, {"c"}),
    "metadata": Operation(save(OLD), describe, visible, {OLD}, describe, {"c"}),
    "verify": Operation(save(OLD), verify, visible, {OLD}, verify, {"c"}),
}
# What each operation leads to.
AFTER = dict.fromkeys(OPERATIONS, NEW) | {"delete": None} | dict.fromkeys(READS, OLD)


def listing(directory: Path) -> set[str]:
    """Returns the checkpoints and whatever lies beside them."""
    found = {path.name for path in directory.iterdir()}
    if (directory / "run").is_dir():
        found |= {f"run/{path.name}" for path in (directory / "run").iterdir()}
    return found


def resources() -> tuple[int, int]:
    """Returns the open descriptors and the threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def settles(is_so: Callable[[], bool]) -> bool:
    """Waits a bounded time for what happens in the background."""
    end = time.monotonic() + SETTLE_SECS
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


class Loop:
    """Runs the cases of one operation, and counts."""

    def __init__(self, library: str, root: Path, name: str) -> None:
        self.faults = ctypes.CDLL(library)
        self.faults.faults_disarm.restype = ctypes.c_long
        self.root, self.name = root, name
        self.operation = OPERATIONS[name]
        self.cases = self.raised = 0
        self.wrong: list[str] = []
        self.resources: tuple[int, int] | None = None
        self._run("warm", 0, 1, 0, is_sticky=False)  # modules, caches and descriptors are there now
        self.resources = resources()

    def all(self, stride: int, *, is_sticky: bool) -> None:
        """Lets every call of each kind fail, with the errors in turn."""
        for number, kind in enumerate(KINDS):
            for code in ERRORS:
                if code == EINTR and is_sticky:
                    continue  # Python and TensorStore ask again as long as they are interrupted
                nth = 1
                while self._run(kind, number, nth, code, is_sticky=is_sticky):
                    nth += stride

    def _run(self, kind: str, number: int, nth: int, code: int, *, is_sticky: bool) -> bool:
        """Runs one case; says whether there was an N-th call."""
        faulthandler.dump_traceback_later(HANG_SECS, exit=True)
        directory = self.root / "case"
        directory.mkdir()
        operation = self.operation
        operation.prepare(directory)
        error: BaseException | None = None
        if code:
            self.faults.faults_arm(
                os.fsencode(directory), number, ctypes.c_long(nth), code, int(is_sticky)
            )
        try:
            operation.run(directory)
        except BaseException as raised:
            error = raised
        is_hit = self.faults.faults_disarm() > 0
        if is_hit or not code:
            problem = self._problem(directory, error, kind, code)
            if problem:
                case = f"{self.name}: {kind} {nth} {errorcode.get(code)} sticky={is_sticky}"
                self.wrong.append(f"{case}: {problem}")
            self.cases += 1
            self.raised += error is not None
        shutil.rmtree(directory)
        faulthandler.cancel_dump_traceback_later()
        return is_hit

    def _problem(
        self, directory: Path, error: BaseException | None, kind: str, code: int
    ) -> str | None:
        """Says what is wrong with what a case left, if anything."""
        operation = self.operation
        told = f"{type(error).__name__}: {error}" if error else "returned"
        if error and not isinstance(error, errors.CheckpointError):
            return f"untyped {told}"
        if error and str(directory) not in str(error):
            return f"names no path: {told}"
        try:
            found = operation.look(directory)
        except Exception as failure:
            return f"unreadable afterwards, {type(failure).__name__}: {failure}; it {told}"
        after = AFTER[self.name]
        if found not in operation.states:
            return f"holds {found!r}; it {told}"
        if error is None and found != after:
            return f"returned, and holds {found!r}"
        if error and len(operation.states) > 1 and found == after and not _tells_of_commit(error):
            return f"holds {found!r}, and says nothing of it: {told}"
        return self._next(directory)

    def _next(self, directory: Path) -> str | None:
        """Says what is wrong with the next operation, which must work and leave nothing else."""
        try:
            self.operation.run_next(directory)
        except Exception as failure:
            return f"the next one fails, {type(failure).__name__}: {failure}"
        if not settles(lambda: listing(directory) == self.operation.names):
            return f"leaves {sorted(listing(directory) - self.operation.names)}"
        if self.resources and not settles(self._holds_no_more):
            return f"holds {resources()} descriptors and threads, {self.resources} before"
        return None

    def _holds_no_more(self) -> bool:
        return all(now <= then for now, then in zip(resources(), self.resources, strict=True))


def _tells_of_commit(error: BaseException) -> bool:
    """Says whether an error says that its operation took effect all the same."""
    return any(word in str(error) for word in ("visible", "committed", "is deleted", "was saved"))


def main() -> None:
    """Runs the loops that the command line asks for."""
    library, root, names, stride, *rest = sys.argv[1:]
    cases = raised = 0
    wrong: list[str] = []
    for name in names.split(","):
        loop = Loop(library, Path(root), name)
        loop.all(int(stride), is_sticky="sticky" in rest)
        print(
            f"{name}: {loop.cases} cases, {loop.raised} errors, {len(loop.wrong)} wrong", flush=True
        )
        cases, raised, wrong = cases + loop.cases, raised + loop.raised, wrong + loop.wrong
    print(json.dumps({"cases": cases, "raised": raised, "wrong": wrong}))


if __name__ == "__main__":
    main()
