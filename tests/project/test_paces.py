"""What the benchmarks run beside a save: a program that keeps count, and a process of its own."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks import apart, measures, pace
from benchmarks.peers import PEERS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the benchmarks read Linux's counters"
)


def test_a_pacer_counts_and_gives_the_cores_back() -> None:
    """Steps are done while it runs, on one core, and afterwards threads may run on all again."""
    cores = os.sched_getaffinity(0)
    held = []
    with pace.Pacer(lambda: held.append(os.sched_getaffinity(0))) as pacer:
        while pacer.mark().steps < 3:
            time.sleep(0.001)
        assert not (len(cores) > 1 and os.sched_getaffinity(0) & held[-1])
    assert len(held[-1]) == 1
    assert os.sched_getaffinity(0) == cores


def test_a_pacer_tells_how_long_it_had_its_core() -> None:
    """The time of its own thread counts, not that of others; waiting takes none of it."""
    with pace.Pacer(lambda: time.sleep(0.001)) as pacer:
        before = pacer.mark()
        while pacer.mark().steps < before.steps + 20:
            sum(range(10_000))
        after = pacer.mark()
    assert 0 < after.cpu_secs - before.cpu_secs < (after.secs - before.secs) / 2


@pytest.mark.parametrize("peer", ["ours", "raw-1"])
def test_a_process_beside_saves_until_it_is_told_to_end(tmp_path: Path, peer: str) -> None:
    """It saves the state each time between two moments; afterwards nothing is left of it."""
    path, state = tmp_path / "saved", {"x": jnp.arange(8.0), "step": 3}
    with apart.saves(peer, path, state, {}) as moments:
        for _ in range(2):
            next(moments)
            next(moments)
    assert not list(tmp_path.iterdir())


def test_a_process_beside_that_cannot_save_is_an_error(tmp_path: Path) -> None:
    """What would be measured as a quiet machine is refused."""
    settings = {"array.saving.unheard_of.option": 1}
    with (
        apart.saves("ours", tmp_path / "saved", {"x": 1}, settings) as moments,
        pytest.raises(RuntimeError, match="ended"),
    ):
        next(moments)


@pytest.mark.parametrize("figure", ["gap", "pace", "apart"])
def test_gaps_and_paces_follow_a_save_that_does_not_count(figure: str, tmp_path: Path) -> None:
    """One save more is made than is measured, and each is removed before the next."""
    path, saves = tmp_path / "saved", []

    def save(path: Path, *_: Any) -> Future[None]:
        assert not path.exists()
        path.mkdir()
        saves.append(path)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    peer = replace(PEERS["raw-1"], save=save, is_async=True)
    state = {"x": 1}
    measures.KINDS[figure](
        measures.Trial(peer=peer, path=path, state=state, abstract=state, pace_secs=1e-6)
    )
    # Two programs; of those beside which another process saves, only the save that does not count.
    assert len(saves) == {"gap": 2, "pace": 4, "apart": 2}[figure]
