"""The options of loading do with either library's checkpoints what Orbax's do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import disk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_same
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1
from stock import load_or_refusal

import orbax_async as ocp

WRITERS = {"ours": ocp, "orbax": v1}


def state(mesh: Mesh) -> dict[str, Any]:
    """Arrays of both kinds, sharded and not, scalars, a list and a string."""
    return {
        "a": {"j": jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("x"))), "n": np.arange(6)},
        "l": [1, 2.5, True],
        "m": jnp.arange(12.0).reshape(4, 3),
        "s": "text",
        "e": {},
        "o": ({"mu": np.arange(2.0)}, optax.EmptyState()),
    }


@pytest.fixture(params=WRITERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path, mesh8: Mesh) -> Path:
    """A checkpoint that either library wrote."""
    WRITERS[request.param].save(tmp_path / "c", state(mesh8))
    return tmp_path / "c"


def both(path: Path, abstract: Any, *, partial: bool = False, **options: Any) -> tuple[Any, Any]:
    """What Orbax and we load under the same options; Orbax's message where it refuses."""
    results = []
    for library in (v1, ocp):
        context: Any = library.Context()
        context.pytree.loading.partial_load = partial
        for name, value in options.items():
            setattr(context.array.loading, name, value)
        with context:
            if library is v1:
                loaded, refusal = load_or_refusal(path, abstract)
                results.append(refusal or loaded)
            else:
                results.append(ocp.load(path, abstract))
    return results[0], results[1]


SINGLE = SingleDeviceSharding(jax.devices()[0])
PARTS: dict[str, Any] = {
    "one leaf": {"l": [0, 0.0, False]},
    "one of a dict": {"a": {"n": np.ndarray}},
    "other containers": {"l": (0, 0.0, False), "s": str},
    "not there": {"s": str, "new": 5, "deep": {"er": np.float32(1)}},
    "no subtree": {"a": None, "s": str},
    "empty": {"e": {}, "s": ""},
    "empty in a tuple": {"o": ({"mu": np.ndarray}, optax.EmptyState())},
    "everything": None,
}


@pytest.mark.parametrize("case", PARTS)
def test_partial_loads(saved: Path, case: str) -> None:
    """B4.1 to B4.3, B4.7: the same parts, in the same containers."""
    theirs, ours = both(saved, PARTS[case], partial=True)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "abstract",
    [
        *({"l": [0]}, {"l": [0] * 4}, {"a": [0]}, {"l": {"0": 0}}, {"a": 0}, {"s": {"x": 0}}),
        *({"o": [{"mu": np.ndarray}]}, {"o": [{"mu": np.ndarray}, (), ()]}),
    ],
    ids=repr,
)
def test_partial_loads_that_both_refuse(saved: Path, abstract: Any) -> None:
    """B4.5, B4.6: lists of other lengths and other kinds of containers."""
    context, theirs = ocp.Context(), v1.Context()
    context.pytree.loading.partial_load = theirs.pytree.loading.partial_load = True
    with theirs:
        assert load_or_refusal(saved, abstract)[1]
    with context, pytest.raises(ocp.errors.TreeMismatchError):
        ocp.load(saved, abstract)


@pytest.mark.parametrize("shape", [(4, 3), (6, 3), (2, 3), (4, 5), (3, 5), (7, 1), (0, 3)])
def test_padding_and_truncation(saved: Path, shape: tuple[int, ...], mesh8: Mesh) -> None:
    """B4.10: the same elements and the same zeros, on one device and on many."""
    for sharding in (SINGLE, NamedSharding(mesh8, P())):
        abstract = {"m": jax.ShapeDtypeStruct(shape, np.float16, sharding=sharding)}
        theirs, ours = both(saved, abstract, partial=True, enable_padding_and_truncation=True)
        assert_same(ours, theirs)
        assert ours["m"].sharding == theirs["m"].sharding


def test_padding_of_sharded_arrays(saved: Path, mesh8: Mesh) -> None:
    """Each device has the piece that Orbax puts there, also where all of it is new."""
    for side in (4, 12, 16):
        where = NamedSharding(mesh8, P("x"))
        abstract = {"a": {"j": jax.ShapeDtypeStruct((side,), np.float32, sharding=where)}}
        theirs, ours = both(saved, abstract, partial=True, enable_padding_and_truncation=True)
        for mine, other in zip(
            ours["a"]["j"].addressable_shards, theirs["a"]["j"].addressable_shards, strict=True
        ):
            assert mine.device == other.device
            assert np.array_equal(mine.data, other.data)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("ocdbt", [True, False])
def test_missing_data(tmp_path: Path, mesh8: Mesh, writer: str, ocdbt: bool) -> None:
    """B5.7: without a chunk both raise, or both read zeros in its place."""
    library: Any = WRITERS[writer]
    context = library.Context()
    context.array.saving.use_ocdbt = ocdbt
    with context:
        library.save(tmp_path / "c", state(mesh8))
    directory = tmp_path / "c" / "state"
    if ocdbt:
        disk.remove(directory, "a.j/c/1", "m/c/0/0")
    else:
        (directory / "a.j/c/1").unlink()
        shutil.rmtree(directory / "m/c")
    assert load_or_refusal(tmp_path / "c")[1]
    with pytest.raises(ocp.errors.ReadError, match="missing"):
        ocp.load(tmp_path / "c")
    theirs, ours = both(tmp_path / "c", None, raise_array_data_missing_error=False)
    assert_same(ours, theirs)
    assert not np.asarray(ours["m"]).any()


