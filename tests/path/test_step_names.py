"""The names of steps, and finding them: one look at a directory, nothing taken for a step."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched_directory import Call, Log, before, on, watched

import orbax_async as ocp
from orbax_async import errors, multihost
from orbax_async._storage.local import opened_by
from orbax_async.path import step as steps

standard = steps.standard_name_format


def made(base: Path, *names: str) -> Path:
    """Makes a directory of each name."""
    for name in names:
        (base / name).mkdir(parents=True)
    return base


def found(form: steps.NameFormat[Any], base: Path) -> dict[int, str]:
    """What a format finds: the name of each step."""
    return {one.step: one.path.name for one in form.find_all(base)}


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (standard(), ["0", "23", "12345"]),
        (standard(step_format_fixed_length=0), ["0", "23", "12345"]),
        (standard(step_format_fixed_length=4), ["0000", "0023", "12345"]),
        (standard(step_prefix="step"), ["step_0", "step_23", "step_12345"]),
        (standard(step_prefix="", step_format_fixed_length=3), ["_000", "_023", "_12345"]),
        (standard(step_prefix="a+b (1)"), ["a+b (1)_0", "a+b (1)_23", "a+b (1)_12345"]),
    ],
)
def test_what_is_named_is_found(
    form: steps.NameFormat[Any], names: list[str], tmp_path: Path
) -> None:
    """Each name is built as documented, found among the others, and found alone."""
    assert [form.build_name(step) for step in (0, 23, 12345)] == names
    made(tmp_path, *names)
    assert found(form, tmp_path) == dict(zip((0, 23, 12345), names, strict=True))
    assert form.find_step(tmp_path, 23).path == tmp_path / names[1]
    assert form.build_name(np.int64(23)) == names[1]


FOREIGN = ["-1", "007", "0x1", "+5", "1_000", "1e3", "step_8", "x", "٣", "³", "9.", ".9", "00"]
FOREIGN += ["_5", "1 ", " 1", "2\n"]


def test_nothing_else_is_a_step(tmp_path: Path) -> None:
    """Names of other forms, files, dead links and unfinished checkpoints are not steps."""
    made(tmp_path, "3", *FOREIGN, "5.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-1a-2-new")
    (tmp_path / "7").write_text("a file")
    (tmp_path / "8").symlink_to(tmp_path / "3")
    (tmp_path / "9").symlink_to(tmp_path / "nowhere")
    (tmp_path / "10").symlink_to(tmp_path / "7")
    assert found(standard(), tmp_path) == {3: "3", 8: "8"}
    assert found(standard(step_format_fixed_length=3), tmp_path) == {7: "007"}
    for temporary in tmp_path.glob("*.orbax-checkpoint-tmp*"):
        temporary.rmdir()


def test_steps_come_in_ascending_order(tmp_path: Path, rng: np.random.Generator) -> None:
    """The order is that of the numbers, whatever the order of the names."""
    numbers = [int(one) for one in rng.choice(10**6, 300, replace=False)]
    made(tmp_path, *map(str, numbers))
    assert [one.step for one in standard().find_all(tmp_path)] == sorted(numbers)


def test_finding_looks_at_no_entry(tmp_path: Path) -> None:
    """A directory is listed once, and neither its entries nor what is in them is looked at."""
    made(tmp_path, *(str(step) for step in range(200)), *(f"run_{step}" for step in range(200)))
    form = steps.composite_name_format(standard(), [standard(), standard(step_prefix="run")])
    log = Log()
    with opened_by(watched(log)):
        one, both = list(standard().find_all(tmp_path)), list(form.find_all(tmp_path))
    assert log.calls == [Call("entries", str(tmp_path))] * 2
    assert len(one) == len(both) == 200


def test_a_directory_that_is_not_there_has_no_steps(tmp_path: Path) -> None:
    """Looking for all steps of a run that has not begun, or of a file, finds none."""
    (tmp_path / "file").touch()
    assert list(standard().find_all(tmp_path / "run")) == []
    assert list(standard().find_all(tmp_path / "file")) == []


def test_a_missing_step_is_reported_with_what_is_there(tmp_path: Path) -> None:
    """The error names the path, the name expected, and the steps or other names found."""
    form = standard(step_prefix="step", step_format_fixed_length=4)
    with pytest.raises(errors.StepNotFoundError, match=r"no such|no directory") as caught:
        form.find_step(tmp_path / "run", 3)
    assert str(tmp_path / "run") in str(caught.value)
    with pytest.raises(errors.StepNotFoundError, match="there are no steps"):
        form.find_step(tmp_path, 3)
    made(tmp_path, "step_0001", "step_0002", "3", "step_0033")
    (tmp_path / "step_0004").write_text("a file")
    with pytest.raises(errors.StepNotFoundError) as caught:
        form.find_step(tmp_path, 3)
    assert str(caught.value) == (
        f"no checkpoint of step 3 under {tmp_path}: expected a directory step_0003 "
        "(StandardNameFormat('step_1234')), and the last steps there are 1, 2, 33; "
        "3 is a name of another format"
    )
    with pytest.raises(errors.StepNotFoundError, match="step_0004 is there, but is no directory"):
        form.find_step(tmp_path, 4)
    for builtin in (ValueError, FileNotFoundError):
        with pytest.raises(builtin):
            form.find_step(tmp_path, 99)


@pytest.mark.parametrize("bad", [True, 1.0, 2.5, "1", None, np.float32(1), np.array([1, 2])])
def test_a_step_is_an_integer(bad: Any, tmp_path: Path) -> None:
    """W17: what is no integer is refused by name wherever a step is given; NumPy's are integers."""
    for call in (standard().build_name, lambda step: standard().find_step(tmp_path, step)):
        with pytest.raises(TypeError, match="a step must be an integer, not"):
            call(bad)
        with pytest.raises(ValueError, match="must not be negative, and is -1"):
            call(np.int8(-1))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"step_prefix": 5}, TypeError, "step_prefix must be a str or None, not 5"),
        ({"step_prefix": "a/b"}, ValueError, "one directory name, not 'a/b'"),
        ({"step_prefix": "a\0"}, ValueError, "one directory name"),
        ({"step_prefix": "x.orbax-checkpoint-tmp"}, ValueError, "the mark of unfinished"),
        ({"step_format_fixed_length": "4"}, TypeError, "must be an int or None, not '4'"),
        ({"step_format_fixed_length": True}, TypeError, "must be an int or None, not True"),
        ({"step_format_fixed_length": -1}, ValueError, "must not be negative, and is -1"),
    ],
)
def test_a_format_that_can_not_work_is_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """Bad options are refused when the format is made."""
    with pytest.raises(error, match=re.escape(text)):
        standard(**options)


