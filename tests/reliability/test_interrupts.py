"""Interrupts: Ctrl-C in a verb that blocks ends that verb, and what is said of it is so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import held_saves
import pytest
from held_saves import STATE, Gate

import orbax_async as ocp

before_commit = held_saves.before_commit
at_commit = held_saves.at_commit

PROGRAM = Path(__file__).parent / "programs" / "interrupts.py"
WITHIN_SECS, HUNG_SECS = 2, 60  # at full size, and where a busy machine is not to be judged

pytestmark = [pytest.mark.timeout(1800), pytest.mark.skipif("sys.platform == 'win32'")]


@pytest.mark.acceptance
@pytest.mark.parametrize("verb", ["save", "load", "step"])
def test_f30_what_is_said_of_an_interrupted_verb_is_so(
    verb: str, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """F30: SIGINT at random moments; the verb is back soon, undone or committed as it says."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), verb, str(soak(12, 100)), "1"],
        env=os.environ | {"PYTHONPATH": str(Path(ocp.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{verb}: {told['ends']}, longest {told['longest_secs']:.3f} s")
    assert not told["wrong"], "\n".join(told["wrong"])
    assert told["longest_secs"] < soak(HUNG_SECS, WITHIN_SECS)
    assert told["ends"].keys() - {"returned"}


def interrupt_at(gate: Gate, *, opens: bool = False, times: int = 1) -> threading.Thread:
    """Interrupts the main thread when a save has reached a gate, which may be opened then."""

    def work() -> None:
        gate.reached.wait()
        for _ in range(times):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            gate.opened.wait(0.1)
        if opens:
            gate.open()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_f30_before_the_commit_point_a_save_is_undone(tmp_path: Path, before_commit: Gate) -> None:
    """F30: nothing is there when KeyboardInterrupt arrives, and the same call again works."""
    thread = interrupt_at(before_commit)
    with pytest.raises(KeyboardInterrupt) as caught:
        ocp.save(tmp_path / "c", STATE)
    thread.join()
    assert caught.value.__notes__ == [f"save to {tmp_path / 'c'} is undone."]
    assert not list(tmp_path.iterdir())
    before_commit.open()
    ocp.save(tmp_path / "c", STATE)


def test_f30_after_the_commit_point_a_save_is_said_to_be_committed(
    tmp_path: Path, at_commit: Gate
) -> None:
    """F30: what can't be undone any more is waited for, and named."""
    thread = interrupt_at(at_commit, opens=True)
    with pytest.raises(KeyboardInterrupt) as caught:
        ocp.save(tmp_path / "c", STATE)
    thread.join()
    assert "is complete" in caught.value.__notes__[0]
    assert ocp.load(tmp_path / "c")["b"] == 1


def test_f30_a_second_interrupt_does_not_wait(tmp_path: Path, at_commit: Gate) -> None:
    """F30: who is interrupted while a save is being undone or ends is free at once."""
    thread = interrupt_at(at_commit, opens=True, times=2)
    with pytest.raises(KeyboardInterrupt):
        ocp.save(tmp_path / "c", STATE)
    thread.join()
    ocp.save(tmp_path / "c", STATE, overwrite=True)


def test_f30_who_never_gets_the_response_leaves_no_save(
    tmp_path: Path, before_commit: Gate
) -> None:
    """F30: `save_async` that is interrupted while it captures cancels what it has begun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orbax_async._response.AsyncResponse._set_staged", lambda self: None)
        patch.setattr("orbax_async._response.AsyncResponse._release_caller", lambda self: None)
        thread = interrupt_at(before_commit)
        with pytest.raises(KeyboardInterrupt):
            ocp.save_async(tmp_path / "c", STATE)
        thread.join()
    assert not list(tmp_path.iterdir())
