"""Checkpoints of Orbax's older API, v0: ours read by it, and its flat and composite ones by us."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from equality import abstract_of, as_plain, as_typed, assert_same
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1
from trees import Pair, on

import orbax_async as ocp
from orbax_async import errors


def plain_state(mesh: Mesh) -> dict[str, Any]:
    """A tree that every v0 handler can save."""
    return {
        "w": on(mesh, P("x", "y"), (8, 4)),
        "replicated": on(mesh, P(), (16, 3), "bfloat16"),
        "pair": Pair(jnp.arange(3), np.arange(5.0)),
        "list": [jnp.ones(2), {"empty": {}}, None],
        "key": jax.random.key(1),
        "step": 3,
        "rate": 0.5,
    }


def state_of(mesh: Mesh) -> dict[str, Any]:
    """The same with strings, which `StandardCheckpointer` can't save."""
    return plain_state(mesh) | {"name": "run", "a/b": {"c.d": "text"}}


# Ours, read by v0.


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("use_zarr3", [True, False])
def test_v0_reads_ours(use_ocdbt: bool, use_zarr3: bool, mesh8: Mesh, tmp_path: Path) -> None:
    """Both v0 checkpointers restore our state's directory, with and without a target."""
    state, plain = state_of(mesh8), as_plain(state_of(mesh8))
    context = ocp.Context()
    context.array.saving.use_ocdbt = use_ocdbt
    context.array.saving.use_zarr3 = use_zarr3
    with context:
        ocp.save(tmp_path / "ours", state)
    directory = tmp_path / "ours" / "state"
    with v0.StandardCheckpointer() as standard:
        assert_same(standard.restore(directory), plain)
    with v0.PyTreeCheckpointer() as pytree:
        assert_same(pytree.restore(directory), plain)
        restore_args = v0.checkpoint_utils.construct_restore_args(state)
        assert_same(pytree.restore(directory, item=state, restore_args=restore_args), state)


def test_v0_standard_restores_into_a_target(mesh8: Mesh, tmp_path: Path) -> None:
    """StandardCheckpointer restores ours into an abstract tree, containers and shardings alike."""
    state = plain_state(mesh8)
    ocp.save(tmp_path / "ours", state)
    with v0.StandardCheckpointer() as standard:
        restored = standard.restore(tmp_path / "ours" / "state", abstract_of(state))
    assert_same(restored, as_typed(state))


def test_v0_metadata_of_ours(mesh8: Mesh, tmp_path: Path) -> None:
    """StandardCheckpointer reports of ours what it reports of Orbax's own checkpoint."""
    state = state_of(mesh8)
    ocp.save(tmp_path / "ours", state)
    v1.save(tmp_path / "orbax", state)
    with v0.StandardCheckpointer() as standard:
        ours, theirs = (
            standard.metadata(tmp_path / name / "state").item_metadata.tree
            for name in ("ours", "orbax")
        )
    found, treedef = jax.tree.flatten(ours)
    expected, expected_treedef = jax.tree.flatten(theirs)
    assert treedef == expected_treedef
    for have, want in zip(found, expected, strict=True):
        assert type(have) is type(want)
        for field in ("name", "shape", "dtype", "sharding", "storage"):
            assert getattr(have, field, None) == getattr(want, field, None), have.name


def test_v0_manager_restores_ours(mesh8: Mesh, tmp_path: Path) -> None:
    """A v0 CheckpointManager lists our checkpoints as steps and restores one."""
    state = state_of(mesh8)
    for step in (3, 12):
        ocp.save(tmp_path / str(step), state | {"step": step})
    with v0.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [3, 12]
        assert manager.latest_step() == 12
        restored = manager.restore(12, args=v0.args.Composite(state=v0.args.StandardRestore()))
    assert_same(restored["state"], as_plain(state | {"step": 12}))


# v0's, read by us.