def test_a_composite_writes_one_name_and_reads_several(tmp_path: Path) -> None:
    """W18: a run that changed its names keeps its steps: each is found where it lies, once."""
    old, new = standard(), standard(step_prefix="step")
    form = steps.composite_name_format(new, [standard(step_prefix="step"), old])
    made(tmp_path, "1", "2", "step_2", "step_10")
    assert form.build_name(3) == "step_3"
    assert found(form, tmp_path) == {1: "1", 2: "step_2", 10: "step_10"}
    assert {step: form.find_step(tmp_path, step).path.name for step in (1, 2)} == {
        1: "1",
        2: "step_2",
    }
    with pytest.raises(errors.StepNotFoundError, match=r"(?s)directory step_7 .*\n.*directory 7 "):
        form.find_step(tmp_path, 7)
    assert str(form) == "Composite([StandardNameFormat('step_1234'), StandardNameFormat('1234')])"
    with pytest.raises(ValueError, match=r"'1234'\) must be present in .*'step_1234'"):
        steps.composite_name_format(old, [new])
    with pytest.raises(TypeError, match="'step' has not"):
        steps.composite_name_format(new, [new, "step"])  # type: ignore[list-item]


class ByLetter:
    """A name format of a user's own: a is step 0, b is step 1."""

    def build_name(self, step: int) -> str:
        return "abc"[step]

    def find_all(self, base_path: Any) -> Iterator[Any]:
        for name in os.listdir(base_path):
            if name in "abc":
                yield ocp.training.CheckpointMetadata(
                    "abc".index(name), Path(base_path) / name, metadata=None
                )

    def find_step(self, base_path: Any, step: int) -> Any:
        for one in self.find_all(base_path):
            if one.step == step:
                return one
        raise ValueError(f"no {self.build_name(step)}")


