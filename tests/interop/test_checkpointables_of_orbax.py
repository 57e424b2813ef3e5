"""Several checkpointables in one checkpoint, written by either library and read by the other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import pytest
from equality import assert_same
from flax.training.train_state import TrainState
from google.protobuf import struct_pb2
from orbax.checkpoint import v1

import orbax_async as ocp
from orbax_async import errors

LIBRARIES = {"ours": ocp, "orbax": v1}
PAIRS = [("ours", "ours"), ("ours", "orbax"), ("orbax", "ours")]
BOTH_WAYS = pytest.mark.parametrize(("writer", "reader"), PAIRS)


@dataclasses.dataclass
class Point:
    """An object of a user's own."""

    x: int
    y: int


class AbstractPoint:
    """Asks for a point."""


class PointHandler:
    """The kind of handler that Orbax's documentation shows, used by both libraries as it is."""

    async def save(self, directory: Any, checkpointable: Point) -> Awaitable[None]:
        text = json.dumps(dataclasses.asdict(checkpointable))

        async def write() -> None:
            path = await directory.await_creation()
            (path / "point.json").write_text(text)

        return write()

    async def load(
        self, directory: Any, abstract_checkpointable: AbstractPoint | None = None
    ) -> Awaitable[Point]:
        async def read() -> Point:
            return Point(**json.loads((directory / "point.json").read_text()))

        return read()

    async def metadata(self, directory: Any) -> AbstractPoint:
        return AbstractPoint()

    def is_handleable(self, checkpointable: Any) -> bool:
        return isinstance(checkpointable, Point)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        return isinstance(abstract_checkpointable, AbstractPoint)


class OrbaxPointHandler(PointHandler, v1.handlers.CheckpointableHandler):
    """The same, and a subclass of Orbax's protocol."""


