"""Two real JAX processes with four devices each save, load and fail together."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore as ts
import two_process_worker as worker
from tensor_files import write

import orbax_async as ocp
from orbax_async._commit import leftovers

ROOT = Path(__file__).parents[2]
PATIENCE_SECS = 60  # far above what any scenario takes, and below every wait that has no end


@dataclasses.dataclass
class Outcome:
    """How a scenario ended."""

    folder: Path
    reports: tuple[dict[str, Any] | None, ...]
    returncodes: tuple[int, ...]


def play(scenario: str, folder: Path) -> Outcome:
    """Runs both processes of a scenario to their end; a process that hangs fails the test."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, worker.__file__, scenario]
    outputs = [folder / f"output-{index}.txt" for index in (0, 1)]
    children = []
    try:
        for index, path in enumerate(outputs):
            with path.open("wb") as output:
                children.append(
                    subprocess.Popen(
                        [*program, str(index), str(port), str(folder)],
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        returncodes = tuple(child.wait(PATIENCE_SECS) for child in children)
    except subprocess.TimeoutExpired:
        said = "\n\n".join(f"{path}:\n{path.read_text()}" for path in outputs)
        pytest.fail(f"scenario {scenario!r} does not end\n\n{said}")
    finally:
        for child in children:
            child.kill()
            child.wait()
    reports = []
    for index, path in enumerate(outputs):
        report = folder / f"report-{index}.json"
        reports.append(json.loads(report.read_text()) if report.exists() else None)
        if returncodes[index] > 0:
            pytest.fail(f"process {index} of {scenario!r} failed:\n{path.read_text()}")
    return Outcome(folder / "checkpoints", tuple(reports), returncodes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Both processes have saved and loaded in every way that should work."""
    folder = tmp_path_factory.mktemp("saves")
    ocp.save(folder / "checkpoints" / "seed", {"w": np.ones(3)})
    return play("saves", folder)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Both processes have met one failure after the other."""
    return play("failures", tmp_path_factory.mktemp("failures"))


def stored_keys(directory: Path) -> set[str]:
    """The keys of an OCDBT database."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": directory.as_uri() + "/"}).result()
    return {key.decode() for key in store.list().result()}


def chunk_keys(directory: Path) -> set[str]:
    """The keys that a checkpointable has to hold, from the documents of its arrays."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": directory.as_uri() + "/"}).result()
    expected = set()
    for name in [*worker.values(0), "keys", "numpy", *(f"nested.0.{k}" for k in worker.SCALARS)]:
        document = json.loads(store.read(f"{name}/zarr.json").result().value)
        sides = document["chunk_grid"]["configuration"]["chunk_shape"]
        for length, side in zip(document["shape"], sides, strict=True):
            assert length % side == 0, f"the chunks of {name} overlap its edge"
        counts = [length // side for length, side in zip(document["shape"], sides, strict=True)]
        for index in itertools.product(*map(range, counts)):
            expected.add("/".join([name, "c", *map(str, index)]))
    return expected


# ------------------------------------------------------------------------------- what works


@pytest.mark.parametrize("how", ["same shardings", "other shardings", "saved shardings"])
def test_both_processes_load_what_they_saved(saved: Outcome, how: str) -> None:
    """Every addressable shard holds its bytes, as saved, resharded, and without abstract tree."""
    assert [report[how] for report in saved.reports] == [[], []]


def test_many_leaves_that_are_alike(saved: Outcome) -> None:
    """Each process compiles, for its own devices alone, what puts many small pieces there."""
    assert [report["many"] for report in saved.reports] == [[worker.MANY, True]] * 2


def test_a_save_that_returns_is_visible_to_every_process(saved: Outcome) -> None:
    """No process comes back from a save before the checkpoint is committed."""
    assert [report["visible"] for report in saved.reports] == [True, True]
    assert [report["custom_metadata"] for report in saved.reports] == [{"step": 1}, {"step": 1}]


def test_two_processes_overwrite(saved: Outcome) -> None:
    """With overwrite=True both then load the new values, and the old ones are gone."""
    assert [report["replaced"] for report in saved.reports] == [[], []]


def test_two_saves_in_flight_keep_apart(saved: Outcome) -> None:
    """Saves that were started in the same order and awaited in another hold their own values."""
    assert [report["in flight"] for report in saved.reports] == [[[], []], [[], []]]


def test_plain_files_of_two_processes(saved: Outcome) -> None:
    """Without OCDBT both write into one directory of files."""
    assert [report["files"] for report in saved.reports] == [[], []]
    assert not list((saved.folder / "files").rglob("*ocdbt*"))


def test_shared_writes_have_folders_of_their_own(saved: Outcome) -> None:
    """Each process writes its part of what replicas share, in small chunks, beside its own."""
    assert [report["separate"] for report in saved.reports] == [[], []]
    directory = saved.folder / "separate" / "state"
    for index in (0, 1):
        own = {key.split("/")[0] for key in stored_keys(directory / f"ocdbt.process_{index}")}
        shared = stored_keys(directory / f"ocdbt.process_replica_{index}")
        assert "replicated" in {key.split("/")[0] for key in shared}
        assert not own & {key.split("/")[0] for key in shared}
        assert any(key.startswith("narrow/c/") for key in shared)
    assert len([key for key in chunk_keys(directory) if key.startswith("large/")]) > 8


def test_processes_write_in_place_together(saved: Outcome) -> None:
    """COMMIT_FILE: an overwrite of both processes replaces the checkpoint at its own place."""
    assert [report["in place"] for report in saved.reports] == [[], []]


def test_parts_of_two_processes_become_one_checkpoint(saved: Outcome) -> None:
    """Partial saves and their finalization are joint: each process adds what it has of a part."""
    assert [report["parts"] for report in saved.reports] == [[], []]
    for report in saved.reports:
        assert "found in a previous partial save" in report["replaced part"]["text"]
    databases = [each.name for each in (saved.folder / "parts" / "state").glob("ocdbt.process_*")]
    assert sorted(name[:15] for name in databases) == sorted(
        2 * ["ocdbt.process_0", "ocdbt.process_1"]
    )
    assert not list(saved.folder.glob("parts.*"))


def test_another_process_can_be_the_primary(saved: Outcome) -> None:
    """With primary_host = 1 process 1 stores what only one may, and commits."""
    assert [report["led by 1"] for report in saved.reports] == [[], []]
    keys = stored_keys(saved.folder / "led by 1" / "state" / "ocdbt.process_1")
    assert {"numpy/c/0", "numpy/zarr.json", "large/zarr.json"} <= keys


def test_what_one_process_does_alone_leaves_the_others_in_step(saved: Outcome) -> None:
    """Process 0 loads, asks for metadata and saves by itself; the joint saves still meet."""
    for index in (0, 1):
        alone = ocp.load(saved.folder / f"alone {index}", {"local": np.ndarray})
        np.testing.assert_array_equal(alone["local"], np.full(3, index))
    np.testing.assert_array_equal(
        ocp.load(saved.folder / "last", {"w": np.ndarray})["w"], np.arange(16) + 7
    )


def test_host_local_arrays_are_refused(saved: Outcome) -> None:
    """An array of one process's devices, of which each would store its own, is no global leaf."""
    for report in saved.reports:
        assert report["host-local"]["error"] == "UnsupportedLeafError"
        assert "['local']: a host-local jax.Array" in report["host-local"]["text"]


def test_no_temporary_is_left(saved: Outcome) -> None:
    """The saves leave checkpoints only."""
    made = {"seed", "first", "replaced", "flight 4", "flight 5", "files", "led by 1", "last"}
    made |= {"separate", "in place", "parts", "many"}
    assert set(os.listdir(saved.folder)) == made | {"alone 0", "alone 1"}


@pytest.mark.leaves_threads
@pytest.mark.parametrize(
    "name, seed", [("first", 1), ("replaced", 3), ("files", 6), ("separate", 9), ("in place", 11)]
)
def test_one_process_and_stock_orbax_read_it(saved: Outcome, name: str, seed: int) -> None:
    """Bit for bit, as NumPy and on the eight devices of one process, by us and by Orbax."""
    from orbax.checkpoint import v1

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    halves = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    arrays = worker.values(seed)
    as_numpy: dict[str, Any] = {key: np.zeros_like(value) for key, value in arrays.items()}
    on_devices: dict[str, Any] = {
        key: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=halves if key in ("large", "narrow") else spread
        )
        for key, value in arrays.items()
    }
    keys = jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype, sharding=spread)
    others = worker.plain(seed) | {"keys": keys}
    for library in (ocp, v1):
        for abstract in (as_numpy | others, on_devices | others):
            loaded = library.load(saved.folder / name, abstract)
            for key, expected in arrays.items():
                value = np.asarray(loaded[key])
                assert value.dtype == expected.dtype, (library, key)
                assert value.tobytes() == expected.tobytes(), (library, key)
            np.testing.assert_array_equal(
                jax.random.key_data(loaded["keys"]), worker.key_data(seed)
            )
            np.testing.assert_array_equal(loaded["numpy"], others["numpy"])
            assert loaded["nested"] == others["nested"]
            assert loaded["text"] == others["text"]


