"""Several checkpointables fail as one: handlers that fail, bad input, and budgets they share."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import operations
import performers
import pytest
from performers import Boom, Counter, Patient, Trap, boom, notes

import orbax_async as ocp
from orbax_async import errors, registration
from orbax_async._engine import loop
from orbax_async._operation import Operation

json_named_config = performers.json_named_config


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """Collects the operations that begin."""
    return operations.noted(monkeypatch)


def tasks_of_the_engine() -> set[str]:
    """Returns the names of the tasks on the engine's loop, but for those that sweep."""
    engine = loop._current()
    names = {task.get_name() for task in asyncio.all_tasks(engine.loop)}
    return {name for name in names if "save" in name or "load" in name or "Task-" in name}


# Failures.

PLACES = ["save1", "save2", "load1", "load2"]


def attempt(path: Path, objects: dict[str, Any], place: str) -> None:
    """Saves or loads."""
    if place.startswith("save"):
        ocp.save_checkpointables(path, objects)
    else:
        ocp.load_checkpointables(path, objects)


@pytest.mark.parametrize("place", PLACES)
def test_one_failure_ends_all(place: str, tmp_path: Path) -> None:
    """What a handler raises comes out as it is, with the name; the others are cancelled."""
    big = {"w": np.zeros(300_000), "v": jnp.ones(1000)}
    ocp.save_checkpointables(
        tmp_path / "old", {"state": big, "trap": Counter(), "patient": Counter()}
    )
    before = sorted(tmp_path.rglob("*"))
    patient = Patient({place})
    objects: dict[str, Any] = {"patient": patient, "trap": Trap(place, boom)}
    objects["state"] = big if place.startswith("save") else None
    path = tmp_path / ("new" if place.startswith("save") else "old")
    with pytest.raises(Boom, match="as told") as caught:
        attempt(path, objects, place)
    assert caught.value.__notes__ == ["checkpointable: 'trap'"]
    assert patient.ended == [place]
    assert sorted(tmp_path.rglob("*")) == before
    assert not tasks_of_the_engine()


@pytest.mark.parametrize("place", ["save1", "save2"])
def test_a_failure_leaves_the_old_checkpoint(place: str, tmp_path: Path) -> None:
    """I4, W8: an overwrite of which one handler fails changes nothing."""
    ocp.save_checkpointables(tmp_path / "c", {"state": {"a": 1}})
    with pytest.raises(Boom):
        ocp.save_checkpointables(
            tmp_path / "c", {"state": {"a": 2}, "trap": Trap(place, boom)}, overwrite=True
        )
    assert os.listdir(tmp_path) == ["c"]
    assert ocp.load_checkpointables(tmp_path / "c") == {"state": {"a": 1}}


@pytest.mark.parametrize("place", ["save1", "save2"])
def test_all_budgets_are_returned(place: str, tmp_path: Path, begun: list[Operation]) -> None:
    """I2: after a failure no bytes stay reserved, however far the trees have come."""
    context = ocp.Context()
    context.memory.write_concurrent_bytes = 100_000
    context.memory.transfer_concurrent_bytes = 100_000
    trees = {f"tree{index}": {"w": np.zeros(50_000)} for index in range(3)}
    with context, pytest.raises(Boom):
        ocp.save_checkpointables(tmp_path / "c", trees | {"trap": Trap(place, boom)})
    (doing,) = begun
    for budget in (doing.write_budget, doing.transfer_budget, doing.read_budget):
        assert budget.statistics().reserved_nbytes == 0
        assert budget.statistics().waiting == 0
    assert not doing._running


def test_a_handler_under_way_ends_with_the_operation(
    tmp_path: Path, begun: list[Operation]
) -> None:
    """A handler that writes through another, whose second tier is never awaited, leaves no task."""

    class Never:
        """A directory that is never made."""

        path = Path("never")

        async def await_creation(self) -> Path:
            await asyncio.sleep(60)
            return self.path

    class Wrapper:
        """Saves a tree through the handler of trees."""

        async def save(self, directory: Any) -> Awaitable[None]:
            inner = await ocp.handlers.PyTreeHandler().save(Never(), {"w": np.zeros(9)})

            async def write() -> None:
                await inner

            inner.close()  # as if it were forgotten
            return write()

        async def load(self, directory: Any) -> Awaitable[None]:
            raise NotImplementedError

    async def later() -> None:
        await asyncio.sleep(0.01)
        boom()

    with pytest.raises(Boom):
        ocp.save_checkpointables(tmp_path / "c", {"w": Wrapper(), "t": Trap("save1", later)})
    assert not begun[0]._running
    assert not tasks_of_the_engine()
    assert os.listdir(tmp_path) == []


