"""Two real JAX processes with a Checkpointer each: one decides, both save, list and load alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_two_processes import Outcome, play


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Both processes have saved, skipped, failed, loaded and deleted steps of one run."""
    return play("run", tmp_path_factory.mktemp("run"))


def test_the_primary_decides_for_both(ended: Outcome) -> None:
    """A policy that would never save on the other process saves there what the primary says."""
    for report in ended.reports:
        assert report is not None
        assert report["due"] == report["saved"] == [step % 2 == 0 for step in range(9)]
        assert report["why"].startswith("saved")
        assert report["forced"] is True
        assert report["skipped"] is False


def test_both_know_the_run(ended: Outcome) -> None:
    """Steps, metrics and metadata are the same on both, after the old ones have gone."""
    for report in ended.reports:
        assert report is not None
        assert report["listed"] == [8, 11]
        assert report["metrics"] == [{"loss": 8}, None]
        assert report["root"] == {"seed": 1}
        assert report["loaded"] is True
        assert report["deleted"] is True
        assert report["closed"] == [11]
        assert report["left"] == ["11", "metadata"]


def test_both_hear_of_a_failure(ended: Outcome) -> None:
    """What exists is refused on both; what fails on one fails on both, and the run goes on."""
    for report in ended.reports:
        assert report is not None
        assert report["exists"]["error"] == "StepAlreadyExistsError"
        for culprit in (0, 1):
            assert report[f"failed on {culprit}"]["error"]
    assert not list(Path(ended.folder).glob("*tmp*"))
