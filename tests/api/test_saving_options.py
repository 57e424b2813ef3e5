"""Options of saving: each has its effect on disk, in memory or in the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from seals import unseal

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine import plan
from orbax_async._storage import array_store, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.direct import DirectReader
from orbax_async._storage.directory import Directory
from orbax_async._storage.local import LocalDirectory
from orbax_async.handlers import pytree, write_plan
from orbax_async.options import CheckpointingImpl

StorageOptions = ocp.options.ArrayOptions.Saving.StorageOptions


def with_saving(**options: Any) -> ocp.Context:
    """Returns a context with some options of saving arrays."""
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    return context


def values(path: Path) -> dict[str, bytes]:
    """Returns every value of a state's store."""
    store = ArrayStore(LocalDirectory(str(path / "state")), ocdbt=True, zarr3=True)
    keys = sorted(store.list_keys())
    return {
        key: bytes(value or b"") for key, value in zip(keys, store.read_many(keys), strict=True)
    }


def document(path: Path, name: str) -> dict[str, Any]:
    """Returns the zarr document of one array."""
    return dict(zarr.parse_document(values(path)[f"{name}/zarr.json"]).content)


# ---------------------------------------------------------------------------- storage options


def test_chunks_divide_pieces_and_respect_the_limit(rng: np.random.Generator) -> None:
    """Whatever is asked for, a chunk divides the piece, has no more than the limit, or one row."""
    for _ in range(300):
        rank = int(rng.integers(0, 4))
        piece = tuple(int(side) for side in rng.integers(1, 40, rank))
        shape = tuple(
            side * int(times) for side, times in zip(piece, rng.integers(1, 3, rank), strict=True)
        )
        axes = tuple(axis for axis in range(rank) if rng.random() < 0.2)
        count = int(rng.integers(1, 500))
        chunk = plan.chunk_shape(shape, piece, max_count=count, axes=axes)
        assert all(side % part == 0 for side, part in zip(piece, chunk, strict=True))
        assert np.prod(chunk, dtype=int) <= count
        assert all(chunk[axis] == 1 for axis in axes)
        assert plan.chunk_shape(shape, piece, max_count=None) == piece


def test_small_chunks_are_values_of_their_own(tmp_path: Path) -> None:
    """Chunks of up to 64 KiB are encoded one by one, each with its checksum (I12)."""
    array = np.arange(1024, dtype=np.float32).reshape(64, 16)
    with with_saving(storage_options=StorageOptions(chunk_byte_size=1024)):
        ocp.save(tmp_path / "c", {"w": array})
    stored = values(tmp_path / "c")
    assert document(tmp_path / "c", "w")["codecs"][1]["name"] == "gzip"
    layout = zarr.WholeLayout((16, 16), array.dtype, 1024, True)
    for row in range(4):
        chunk = zarr.decode_whole(layout, stored[f"w/c/{row}/0"])
        assert np.array_equal(chunk, array[16 * row : 16 * row + 16])
    assert np.array_equal(ocp.load(tmp_path / "c")["w"], array)