def test_a_composite_takes_formats_of_any_class(tmp_path: Path) -> None:
    """A class with the three methods is a name format, alone and among others."""
    form = steps.composite_name_format(standard(), [ByLetter(), standard()])
    made(tmp_path, "b", "c", "0", "1")
    assert found(form, tmp_path) == {0: "0", 1: "b", 2: "c"}
    assert form.find_step(tmp_path, 0).path.name == "0"
    assert form.find_step(tmp_path, 1).path.name == "b"
    assert isinstance(ByLetter(), steps.NameFormat)
    assert not isinstance("step", steps.NameFormat)


def test_a_step_tells_what_it_says_when_it_is_asked(tmp_path: Path) -> None:
    """Times, metrics and custom metadata come from the step's documents, read at first use."""
    made(tmp_path, "4/metrics")
    one = standard().find_step(tmp_path, 4)
    document = {"init_timestamp_nsecs": 10**18, "commit_timestamp_nsecs": 10**18 + 5 * 10**9}
    (tmp_path / "4" / "_CHECKPOINT_METADATA").write_text(
        json.dumps(document | {"custom_metadata": {"a": [1]}})
    )
    (tmp_path / "4" / "metrics" / "metrics").write_text('{"loss": NaN, "n": 2}')
    assert (one.step, one.path, one.metadata) == (4, tmp_path / "4", None)
    assert one.init_timestamp_nsecs == 10**18
    assert one.commit_timestamp_nsecs == 10**18 + 5 * 10**9
    assert one.init_timestamp == datetime.datetime(2001, 9, 9, 1, 46, 40, tzinfo=datetime.UTC)
    assert one.time == one.commit_timestamp == one.init_timestamp + datetime.timedelta(seconds=5)
    assert one.custom_metadata == {"a": [1]}
    assert one.metrics["n"] == 2
    (tmp_path / "4" / "_CHECKPOINT_METADATA").unlink()
    assert one.commit_timestamp_nsecs == 10**18 + 5 * 10**9


