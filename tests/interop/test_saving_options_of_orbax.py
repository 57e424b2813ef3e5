"""Options of saving: stock Orbax writes and reads the same under them."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import disk
import flax.core
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from equality import assert_same
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import memory_regulator

import orbax_async as ocp

LIBRARIES: dict[str, Any] = {"ours": ocp, "orbax": v1}
each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


def on(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> jax.Array:
    """Returns an array of ascending values on a mesh."""
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return jax.device_put(values, NamedSharding(mesh, spec))


def storage(library: ModuleType | Any, **options: Any) -> Any:
    """Returns the storage options of one of the libraries."""
    return library.options.ArrayOptions.Saving.StorageOptions(**options)


def save(library: Any, path: Path, state: Any, **options: Any) -> Path:
    """Saves a state under options of saving arrays; returns where its tree lies."""
    context = library.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    with context:
        library.save(path, state)
    return path / "state"


# ------------------------------------------------------------------------------------ chunks

SHAPES = [(64, 32), (6, 10, 15), (7, 5), (97,), (30, 42), ()]
SPECS = {"split": P("x", "y"), "column": P(None, "y"), "replicated": P()}
NBYTES = [8, 24, 100, 1000, 5000]


def chunked(mesh: Mesh) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns leaves by name, and the storage options that each is to have."""
    state: dict[str, Any] = {}
    wanted: dict[str, dict[str, Any]] = {}

    def add(name: str, leaf: Any, **options: Any) -> None:
        state[name], wanted[name] = leaf, options

    for nbytes in NBYTES:
        for shape in SHAPES:
            leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            add(f"n{shape}/{nbytes}", leaf, chunk_byte_size=nbytes)
            add(f"j{shape}/{nbytes}", jnp.asarray(leaf), chunk_byte_size=nbytes)
        for name, spec in SPECS.items():
            add(f"{name}/{nbytes}", on(mesh, spec, (64, 32)), chunk_byte_size=nbytes)
    add("by row", on(mesh, P("x"), (64, 6)), shard_axes=(0,))
    add("by column", on(mesh, P("x"), (16, 6)), shard_axes=(1,), chunk_byte_size=64)
    add("both", np.ones((4, 6), np.float32), shard_axes=(1, 0))
    add("cast", np.ones((16, 6), np.float32), chunk_byte_size=32, dtype=np.dtype("float16"))
    add("keys", jax.random.split(jax.random.key(0), 24), chunk_byte_size=16)
    add("default", on(mesh, P("x"), (16, 6)))
    return state, wanted


def layout(directory: Path, name: str) -> tuple[Any, ...]:
    """Returns an array's dtype, its grid of chunks and the keys of these."""
    document = disk.document(directory, name)
    keys = {key for key in disk.keys(directory) if key.startswith(f"{name}/c")}
    return document["data_type"], document["chunk_grid"], keys


def test_chunks_are_those_of_orbax(mesh8: Mesh, tmp_path: Path) -> None:
    """B5.3, B5.4: both divide every array into the same chunks, and record the same shapes."""
    state, wanted = chunked(mesh8)
    directories = {}
    for writer, library in LIBRARIES.items():
        directories[writer] = save(
            library,
            tmp_path / writer,
            state,
            scoped_storage_options_creator=lambda key, _, library=library: storage(
                library, **wanted[key[0].key]
            ),
        )
    for name in state:
        ours, theirs = (layout(directory, name) for directory in directories.values())
        assert ours == theirs, name
    records = [
        json.loads((directory / "array_metadatas" / "process_0").read_text())
        for directory in directories.values()
    ]
    assert records[0] == records[1]
    trees = [json.loads((each / "_METADATA").read_text()) for each in directories.values()]
    assert trees[0]["tree_metadata"] == trees[1]["tree_metadata"]