def test_each_piece_is_written_once(saved: Outcome) -> None:
    """I1: every chunk lies in one process's database, documents in the primary's, nothing twice."""
    directory = saved.folder / "first" / "state"
    by_process = [stored_keys(directory / f"ocdbt.process_{index}") for index in (0, 1)]
    documents = {key for key in by_process[0] if key.endswith("/zarr.json")}
    assert not by_process[0] & by_process[1]
    assert not any(key.endswith("/zarr.json") for key in by_process[1])
    chunks = chunk_keys(directory)
    checksums = {key for keys in by_process for key in keys if "/.checksums/" in key}
    assert (by_process[0] | by_process[1]) - documents - checksums == chunks
    for keys in by_process:  # each where its chunk is
        of_large = {key for key in keys if key.startswith("large/c/")}
        assert {
            f"large/.checksums/{key.removeprefix('large/c/').replace('/', '.')}" for key in of_large
        } == keys & checksums
    for name in ("both_axes", "one_axis", "other_axis", "replicated", "narrow", "large"):
        for index in (0, 1):
            assert any(key.startswith(f"{name}/c/") for key in by_process[index]), (name, index)


def test_the_merged_database_refers_to_those_of_the_processes(saved: Outcome) -> None:
    """The root manifest lists every key, and no array byte is copied into the root database."""
    directory = saved.folder / "first" / "state"
    by_process = [stored_keys(directory / f"ocdbt.process_{index}") for index in (0, 1)]
    assert stored_keys(directory) == by_process[0] | by_process[1]
    root = sum(path.stat().st_size for path in (directory / "d").iterdir())
    pieces = [
        sum(path.stat().st_size for path in (directory / f"ocdbt.process_{index}/d").iterdir())
        for index in (0, 1)
    ]
    assert root < 16_384 < 3_000_000 < min(pieces)
    assert max(pieces) < 1.1 * min(pieces), "one process wrote more than its share"