@pytest.mark.parametrize(
    "text", [None, "", "garbage", "[]", '{"commit_timestamp_nsecs": "x", "custom_metadata": 1}']
)
def test_a_step_that_says_nothing_has_the_time_of_its_directory(
    text: str | None, tmp_path: Path
) -> None:
    """Missing and damaged documents count as silence; the time is then the directory's."""
    made(tmp_path, "1")
    if text is not None:
        (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text(text)
    os.utime(tmp_path / "1", (10**9, 10**9))
    one = standard().find_step(tmp_path, 1)
    assert one.time.timestamp() == 10**9
    said = (one.init_timestamp, one.commit_timestamp, one.custom_metadata, one.metrics)
    assert said == (None, None, None, None)


def test_damaged_metrics_are_an_error(tmp_path: Path) -> None:
    """Metrics that can't be read are not taken for none: a policy might delete the best step."""
    made(tmp_path, "1/metrics")
    (tmp_path / "1" / "metrics" / "metrics").write_text("{")
    with pytest.raises(errors.InvalidLayoutError, match=r"metrics of step 1 .*metrics/metrics"):
        _ = standard().find_step(tmp_path, 1).metrics


def test_a_step_that_went_away_has_no_time(tmp_path: Path) -> None:
    """A step deleted after it was listed says so when it is asked for its time."""
    made(tmp_path, "1")
    one = standard().find_step(tmp_path, 1)
    (tmp_path / "1").rmdir()
    with pytest.raises(errors.StepNotFoundError, match=rf"step 1 is gone from {one.path}"):
        _ = one.time


def test_found_steps_compare_by_number_and_place(tmp_path: Path) -> None:
    """What two looks find is equal, and has a short repr."""
    made(tmp_path, "1", "2")
    first, again = (list(standard().find_all(tmp_path)) for _ in range(2))
    assert first == again
    assert len({*first, *again}) == 2
    assert first[0] != first[1]
    assert first[0] != 1
    assert repr(first[0]) == f"StepMetadata(1, '{tmp_path / '1'}')"


def test_our_own_checkpoints_are_steps(tmp_path: Path) -> None:
    """A checkpoint saved under a built name is found, with its times and custom metadata."""
    form = standard(step_prefix="s", step_format_fixed_length=2)
    ocp.save(tmp_path / form.build_name(7), {"a": np.arange(3)}, custom_metadata={"k": 1})
    (one,) = form.find_all(str(tmp_path))
    expected = ocp.metadata(tmp_path / "s_07")
    assert one.step == 7
    assert one.time == expected.commit_timestamp
    assert one.init_timestamp_nsecs == expected.init_timestamp_nsecs
    assert one.custom_metadata == {"k": 1}
    assert ocp.load(one.path)["a"].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------- several processes


class Service:
    """The part of jax's coordination client that is used here, for two processes in one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._values: dict[str, str] = {}
        self._patch = monkeypatch
        self._serials = [multihost._serials.copy() for _ in range(2)]
        monkeypatch.setattr(multihost, "_client", lambda: self)
        monkeypatch.setattr(multihost, "_finished", {})
        monkeypatch.setattr(multihost, "process_count", lambda: 2)

    def become(self, index: int) -> None:
        """Makes what follows happen on one process."""
        self._patch.setattr(multihost, "process_index", lambda: index)
        self._patch.setattr(multihost, "_serials", self._serials[index])

    def key_value_set(self, key: str, value: str) -> None:
        self._values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self._values.items() if key.startswith(folder)]

    def key_value_delete(self, folder: str) -> None:
        for key, _ in self.key_value_dir_get(folder):
            del self._values[key]


def test_one_process_lists_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With single_host_load_and_broadcast only process 0 looks; the other hears of the same."""
    form = standard(step_prefix="s", single_host_load_and_broadcast=True)
    both = steps.composite_name_format(form, [form, standard()])
    made(tmp_path, "s_3", "s_11")
    assert found(form, tmp_path) == {3: "s_3", 11: "s_11"}
    service = Service(monkeypatch)
    for finding in (form, both):
        service.become(0)
        expected = list(finding.find_all(tmp_path))
        made(tmp_path, "s_4")  # what the second process would see by itself
        service.become(1)
        assert list(finding.find_all(tmp_path)) == expected
        (tmp_path / "s_4").rmdir()
    service.become(0)
    list(form.find_all(tmp_path))
    assert len(service._values) == 2, "the keys of what is over are removed"


def test_a_listing_that_fails_fails_on_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: the others hear what went wrong on process 0, and don't wait for it in vain."""
    form = standard(single_host_load_and_broadcast=True)
    service = Service(monkeypatch)
    service.become(0)
    broken = before(on("entries"), lambda: 1 / 0)
    with opened_by(watched(broken)), pytest.raises(ZeroDivisionError):
        form.find_all(tmp_path)
    service.become(1)
    with pytest.raises(errors.MultihostError, match="process 0 failed: ZeroDivisionError"):
        form.find_all(tmp_path)


def test_a_process_that_does_not_come_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: the wait for process 0 is bounded, and the error names it."""
    Service(monkeypatch).become(1)
    monkeypatch.setattr(multihost, "_WAIT_SECS", 0.05)
    with pytest.raises(errors.BarrierTimeoutError, match="process 0 did not come") as caught:
        standard(single_host_load_and_broadcast=True).find_all(tmp_path)
    assert caught.value.missing == (0,)
