"""The weaknesses of Orbax 0.12.8 that were seen, by number: what happens here instead.

Further tests of the same numbers lie with their subjects; `test_wN_` finds them all.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from watched_directory import Fault, before, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine import loop
from orbax_async._storage.local import opened_by


def data_files(checkpoint: Path) -> list[Path]:
    """Returns the files of a checkpoint that hold array data, the largest first."""
    found = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    documents = ("_METADATA", "_sharding", "manifest.ocdbt", "process_0", "zarr.json", ".zarray")
    found = [path for path in found if path.name not in documents]
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


# W1-W3: asyncio.


async def test_w1_loads_are_asynchronous(tmp_path: Path) -> None:
    """`load_async` loads Orbax's own layout, with and without an abstract tree."""
    state = {"a": jnp.arange(8.0), "b": np.arange(3)}
    await ocp.save_async(tmp_path / "checkpoint", state)
    loaded = await ocp.load_async(tmp_path / "checkpoint")
    assert np.array_equal(loaded["a"], state["a"])
    shape = jax.ShapeDtypeStruct((8,), jnp.float16)
    cast = await ocp.load_async(tmp_path / "checkpoint", {"a": shape, "b": np.ndarray})
    assert cast["a"].dtype == jnp.float16
    context = ocp.Context()
    context.checkpoint_layout = "auto"
    with context:
        assert (await ocp.load_async(tmp_path / "checkpoint"))["b"].tolist() == [0, 1, 2]


async def test_w2_responses_can_be_awaited(tmp_path: Path) -> None:
    """`await` works on every response, of saves and of loads."""
    assert await ocp.save_async(tmp_path / "checkpoint", {"a": 1}) is None
    assert await ocp.load_async(tmp_path / "checkpoint") == {"a": 1}


async def test_w3_the_callers_loop_goes_on(tmp_path: Path) -> None:
    """While a save is under way, other tasks of the caller's loop run; so they do during a load."""
    held = threading.Event()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        for _ in range(20):
            await asyncio.sleep(0)
            ticks += 1
        held.set()

    ticking = asyncio.create_task(tick())
    with opened_by(watched(before(on("sync"), lambda: held.wait(30)))):
        await ocp.save_async(tmp_path / "checkpoint", {"a": np.arange(10)})
    assert ticks == 20  # the save could end only after all of them
    await ticking


def test_w3_a_blocking_verb_works_inside_of_a_running_loop(tmp_path: Path) -> None:
    """`save` and `load` in a coroutine block it, as they say, and neither hang nor nest loops."""

    async def main() -> Any:
        ocp.save(tmp_path / "checkpoint", {"a": 1})
        return ocp.load(tmp_path / "checkpoint")

    assert asyncio.run(main()) == {"a": 1}


# W4-W5: threads, and the end of the process.


def test_w4_dropped_responses_leave_no_threads(tmp_path: Path) -> None:
    """Many responses at once, all of them dropped, start no thread, and their saves commit."""
    ocp.save(tmp_path / "warm", {"a": 1})
    before = threading.active_count()
    peak = before
    for index in range(20):
        ocp.save_async(tmp_path / str(index), {"a": np.arange(100)})
        peak = max(peak, threading.active_count())
    assert peak == before
    gc.collect()
    while loop._current().running:
        threading.Event().wait(0.005)
    assert threading.active_count() == before
    assert all(ocp.is_orbax_checkpoint(tmp_path / str(index)) for index in range(20))


@pytest.mark.parametrize(
    ("ending", "status"),
    [("", 0), ("raise KeyError('the end')", 1), ("sys.exit(3)", 3)],
    ids=["falls off", "raises", "exits"],
)
def test_w5_a_script_that_does_not_wait_commits(ending: str, status: int, tmp_path: Path) -> None:
    """However a script ends after `save_async`, the checkpoint is committed and the status its."""
    script = f"""
    import sys
    import numpy as np
    import orbax_async as ocp
    ocp.save_async({str(tmp_path / "checkpoint")!r}, {{"a": np.arange(1000)}})
    {ending}
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    assert "orbax_async:" not in ended.stderr
    assert ocp.load(tmp_path / "checkpoint")["a"].tolist() == list(range(1000))
    assert os.listdir(tmp_path) == ["checkpoint"]


# W6 and W7, saves at once, are in test_commit_neighbours.py.


# W8: overwriting.


@pytest.mark.parametrize(
    "bad",
    [
        {"state": {"a": object()}},
        {"state": {"a": 1}, "custom_metadata": {"a": object()}},
        {"state": {"a": 1}, "checkpointable_name": "metrics"},
    ],
    ids=["leaf", "custom metadata", "name"],
)
def test_w8_a_failing_overwrite_keeps_the_old_checkpoint(
    bad: dict[str, Any], tmp_path: Path
) -> None:
    """What can't be saved is refused before the old checkpoint is touched."""
    ocp.save(tmp_path / "checkpoint", {"a": 7})
    with pytest.raises((ValueError, TypeError)):
        ocp.save(tmp_path / "checkpoint", overwrite=True, **bad)
    assert ocp.load(tmp_path / "checkpoint") == {"a": 7}
    assert os.listdir(tmp_path) == ["checkpoint"]


