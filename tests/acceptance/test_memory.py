from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from acceptance import children

WARM_UP = 3

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's memory counters"),
]


def test_saves_leave_no_memory_behind(tmp_path: Path, soak: Callable[[int, int], int]) -> None:
    """Resident memory grows at most 4 MiB a save, and no jax array keeps a host copy."""
    saves, mebibytes = soak(8, 30), soak(16, 64)
    output = children.output("memory.py", tmp_path, "growth", WARM_UP + saves, mebibytes, devices=8)
    figures = json.loads(output)
    levels = figures["levels"][WARM_UP - 1 :]
    growth = (levels[-1] - levels[0]) / saves
    print(
        f"\n{saves} saves of {mebibytes} MiB: from {levels[0]:.0f} to {levels[-1]:.0f} MiB, "
        f"{growth:+.2f} MiB a save; {figures['cached_host_values']} of {figures['arrays']} jax "
        "arrays hold a host value"
    )
    assert growth <= 4
    assert figures["cached_host_values"] == 0


@pytest.mark.parametrize("limit", [0, 32])
def test_budgets_bound_memory(limit: int, tmp_path: Path, soak: Callable[[int, int], int]) -> None:
    """A save and a load take no more than their budgets and 64 MiB beside the state."""
    mebibytes = soak(128, 256)
    output = children.output("memory.py", tmp_path, "budget", limit, mebibytes)
    figures = json.loads(output)
    print(
        f"\n{mebibytes} MiB of NumPy arrays, budget {limit or 'none'}: a save takes "
        f"{figures['save']:.0f} MiB more at its peak, a load {figures['load']:.0f} MiB beside "
        "its result"
    )
    if limit:
        assert figures["save"] <= limit + 64
        assert figures["load"] <= limit + 64


@pytest.mark.parametrize("limit", [0, 32])
def test_what_is_compressed_leaves_no_memory_behind(
    limit: int, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """What TensorStore's threads encoded stays under the budget, and not in their arenas (F44).

    Three batches at most are encoded or on their way back to the system, whatever the state takes:
    the bound is that of the full size, 0.15 of a gibibyte.
    """
    mebibytes = soak(320, 1024)
    figures = json.loads(children.output("memory.py", tmp_path, "compressed", limit, mebibytes))
    print(
        f"\n{mebibytes} MiB of bf16, stored as {figures['stored']:.0f} MiB, budget "
        f"{limit or 'none'}: saves take {', '.join(f'{peak:.0f}' for peak in figures['peaks'])} "
        "MiB more at their peaks"
    )
    assert figures["stored"] < 0.9 * mebibytes
    assert max(figures["peaks"]) <= (limit + 64 if limit else 0.15 * 1024)
