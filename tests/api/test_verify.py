"""Verification: every kind of damage is reported where it is, and nothing else is."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine import plan
from orbax_async._storage.direct import DirectReader
from orbax_async._storage.local import LocalDirectory
from orbax_async.tree.keypath import Key, Selection, pattern_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "ocdbt": {},
    "raw": {"use_compression": False},
    "zstd": {"compression_min_saving": 0},
    "zarr2": {"use_zarr3": False},
    "files": {"use_ocdbt": False},
    "files raw": {"use_ocdbt": False, "use_compression": False},
}


def save(path: Path, state: Any, **options: Any) -> None:
    """Saves a state with options of saving arrays."""
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    with context:
        ocp.save(path, state)


def large(seed: int) -> np.ndarray[Any, Any]:
    """An array that is not stored as one small value."""
    return np.random.default_rng(seed).standard_normal((300, 100)).astype(np.float32)


@pytest.fixture
def state(mesh8: Mesh) -> dict[str, Any]:
    """Leaves of all kinds, large and small."""
    return {
        "params": {"w": large(0), "b": np.arange(50), "v/2": [large(1), np.arange(300)]},
        "sharded": jax.device_put(jnp.asarray(large(2)), NamedSharding(mesh8, P("x"))),
        "key": jax.random.key(0),
        "step": 5,
        "name": "run",
        "empty": {},
        "none": None,
    }


@pytest.fixture
def saved(tmp_path: Path, state: dict[str, Any]) -> Path:
    """A checkpoint of it."""
    save(tmp_path / "c", state)
    return tmp_path / "c"


def found(report: ocp.VerificationReport) -> list[str]:
    """Key paths of damaged leaves, and names of damaged files."""
    return [each.keypath or Path(each.path).name for each in report.damage]


def flip(file: Path, position: int) -> None:
    """Flips one bit."""
    with open(file, "r+b", buffering=0) as opened:
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ 4]))


def location(directory: Path, key: str) -> tuple[Path, int, int]:
    """Where a value lies: its file, offset and length."""
    if not (directory / "manifest.ocdbt").exists():
        return directory / key, 0, (directory / key).stat().st_size
    entry = DirectReader(LocalDirectory(str(directory)))._entries[key]
    assert isinstance(entry, tuple), "it lies in a node of the index"
    path, offset, nbytes = entry
    return directory / path, offset, nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_checkpoint_is_intact(tmp_path: Path, state: dict[str, Any], layout: str) -> None:
    """Nothing is found, everything was read, and every leaf is proven by a checksum."""
    save(tmp_path / "c", state, **LAYOUTS[layout])
    report = ocp.verify(tmp_path / "c")
    assert report.is_intact, report
    assert (report.leaves, report.damage, report.unproven, report.unchecked) == (8, (), (), ())
    assert report.nbytes == 3 * 120_000 + 50 * 8 + 300 * 8 + 8 + 8
    assert report.intact == ("**",)
    assert str(report).startswith(f"{tmp_path / 'c'}: intact (8 leaves, 0.4 MB read in ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_is_found_in_its_leaf(
    tmp_path: Path, state: dict[str, Any], layout: str, rng: np.random.Generator
) -> None:
    """W12: wherever in the data of a leaf it is, also in its checksum, that leaf is named."""
    save(tmp_path / "c", state, **LAYOUTS[layout])
    directory = tmp_path / "c" / "state"
    v2 = layout == "zarr2"
    for key, label in (
        ("params.w/0.0" if v2 else "params.w/c/0/0", "['params']['w']"),
        ("sharded/1.0" if v2 else "sharded/c/1/0", "['sharded']"),
        ("params.v/2.1/0" if v2 else "params.v/2.1/c/0", "['params']['v/2'][1]"),
    ):
        file, offset, nbytes = location(directory, key)
        for position in [*rng.integers(20, nbytes - 8, 5), nbytes - 1]:
            flip(file, offset + int(position))
            report = ocp.verify(tmp_path / "c")
            assert found(report) == [label], position
            flip(file, offset + int(position))
    assert ocp.verify(tmp_path / "c").is_intact


def test_what_is_intact_can_be_loaded(saved: Path, state: dict[str, Any]) -> None:
    """The report's patterns leave out just the damaged leaves, also those with odd names."""
    directory = saved / "state"
    for key in ("params.w/c/0/0", "params.v/2.0/c/0/0"):
        file, offset, _ = location(directory, key)
        flip(file, offset + 100)
    report = ocp.verify(saved)
    assert found(report) == ["['params']['v/2'][0]", "['params']['w']"]
    assert report.intact == ("!params/v?2/0", "!params/w")
    with pytest.raises(errors.CorruptDataError):
        ocp.load(saved)
    loaded = ocp.load(saved, select=report.intact)
    assert np.array_equal(loaded["sharded"], state["sharded"])
    assert loaded["params"]["v/2"][0] is ...
    assert loaded["params"]["v/2"][1].tolist() == list(range(300))
    assert "w" not in loaded["params"]
    assert (loaded["step"], loaded["name"], loaded["empty"], loaded["none"]) == (5, "run", {}, None)


