"""What is loaded of a checkpoint, as what, and where to: each option by its effect."""

from __future__ import annotations

import dataclasses
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore as ts
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import orbax_async as ocp
from orbax_async import errors
from orbax_async.tree.selection import Selection

Sds = jax.ShapeDtypeStruct


def loading(*, partial_load: bool = False, **options: Any) -> ocp.Context:
    """A context with options of loading."""
    context = ocp.Context()
    context.pytree.loading.partial_load = partial_load
    for name, value in options.items():
        setattr(context.array.loading, name, value)
    return context


def broadcasting(**options: Any) -> ocp.Context:
    """A context in which one replica reads for all."""
    context = ocp.Context()
    context.array.loading.use_load_and_broadcast = True
    for name, value in options.items():
        setattr(context.array.loading.load_and_broadcast_options, name, value)
    return context


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a small train state."""
    ocp.save(tmp_path / "saved", state())
    return tmp_path / "saved"


def state() -> dict[str, Any]:
    """What is in it."""
    return {
        "params": {
            "dense": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)},
            "out": {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.zeros(2)},
        },
        "opt": [np.arange(3), np.arange(4), np.arange(5)],
        "step": 7,
        "name": "run",
        "empty": {},
    }


# Selecting.


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("params/dense", ["params.dense.bias", "params.dense.kernel"]),
        ("params/*/kernel", ["params.dense.kernel", "params.out.kernel"]),
        ("**/kernel", ["params.dense.kernel", "params.out.kernel"]),
        ("**/dense/**", ["params.dense.bias", "params.dense.kernel"]),
        (["step", "name"], ["name", "step"]),
        ("s?ep", ["step"]),
        ("[m-o]ame", ["name"]),
        ("opt/1", ["opt.1"]),
        (["params", "!**/bias"], ["params.dense.kernel", "params.out.kernel"]),
        (["!params", "!opt"], ["name", "step"]),
        ("/params/out/", ["params.out.bias", "params.out.kernel"]),
        (lambda path: path[0].key == "opt" and path[1].idx == 2, ["opt.2"]),
    ],
)
def test_patterns_select_leaves(saved: Path, select: Any, expected: list[str]) -> None:
    """Each kind of pattern loads what it matches and what lies below, and nothing else."""
    loaded = ocp.load(saved, select=select)
    paths, _ = jax.tree_util.tree_flatten_with_path(loaded, is_leaf=lambda x: x is ...)
    found = {
        ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path): leaf
        for path, leaf in paths
        if leaf is not ...
    }
    assert sorted(found) == expected


def test_what_is_not_selected_is_left_out(saved: Path) -> None:
    """Dicts lose keys; lists keep their length, with `...` for what is not loaded."""
    assert ocp.load(saved, select="step") == {"step": 7}
    opt = ocp.load(saved, select="opt/1")["opt"]
    assert opt[0] is ... and opt[2] is ... and opt[1].tolist() == [0, 1, 2, 3]
    assert ocp.load(saved, select=["empty", "step"]) == {"step": 7, "empty": {}}
    assert ocp.load(saved, select=lambda path: False) == {}


def test_selecting_keeps_the_containers_of_an_abstract_tree(saved: Path) -> None:
    """With an abstract tree, the tree comes back whole, with `...` where nothing was loaded."""
    abstract = {
        "params": {
            "dense": {"kernel": Sds((3, 4), np.float16), "bias": Sds((9, 9), np.int8)},
            "not there": np.ndarray,
        },
        "opt": ({"another": 0}, None, {}),
        "step": 0,
    }
    loaded = ocp.load(saved, abstract, select=["params/dense/kernel", "step"])
    kernel = loaded["params"]["dense"].pop("kernel")
    assert kernel.dtype == np.float16 and kernel.shape == (3, 4)
    assert loaded == {
        "params": {"dense": {"bias": ...}, "not there": ...},
        "opt": ({"another": ...}, None, {}),
        "step": 7,
    }


def test_a_pattern_that_matches_nothing_is_an_error(saved: Path) -> None:
    """A misspelt pattern loads nothing silently: the report names it and what there is."""
    with pytest.raises(errors.TreeMismatchError, match=r"'parms/\*'.*'params'") as caught:
        ocp.load(saved, select=["parms/*", "step", "otp"])
    assert len(caught.value.mismatches) == 2


@pytest.mark.parametrize(
    ("select", "error"),
    [(5, TypeError), ([5], TypeError), ("", ValueError), ("!", ValueError), ([], ValueError)],
)
def test_select_that_is_no_selection_is_refused(
    saved: Path, select: Any, error: type[Exception]
) -> None:
    """What is neither patterns nor a function is refused when the load is called."""
    with pytest.raises(error, match="select"):
        ocp.load_async(saved, select=select)


def test_a_star_stays_within_a_key() -> None:
    """`*` matches no separator, `**` any number of keys, also none."""
    from orbax_async.tree.keypath import Key

    def has(pattern: str, *names: str) -> bool:
        return Selection(pattern).has(tuple(Key(name, False) for name in names))

    assert has("a/*", "a", "b/c")
    assert not has("a/*/c", "a", "b/c")
    assert has("a/**/d", "a", "d")
    assert has("a/**/d", "a", "b", "c", "d", "e")
    assert not has("a/**/d", "a", "b")
    assert has("**", "x")
    assert not has("A", "a")


@pytest.mark.parametrize("ocdbt", [True, False])
def test_data_that_is_not_selected_may_be_missing(tmp_path: Path, ocdbt: bool) -> None:
    """Only the bytes that are needed are read: the data of other leaves is removed beforehand."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = ocdbt
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = 1 << 20
    arrays = {name: np.full(1 << 19, index, np.float32) for index, name in enumerate("abcd")}
    with context:
        ocp.save(tmp_path / "c", {"x": arrays, "note": "text"})
    directory = tmp_path / "c" / "state"
    (directory / "_strings.json").unlink()
    removed = 0
    for path in sorted([*directory.glob("x.*"), *directory.glob("d/*")]):
        if ocdbt or path.name != "x.b":
            hidden = path.rename(tmp_path / "hidden")
            if ocdbt and not _holds(tmp_path / "c", arrays["b"]):
                hidden.rename(path)  # the index, or the leaf itself
                continue
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
            removed += 1
    assert removed >= 3
    assert _holds(tmp_path / "c", arrays["b"])
    loaded = ocp.load(tmp_path / "c", {"x": {"b": np.ndarray}}, select="**/b")
    assert np.array_equal(loaded["x"]["b"], arrays["b"])
    for name in "acd":
        with pytest.raises(errors.ReadError, match=rf"\['x'\]\['{name}'\]"):
            ocp.load(tmp_path / "c", select=f"x/{name}")