class Counter:
    """Saves and loads itself, in both libraries."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    async def save(self, directory: Any) -> Awaitable[None]:
        value = self.value

        async def write() -> None:
            path = await directory.await_creation()
            (path / "value").write_text(str(value))

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def read() -> None:
            self.value = int((directory / "value").read_text())

        return read()


def using(library: Any, handler: type = PointHandler) -> Any:
    """Returns a context of a library with a handler of points, and JSON under `config`."""
    registry = library.handlers.local_registry()
    registry.add(handler)
    registry.add(library.handlers.JsonHandler, checkpointable_name="config")
    context = library.Context()
    context.checkpointables.registry = registry
    return context


def message() -> struct_pb2.Struct:
    """Returns a protobuf message."""
    made = struct_pb2.Struct()
    made.update({"depth": 4, "name": "resnet", "nested": {"on": True}})
    return made


def objects() -> dict[str, Any]:
    """Returns one of each kind."""
    return {
        "state": {"w": jnp.arange(6.0).reshape(2, 3), "step": 3, "name": "run"},
        "extra": {"k": np.arange(4, dtype=np.int8)},
        "config": {"lr": [0.1, None, {"deep": True}], "text": "é"},
        "message": message(),
        "counter": Counter(7),
        "point": Point(1, -2),
    }


def save(library: Any, path: Path, handler: type = PointHandler, **options: Any) -> None:
    """Saves one of each kind."""
    with using(library, handler):
        library.save_checkpointables(path, objects(), **options)


@BOTH_WAYS
@pytest.mark.parametrize("asks", ["none", "typed"])
def test_round_trip(writer: str, reader: str, asks: str, tmp_path: Path) -> None:
    """Every kind comes back as it was, asked for by nothing or by what it is."""
    save(LIBRARIES[writer], tmp_path / "c")
    library, counter = LIBRARIES[reader], Counter()
    wanted: dict[str, Any] = dict.fromkeys(objects())
    wanted |= {"message": struct_pb2.Struct, "counter": counter}
    if asks == "typed":
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.ShapeDtypeStruct((2, 3), jnp.float16, sharding=sharding)
        wanted["state"] = {"w": abstract, "step": 0, "name": ""}
        wanted["point"] = AbstractPoint()
    with using(library):
        loaded = library.load_checkpointables(tmp_path / "c", wanted)
    expected = objects()
    assert loaded["config"] == expected["config"]
    assert loaded["message"] == expected["message"]
    assert loaded["point"] == expected["point"]
    assert loaded["counter"] is counter
    assert counter.value == 7
    assert_same(loaded["extra"], expected["extra"])
    if asks == "typed":
        expected["state"]["w"] = expected["state"]["w"].astype(jnp.float16)
    assert_same(loaded["state"], expected["state"])


@BOTH_WAYS
def test_names_on_disk(writer: str, reader: str, tmp_path: Path) -> None:
    """Both libraries write the same files for documents, and the same names of handlers."""
    save(LIBRARIES[writer], tmp_path / "a")
    save(LIBRARIES[reader], tmp_path / "b")
    roots = [json.loads((tmp_path / n / "_CHECKPOINT_METADATA").read_text()) for n in "ab"]
    assert roots[0]["item_handlers"] == roots[1]["item_handlers"]
    assert roots[0].keys() == roots[1].keys()
    for name in ("config", "message", "counter", "point"):
        contents = [
            {path.name: path.read_bytes() for path in (tmp_path / n / name).iterdir()} for n in "ab"
        ]
        if name == "message":  # protobuf prints maps in any order
            assert contents[0].keys() == contents[1].keys()
        else:
            assert contents[0] == contents[1], name


@BOTH_WAYS
def test_a_subset(writer: str, reader: str, tmp_path: Path) -> None:
    """What is asked for alone is loaded, without the handlers of the rest."""
    save(LIBRARIES[writer], tmp_path / "c")
    loaded = LIBRARIES[reader].load_checkpointables(tmp_path / "c", {"extra": None, "config": None})
    assert loaded.keys() == {"extra", "config"}
    assert loaded["config"] == objects()["config"]
    assert LIBRARIES[reader].load(tmp_path / "c", checkpointable_name="extra")["k"].tolist() == [
        *range(4)
    ]


@BOTH_WAYS
def test_metadata(writer: str, reader: str, tmp_path: Path) -> None:
    """Both describe the same checkpointables, and None is what can't be described."""
    save(LIBRARIES[writer], tmp_path / "c", custom_metadata={"run": 3})
    library = LIBRARIES[reader]
    with using(library):
        found = library.checkpointables_metadata(tmp_path / "c")
    assert found.custom_metadata == {"run": 3}
    assert found.metadata.keys() == objects().keys()
    assert found.metadata["state"]["w"].shape == (2, 3)
    assert isinstance(found.metadata["point"], AbstractPoint)
    assert {n for n, form in found.metadata.items() if form is None} == {
        "config",
        "message",
        "counter",
    }
    without = library.checkpointables_metadata(tmp_path / "c").metadata
    assert without["point"] is None


@pytest.mark.parametrize("handler", [PointHandler, OrbaxPointHandler])
def test_a_handler_of_orbax_works_unchanged(handler: type, tmp_path: Path) -> None:
    """One class serves both libraries, whichever protocol it names."""
    for writer in LIBRARIES:
        save(LIBRARIES[writer], tmp_path / writer, handler)
        for library in LIBRARIES.values():
            with using(library, handler):
                found = library.load_checkpointables(tmp_path / writer, {"point": AbstractPoint()})
            assert found == {"point": Point(1, -2)}


