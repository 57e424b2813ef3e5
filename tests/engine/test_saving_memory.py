"""Memory options of saving: the regulator of transfers, and callbacks that order and are told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import orbax_async as ocp
from orbax_async import errors
from orbax_async.handlers import pytree

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

    class Watched(pytree.SavePipeline):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.append(self.transfer_budget.statistics().limit_nbytes)

    monkeypatch.setattr(pytree, "SavePipeline", Watched)
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

    class Watched(pytree.SavePipeline):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            pipelines.append(self)

    monkeypatch.setattr(pytree, "SavePipeline", Watched)
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


# ----------------------------------------------------------- callbacks that order and are told

Priority = ocp.options.TransferPriority


class Callback:
    """Decides by name and writes down what it is told."""

    def __init__(self, **priorities: Priority) -> None:
        self.priorities = priorities
        self.asked: list[str] = []
        self.told: list[str] = []
        self.fails_at = ""
        self.hold: dict[str, threading.Event] = {}

    def key_priority(self, keypath: tuple[Any, ...]) -> Priority:
        """Chooses."""
        self.asked.append(keypath[0].key)
        return self.priorities.get(keypath[0].key, Priority.SYNCHRONOUS)

    def _tell(self, event: str, keypath: tuple[Any, ...]) -> None:
        name = f"{event} {keypath[0].key}"
        if name in self.hold:
            assert self.hold[name].wait(30)
        self.told.append(name)
        if name == self.fails_at:
            raise KeyError(f"mine: {name}")

    def on_transfer_start(self, keypath: tuple[Any, ...]) -> None:
        """Notes it."""
        self._tell("transfer", keypath)

    def on_transfer_end(self, keypath: tuple[Any, ...]) -> None:
        """Notes it."""
        self._tell("transferred", keypath)

    def on_write_start(self, keypath: tuple[Any, ...]) -> None:
        """Notes it."""
        self._tell("write", keypath)

    def on_write_end(self, keypath: tuple[Any, ...]) -> None:
        """Notes it."""
        self._tell("written", keypath)


def with_callback(callback: Any, **memory: Any) -> ocp.Context:
    """Returns a context whose saves ask and tell a callback."""
    context = ocp.Context()
    context.memory.serialization_status_callback = callback
    for name, value in memory.items():
        setattr(context.memory, name, value)
    return context


EVENTS = ("transfer", "transferred", "write", "written")
LATE = Priority.ASYNCHRONOUS_DEPRIORITIZED
SOON = Priority.ASYNCHRONOUS_PRIORITIZED


def test_w14_a_callback_is_told_all_of_each_leaf(mesh8: Mesh, tmp_path: Path) -> None:
    """Each jax array has four events, in order and once, however many pieces it has."""
    state = {
        "many": jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh8, P("x", "y"))),
        "replicated": jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh8, P())),
        "one": jnp.ones(3),
        "key": jax.random.key(0),
        "host": np.ones(3),
        "int": 5,
        "text": "x",
    }
    callback = Callback()
    with with_callback(callback, transfer_concurrent_bytes=64):
        ocp.save(tmp_path / "c", state)
    assert sorted(callback.asked) == ["key", "many", "one", "replicated"]
    for name in callback.asked:
        events = [told.split()[0] for told in callback.told if told.endswith(f" {name}")]
        # The first pieces may be written while the last ones are transferred.
        assert sorted(events) == sorted(EVENTS), name
        assert events[0] == "transfer", name
        assert events[-1] == "written", name
    assert len(callback.told) == 16
    jax.tree.map(np.testing.assert_array_equal, ocp.load(tmp_path / "c")["many"], state["many"])


def test_priorities_order_the_leaves(tmp_path: Path) -> None:
    """Leaves are captured in the order of their priorities, with a limit and without one."""
    state = {name: jnp.ones(4) for name in "abcdef"}
    for limit in (None, 1000):
        callback = Callback(a=LATE, b=SOON, d=LATE, e=SOON)
        context = with_callback(callback, transfer_concurrent_bytes=limit)
        context.memory.is_prioritized_key_fn = lambda key: key[0].key == "f"
        with context:
            ocp.save(tmp_path / str(limit), state)
        order = [told.split()[1] for told in callback.told if told.startswith("transfer ")]
        assert order == ["f", "c", "b", "e", "a", "d"]


def test_the_caller_does_not_wait_for_what_may_wait(tmp_path: Path) -> None:
    """With a limit, `save_async` returns before asynchronous leaves are captured."""
    callback = Callback(late=LATE)
    go_on = callback.hold["transfer late"] = threading.Event()
    state = {"now": jnp.ones(4), "late": jnp.ones(4), "host": np.ones(4)}
    checkpointables = {"state": state, "config": {"a": 1}}
    with with_callback(callback, transfer_concurrent_bytes=1000):
        response = ocp.save_checkpointables_async(tmp_path / "c", checkpointables)
    try:
        assert "transferred now" in callback.told
        assert "transferred late" not in callback.told
        state["host"][:] = 7  # what is synchronous, and what is no jax array, is captured
        with pytest.raises(TimeoutError):
            response.wait_staged(0.05)
    finally:
        go_on.set()
    response.wait_staged()
    assert "transferred late" in callback.told
    response.result()
    loaded = ocp.load(tmp_path / "c")
    assert np.array_equal(loaded["host"], np.ones(4))
    assert np.array_equal(loaded["late"], np.ones(4))


def test_without_a_limit_the_caller_waits_for_all(tmp_path: Path) -> None:
    """As in Orbax, priorities are an order alone where transfers have no limit."""
    callback = Callback(late=LATE)
    state = {"late": jnp.ones(4)}
    with with_callback(callback):
        response = ocp.save_async(tmp_path / "c", state)
    assert "transferred late" in callback.told
    state["late"].delete()
    response.result()
    assert np.array_equal(ocp.load(tmp_path / "c")["late"], np.ones(4))


def test_a_late_failure_is_the_responses(tmp_path: Path) -> None:
    """An asynchronous leaf that is gone when its turn comes fails the save, not the call."""
    callback = Callback(late=LATE)
    go_on = callback.hold["transfer late"] = threading.Event()
    state = {"late": jnp.ones(4), "now": jnp.ones(4)}
    with with_callback(callback, transfer_concurrent_bytes=1000):
        response = ocp.save_async(tmp_path / "c", state)
    state["late"].delete()
    go_on.set()
    for wait in (response.wait_staged, response.result):
        with pytest.raises(errors.StagingError, match=r"\['late'\]"):
            wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("event", EVENTS)
def test_what_a_callback_raises_fails_the_save(event: str, tmp_path: Path) -> None:
    """An exception of any of the events comes out as it is, and nothing stays on disk."""
    callback = Callback()
    callback.fails_at = f"{event} w"
    with with_callback(callback), pytest.raises(KeyError, match=f"mine: {event} w"):
        ocp.save(tmp_path / "c", {"w": jnp.ones(4), "v": jnp.ones(4)})
    assert not list(tmp_path.iterdir())


def test_unknown_priorities_are_refused_early(tmp_path: Path) -> None:
    """UNKNOWN, or what is no priority, is refused by the call with the names of all such leaves."""
    callback = Callback(a=Priority.UNKNOWN, c="soon")  # type: ignore[arg-type]
    with (
        with_callback(callback),
        pytest.raises(ValueError, match="Prioritization is unknown") as refused,
    ):
        ocp.save_async(tmp_path / "c", {name: jnp.ones(2) for name in "abc"})
    assert isinstance(refused.value, errors.UnsupportedLeafError)
    assert [refused.value.keypath, refused.value.others[0].keypath] == ["['a']", "['c']"]
    assert not list(tmp_path.iterdir())


def test_a_callback_needs_all_its_methods(tmp_path: Path) -> None:
    """One that lacks a method is refused by the call, not when the method is due."""

    class Half:
        key_priority = on_transfer_start = on_transfer_end = on_write_start = lambda *_: None

    with with_callback(Half()), pytest.raises(AttributeError, match="on_write_end"):
        ocp.save_async(tmp_path / "c", {"w": jnp.ones(2)})
    assert not list(tmp_path.iterdir())