def _holds(path: Path, expected: Any) -> bool:
    try:
        return np.array_equal(ocp.load(path, select="x/b")["x"]["b"], expected)
    except (errors.CheckpointError, FileNotFoundError):
        return False


# Partial loads.


class Pair(NamedTuple):
    a: Any
    b: Any


def test_partial_loads_leave_out_what_is_not_asked_for(saved: Path) -> None:
    """B4.1, B4.3: keys that are not asked for are not loaded; without a tree, everything is."""
    with loading(partial_load=True):
        loaded = ocp.load(saved, {"params": {"out": {"bias": np.ndarray}}, "step": 0})
        assert loaded["params"]["out"]["bias"].tolist() == [0, 0]
        assert list(loaded["params"]) == ["out"] and loaded["step"] == 7
        assert ocp.load(saved).keys() == state().keys()
        assert ocp.load(saved, {}) == {}
        assert ocp.load(saved, {"params": {}, "empty": {}}) == {"params": {}, "empty": {}}
    with pytest.raises(errors.TreeMismatchError, match="not asked for"):
        ocp.load(saved, {"step": 0})


def test_partial_loads_give_back_what_is_not_there(saved: Path) -> None:
    """B4.2, B4.7: what the checkpoint has not comes back as it was given, the same object."""
    new, abstract = np.arange(3), Sds((2,), np.float32)
    with loading(partial_load=True):
        loaded = ocp.load(
            saved, {"step": 0, "head": {"w": new, "b": abstract}, "params": None, "opt": ...}
        )
    assert loaded["head"]["w"] is new and loaded["head"]["b"] is abstract
    assert (loaded["step"], loaded["params"], loaded["opt"]) == (7, None, ...)


def test_partial_loads_and_placeholders_go_together(saved: Path) -> None:
    """W34: a leaf or a whole subtree can be `...` in a partial load."""
    with loading(partial_load=True):
        loaded = ocp.load(
            saved,
            {"step": 0, "name": ..., "params": ..., "opt": [..., 0, ...]}
            | {"opt": [..., np.ndarray, ...]},
        )
    assert loaded["step"] == 7 and loaded["name"] is ... and loaded["params"] is ...
    assert loaded["opt"][0] is ... and loaded["opt"][1].tolist() == [0, 1, 2, 3]


