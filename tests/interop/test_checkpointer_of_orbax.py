"""Orbax's Checkpointer and ours on the same runs: each goes on where the other stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as v0
import pytest
from orbax.checkpoint import v1

import orbax_async as ocp

OURS, THEIRS = ocp.training, v1.training


def state(step: int) -> dict[str, Any]:
    """A small state that follows from its step."""
    return {"w": np.arange(6.0).reshape(2, 3) + step, "step": step, "name": f"step {step}"}


def check(checkpointer: Any, saved: list[int]) -> None:
    """Everything that was said of each step is there, whoever saved it."""
    assert [each.step for each in checkpointer.checkpoints] == saved
    assert checkpointer.latest.step == saved[-1]
    assert [each.metrics for each in checkpointer.checkpoints] == [
        {"loss": 1 / (1 + step)} for step in saved
    ]
    assert checkpointer.root_metadata().custom_metadata == {"run": "shared"}
    for step in saved[-2:]:
        found = checkpointer.metadata(step)
        assert (found.step, found.metrics) == (step, {"loss": 1 / (1 + step)})
        assert found.custom_metadata == {"at": step}
        assert found.init_timestamp_nsecs < found.commit_timestamp_nsecs
        assert found.metadata["w"].shape == (2, 3)
        loaded = checkpointer.load(step)
        assert loaded["w"].tolist() == state(step)["w"].tolist()
        assert (loaded["step"], loaded["name"]) == (step, f"step {step}")
        several = checkpointer.load_checkpointables(step)
        assert several.keys() == {"state"}
        assert checkpointer.checkpointables_metadata(step).metadata.keys() == {"state"}


def test_the_libraries_take_turns(tmp_path: Path) -> None:
    """Ten alternations on one run: each sees the other's steps, metrics and metadata, and adds."""
    saved: list[int] = []
    for turn in range(10):
        training: Any = (OURS, THEIRS)[turn % 2]
        with training.Checkpointer(tmp_path, custom_metadata={"run": "shared"}) as checkpointer:
            if saved:
                check(checkpointer, saved)
            for step in (2 * turn, 2 * turn + 1):
                assert checkpointer.save(
                    step,
                    state(step),
                    force=True,
                    metrics={"loss": 1 / (1 + step)},
                    custom_metadata={"at": step},
                )
                saved.append(step)
            check(checkpointer, saved)
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize("prefix", [None, "step"])
def test_retention_takes_turns(prefix: str | None, tmp_path: Path) -> None:
    """Each keeps and removes the other's steps by the same policy, best metrics among them."""
    losses = [5, 1, 4, 2, 8, 3, 9, 7, 6, 0]
    for turn in range(10):
        library: Any = (ocp, v1)[turn % 2]
        policies = library.training.preservation_policies
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(2),
                policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=2),
            ]
        )
        names = library.path.step.standard_name_format(step_prefix=prefix)
        with library.training.Checkpointer(
            tmp_path, preservation_policy=policy, step_name_format=names
        ) as checkpointer:
            checkpointer.save(turn, state(turn), force=True, metrics={"loss": losses[turn]})
        best = sorted(range(turn + 1), key=lambda step: losses[step])[:2]
        expected = sorted({*best, *range(max(0, turn - 1), turn + 1)})
        assert [each.step for each in checkpointer.checkpoints] == expected
        assert len(list(tmp_path.iterdir())) == len(expected)


def test_unfinished_saves_of_either_are_no_steps(tmp_path: Path) -> None:
    """A directory that a save of one library has not finished is nothing to the other."""
    for library in (ocp, v1):
        with library.training.Checkpointer(tmp_path / library.__name__) as checkpointer:
            checkpointer.save(0, state(0))
    for name in ("1.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-0a1b2c3d-1-1-0-new"):
        for library in (ocp, v1):
            folder = tmp_path / library.__name__
            (folder / name / "state").mkdir(parents=True)
    for library in (ocp, v1):
        for writer in (ocp, v1):
            folder = tmp_path / writer.__name__
            with library.training.Checkpointer(folder) as checkpointer:
                assert [each.step for each in checkpointer.checkpoints] == [0]
    for writer in (ocp, v1):  # Orbax's own clean-up may end later than the Checkpointer
        folder = tmp_path / writer.__name__
        with ocp.training.Checkpointer(folder, cleanup_tmp_directories=True) as checkpointer:
            assert [each.step for each in checkpointer.checkpoints] == [0]
        (left,) = folder.glob("*tmp*")
        assert left.name.startswith("2."), "that may be alive: it is of another host"
        shutil.rmtree(left)


def test_a_run_of_v0_is_continued(tmp_path: Path) -> None:
    """B16.3: a run of Orbax's older CheckpointManager goes on here, and there again."""
    options = v0.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    numbers = {key: value for key, value in state(0).items() if key != "name"}
    with v0.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(
            0,
            args=v0.args.Composite(state=v0.args.StandardSave(numbers)),
            metrics={"loss": 0.5},
        )
        manager.wait_until_finished()
    with OURS.Checkpointer(tmp_path) as checkpointer:
        (found,) = checkpointer.checkpoints
        assert (found.step, found.metrics) == (0, {"loss": 0.5})
        assert checkpointer.load(0)["w"].tolist() == state(0)["w"].tolist()
        assert checkpointer.save(1, state(1), metrics={"loss": 0.25})
    with v0.CheckpointManager(tmp_path, options=options) as manager:
        assert sorted(manager.all_steps()) == [0, 1]
        restored = manager.restore(1, args=v0.args.Composite(state=v0.args.StandardRestore()))
        assert restored["state"]["w"].tolist() == state(1)["w"].tolist()
        assert manager.metrics(1) == {"loss": 0.25}