def exits() -> None:
    """Asks the interpreter to exit."""
    raise SystemExit(3)


async def cancels() -> None:
    """Ends as if it had been cancelled."""
    raise asyncio.CancelledError


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("act", "said"), [(exits, "SystemExit"), (cancels, "cancelled by its own code")]
)
def test_unusual_ends_are_errors(
    place: str, act: Callable[[], Any], said: str, tmp_path: Path
) -> None:
    """A handler that exits or cancels itself ends neither the engine nor in silence."""
    ocp.save_checkpointables(tmp_path / "c", {"trap": Counter(), "state": {"a": 1}})
    path = tmp_path / "d" if place.startswith("save") else tmp_path / "c"
    with pytest.raises(errors.HandlerError, match=said) as caught:
        attempt(path, {"trap": Trap(place, act), "state": {"a": 1}}, place)
    assert "Trap" in str(caught.value)
    assert "'trap'" in notes(caught.value)
    assert ocp.load(tmp_path / "c") == {"a": 1}
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("verb", ["save", "load"])
@pytest.mark.parametrize("is_async", [False, True])
def test_the_protocol_is_asked_for(verb: str, is_async: bool, tmp_path: Path) -> None:
    """B10.4: a verb that is no coroutine function, or returns nothing, is refused by name."""

    class Careless(Counter):
        """Lacks one of the tiers."""

    def plain(self: Any, directory: Any) -> None:
        return None

    async def single(self: Any, directory: Any) -> None:
        return None

    ocp.save_checkpointables(tmp_path / "c", {"x": Counter()})
    setattr(Careless, verb, single if is_async else plain)
    with pytest.raises(TypeError, match=rf"Careless\.{verb} must be a coroutine") as caught:
        attempt(tmp_path / ("d" if verb == "save" else "c"), {"x": Careless()}, verb)
    assert isinstance(caught.value, errors.CheckpointError)
    assert "'x'" in notes(caught.value)
    assert os.listdir(tmp_path) == ["c"]


async def test_cancelling_reaches_handlers(tmp_path: Path) -> None:
    """`cancel` ends a user's coroutine as it ends the trees, and nothing is left."""
    patient = Patient({"save2"})
    response = ocp.save_checkpointables_async(
        tmp_path / "c", {"patient": patient, "state": {"w": np.zeros(1000)}}
    )
    assert response.cancel()
    with pytest.raises(errors.OperationCancelledError):
        await response
    assert patient.ended == ["save2"]
    assert os.listdir(tmp_path) == []


async def test_a_time_limit_reaches_handlers(tmp_path: Path) -> None:
    """`timeout_secs` covers all handlers."""
    patient = Patient({"save2"})
    context = ocp.Context()
    context.asynchronous.timeout_secs = 0.05
    with context:
        response = ocp.save_checkpointables_async(tmp_path / "c", {"patient": patient})
    with pytest.raises(TimeoutError):
        await response
    assert patient.ended == ["save2"]
    assert os.listdir(tmp_path) == []


def test_tasks_that_a_handler_has_begun_are_cancelled(tmp_path: Path) -> None:
    """A second tier may be a task; it is cancelled and awaited when another handler fails."""
    ended = []

    class Tasked(Counter):
        async def save(self, directory: Any) -> Awaitable[None]:
            async def work() -> None:
                try:
                    await asyncio.sleep(60)
                finally:
                    ended.append(True)

            return asyncio.create_task(work())

    async def later() -> None:
        await asyncio.sleep(0.01)
        boom()

    with pytest.raises(Boom):
        ocp.save_checkpointables(tmp_path / "c", {"x": Tasked(), "y": Trap("save1", later)})
    with pytest.raises(Boom):
        ocp.save_checkpointables(tmp_path / "c", {"x": Tasked(), "y": Trap("save2", later)})
    assert ended == [True, True]