def test_partial_loads_only_leave_out_keys(saved: Path) -> None:
    """B4.5, B4.6: other lengths and other kinds of containers are mismatches, all in one report."""
    abstract = {
        "opt": [np.ndarray],
        "params": [0],
        "step": {"x": 0},
        "name": str,
        "empty": {"new": 0},
    }
    with loading(partial_load=True):
        with pytest.raises(errors.TreeMismatchError) as caught:
            ocp.load(saved, abstract)
        with pytest.raises(errors.TreeMismatchError, match="holds a dict, not a leaf"):
            ocp.load(saved, {"params": 0})
        with pytest.raises(errors.TreeMismatchError, match="holds a list, not a dict"):
            ocp.load(saved, {"opt": {"0": 0}})
    assert [line.split(":")[0] for line in caught.value.mismatches] == [
        "['opt']",
        "['params']",
        "['step']",
    ]


def test_partial_loads_count_the_empty_elements_of_lists(tmp_path: Path) -> None:
    """B4.5: an optimizer's state, which ends with an empty element, matches no shorter tuple."""
    optimizer = (Pair(np.arange(3), 1), ())
    ocp.save(tmp_path / "saved", {"opt": optimizer, "step": 7})
    with loading(partial_load=True):
        loaded = ocp.load(tmp_path / "saved", {"opt": (Pair(np.ndarray, 0), ())})
        assert loaded["opt"][0].a.tolist() == [0, 1, 2] and loaded["opt"][1] == ()
        with pytest.raises(errors.TreeMismatchError, match="a list of 2, not of 1"):
            ocp.load(tmp_path / "saved", {"opt": (Pair(np.ndarray, 0),)})


# Padding and truncation.


