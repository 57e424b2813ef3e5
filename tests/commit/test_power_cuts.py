"""The power is cut at any call of a deletion, a run, or a partial save: all of it, or none."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from power_cuts import PowerCuts, lay_out
from watched_directory import Call, Log, watched

import orbax_async as ocp
from orbax_async import errors, partial, training
from orbax_async._storage.directory import Capability
from orbax_async._storage.local import opened_by

FIRST, SECOND = {"a": np.arange(3)}, {"b": np.arange(4)}


class Work(NamedTuple):
    """What is cut.

    Attributes:
      prepare: what came before it, in a folder.
      run: does it.
      look: says what is there, once it has compared all of it; raises where that is damaged.
      allowed: what may be there.
      lacking: what its directories can't do.
    """

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    look: Callable[[Path], Any]
    allowed: Collection[Any]
    lacking: Collection[Capability] = ()


def _save(folder: Path) -> None:
    ocp.save(folder / "c", FIRST)


def _delete(folder: Path) -> None:
    ocp.delete(folder / "c")


def _holds(path: Path) -> bool:
    """Says whether the first state is there, and saves another where it is not."""
    try:
        loaded = ocp.load(path / "c")
    except errors.InvalidLayoutError:
        ocp.save(path / "c", SECOND)
        assert np.array_equal(ocp.load(path / "c")["b"], SECOND["b"])
        return False
    assert np.array_equal(loaded["a"], FIRST["a"])
    return True


def _step(folder: Path, step: int) -> None:
    policy = training.preservation_policies.LatestN(1)
    with training.Checkpointer(folder / "run", preservation_policy=policy) as run:
        run.save(step, {"w": np.full(3, step)})


def _first_step(folder: Path) -> None:
    _step(folder, 1)


def _second_step(folder: Path) -> None:
    _step(folder, 2)


def _latest(folder: Path) -> int:
    with training.Checkpointer(folder / "run") as run:
        steps = [each.step for each in run.checkpoints]
        for step in steps:
            assert run.load(step)["w"].tolist() == [step] * 3
    return max(steps)


def _gathered(folder: Path) -> str:
    """Finalizes, if that is still to be done, and says which parts there are."""
    if not (folder / "c").exists():
        partial.finalize(folder / "c")
    loaded = ocp.load(folder / "c")
    for name, value in loaded.items():
        assert np.array_equal(value, (FIRST | SECOND)[name])
    return "".join(sorted(loaded))


def _part(folder: Path) -> None:
    partial.save(folder / "c", FIRST)


def _another_part(folder: Path) -> None:
    partial.save(folder / "c", SECOND)


def _parts(folder: Path) -> None:
    _part(folder)
    _another_part(folder)


def _finalize(folder: Path) -> None:
    partial.finalize(folder / "c")


WORKS = {
    "delete": Work(_save, _delete, _holds, {True, False}),
    "delete, nothing renamed": Work(_save, _delete, _holds, {True, False}, [Capability.RENAME]),
    "retention": Work(_first_step, _second_step, _latest, {1, 2}),
    "a second part": Work(_part, _another_part, _gathered, {"a", "ab"}),
    "finalize": Work(_parts, _finalize, _gathered, {"ab"}),
    "finalize, set aside": Work(_parts, _finalize, _gathered, {"ab"}, [Capability.EXCHANGE]),
}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
@pytest.mark.leaves_temporaries
def test_i4_a_power_cut_at_any_call_leaves_all_or_nothing(
    work: Work, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """I4: what was there before, or after; every state is loaded whole, and compared."""
    root = tmp_path / "root"
    root.mkdir()
    work.prepare(root)
    power, serials, log = PowerCuts(root), itertools.count(), Log()
    turn, is_over = threading.Lock(), threading.Event()
    seen: set[str] = set()
    left: list[tuple[str, Path]] = []

    def record(when: str) -> None:
        for what, tree in power.states():
            if repr(tree) not in seen:
                seen.add(repr(tree))
                folder = lay_out(tree, tmp_path / "cuts" / str(next(serials)))
                left.append((f"{when}: {what}", folder))

    def look(call: Call, proceed: Any) -> Any:
        with turn:  # a sweep may still run in the background
            if not is_over.is_set():
                record(f"{call.verb} {call.path}")
                return power(call, proceed)
        return proceed()

    with opened_by(watched(log, look, lacking=work.lacking)):
        work.run(root)
    with turn:
        is_over.set()
        record("the end")
        power.close()
    if Capability.RENAME in work.lacking:
        assert not log.of("rename")
    found = set()
    every = max(1, len(left) // soak(20, len(left)))
    chosen = [each for nth, each in enumerate(left, 1) if nth % every == 0 or nth == len(left)]
    for what, folder in chosen:
        try:
            with opened_by(watched(lacking=work.lacking)):
                found.add(work.look(folder))
        except BaseException as error:
            error.add_note(f"after a cut at {what}")
            raise
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(chosen)} of {len(left)} states after a power cut were loaded")
    assert found == set(work.allowed)