def test_a_pattern_of_a_leaf_selects_it_alone() -> None:
    """Stars and brackets in a key are no wildcards in the pattern that is made of it."""
    keys = [tuple(Key(name, False) for name in path) for path in ("ab", "a*", "a?", "a[", "*b")]
    for each in keys:
        selection = Selection(pattern_of(each))
        assert [selection.has(other) for other in keys] == [other == each for other in keys]


@pytest.mark.parametrize("ocdbt", [True, False])
def test_lost_data_is_found(tmp_path: Path, state: dict[str, Any], ocdbt: bool) -> None:
    """A missing chunk, a missing array document: the leaves are named, with one line each."""
    save(tmp_path / "c", state, use_ocdbt=ocdbt)
    directory = tmp_path / "c" / "state"
    lost = ["sharded/c/2/0", "params.b/zarr.json", "step/c"]
    if ocdbt:
        store = ts.KvStore.open(f"{directory.as_uri()}/|ocdbt:").result()
        for key in lost:
            del store[key]
    else:
        for key in lost:
            (directory / key).unlink()
    report = ocp.verify(tmp_path / "c")
    assert sorted(found(report)) == ["['params']['b']", "['sharded']", "['step']"]
    assert "missing" in str(report)


def test_a_lost_data_file_is_found(tmp_path: Path) -> None:
    """A removed or a truncated data file costs the leaves in it; the index tells which."""
    save(
        tmp_path / "c",
        {name: large(index) for index, name in enumerate("abcdef")},
        use_compression=False,
        ocdbt_target_data_file_size=large(0).nbytes,
    )
    directory = tmp_path / "c" / "state"
    places = {name: location(directory, f"{name}/c/0/0")[0] for name in "abcdef"}
    files = sorted(set(places.values()))
    assert len(files) > 1
    index = {file for file in (directory / "d").iterdir()} - set(files)
    assert index, "the index has no file of its own"
    gone, cut = files[0], files[-1]
    gone.unlink()
    os.truncate(cut, 10)
    expected = [f"['{name}']" for name, file in places.items() if file in (gone, cut)]
    assert sorted(found(ocp.verify(tmp_path / "c"))) == expected


DOCUMENTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "tree": (lambda d: (d / "_METADATA").write_text("{"), ["_METADATA"]),
    "no tree": (lambda d: (d / "_METADATA").unlink(), ["_METADATA"]),
    "shardings": (lambda d: (d / "_sharding").write_text("[]"), ["_sharding"]),
    "records": (
        lambda d: (d / "array_metadatas" / "process_0").write_bytes(b"\xff"),
        ["process_0"],
    ),
    "strings": (lambda d: (d / "_strings.json").write_text("no"), ["_strings.json", "['name']"]),
    "no strings": (lambda d: (d / "_strings.json").unlink(), ["['name']"]),
    "no manifest": (lambda d: (d / "manifest.ocdbt").unlink(), ["manifest.ocdbt"]),
    "checkpoint": (
        lambda d: (d.parent / "_CHECKPOINT_METADATA").write_text("{]"),
        ["_CHECKPOINT_METADATA"],
    ),
    "no checkpoint": (
        lambda d: (d.parent / "_CHECKPOINT_METADATA").unlink(),
        ["_CHECKPOINT_METADATA"],
    ),
    "no directory": (lambda d: shutil.rmtree(d), ["state"]),
    "deletion": (
        lambda d: (d.parent / "_CHECKPOINT_DELETION").write_text("{"),
        ["_CHECKPOINT_DELETION"],
    ),
    "unfinished deletion": (
        lambda d: (d.parent / "_CHECKPOINT_DELETION").write_text('{"checkpointable_name": "x"}'),
        ["x"],
    ),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_damaged_documents_are_found(saved: Path, case: str) -> None:
    """Each document that is damaged or gone is named once, with a hint of its own."""
    damage, expected = DOCUMENTS[case]
    damage(saved / "state")
    report = ocp.verify(saved)
    assert found(report) == expected
    for each in report.damage:
        assert each.problem and str(each) in str(report)
        assert each.hint or case == "deletion"
    assert not report.is_intact