@pytest.mark.parametrize("shape", [(8, 2), (3, 9), (2, 3), (7, 5), (4, 0), (4, 4), (12, 1)])
@pytest.mark.parametrize("kind", ["jax", "sharded", "numpy"])
@pytest.mark.parametrize("options", ["plain", "zarr2", "chunks", "compressed"])
def test_arrays_are_padded_and_cut(
    tmp_path: Path, mesh8: Mesh, shape: tuple[int, ...], kind: str, options: str
) -> None:
    """B4.10: on each axis zeros follow what is stored, or what is too much is left."""
    rows = 4 if options == "plain" else 400
    array = np.arange(rows * 4.0, dtype=np.float32).reshape(rows, 4) + 1
    shape = (shape[0] * rows // 4, shape[1])
    context = ocp.Context()
    context.array.saving.use_zarr3 = options != "zarr2"
    context.array.saving.use_compression = options == "compressed"
    context.array.saving.compression_min_saving = 0
    sharding = NamedSharding(mesh8, P("x") if options == "chunks" else P())
    with context:
        ocp.save(tmp_path / "c", {"a": jax.device_put(array, sharding)})
    expected = np.zeros(shape, np.float32)
    common = tuple(slice(min(pair)) for pair in zip(shape, array.shape, strict=True))
    expected[common] = array[common]
    abstract: Any = {
        "jax": Sds(shape, np.float32, sharding=SingleDeviceSharding(jax.devices()[1])),
        "sharded": Sds(shape, np.float32, sharding=NamedSharding(mesh8, P("x"))),
        "numpy": np.zeros(shape, np.float32),
    }[kind]
    if kind == "sharded" and shape[0] % 4:
        abstract = Sds(shape, np.float32, sharding=NamedSharding(mesh8, P()))
    if shape != array.shape and (kind != "numpy" or 0 not in shape):
        with pytest.raises(errors.ShapeMismatchError, match="enable_padding_and_truncation"):
            ocp.load(tmp_path / "c", {"a": abstract})
    with loading(enable_padding_and_truncation=True):
        loaded = ocp.load(tmp_path / "c", {"a": abstract})["a"]
    if kind == "numpy" and 0 in shape:
        expected = array  # an empty NumPy array asks for any shape
    assert np.array_equal(loaded, expected)
    assert isinstance(loaded, np.ndarray) == (kind == "numpy")
    if kind != "numpy":
        assert loaded.sharding == abstract.sharding


def test_padding_casts_too(saved: Path) -> None:
    """Another dtype and another shape at once."""
    with loading(enable_padding_and_truncation=True, partial_load=True):
        loaded = ocp.load(saved, {"params": {"dense": {"bias": Sds((6,), ml_dtypes.bfloat16)}}})
    bias = loaded["params"]["dense"]["bias"]
    assert bias.dtype == ml_dtypes.bfloat16
    assert bias.tolist() == [1, 1, 1, 1, 0, 0]


def test_padding_keeps_ranks_and_keys(tmp_path: Path) -> None:
    """Another number of axes is a mismatch; random keys are never made up."""
    ocp.save(
        tmp_path / "c", {"a": jnp.ones((2, 2)), "n": 3, "k": jax.random.split(jax.random.key(0))}
    )
    key = jax.random.key(0).dtype
    with (
        loading(enable_padding_and_truncation=True),
        pytest.raises(errors.ShapeMismatchError, match="Ranks do not match") as caught,
    ):
        ocp.load(
            tmp_path / "c",
            {"a": Sds((4,), np.float32), "n": Sds((1,), np.float32), "k": Sds((3,), key)},
        )
    assert {error.keypath for error in caught.value.others} == {"['n']", "['k']"}


def test_padding_counts_in_the_budget(tmp_path: Path) -> None:
    """What zeros take is reserved, too: two padded leaves don't fit one after another at once."""
    ocp.save(tmp_path / "c", {"a": np.ones(10, np.uint8), "b": np.ones(10, np.uint8)})
    context = loading(enable_padding_and_truncation=True)
    context.memory.read_concurrent_bytes = 1000
    with context:
        response = ocp.load_async(
            tmp_path / "c", {"a": np.zeros(800, np.uint8), "b": np.zeros(800, np.uint8)}
        )
        assert response.result()["b"].sum() == 10
    assert [span.nbytes for span in response.timeline if span.name == "read"] == [800, 800]


# Missing data.


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("rows", [4, 40_000])
def test_missing_data_is_an_error_or_zeros(
    tmp_path: Path, mesh8: Mesh, ocdbt: bool, rows: int
) -> None:
    """B5.7: a chunk that is not there raises by key path, or reads as zeros."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = ocdbt
    context.array.saving.use_compression = False
    array = jnp.arange(rows * 4.0).reshape(rows, 4) + 1
    with context:
        ocp.save(
            tmp_path / "c",
            {"a": jax.device_put(array, NamedSharding(mesh8, P("x"))), "whole": np.arange(5)},
        )
    directory = tmp_path / "c" / "state"
    if ocdbt:
        store = ts.KvStore.open(f"{directory.as_uri()}/|ocdbt:").result()
        del store["a/c/1/0"], store["whole/c/0"]
    else:
        (directory / "a/c/1/0").unlink()
        (directory / "whole/c/0").unlink()
    with pytest.raises(errors.ReadError, match=r"\['(a|whole)'\]"):
        ocp.load(tmp_path / "c")
    with loading(raise_array_data_missing_error=False):
        loaded = ocp.load(tmp_path / "c")
    found, expected = np.asarray(loaded["a"]), np.asarray(array)
    lost = found == 0
    assert lost.sum() == array.size // 8  # the replicas of each of 4 shards write half of it each
    assert np.array_equal(found[~lost], expected[~lost])
    assert loaded["whole"].tolist() == [0] * 5


# Load and broadcast.


def broadcast_spans(response: ocp.AsyncResponse[Any]) -> list[int]:
    """The bytes of each group of pieces that a load has sent from device to device."""
    response.result()
    return [span.nbytes for span in response.timeline if span.name == "broadcast"]


def test_one_replica_reads_and_sends_to_the_others(tmp_path: Path, mesh8: Mesh) -> None:
    """B5.8: host memory goes to the replica that reads; what the others hold was sent to them."""
    array = np.arange(64.0, dtype=np.float32).reshape(16, 4)
    ocp.save(tmp_path / "c", {"a": array, "b": array + 1, "n": 5, "h": np.arange(3)})
    along_y = Sds((16, 4), np.float32, sharding=NamedSharding(mesh8, P("y")))
    everywhere = Sds((16, 4), np.float32, sharding=NamedSharding(mesh8, P()))
    abstract = {"a": along_y, "b": everywhere, "n": 0, "h": np.ndarray}
    plain = ocp.load_async(tmp_path / "c", abstract)
    assert broadcast_spans(plain) == []
    with broadcasting():
        response = ocp.load_async(tmp_path / "c", abstract)
    # Of 4 x 2 devices those of row 0 read: a half is sent 3 times from each, and b to 7 others.
    assert sum(broadcast_spans(response)) == array.nbytes * (3 + 7)
    for name in ("a", "b"):
        found, expected = response.result()[name], plain.result()[name]
        assert found.sharding == expected.sharding
        for mine, theirs in zip(found.addressable_shards, expected.addressable_shards, strict=True):
            assert mine.device == theirs.device
            assert np.array_equal(mine.data, theirs.data)


def test_broadcasts_stay_below_their_limit(tmp_path: Path, mesh8: Mesh) -> None:
    """No more bytes are sent at a time than the option says."""
    names = [f"leaf {index}" for index in range(10)]
    ocp.save(tmp_path / "c", {name: np.ones(100, np.uint8) for name in names})
    abstract = dict.fromkeys(names, Sds((100,), np.uint8, sharding=NamedSharding(mesh8, P())))
    with broadcasting(broadcast_memory_limit_bytes=500, replica_axis_index=1, primary_replica_id=1):
        limited = broadcast_spans(ocp.load_async(tmp_path / "c", abstract))
    assert limited == [500] * 14
    with broadcasting(broadcast_memory_limit_bytes=10):
        assert broadcast_spans(ocp.load_async(tmp_path / "c", abstract)) == [100] * 70


def test_broadcasts_leave_a_share_of_free_memory(
    tmp_path: Path, mesh8: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit, a share of the memory that devices have free is used; here 1000 bytes."""
    from orbax_async._engine import load_pipeline

    monkeypatch.setattr(load_pipeline, "free_nbytes", lambda shardings: 1000)
    ocp.save(tmp_path / "c", {"a": np.ones(100, np.uint8), "b": np.ones(100, np.uint8)})
    abstract = dict.fromkeys("ab", Sds((100,), np.uint8, sharding=NamedSharding(mesh8, P())))
    with broadcasting(broadcast_memory_scaling_factor=0.25):
        assert broadcast_spans(ocp.load_async(tmp_path / "c", abstract)) == [200] * 7


@pytest.mark.parametrize(("axis", "spec"), [(0, P("y")), (1, P("x"))])
def test_the_primary_replica_is_the_one_that_reads(
    axis: int, spec: P, tmp_path: Path, mesh8: Mesh
) -> None:
    """Which devices get their values from the host is decided by the options: axis and index."""
    from orbax_async._engine import transfer

    ocp.save(tmp_path / "c", {"a": np.arange(8.0)})
    abstract = {"a": Sds((8,), np.float32, sharding=NamedSharding(mesh8, spec))}
    for primary in range(mesh8.devices.shape[axis]):
        placed: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            put = transfer._put

            def watched(array: Any, where: Any, put: Any = put, placed: Any = placed) -> Any:
                placed.extend(where.device_set)
                return put(array, where)

            patch.setattr(transfer, "_put", watched)
            with broadcasting(replica_axis_index=axis, primary_replica_id=primary):
                ocp.load(tmp_path / "c", abstract)
        assert sorted(placed, key=str) == sorted(mesh8.devices.take(primary, axis), key=str)


@pytest.mark.parametrize(
    ("spec", "options", "problem"),
    [
        (P("x"), {}, "divided along 'x'"),
        (P(("y", "x")), {}, "divided along 'x'"),
        (None, {}, "Must provide `sharding`"),
        (P(), {"replica_axis_index": 2}, "no replica 0 along axis 2"),
        (P(), {"primary_replica_id": 4}, "no replica 4 along axis 0"),
    ],
)
def test_arrays_without_replicas_are_refused(
    tmp_path: Path, mesh8: Mesh, spec: Any, options: dict[str, Any], problem: str
) -> None:
    """B5.8: an array that has no replicas along the axis can't be sent to them."""
    ocp.save(tmp_path / "c", {"a": np.arange(8.0), "b": np.arange(8.0)})
    sharding = SingleDeviceSharding(jax.devices()[0])
    if spec is not None:
        sharding = NamedSharding(mesh8, spec)
    leaf = Sds((8,), np.float32, sharding=sharding)
    with (
        broadcasting(**options),
        pytest.raises(errors.ShardingMismatchError, match=problem) as caught,
    ):
        ocp.load(tmp_path / "c", {"a": leaf, "b": leaf})
    assert isinstance(caught.value, ValueError)
    assert [error.keypath for error in caught.value.others] == ["['b']"]


# Shardings for all.


def test_one_sharding_for_all_jax_arrays(tmp_path: Path, mesh8: Mesh) -> None:
    """It holds for jax arrays of which nothing else is said; the rest stays on the host."""
    single = SingleDeviceSharding(jax.devices()[3])
    ocp.save(
        tmp_path / "c", {"j": jnp.arange(8.0), "k": jnp.arange(4.0), "n": np.arange(3), "s": 1}
    )
    replicated = NamedSharding(mesh8, P())
    loaded = ocp.load(tmp_path / "c", sharding=replicated)
    assert loaded["j"].sharding == loaded["k"].sharding == replicated
    assert type(loaded["n"]) is np.ndarray and type(loaded["s"]) is int
    abstract = {
        "j": Sds((8,), np.float32, sharding=single),
        "k": Sds((4,), np.float32),
        "n": Sds((3,), np.int32),
        "s": 0,
    }
    loaded = ocp.load(tmp_path / "c", abstract, sharding=replicated)
    assert loaded["j"].sharding == single
    assert loaded["k"].sharding == loaded["n"].sharding == replicated
    # What `metadata` says of the saved sharding gives way, too.
    loaded = ocp.load(tmp_path / "c", ocp.metadata(tmp_path / "c"), sharding=replicated)
    assert loaded["j"].sharding == replicated


def test_a_function_chooses_shardings(tmp_path: Path, mesh8: Mesh) -> None:
    """It gets key path, shape and dtype of each jax array as it will be; None: where it was."""
    saved_on = SingleDeviceSharding(jax.devices()[5])
    value = {
        "w": jax.device_put(jnp.ones((8, 2)), saved_on),
        "l": [jax.device_put(jnp.ones(3, jnp.int32), saved_on)],
        "n": np.ones(3),
    }
    ocp.save(tmp_path / "c", value)
    asked = []

    def choose(path: Any, shape: Any, dtype: Any) -> Any:
        asked.append((jax.tree_util.keystr(path), shape, dtype))
        return NamedSharding(mesh8, P("x")) if shape[0] % 4 == 0 else None

    loaded = ocp.load(tmp_path / "c", sharding=choose)
    assert loaded["w"].sharding == NamedSharding(mesh8, P("x"))
    assert loaded["l"][0].sharding == saved_on
    assert sorted(asked) == [
        ("['l'][0]", (3,), np.dtype(np.int32)),
        ("['w']", (8, 2), np.dtype(np.float32)),
    ]
    asked.clear()
    ocp.load(tmp_path / "c", {"w": Sds((8, 2), np.float16), "l": [...], "n": ...}, sharding=choose)
    assert asked == [("['w']", (8, 2), np.dtype(np.float16))]


def test_what_a_sharding_function_does_wrong_names_the_leaf(saved: Path, mesh8: Mesh) -> None:
    """What it raises passes as it is, with a note; what it returns must be a sharding."""

    def fails(path: Any, shape: Any, dtype: Any) -> Any:
        raise RuntimeError("no idea")

    with pytest.raises(RuntimeError, match="no idea") as caught:
        ocp.load(saved, sharding=fails)
    assert any("['params']['dense']" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match=r"returned 'x' for leaf \['params'\]"):
        ocp.load(saved, sharding=lambda *_: "x")
    with pytest.raises(TypeError, match="sharding must be"):
        ocp.load_async(saved, sharding="x")
    with pytest.raises(errors.ShardingMismatchError, match="does not fit") as refused:
        ocp.load(saved, sharding=NamedSharding(mesh8, P(None, None, "x")))
    assert len(refused.value.others) == 3


def test_an_abstract_mesh_becomes_the_one_that_is_set(saved: Path, mesh8: Mesh) -> None:
    """B3.35: a sharding for all may be over an abstract mesh while a mesh is set."""
    abstract = NamedSharding(mesh8.abstract_mesh, P())
    with jax.set_mesh(mesh8):
        loaded = ocp.load(saved, sharding=abstract, select="params")
    assert loaded["params"]["out"]["bias"].sharding.mesh == mesh8
    with pytest.raises(errors.AbstractLeafError, match="set_mesh"):
        ocp.load(saved, sharding=abstract)


# One report.


def test_all_mismatches_are_in_one_report(saved: Path, mesh8: Mesh) -> None:
    """W29: missing and extra keys, shapes, dtypes, scalars, strings and shardings, at once."""
    abstract = {
        "params": {
            "dense": {"kernel": Sds((4, 3), np.float32), "bias": str},
            "out": {
                "kernel": Sds((4, 2), np.float32, sharding=NamedSharding(mesh8, P(None, "x"))),
                "bias": 0,
            },
        },
        "opt": [np.ndarray, np.ndarray, jax.random.key(0)],
        "stop": 0,
        "name": 5,
        "empty": 0,
    }
    with pytest.raises(errors.TreeMismatchError) as caught:
        ocp.load(saved, abstract)
    lines = caught.value.mismatches
    assert [line.split(": ")[0] for line in lines] == [
        "['empty']",
        "['stop']",
        "['step']",
        "['name']",
        "['opt'][2]",
        "['params']['dense']['bias']",
        "['params']['dense']['kernel']",
        "['params']['out']['bias']",
        "['params']['out']['kernel']",
    ]
    assert all(line in str(caught.value) for line in lines)


def test_scalars_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    """B3.13: what can't become a scalar is in the report, though its data could be read."""
    ocp.save(tmp_path / "c", {"a": np.ones(3), "c": 1j, "f": 1.5, "k": jax.random.key(0)})
    response = ocp.load_async(
        tmp_path / "c",
        {"a": int, "c": float, "f": bytes, "k": Sds((), jax.random.key(0, impl="rbg").dtype)},
    )
    with pytest.raises(errors.LeafError) as caught:
        response.result()
    found = {caught.value.keypath, *(error.keypath for error in caught.value.others)}
    assert found == {"['a']", "['c']", "['f']", "['k']"}
    assert not [span for span in response.timeline if span.name == "read"]


# Leaves of every kind.

NUMBERS = [True, 5, 2.5]
CASTS: list[tuple[Any, Any, Any]] = [
    # saved, abstract, loaded
    (5, float, 5.0),
    (2.5, int, 2),
    (5, bool, True),
    (5, 0.0, 5.0),
    (True, int, 1),
    (5, complex, 5 + 0j),
    (5, np.float32, np.asarray(5, np.float32)),
    (5, np.int8(0), np.asarray(5, np.int8)),
    (5, np.zeros(()), np.asarray(5.0)),
    (5, np.ndarray, np.asarray(5)),
    (np.arange(3), np.zeros(3, np.float16), np.arange(3, dtype=np.float16)),
    (np.arange(3), np.array([], np.int8), np.arange(3, dtype=np.int8)),
    (np.arange(3.0), Sds((3,), np.int32), jnp.arange(3, dtype=np.int32)),
    (np.array([0.0, 2.0]), Sds((2,), bool), jnp.array([False, True])),
    (np.array([1.5]), Sds((1,), np.complex64), jnp.array([1.5 + 0j])),
    (np.array([1.5]), Sds((1,), ml_dtypes.bfloat16), jnp.array([1.5], jnp.bfloat16)),
    (5, Sds((), np.float32), jnp.asarray(5.0)),
    ("text", str, "text"),
    ("text", "", "text"),
    ("text", ..., ...),
    (5, None, None),
    (b"raw", bytes, b"raw"),
]


@pytest.mark.parametrize(
    ("value", "abstract", "expected"), CASTS, ids=[f"{a!r:.30}-{b!r:.40}" for a, b, _ in CASTS]
)
def test_a_leaf_becomes_what_is_asked_for(
    tmp_path: Path, value: Any, abstract: Any, expected: Any
) -> None:
    """B3.4 to B3.18: the kind, the dtype and the value of each."""
    ocp.save(tmp_path / "c", {"x": value, "y": 0})
    loaded = ocp.load(tmp_path / "c", {"x": abstract, "y": 0})["x"]
    assert isinstance(loaded, jax.Array) == isinstance(expected, jax.Array)
    if isinstance(expected, (np.ndarray, jax.Array)):
        assert loaded.dtype == expected.dtype
        assert loaded.shape == expected.shape
        assert np.array_equal(loaded, expected)
    else:
        assert type(loaded) is type(expected)
        assert loaded == expected


class Protocol:
    """An abstract leaf of a user's own making."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> None:
        self.shape, self.dtype, self.sharding = shape, np.dtype(dtype), sharding


@pytest.mark.parametrize("sharded", [True, False])
def test_anything_like_an_abstract_array_is_one(tmp_path: Path, mesh8: Mesh, sharded: bool) -> None:
    """B3.34: shape and dtype make an abstract array, a sharding places it."""
    ocp.save(tmp_path / "c", {"x": jnp.arange(8.0)})
    where = NamedSharding(mesh8, P("x")) if sharded else None
    loaded = ocp.load(tmp_path / "c", {"x": Protocol((8,), np.float16, where)})["x"]
    assert loaded.dtype == np.float16
    assert loaded.sharding == (where or SingleDeviceSharding(jax.devices()[0]))


# Containers.


@dataclasses.dataclass
class Model:
    w: Any
    inner: Any
    name: str = dataclasses.field(default="m", metadata={"static": True})


jax.tree_util.register_dataclass(Model, ["w", "inner"], ["name"])


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.first(x))


def nnx_net(seed: int) -> Any:
    """A module."""
    net = Net(nnx.Rngs(seed))
    net.eval()
    return net


DENSE = nn.Dense(3)


def train_state(seed: int) -> Any:
    """A train state as linen's examples make it."""
    params = DENSE.init(jax.random.key(seed), jnp.ones((1, 5)))["params"]
    return TrainState.create(apply_fn=DENSE.apply, params=params, tx=OPTIMIZER)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
TREES: dict[str, Callable[[int], Any]] = {
    "nnx module": nnx_net,
    "nnx state": lambda seed: nnx.state(nnx_net(seed)),
    "nnx optimizer": lambda seed: nnx.state(nnx.Optimizer(nnx_net(seed), OPTIMIZER, wrt=nnx.Param)),
    "linen TrainState": train_state,
    "optax": lambda seed: OPTIMIZER.init({"w": jnp.full((3,), seed, jnp.float32)}),
    "optax masked": lambda seed: optax.masked(OPTIMIZER, {"w": True, "b": False}).init(
        {"w": jnp.full((3,), seed, jnp.float32), "b": jnp.ones(2)}
    ),
    "equinox": lambda seed: eqx.filter(
        eqx.nn.MLP(2, 2, width_size=4, depth=1, key=jax.random.key(seed)), eqx.is_array
    ),
    "dataclass": lambda seed: Model(jnp.full(3, seed), Pair(seed, [np.full(2, seed)])),
    "OrderedDict": lambda seed: OrderedDict(b=jnp.full(2, seed), a=(seed, {"x": 2.5})),
    "int keys": lambda seed: {0: jnp.full(2, seed), 10: {2: 1}},
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("form", ["shapes", "values"])
def test_containers_come_back(tmp_path: Path, name: str, form: str) -> None:
    """B2.20: nnx, linen, optax, equinox and plain containers come back as they are."""
    make = TREES[name]
    value, other = make(1), make(2)
    ocp.save(tmp_path / "c", value)
    abstract: Any = other
    if form == "shapes":
        abstract = jax.tree.map(
            lambda x: Sds(x.shape, x.dtype) if isinstance(x, jax.Array) else type(x), other
        )
    loaded = ocp.load(tmp_path / "c", abstract)
    assert jax.tree.structure(loaded) == jax.tree.structure(value)
    assert type(loaded) is type(value)
    for mine, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(value), strict=True):
        assert np.array_equal(_plain(mine), _plain(theirs))


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    return np.asarray(leaf)


def test_a_module_computes_the_same_after_a_load(tmp_path: Path) -> None:
    """An nnx module, loaded into one that was never initialized, gives the same outputs."""
    net = nnx_net(0)
    ocp.save(tmp_path / "c", nnx.state(net))
    graph, abstract = nnx.split(nnx.eval_shape(lambda: nnx_net(0)))
    again = nnx.merge(graph, ocp.load(tmp_path / "c", abstract))
    x = jnp.ones((2, 3))
    assert np.array_equal(again(x), net(x))


# Doors.


async def test_options_of_loads_work_through_both_doors(saved: Path, mesh8: Mesh) -> None:
    """`load_async` takes what `load` does."""
    replicated = NamedSharding(mesh8, P())
    loaded = await ocp.load_async(saved, select="params/out", sharding=replicated)
    assert list(loaded) == ["params"] and list(loaded["params"]) == ["out"]
    assert loaded["params"]["out"]["kernel"].sharding == replicated


def test_a_handler_bound_to_the_name_selects_too(saved: Path) -> None:
    """A registry's own PyTreeHandler, with its context, is given what is asked for."""
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry(
        include_global_registry=False
    ).add(
        ocp.handlers.PyTreeHandler(context=loading(partial_load=True)), checkpointable_name="state"
    )
    with context:
        assert ocp.load(saved, {"step": 0}, checkpointable_name="state") == {"step": 7}
        assert ocp.load(saved, select="step", checkpointable_name="state") == {"step": 7}
