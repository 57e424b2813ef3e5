"""Orbax's introduction, its comparison of v0 and v1, and saving asynchronously: both libraries."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from types import ModuleType
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from equality import assert_same, same_sharding
from guide import EITHER, described, laid_out, older, put
from jax.sharding import PartitionSpec as P

import orbax_async as ocp


def model() -> dict[str, Any]:
    """Returns arrays of three layouts over eight devices."""
    return {
        "table": put(np.arange(48, dtype=np.float32).reshape(8, 6), P("x")),
        "scale": put(np.linspace(0, 1, 5, dtype=np.float32)),
        "count": put(np.asarray(2.25, np.float32)),
    }


def shards() -> Any:
    """Returns a Grain iterator over batches of four."""
    return iter(grain.MapDataset.range(40).batch(4).map(lambda batch: batch.tolist()))


@EITHER
@pytest.mark.parametrize("spelling", ["current", "older"])
def test_saving_and_loading(library: ModuleType, spelling: str, tmp_path: Path) -> None:
    """A tree comes back as it was saved, and its metadata says how it is laid out."""
    save, load, metadata = (
        older(library, name) if spelling == "older" else getattr(library, name)
        for name in ("save", "load", "metadata")
    )
    save(tmp_path / "first", model())
    assert_same(load(tmp_path / "first"), model())
    found = metadata(tmp_path / "first")
    for name, leaf in model().items():
        form = found.metadata[name]
        assert (form.shape, form.dtype) == (leaf.shape, leaf.dtype)
        assert same_sharding(form.sharding, leaf.sharding, leaf.ndim)
    assert found.init_timestamp < found.commit_timestamp
    assert found.custom_metadata == {}


@EITHER
@pytest.mark.parametrize("spelling", ["current", "older"])
def test_a_run_that_begins_somewhere_and_resumes(
    library: ModuleType, spelling: str, tmp_path: Path
) -> None:
    """From a source, then from the latest step of the run itself: each step is there once."""
    library.save(tmp_path / "source", {"step": 0, **model()})
    begun_at = []

    def train(stop: int) -> Any:
        with library.training.Checkpointer(tmp_path / "run") as checkpointer:
            save, load = (
                older(checkpointer, name) if spelling == "older" else getattr(checkpointer, name)
                for name in ("save", "load")
            )
            if checkpointer.latest is None:
                state, first = library.load(tmp_path / "source"), 0
            else:
                state, first = load(), checkpointer.latest.step + 1
            begun_at.append(first)
            for step in range(first, stop):
                state = jax.tree.map(lambda leaf: leaf + 1, state)
                assert save(step, state)
            return state

    train(4)
    state = train(7)
    assert begun_at == [0, 4]
    assert_same(state, {"step": 7} | jax.tree.map(lambda leaf: leaf + 7, model()))
    directories = {path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()}
    assert directories == set("0123456")


@EITHER
@pytest.mark.parametrize("spelling", ["current", "older"])
def test_saving_while_training_goes_on(library: ModuleType, spelling: str, tmp_path: Path) -> None:
    """What the trainer changes after the call is not what was saved; the result is a commit."""
    save_async = older(library, "save_async") if spelling == "older" else library.save_async
    state = {"layer": {"kernel": np.ones((6, 6), np.float32), "bias": np.zeros(6, np.float32)}}
    before = jax.tree.map(np.copy, state)
    response = save_async(tmp_path / "c", state)
    for array in jax.tree.leaves(state):
        array += 5
    heard: queue.Queue[Any] = queue.Queue()
    response.on_complete(heard.put)
    assert response.result() is None
    assert heard.get(timeout=30) is None
    assert_same(library.load(tmp_path / "c"), before)


@EITHER
@pytest.mark.parametrize("by", ["functions", "checkpointer"])
def test_several_objects_while_training_goes_on(
    library: ModuleType, by: str, tmp_path: Path
) -> None:
    """The asynchronous verbs for several objects work with and without a Checkpointer."""
    objects = {"model": model(), "notes": {"seed": 3}}
    if by == "functions":
        library.save_checkpointables_async(tmp_path / "c", objects).result()
        found = library.load_checkpointables(tmp_path / "c")
    else:
        with library.training.Checkpointer(tmp_path / "run") as checkpointer:
            assert checkpointer.save_checkpointables_async(0, objects).result() is True
            found = checkpointer.load_checkpointables(0)
    assert_same(found, objects)


async def test_loading_while_the_loop_goes_on(tmp_path: Path) -> None:
    """What Orbax documents and refuses (W1), ours alone does: both verbs, old name and new."""
    ocp.save(tmp_path / "c", model())
    assert_same(await ocp.load_async(tmp_path / "c"), model())
    assert_same(await ocp.load_checkpointables_async(tmp_path / "c"), {"state": model()})
    assert_same(await older(ocp, "load_async")(tmp_path / "c"), model())


# What is new in v1.


@EITHER
def test_state_and_data_without_ceremony(library: ModuleType, tmp_path: Path) -> None:
    """An iterator of Grain, which neither library knows, is saved beside the state."""
    data = shards()
    next(data)
    library.save_checkpointables(tmp_path / "c", {"state": model(), "data": data})
    expected, fresh = next(data), shards()
    found = library.load_checkpointables(tmp_path / "c", {"state": None, "data": fresh})
    assert_same(found["state"], model())
    assert next(found["data"]) == expected == [4, 5, 6, 7]


@EITHER
@pytest.mark.parametrize("attribute", ["pytree", "pytree_options"])
def test_part_of_a_state(library: ModuleType, attribute: str, tmp_path: Path) -> None:
    """An option instead of arguments for every leaf, under its name and the older one."""
    library.save(tmp_path / "c", model())
    wanted = {"table": described(model()["table"])}
    context = library.Context()
    getattr(context, attribute).loading.partial_load = True
    with context:
        assert_same(library.load(tmp_path / "c", wanted), {"table": model()["table"]})
    with pytest.raises(ValueError, match="scale"):
        library.load(tmp_path / "c", wanted)


@pytest.fixture
def older_run(tmp_path: Path) -> Path:
    """A run of v0: a step with two trees and JSON, and a flat checkpoint beside it."""
    tree = {"w": np.arange(4, dtype=np.int16)}
    with v0.Checkpointer(v0.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            tmp_path / "run" / "step_7",
            v0.args.Composite(
                state=v0.args.PyTreeSave(tree | {"from": "state"}),
                pytree=v0.args.PyTreeSave(tree | {"from": "pytree"}),
                notes=v0.args.JsonSave({"by": "hand"}),
            ),
        )
    with v0.PyTreeCheckpointer() as flat:
        flat.save(tmp_path / "flat", tree | {"from": "flat"})
    return tmp_path


@EITHER
@pytest.mark.parametrize(
    ("path", "name", "found"),
    [
        # The guide says that a tree called `pytree` is loaded by default. What is released looks
        # for `state` first, and takes a flat checkpoint as it is.
        ("run/step_7", "AUTO", "state"),
        ("run/step_7", "state", "state"),
        ("run/step_7", "pytree", "pytree"),
        ("run/step_7", None, None),
        ("run", "AUTO", None),
        ("run", "pytree", None),
        ("run", None, None),
        ("flat", "AUTO", "flat"),
        ("flat", None, "flat"),
        ("flat", "pytree", None),
    ],
)
def test_loading_a_tree_of_v0(
    library: ModuleType, path: str, name: str | None, found: str | None, older_run: Path
) -> None:
    """Each row of the guide's table for single trees, as the released package has it."""
    if found is None:
        with pytest.raises(library.errors.InvalidLayoutError):
            library.load(older_run / path, checkpointable_name=name)
    else:
        loaded = library.load(older_run / path, checkpointable_name=name)
        assert loaded["from"] == found
        assert loaded["w"].tolist() == [0, 1, 2, 3]


