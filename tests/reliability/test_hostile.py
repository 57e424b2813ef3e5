"""Hostile checkpoints: each verb that reads ends in time and memory, or as an error of ours."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import CASES

import orbax_async

HERE = Path(__file__).parent
MAX_SECS, MAX_MEBIBYTES = 5.0, 100

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is Linux's to tell"),
    pytest.mark.timeout(600),
]


def outcomes(folder: Path, *names: str, secs: float) -> dict[str, dict[str, Any]]:
    """Reads some cases in a child, and returns what came of each verb, for those it came to."""
    with open(folder / "said", "w+", encoding="utf-8") as said:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [sys.executable, str(HERE / "hostile.py"), str(folder), *names],
                env=os.environ | {"PYTHONPATH": str(Path(orbax_async.__file__).parents[1])},
                stdout=said,
                stderr=subprocess.DEVNULL,
                timeout=secs,
                check=False,
            )
        said.seek(0)
        return dict(json.loads(line) for line in said if line.endswith("]\n"))


def problems(found: dict[str, Any]) -> list[str]:
    """Returns what is wrong with how a case was read."""
    return [
        f"{verb}: {outcome}, {secs} s, {mebibytes} MiB"
        for verb, (outcome, secs, mebibytes) in found.items()
        if outcome.startswith("UNTYPED") or secs > MAX_SECS or mebibytes > MAX_MEBIBYTES
    ]


def test_every_hostile_checkpoint_ends_typed(tmp_path: Path) -> None:
    """F2, F5, F6, F23, F29, I14: whatever a checkpoint holds; one process reads them all."""
    names = list(CASES)
    assert len(names) > 600
    found = outcomes(tmp_path, *names, secs=300)
    wrong = {name: told for name in found if (told := problems(found[name]))}
    assert not wrong, json.dumps(wrong, indent=1)
    assert list(found) == names, f"the process ended at {names[len(found)]}"