@each_library
def test_small_chunks_are_read(library: Any, mesh8: Mesh, tmp_path: Path) -> None:
    """B5.3: what we divide into small chunks, either library loads whole, also resharded."""
    state, wanted = chunked(mesh8)
    del state["cast"]
    save(
        ocp,
        tmp_path / "ours",
        state,
        scoped_storage_options_creator=lambda key, _: storage(ocp, **wanted[key[0].key]),
    )
    assert_same(library.load(tmp_path / "ours"), state)
    abstract = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh8, P(*("y", "x")[: leaf.ndim]))
        )
        if name.startswith(tuple(SPECS))
        else leaf
        for name, leaf in state.items()
    }
    resharded = library.load(tmp_path / "ours", abstract)
    for name, leaf in state.items():
        if name.startswith(tuple(SPECS)):
            assert_same(resharded[name], jax.device_put(leaf, abstract[name].sharding))


@each_library
@pytest.mark.parametrize("use_zarr3", [True, False])
@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_large_chunks_are_read(
    library: Any, use_zarr3: bool, use_ocdbt: bool, mesh8: Mesh, tmp_path: Path
) -> None:
    """Chunks that TensorStore writes, raw and compressed, load in either library."""
    rng = np.random.default_rng(0)
    state = {
        "raw": jax.device_put(
            rng.standard_normal((1024, 256), np.float32), NamedSharding(mesh8, P("x"))
        ),
        "zstd": np.zeros((512, 512), np.float32),
    }
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 100_000
    context.array.saving.use_zarr3 = use_zarr3
    context.array.saving.use_ocdbt = use_ocdbt
    with context:
        ocp.save(tmp_path / "ours", state)
    assert_same(library.load(tmp_path / "ours"), state)
    described = library.metadata(tmp_path / "ours").metadata["raw"].storage_metadata
    assert (described.write_shape, described.chunk_shape) == ((128, 256), (64, 256))


@pytest.mark.parametrize("size", [4096, 0])
def test_a_chunk_fits_into_a_data_file(size: int, tmp_path: Path) -> None:
    """`ocdbt_target_data_file_size` limits chunks as in Orbax; 0 is no limit, None is 2 GiB."""
    state = {"w": np.arange(4096, dtype=np.float32)}
    found = [
        layout(save(library, tmp_path / name, state, ocdbt_target_data_file_size=size), "w")
        for name, library in LIBRARIES.items()
    ]
    assert found[0] == found[1]
    assert len(found[0][2]) == (4 if size else 1)


# ------------------------------------------------------------------------------------ dtypes

