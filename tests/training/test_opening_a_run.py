"""Opening a run's directory with a Checkpointer, and what goes with it through the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from runs import state, steps

import orbax_async as ocp
from orbax_async import errors
from orbax_async._commit import leftovers
from orbax_async._storage.local import LocalDirectory
from orbax_async.training import Checkpointer
from orbax_async.training import save_decision_policies as when


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run's directory."""
    return tmp_path / "run"


# Opening a run.


def test_the_run_itself_is_described(run: Path) -> None:
    """B13.16: what the first Checkpointer says of the run stays, whatever later ones say."""
    with Checkpointer(run) as checkpointer:
        assert checkpointer.root_metadata() == ocp.training.RootMetadata(
            directory=checkpointer.directory, custom_metadata={}
        )
    with Checkpointer(run, custom_metadata={"seed": 1}) as checkpointer:
        assert checkpointer.root_metadata().custom_metadata == {"seed": 1}
    with Checkpointer(run, custom_metadata={"seed": 2}) as checkpointer:
        assert checkpointer.root_metadata().custom_metadata == {"seed": 1}
        assert checkpointer.checkpoints == []
    for wrong in ([1], "x", {1: 2}, {"a": object()}):
        with pytest.raises((TypeError, ValueError), match="custom_metadata"):
            Checkpointer(run / "other", custom_metadata=wrong)
    assert not (run / "other").exists()
    (run / "metadata" / "_ROOT_METADATA").write_text("{")
    with Checkpointer(run) as checkpointer, pytest.raises(errors.InvalidLayoutError):
        checkpointer.root_metadata()


def test_older_runs_describe_themselves_too(run: Path) -> None:
    """The document's older name is read, and respected."""
    (run / "metadata").mkdir(parents=True)
    (run / "metadata" / "metadata").write_text('{"custom_metadata": {"seed": 1}}')
    with Checkpointer(run, custom_metadata={"seed": 2}) as checkpointer:
        assert checkpointer.root_metadata().custom_metadata == {"seed": 1}


@pytest.mark.leaves_temporaries
def test_leftovers_are_cleaned_up_on_demand(run: Path) -> None:
    """B13.19: unfinished saves go, but those of processes that are alive; steps stay."""
    living = leftovers.temporary_path(str(run / "9"))
    for name in ("7", "8.orbax-checkpoint-tmp", "08", "foo"):
        (run / name).mkdir(parents=True)
    held = leftovers.make_held(LocalDirectory(living), b"")
    with Checkpointer(run) as checkpointer:
        assert steps(checkpointer) == [7]
        assert (run / "8.orbax-checkpoint-tmp").exists()
    with Checkpointer(run, cleanup_tmp_directories=True) as checkpointer:
        assert steps(checkpointer) == [7]
    left = {path.name for path in run.iterdir()}
    assert left == {"7", "08", "foo", Path(living).name}
    held.release()


def test_a_run_lies_in_a_directory(tmp_path: Path) -> None:
    """Parents are made; where a file is, the error says so."""
    deep = tmp_path / "a" / "b"
    assert Checkpointer(str(deep)).directory == deep
    assert deep.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(errors.CommitError, match="file"):
        Checkpointer(tmp_path / "file")


def test_steps_are_named_as_asked(run: Path) -> None:
    """B13.18: a name format names what is saved, and finds it again."""
    names = ocp.path.step.standard_name_format(step_prefix="foo", step_format_fixed_length=3)
    with Checkpointer(run, step_name_format=names) as checkpointer:
        checkpointer.save(4, state(4))
        assert [path.name for path in run.iterdir()] == ["foo_004"]
        checkpointer.reload()
        assert checkpointer.load()["step"] == 4
    assert Checkpointer(run).checkpoints == []


def test_what_others_remove_is_noticed(run: Path) -> None:
    """B13.13: the list is stale until `reload`, but no call takes a step that is gone."""
    with Checkpointer(run) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state(step))
        for step in (1, 2):
            os.rename(run / str(step), run / f"gone {step}")
        assert steps(checkpointer) == [0, 1, 2]
        with pytest.raises(errors.StepNotFoundError):
            checkpointer.load(1)
        assert checkpointer.load()["step"] == 0
        checkpointer.reload()
        assert steps(checkpointer) == [0]