@pytest.mark.parametrize("axes", [(), (1,)])
def test_large_chunks_are_read_directly(
    axes: tuple[int, ...],
    mesh8: Mesh,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each raw chunk has the checksums that a read without TensorStore verifies (I12)."""
    array = rng.standard_normal((64, 2, 8192), np.float32)
    sharded = jax.device_put(array, NamedSharding(mesh8, P("x")))
    options = StorageOptions(chunk_byte_size=200_000, shard_axes=axes or None)
    with with_saving(storage_options=options, use_compression=False):
        ocp.save(tmp_path / "c", {"w": sharded, "n": array})
    reads = []
    read_region = DirectReader.read_region

    def counted(*args: Any) -> bool:
        reads.append(read_region(*args))
        return reads[-1]

    monkeypatch.setattr(DirectReader, "read_region", counted)
    loaded = ocp.load(tmp_path / "c")
    assert np.array_equal(loaded["w"], array)
    assert np.array_equal(loaded["n"], array)
    assert reads == [True] * 5  # four different shards, and the NumPy array


def test_a_flipped_bit_in_a_chunk_is_found(rng: np.random.Generator, tmp_path: Path) -> None:
    """I12: damage to one of several chunks of an array is an error that names the leaf."""
    array = rng.standard_normal((64, 8192), np.float32)
    with with_saving(
        storage_options=StorageOptions(chunk_byte_size=200_000), use_compression=False
    ):
        ocp.save(tmp_path / "c", {"w": array})
    sums = {zarr.checksums_key("w", (0, column)) for column in range(16)}
    assert sums < values(tmp_path / "c").keys()
    needle = array[40, :512].tobytes()  # a row of the first chunk
    for file in (tmp_path / "c" / "state" / "d").iterdir():
        data = bytearray(file.read_bytes())
        if (at := data.find(needle)) >= 0:
            data[at + 5] ^= 4
            file.write_bytes(data)
            break
    else:
        pytest.fail("the row is nowhere")
    with pytest.raises(errors.CorruptDataError, match=r"\['w'\]"):
        ocp.load(tmp_path / "c")


def test_the_cast_happens_to_what_is_written_alone(tmp_path: Path) -> None:
    """B5.1: arrays and scalars are cast on disk; what the caller holds stays as it is."""
    state = {
        "host": np.arange(4.0),
        "device": jnp.arange(4.0),
        "int": 5,
        "complex": 1j,
        "scalar": np.float32(0.5),
    }
    options = StorageOptions(dtype=jnp.bfloat16)
    creator = {"complex": StorageOptions(dtype=np.complex64)}
    with with_saving(
        storage_options=options,
        scoped_storage_options_creator=lambda key, _: creator.get(key[0].key),
    ):
        ocp.save(tmp_path / "c", state)
    names = {name: document(tmp_path / "c", name)["data_type"] for name in state}
    assert names == dict.fromkeys(state, "bfloat16") | {"complex": "complex64"}
    loaded = ocp.load(tmp_path / "c")
    assert loaded["host"].dtype == loaded["device"].dtype == loaded["scalar"].dtype == jnp.bfloat16
    assert (loaded["int"], loaded["complex"]) == (5.0, 1j)
    assert state["host"].dtype == np.float64
    as_saved = ocp.load(tmp_path / "c", state)
    assert as_saved["host"].dtype == np.float64
    assert np.array_equal(as_saved["host"], state["host"])


def test_what_is_no_number_is_not_cast(tmp_path: Path) -> None:
    """Typed PRNG keys, bytes and strings come back as they were."""
    state = {"key": jax.random.key(3), "bytes": b"abc", "text": "x"}
    with with_saving(storage_options=StorageOptions(dtype=jnp.bfloat16)):
        ocp.save(tmp_path / "c", state)
    loaded = ocp.load(tmp_path / "c")
    assert (loaded["bytes"], loaded["text"]) == (b"abc", "x")
    assert loaded["key"].dtype == state["key"].dtype
    assert np.array_equal(jax.random.key_data(loaded["key"]), jax.random.key_data(state["key"]))


def test_a_cast_to_a_narrow_type_is_remembered(tmp_path: Path) -> None:
    """A dtype that zarr lacks is stored as bytes and loaded as what was asked for, and back."""
    state = {"n": np.arange(4.0), "narrow": np.arange(4).astype(jnp.uint4), "weak": jnp.asarray(1)}
    with with_saving(storage_options=StorageOptions(dtype=jnp.uint4)):
        ocp.save(tmp_path / "narrow", state)
    with with_saving(storage_options=StorageOptions(dtype=np.float32)):
        ocp.save(tmp_path / "wide", state)
    assert {leaf.dtype.name for leaf in ocp.load(tmp_path / "narrow").values()} == {"uint4"}
    wide = ocp.load(tmp_path / "wide")
    assert {leaf.dtype.name for leaf in wide.values()} == {"float32"}
    assert np.array_equal(wide["narrow"], state["n"])
    assert not wide["weak"].weak_type


class Pair(NamedTuple):
    """A node whose keys are attributes."""

    left: Any
    right: Any


def test_the_creator_sees_the_users_own_leaves(tmp_path: Path) -> None:
    """B5.2: it is called once for each array, with jax's key path and the very leaf."""
    state = {"pair": Pair(np.ones(3), jnp.ones(3)), "list": [5, None, ()], "text": "x"}
    seen: list[tuple[str, Any]] = []

    def creator(key: tuple[Any, ...], value: Any) -> None:
        seen.append((jax.tree_util.keystr(key), value))

    with with_saving(scoped_storage_options_creator=creator):
        ocp.save(tmp_path / "c", state)
        ocp.save(tmp_path / "again", state)
    assert [path for path, _ in seen] == ["['list'][0]", "['pair'].left", "['pair'].right"] * 2
    assert seen[1][1] is state["pair"].left
    assert seen[2][1] is state["pair"].right


REFUSED: dict[str, tuple[StorageOptions, str]] = {
    "less than an element": (
        StorageOptions(chunk_byte_size=2),
        r"leaf \['w'\]: .*chunk_byte_size=2 must be >= 4",
    ),
    "no such axis": (StorageOptions(shard_axes=(7,)), r"shard_axes=\(7,\) must be .*rank=2"),
    "a lost imaginary part": (
        StorageOptions(dtype=np.float32),
        r"leaf \['z'\]: .*would drop the imaginary part of complex64",
    ),
    "no such dtype in zarr": (
        StorageOptions(dtype="datetime64[s]"),
        r"no data type for arrays of dtype datetime64\[s\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_options_are_refused_early(name: str, tmp_path: Path) -> None:
    """What can't be is refused by the call, with the leaf's name, and nothing is created."""
    options, message = REFUSED[name]
    state = {"w": jnp.ones((2, 2)), "z": jnp.ones((2, 2), jnp.complex64)}
    with with_saving(storage_options=options), pytest.raises(ValueError, match=message):
        ocp.save_async(tmp_path / "c", state)
    assert not list(tmp_path.iterdir())


def test_every_leaf_that_is_refused_is_named(tmp_path: Path) -> None:
    """One error lists all leaves for which the options can't be."""
    with (
        with_saving(storage_options=StorageOptions(chunk_byte_size=2)),
        pytest.raises(errors.UnsupportedLeafError, match="and 1 more") as refused,
    ):
        ocp.save_async(tmp_path / "c", {"a": np.ones(2), "b": np.ones(2, np.int16), "c": 1.5})
    assert [refused.value.keypath, refused.value.others[0].keypath] == ["['a']", "['c']"]


@pytest.mark.parametrize("returned", [5, {"dtype": "float32"}])
def test_a_creator_must_return_options(returned: Any, tmp_path: Path) -> None:
    """What is neither StorageOptions nor None is refused by the call."""
    with (
        with_saving(scoped_storage_options_creator=lambda *_: returned),
        pytest.raises(TypeError, match="must return StorageOptions or None"),
    ):
        ocp.save_async(tmp_path / "c", {"a": np.ones(2)})


def test_what_a_creator_raises_reaches_the_caller(tmp_path: Path) -> None:
    """B5.2: an exception of the creator leaves `save_async` unchanged."""

    def creator(key: Any, value: Any) -> None:
        raise KeyError("mine")

    with (
        with_saving(scoped_storage_options_creator=creator),
        pytest.raises(KeyError, match="mine"),
    ):
        ocp.save_async(tmp_path / "c", {"a": np.ones(2)})
    assert not list(tmp_path.iterdir())


def test_a_widening_cast_counts_against_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written, not what it was made of, is limited where that is more."""
    pipelines = []

    class Watched(pytree.SavePipeline):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            pipelines.append(self)

    monkeypatch.setattr(pytree, "SavePipeline", Watched)
    context = with_saving(storage_options=StorageOptions(dtype=np.float64))
    context.memory.write_concurrent_bytes = 9000
    with context:
        ocp.save(tmp_path / "c", {f"n{i}": np.ones(1000, np.int8) for i in range(4)})
    (pipeline,) = pipelines
    assert pipeline.write_budget.statistics().peak_nbytes == 8000


OPTIONS_IN_TURN: list[Callable[[], ocp.Context]] = [
    ocp.Context,
    lambda: with_saving(storage_options=StorageOptions(dtype=np.float16)),
    lambda: with_saving(storage_options=StorageOptions(chunk_byte_size=64)),
    lambda: with_saving(scoped_storage_options_creator=lambda *_: StorageOptions(shard_axes=(0,))),
    lambda: with_saving(ocdbt_target_data_file_size=128),
    ocp.Context,
]


def test_a_kept_plan_is_one_of_its_options(tmp_path: Path) -> None:
    """One structure saved under one set of options after another has the chunks of each."""
    state = {"w": jnp.arange(64.0).reshape(8, 8)}
    found = []
    for index, make in enumerate(OPTIONS_IN_TURN):
        with make():
            ocp.save(tmp_path / str(index), state)
        described = ocp.metadata(tmp_path / str(index)).metadata["w"]
        found.append((described.dtype.name, described.storage_metadata.chunk_shape))
        assert np.array_equal(ocp.load(tmp_path / str(index))["w"], state["w"])
    assert found == [
        ("float32", (8, 8)),
        ("float16", (8, 8)),
        ("float32", (4, 4)),
        ("float32", (1, 8)),
        ("float32", (4, 8)),
        ("float32", (8, 8)),
    ]


def test_the_plan_of_one_structure_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With storage options set, a second save of the same structure plans nothing anew."""
    made: list[int] = []
    write_batches = write_plan.write_batches

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return write_batches(*args, **kwargs)

    monkeypatch.setattr(write_plan, "write_batches", noted)
    state = {"w": jnp.arange(49.0).reshape(7, 7)}
    with with_saving(storage_options=StorageOptions(chunk_byte_size=28, dtype=np.float16)):
        for name in "abc":
            ocp.save(tmp_path / name, state)
    assert len(made) == 1
    assert write_plan._kept


# -------------------------------------------------------------------------------- rich types


class Nothing(NamedTuple):
    """A named tuple without fields."""


def with_rich_types() -> ocp.Context:
    """Returns a context that records the types of containers, and loads them."""
    context = ocp.Context()
    context.pytree.saving.pytree_metadata_options.support_rich_types = True
    return context


RICH: dict[str, Any] = {
    "nested": {"p": Pair(1, (2, [3.5, ()])), "l": [(4,), {"d": {}}], "none": None, "s": "x"},
    "a tuple": (1, 2),
    "a named tuple": Pair({"category": "custom"}, {"clazz": 1}),
    "a leaf": 5,
    "one child": [[(1,)]],
    "integer keys": {10: (1,), 9: [2]},
}


@pytest.mark.parametrize("name", RICH)
def test_rich_types_come_back(name: str, tmp_path: Path) -> None:
    """Tuples and named tuples load as such where the option is on, and else as lists and dicts."""
    state = RICH[name]
    with with_rich_types():
        ocp.save(tmp_path / "c", state)
        loaded = ocp.load(tmp_path / "c")
        described = ocp.metadata(tmp_path / "c").metadata
    wanted = state if name != "integer keys" else {str(key): node for key, node in state.items()}
    assert loaded == wanted
    assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
    assert jax.tree.structure(described) == jax.tree.structure(wanted)
    plain = ocp.load(tmp_path / "c")
    with ocp.Context():
        ocp.save(tmp_path / "plain", state)
    assert plain == ocp.load(tmp_path / "plain")
    with with_rich_types():
        assert ocp.load(tmp_path / "plain") == plain


def test_empty_named_tuples_stay_empty_tuples(tmp_path: Path) -> None:
    """One without fields loads as one of a class of ours, for its own is not recorded."""
    with with_rich_types():
        ocp.save(tmp_path / "c", {"n": Nothing(), "w": np.ones(2)})
        loaded = ocp.load(tmp_path / "c")["n"]
    assert (loaded, loaded._fields) == ((), ())
    assert ocp.load(tmp_path / "c")["n"] is None


def test_named_tuples_of_unknown_classes_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a class is gone, or has other fields now, one with the recorded fields stands in."""
    with with_rich_types():
        ocp.save(tmp_path / "c", {"p": Pair(1, 2)})
        monkeypatch.setitem(globals(), "Pair", NamedTuple("Pair", [("left", Any)]))
        loaded = [ocp.load(tmp_path / "c")["p"] for _ in range(2)]
    assert loaded[0]._asdict() == {"left": 1, "right": 2}
    assert type(loaded[0]) is type(loaded[1])
    assert type(loaded[0]).__name__.endswith("Pair_2")


def test_a_remembered_form_does_not_remember_rich_types(tmp_path: Path) -> None:
    """One structure saved with the option on, off and on again is recorded so each time."""
    found = []
    for index, context in enumerate([with_rich_types(), ocp.Context(), with_rich_types()]):
        with context:
            ocp.save(tmp_path / str(index), {"t": (jnp.ones(3), jnp.ones(2))})
        found.append(
            "value_metadata_tree" in (tmp_path / str(index) / "state/_METADATA").read_text()
        )
    assert found == [True, False, True]


@pytest.mark.parametrize(
    "damaged",
    [
        "[",
        "[5]",
        '{"a": {"category": "future", "clazz": "x"}}',
        '{"category": "custom", "clazz": "tuple"}',
        "{}",
        '{"category": "namedtuple", "module": "m", "clazz": "N", "entries": [5]}',
    ],
)
def test_damaged_rich_types_are_an_error_with_a_way_out(damaged: str, tmp_path: Path) -> None:
    """What can't be rebuilt is refused by name; without the option the tree loads."""
    with with_rich_types():
        ocp.save(tmp_path / "c", {"t": (1, 2)})
    unseal(tmp_path / "c")
    file = tmp_path / "c" / "state" / "_METADATA"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"value_metadata_tree": damaged}))
    with (
        with_rich_types(),
        pytest.raises(errors.InvalidLayoutError, match="without support_rich_types"),
    ):
        ocp.load(tmp_path / "c")
    assert ocp.load(tmp_path / "c") == {"t": [1, 2]}


