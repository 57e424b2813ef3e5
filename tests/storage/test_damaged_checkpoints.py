"""Paths that hold no whole checkpoint: an error that says what is wrong there, or loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
from refusals import STATE, snapshot
from seals import unseal

import orbax_async as ocp
from orbax_async import errors

checkpoint = refusals.checkpoint
the_engine_goes_on = refusals.the_engine_goes_on


# Paths that hold no checkpoint.


def _missing(path: Path) -> str:
    shutil.rmtree(path)
    return "no such directory"


def _file(path: Path) -> str:
    shutil.rmtree(path)
    path.write_text("text")
    return "is a file"


def _empty(path: Path) -> str:
    shutil.rmtree(path)
    path.mkdir()
    return "none of the files"


def _other(path: Path) -> str:
    shutil.rmtree(path)
    (path / "src").mkdir(parents=True)
    return "'src'"


def _folder_of_checkpoints(path: Path) -> str:
    shutil.copytree(path, path.with_name("copy"))
    shutil.rmtree(path)
    path.mkdir()
    path.with_name("copy").rename(path / "7")
    return "'7'"


def _without_metadata(path: Path) -> str:
    (path / "_CHECKPOINT_METADATA").unlink()
    return "_CHECKPOINT_METADATA is missing"


def _without_tree(path: Path) -> str:
    (path / "state" / "_METADATA").unlink()
    return "_METADATA"


def _without_manifest(path: Path) -> str:
    (path / "state" / "manifest.ocdbt").unlink()
    return "manifest.ocdbt is missing"


def _with_a_broken_manifest(path: Path) -> str:
    (path / "state" / "manifest.ocdbt").write_bytes(b"garbage" * 20)
    return "damaged"


def _with_a_broken_tree(path: Path) -> str:
    (path / "state" / "_METADATA").write_text('{"tree_metadata": ')
    return "_METADATA is damaged"


def _with_another_tree(path: Path) -> str:
    (path / "state" / "_METADATA").write_text(json.dumps({"tree_metadata": {"('a',)": 5}}))
    return "_METADATA is damaged"


def _with_a_tree_that_is_a_list(path: Path) -> str:
    (path / "state" / "_METADATA").write_text("[1, 2]")
    return "_METADATA is damaged"


def _with_a_tree_inside_a_list(path: Path) -> str:
    (path / "state" / "_METADATA").write_text('{"tree_metadata": []}')
    return "_METADATA is damaged"


def _with_broken_shardings(path: Path) -> str:
    (path / "state" / "_sharding").write_text("{")
    return "_sharding is damaged"


def _with_shardings_of_another_form(path: Path) -> str:
    (path / "state" / "_sharding").write_text("[]")
    return "_sharding is damaged"


def _with_a_broken_deletion_record(path: Path) -> str:
    (path / "_CHECKPOINT_DELETION").write_text("{")
    return "_CHECKPOINT_DELETION is damaged"


UNREADABLE = [
    _missing,
    _file,
    _empty,
    _other,
    _folder_of_checkpoints,
    _without_metadata,
    _without_tree,
    _without_manifest,
    _with_a_broken_manifest,
    _with_a_broken_tree,
    _with_another_tree,
    _with_a_tree_that_is_a_list,
    _with_a_tree_inside_a_list,
    _with_broken_shardings,
    _with_shardings_of_another_form,
    _with_a_broken_deletion_record,
]


@pytest.mark.parametrize("damage", UNREADABLE)
def test_what_is_no_whole_checkpoint(damage: Callable[[Path], str], checkpoint: Path) -> None:
    """Loads and metadata say what is wrong, with the path, and change nothing."""
    problem = damage(checkpoint)
    before = snapshot(checkpoint.parent)
    for verb in (ocp.load, ocp.metadata):
        with pytest.raises(errors.InvalidLayoutError) as caught:
            verb(checkpoint)
        assert isinstance(caught.value, ValueError)
        assert problem in str(caught.value)
        assert str(checkpoint) in str(caught.value)
    assert snapshot(checkpoint.parent) == before


def test_an_unfinished_checkpoint(checkpoint: Path) -> None:
    """B8.10: a directory whose name says that it is unfinished is not loaded."""
    for suffix in (".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-1234"):
        unfinished = checkpoint.rename(checkpoint.with_name(f"x{suffix}"))
        for verb in (ocp.load, ocp.metadata):
            with pytest.raises(errors.InvalidLayoutError, match="unfinished"):
                verb(unfinished)
        unfinished.rename(checkpoint)


def test_a_part_of_a_checkpoint(checkpoint: Path) -> None:
    """The directory of a checkpointable is refused, and the error says what to load instead."""
    with pytest.raises(errors.InvalidLayoutError, match="subdirectory") as caught:
        ocp.load(checkpoint / "state")
    assert "checkpointable_name='state'" in str(caught.value)
    assert str(checkpoint) in str(caught.value)


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"custom_metadata": null}'])
def test_b8_12_a_damaged_checkpoint_document_costs_only_what_it_says(
    content: str, checkpoint: Path
) -> None:
    """Without a readable `_CHECKPOINT_METADATA` the state is loaded all the same."""
    unseal(checkpoint)
    (checkpoint / "_CHECKPOINT_METADATA").write_text(content)
    assert ocp.load(checkpoint)["step"] == 7
    found = ocp.metadata(checkpoint)
    assert found.custom_metadata == {}
    assert found.commit_timestamp_nsecs is None
    assert found.metadata["step"] == 0


def test_array_metadata_that_is_damaged(tmp_path: Path) -> None:
    """A load of what may be PRNG keys needs the record of them, and says where it is damaged."""
    for name, value in (("keys", jax.random.key(0)), ("others", jnp.zeros(3))):
        ocp.save(tmp_path / name, {"leaf": value})
        damaged = tmp_path / name / "state" / "array_metadatas" / "process_0"
        damaged.write_text('{"array_metadatas": [[]]}')
    with pytest.raises(errors.InvalidLayoutError, match=r"keys/state.*process_0 is damaged"):
        ocp.load(tmp_path / "keys")
    assert np.array_equal(ocp.load(tmp_path / "others")["leaf"], np.zeros(3))


@pytest.mark.parametrize("sharding", ["", "{}", "[]", '{"sharding_type": "Other"}'])
def test_a_sharding_that_says_nothing_costs_only_itself(sharding: str, checkpoint: Path) -> None:
    """Where the saved sharding can't be had, the array is loaded on one device."""
    unseal(checkpoint)
    (checkpoint / "state" / "_sharding").write_text(json.dumps({"dw==": sharding}))
    loaded = ocp.load(checkpoint)
    assert np.array_equal(loaded["w"], STATE["w"])
    assert loaded["w"].sharding.device_set == {jax.local_devices()[0]}