CASTS: dict[str, tuple[Any, Any]] = {
    "float to bfloat16": (np.arange(5.0), ml_dtypes.bfloat16),
    "float to int": (np.array([0.7, 1.9, -1.5]), np.int32),
    "float to float8": (np.arange(5.0, dtype=np.float32), ml_dtypes.float8_e5m2),
    "float to complex": (np.arange(3.0), np.complex64),
    "bool to float": (np.array([True, False]), np.float32),
    "float to bool": (np.array([0.0, 0.5, 2.0]), np.bool_),
    "int to int4": (np.arange(8), ml_dtypes.int4),
    "float16, too large": (np.array([1e6, -1e6], np.float32), np.float16),
    "same": (np.arange(4, dtype=np.int16), np.int16),
    "int": (5, ml_dtypes.bfloat16),
    "bool": (True, np.int8),
    "float": (0.5, np.float32),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_are_those_of_orbax(name: str, tmp_path: Path) -> None:
    """B5.1: both store arrays, scalars among them, as the same dtype and with the same values."""
    leaf, dtype = CASTS[name]
    state = {"leaf": leaf, "text": "x"}
    if isinstance(leaf, np.ndarray) and leaf.dtype.name not in ("float64", "int64"):
        state["jax"] = jnp.asarray(leaf)
    for writer, library in LIBRARIES.items():
        directory = save(
            library, tmp_path / writer, state, storage_options=storage(library, dtype=dtype)
        )
        assert disk.document(directory, "leaf")["data_type"] == np.dtype(dtype).name
    loaded = v1.load(tmp_path / "orbax")
    assert_same(v1.load(tmp_path / "ours"), loaded)
    assert_same(ocp.load(tmp_path / "ours"), loaded)
    assert_same(ocp.load(tmp_path / "orbax"), loaded)


def test_scoped_options_win_field_by_field(tmp_path: Path) -> None:
    """B5.2: a field that the creator leaves at None, or a leaf it leaves out, stays general."""
    state = {"a": np.ones((4, 4), np.float32), "b": np.ones((4, 4), np.float32), "c": np.ones(4)}
    for writer, library in LIBRARIES.items():
        scoped = {"a": storage(library, dtype=np.float16), "b": storage(library, shard_axes=(0,))}
        directory = save(
            library,
            tmp_path / writer,
            state,
            storage_options=storage(library, dtype=ml_dtypes.bfloat16, chunk_byte_size=16),
            scoped_storage_options_creator=lambda key, _, scoped=scoped: scoped.get(key[0].key),
        )
        found = {name: layout(directory, name)[:2] for name in state}
        assert {
            name: (dtype, tuple(grid["configuration"]["chunk_shape"]))
            for name, (dtype, grid) in found.items()
        } == {"a": ("float16", (2, 4)), "b": ("bfloat16", (1, 4)), "c": ("bfloat16", (4,))}


# -------------------------------------------------------------------------------- rich types


class Pair(NamedTuple):
    """A named tuple."""

    left: Any
    right: Any


class Nothing(NamedTuple):
    """A named tuple without fields."""


@jax.tree_util.register_pytree_node_class
class Keyless:
    """A node without keys of its own."""

    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten(self) -> tuple[Any, None]:
        """Returns the children."""
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Keyless:
        """Makes a node."""
        return cls(*children)


RICH: dict[str, Any] = {
    "nested": {
        "p": Pair(np.ones(2), (1, [2.5, ()])),
        "n": Nothing(),
        "l": [(jnp.ones(3),), {"d": {}}],
        "none": None,
        "s": "x",
        "keyless": Keyless(1, (2,)),
    },
    "tuple": (1, 2),
    "named tuple": Pair(1, 2),
    "list": [1, (2,)],
    "leaf": np.ones(2),
    "optax": optax.adam(1e-3).init({"w": jnp.ones(2)}),
    "flax": flax.core.freeze({"a": 1, "b": {"c": (1,)}}),
}


def save_rich(library: Any, path: Path, state: Any) -> Any:
    """Saves a state with rich types; returns the context to load them."""
    context = library.Context()
    context.pytree.saving.pytree_metadata_options.support_rich_types = True
    with context:
        library.save(path, state)
    return context


def kinds(tree: Any) -> Any:
    """Returns a tree in which each container tells what it is, named tuples by their fields."""
    if isinstance(tree, tuple):
        return "tuple", getattr(tree, "_fields", None), [kinds(each) for each in tree]
    if isinstance(tree, list):
        return "list", [kinds(each) for each in tree]
    if isinstance(tree, dict):
        return "dict", {key: kinds(each) for key, each in tree.items()}
    return type(tree).__name__, str(tree)


@pytest.mark.parametrize("name", RICH)
def test_rich_types_are_recorded_and_loaded_alike(name: str, tmp_path: Path) -> None:
    """Both write the same description, and each loads the other's with the same containers."""
    state = RICH[name]
    found, loaded = [], []
    for writer, library in LIBRARIES.items():
        save_rich(library, tmp_path / writer, state)
        document = json.loads((tmp_path / writer / "state" / "_METADATA").read_text())
        found.append((json.loads(document["value_metadata_tree"]), document["tree_metadata"]))
        for reader in LIBRARIES.values():
            context = reader.Context()
            context.pytree.saving.pytree_metadata_options.support_rich_types = True
            with context:
                loaded.append(kinds(reader.load(tmp_path / writer)))
            assert_same(reader.load(tmp_path / writer), v1.load(tmp_path / "ours"))
    assert found[0] == found[1]
    assert all(each == loaded[0] for each in loaded)


# --------------------------------------------------------------------------- separate folders


def test_separate_folders_hold_what_those_of_orbax_hold(mesh8: Mesh, tmp_path: Path) -> None:
    """The same arrays lie in the same databases, and Orbax reads them through the merged one."""
    state = {
        "replicated": on(mesh8, P(), (16, 4)),
        "split": on(mesh8, P("x", "y"), (8, 4)),
        "half": on(mesh8, P("x"), (8, 4)),
        "host": np.ones(3),
    }
    found = []
    for writer, library in LIBRARIES.items():
        directory = save(
            library, tmp_path / writer, state, enable_replica_parallel_separate_folder=True
        )
        found.append(
            {
                folder.name: {key for key in disk.keys(folder) if "checksums" not in key}
                for folder in directory.glob("ocdbt*")
            }
        )
        for reader in LIBRARIES.values():
            assert_same(reader.load(tmp_path / writer), state)
    assert found[0] == found[1]
    assert len(found[0]) == 2


# -------------------------------------------------------------------------------- regulation


REGULATOR = {"max_memory_limit_gib": 80, "min_memory_limit_gib": 2, "ki": 0.02}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ki", 0.01), ("kp", 0.7), ("kd", 0.3), ("target_ratio", 0.6)),
        *(("max_memory_limit_gib", 60), ("min_memory_limit_gib", 5)),
    ],
)
def test_each_parameter_of_the_regulator_acts_as_in_orbax(name: str, value: float) -> None:
    """Over many saves, with surges and with nonsense in between, both limits are the same."""
    usual = limits_of_regulators(**REGULATOR)
    assert usual[0] == pytest.approx(usual[1], rel=1e-9)
    assert len(set(usual[0])) > 50
    changed = limits_of_regulators(**REGULATOR | {name: value})
    assert changed[0] == pytest.approx(changed[1], rel=1e-9)
    assert changed[0] != usual[0]


