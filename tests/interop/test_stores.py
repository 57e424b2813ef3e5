"""FORMAT 5.1 and 5.6: stores built in other ways, checkpoints in other places, other devices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
import hand_ocdbt
import jax
import numpy as np
import pytest
import tensorstore as ts
from alterations import WRITERS, adding, assert_reads, dropping
from equality import assert_same
from orbax.checkpoint import v1
from trees import base_state

import orbax_async as ocp
from orbax_async import errors


def rebuild(directory: Path, config: dict[str, Any], **spec: Any) -> None:
    """Copies every key into a new OCDBT database of another configuration, in place of the old."""
    store = disk.kvstore(directory)
    values = {key: store.read(key).result().value for key in store.list().result()}
    remove_database(directory)
    base = f"{directory.as_uri()}/"
    built = {"driver": "ocdbt", "base": base, "config": config} | spec
    target = ts.KvStore.open(built).result()
    for key, value in values.items():
        target[key] = value


def remove_database(directory: Path) -> None:
    """Removes the OCDBT database of a checkpointable and those of its processes."""
    (directory / "manifest.ocdbt").unlink()
    for folder in (directory / "d", *directory.glob("ocdbt.process_*")):
        shutil.rmtree(folder)


OCDBT = {
    "nothing-inline": ({"max_inline_value_bytes": 0}, {}),
    "all-inline": ({"max_inline_value_bytes": 1 << 20}, {}),
    "small-nodes": ({"max_decoded_node_bytes": 200}, {}),
    "uncompressed-nodes": ({"compression": None}, {}),
    "zstd-9-nodes": ({"compression": {"id": "zstd", "level": 9}}, {}),
    "numbered-manifest": ({"manifest_kind": "numbered"}, {}),
    "not-assumed": ({}, {"assume_config": False}),
    "small-files": ({}, {"target_data_file_size": 64}),
    "folders": (
        {},
        {"value_data_prefix": "ocdbt_data/", "btree_node_data_prefix": "ocdbt_meta/"},
    ),
    "prefixes": ({}, {"value_data_prefix": "v-", "btree_node_data_prefix": "m-"}),
}


@pytest.mark.parametrize("variant", OCDBT)
def test_ocdbt_configurations(variant: str, copy_of: Callable[[str], Path]) -> None:
    """A database of any configuration, written key by key, is read."""
    path = copy_of("orbax")
    config, spec = OCDBT[variant]
    rebuild(path / "state", config, **spec)
    assert_reads(path)


@pytest.mark.parametrize(("files", "leaves"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("writer", WRITERS)
def test_hand_encoded_database(
    writer: str, files: int, leaves: int, copy_of: Callable[[str], Path]
) -> None:
    """A manifest, nodes and aligned data files written byte by byte are a database, too."""
    path = copy_of(writer)
    store = disk.kvstore(path / "state")
    values = {key.decode(): bytes(store.read(key).result().value) for key in store.list().result()}
    remove_database(path / "state")
    hand_ocdbt.write(path / "state", values, files=files, leaves=leaves)
    assert_reads(path)


def test_merged_parts(copy_of: Callable[[str], Path]) -> None:
    """A root database that refers to others, whose own manifests are gone, is read."""
    path = copy_of("ours")
    directory = path / "state"
    store = disk.kvstore(directory)
    values = {key: store.read(key).result().value for key in store.list().result()}
    remove_database(directory)
    context = ts.Context()
    root = {"driver": "ocdbt", "base": f"{directory.as_uri()}/"}
    target = ts.KvStore.open(root, context=context).result()
    for number in range(2):
        part_spec = root | {"base": f"{directory.as_uri()}/data/part-{number}/"}
        part = ts.KvStore.open(part_spec, context=context).result()
        for key in sorted(values)[number::2]:
            part[key] = values[key]
        part.experimental_copy_range_to(target).result()
    for manifest in directory.glob("data/*/manifest.ocdbt"):
        manifest.unlink()
    assert_reads(path)


def test_process_manifests_are_not_needed(copy_of: Callable[[str], Path]) -> None:
    """After the merge the manifests of Orbax's processes are irrelevant."""
    path = copy_of("orbax")
    (path / "state" / "ocdbt.process_0" / "manifest.ocdbt").unlink()
    assert_reads(path)