def test_a_damaged_manifest_costs_every_array(saved: Path) -> None:
    """The manifest is named, and all leaves that can't be found without it; strings still load."""
    flip(saved / "state" / "manifest.ocdbt", 40)
    report = ocp.verify(saved)
    assert found(report)[0] == "manifest.ocdbt"
    assert sorted(found(report)[1:]) == sorted(
        [
            *("['params']['w']", "['params']['b']", "['params']['v/2'][0]"),
            *("['params']['v/2'][1]", "['sharded']", "['key']", "['step']"),
        ]
    )
    assert ocp.load(saved, select=report.intact)["name"] == "run"


def test_a_damaged_node_of_the_index_costs_its_leaves(tmp_path: Path) -> None:
    """In an index of several nodes, leaves whose nodes are whole are not reported."""
    save(tmp_path / "c", {f"leaf {index:04}": np.arange(100) + index for index in range(40)})
    directory = tmp_path / "c" / "state"
    # Rewritten with small nodes, so that there are several.
    store = ts.KvStore.open(f"{directory.as_uri()}/|ocdbt:").result()
    values = {key: store.read(key).result().value for key in store.list().result()}
    shutil.rmtree(directory / "d")
    (directory / "manifest.ocdbt").unlink()
    spec = {
        "driver": "ocdbt",
        "base": f"{directory.as_uri()}/",
        "config": {"max_decoded_node_bytes": 3000, "max_inline_value_bytes": 1024},
    }
    again = ts.KvStore.open(spec).result()
    with ts.Transaction(atomic=True) as transaction:
        for key, value in values.items():
            again.with_transaction(transaction)[key] = value
    assert ocp.verify(tmp_path / "c").is_intact
    (data,) = (directory / "d").iterdir()
    flip(data, 300)
    report = ocp.verify(tmp_path / "c")
    assert found(report)[0] == "manifest.ocdbt"
    assert 0 < len(found(report)) - 1 < 40


def test_nonsense_in_an_array_document_is_damage_of_the_leaf(saved: Path) -> None:
    """A document that is JSON, and describes no array that can be, is reported, not raised."""
    store = ts.KvStore.open(f"{(saved / 'state').as_uri()}/|ocdbt:").result()
    whole = json.loads(store.read("params.b/zarr.json").result().value)
    for change in (
        {"chunk_grid": {"name": "odd"}},
        {"data_type": "float99"},
        {"codecs": [{"name": "bytes"}, {"name": "unheard-of"}]},
        {"shape": [60]},
        {"codecs": 5},
        {"zarr_format": 9},
    ):
        store["params.b/zarr.json"] = json.dumps(whole | change).encode()
        assert found(ocp.verify(saved)) == ["['params']['b']"], change
    store["params.b/zarr.json"] = json.dumps(whole).encode()
    assert ocp.verify(saved).is_intact


def test_the_read_budget_holds(tmp_path: Path) -> None:
    """No more is in flight than `read_concurrent_bytes`; a larger chunk goes alone."""
    save(tmp_path / "c", {str(index): large(index) for index in range(12)}, use_compression=False)
    context = ocp.Context()
    context.memory.read_concurrent_bytes = 250_000
    with context:
        response = ocp.verify_async(tmp_path / "c")
    assert response.result().is_intact
    spans = [span for span in response.timeline if span.name == "verify"]
    assert [span.nbytes for span in spans] == [240_000] * 6
    assert all(b.start_secs >= a.end_secs for a, b in itertools.pairwise(spans))


