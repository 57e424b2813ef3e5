"""A process dies at any call, or the power is cut: old or new is there, and nothing is wedged."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listing import comes_to_hold
from power_cuts import PowerCuts, lay_out
from watched_directory import ANY, Call, Crash, Crashed, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.directory import Capability
from orbax_async._storage.local import opened_by

OLD, NEW, NEXT = ({"w": np.arange(size)} for size in (3, 4, 5))

WAYS = {
    "in place, first": ("commit_file", False, True),
    "in place, over another": ("commit_file", True, True),
    "in place, over another, set aside": ("commit_file", True, False),
    "renamed, first": ("atomic_rename", False, True),
    "renamed, over another": ("atomic_rename", True, True),
    "renamed, over another, set aside": ("atomic_rename", True, False),
}


class Way:
    """How a checkpoint is saved to `c` in a folder.

    Attributes:
      overwrites: whether there is an old one.
      lacking: what its directories can't do.
    """

    def __init__(self, mode: str, overwrites: bool, can_exchange: bool) -> None:
        self.overwrites = overwrites
        self.lacking = [] if can_exchange else [Capability.EXCHANGE]
        self.context = ocp.Context()
        self.context.atomicity.mode = mode  # type: ignore[assignment]

    def prepare(self, folder: Path) -> None:
        """Makes the folder, and the old checkpoint in it."""
        folder.mkdir()
        if self.overwrites:
            with self.context:
                ocp.save(folder / "c", OLD)

    def save(self, folder: Path) -> None:
        """Saves the new one."""
        with self.context:
            ocp.save(folder / "c", NEW, overwrite=self.overwrites)

    def check(self, folder: Path) -> int:
        """Finds the old one or the new, saves another at once, and returns the size found."""
        with self.context:
            size = _size(folder / "c")
            assert size in ({3, 4} if self.overwrites else {0, 4})
            ocp.save(folder / "c", NEXT, overwrite=size > 0)
            assert _size(folder / "c") == 5
            ocp.save(folder / "d", OLD)
        comes_to_hold(folder, "c", "d")
        assert _size(folder / "c") == 5
        shutil.rmtree(folder)
        return size


def _size(path: Path) -> int:
    try:
        return len(ocp.load(path)["w"])
    except errors.InvalidLayoutError:
        return 0


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """Each way to commit."""
    return Way(*request.param)


def test_f1_a_save_that_dies_at_any_call_leaves_old_or_new(way: Way, tmp_path: Path) -> None:
    """I4: whichever call is its last; the path can be saved to at once, and the rest is swept."""
    found = []
    for nth in itertools.count(1):
        folder = tmp_path / str(nth)
        way.prepare(folder)
        crash = Crash(nth, ANY)
        try:
            with opened_by(watched(crash, lacking=way.lacking)):
                way.save(folder)
        except Crashed:
            pass
        if not crash.has_come:
            break
        found.append(way.check(folder))
    assert len(found) > 15
    assert found == sorted(found)  # once the new one is visible it stays
    assert set(found) == {3 if way.overwrites else 0, 4}


def _cuts(way: Way, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Yields what a power cut at any call of a save may leave, once each, as folders."""
    root = tmp_path / "run"
    way.prepare(root)
    power = PowerCuts(root)
    serials = itertools.count()
    seen: set[str] = set()
    left: list[tuple[str, Path]] = []

    def look(call: Call, proceed: Any) -> Any:
        for what, tree in power.states():
            if repr(tree) not in seen:
                seen.add(repr(tree))
                folder = lay_out(tree, tmp_path / "cuts" / str(next(serials)))
                left.append((f"{call.verb} {call.path}: {what}", folder))
        return proceed()

    with opened_by(watched(power, look, lacking=way.lacking)):
        way.save(root)
    power.close()
    assert len(left) > 10
    yield from left


def test_f1_a_power_cut_at_any_call_leaves_old_or_new(way: Way, tmp_path: Path) -> None:
    """I4, I5: of what is not synced anything may be there; the path can be saved to at once."""
    sizes = {}
    for what, folder in _cuts(way, tmp_path):
        try:
            sizes[what] = way.check(folder)
        except Exception as error:
            error.add_note(what)
            raise
    assert set(sizes.values()) == {3 if way.overwrites else 0, 4}
    assert _size(tmp_path / "run" / "c") == 4