def test_contexts_count_as_in_orbax(run: Path) -> None:
    """B6.12: the Checkpointer copies its context; one that is active at the call counts instead."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    checkpointer = Checkpointer(run, context=context)
    context.array.saving.use_ocdbt = True
    checkpointer.save(0, state(0))
    with context:
        checkpointer.save(1, state(1))
        assert checkpointer.load(0)["step"] == 0
    checkpointer.close()
    assert not (run / "0" / "state" / "manifest.ocdbt").exists()
    assert (run / "1" / "state" / "manifest.ocdbt").exists()
    with ocp.Context(array_options=checkpointer._context.array):
        inherited = Checkpointer(run)
    inherited.save(2, state(2))
    inherited.close()
    assert not (run / "2" / "state" / "manifest.ocdbt").exists()


def test_moving_steps_away_is_refused(run: Path) -> None:
    """B13.25: Orbax does it in the cloud alone; asked for elsewhere, it is refused by name."""
    context = ocp.Context()
    context.deletion.gcs_deletion_options.todelete_full_path = "trash"
    with pytest.raises(NotImplementedError, match="todelete_full_path"):
        Checkpointer(run, context=context)


# Older names, and loggers.


def test_older_names_warn(run: Path) -> None:
    """Orbax's deprecated methods work, and say what they are called now."""
    with Checkpointer(run) as checkpointer:
        with pytest.warns(DeprecationWarning, match="Use `save` instead"):
            assert checkpointer.save_pytree(0, state(0))
        with pytest.warns(DeprecationWarning, match="Use `save_async` instead"):
            assert checkpointer.save_pytree_async(1, state(1)).result()
        with pytest.warns(DeprecationWarning, match="Use `load` instead"):
            assert checkpointer.load_pytree(1)["step"] == 1
        with pytest.warns(DeprecationWarning, match="Use `load_async` instead"):
            assert checkpointer.load_pytree_async(1).result()["step"] == 1
        with pytest.warns(DeprecationWarning, match="Use `metadata` instead"):
            assert checkpointer.pytree_metadata(1).step == 1


def test_a_logger_hears_of_each_save(run: Path) -> None:
    """It is told of what has begun, with times; not of what is skipped."""
    entries: list[dict[str, Any]] = []

    class Logger:
        def log_entry(self, entry: dict[str, Any]) -> None:
            entries.append(entry)

    policy = when.FixedIntervalPolicy(2)
    with Checkpointer(run, save_decision_policy=policy, logger=Logger()) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state(step))
    assert [entry["step"] for entry in entries] == [0, 2]
    for entry in entries:
        assert entry["event_type"] == "save"
        assert entry["directory"] == str(run)
        assert entry["reached_preemption"] is False
        assert entry["checkpointer_blocking_duration_secs"] >= 0
        assert entry["wait_for_prev_start_time"] <= entry["checkpointer_blocking_start_time"]
    assert entries[0]["time_between_consecutive_saves_sec"] is None
    assert entries[1]["time_between_consecutive_saves_sec"] > 0


def test_a_step_without_its_proof_is_none_where_steps_are_written_in_place(run: Path) -> None:
    """COMMIT_FILE: a directory whose save is under way, or was interrupted, is no step yet."""
    context = ocp.Context()
    context.atomicity.mode = "commit_file"
    with Checkpointer(run, context=context) as checkpointer:
        checkpointer.save(1, state(1))
    (run / "2" / "state").mkdir(parents=True)
    with Checkpointer(run, context=context) as checkpointer:
        assert steps(checkpointer) == [1]
        assert checkpointer.latest is not None
        assert checkpointer.latest.step == 1
        with pytest.raises(errors.StepNotFoundError, match=r"2.*interrupted"):
            checkpointer.load(2)
