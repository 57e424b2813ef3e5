"""Invariants without a file of their own, and surroundings that must make no difference.

I1 is in test_plan.py, I2 in test_budget.py, I3 in test_pipeline.py, I4 and I5 in test_commit.py, I4
after a crash in test_commit_neighbours.py, I6 and I11 in test_loop.py, I7 in test_context.py, I8 in
multiprocess/. What is here: I9, I10, I12.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage import zarr
from orbax_async._storage.array_store import ArrayStore

# I9 and I12: failures of a leaf.


def test_i9_a_failing_write_names_its_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong while one leaf is encoded or handed over is told with its key path."""
    original = ArrayStore.put_chunk

    def put_chunk(self: ArrayStore, transaction: Any, name: str, *args: Any) -> Any:
        if name == "b.1":
            raise RuntimeError("broken")
        return original(self, transaction, name, *args)

    monkeypatch.setattr(ArrayStore, "put_chunk", put_chunk)
    with pytest.raises(errors.WriteError, match="broken") as caught:
        ocp.save(tmp_path / "checkpoint", {"a": 1, "b": [np.zeros(9), np.zeros(99_999)]})
    assert caught.value.keypath == "['b'][1]"
    assert os.listdir(tmp_path) == []


def test_i9_a_failing_read_names_its_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong while one leaf is decoded is told with its key path."""
    ocp.save(tmp_path / "checkpoint", {"a": 1, "b": [np.zeros(9), np.ones(8)]})
    original = zarr.decode_whole

    def decode_whole(layout: zarr.WholeLayout, data: bytes) -> Any:
        if layout.shape == (8,):
            raise RuntimeError("broken")
        return original(layout, data)

    monkeypatch.setattr(zarr, "decode_whole", decode_whole)
    with pytest.raises(errors.ReadError, match="broken") as caught:
        ocp.load(tmp_path / "checkpoint")
    assert caught.value.keypath == "['b'][1]"


def test_i12_a_flipped_bit_is_told_with_its_leaf(tmp_path: Path) -> None:
    """Of two leaves the damaged one is named; the other one can still be loaded."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "checkpoint", {"a": np.arange(100), "b": np.arange(200)})
    file = tmp_path / "checkpoint" / "state" / "b" / "c" / "0"
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)
    with pytest.raises(errors.CorruptDataError, match="damaged") as caught:
        ocp.load(tmp_path / "checkpoint")
    assert caught.value.keypath == "['b']"
    loaded = ocp.load(tmp_path / "checkpoint", {"a": np.ndarray, "b": ...})
    assert loaded["a"].tolist() == list(range(100))


# I10: Orbax reads what we write, and we read what Orbax wrote. The whole matrix is in interop/.


@pytest.mark.leaves_threads
def test_i10_both_libraries_read_both_checkpoints(tmp_path: Path) -> None:
    """One tree, saved by each library and loaded by each."""
    state = {"a": jnp.arange(6.0).reshape(2, 3), "b": [np.arange(3), 1.5], "c": "text", "d": None}
    ocp.save(tmp_path / "ours", state)
    v1.save(tmp_path / "theirs", state)
    for name in ("ours", "theirs"):
        for library in (ocp, v1):
            loaded = library.load(tmp_path / name)
            assert np.array_equal(loaded["a"], state["a"])
            assert loaded["b"][0].tolist() == [0, 1, 2]
            assert (loaded["b"][1], loaded["c"], loaded["d"]) == (1.5, "text", None)


# D8: paths.


