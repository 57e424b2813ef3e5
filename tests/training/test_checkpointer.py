"""The Checkpointer from plain code: what it saves, lists, loads, describes and deletes."""

from __future__ import annotations

import copy
import datetime
import errno
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Gate, on_disk, state, steps, until
from watched_directory import Fault, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.local import opened_by
from orbax_async.training import Checkpointer
from orbax_async.training import preservation_policies as keep
from orbax_async.training import save_decision_policies as when


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run's directory."""
    return tmp_path / "run"


# Saving and loading.


def test_a_run_is_saved_and_loaded(run: Path) -> None:
    """Steps are listed with their metrics and times, and load by number, as listed, or latest."""
    before = datetime.datetime.now(tz=datetime.UTC)
    with Checkpointer(run) as checkpointer:
        assert checkpointer.directory == run
        assert checkpointer.checkpoints == []
        assert checkpointer.latest is None
        for step in (0, 3):
            assert checkpointer.save(
                step, state(step), metrics={"loss": step}, custom_metadata={"at": step}
            )
        assert steps(checkpointer) == [0, 3]
        latest = checkpointer.latest
        assert latest is not None
        assert isinstance(latest, ocp.training.CheckpointMetadata)
        assert (latest.step, latest.metrics, latest.path) == (3, {"loss": 3}, run / "3")
        assert latest.metadata is None
        assert before <= latest.time <= datetime.datetime.now(tz=datetime.UTC)
        assert latest.time == latest.commit_timestamp
        for given in (3, latest, None, np.int64(3)):
            assert checkpointer.load(given)["step"] == 3
            assert checkpointer.metadata(given).step == 3
        assert checkpointer.load(0, {"w": np.zeros(4), "step": ...})["w"].tolist() == [0] * 4
        assert pickle.loads(pickle.dumps(latest)) == copy.deepcopy(latest) == latest
    assert not list(run.glob("*tmp*"))


def test_a_run_is_continued(run: Path) -> None:
    """A Checkpointer that is opened later knows all that was said of the steps."""
    with Checkpointer(run) as checkpointer:
        checkpointer.save(7, state(7), metrics=[1, None], custom_metadata={"lr": 0.5})
        known = checkpointer.metadata(7)
    with Checkpointer(run) as checkpointer:
        (found,) = checkpointer.checkpoints
        assert found == found
        assert (found.metrics, found.custom_metadata) == ([1, None], {"lr": 0.5})
        again = checkpointer.metadata()
        assert again.commit_timestamp == found.time == known.commit_timestamp
        assert again.init_timestamp == known.init_timestamp
        assert (again.metrics, again.custom_metadata) == ([1, None], {"lr": 0.5})
        assert again.metadata["w"].shape == (4,)
        assert checkpointer.checkpointables_metadata(7).metadata.keys() == {"state"}
        assert checkpointer.save(8, state(8))
        assert checkpointer.load(again)["step"] == 7


def test_several_objects_are_one_step(run: Path) -> None:
    """Checkpointables are saved and loaded by name; metrics are none of them."""
    with Checkpointer(run) as checkpointer:
        assert checkpointer.save_checkpointables(
            1, {"a": state(1), "b": state(2)}, metrics={"loss": 1}
        )
        assert checkpointer.load_checkpointables().keys() == {"a", "b"}
        assert checkpointer.load_checkpointables(1, {"b": None})["b"]["step"] == 2
        assert checkpointer.load(1, checkpointable_name="a")["step"] == 1
        assert checkpointer.checkpointables_metadata(1).metrics == {"loss": 1}
        with pytest.raises(KeyError, match="zz"):
            checkpointer.load_checkpointables(1, {"zz": None})
        for name in ("metrics", "AUTO"):
            with pytest.raises(ValueError, match=f"reserved checkpointable key: {name}"):
                checkpointer.save_checkpointables(2, {name: state(2)})
            with pytest.raises(ValueError, match=f"reserved checkpointable key: {name}"):
                checkpointer.load(1, checkpointable_name=name)
        assert steps(checkpointer) == [1]


def test_a_missing_step_says_what_is_there(run: Path) -> None:
    """A lookup that fails is a StepNotFoundError, which is a FileNotFoundError too."""
    with Checkpointer(run) as checkpointer:
        with pytest.raises(errors.StepNotFoundError, match="no checkpoints were found"):
            checkpointer.load()
        checkpointer.save(4, state(4))
        for verb in (
            checkpointer.load,
            checkpointer.load_checkpointables,
            checkpointer.metadata,
            checkpointer.checkpointables_metadata,
            checkpointer.delete,
        ):
            for step in (5, -1):
                with pytest.raises(FileNotFoundError, match=f"step {step}"):
                    verb(step)


def test_an_existing_step_is_not_replaced_unasked(run: Path) -> None:
    """B13.3: it is a StepAlreadyExistsError; with `overwrite` the new one takes its place."""
    with Checkpointer(run) as checkpointer:
        checkpointer.save(5, state(5), metrics=1)
        with pytest.raises(errors.StepAlreadyExistsError, match="Step 5 already exists"):
            checkpointer.save(5, state(6))
        with pytest.raises(FileExistsError):
            checkpointer.save(5, state(6), force=True)
        assert checkpointer.load(5)["step"] == 5
        assert checkpointer.save(5, state(6), overwrite=True, metrics=2)
        assert checkpointer.load(5)["step"] == 6
        assert [each.metrics for each in checkpointer.checkpoints] == [2]