# Where a checkpoint lies doesn't matter.


@pytest.mark.parametrize("writer", WRITERS)
def test_relocated(
    writer: str, copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint can be renamed, moved, linked to, and named by a relative path."""
    path = copy_of(writer)
    moved = path.with_name("renamed [1] ünïcödé")
    path.rename(moved)
    path.symlink_to(moved, target_is_directory=True)
    monkeypatch.chdir(moved.parent)
    for spelled in (moved, path, f"{path}/", moved.name, f"file://{path}"):
        assert_same(ocp.load(spelled), base_state())


# 5.6: plain files.


@pytest.mark.parametrize("writer", WRITERS)
def test_plain_files(writer: str, tmp_path: Path) -> None:
    """Arrays in directories load with more files beside them, and without the flag."""
    library = {"ours": ocp, "orbax": v1}[writer]
    context = library.Context()
    context.array.saving.use_ocdbt = False
    with context:
        library.save(tmp_path / "files", base_state())
    directory = tmp_path / "files" / "state"
    (directory / "w" / "acme").mkdir()
    (directory / "w" / "acme.json").write_text("?")
    assert_reads(tmp_path / "files")
    dropping("state/_METADATA", "use_ocdbt")(tmp_path / "files")
    assert_reads(tmp_path / "files")
    adding("state/_METADATA", use_ocdbt=True)(tmp_path / "files")
    with pytest.raises(errors.InvalidLayoutError, match=r"manifest\.ocdbt"):
        ocp.load(tmp_path / "files")


# D2: other devices than those that saved.

ON_ONE_DEVICE = """
import sys
import jax
import numpy as np
import orbax_async as ocp

assert jax.device_count() == 1
for path in sys.argv[1:]:
    expected = dict(np.load(f"{path}.npz"))
    described = ocp.metadata(path)
    try:
        described.metadata["w"].sharding
    except ValueError as error:
        assert "not here" in str(error)
    else:
        raise AssertionError("a sharding over absent devices")
    as_numpy = jax.tree.map(lambda leaf: np.ndarray, expected)
    for loaded in (ocp.load(path), ocp.load(path, described), ocp.load(path, as_numpy)):
        assert set(loaded) == set(expected)
        for name, leaf in loaded.items():
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            elif isinstance(leaf, jax.Array):
                assert leaf.devices() == set(jax.devices()), name
            assert leaf.dtype == expected[name].dtype, name
            assert np.asarray(leaf).tobytes() == expected[name].tobytes(), name
print("same")
"""


def test_saved_on_eight_devices_loaded_on_one(tmp_path: Path) -> None:
    """D2: a checkpoint of eight devices loads on one, even without an abstract tree."""
    state = {name: leaf for name, leaf in base_state().items() if hasattr(leaf, "dtype")}
    state["elsewhere"] = jax.device_put(np.arange(5), jax.devices()[5])
    state["b"] = state["b"].astype(np.float32)  # for .npz
    paths = []
    for writer, library in (("ours", ocp), ("orbax", v1)):
        library.save(tmp_path / writer, state)
        host = {n: jax.random.key_data(x) if n == "k" else x for n, x in state.items()}
        np.savez(tmp_path / writer, **{name: np.asarray(leaf) for name, leaf in host.items()})
        paths.append(str(tmp_path / writer))
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = tmp_path / "load.py"
    script.write_text(ON_ONE_DEVICE)
    done = subprocess.run(
        [sys.executable, script, *paths],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "same\n", done.stderr