def test_missing_data_names_its_leaf(checkpoint: Path) -> None:
    """When a data file is gone the error names a leaf or the store, and the path."""
    for file in (checkpoint / "state" / "d").iterdir():
        file.unlink()
    with pytest.raises((errors.ReadError, errors.InvalidLayoutError), match=str(checkpoint)):
        ocp.load(checkpoint)


@pytest.mark.parametrize("use_zarr3", [True, False])
def test_missing_chunks_are_no_zeros(use_zarr3: bool, tmp_path: Path) -> None:
    """An array whose data is gone is a ReadError of its key path, small or large."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = use_zarr3
    state = {"small": np.arange(10), "large": np.arange(100_000.0), "good": 1}
    with context:
        ocp.save(tmp_path / "checkpoint", state)
    for name in ("small", "large"):
        folder = tmp_path / "checkpoint" / "state" / name
        data = folder / "c" if use_zarr3 else folder / "0"
        data.rename(tmp_path / "away")
        with pytest.raises(errors.ReadError, match=r"missing|not found|does not exist") as caught:
            ocp.load(tmp_path / "checkpoint")
        assert caught.value.keypath == f"['{name}']"
        (tmp_path / "away").rename(data)
    assert ocp.load(tmp_path / "checkpoint")["good"] == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"shape": [1]}', '{"shape": [4], "zarr_format": 3}']
)
def test_a_damaged_array_document_names_its_leaf(content: str, tmp_path: Path) -> None:
    """A zarr document that is damaged is a CorruptDataError of its key path."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "checkpoint", {"a": {"b": np.arange(4)}, "c": 1})
    (tmp_path / "checkpoint" / "state" / "a.b" / "zarr.json").write_text(content)
    for verb in (ocp.load, ocp.metadata):
        with pytest.raises(errors.CorruptDataError) as caught:
            verb(tmp_path / "checkpoint")
        assert caught.value.keypath == "['a']['b']"


def test_a_missing_array_document_names_its_leaf(tmp_path: Path) -> None:
    """An array that the tree names and the store lacks is a ReadError of its key path."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "checkpoint", {"a": {"b": np.arange(4)}, "c": 1})
    shutil.rmtree(tmp_path / "checkpoint" / "state" / "a.b")
    for verb in (ocp.load, ocp.metadata):
        with pytest.raises(errors.ReadError, match="missing") as caught:
            verb(tmp_path / "checkpoint")
        assert caught.value.keypath == "['a']['b']"


def test_missing_texts_name_their_leaf(checkpoint: Path) -> None:
    """Without `_strings.json` the first text is named; damage there names the file."""
    (checkpoint / "state" / "_strings.json").write_text("{")
    with pytest.raises(errors.InvalidLayoutError, match=r"_strings.json is damaged"):
        ocp.load(checkpoint)
    (checkpoint / "state" / "_strings.json").unlink()
    with pytest.raises(errors.ReadError, match="text is missing") as caught:
        ocp.load(checkpoint)
    assert caught.value.keypath == "['name']"