# ----------------------------------------------------------------- databases that are merged


@pytest.fixture
def mixed(mesh8: Mesh) -> dict[str, Any]:
    """Leaves that all replicas write together, and leaves that one device writes."""
    array = np.arange(64, dtype=np.float32).reshape(16, 4)
    return {
        "replicated": jax.device_put(array, NamedSharding(mesh8, P())),
        "split": jax.device_put(array, NamedSharding(mesh8, P("x", "y"))),
        "odd": jax.device_put(np.arange(7), NamedSharding(mesh8, P())),
        "host": array,
        "large": jax.device_put(
            np.random.default_rng(0).standard_normal((1024, 512), np.float32),
            NamedSharding(mesh8, P("x")),
        ),
    }


def test_shared_writes_go_to_a_folder_of_their_own(mixed: dict[str, Any], tmp_path: Path) -> None:
    """What replicas write together lies in another database; all are merged into one."""
    with with_saving(enable_replica_parallel_separate_folder=True, use_compression=False):
        ocp.save(tmp_path / "c", mixed)
    state = tmp_path / "c" / "state"
    assert sorted(path.name for path in state.glob("ocdbt*")) == [
        "ocdbt.process_0",
        "ocdbt.process_replica_0",
    ]
    found = {}
    for folder in ("ocdbt.process_0", "ocdbt.process_replica_0"):
        keys = ArrayStore(LocalDirectory(str(state / folder)), ocdbt=True, zarr3=True).list_keys()
        found[folder] = {key.split("/")[0] for key in keys}
    assert found == {
        "ocdbt.process_0": {"split", "odd", "host"},
        "ocdbt.process_replica_0": {"replicated", "large"},
    }
    jax.tree.map(np.testing.assert_array_equal, ocp.load(tmp_path / "c"), mixed)