@EITHER
def test_loading_checkpointables_of_v0(library: ModuleType, older_run: Path) -> None:
    """The guide's table for several objects: all, some, and the two that are no checkpoints."""
    step = older_run / "run" / "step_7"
    assert library.load_checkpointables(step).keys() == {"state", "pytree", "notes"}
    wanted = {"state": {"from": "", "w": np.zeros(4, np.float32)}, "notes": None}
    loaded = library.load_checkpointables(step, wanted)
    assert loaded["notes"] == {"by": "hand"}
    assert_same(loaded["state"], {"from": "state", "w": np.arange(4, dtype=np.float32)})
    for path in ("run", "flat"):
        for abstract in (None, {"state": None}):
            with pytest.raises(library.errors.InvalidLayoutError):
                library.load_checkpointables(older_run / path, abstract)


@EITHER
def test_overwriting_and_describing(library: ModuleType, tmp_path: Path) -> None:
    """A destination is taken once, unless it may be overwritten; what is said of it can be read."""
    library.save(tmp_path / "c", {"v": jnp.arange(3)}, custom_metadata={"run": "a", "tags": [1]})
    with pytest.raises(ValueError, match="already exists"):
        library.save(tmp_path / "c", {"v": jnp.arange(4)})
    assert library.load(tmp_path / "c")["v"].shape == (3,)
    library.save(tmp_path / "c", {"v": jnp.arange(4)}, overwrite=True, custom_metadata={"run": "b"})
    assert library.load(tmp_path / "c")["v"].shape == (4,)
    assert library.metadata(tmp_path / "c").custom_metadata == {"run": "b"}
    assert library.is_orbax_checkpoint(tmp_path / "c")
    assert not library.is_orbax_checkpoint(tmp_path)
    names = json.loads((tmp_path / "c" / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    assert names.keys() == {"state"}
    assert library.load(tmp_path / "c", {"v": described(jnp.arange(4), sharding=laid_out(P()))})[
        "v"
    ].sharding == laid_out(P())
