"""What is loaded of a checkpoint and how: each option by its effect."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import saved_states
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from saved_states import Pair, Sds, state

import orbax_async as ocp
from orbax_async import errors
from orbax_async.tree.keypath import Selection

saved = saved_states.saved


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