def test_separate_folders_are_left_out_where_nothing_is_shared(
    mixed: dict[str, Any], tmp_path: Path
) -> None:
    """Without replicas that share the work, or without OCDBT, there is no such folder."""
    del mixed["replicated"], mixed["large"]
    with with_saving(enable_replica_parallel_separate_folder=True):
        ocp.save(tmp_path / "c", mixed)
    with with_saving(enable_replica_parallel_separate_folder=True, use_ocdbt=False):
        ocp.save(tmp_path / "files", mixed)
    assert not list(tmp_path.glob("*/state/ocdbt*"))


def test_prioritized_leaves_stay_first_with_separate_folders(
    mixed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prioritized leaf is captured before the others, whichever database it goes to."""
    order: list[str] = []
    capture = pytree.SavePipeline._capture

    def noted(self: Any, batch: Any, *others: Any) -> Any:
        order.extend(leaf.name for leaf in batch.leaves)
        return capture(self, batch, *others)

    monkeypatch.setattr(pytree.SavePipeline, "_capture", noted)
    context = with_saving(enable_replica_parallel_separate_folder=True)
    context.memory.is_prioritized_key_fn = lambda key: key[0].key in ("replicated", "host")
    with context:
        ocp.save(tmp_path / "c", mixed)
    assert list(dict.fromkeys(order)) == ["host", "replicated", "odd", "split", "large"]


@pytest.mark.parametrize("missing", ["replicated/c/3/0", "split/zarr.json", "odd/c/0"])
def test_validation_finds_what_a_merge_has_lost(
    missing: str, mixed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`enable_post_merge_validation`: a merged database that lacks a key is never committed."""
    merge = array_store.merge_process_databases

    def lossy(directory: Directory) -> int:
        count = merge(directory)
        base = {"driver": "ocdbt", "base": directory.kvstore()}
        del ts.KvStore.open(base).result()[missing]
        return count

    monkeypatch.setattr(array_store, "merge_process_databases", lossy)
    leaf = missing.split("/")[0]
    with (
        with_saving(enable_replica_parallel_separate_folder=True),
        pytest.raises(errors.WriteError, match=rf"leaf \['{leaf}'\]: {missing} is missing"),
    ):
        ocp.save(tmp_path / "c", mixed)
    assert not list(tmp_path.iterdir())
    with with_saving(
        enable_replica_parallel_separate_folder=True, enable_post_merge_validation=False
    ):
        ocp.save(tmp_path / "c", mixed)
    with pytest.raises(errors.ReadError, match=leaf):
        ocp.load(tmp_path / "c")


# ---------------------------------------------------------------------------- deprecated names


def test_groups_as_arguments_are_deprecated(caplog: pytest.LogCaptureFixture) -> None:
    """Passing groups to `Context()` acts, and is logged once with what to write instead."""
    ocp.Context(ocp.Context(checkpoint_layout="orbax"))
    assert not caplog.messages
    context = ocp.Context(
        array_options=ocp.options.ArrayOptions(), file_options=ocp.options.FileOptions()
    )
    assert context.array == ocp.options.ArrayOptions()
    (message,) = caplog.messages
    assert "deprecated; set context.array, context.file, and" in message


# ------------------------------------------------------------------------------------ layout


def test_the_layout_is_found_out_or_asked_for(tmp_path: Path) -> None:
    """`checkpoint_layout`: AUTO saves as ORBAX does, and finds out what it loads."""
    for name in ("orbax", "auto"):
        with ocp.Context(checkpoint_layout=name):
            ocp.save(tmp_path / name, {"w": np.arange(3)})
            assert ocp.load(tmp_path / name)["w"].tolist() == [0, 1, 2]
    names = [
        sorted(each.name for each in (tmp_path / name).iterdir()) for name in ("orbax", "auto")
    ]
    assert names[0] == names[1]
    with ocp.Context(checkpoint_layout="auto"), pytest.raises(errors.InvalidLayoutError):
        ocp.load(tmp_path)


# ---------------------------------------------------------------------------------- Pathways


@pytest.mark.parametrize("impl", CheckpointingImpl)
def test_pathways_options_are_refused_elsewhere(impl: CheckpointingImpl, tmp_path: Path) -> None:
    """Off Pathways a way to checkpoint on it is refused by name, before anything is written."""
    context = ocp.Context()
    context.pathways.checkpointing_impl = impl
    with context, pytest.raises(errors.UnsupportedOptionError, match="checkpointing_impl"):
        ocp.save_async(tmp_path / "c", {"w": np.ones(2)})
    assert not list(tmp_path.iterdir())
