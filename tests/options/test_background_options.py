"""Options of the background part of a save and of its files, each by its effect."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import held_saves
import numpy as np
import pytest
from held_saves import STATE, Gate, with_async

import orbax_async as ocp
from orbax_async import errors
from orbax_async._commit import sequence

before_commit = held_saves.before_commit
at_commit = held_saves.at_commit
failing = held_saves.failing


# Options of the background part.


@pytest.mark.parametrize("timeout_secs", [0, -1, 1e-9])
@pytest.mark.parametrize("staging", ["eager", "lazy"])
def test_a_save_without_time_fails(timeout_secs: float, staging: str, tmp_path: Path) -> None:
    """A time limit that is over at once fails the save by name, and nothing is left of it."""
    context = with_async(timeout_secs=timeout_secs, staging=staging)
    with context, pytest.raises(TimeoutError, match="Overall save timeout exceeded") as caught:
        ocp.save_async(tmp_path / "checkpoint", STATE).result()
    assert isinstance(caught.value, errors.OperationTimeoutError)
    assert str(timeout_secs) in str(caught.value)
    assert os.listdir(tmp_path) == []
    ocp.save(tmp_path / "checkpoint", STATE)


def test_a_save_that_takes_too_long_is_undone(tmp_path: Path, before_commit: Gate) -> None:
    """When the limit passes in the middle of a save, its temporary directory is removed."""
    with with_async(timeout_secs=0.2):
        response = ocp.save_async(tmp_path / "deep" / "checkpoint", STATE)
    with pytest.raises(errors.OperationTimeoutError, match="is undone"):
        response.result(timeout=30)
    assert os.listdir(tmp_path) == []


def test_no_limit_means_no_limit(tmp_path: Path) -> None:
    """`timeout_secs=None` lets a save take as long as it takes."""
    with with_async(timeout_secs=None):
        ocp.save(tmp_path / "checkpoint", STATE)
    assert ocp.is_orbax_checkpoint(tmp_path / "checkpoint")


def test_a_limit_does_not_undo_what_is_committed(tmp_path: Path, at_commit: Gate) -> None:
    """Past the commit point the time limit counts no more: the save succeeds."""
    with with_async(timeout_secs=0.3):
        response = ocp.save_async(tmp_path / "checkpoint", STATE)
    assert at_commit.reached.wait(30)
    with pytest.raises(TimeoutError):
        response.result(timeout=0.5)
    at_commit.open()
    assert response.result(timeout=30) is None
    assert ocp.is_orbax_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("verb", [ocp.save, ocp.save_async])
def test_w26_the_finalization_callback_is_called_after_the_commit(
    verb: Any, tmp_path: Path
) -> None:
    """The callback runs once for each commit, when the checkpoint is visible, before `result`."""
    seen: list[bool] = []
    callback = lambda: seen.append(ocp.is_orbax_checkpoint(tmp_path / "checkpoint"))  # noqa: E731
    with with_async(post_finalization_callback=callback):
        response = verb(tmp_path / "checkpoint", STATE)
        if response is not None:
            response.result()
        assert seen == [True]
        ocp.load(tmp_path / "checkpoint")
        with pytest.raises(errors.DestinationExistsError):
            verb(tmp_path / "checkpoint", STATE)
    assert seen == [True]


def test_w26_a_finalization_callback_that_raises_fails_the_response(tmp_path: Path) -> None:
    """What the callback raises the response raises; the checkpoint is there all the same."""

    def broken() -> None:
        raise LookupError("after the fact")

    with with_async(post_finalization_callback=broken):
        response = ocp.save_async(tmp_path / "checkpoint", STATE)
        with pytest.raises(LookupError, match="after the fact"):
            response.result()
    assert np.array_equal(ocp.load(tmp_path / "checkpoint")["a"], STATE["a"])
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_w26_no_finalization_callback_after_a_failure(tmp_path: Path, failing: None) -> None:
    """A save that is not committed does not call it."""
    calls: list[int] = []
    context = with_async(post_finalization_callback=lambda: calls.append(1))
    with context, pytest.raises(errors.CommitError):
        ocp.save(tmp_path / "checkpoint", STATE)
    assert calls == []


def test_b8_7_directories_are_created_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default `save_async` returns with nothing on disk; in the end one directory is there."""
    opened = threading.Event()
    original = sequence.Save._begin

    def held(self: sequence.Save) -> None:
        opened.wait(30)
        original(self)

    monkeypatch.setattr(sequence.Save, "_begin", held)
    response = ocp.save_async(tmp_path / "checkpoint", STATE)
    assert os.listdir(tmp_path) == []
    opened.set()
    response.result()
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_directories_can_be_created_before_the_call_returns(
    tmp_path: Path, before_commit: Gate
) -> None:
    """With `create_directories_asynchronously=False` the temporary directory is there at once."""
    with with_async(create_directories_asynchronously=False):
        response = ocp.save_async(tmp_path / "checkpoint", STATE)
    (temporary,) = tmp_path.iterdir()
    assert temporary.name.startswith("checkpoint.orbax-checkpoint-tmp")
    before_commit.open()
    response.result()
    assert os.listdir(tmp_path) == ["checkpoint"]


# Options of files.


def test_b8_6_permission_bits_are_those_of_the_root(tmp_path: Path) -> None:
    """`path_permission_mode` sets the bits of the checkpoint's root, whatever the umask."""
    context = ocp.Context()
    context.file.path_permission_mode = 0o750
    before = os.umask(0o077)
    try:
        with context:
            ocp.save(tmp_path / "checkpoint", STATE)
            ocp.save(tmp_path / "checkpoint", STATE, overwrite=True)
        assert stat.S_IMODE((tmp_path / "checkpoint").stat().st_mode) == 0o750
        assert stat.S_IMODE((tmp_path / "checkpoint" / "state").stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_skipped_validations_are_made_at_the_commit(tmp_path: Path) -> None:
    """`skip_sync_file_validations` finds an existing destination only when the save commits."""
    ocp.save(tmp_path / "checkpoint", {"a": 1})
    context = ocp.Context()
    context.file.skip_sync_file_validations = True
    with context:
        response = ocp.save_async(tmp_path / "checkpoint", {"a": 2})  # does not raise
        with pytest.raises(errors.DestinationExistsError, match="already exists"):
            response.result()
        assert ocp.load(tmp_path / "checkpoint") == {"a": 1}
        ocp.save(tmp_path / "checkpoint", {"a": 3}, overwrite=True)
    assert ocp.load(tmp_path / "checkpoint") == {"a": 3}
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_w8_skipped_validations_never_destroy_what_is_no_checkpoint(tmp_path: Path) -> None:
    """Also without the first look an overwrite refuses to replace what is no checkpoint."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    context = ocp.Context()
    context.file.skip_sync_file_validations = True
    with context, pytest.raises(errors.DestinationExistsError, match="no checkpoint"):
        ocp.save(precious, STATE, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["precious"]


def test_paths_are_made_by_the_path_class(tmp_path: Path) -> None:
    """`file.path_class` turns what the caller passes into a path, for every verb."""
    context = ocp.Context()
    context.file.path_class = lambda name: tmp_path / f"run-{name}"
    with context:
        ocp.save(7, {"a": 1})  # type: ignore[arg-type]
        assert ocp.load(7) == {"a": 1}  # type: ignore[arg-type]
        assert ocp.metadata(7).metadata == {"a": 0}  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["run-7"]