def test_each_process_syncs_what_it_writes(saved: Outcome) -> None:
    """I5 across machines: TensorStore syncs a process's files before it reports them written."""
    assert [report["syncs"] for report in saved.reports] == [[True], [True]]


# ------------------------------------------------------------------------------ what fails


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    "failure, there, text",
    [
        ("no space", "WriteError", "WriteError: leaf ['w']: cannot be written"),
        ("refused", "UnsupportedLeafError", "UnsupportedLeafError: leaf ['x']: Unsupported leaf"),
        ("cancelled", "OperationCancelledError", "it was cancelled, or ran out of time"),
    ],
)
def test_a_failure_of_one_ends_the_save_on_both(
    failed: Outcome, failure: str, there: str, text: str, culprit: int
) -> None:
    """I8: the culprit raises its own error, the other one is told of it, and nothing is left."""
    reports = [report[f"{failure} on {culprit}"] for report in failed.reports]
    assert reports[culprit]["error"] == there
    assert reports[1 - culprit]["error"] == "MultihostError"
    assert f"process {culprit} failed: {text}" in reports[1 - culprit]["text"]
    for report in reports:
        assert report["left"] == ["good"]
        assert report["next"], "the next save did not store its values"


def test_processes_that_name_different_paths(failed: Outcome) -> None:
    """Both raise an error with both paths, and neither path comes to be."""
    for report in failed.reports:
        seen = report["other path"]
        assert seen["error"] == "MultihostError"
        assert "Directory path mismatch in multi-process save" in seen["text"]
        assert "bad 0 on process 0" in seen["text"] and "bad 1 on process 1" in seen["text"]
        assert seen["left"] == [] and seen["next"]


