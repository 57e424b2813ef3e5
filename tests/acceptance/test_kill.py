from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import orbax_async as ocp
from acceptance import children, states
from orbax_async._commit import leftovers as owners

MARK = ".orbax-checkpoint-tmp"
FIRST_SAVE_SECS = 60.0
SWEEP_SECS = 30.0

pytestmark = [pytest.mark.timeout(3600), pytest.mark.skipif("sys.platform == 'win32'")]


def acknowledged(directory: Path) -> list[int]:
    """Returns the serials of the saves that had returned; a line cut short is none."""
    log = directory / "log"
    text = log.read_text() if log.exists() else ""
    return [int(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def leftovers(directory: Path) -> set[Path]:
    """Returns what unfinished saves have left."""
    return {path for path in directory.iterdir() if MARK in path.name}


def wait_until(is_so: Callable[[], bool], what: str, secs: float) -> None:
    """Polls; fails when it takes too long."""
    end = time.monotonic() + secs
    while not is_so():
        assert time.monotonic() < end, f"not within {secs} s: {what}"
        time.sleep(0.002)


def check_whole(path: Path) -> int:
    """Returns the serial of a visible checkpoint, every byte of which is as it was saved."""
    about = ocp.metadata(path).custom_metadata
    assert about is not None
    wanted = states.expected(about["serial"], mebibytes=about["mebibytes"])
    assert not states.differences(ocp.load(path), wanted), path
    return int(about["serial"])


class Victim:
    """A program that saves for ever, and is killed."""

    def __init__(self, directory: Path, mode: str, seed: int) -> None:
        self.directory = directory
        self.before = leftovers(directory)
        self.known = len(acknowledged(directory))
        first = 1 + max(acknowledged(directory), default=0) + 100 * seed
        self.process = children.start("saver.py", directory, mode, first, seed)

    def kill(self, moments: random.Random) -> None:
        """Waits for some saves, at least one, then for a random moment, and kills."""
        count = self.known + moments.randint(1, 4)
        try:
            wait_until(self._has_saved(count), f"{count} saves", FIRST_SAVE_SECS)
            self._expect_sweep()
            time.sleep(moments.uniform(0.0, 0.25))
            assert self.process.poll() is None, self.process.communicate()[1]
        finally:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL

    def _has_saved(self, count: int) -> Callable[[], bool]:
        def has_saved() -> bool:
            assert self.process.poll() is None, self.process.communicate()[1]
            return len(acknowledged(self.directory)) >= count

        return has_saved

    def _expect_sweep(self) -> None:
        """What the victim before left has not blocked this one, and is swept by it."""
        wait_until(lambda: not self.before & leftovers(self.directory), "a sweep", SWEEP_SECS)


def in_mode(mode: str) -> ocp.Context:
    """Returns the context of a mode of the programs."""
    context = ocp.Context()
    context.atomicity.mode = "commit_file" if "in-place" in mode.split() else "auto"
    return context


@pytest.mark.parametrize("mode", ["fresh", "overwrite", "in-place fresh", "in-place overwrite"])
def test_a_kill_at_any_moment(mode: str, tmp_path: Path, soak: Callable[[int, int], int]) -> None:
    """The last acknowledged checkpoint loads bit-exact, and no half of one is ever visible."""
    kills, killed_in_a_save, visible = soak(3, 250), 0, 0
    moments = random.Random(mode)
    for seed in range(kills):
        victim = Victim(tmp_path, mode, seed)
        victim.kill(moments)
        killed_in_a_save += bool(leftovers(tmp_path))
        assert not any(ocp.is_orbax_checkpoint(path) for path in leftovers(tmp_path))
        last = acknowledged(tmp_path)[-1]
        finals = [path for path in tmp_path.iterdir() if path.is_dir() and MARK not in path.name]
        # The victim removes old checkpoints of its own, and may have been at it.
        finals = [path for path in finals if "overwrite" in mode or int(path.name) >= last]
        with in_mode(mode):
            unfinished = [path for path in finals if not ocp.is_orbax_checkpoint(path)]
            assert len(unfinished) <= ("in-place" in mode)
            finals = [path for path in finals if path not in unfinished]
            found = {path.name: check_whole(path) for path in finals}
            for path in unfinished:  # what is left of it is in nobody's way
                assert int(path.name) == last + 1
                ocp.save(path, {"step": 0})
                shutil.rmtree(path)
        visible += len(found)
        if "overwrite" in mode:
            assert last <= found["latest"] <= last + 1
        else:
            assert str(last) in found
            assert all(name == str(serial) for name, serial in found.items())
            for path in finals:
                shutil.rmtree(path)
    print(
        f"\n{mode}: {kills} kills, {killed_in_a_save} of them in the middle of a save; "
        f"{len(acknowledged(tmp_path))} saves acknowledged; all {visible} checkpoints that were "
        "visible after a kill are bit-exact"
    )
    ocp.save(tmp_path / "after", {"step": 1})
    wait_until(lambda: not leftovers(tmp_path), "the last sweep", SWEEP_SECS)


@pytest.mark.parametrize(
    "mode",
    [
        *("fresh", "overwrite", "overwrite aside"),
        *("in-place fresh", "in-place overwrite", "in-place overwrite aside"),
    ],
)
def test_a_kill_at_every_step(mode: str, tmp_path: Path, soak: Callable[[int, int], int]) -> None:
    """Killed before any change to the file system, a save leaves the old state, or the new one."""
    stride = soak(7, 1)
    said = children.output("kill_points.py", tmp_path, mode, stride, timeout=1800)
    points = [int(word) for word in said.split()]
    assert points[-1] > 15
    serials = []
    for point in points:
        path = tmp_path / str(point) / "checkpoint"
        with in_mode(mode):
            if "fresh" in mode and not ocp.is_orbax_checkpoint(path):
                assert "in-place" in mode or not path.exists()
                serials.append(0)
            else:
                loaded = ocp.load(path)
                serial = loaded["serial"]
                assert not states.differences(loaded, states.expected(serial, mebibytes=1)), point
                serials.append(serial)
            assert not any(ocp.is_orbax_checkpoint(left) for left in leftovers(path.parent)), point
            ocp.save(path, states.make(3, mebibytes=1), overwrite=True)
            assert ocp.load(path)["serial"] == 3
        wait_until(lambda path=path: not leftovers(path.parent), f"sweep {point}", SWEEP_SECS)
        shutil.rmtree(path.parent)
    print(
        f"\n{mode}: killed at {len(serials)} steps of {points[-1] + 1}; what was visible: {serials}"
    )
    # Once the new one is visible it stays.
    assert serials == sorted(serials)
    assert set(serials) == {0 if "fresh" in mode else 1, 2}


def test_a_killed_process_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    """What a zombie had set aside comes back, and what it left is swept, as after any death."""
    path = tmp_path / "checkpoint"
    ocp.save(path, {"step": 1})
    # Waited for only at the end, as in a container whose first process waits for nobody.
    with subprocess.Popen(["sleep", "60"]) as zombie:
        stat = Path(f"/proc/{zombie.pid}/stat")
        if not stat.exists():
            pytest.skip("needs /proc")
        started = stat.read_text().rsplit(")", 1)[1].split()[19]
        zombie.send_signal(signal.SIGKILL)
        wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "Z", "a death", 30)
        owner = f"{owners._host_before()}-{zombie.pid}-{started}"
        path.rename(tmp_path / f"checkpoint{MARK}-{owner}-0-old")
        (tmp_path / f"checkpoint{MARK}-{owner}-1-new").mkdir()
        assert ocp.load(path) == {"step": 1}
        ocp.save(tmp_path / "other", {"step": 2})
        wait_until(lambda: not leftovers(tmp_path), "a sweep", SWEEP_SECS)
