from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import orbax_async as ocp
from acceptance import children, states

RETURN_CODES = {
    "end": 0,
    "raise": 1,
    "sys_exit": 3,
    "loop_end": 0,
    "loop_raise": 1,
    "thread": 0,
    "late_thread": 0,
    "slow": 0,
    "lazy": 0,
    "grain": 0,
}
MEBIBYTES = {"slow": 96}
AT_ONCE = 2


@dataclasses.dataclass
class Ended:
    """How one script ended: whether it committed, what it said, and how long that took."""

    is_committed: bool
    secs: float
    returncode: int
    stderr: str


def end(way: str, directory: Path) -> Ended:
    """Runs one script to its end and looks at what it left; the directory is removed."""
    directory.mkdir()
    done = children.run("exits.py", directory, way, timeout=60)
    ended_at = time.monotonic()
    final = directory / "checkpoint"
    try:
        assert done.stdout, f"{way} died before its end:\n{done.stderr}"
        is_committed = ocp.is_orbax_checkpoint(final)
        assert is_committed or not final.exists()
        if is_committed:
            wanted = states.expected(0, mebibytes=MEBIBYTES.get(way, 2))
            assert not states.differences(ocp.load(final), wanted)
    finally:
        shutil.rmtree(directory)
    secs = ended_at - float(done.stdout.split()[-1])
    return Ended(is_committed, secs, done.returncode, done.stderr)


def unexpected(way: str, ended: Ended) -> str | None:
    """Returns what is wrong with the end of a script, or None."""
    if ended.returncode != RETURN_CODES[way]:
        return f"it returned {ended.returncode}"
    says = [line for line in ended.stderr.splitlines() if line.startswith("orbax_async: save to ")]
    if ended.is_committed and says:
        return "it committed, and said that it did not"
    if not ended.is_committed and not any("NOT committed" in line for line in says):
        return "it neither committed nor said so"
    if "Fatal Python error" in ended.stderr or "Exception ignored" in ended.stderr:
        return "it crashed"
    # A raise shows its own traceback, and only that.
    if ended.stderr.count("Traceback") != (RETURN_CODES[way] == 1):
        return "something failed beside it"
    return None


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", RETURN_CODES)
def test_a_script_that_never_waits(
    way: str, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """It commits, or says on stderr that it did not, soon, and without a crash."""
    count = soak(2, 50)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ends = list(pool.map(lambda i: end(way, tmp_path / str(i)), range(count)))
    secs = sorted(ended.secs for ended in ends)
    print(
        f"\n{way}: {sum(e.is_committed for e in ends)} of {count} committed, the others said so; "
        f"from the script's end to the process's end {secs[count // 2]:.2f} s, at most "
        f"{secs[-1]:.2f} s"
    )
    for ended in ends:
        problem = unexpected(way, ended)
        assert problem is None, f"{problem}; committed: {ended.is_committed}\n{ended.stderr}"
    assert secs[-1] < soak(60, 10)


def test_a_forgotten_failure_is_told_at_exit(tmp_path: Path) -> None:
    """A save that failed in the background, and that nobody asked for, is told on stderr."""
    done = children.run("exits.py", tmp_path, "parent_is_gone", timeout=60)
    print("\n" + done.stderr)
    assert done.returncode == 0, done.stderr
    assert "save to" in done.stderr and "FAILED" in done.stderr
    assert str(tmp_path / "parent" / "checkpoint") in done.stderr
    assert "Traceback" not in done.stderr