def test_a_forgotten_failure_names_its_checkpointable(tmp_path: Path) -> None:
    """I11: what failed in the background, and was never asked for, is told on stderr by name."""
    program = f"""
        import orbax_async as ocp

        class Failing:
            async def save(self, directory):
                async def write():
                    raise OSError("no tape")
                return write()

            async def load(self, directory): ...

        objects = {{"data": Failing(), "s": {{"a": 1}}}}
        ocp.save_checkpointables_async({str(tmp_path / "c")!r}, objects)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "FAILED: no tape (checkpointable: 'data')" in ended.stderr
    assert os.listdir(tmp_path) == []


# Bad input.


@pytest.mark.parametrize("given", [{}, [], None, "state", 5])
def test_checkpointables_must_be_a_dict(given: Any, tmp_path: Path) -> None:
    """Anything else is refused before there is a response, by both doors."""
    for verb in (ocp.save_checkpointables, ocp.save_checkpointables_async):
        with pytest.raises(ValueError, match="must be a valid dict"):
            verb(tmp_path / "c", given)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, ValueError) for name in ("metrics", "AUTO", "_CHECKPOINT_DELETION", "")],
        *[(name, ValueError) for name in ("a/b", ".", "..", "_CHECKPOINT_METADATA")],
        ("x.orbax-checkpoint-tmp", ValueError),
        (None, TypeError),
        (5, TypeError),
    ],
)
def test_names_are_checked(name: Any, kind: type[Exception], tmp_path: Path) -> None:
    """B8.13: reserved and impossible names are refused at once, for saving and loading."""
    ocp.save_checkpointables(tmp_path / "c", {"a": {"x": 1}})
    with pytest.raises(kind):
        ocp.save_checkpointables_async(tmp_path / "d", {"a": {"x": 1}, name: {"x": 1}})
    with pytest.raises(kind):
        ocp.load_checkpointables_async(tmp_path / "c", {"a": None, name: None})
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("given", [[], "state", 5, {"state"}])
def test_abstract_checkpointables_must_be_a_mapping(given: Any, tmp_path: Path) -> None:
    """Anything else is refused before there is a response."""
    with pytest.raises(ValueError, match="must be a valid mapping"):
        ocp.load_checkpointables_async(tmp_path / "c", given)


def test_an_object_that_nobody_handles(tmp_path: Path) -> None:
    """B1.38: it is refused at once, with its name, its type, and why the handlers refused it."""
    with pytest.raises(KeyError, match="'foo' of type set") as caught:
        ocp.save_checkpointables_async(tmp_path / "c", {"state": {"a": 1}, "foo": {1, 2}})
    assert isinstance(caught.value, registration.NoEntryError)
    assert "PyTreeHandler: leaf <root>" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("given", [None, {}, [], ()])
def test_nothing_is_no_checkpointable(given: Any, tmp_path: Path) -> None:
    """B9.10: what is empty is refused by name, though JSON could hold it."""
    with pytest.raises(errors.UnsupportedLeafError) as caught:
        ocp.save_checkpointables(tmp_path / "c", {"foo": given})
    assert "'foo'" in notes(caught.value)


def test_a_bad_leaf_is_named_with_its_checkpointable(tmp_path: Path) -> None:
    """I9: the key path and the name both."""
    with pytest.raises(errors.UnsupportedLeafError, match=r"\['w'\]") as caught:
        ocp.save_checkpointables(tmp_path / "c", {"state": {"w": object()}})
    assert "'state'" in notes(caught.value)


def test_a_state_that_nobody_handles_is_told_by_its_leaves(tmp_path: Path) -> None:
    """B1.40: `save` takes states, and says which leaf is none, whatever the name."""
    for name in ("state", "other"):
        with pytest.raises(errors.UnsupportedLeafError, match=r"\['x'\]"):
            ocp.save(tmp_path / "c", {"x": object()}, checkpointable_name=name)
    with pytest.raises(errors.UnsupportedLeafError):
        ocp.save(tmp_path / "c", Counter(), checkpointable_name="other")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {"b": object()}]}, r"at \['a'\]\[1\]\['b'\]"),
        ({"n": np.int32(1)}, r"at \['n'\].*int32"),
        ({(1, 2): 3}, "keys must be str"),
        (b"bytes", "bytes is not JSON"),
    ],
)
def test_json_that_is_none(
    value: Any, where: str, tmp_path: Path, json_named_config: ocp.Context
) -> None:
    """What JSON can't hold is refused before any work, with its place and its name."""
    with pytest.raises(errors.NotJsonError, match=where) as caught:
        ocp.save_checkpointables_async(tmp_path / "c", {"state": {"a": 1}, "config": value})
    assert isinstance(caught.value, TypeError)
    assert "'config'" in notes(caught.value)
    assert os.listdir(tmp_path) == []