def test_handlers_of_stock_orbax_in_our_registry(tmp_path: Path) -> None:
    """Even Orbax's own classes can be registered here, and write what they write there."""
    registry = ocp.handlers.local_registry()
    registry.add(v1.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    with context:
        ocp.save_checkpointables(tmp_path / "c", {"config": {"a": 1}, "state": {"b": 2}})
        assert ocp.load_checkpointables(tmp_path / "c")["config"] == {"a": 1}
    assert ocp.load_checkpointables(tmp_path / "c", {"config": None}) == {"config": {"a": 1}}
    assert v1.load_checkpointables(tmp_path / "c", {"config": None}) == {"config": {"a": 1}}


# Real objects.


def batches() -> Any:
    """Returns a Grain iterator over shuffled batches."""
    dataset = grain.MapDataset.range(100).shuffle(seed=3).map(lambda x: x * 2).batch(4)
    return iter(dataset.to_iter_dataset())


def train_state(seed: int) -> TrainState:
    """Returns a flax state, one optax step in."""
    model = nn.Dense(3)
    params = model.init(jax.random.key(seed), jnp.ones((1, 5)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))


@BOTH_WAYS
def test_a_training_run_resumes(writer: str, reader: str, tmp_path: Path) -> None:
    """A TrainState, a Grain iterator and JSON in one checkpoint: the run goes on where it was."""
    iterator, state = batches(), train_state(0)
    for _ in range(5):
        next(iterator)
    run = {"config": {"lr": 1e-2}, "data": iterator, "state": state}
    with using(LIBRARIES[writer]):
        response = LIBRARIES[writer].save_checkpointables_async(tmp_path / "7", run)
        following = [next(iterator).tolist() for _ in range(3)]  # the iterator runs on meanwhile
        response.result()
    fresh = batches()
    library = LIBRARIES[reader]
    with using(library):
        loaded = library.load_checkpointables(
            tmp_path / "7", {"state": train_state(1), "data": fresh, "config": None}
        )
    assert loaded["data"] is fresh
    assert [next(fresh).tolist() for _ in range(3)] == following
    assert loaded["config"] == {"lr": 1e-2}
    assert isinstance(loaded["state"], TrainState)
    assert_same(jax.tree.leaves(loaded["state"]), jax.tree.leaves(state))


@BOTH_WAYS
def test_a_data_loader_resumes(writer: str, reader: str, tmp_path: Path) -> None:
    """Grain's older loader saves its place too."""
    loader = grain.DataLoader(
        data_source=np.arange(40),
        sampler=grain.samplers.IndexSampler(num_records=40, shuffle=True, seed=1),
        worker_count=0,
    )
    iterator = iter(loader)
    for _ in range(9):
        next(iterator)
    LIBRARIES[writer].save_checkpointables(tmp_path / "c", {"data": iterator})
    following = [int(next(iterator)) for _ in range(5)]
    fresh = iter(loader)
    LIBRARIES[reader].load_checkpointables(tmp_path / "c", {"data": fresh})
    assert [int(next(fresh)) for _ in range(5)] == following


# Deletion.


def record_of(path: Path) -> dict[str, Any]:
    """Returns the record of an unfinished deletion."""
    return dict(json.loads((path / "_CHECKPOINT_DELETION").read_text()))


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[str], Path]:
    """Saves a checkpoint of three trees with a library."""

    def save_three(writer: str) -> Path:
        trees = {"state": {"a": np.arange(3)}, "other": {"b": 1}, "third": {"c": "t"}}
        LIBRARIES[writer].save_checkpointables(tmp_path / writer, trees)
        return tmp_path / writer

    return save_three