def test_what_is_no_checkpoint_is_not_replaced(run: Path) -> None:
    """`overwrite` replaces steps only: a directory of other things under such a name stays."""
    (run / "5").mkdir(parents=True)
    (run / "5" / "notes").write_text("not to be lost")
    with Checkpointer(run) as checkpointer:
        with pytest.raises(errors.DestinationExistsError, match="is no checkpoint") as caught:
            checkpointer.save(5, state(5), overwrite=True)
        assert not isinstance(caught.value, errors.StepAlreadyExistsError)
        assert not checkpointer.is_saving_in_progress()
        assert (run / "5" / "notes").read_text() == "not to be lost"


def test_an_earlier_step_is_skipped_and_kept(run: Path) -> None:
    """B13.4, W8: a step below the latest is skipped, not lost to `overwrite`; `force` saves it."""
    with Checkpointer(run) as checkpointer:
        for step in (3, 9):
            checkpointer.save(step, state(step))
        assert checkpointer.save(5, state(5)) is False
        assert checkpointer.save_async(5, state(5)) is None
        assert "step 9 is there already" in str(checkpointer.last_decision)
        assert checkpointer.save(3, state(33), overwrite=True) is False
        assert checkpointer.load(3)["step"] == 3
        assert checkpointer.save(3, state(33), overwrite=True, force=True)
        assert checkpointer.save(5, state(5), force=True)
        assert steps(checkpointer) == on_disk(run) == [3, 5, 9]
        assert checkpointer.load(3)["step"] == 33


# Policies.

SAVING: dict[str, tuple[Any, list[int]]] = {
    "default": (None, list(range(10))),
    "continuous": (when.ContinuousCheckpointingPolicy(), list(range(10))),
    "interval": (when.FixedIntervalPolicy(2), [0, 2, 4, 6, 8]),
    "specific": (
        when.AnySavePolicy([when.SpecificStepsPolicy([2, 3, 6]), when.InitialSavePolicy()]),
        [0, 2, 3, 6],
    ),
    "function": (lambda step, previous_steps, *, context: step.step % 4 == 1, [1, 5, 9]),
}


@pytest.mark.parametrize("name", SAVING)
def test_the_policy_decides_what_is_saved(name: str, run: Path) -> None:
    """B13.6: `should_save` says what `save` does, and both do what the policy says."""
    policy, expected = SAVING[name]
    with Checkpointer(run, save_decision_policy=policy) as checkpointer:
        for step in range(10):
            says = checkpointer.should_save(step)
            assert checkpointer.save(step, {"step": step}) is says is (step in expected)
    assert on_disk(run) == expected


def accuracy(metrics: Any) -> float:
    """What BestN compares."""
    return float(metrics["accuracy"])


KEEPING: dict[str, tuple[Any, list[int]]] = {
    "none": (None, list(range(10))),
    "all": (keep.PreserveAll(), list(range(10))),
    "latest": (keep.LatestN(3), [7, 8, 9]),
    "every": (keep.EveryNSteps(4), [0, 4, 8]),
    "any": (keep.AnyPreservationPolicy([keep.LatestN(2), keep.CustomSteps([1, 3])]), [1, 3, 8, 9]),
    "best": (keep.BestN(get_metric_fn=accuracy, n=2), [0, 4]),
    "best of none": (keep.BestN(get_metric_fn=accuracy, n=0), []),
    "function": (lambda checkpoints, *, context: [c.step < 2 for c in checkpoints], [0, 1]),
}


@pytest.mark.parametrize("name", KEEPING)
def test_the_policy_decides_what_is_kept(name: str, run: Path) -> None:
    """B13.8, B13.9: after each save the list is what the policy keeps; after the end, the disk."""
    policy, expected = KEEPING[name]
    accuracies = [0.9, 0.1, 0.2, 0.3, 0.8, 0.4, 0.3, 0.5, 0.2, 0.1]
    present: list[int] = []
    foretold = ocp.training.plan(
        range(10),
        preservation_policy=policy,
        metrics=dict(enumerate({"accuracy": each} for each in accuracies)),
    )
    with Checkpointer(run, preservation_policy=policy) as checkpointer:
        for step in range(10):
            checkpointer.save(step, {"step": step}, metrics={"accuracy": accuracies[step]})
            gone = {each.step for each in foretold.steps if each.deleted_after == step}
            present = [each for each in [*present, step] if each not in gone]
            assert steps(checkpointer) == present
    assert on_disk(run) == steps(checkpointer) == expected == list(foretold.kept)
    assert not list(run.glob("*tmp*"))