def test_json_that_contains_itself(tmp_path: Path, json_named_config: ocp.Context) -> None:
    """A cycle is refused, not followed."""
    value: list[Any] = [1]
    value.append(value)
    with pytest.raises(errors.NotJsonError):
        ocp.save_checkpointables_async(tmp_path / "c", {"config": value})


def test_an_empty_registry(tmp_path: Path) -> None:
    """Without handlers nothing is saved, and the message says what to do."""
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry(include_global_registry=False)
    with context:
        for verb, given in ((ocp.save, {"a": 1}), (ocp.save_checkpointables, {"s": {"a": 1}})):
            with pytest.raises(registration.NoEntryError, match="register_handler"):
                verb(tmp_path / "c", given)
    with pytest.raises(TypeError, match="handler registry"):
        ocp.Context().checkpointables.registry = None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", [ocp.load_checkpointables, ocp.checkpointables_metadata])
def test_what_is_no_checkpoint(verb: Callable[[Path], Any], tmp_path: Path) -> None:
    """A missing path, a file, an empty directory and a part of a checkpoint are told apart."""
    ocp.save(tmp_path / "c", {"a": 1})
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("missing", "no such directory"),
        ("file", "a file"),
        ("empty", "none of the files"),
        ("c/state", "subdirectory"),
    ):
        with pytest.raises(errors.InvalidLayoutError, match=said):
            verb(tmp_path / name)


def test_w25_w42_the_error_does_not_depend_on_the_door(tmp_path: Path) -> None:
    """The same mismatch is the same class from `load` and `load_checkpointables`."""
    ocp.save(tmp_path / "c", {"a": np.zeros(3), "b": 1})
    for abstract, kind in (
        ({"a": np.zeros(3)}, errors.TreeMismatchError),
        ({"a": np.zeros(4), "b": 0}, errors.ShapeMismatchError),
        ({"a": object(), "b": 0}, errors.AbstractLeafError),
    ):
        for verb, given in ((ocp.load, abstract), (ocp.load_checkpointables, {"state": abstract})):
            with pytest.raises(kind) as caught:
                verb(tmp_path / "c", given)
            assert not isinstance(caught.value, KeyError)


@pytest.mark.parametrize("lost", ["data.json", "bytes"])
def test_damaged_json(lost: str, tmp_path: Path, json_named_config: ocp.Context) -> None:
    """A file that is missing or no JSON is named."""
    ocp.save_checkpointables(tmp_path / "c", {"config": {"a": 1}})
    file = tmp_path / "c" / "config" / "data.json"
    file.unlink() if lost == "data.json" else file.write_bytes(b'{"a": \xff')
    with pytest.raises(errors.InvalidLayoutError, match=r"data\.json is") as caught:
        ocp.load_checkpointables(tmp_path / "c")
    assert "'config'" in notes(caught.value)


def test_budgets_are_shared(tmp_path: Path, begun: list[Operation]) -> None:
    """I2: one limit holds for all trees of a checkpoint together, saving and loading."""
    context = ocp.Context()
    context.memory.write_concurrent_bytes = 500_000
    context.memory.transfer_concurrent_bytes = 500_000
    context.memory.read_concurrent_bytes = 500_000
    trees = {f"tree{index}": {"w": np.zeros(50_000)} for index in range(4)}
    with context:
        ocp.save_checkpointables(tmp_path / "c", trees)
        ocp.load_checkpointables(tmp_path / "c")
    saving, loading = begun
    for budget in (saving.write_budget, saving.transfer_budget, loading.read_budget):
        assert 400_000 <= budget.statistics().peak_nbytes <= 500_000
        assert budget.statistics().reserved_nbytes == 0