def limits_of_regulators(**parameters: Any) -> list[list[int]]:
    """The limits that our regulator and Orbax's set for a row of saves."""
    rng = np.random.default_rng(0)
    readings = [
        (int(rng.uniform(0, 150)) << 30, float(rng.choice([0, 0, 0, 5, 40, np.inf])))
        for _ in range(300)
    ]
    readings[50] = (-1, 0.0)
    readings[51] = (1 << 30, float("nan"))

    class Profiler(memory_regulator.MemoryProfiler):
        """Reads what is given."""

        reading = (0, 0.0)

        def profiler_start(self) -> None:
            """Nothing."""

        def profiler_end(self) -> None:
            """Nothing."""

        peak_usage_bytes = property(lambda self: self.reading[0])
        total_memory_gib = property(lambda self: 100.0)

        def get_expected_surge_gib(self) -> float:
            """Returns what is to be left free."""
            return self.reading[1]

    limits: list[list[int]] = []
    for library in LIBRARIES.values():
        profiler = Profiler()
        options = library.options.MemoryOptions.RegulatorOptions(profiler=profiler, **parameters)
        limits.append([options.regulator.current_limit_bytes])
        for reading in readings:
            profiler.reading = reading
            if library is v1:
                options.regulator.update_limit_bytes()
            else:
                _, end = options.regulator.begin()
                end()
            limits[-1].append(options.regulator.current_limit_bytes)
    return limits


# --------------------------------------------------------------------------------- atomicity


def under(library: Any, **options: Any) -> Any:
    """Returns a context of one of the libraries with some options of atomicity."""
    context = library.Context()
    for name, value in options.items():
        setattr(context.atomicity, name, value)
    return context


