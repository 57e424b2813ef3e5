"""Power cuts: whatever a disk may legally hold after one, old or new is there, bit for bit."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from power_cuts import PowerCuts, lay_out
from watched_directory import Call, watched

import orbax_async as ocp
from orbax_async import errors, partial
from orbax_async._storage.directory import Capability
from orbax_async._storage.local import opened_by
from orbax_async.training import Checkpointer, preservation_policies

OLD, NEW, NEXT = 1, 2, 3

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3600), pytest.mark.leaves_temporaries]


def state(serial: int) -> dict[str, Any]:
    """Returns a state every byte of which follows from a number."""
    values = np.random.default_rng(serial)
    return {"large": values.standard_normal(20_000), "small": [values.standard_normal(3), serial]}


def serial_of(loaded: Any) -> int:
    """Returns the number of a state that is loaded, if it is that state bit for bit."""
    serial = int(loaded["small"][1])
    for name in ("large", "small"):
        np.testing.assert_equal(loaded[name], state(serial)[name])
    return serial


def at(path: Path) -> int | None:
    """Returns which state is at a path; None where no checkpoint is."""
    try:
        return serial_of(ocp.load(path))
    except errors.InvalidLayoutError:
        assert not ocp.is_orbax_checkpoint(path)
        return None


class Operation(NamedTuple):
    """What is there before, what is cut, and what one does afterwards.

    `may_lack` has what directories may lack so that it goes another way.
    """

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    found: Callable[[Path], Any]
    may_be: tuple[Any, ...]
    go_on: Callable[[Path], Any]
    may_lack: tuple[Capability | None, ...] = (None, Capability.EXCHANGE)


def saving(serial: int, *, mode: str = "auto", overwrite: bool = False) -> Callable[[Path], None]:
    """Returns what saves a state at `c`."""

    def save(folder: Path) -> None:
        context = ocp.Context()
        context.atomicity.mode = mode  # type: ignore[assignment]
        with context:
            ocp.save(folder / "c", state(serial), overwrite=overwrite)

    return save


def saving_again(mode: str = "auto") -> Callable[[Path], None]:
    """Returns what saves at `c`, whatever is there."""

    def save(folder: Path) -> None:
        saving(NEXT, mode=mode, overwrite=ocp.is_orbax_checkpoint(folder / "c"))(folder)
        assert at(folder / "c") == NEXT

    return save


def nothing(folder: Path) -> None:
    """Leaves the folder as it is."""


def delete(folder: Path) -> None:
    """Deletes what is at `c`."""
    ocp.delete(folder / "c")


def stepping(*steps: int) -> Callable[[Path], None]:
    """Returns what saves steps of a run that keeps the last two."""

    def run(folder: Path) -> None:
        policy = preservation_policies.LatestN(2)
        with Checkpointer(folder / "run", preservation_policy=policy) as checkpointer:
            for step in steps:
                checkpointer.save(step, state(step))

    return run


def steps_of(folder: Path) -> tuple[int, ...]:
    """Returns the steps of the run, all of them whole."""
    with Checkpointer(folder / "run") as checkpointer:
        found = tuple(each.step for each in checkpointer.checkpoints)
        for step in found:
            assert serial_of(checkpointer.load(step)) == step
    return found


def step_again(folder: Path) -> None:
    """Saves a step more."""
    stepping(9)(folder)
    assert steps_of(folder)[-1] == 9


def first_part(folder: Path) -> None:
    """Saves one half of a state."""
    partial.save(folder / "c", {"large": state(NEW)["large"]})


def second_part(folder: Path) -> None:
    """Saves the other half."""
    partial.save(folder / "c", {"small": state(NEW)["small"]})


def both_parts(folder: Path) -> None:
    """Saves both halves."""
    first_part(folder)
    second_part(folder)


def finalize(folder: Path) -> None:
    """Makes a checkpoint of the parts."""
    partial.finalize(folder / "c")


def finalized(folder: Path) -> tuple[str, ...]:
    """Returns what is in the parts, after making a checkpoint of them if there is none."""
    if at_all(folder / "c") is None:
        partial.finalize(folder / "c")
    loaded = at_all(folder / "c")
    for name, value in loaded.items():
        np.testing.assert_equal(value, state(NEW)[name])
    return tuple(sorted(loaded))


def at_all(path: Path) -> Any:
    """Returns what is loaded from a path; None where no checkpoint is."""
    return ocp.load(path) if ocp.is_orbax_checkpoint(path) else None


BOTH = ("large", "small")
OPERATIONS = {
    "save": Operation(nothing, saving(NEW), lambda f: at(f / "c"), (None, NEW), saving_again()),
    "save in place": Operation(
        nothing,
        saving(NEW, mode="commit_file"),
        lambda f: at(f / "c"),
        (None, NEW),
        saving_again("commit_file"),
    ),
    "overwrite": Operation(
        saving(OLD), saving(NEW, overwrite=True), lambda f: at(f / "c"), (OLD, NEW), saving_again()
    ),
    "overwrite in place": Operation(
        saving(OLD, mode="commit_file"),
        saving(NEW, mode="commit_file", overwrite=True),
        lambda f: at(f / "c"),
        (OLD, NEW),
        saving_again("commit_file"),
    ),
    "delete": Operation(
        saving(OLD),
        delete,
        lambda f: at(f / "c"),
        (OLD, None),
        nothing,
        (None, Capability.RENAME),
    ),
    "retention": Operation(
        stepping(1, 2), stepping(3), steps_of, ((1, 2), (1, 2, 3), (2, 3)), step_again
    ),
    "part": Operation(first_part, second_part, finalized, (("large",), BOTH), nothing),
    "finalization": Operation(both_parts, finalize, finalized, (BOTH,), nothing),
}


def cuts(
    operation: Operation,
    folder: Path,
    draw: tuple[random.Random, int],
    lacking: Collection[Capability],
) -> Iterator[tuple[str, Path]]:
    """Yields what a cut before or after any call may leave, once each, as folders."""
    root = folder / "run"
    root.mkdir()
    operation.prepare(root)
    power = PowerCuts(root)
    seen: set[str] = set()
    left: list[tuple[str, Path]] = []
    one_at_a_time, is_over = threading.Lock(), threading.Event()

    def record(when: str) -> None:
        for what, tree in (*power.states(), *power.random_states(*draw)):
            if repr(tree) not in seen:
                seen.add(repr(tree))
                left.append((f"{when}: {what}", lay_out(tree, folder / "cuts" / str(len(left)))))

    def look(call: Call, proceed: Any) -> Any:
        with one_at_a_time:  # a sweep may still run in the background
            if not is_over.is_set():
                record(f"{call.verb} {call.path}")
                return power(call, proceed)
        return proceed()

    with opened_by(watched(look, lacking=lacking)):
        operation.run(root)
    with one_at_a_time:
        is_over.set()
        record("the end")
        power.close()
    yield from left


@pytest.mark.parametrize("lacking", [None, *Capability], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_f1_after_a_power_cut_old_or_new_is_there(
    operation: Operation,
    lacking: Capability | None,
    tmp_path: Path,
    soak: Callable[[int, int], int],
) -> None:
    """I4, I5: each state is recovered, loaded as a whole, and worked on at once."""
    if lacking not in operation.may_lack:
        pytest.skip("not a way of its own")
    without = [] if lacking is None else [lacking]
    count = 0
    for what, folder in cuts(operation, tmp_path, (random.Random(0), soak(1, 12)), without):
        try:
            with opened_by(watched(lacking=without)):
                assert operation.found(folder) in operation.may_be
                operation.go_on(folder)
        except BaseException as error:
            error.add_note(what)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        count += 1
    print(f"\n{count} states, each old or new")
    assert count > 1