# W11-W12: silent corruption.


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": jnp.zeros(3), "a": {"b": jnp.ones(3)}},
        {"a.b": 1, "a": {"b": np.ones(3)}},
        {"a.b": "one", "a": {"b": "two"}},
        {"a": [1, {"c": 2}], "a.1": {"c": 3}},
    ],
    ids=["arrays", "scalar and array", "strings", "lists"],
)
def test_w11_colliding_names_are_refused(state: Any, tmp_path: Path) -> None:
    """Two leaves that the format would store under one name are named, before anything is saved."""
    with pytest.raises(errors.DuplicateLeafError) as caught:
        ocp.save(tmp_path / "checkpoint", state)
    message = str(caught.value)
    assert "['a']" in message
    assert "['a." in message
    assert os.listdir(tmp_path) == []


def test_w11_dots_that_do_not_collide_are_fine(tmp_path: Path) -> None:
    """Keys with dots come back as they were."""
    state = {"a.b": 1, "a": {"c": 2, "b.c": "text"}, ".": 3, "..": {".": 4}}
    ocp.save(tmp_path / "checkpoint", state)
    assert ocp.load(tmp_path / "checkpoint") == state


ENCODINGS = {
    "stored": (np.arange(2000.0), 0.0),
    "raw": (np.random.default_rng(0).random(50_000), 1.0),
    "zstd": (np.random.default_rng(0).integers(0, 4, 50_000) / 3, 0.0),
}


