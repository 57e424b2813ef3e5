"""What the benchmarks run beside a save: a program that keeps count."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measures, rounds
from benchmarks.peers import PEERS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the benchmarks read Linux's counters"
)


def test_a_pacer_counts_and_gives_the_cores_back() -> None:
    """Steps are done while it runs, on one core, and afterwards threads may run on all again."""
    cores = os.sched_getaffinity(0)
    held = []
    with measures.Pacer(lambda: held.append(os.sched_getaffinity(0))) as pacer:
        while pacer.steps < 3:
            time.sleep(0.001)
        assert not (len(cores) > 1 and os.sched_getaffinity(0) & held[-1])
    assert len(held[-1]) == 1
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("figure", ["gap", "pace"])
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
    trial = measures.Trial(peer=peer, path=path, state={"x": 1}, pace_secs=1e-6)
    rounds.KINDS[figure](trial)
    # Two programs.
    assert len(saves) == {"gap": 2, "pace": 4}[figure]