@pytest.mark.parametrize("mode", ["commit_file", "atomic_rename", "auto"])
def test_either_mode_of_one_library_suits_the_other(mode: str, tmp_path: Path) -> None:
    """What one commits in a mode, the other accepts in the same mode, and in each other one."""
    state = {"w": np.arange(4)}
    for writer, library in LIBRARIES.items():
        with under(library, mode=mode):
            library.save(tmp_path / writer, state)
            library.save(tmp_path / writer, state, overwrite=True)
        for reader in LIBRARIES.values():
            for other in ("commit_file", "atomic_rename"):
                with under(reader, mode=other):
                    assert reader.is_orbax_checkpoint(tmp_path / writer)
                    assert_same(reader.load(tmp_path / writer), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(LIBRARIES)


def test_both_refuse_what_lacks_the_proof(tmp_path: Path) -> None:
    """A checkpoint without `commit_success.txt` is one in no COMMIT_FILE reader's eyes."""
    ocp.save(tmp_path / "c", {"w": np.arange(4)})
    (tmp_path / "c" / "commit_success.txt").unlink()
    for library in LIBRARIES.values():
        with under(library, mode="commit_file"):
            assert not library.is_orbax_checkpoint(tmp_path / "c")
            with pytest.raises(ValueError, match="recognize the checkpoint"):
                library.load(tmp_path / "c")
        with under(library, mode="commit_file", allow_legacy_atomic_rename=True):
            assert_same(library.load(tmp_path / "c"), {"w": np.arange(4)})


def test_what_orbax_left_in_place_can_be_overwritten(tmp_path: Path) -> None:
    """A save of Orbax that died in place leaves a directory that overwrite=True replaces."""
    with under(v1, mode="commit_file"):
        v1.save(tmp_path / "c", {"w": np.arange(3)})
    (tmp_path / "c" / "commit_success.txt").unlink()
    (tmp_path / "c" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(ocp.errors.DestinationExistsError):
        ocp.save(tmp_path / "c", {"w": np.arange(4)}, overwrite=True)
    with under(ocp, mode="commit_file"):
        ocp.save(tmp_path / "c", {"w": np.arange(4)}, overwrite=True)
    assert_same(v1.load(tmp_path / "c"), {"w": np.arange(4)})


@pytest.mark.parametrize(
    "kind, mode",
    [
        (atomicity.CommitFileTemporaryPath, "commit_file"),
        (atomicity.AtomicRenameTemporaryPath, "atomic_rename"),
    ],
)
def test_the_classes_of_orbax_stand_for_its_modes(kind: type, mode: str) -> None:
    """`temporary_path_class`, as in older versions, takes Orbax's own classes."""
    context = ocp.Context()
    with pytest.warns(DeprecationWarning, match=f"atomicity.mode = '{mode}'"):
        context.file.temporary_path_class = kind


def test_orbaxs_own_priorities_are_understood(tmp_path: Path) -> None:
    """A callback written for Orbax, with its members, orders a save of ours."""
    hints = typing.get_type_hints(v1.options.MemoryOptions)
    theirs = typing.get_args(hints["serialization_status_callback"])[0]
    priorities = typing.get_type_hints(theirs.key_priority)["return"]
    told: list[str] = []

    class Callback:
        def key_priority(self, keypath: Any) -> Any:
            """Puts `a` last."""
            late, now = priorities.ASYNCHRONOUS_DEPRIORITIZED, priorities.SYNCHRONOUS
            return late if keypath[0].key == "a" else now

        def on_transfer_end(self, keypath: Any) -> None:
            """Notes it."""
            told.append(keypath[0].key)

        on_transfer_start = on_write_start = on_write_end = lambda *_: None

    context = ocp.Context()
    context.memory.serialization_status_callback = Callback()
    with context:
        ocp.save(tmp_path / "c", {"a": jnp.ones(2), "b": jnp.ones(2)})
    assert told == ["b", "a"]