def test_policies_see_the_run(run: Path) -> None:
    """A policy is given the step at hand with its metrics, and all others, those in flight too."""
    seen: list[tuple[int, Any, list[tuple[int, Any]], bool]] = []

    def look(step: Any, previous_steps: Any, *, context: Any) -> bool:
        before = [(each.step, each.metrics) for each in previous_steps]
        assert all(each.time <= step.time for each in previous_steps)
        seen.append((step.step, step.metrics, before, context.is_saving_in_progress))
        return True

    gate = Gate()
    with Checkpointer(run, save_decision_policy=look, max_saves_in_flight=2) as checkpointer:
        checkpointer.save(0, state(0), metrics="a")
        checkpointer.save_checkpointables_async(1, {"gate": gate}, metrics="b")
        assert checkpointer.should_save(2)
        checkpointer.save_async(2, state(2), metrics="c")
        assert checkpointer.should_save(3)
        gate.open()
    assert seen == [
        (0, "a", [], False),
        (1, "b", [(0, "a")], False),
        (2, None, [(0, "a"), (1, "b")], False),
        (2, "c", [(0, "a"), (1, "b")], False),
        (3, None, [(0, "a"), (1, "b"), (2, "c")], True),
    ]


def test_a_skip_is_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was decided, and by which policy, is in `last_decision` and in the log."""
    policy = when.FixedIntervalPolicy(10)
    with (
        caplog.at_level(logging.DEBUG, "orbax_async"),
        Checkpointer(run, save_decision_policy=policy) as checkpointer,
    ):
        assert checkpointer.last_decision is None
        assert checkpointer.save(3, state(3)) is False
        assert str(checkpointer.last_decision) == "skipped: FixedIntervalPolicy(interval=10)"
        assert any("step 3" in line and "FixedInterval" in line for line in caplog.messages)
        checkpointer.save(3, state(3), force=True)
        assert checkpointer.last_decision == when.Decision(True, "force=True")


def test_a_policy_that_fails_to_decide_begins_nothing(run: Path) -> None:
    """What a save policy raises reaches the caller, and nothing is written or in progress."""

    def broken(*args: Any, **kwargs: Any) -> bool:
        raise RuntimeError("no idea")

    with Checkpointer(run, save_decision_policy=broken) as checkpointer:
        with pytest.raises(RuntimeError, match="no idea"):
            checkpointer.save(0, state(0))
        assert not checkpointer.is_saving_in_progress()
        assert not list(run.iterdir())


def test_a_policy_that_fails_to_keep_removes_nothing(run: Path) -> None:
    """What a preservation policy raises, the response raises; the step is saved all the same."""

    def short(checkpoints: Any, *, context: Any) -> list[bool]:
        return [False] * (len(checkpoints) - 1)

    with Checkpointer(run, preservation_policy=short) as checkpointer:
        response = checkpointer.save_async(0, state(0))
        assert response is not None
        with pytest.raises(ValueError, match="answers") as caught:
            response.result()
        assert "step 0 is saved, and nothing was removed" in caught.value.__notes__
        assert steps(checkpointer) == on_disk(run) == [0]


def test_no_policy_is_refused_when_the_run_is_opened(run: Path) -> None:
    """A policy that is none, and impossible arguments, fail before any step."""
    for arguments in (
        {"save_decision_policy": 5},
        {"preservation_policy": "all"},
        {"step_name_format": "step_{}"},
        {"max_saves_in_flight": 0},
        {"supersede_queued": True},
        {"cleanup_tmp_directories": "yes"},
    ):
        with pytest.raises((TypeError, ValueError)):
            Checkpointer(run, **arguments)  # type: ignore[arg-type]


# Deleting.


def test_steps_are_deleted(run: Path) -> None:
    """B12.5: a deleted step is listed no more; part of one can go; what is missing is an error."""
    with Checkpointer(run) as checkpointer:
        for step in range(3):
            checkpointer.save_checkpointables(step, {"state": state(step), "other": state(step)})
        assert checkpointer.delete(0)
        assert steps(checkpointer) == on_disk(run) == [1, 2]
        assert checkpointer.delete(checkpointer.checkpoints[0], checkpointable_name="other")
        assert checkpointer.load_checkpointables(1).keys() == {"state"}
        assert steps(checkpointer) == [1, 2]
        assert checkpointer.delete(9, missing_ok=True) is False
        with pytest.raises(errors.StepNotFoundError):
            checkpointer.delete(9)
        with pytest.raises(ValueError, match="final checkpointable"):
            checkpointer.delete(1, checkpointable_name="state")
        with pytest.raises(TypeError):
            checkpointer.delete(True)
        response = checkpointer.delete_async(2)
        assert steps(checkpointer) == [1]
        assert response.result() is True
    assert on_disk(run) == [1]


def test_a_step_that_can_not_be_deleted_stays(run: Path) -> None:
    """It is listed again once its deletion has failed."""
    with Checkpointer(run) as checkpointer:
        checkpointer.save(0, state(0))
        fault = Fault(errno.EACCES, on("rename", path=f"{run}/0"))
        with opened_by(watched(fault)), pytest.raises(errors.CommitError):
            checkpointer.delete(0)
        until(lambda: steps(checkpointer) == [0])
        assert checkpointer.load(0)["step"] == 0
