"""Names of steps: what either library names, the other finds."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1

import orbax_async as ocp

FORMATS: list[dict[str, Any]] = [
    {},
    {"step_format_fixed_length": 4},
    {"step_format_fixed_length": 0},
    {"step_prefix": "step"},
    {"step_prefix": "", "step_format_fixed_length": 1},
    {"step_prefix": "a.b", "step_format_fixed_length": 3},
    {"single_host_load_and_broadcast": True},
]
both = pytest.mark.parametrize("options", FORMATS, ids=str)


def formats(options: dict[str, Any]) -> tuple[Any, Any]:
    """Our format and Orbax's."""
    return (
        ocp.path.step.standard_name_format(**options),
        v1.path.step.standard_name_format(**options),
    )


@pytest.mark.parametrize("name", ["standard_name_format", "composite_name_format"])
def test_signatures_are_those_of_orbax(name: str) -> None:
    """The same parameters, kinds and defaults; the protocols have the same methods."""
    ours, theirs = (inspect.signature(getattr(m.path.step, name)).parameters for m in (ocp, v1))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    for method in ("build_name", "find_all", "find_step"):
        ours, theirs = (
            inspect.signature(getattr(m.path.step.NameFormat, method)).parameters for m in (ocp, v1)
        )
        assert list(ours) == list(theirs)


@both
def test_names_are_those_of_orbax(options: dict[str, Any], rng: np.random.Generator) -> None:
    """Any step has the same name in both libraries."""
    ours, theirs = formats(options)
    for step in [0, 1, 9, 10, 999, 1000, *(int(10 ** rng.uniform(0, 12)) for _ in range(200))]:
        assert ours.build_name(step) == theirs.build_name(step)


@both
def test_both_find_the_same_steps(
    options: dict[str, Any], rng: np.random.Generator, tmp_path: Path
) -> None:
    """In a directory of names of every kind, both libraries find the same steps at the same paths.

    Orbax takes the prefix for a pattern, so that a prefix with special characters is not tried.
    """
    prefixes = ["", "_", "step_", "step", "a.b_", "x_", "-", "+"]
    for _ in range(400):
        digits = "".join(map(str, rng.integers(0, 10, rng.integers(1, 7))))
        name = prefixes[rng.integers(len(prefixes))] + digits.zfill(rng.integers(1, 7))
        path = tmp_path / (name + (".orbax-checkpoint-tmp" if rng.random() < 0.1 else ""))
        if not path.exists():
            path.touch() if rng.random() < 0.2 else path.mkdir()
    ours, theirs = formats(options)
    found = [(one.step, one.path) for one in ours.find_all(tmp_path)]
    assert found == sorted((one.step, one.path) for one in theirs.find_all(tmp_path))
    assert found
    for step, path in found[:20]:
        assert ours.find_step(tmp_path, step).path == theirs.find_step(tmp_path, step).path == path
    absent = max(step for step, _ in found) + 1
    for each in (ours, theirs):
        with pytest.raises(ValueError, match=f"step.?{absent} "):
            each.find_step(tmp_path, absent)
    for temporary in tmp_path.glob("*.orbax-checkpoint-tmp"):
        temporary.rmdir() if temporary.is_dir() else temporary.unlink()


@both
def test_a_run_of_orbax_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    """We find the steps of Orbax's Checkpointer, with its times, metrics and custom metadata."""
    ours, theirs = formats(options)
    with v1.training.Checkpointer(tmp_path, step_name_format=theirs) as checkpointer:
        for step in (0, 3, 12):
            checkpointer.save(
                step,
                {"a": np.arange(3)},
                metrics=None if step == 0 else {"loss": 1 / step},
                custom_metadata={"at": step},
                force=True,
            )
    # The Checkpointer that saves remembers when it began; one that is opened later reads.
    with v1.training.Checkpointer(tmp_path, step_name_format=theirs) as checkpointer:
        expected = checkpointer.checkpoints
        customs = [checkpointer.metadata(step).custom_metadata for step in (0, 3, 12)]
    found = list(ours.find_all(tmp_path))
    for name in ("step", "path", "time", "metrics"):
        assert [getattr(one, name) for one in found] == [getattr(one, name) for one in expected]
    assert [one.custom_metadata for one in found] == customs
    listed = sorted(theirs.find_all(tmp_path), key=lambda one: one.step)
    for name in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
        assert [getattr(one, name) for one in found] == [getattr(one, name) for one in listed]


@pytest.mark.parametrize("options", FORMATS[:4], ids=str)
def test_orbax_goes_on_with_our_steps(options: dict[str, Any], tmp_path: Path) -> None:
    """Orbax's Checkpointer lists and loads steps saved under our names, and saves the next."""
    ours, theirs = formats(options)
    for step in (1, 20):
        ocp.save(tmp_path / ours.build_name(step), {"a": np.full(3, step)})
    with v1.training.Checkpointer(tmp_path, step_name_format=theirs) as checkpointer:
        assert [one.step for one in checkpointer.checkpoints] == [1, 20]
        assert [one.time for one in checkpointer.checkpoints] == [
            one.time for one in ours.find_all(tmp_path)
        ]
        assert checkpointer.load(20)["a"].tolist() == [20] * 3
        assert checkpointer.save(21, {"a": np.full(3, 21)}, force=True)
    assert [one.step for one in ours.find_all(tmp_path)] == [1, 20, 21]
    assert ocp.load(ours.find_step(tmp_path, 21).path)["a"].tolist() == [21] * 3


def test_a_name_format_of_ours_works_in_orbax(tmp_path: Path) -> None:
    """A format for either library serves the other, also as a part of a composite."""
    ours, theirs = formats({"step_prefix": "s"})
    (tmp_path / "s_5").mkdir()
    (tmp_path / "s_5" / "_CHECKPOINT_METADATA").write_text(
        json.dumps({"commit_timestamp_nsecs": 10**18})
    )
    mixed = v1.path.step.composite_name_format(ours, [theirs, ours])
    assert mixed.find_step(tmp_path, 5).time == ours.find_step(tmp_path, 5).time
    mixed = ocp.path.step.composite_name_format(theirs, [theirs, ours])
    assert [one.step for one in mixed.find_all(tmp_path)] == [5]
    assert mixed.find_step(tmp_path, 5).commit_timestamp_nsecs == 10**18
