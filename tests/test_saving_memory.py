"""Memory options of saving: the regulator of transfers, and callbacks that order and are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import orbax_async as ocp
from orbax_async import errors
from orbax_async.handlers import saving

GIB = 1024**3


class Profiler:
    """Tells what a test wants it to, and writes down when it is started and stopped."""

    def __init__(self) -> None:
        self.peak_usage_bytes = 0
        self.total_memory_gib = 100.0
        self.surge_gib = 0.0
        self.calls: list[str] = []

    def profiler_start(self) -> None:
        """Begins to measure."""
        self.calls.append("start")

    def profiler_end(self) -> None:
        """Stops measuring."""
        self.calls.append("end")

    def get_expected_surge_gib(self) -> float:
        """Returns what is to be left free."""
        return self.surge_gib

    def get_prev_blocking_time_sec(self) -> float:
        """Returns no time."""
        return 0.0


def regulated(profiler: Any, **options: Any) -> ocp.Context:
    """Returns a context whose limit of transfers follows a profiler."""
    context = ocp.Context()
    context.memory.transfer_concurrent_bytes = 1
    context.memory.regulator_options = ocp.options.MemoryOptions.RegulatorOptions(
        profiler=profiler, **{"max_memory_limit_gib": 60, "min_memory_limit_gib": 10} | options
    )
    return context


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The limit of transfers of each save in turn."""
    found: list[int | None] = []

    class Watched(saving.SavePipeline):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.append(self.transfer_budget.statistics().limit_nbytes)

    monkeypatch.setattr(saving, "SavePipeline", Watched)
    return found


def test_the_limit_follows_measured_memory(limits: list[int | None], tmp_path: Path) -> None:
    """Each save has the limit that the last one's peak calls for, within its bounds."""
    profiler = Profiler()
    context = regulated(profiler, kp=0.5, ki=0.0, kd=0.0)
    options = context.memory.regulator_options
    assert options is not None
    assert options.regulator.current_limit_bytes == 10 * GIB
    for index, peak_gib in enumerate([60, 60, 40, 90, 120, 0, 0]):
        profiler.peak_usage_bytes = peak_gib * GIB
        with ocp.Context(context):  # contexts that inherit the options share the state
            ocp.save(tmp_path / str(index), {"w": np.ones(2)})
        assert options.regulator.current_limit_bytes == limits[-1]
    assert [limit // GIB for limit in limits] == [20, 30, 50, 45, 25, 60, 60]
    assert profiler.calls == ["start", "end"] * 7


def test_a_surge_is_left_free_and_given_back(limits: list[int | None], tmp_path: Path) -> None:
    """`expected_surge_bytes` lowers the limit of its save alone; the profiler may ask, too."""
    profiler = Profiler()
    profiler.peak_usage_bytes = 80 * GIB  # as wanted: the limit would stay
    context = regulated(profiler, min_memory_limit_gib=30, max_memory_limit_gib=80, ki=0.0, kd=0.0)
    for index, (given, asked) in enumerate(
        [(None, 0), (5 * GIB, 7), (None, 3), (float("inf"), 0), (None, 0)]
    ):
        own = ocp.Context(context)
        own.memory.expected_surge_bytes = given
        profiler.surge_gib = asked
        profiler.peak_usage_bytes = (60 if index == 0 else 80) * GIB
        with own:
            ocp.save(tmp_path / str(index), {"w": np.ones(2)})
    assert [limit // GIB for limit in limits if limit] == [38, 33, 35, 30, 38]


@pytest.mark.parametrize("peak", [-1, float("nan"), float("inf")])
def test_impossible_readings_leave_the_limit(
    peak: float, limits: list[int | None], tmp_path: Path
) -> None:
    """A profiler that measures nonsense moves nothing."""
    profiler = Profiler()
    profiler.peak_usage_bytes = peak  # type: ignore[assignment]
    with regulated(profiler):
        ocp.save(tmp_path / "c", {"w": np.ones(2)})
    assert limits == [10 * GIB]


def test_the_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured and not yet written stays under the regulator's limit."""
    pipelines = []

    class Watched(saving.SavePipeline):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            pipelines.append(self)

    monkeypatch.setattr(saving, "SavePipeline", Watched)
    profiler = Profiler()
    profiler.total_memory_gib = 0.0
    with regulated(profiler, min_memory_limit_gib=10_000 / GIB, max_memory_limit_gib=1):
        ocp.save(tmp_path / "c", {f"n{i}": np.ones(1000, np.float32) for i in range(9)})
    statistics = pipelines[0].transfer_budget.statistics()
    assert (statistics.limit_nbytes, statistics.peak_nbytes) == (10_000, 8000)


def test_a_save_that_fails_ends_its_profile(tmp_path: Path) -> None:
    """Whether it is refused at once or fails later, what was begun to be measured ends."""
    profiler = Profiler()
    (tmp_path / "taken").mkdir()
    with regulated(profiler):
        with pytest.raises(errors.DestinationExistsError):
            ocp.save(tmp_path / "taken", {"w": np.ones(2)})
        assert profiler.calls == []
        deleted = jnp.ones(2)
        deleted.delete()
        with pytest.raises(errors.StagingError):
            ocp.save(tmp_path / "c", {"w": deleted})
        context = ocp.Context(ocp.context.current())
        context.file.skip_sync_file_validations = True
        with context, pytest.raises(errors.DestinationExistsError):
            ocp.save(tmp_path / "taken", {"w": np.ones(2)})
    assert profiler.calls == ["start", "end"]


def test_what_the_profiler_raises_at_the_start_is_raised(tmp_path: Path) -> None:
    """A broken profiler stops the save before anything happens, and the next one can begin."""
    profiler = Profiler()
    profiler.profiler_start = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with regulated(profiler):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                ocp.save_async(tmp_path / "c", {"w": np.ones(2)})
        del profiler.profiler_start
        ocp.save(tmp_path / "c", {"w": np.ones(2)})
    assert profiler.calls == ["start", "end"]


def test_concurrent_saves_share_a_regulator(limits: list[int | None], tmp_path: Path) -> None:
    """One of them is measured at a time; the others keep to its limit."""
    profiler = Profiler()
    with regulated(profiler):
        responses = [ocp.save_async(tmp_path / str(index), {"w": np.ones(2)}) for index in range(5)]
        for response in responses:
            response.result()
    assert profiler.calls == ["start", "end"] * (len(profiler.calls) // 2)
    assert len(limits) == 5
    assert set(limits) <= {int(10 * GIB + 0.5 * 80 * GIB), 60 * GIB}
