"""Orbax's guide to checkpointables: a checkpoint as a bundle of named objects, in both libraries.

The guide's bundle of a single tree calls it `pytree`; the released package calls it `state`, and
loads any other tree where there is none of that name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import grain
import jax
import numpy as np
import pytest
from equality import assert_same
from guide import EITHER, described, laid_out, put
from jax.sharding import PartitionSpec as P

import orbax_async as ocp


def state(step: int = 0) -> dict[str, Any]:
    """Returns a state that tells its step."""
    return put({"kernel": np.full((8, 2), step, np.float32), "step": np.asarray(step)})


def numbers() -> Any:
    """Returns a Grain iterator over batches of five."""
    return iter(grain.MapDataset.range(60).batch(5).map(lambda batch: batch.tolist()))


@pytest.fixture
def bundle(library: ModuleType, tmp_path: Path) -> Path:
    """A state and where the data stood, under names of the user's own."""
    objects = {"train_state": state(4), "position": {"index": 20, "epoch": [1, 0.5]}}
    library.save_checkpointables(tmp_path / "bundle", objects)
    return tmp_path / "bundle"


@EITHER
def test_everything(library: ModuleType, bundle: Path) -> None:
    """Loading gives a dict with the same names, each in a directory of its own."""
    loaded = library.load_checkpointables(bundle)
    assert_same(loaded, {"train_state": state(4), "position": {"index": 20, "epoch": [1, 0.5]}})
    assert {path.name for path in bundle.iterdir() if path.is_dir()} == {"train_state", "position"}


@EITHER
def test_a_single_tree_is_a_bundle_of_one(library: ModuleType, tmp_path: Path) -> None:
    """What `save` saves, `load_checkpointables` finds under its name, and the reverse."""
    library.save(tmp_path / "one", state(1))
    assert_same(library.load_checkpointables(tmp_path / "one"), {"state": state(1)})
    library.save(tmp_path / "named", state(2), checkpointable_name="weights")
    assert_same(library.load_checkpointables(tmp_path / "named"), {"weights": state(2)})
    library.save_checkpointables(tmp_path / "two", {"state": state(3), "position": {"index": 9}})
    assert_same(library.load(tmp_path / "two"), state(3))
    assert_same(library.load(tmp_path / "two", checkpointable_name="position"), {"index": 9})


@EITHER
def test_a_bundle_without_a_state(library: ModuleType, bundle: Path) -> None:
    """The guide fails here; the released package takes the first tree by name."""
    assert_same(library.load(bundle), {"index": 20, "epoch": [1, 0.5]})
    with pytest.raises(library.errors.InvalidLayoutError):
        library.load(bundle, checkpointable_name="state")


@EITHER
@pytest.mark.parametrize("name", ["train_state", "position"])
def test_one_of_them(library: ModuleType, name: str, bundle: Path) -> None:
    """None as the abstract object means: this one, as it was saved. Others are not read."""
    everything = library.load_checkpointables(bundle)
    for other in everything.keys() - {name}:
        (bundle / other / "_METADATA").write_text("damaged")
    assert_same(library.load_checkpointables(bundle, {name: None}), {name: everything[name]})


@EITHER
def test_an_abstract_object(library: ModuleType, bundle: Path) -> None:
    """The abstract object of a tree is a tree, and says how its arrays come back."""
    wanted = {
        "kernel": described(state()["kernel"], dtype=np.float16, sharding=laid_out(P("x"))),
        "step": described(state()["step"]),
    }
    loaded = library.load_checkpointables(bundle, {"train_state": wanted})
    expected = state(4)
    expected["kernel"] = jax.device_put(expected["kernel"].astype(np.float16), laid_out(P("x")))
    assert_same(loaded, {"train_state": expected})


@EITHER
def test_metadata_is_an_abstract_bundle(library: ModuleType, bundle: Path) -> None:
    """What is said of each object can be used to load it, wholly or by name."""
    found = library.checkpointables_metadata(bundle)
    assert found.metadata.keys() == {"train_state", "position"}
    assert found.metadata["train_state"]["kernel"].shape == (8, 2)
    assert found.metadata["position"] == {"index": 0, "epoch": [0, 0.0]}
    everything = library.load_checkpointables(bundle)
    assert_same(library.load_checkpointables(bundle, found), everything)
    one = {"train_state": found.metadata["train_state"]}
    assert_same(library.load_checkpointables(bundle, one), {"train_state": state(4)})


@EITHER
def test_a_part_that_was_removed_by_hand(library: ModuleType, bundle: Path) -> None:
    """The rest loads on; what is gone is a KeyError that says what there is."""
    shutil.rmtree(bundle / "position")
    assert_same(library.load_checkpointables(bundle), {"train_state": state(4)})
    with pytest.raises(KeyError, match=r"position[\s\S]*train_state"):
        library.load_checkpointables(bundle, {"position": None})


@EITHER
def test_data_goes_on_where_it_was(library: ModuleType, tmp_path: Path) -> None:
    """A Grain iterator is loaded into one just made, which then goes on from the saved place."""
    data = numbers()
    assert [next(data)[0] for _ in range(3)] == [0, 5, 10]
    library.save_checkpointables(tmp_path / "c", {"train_state": state(3), "data": data})
    for wanted in (None, {"data": None}):
        with pytest.raises(ValueError, match=r"(?i)instance|object"):
            library.load_checkpointables(tmp_path / "c", wanted)
    fresh = numbers()
    loaded = library.load_checkpointables(tmp_path / "c", {"data": fresh})
    assert loaded.keys() == {"data"}
    assert loaded["data"] is fresh
    assert next(fresh) == [15, 16, 17, 18, 19]
    both = library.load_checkpointables(
        tmp_path / "c", {"data": numbers(), "train_state": jax.tree.map(described, state())}
    )
    assert_same(both["train_state"], state(3))
    assert next(both["data"]) == next(data)


@EITHER
@pytest.mark.parametrize("names", [{"metrics": 1}, {"AUTO": 1}, {}])
def test_names_that_are_taken(library: ModuleType, names: dict[str, Any], tmp_path: Path) -> None:
    """Reserved names, and a bundle of nothing, are refused before anything is written."""
    with pytest.raises(ValueError, match=r"(?i)reserved|checkpointables"):
        library.save_checkpointables(tmp_path / "c", dict.fromkeys(names, state()))
    assert list(tmp_path.iterdir()) == []


@EITHER
def test_removing_a_part(library: ModuleType, bundle: Path) -> None:
    """What is not needed after training can be deleted, by a verb that keeps the rest whole."""
    assert library.delete(bundle, checkpointable_name="position") is True
    assert library.checkpointables_metadata(bundle).metadata.keys() == {"train_state"}
    assert_same(library.load_checkpointables(bundle), {"train_state": state(4)})


async def test_bundles_from_a_coroutine(tmp_path: Path) -> None:
    """Ours alone can await: the same bundle, from a trainer's own loop."""
    data = numbers()
    next(data)
    objects = {"train_state": state(1), "data": data}
    await ocp.save_checkpointables_async(tmp_path / "c", objects)
    fresh = numbers()
    loaded = await ocp.load_checkpointables_async(
        tmp_path / "c", {"train_state": None, "data": fresh}
    )
    assert_same(loaded["train_state"], state(1))
    assert next(fresh) == [5, 6, 7, 8, 9]