def _standard(path: Path, state: Any) -> None:
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def _pytree(*, use_ocdbt: bool, use_zarr3: bool) -> Callable[[Path, Any], None]:
    def save(path: Path, state: Any) -> None:
        with v0.PyTreeCheckpointer(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3) as checkpointer:
            checkpointer.save(path, state)

    return save


FLAT = {
    "standard": _standard,
    "pytree-ocdbt-zarr3": _pytree(use_ocdbt=True, use_zarr3=True),
    "pytree-ocdbt-zarr2": _pytree(use_ocdbt=True, use_zarr3=False),
    "pytree-files-zarr3": _pytree(use_ocdbt=False, use_zarr3=True),
    "pytree-files-zarr2": _pytree(use_ocdbt=False, use_zarr3=False),
}


@pytest.mark.parametrize("flavour", FLAT)
def test_flat_checkpoint(flavour: str, mesh8: Mesh, tmp_path: Path) -> None:
    """B16.1: a flat v0 checkpoint loads as AUTO and as None, and no other name is in it."""
    make = plain_state if flavour == "standard" else state_of
    state = make(mesh8)
    path = tmp_path / "flat"
    FLAT[flavour](path, state)
    plain, typed, abstract = as_plain(state), as_typed(state), abstract_of(state)
    assert ocp.is_orbax_checkpoint(path)
    assert_same(ocp.load(path), plain)
    assert_same(ocp.load(path, checkpointable_name=None), plain)
    assert_same(ocp.load(path, abstract), typed)
    assert_same(ocp.load(path, abstract, checkpointable_name=None), typed)
    assert_same(ocp.load(path, ocp.metadata(path, checkpointable_name=None)), plain)
    assert_same(v1.load(path), plain)
    with pytest.raises(errors.InvalidLayoutError, match="checkpointable_name=None"):
        ocp.load(path, checkpointable_name="state")