@pytest.mark.parametrize("make", [str, pathlib.Path, epath.Path, os.path.relpath, "~", "file://"])
def test_d8_every_kind_of_path(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves, loads, metadata and questions take the same place in any spelling."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "runs" / "7 \u00fc"
    if make == "~":
        spelled: Any = "~/runs/7 \u00fc"
    elif make == "file://":
        spelled = f"file://{place}"
    else:
        spelled = make(place)
    ocp.save(spelled, {"a": 1, "w": np.arange(3)})
    assert place.is_dir()
    assert ocp.is_orbax_checkpoint(spelled)
    assert ocp.load(spelled)["a"] == 1
    assert ocp.load_async(spelled).result()["w"].tolist() == [0, 1, 2]
    assert ocp.metadata(spelled).metadata["a"] == 0
    ocp.save(spelled, {"a": 2}, overwrite=True)
    assert ocp.load(place) == {"a": 2}
    assert os.listdir(tmp_path / "runs") == ["7 \u00fc"]


def test_d8_a_relative_path_is_that_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the working directory during a save does not move the checkpoint."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    response = ocp.save_async("checkpoint", {"w": np.arange(100_000)})
    monkeypatch.chdir(tmp_path / "two")
    response.result()
    assert os.listdir(tmp_path / "one") == ["checkpoint"]
    assert os.listdir(tmp_path / "two") == []


# D9: what else may be set in jax.


@contextlib.contextmanager
def configured(**options: Any) -> Iterator[None]:
    """Sets options of jax for every thread."""
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


SURROUNDINGS: dict[str, Any] = {
    "transfer guard": {"jax_transfer_guard": "disallow"},
    "rank promotion": {"jax_numpy_rank_promotion": "raise"},
    "x64": {"jax_enable_x64": True},
    "no x64": {"jax_enable_x64": False},
    "strict dtypes": {"jax_numpy_dtype_promotion": "strict"},
    "nans": {"jax_debug_nans": True},
    "leaks": {"jax_check_tracer_leaks": True},
}


def sample(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns a state with every kind of array."""
    spread = NamedSharding(mesh, PartitionSpec("x", "y"))
    return {
        "spread": jax.device_put(np.arange(64.0, dtype=np.float32).reshape(8, 8), spread),
        "single": jax.device_put(np.arange(5, dtype=np.int32), jax.devices()[2]),
        "weak": jnp.asarray(2.5),
        "key": jax.random.key(7),
        "nan": jax.device_put(np.array([np.nan, 1], np.float32)),
        "host": np.arange(7.0),
        "step": 3,
        "name": "run",
    }


def check(loaded: Any, state: dict[str, Any]) -> None:
    """Compares a loaded state with the one that was saved."""
    with jax.transfer_guard("allow"):
        assert np.array_equal(np.asarray(loaded["spread"]), np.asarray(state["spread"]))
        assert loaded["spread"].sharding == state["spread"].sharding
        assert np.array_equal(np.asarray(loaded["single"]), np.asarray(state["single"]))
        assert loaded["single"].devices() == state["single"].devices()
        assert float(loaded["weak"]) == 2.5
        assert loaded["weak"].weak_type == state["weak"].weak_type
        assert loaded["key"].dtype == state["key"].dtype
        assert np.array_equal(*(np.asarray(jax.random.key_data(x["key"])) for x in (loaded, state)))
        assert np.array_equal(np.asarray(loaded["nan"]), np.asarray(state["nan"]), equal_nan=True)
        assert np.array_equal(loaded["host"], state["host"])
    assert (loaded["step"], loaded["name"]) == (3, "run")


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_d9_options_of_jax_make_no_difference(
    name: str, tmp_path: Path, mesh8: jax.sharding.Mesh
) -> None:
    """A state is saved and loaded alike, with and without an abstract tree, whatever is set."""
    state = sample(mesh8)
    with configured(**SURROUNDINGS[name]):
        ocp.save(tmp_path / "checkpoint", state)
        check(ocp.load(tmp_path / "checkpoint"), state)
        check(ocp.load(tmp_path / "checkpoint", state), state)
        ocp.metadata(tmp_path / "checkpoint")
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("name", ["transfer guard", "x64"])
def test_d9_settings_of_the_calling_thread_make_no_difference(
    name: str, tmp_path: Path, mesh8: jax.sharding.Mesh
) -> None:
    """The same, set for the calling thread alone."""
    state = sample(mesh8)
    with jax.transfer_guard("disallow") if name == "transfer guard" else jax.enable_x64(True):
        ocp.save(tmp_path / "checkpoint", state)
        check(ocp.load(tmp_path / "checkpoint"), state)
        check(ocp.load(tmp_path / "checkpoint", state), state)


def test_d9_a_mesh_that_is_set_makes_no_difference(
    tmp_path: Path, mesh8: jax.sharding.Mesh
) -> None:
    """B3.38: a mesh of other axes that is set changes neither a save nor a load."""
    state = sample(mesh8)
    other = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("other",))
    with jax.set_mesh(other):
        ocp.save(tmp_path / "checkpoint", state)
        check(ocp.load(tmp_path / "checkpoint"), state)
        check(ocp.load(tmp_path / "checkpoint", state), state)
    check(ocp.load(tmp_path / "checkpoint"), state)


def test_d9_an_abstract_mesh_is_the_one_that_is_set(
    tmp_path: Path, mesh8: jax.sharding.Mesh
) -> None:
    """B3.35: shardings over an abstract mesh are those of the mesh that is set at the call."""
    state = sample(mesh8)
    ocp.save(tmp_path / "checkpoint", state)
    sharding = NamedSharding(mesh8.abstract_mesh, PartitionSpec("y", "x"))
    abstract = dict(state, spread=jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding))
    with jax.set_mesh(mesh8):
        response = ocp.load_async(tmp_path / "checkpoint", abstract)
    loaded = response.result()["spread"]
    assert loaded.sharding == NamedSharding(mesh8, PartitionSpec("y", "x"))
    assert np.array_equal(loaded, state["spread"])