@pytest.mark.parametrize("use_zarr3", [True, False])
@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_w12_flipped_bit_is_detected(
    encoding: str, use_ocdbt: bool, use_zarr3: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    """I12: a bit that flips in stored data, wherever it is, never loads as a wrong value."""
    value, min_saving = ENCODINGS[encoding]
    context = ocp.Context()
    context.array.saving.use_ocdbt = use_ocdbt
    context.array.saving.use_zarr3 = use_zarr3
    context.array.saving.compression_min_saving = min_saving
    final = tmp_path / "checkpoint"
    with context:
        ocp.save(final, {"w": value})
    file = data_files(final)[0]
    pristine = file.read_bytes()
    detected = 0
    for position in rng.integers(0, len(pristine), 25):
        damaged = bytearray(pristine)
        damaged[position] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(damaged)
        try:
            loaded = ocp.load(final)["w"]
        except errors.CheckpointError as error:
            assert "['w']" in str(error) or str(final) in str(error)
            detected += isinstance(error, errors.CorruptDataError)
        else:  # a bit that no reader looks at
            assert np.array_equal(loaded, value)
    assert detected > 0
    file.write_bytes(pristine)
    assert np.array_equal(ocp.load(final)["w"], value)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_w12_a_truncated_file_is_detected(encoding: str, tmp_path: Path) -> None:
    """Data that is cut short is an error that names the leaf, and says that it is damaged."""
    value, min_saving = ENCODINGS[encoding]
    context = ocp.Context()
    context.array.saving.compression_min_saving = min_saving
    with context:
        ocp.save(tmp_path / "checkpoint", {"w": value})
    file = data_files(tmp_path / "checkpoint")[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises((errors.ReadError, errors.InvalidLayoutError), match=r"\['w'\]|damaged"):
        ocp.load(tmp_path / "checkpoint")


# W13 and W14, budgets and priorities, are in test_pipeline.py.


# W15, W22: what a checkpoint says of itself.


def test_w15_metadata_knows_trees_with_bools(tmp_path: Path) -> None:
    """A bool among the leaves costs nothing: every leaf has its metadata."""
    ocp.save(tmp_path / "checkpoint", {"a": True, "b": {"c": jnp.zeros((2, 3))}, "d": 1.5})
    tree = ocp.metadata(tmp_path / "checkpoint").metadata
    assert tree["a"] is False
    assert tree["d"] == 0.0
    assert (tree["b"]["c"].shape, tree["b"]["c"].dtype) == ((2, 3), jnp.float32)
    loaded = ocp.load(tmp_path / "checkpoint", tree)
    assert loaded["a"] is True


def test_w22_only_a_checkpoint_is_a_checkpoint(tmp_path: Path) -> None:
    """`is_orbax_checkpoint` is true for finished checkpoints, and for nothing else."""
    ocp.save(tmp_path / "steps" / "7", {"a": 1})
    assert ocp.is_orbax_checkpoint(tmp_path / "steps" / "7")
    assert ocp.is_orbax_checkpoint(str(tmp_path / "steps" / "7") + "/")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "tensors").mkdir()
    (tmp_path / "tensors" / "model.safetensors").write_bytes(b"")
    unfinished = tmp_path / "8.orbax-checkpoint-tmp"
    (tmp_path / "steps" / "7").rename(unfinished)
    for name in ("missing", "empty", "file", "tensors", "steps", unfinished.name):
        assert not ocp.is_orbax_checkpoint(tmp_path / name), name
    unfinished.rename(tmp_path / "steps" / "7")
    assert not ocp.is_orbax_checkpoint(tmp_path / "steps" / "7" / "state")


# W24: inputs are captured.


def test_w24_inputs_are_captured_by_the_call(tmp_path: Path) -> None:
    """Containers, custom metadata and arrays that change after the call are saved as they were."""
    state: dict[str, Any] = {"a": {"b": np.arange(5)}, "c": [1, 2], "d": bytearray(b"no leaf")}
    del state["d"]
    custom: dict[str, Any] = {"config": {"lr": 0.1, "steps": [1, 2]}}
    response = ocp.save_async(tmp_path / "checkpoint", state, custom_metadata=custom)
    state["a"]["b"][:] = -1
    state["a"]["new"] = 1
    state["c"].append(3)
    del state["a"]["b"]
    custom["config"]["steps"].append(3)
    custom["config"]["lr"] = "changed"
    custom["new"] = 1
    response.result()
    loaded = ocp.load(tmp_path / "checkpoint")
    assert loaded["a"].keys() == {"b"}
    assert loaded["a"]["b"].tolist() == [0, 1, 2, 3, 4]
    assert loaded["c"] == [1, 2]
    saved = ocp.metadata(tmp_path / "checkpoint").custom_metadata
    assert saved == {"config": {"lr": 0.1, "steps": [1, 2]}}


# W26, the finalization callback, is in test_background_options.py.


# W27-W28: validation comes first, and failures leave nothing.


@pytest.mark.parametrize(
    ("custom_metadata", "error", "message"),
    [
        ([1], ValueError, "must be of type <class 'dict'>"),
        ("text", ValueError, "must be of type <class 'dict'>"),
        ({1: 2}, ValueError, "must be of type <class 'str'>"),
        ({"a": object()}, TypeError, "not JSON serializable"),
        ({"a": {"b": np.float32(1)}}, TypeError, "not JSON serializable"),
    ],
    ids=["list", "str", "int key", "object", "NumPy scalar"],
)
def test_w27_bad_custom_metadata_is_refused_by_the_call(
    custom_metadata: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    """Custom metadata that JSON can't hold is refused by the call, before anything is written."""
    with pytest.raises(error, match=message) as caught:
        ocp.save_async(tmp_path / "checkpoint", {"a": 1}, custom_metadata=custom_metadata)
    assert "custom_metadata" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("verb", "nth"), [("make", 1), ("write", 1), ("sync", 1), ("sync", 4)])
def test_w28_a_failure_leaves_no_temporary_directory(verb: str, nth: int, tmp_path: Path) -> None:
    """A save that fails in the background removes what it wrote."""
    fault = Fault(errno.EIO, on(verb), nth=nth)
    with opened_by(watched(fault)), pytest.raises(errors.CommitError, match="Input/output error"):
        ocp.save(tmp_path / "checkpoint", {"a": np.arange(10)})
    assert os.listdir(tmp_path) == []


# W29-W30: leaves.


class TrainState(NamedTuple):
    """A state as trainers have it: a Python int beside arrays."""

    step: Any
    params: Any
    history: Any


def test_w29_the_shape_of_a_state_loads_it(tmp_path: Path) -> None:
    """`jax.eval_shape` of a state with Python scalars and NumPy arrays is a good abstract tree."""
    state = TrainState(7, {"w": jnp.arange(6.0).reshape(2, 3)}, np.arange(3, dtype=np.int32))
    ocp.save(tmp_path / "checkpoint", state)
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
    loaded = ocp.load(tmp_path / "checkpoint", abstract)
    assert isinstance(loaded, TrainState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert int(loaded.step) == 7
    assert loaded.step.dtype == jnp.int32
    assert loaded.history.tolist() == [0, 1, 2]
    assert np.array_equal(loaded.params["w"], state.params["w"])


W30_LEAVES = {
    "bytes": b"\x00\xffbytes",
    "empty bytes": b"",
    "np.float32": np.float32(1.5),
    "np.int64": np.int64(-3),
    "np.uint8": np.uint8(200),
    "np.bool_": np.bool_(True),
    "np.complex64": np.complex64(1 + 2j),
    "complex": 1 - 2j,
    "zero-size": np.zeros((0, 3), np.int16),
    "zero-size jax": jnp.zeros((4, 0)),
    "uint4": jnp.arange(8).astype(jnp.uint4),
    "uint2": np.arange(4).astype(jnp.uint2),
    "float8_e4m3": np.arange(8.0).astype(jnp.float8_e4m3),
}


@pytest.mark.parametrize("kind", W30_LEAVES)
def test_w30_leaves_that_orbax_lacks(kind: str, tmp_path: Path) -> None:
    """Each such leaf comes back with its type, dtype, shape and value."""
    value = W30_LEAVES[kind]
    ocp.save(tmp_path / "checkpoint", {"a": value})
    loaded = ocp.load(tmp_path / "checkpoint")["a"]
    if isinstance(value, jax.Array):
        assert isinstance(loaded, jax.Array)
    else:
        assert type(loaded) is type(value)
    if hasattr(value, "dtype"):
        assert (loaded.dtype, loaded.shape) == (value.dtype, value.shape)
        assert np.array_equal(np.asarray(loaded), np.asarray(value))
    else:
        assert loaded == value


# W36, progress and cancellation, are in test_response.py.


# W37: what arrays are beside their values.


def test_w37_memory_kinds_come_back(tmp_path: Path, mesh8: jax.sharding.Mesh) -> None:
    """An array in pinned host memory is loaded there again, without an abstract tree."""
    single = SingleDeviceSharding(jax.devices()[3], memory_kind="pinned_host")
    spread = NamedSharding(mesh8, PartitionSpec("x", "y"), memory_kind="pinned_host")
    state = {
        "single": jax.device_put(jnp.arange(8.0), single),
        "spread": jax.device_put(jnp.arange(32.0).reshape(8, 4), spread),
        "device": jnp.arange(3.0),
    }
    expected = {key: np.asarray(value) for key, value in state.items()}
    ocp.save(tmp_path / "checkpoint", state)
    loaded = ocp.load(tmp_path / "checkpoint")
    for key, value in state.items():
        assert loaded[key].sharding.memory_kind == value.sharding.memory_kind, key
        assert loaded[key].sharding.device_set == value.sharding.device_set, key
        assert np.array_equal(np.asarray(loaded[key]), expected[key])


def test_w37_weak_types_come_back(tmp_path: Path) -> None:
    """A weakly typed scalar is weakly typed again, and a strongly typed one is not."""
    weak, strong = jnp.asarray(2.5), jnp.asarray(2.5, jnp.float32)
    weak_int = jnp.asarray(3)
    assert weak.weak_type
    assert not strong.weak_type
    ocp.save(tmp_path / "checkpoint", {"weak": weak, "strong": strong, "int": weak_int})
    loaded = ocp.load(tmp_path / "checkpoint")
    assert loaded["weak"].weak_type
    assert loaded["int"].weak_type
    assert not loaded["strong"].weak_type
    assert (loaded["weak"] * jnp.bfloat16(1)).dtype == jnp.bfloat16
    assert float(loaded["weak"]) == float(loaded["strong"]) == 2.5
    assert int(loaded["int"]) == 3


# W43: nothing is narrowed behind one's back.


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_w43_a_jax_array_is_never_narrowed_silently(dtype: str, tmp_path: Path) -> None:
    """With x64 off a 64-bit jax array is refused by key path, and can be had in two other ways."""
    with jax.enable_x64(True):
        value = jnp.asarray(2**40 if "int" in dtype else 1 + 2**-40, dtype)
        ocp.save(tmp_path / "checkpoint", {"a": [value]})
        assert ocp.load(tmp_path / "checkpoint")["a"][0] == value
    with pytest.raises(errors.DtypeMismatchError, match="jax_enable_x64") as caught:
        ocp.load(tmp_path / "checkpoint")
    assert caught.value.keypath == "['a'][0]"
    assert dtype in str(caught.value)
    exact = ocp.load(tmp_path / "checkpoint", {"a": [np.ndarray]})["a"][0]
    assert exact.dtype == dtype
    assert exact == np.asarray(value)
    wanted = {"float64": "float32", "complex128": "complex64"}.get(dtype, "float32")
    cast = ocp.load(tmp_path / "checkpoint", {"a": [jax.ShapeDtypeStruct((), wanted)]})
    assert cast["a"][0].dtype == wanted