@pytest.mark.parametrize("removed", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_flat_checkpoint_without_root_documents(removed: str, mesh8: Mesh, tmp_path: Path) -> None:
    """B16.4: what older versions did not write a flat checkpoint loads without."""
    state = plain_state(mesh8)
    _standard(tmp_path / "flat", state)
    (tmp_path / "flat" / removed).unlink()
    assert_same(ocp.load(tmp_path / "flat"), as_plain(state))


@pytest.mark.parametrize("removed", ["_METADATA", "manifest.ocdbt", "d"])
def test_flat_checkpoint_without_its_data(removed: str, mesh8: Mesh, tmp_path: Path) -> None:
    """B16.4: without its tree or its database a flat checkpoint is refused."""
    path = tmp_path / "flat"
    _standard(path, plain_state(mesh8))
    target = path / removed
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises((errors.InvalidLayoutError, errors.ReadError), match="flat"):
        ocp.load(path)


def test_v0_numpy_scalars(tmp_path: Path) -> None:
    """NumPy scalars, which v0 stores and v1 doesn't, load as they do in Orbax v1."""
    state = {"f": np.float32(1.5), "i": np.int8(-3), "u": np.uint64(2**63), "d": np.float64(2.5)}
    _pytree(use_ocdbt=True, use_zarr3=False)(tmp_path / "flat", state)
    assert_same(ocp.load(tmp_path / "flat"), v1.load(tmp_path / "flat"))
    _standard(tmp_path / "standard", state)
    assert_same(ocp.load(tmp_path / "standard"), v1.load(tmp_path / "standard"))


def test_v0_array_checkpoint(mesh8: Mesh, tmp_path: Path) -> None:
    """What ArrayCheckpointHandler writes, one array, loads as in Orbax v1."""
    array = on(mesh8, P("x", "y"), (8, 4))
    with v0.Checkpointer(v0.ArrayCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "array", args=v0.args.ArraySave(array))
    assert_same(ocp.load(tmp_path / "array"), {"checkpoint": array})
    assert_same(v1.load(tmp_path / "array"), {"checkpoint": array})


def test_manager_step_with_default_item(mesh8: Mesh, tmp_path: Path) -> None:
    """A step of a v0 manager with one unnamed item loads as AUTO and as `default`."""
    state = plain_state(mesh8)
    with v0.CheckpointManager(tmp_path / "root") as manager:
        manager.save(4, args=v0.args.StandardSave(state))
    step = tmp_path / "root" / "4"
    assert_same(ocp.load(step), as_plain(state))
    assert_same(ocp.load(step, checkpointable_name="default"), as_plain(state))
    assert_same(ocp.load(step, abstract_of(state)), as_typed(state))
    for name in (None, "state"):
        with pytest.raises(errors.InvalidLayoutError, match="default"):
            ocp.load(step, checkpointable_name=name)
    with pytest.raises(errors.InvalidLayoutError, match="subdirectory"):
        ocp.load(step / "default")
    with pytest.raises(errors.InvalidLayoutError, match=r"Load one of \['4'\]"):
        ocp.load(tmp_path / "root")
    assert ocp.is_orbax_checkpoint(step)
    assert not ocp.is_orbax_checkpoint(tmp_path / "root")
    assert not ocp.is_orbax_checkpoint(step / "default")


def test_manager_step_with_several_items(mesh8: Mesh, tmp_path: Path) -> None:
    """B16.2: of a composite step AUTO takes `state`, or the first pytree by name."""
    trees = {"params": plain_state(mesh8), "opt": {"mu": on(mesh8, P("x"), (8, 2))}}
    with v0.CheckpointManager(tmp_path / "root") as manager:
        for step, extra in ((0, {}), (1, {"state": {"only": np.arange(3)}})):
            items = {n: v0.args.StandardSave(t) for n, t in (trees | extra).items()}
            manager.save(step, args=v0.args.Composite(config=v0.args.JsonSave({"a": 1}), **items))
    without, with_state = tmp_path / "root" / "0", tmp_path / "root" / "1"
    assert_same(ocp.load(without), as_plain(trees["opt"]))
    assert_same(ocp.load(with_state), {"only": np.arange(3)})
    for name, tree in trees.items():
        assert_same(ocp.load(with_state, checkpointable_name=name), as_plain(tree))
    assert_same(v1.load(without), as_plain(trees["opt"]))
    for name in ("config", "missing"):
        with pytest.raises(
            errors.InvalidLayoutError, match=r"it holds \['opt', 'params'\]"
        ) as found:
            ocp.load(without, checkpointable_name=name)
        assert isinstance(found.value.__cause__, FileNotFoundError)


def test_composite_without_one_item(mesh8: Mesh, tmp_path: Path) -> None:
    """B8.11: when one item's directory is gone the others still load, and it is named missing."""
    with v0.CheckpointManager(tmp_path / "root") as manager:
        items = {name: v0.args.StandardSave({"w": np.arange(3)}) for name in ("a", "b")}
        manager.save(0, args=v0.args.Composite(**items))
    step = tmp_path / "root" / "0"
    shutil.rmtree(step / "a")
    assert_same(ocp.load(step), {"w": np.arange(3)})
    with pytest.raises(errors.InvalidLayoutError, match=r"has no 'a'; it holds \['b'\]"):
        ocp.load(step, checkpointable_name="a")


def test_json_alone_is_no_pytree(tmp_path: Path) -> None:
    """A v0 checkpoint that holds only JSON has no state to load."""
    with v0.Checkpointer(v0.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "json", {"a": 1})
    with pytest.raises(errors.InvalidLayoutError, match="_METADATA"):
        ocp.load(tmp_path / "json")


def test_aggregate_file_is_no_pytree(tmp_path: Path) -> None:
    """The oldest format, one msgpack file, is refused as no checkpoint, as Orbax v1 refuses it."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "checkpoint").write_bytes(b"\x81\xa1a\x01")
    for library in (ocp, v1):
        with pytest.raises(ValueError, match="old"):
            library.load(tmp_path / "old")