def test_a_commit_that_fails_fails_on_both(failed: Outcome) -> None:
    """When the primary can't publish, the others don't take the save for committed."""
    primary, other = (report["no commit"] for report in failed.reports)
    assert primary["error"] == "CommitError"
    assert other["error"] == "MultihostError"
    assert "process 0 failed: CommitError: cannot publish" in other["text"]
    assert "No space left on device" in other["text"]
    for report in (primary, other):
        assert report["left"] == ["good"] and report["next"]


def test_a_process_that_does_not_come_is_named(failed: Outcome) -> None:
    """The wait ends in time, names the missing one, and when that one comes it is told."""
    for report in failed.reports:
        assert report["alone"]["error"] == "BarrierTimeoutError"
        assert report["alone"]["missing"] == [1]
        assert "processes [1] did not come" in report["alone"]["text"]
        assert report["in step again"]["left"] == ["good"]
        assert report["in step again"]["next"], "the processes are out of step"


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Both processes have saved several checkpointables together, failed to, and deleted some."""
    return play("checkpointables", tmp_path_factory.mktemp("checkpointables"))


def test_checkpointables_of_two_processes(together: Outcome) -> None:
    """Each process gets its own part of an object that saves itself, and the rest is common."""
    for index, report in enumerate(together.reports):
        assert report["loaded"] == [[], 1 + index, {"lr": 0.5}]
    files = sorted(path.name for path in (together.folder / "all" / "data").iterdir())
    assert files == ["process_0", "process_1"]
    assert (together.folder / "all" / "config" / "data.json").read_text() == '{"lr": 0.5}'


@pytest.mark.parametrize("tier", [1, 2])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_handler_that_fails_on_one_process(together: Outcome, tier: int, culprit: int) -> None:
    """The save ends on both, with what went wrong, and nothing of it is left."""
    for index, report in enumerate(together.reports):
        seen = report[f"tier {tier} on {culprit}"]
        assert seen["error"] == ("OSError" if index == culprit else "MultihostError")
        assert "no tape" in seen["text"]
        assert report["left"] == ["all"]


def test_two_processes_delete(together: Outcome) -> None:
    """Both are told the same: a part and a whole are deleted once, and what is missing is."""
    for report in together.reports:
        assert report["part"] is True
        assert report["rest"] == ["config", "data", "state"]
        assert report["missing"]["error"] == "NothingToDeleteError"
        assert report["allowed"] is False
        assert report["whole"] is True
        assert report["is gone"]
    assert os.listdir(together.folder) == ["all"]


def test_each_process_reads_only_the_tensors_bytes_of_its_devices(tmp_path: Path) -> None:
    """However a safetensors file is divided over two processes, neither reads of the other's."""
    large = worker.values(0)["large"]
    write(tmp_path / "checkpoints" / "m.safetensors", {"large": large})
    outcome = play("tensors", tmp_path)
    halved = 0
    for report in outcome.reports:
        assert report is not None
        assert report.pop("devices") == 8
        for spec, (read, needed) in report.items():
            assert read == needed, spec
            halved += needed == large.nbytes // 2
    assert halved >= 4


def test_a_killed_process_is_named_in_time(tmp_path: Path) -> None:
    """SIGKILL of one process: the other's save ends, names it, and leaves the old checkpoint."""
    outcome = play("killed 1", tmp_path)
    assert outcome.returncodes == (0, -signal.SIGKILL)
    report = outcome.reports[0]
    assert report is not None
    assert report["killed"]["error"] == "BarrierTimeoutError"
    assert report["killed"]["missing"] == [1]
    assert os.listdir(outcome.folder) == ["good"]
    loaded = ocp.load(outcome.folder / "good", {"w": np.ndarray})["w"]
    np.testing.assert_array_equal(loaded, np.arange(16))


def test_a_killed_coordinator_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    """SIGKILL of process 0: jax ends process 1, the old checkpoint stays, the rest is swept."""
    outcome = play("killed 0", tmp_path)
    assert outcome.returncodes[0] == -signal.SIGKILL
    assert outcome.returncodes[1] <= 0
    loaded = ocp.load(outcome.folder / "good", {"w": np.ndarray})["w"]
    np.testing.assert_array_equal(loaded, np.arange(16))
    leftovers.sweep(str(outcome.folder))
    assert os.listdir(outcome.folder) == ["good"]