def test_load_and_broadcast(saved: Path, mesh8: Mesh) -> None:
    """B5.8: the same arrays in the same places; what is not on devices is loaded as ever."""
    abstract = {
        "a": {
            "j": jax.ShapeDtypeStruct((8,), np.float32, sharding=NamedSharding(mesh8, P("y"))),
            "n": np.ndarray,
        },
        "l": [0, 0.0, False],
        "m": jax.ShapeDtypeStruct((4, 3), np.float32, sharding=NamedSharding(mesh8, P())),
    }
    theirs, ours = both(saved, abstract, partial=True, use_load_and_broadcast=True)
    assert_same(ours, theirs)
    assert ours["m"].sharding == theirs["m"].sharding
    assert ours["a"]["j"].sharding == theirs["a"]["j"].sharding


@pytest.mark.parametrize("spec", [P("x"), None])
def test_broadcasts_that_both_refuse(saved: Path, mesh8: Mesh, spec: Any) -> None:
    """B5.8: an array that is divided along the replicas' axis, or lies on one device."""
    where = SINGLE if spec is None else NamedSharding(mesh8, spec)
    abstract = {"a": {"j": jax.ShapeDtypeStruct((8,), np.float32, sharding=where)}}
    context, theirs = ocp.Context(), v1.Context()
    for each in (context, theirs):
        each.pytree.loading.partial_load = True
        each.array.loading.use_load_and_broadcast = True
    with theirs:
        assert load_or_refusal(saved, abstract)[1]
    with context, pytest.raises(ocp.errors.ShardingMismatchError):
        ocp.load(saved, abstract)


def test_what_we_load_of_orbax_by_patterns(saved: Path, mesh8: Mesh) -> None:
    """`select` and one sharding for all work with the checkpoints of either library."""
    where = NamedSharding(mesh8, P())
    loaded = ocp.load(saved, select=["a", "!**/n"], sharding=where)
    assert list(loaded) == ["a"] and list(loaded["a"]) == ["j"]
    assert loaded["a"]["j"].sharding == where
    assert loaded["a"]["j"].tolist() == list(range(8))


@pytest.mark.parametrize("writer", WRITERS)
def test_metadata_tells_the_same(tmp_path: Path, mesh8: Mesh, writer: str) -> None:
    """B7.1: both libraries tell the same of a leaf's shape, dtype, chunks and writes."""
    without_bool = state(mesh8) | {"l": [1, 2.5]}
    WRITERS[writer].save(tmp_path / "c", without_bool)
    ours, theirs = ocp.metadata(tmp_path / "c").metadata, v1.metadata(tmp_path / "c").metadata
    for mine, other in ((ours["m"], theirs["m"]), (ours["a"]["j"], theirs["a"]["j"])):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert mine.storage_metadata.chunk_shape == other.storage_metadata.chunk_shape
        assert mine.storage_metadata.write_shape == other.storage_metadata.write_shape
        assert mine.sharding == other.sharding
        assert mine.storage_metadata.nbytes > np.prod(mine.shape)
    assert ours["l"] == theirs["l"] and ours["s"] == theirs["s"]


@pytest.mark.parametrize("writer", WRITERS)
def test_verification_of_either_library(tmp_path: Path, mesh8: Mesh, writer: str) -> None:
    """A whole checkpoint is intact; of Orbax's it says that its arrays have no checksums."""
    WRITERS[writer].save(tmp_path / "c", state(mesh8))
    report = ocp.verify(tmp_path / "c")
    assert report.is_intact, report
    assert len(report.unproven) == (0 if writer == "ours" else 7)
    assert ("without checksums: state['a']['j']" in str(report)) == (writer == "orbax")


def test_orbax_deletes_what_verification_does_not_miss(tmp_path: Path) -> None:
    """A checkpointable that Orbax, or we, deleted is not reported as missing."""
    for name, library in WRITERS.items():
        v1.save_checkpointables(tmp_path / name, {"state": {"a": 1}, "other": {"b": 2}})
        library.delete(tmp_path / name, checkpointable_name="other")
        report = ocp.verify(tmp_path / name)
        assert report.is_intact, report


def test_verification_of_a_flat_checkpoint(tmp_path: Path, mesh8: Mesh) -> None:
    """A flat checkpoint of older versions is verified, too; its leaves have no name before them."""
    import orbax.checkpoint as v0

    tree = {"x": np.arange(1000.0), "y": {"z": np.ones(3)}}
    v0.PyTreeCheckpointer().save(tmp_path / "flat", tree)
    report = ocp.verify(tmp_path / "flat")
    assert report.is_intact, report
    assert report.leaves == 2
    disk.remove(tmp_path / "flat", "y.z/.zarray")
    report = ocp.verify(tmp_path / "flat")
    assert [each.keypath for each in report.damage] == ["['y']['z']"]
