"""The scripts of examples/ do what they say, as their readers run them: as processes."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import on_disk

import orbax_async as ocp

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@contextmanager
def started(name: str, directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Starts an example, warnings being errors; it has to end well by itself."""
    script = str(EXAMPLES / f"{name}.py")
    command = [sys.executable, "-W", "error", script, "--directory", str(directory), *options]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        try:
            yield child
        except BaseException:
            child.kill()
            raise
    assert child.returncode == 0, f"{name} ended with {child.returncode}"


def output_of(name: str, directory: Path, *options: str) -> str:
    """Runs an example to its end, and returns what it said."""
    with started(name, directory, *options) as child:
        said = child.communicate()[0]
        assert child.returncode == 0, said
    return said


def read_until(child: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Reads what an example says up to a line that matches."""
    said = []
    for line in child.stdout or ():
        said.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"no {pattern!r} in:\n{''.join(said)}")


@dataclass(frozen=True)
class Trained:
    """A trainer, stopped and run again, and the same one run at once.

    Attributes:
      stopped: the directory of the first, `at_once` that of the second.
      stop: the step at which SIGTERM found it.
      found: the steps that it left.
      end: the last step.
      said: what it said when it was run again, and what the other one said.
    """

    stopped: Path
    at_once: Path
    stop: int
    found: list[int]
    end: int
    said: tuple[str, str]


def trained(name: str, folder: Path) -> Trained:
    """Runs a trainer three times."""
    stopped, at_once = folder / "stopped", folder / "at once"
    with started(name, stopped, "--steps", "1000000") as child:
        read_until(child, r"step 100: ")
        child.send_signal(signal.SIGTERM)
        stop = int(read_until(child, r"stopped at step (\d+)")[1])
    found, end = on_disk(stopped), stop + 320
    said = [output_of(name, each, "--steps", str(end)) for each in (stopped, at_once)]
    return Trained(stopped, at_once, stop, found, end, (said[0], said[1]))


@pytest.fixture(scope="module")
def sync_loop(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The sync loop."""
    return trained("sync_loop", tmp_path_factory.mktemp("sync_loop"))


@pytest.fixture(scope="module")
def async_trainer(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The async trainer."""
    return trained("async_trainer", tmp_path_factory.mktemp("async_trainer"))


def assert_goes_on(runs: Trained) -> None:
    """SIGTERM saved the step at hand; from there it went on like one that was never stopped."""
    assert runs.found[-1] == runs.stop
    assert f"resumed from step {runs.stop}\n" in runs.said[0]
    assert "resumed" not in runs.said[1]
    shared = set(on_disk(runs.stopped)) & set(on_disk(runs.at_once))
    assert runs.end in shared and len(shared) > 1
    for step in shared:  # all but the last were followed by steps that donate what is saved
        resumed, at_once = (ocp.load(each / str(step)) for each in (runs.stopped, runs.at_once))
        assert resumed["opt_state"][0]["count"] == step
        (ours, treedef), (theirs, other) = jax.tree.flatten(resumed), jax.tree.flatten(at_once)
        assert treedef == other
        for one, two in zip(ours, theirs, strict=True):
            assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def test_the_sync_loop_goes_on_bit_for_bit(sync_loop: Trained) -> None:
    """Stopped by SIGTERM and run again, it ends with the bytes of one that was not stopped."""
    assert_goes_on(sync_loop)


def test_the_async_trainer_goes_on_bit_for_bit(async_trainer: Trained) -> None:
    """The same holds where values are captured in the background."""
    assert_goes_on(async_trainer)


@pytest.mark.parametrize("name", ["sync_loop", "async_trainer"])
def test_what_is_saved_beside_the_training_is_what_was_trained(
    name: str, request: pytest.FixtureRequest
) -> None:
    """A step that a donating step followed at once holds what its number says."""
    runs: Trained = request.getfixturevalue(name)
    code = runpy.run_path(str(EXAMPLES / "sync_loop.py"))
    state, saved_step = code["initial_state"](), on_disk(runs.at_once)[-2]
    for step in range(saved_step):
        state, _ = code["train_step"](state, *code["batch"](step))
    that = jax.tree.map(np.array, state["params"])
    the_next = code["train_step"](state, *code["batch"](saved_step))[0]["params"]
    saved = ocp.load(runs.at_once / str(saved_step))["params"]

    def distance(one: Any, other: Any) -> float:
        apart = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).mean(), one, other)
        return float(max(jax.tree.leaves(apart)))

    # Not to the last bit: the async trainer compiles the two halves of a step by themselves.
    assert distance(saved, that) < 0.1 * distance(the_next, that)


def test_the_sync_loop_keeps_what_its_policies_say(sync_loop: Trained) -> None:
    """The last two steps, every 200th, and the best one by what it printed; no others."""
    said = re.findall(r"^step (\d+): ([\d.]+)", sync_loop.said[1], re.M)
    saved = {int(step): float(right) for step, right in said}
    assert list(saved) == sorted({*range(50, sync_loop.end, 50), sync_loop.end})
    kept = on_disk(sync_loop.at_once)
    wanted = {*list(saved)[-2:], *(step for step in saved if step % 200 == 0)}
    assert wanted <= set(kept) and len(set(kept) - wanted) <= 1
    best = max(saved.values())
    assert best > 0.9 and best in [saved[step] for step in kept]
    with ocp.training.Checkpointer(sync_loop.at_once) as checkpointer:
        told = {each.step: each.metrics["accuracy"] for each in checkpointer.checkpoints}
    assert told == pytest.approx({step: saved[step] for step in kept}, abs=1e-4)


def test_the_async_trainer_evaluates_what_is_durable(async_trainer: Trained) -> None:
    """Each saved step was loaded and evaluated; the better trained, the better it reads."""
    said = re.findall(r"^step (\d+): durable, ([\d.]+)", async_trainer.said[1], re.M)
    right = {int(step): float(right) for step, right in said}
    assert sorted(right) == sorted({*range(50, async_trainer.end, 50), async_trainer.end})
    assert right[50] < right[async_trainer.end] and right[async_trainer.end] > 0.9
    assert on_disk(async_trainer.at_once) == sorted(right)[-5:]


# The server.


def ask(address: str, target: str, data: Any = None) -> dict[str, Any]:
    """Sends one HTTP request, and returns the answer."""
    body = None if data is None else json.dumps(data).encode()
    with urllib.request.urlopen(f"{address}{target}", body, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_the_server_answers_rightly_while_it_saves(tmp_path: Path) -> None:
    """Beside a save it answers what the step it names says; SIGTERM saves, and it goes on there."""
    server = runpy.run_path(str(EXAMPLES / "async_server.py"))
    pictures = server["PIXELS"][server["TRAINED_ON"] :]
    beside_a_save: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}  # by step
    with started("async_server", tmp_path, "--steps", "1000000") as child:
        address = read_until(child, r"serving step 200 on (http:\S+)")[1]
        while len(beside_a_save) < 3:
            for picture in pictures[:50]:
                answer = ask(address, "/predict", picture.tolist())
                if answer["is_saving"]:
                    beside_a_save[answer["step"]] = picture, answer
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(address, "/weather")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(address, "/predict", [1, 2, 3])
        child.send_signal(signal.SIGTERM)
        last = int(read_until(child, r"stopped at step (\d+)")[1])

    # The training is a function of the step alone: what each step says can be worked out here.
    state, step = server["initial_state"](), 0
    for served, (picture, answer) in sorted(beside_a_save.items()):
        state, step = server["train"](state, step, served - step), served
        expected = np.asarray(server["logits"](state["params"], picture[None])[0])
        np.testing.assert_allclose(answer["logits"], expected, rtol=1e-3, atol=1e-3)
        assert answer["digit"] == expected.argmax()

    assert on_disk(tmp_path)[-1] == last >= step
    assert ocp.verify(tmp_path / str(last)).is_intact
    said = output_of("async_server", tmp_path, "--smoke")  # asks all unseen digits, over HTTP
    assert f"serving step {last} on " in said
    found = re.search(r"([\d.]+) read right, by (\d+) steps", said)
    assert found and float(found[1]) > 0.9 and int(found[2]) > 1, said
    assert f"stopped at step {on_disk(tmp_path)[-1]}\n" in said


@pytest.mark.parametrize("name", ["sync_loop", "async_trainer", "async_server"])
def test_an_example_explains_itself(name: str) -> None:
    """Each has a docstring with the command that runs it, and fits on a few screens."""
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert f"python examples/{name}.py --directory " in text.split('"""')[1]
    assert text.count("\n") <= 200