def interrupt(library: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begins to delete `other`, and fails when its files should go."""

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(Exception, match="interrupted"):
            library.delete(path, checkpointable_name="other")


@BOTH_WAYS
def test_an_interrupted_deletion(
    writer: str,
    reader: str,
    pair: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B12.4: what one library has begun to delete, the other hides, guards and finishes."""
    path, library = pair("orbax"), LIBRARIES[reader]
    interrupt(LIBRARIES[writer], path, monkeypatch)
    assert record_of(path)["checkpointable_name"] == "other"
    assert library.load_checkpointables(path).keys() == {"state", "third"}
    assert library.checkpointables_metadata(path).metadata.keys() == {"state", "third"}
    with pytest.raises(library.errors.DeletionInProgressError):
        library.load_checkpointables(path, {"other": None})
    with pytest.raises(library.errors.DeletionInProgressError):
        library.save(path, {"a": 1}, overwrite=True)
    with pytest.raises(library.errors.DeletionRecoveryError):
        library.delete(path, checkpointable_name="third")
    assert library.delete(path, checkpointable_name="other") is True
    for each in LIBRARIES.values():
        assert each.load_checkpointables(path).keys() == {"state", "third"}
    assert not (path / "_CHECKPOINT_DELETION").exists()


@BOTH_WAYS
def test_deleting(writer: str, reader: str, pair: Callable[[str], Path]) -> None:
    """Either library deletes a part, and then the whole, of what the other has written."""
    path, library = pair(writer), LIBRARIES[reader]
    assert library.delete(path, checkpointable_name="third") is True
    for each in LIBRARIES.values():
        assert each.load_checkpointables(path).keys() == {"state", "other"}
    assert library.delete(path) is True
    assert not path.exists()
    assert library.delete(path, missing_ok=True) is False


def test_records_are_alike(pair: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a deletion says the same, whoever begins it."""
    records = []
    for library in LIBRARIES.values():
        path = pair("orbax")
        interrupt(library, path, monkeypatch)
        records.append(record_of(path))
        shutil.rmtree(path)
    ours, theirs = records
    assert ours.keys() == theirs.keys()
    assert len(ours["operation_id"]) == len(theirs["operation_id"])
    for document in ("original_metadata", "updated_metadata"):
        assert ours[document].keys() == theirs[document].keys()
        assert ours[document]["item_handlers"] == theirs[document]["item_handlers"]


# Older checkpoints, and Orbax's other ways to write.


def test_v0_composite_checkpoints(tmp_path: Path) -> None:
    """Trees, JSON and messages of v0 load, by the older names of their handlers."""
    with v0.Checkpointer(v0.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            tmp_path / "c",
            v0.args.Composite(
                params=v0.args.StandardSave({"w": np.arange(3)}),
                config=v0.args.JsonSave({"lr": 0.1}),
                message=v0.args.ProtoSave(message()),
            ),
        )
    wanted = {"params": None, "config": None, "message": struct_pb2.Struct}
    loaded = ocp.load_checkpointables(tmp_path / "c", wanted)
    assert loaded["params"]["w"].tolist() == [0, 1, 2]
    assert loaded["config"] == {"lr": 0.1}
    assert loaded["message"] == message()
    assert ocp.checkpointables_metadata(tmp_path / "c").metadata["config"] is None


def test_b16_1_flat_checkpoints_have_no_checkpointables(tmp_path: Path) -> None:
    """A flat checkpoint of v0 is said to be one."""
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": np.arange(3)})
    for verb in (ocp.load_checkpointables, ocp.checkpointables_metadata):
        with pytest.raises(errors.InvalidLayoutError, match="flat"):
            verb(tmp_path / "c")
    assert ocp.delete(tmp_path / "c") is True


def test_b14_8_partial_saves_are_trees(tmp_path: Path) -> None:
    """Orbax records another handler for the tree of a partial save; it loads as the tree it is."""
    v1.partial.save(tmp_path / "c", {"a": np.arange(2)})
    v1.partial.save(tmp_path / "c", {"b": np.arange(3)})
    v1.partial.finalize(tmp_path / "c")
    loaded = ocp.load_checkpointables(tmp_path / "c")
    assert loaded["state"]["b"].tolist() == [0, 1, 2]
    assert ocp.checkpointables_metadata(tmp_path / "c").metadata["state"]["a"].shape == (2,)


def test_steps_of_a_checkpointer(tmp_path: Path) -> None:
    """A step with metrics loads without them."""
    with v1.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save_checkpointables(
            3, {"state": {"a": 1}, "data": Counter(4)}, metrics={"loss": 0.5}
        )
    counter = Counter()
    loaded = ocp.load_checkpointables(tmp_path / "run" / "3", {"state": None, "data": counter})
    assert loaded["state"] == {"a": 1}
    assert counter.value == 4
    found = ocp.checkpointables_metadata(tmp_path / "run" / "3").metadata
    assert found.keys() == {"state", "data"}