def test_regions_follow_chunks() -> None:
    """An array is divided along its chunks: each element once, small chunks together."""
    for shape, chunks, target in [
        ((10, 7), (3, 2), 1),
        ((10, 7), (3, 2), 10 * 7 * 4),
        ((10, 7), (3, 2), 60),
        ((4,), (100,), 1),
        ((), (), 1),
        ((2, 0), (2, 1), 1),
    ]:
        covered = np.zeros(shape, int)
        regions = list(plan.chunk_regions(shape, chunks, 4, target))
        for region in regions:
            covered[tuple(slice(*axis) for axis in region.box)] += 1
            for (start, _), side in zip(region.box, chunks, strict=True):
                assert start % side == 0
            one = 4 * int(np.prod([min(pair) for pair in zip(shape, chunks, strict=True)]))
            assert region.nbytes <= max(target, one)
        assert (covered == 1).all()


def test_everything_beside_the_state_is_looked_at(tmp_path: Path) -> None:
    """JSON is parsed; what only its own handler knows is listed as not looked into."""

    class Counter:
        async def save(self, directory: Any) -> Any:
            async def write() -> None:
                path = await directory.await_creation()
                (path / "count").write_text("5")

            return write()

        async def load(self, directory: Any) -> Any: ...

    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name="config"
    )
    with context:
        ocp.save_checkpointables(
            tmp_path / "c",
            {"state": {"a": 1}, "other": {"b": large(0)}, "config": [1], "count": Counter()},
        )
    report = ocp.verify(tmp_path / "c")
    assert (report.is_intact, report.leaves, report.unchecked) == (True, 2, ("count",))
    assert "not looked into: count" in str(report)
    (tmp_path / "c" / "config" / "data.json").write_text("[1")
    file, offset, _ = location(tmp_path / "c" / "other", "b/c/0/0")
    flip(file, offset + 50)
    report = ocp.verify(tmp_path / "c")
    assert [(each.checkpointable, each.keypath) for each in report.damage] == [
        ("config", ""),
        ("other", "['b']"),
    ]
    assert "other['b']: " in str(report)
    (tmp_path / "c" / "config" / "data.json").unlink()
    assert found(ocp.verify(tmp_path / "c"))[0] == "data.json"


def test_a_long_report_is_cut(tmp_path: Path) -> None:
    """All damage is in the report; its text shows the first of it and counts the rest."""
    save(tmp_path / "c", {f"{index:02}": np.arange(3) for index in range(50)})
    flip(tmp_path / "c" / "state" / "manifest.ocdbt", 40)
    report = ocp.verify(tmp_path / "c")
    assert len(report.damage) == 51
    lines = str(report).splitlines()
    assert lines[-1] == "  and 31 more"
    assert len(lines) == 1 + 2 * 20 + 1


def test_reports_are_values(saved: Path) -> None:
    """A report and its damage are frozen, comparable and picklable."""
    (saved / "state" / "_sharding").write_text("x")
    report = ocp.verify(saved)
    assert pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(FrozenInstanceError):
        report.damage = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        report.damage[0].hint = ""  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["missing", "file", "other"])
def test_where_no_checkpoint_is_nothing_is_reported(tmp_path: Path, kind: str) -> None:
    """There is nothing to report about what never was a checkpoint."""
    path = tmp_path / "c"
    if kind == "file":
        path.write_text("x")
    elif kind == "other":
        (path / "somewhere").mkdir(parents=True)
    with pytest.raises(errors.InvalidLayoutError):
        ocp.verify(path)


async def test_verification_can_be_awaited(saved: Path) -> None:
    """It does not block the caller's loop, and tells its progress."""
    response = ocp.verify_async(saved)
    report = await response
    assert report.is_intact
    assert response.progress.leaves_planned == 7
    assert response.progress.bytes_written == report.nbytes
