"""One of two JAX processes with four devices each: plays a scenario and reports what it saw.

Usage: two_process_worker.py SCENARIO INDEX PORT FOLDER

What the two see goes to FOLDER/report-INDEX.json. The parent imports `values` to know what the
checkpoints must hold.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

Report = dict[str, Any]


def values(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a state: by name, what the whole of each holds."""
    rng = np.random.default_rng(seed)
    return {
        "both_axes": rng.standard_normal((16, 8)).astype(np.float32),
        "one_axis": rng.integers(-9, 9, (8, 6)).astype(np.int32),
        "other_axis": rng.standard_normal((8, 6)).astype(np.float16),
        "replicated": rng.standard_normal((8, 4)).astype(np.float32),
        "odd": rng.standard_normal((7, 5)).astype(np.float32),
        "scalar": np.float32(rng.standard_normal()),
        "empty": np.zeros((0, 3), np.float32),
        "narrow": rng.integers(0, 3, (1024, 1024)).astype(ml_dtypes.bfloat16),
        "large": rng.standard_normal((1536, 1024)).astype(np.float32),
    }


SPECS = {
    "both_axes": ("x", "y"),
    "one_axis": ("x",),
    "other_axis": ("y",),
    "replicated": (),
    "odd": (),
    "scalar": (),
    "empty": (),
    "narrow": ("x",),
    "large": ("x", "y"),
}
RESHARDED = SPECS | {
    "both_axes": (None, "x"),
    "one_axis": (),
    "replicated": ("y", "x"),
    "large": ("y",),
}


SCALARS = ("int", "float", "bool")
MANY = 1_100  # leaves that are alike: enough to be put on each device by compiled code


def plain(seed: int) -> dict[str, Any]:
    """The leaves of a state that are no jax arrays."""
    return {
        "numpy": np.arange(seed, seed + 5),
        "nested": [{"int": seed, "float": 0.5, "bool": True}, None],
        "text": f"seed {seed}",
    }


def key_data(seed: int) -> np.ndarray[Any, Any]:
    """The integers of a state's PRNG keys."""
    return np.arange(16, dtype=np.uint32).reshape(8, 2) + np.uint32(seed)


def _sharding(spec: tuple[Any, ...]) -> Any:
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def _put(value: np.ndarray[Any, Any], spec: tuple[Any, ...]) -> Any:
    import jax

    return jax.make_array_from_callback(
        np.shape(value), _sharding(spec), lambda index: np.asarray(value)[index]
    )


def state(seed: int) -> dict[str, Any]:
    """A state whose arrays lie on the devices of both processes."""
    import jax

    arrays = {name: _put(value, SPECS[name]) for name, value in values(seed).items()}
    return {
        **arrays,
        **plain(seed),
        "keys": jax.random.wrap_key_data(_put(key_data(seed), ("x",))),
    }


def small(seed: int) -> dict[str, Any]:
    """A state that both processes write a piece of."""
    return {"w": _put(np.arange(16, dtype=np.float32) + seed, ("x",))}


def _abstract(specs: dict[str, tuple[Any, ...]], keys_spec: tuple[Any, ...]) -> dict[str, Any]:
    import jax

    tree: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(np.shape(value), value.dtype, sharding=_sharding(specs[name]))
        for name, value in values(0).items()
    }
    key = jax.random.key(0)
    tree["keys"] = jax.ShapeDtypeStruct((8,), key.dtype, sharding=_sharding(keys_spec))
    return {
        **tree,
        "numpy": np.ndarray,
        "nested": [{"int": 0, "float": 0.0, "bool": False}, None],
        "text": "",
    }


def differences(loaded: dict[str, Any], seed: int) -> list[str]:
    """Says where a loaded state is not that of `seed`, shard by shard."""
    import jax

    wrong = []
    expected = values(seed) | {"keys": key_data(seed)}
    for name, whole in expected.items():
        array = jax.random.key_data(loaded[name]) if name == "keys" else loaded[name]
        if len(array.addressable_shards) != 4:
            wrong.append(f"{name} has {len(array.addressable_shards)} shards here")
        wrong += [
            f"{name} on {shard.device}"
            for shard in array.addressable_shards
            if shard.data.dtype != whole.dtype
            or np.asarray(shard.data).tobytes()
            != np.ascontiguousarray(whole[shard.index]).tobytes()
        ]
    for name, value in plain(seed).items():
        same = np.array_equal(loaded[name], value) if name == "numpy" else loaded[name] == value
        wrong += [] if same else [name]
    return wrong


class Meeting:
    """Lets the two processes take their steps together."""

    def __init__(self) -> None:
        self._steps = 0

    def __call__(self) -> None:
        import orbax_async as ocp

        self._steps += 1
        asyncio.run(ocp.multihost.sync_global_processes(f"step {self._steps}", timeout=60))


meet = Meeting()


def _seen(call: Callable[[], object]) -> Report:
    """Reports what a call raises."""
    try:
        call()
    except Exception as error:
        missing = getattr(error, "missing", None)
        return {"error": type(error).__name__, "text": str(error), "missing": missing}
    return {"error": None}


# ------------------------------------------------------------------------------ scenarios


def saves(index: int, folder: Path) -> Report:
    """Saves and loads in every way that should work."""
    import jax

    import orbax_async as ocp
    from orbax_async._storage.array_store import ArrayStore

    report: Report = {}
    if index == 0:
        # What one process does by itself must not bring the others out of step.
        for _ in range(3):
            assert ocp.metadata(folder / "seed").metadata["w"].shape == (3,)
            assert ocp.load(folder / "seed", {"w": np.ndarray})["w"].sum() == 3
    syncs: set[bool] = set()
    begin = ArrayStore.begin

    def begin_and_note(store: ArrayStore) -> Any:
        syncs.add(store._context["file_io_sync"].to_json())
        return begin(store)

    ArrayStore.begin = begin_and_note  # type: ignore[method-assign]
    ocp.save_async(folder / "first", state(1), custom_metadata={"step": 1}).result()
    ArrayStore.begin = begin  # type: ignore[method-assign]
    report["syncs"] = sorted(syncs)
    report["visible"] = (folder / "first" / "commit_success.txt").exists()
    report["same shardings"] = differences(ocp.load(folder / "first", _abstract(SPECS, ("x",))), 1)
    report["other shardings"] = differences(
        ocp.load(folder / "first", _abstract(RESHARDED, ("y",))), 1
    )
    report["saved shardings"] = differences(ocp.load(folder / "first"), 1)
    report["custom_metadata"] = ocp.metadata(folder / "first").custom_metadata

    many = [_put(np.full(8, number, np.float32), ("x",)) for number in range(MANY)]
    ocp.save(folder / "many", many)
    shards = [array.addressable_shards for array in ocp.load(folder / "many", many)]
    report["many"] = [
        len(shards),
        all(np.array_equal(each.data, [i, i]) for i, here in enumerate(shards) for each in here),
    ]

    ocp.save(folder / "replaced", state(2))
    meet()
    ocp.save(folder / "replaced", state(3), overwrite=True)
    report["replaced"] = differences(ocp.load(folder / "replaced"), 3)

    responses = [ocp.save_async(folder / f"flight {seed}", state(seed)) for seed in (4, 5)]
    for response in reversed(responses):
        response.result()
    report["in flight"] = [
        differences(ocp.load(folder / f"flight {seed}"), seed) for seed in (4, 5)
    ]

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(folder / "files", state(6))
    report["files"] = differences(ocp.load(folder / "files"), 6)

    context = ocp.Context()
    context.array.saving.enable_replica_parallel_separate_folder = True
    context.array.saving.storage_options.chunk_byte_size = 500_000
    with context:
        ocp.save(folder / "separate", state(9))
    report["separate"] = differences(ocp.load(folder / "separate"), 9)

    context = ocp.Context()
    context.atomicity.mode = "commit_file"
    with context:
        ocp.save(folder / "in place", state(10))
        meet()
        ocp.save(folder / "in place", state(11), overwrite=True)
        report["in place"] = differences(ocp.load(folder / "in place"), 11)

    whole = state(12)
    first, second = [dict(list(whole.items())[start::2]) for start in (0, 1)]
    ocp.partial.save(folder / "parts", first, custom_metadata={"first": 1})
    adding = ocp.partial.save_async(folder / "parts", second)
    replacing = ocp.partial.save_async(folder / "parts", first)
    finalizing = ocp.partial.finalize_async(folder / "parts")
    adding.result()
    report["replaced part"] = _seen(replacing.result)
    finalizing.result()
    report["parts"] = differences(ocp.load(folder / "parts"), 12)

    context = ocp.Context()
    context.multiprocessing.primary_host = 1
    with context:
        ocp.save(folder / "led by 1", state(8))
    report["led by 1"] = differences(ocp.load(folder / "led by 1"), 8)

    local = {"shared": small(0)["w"], "local": jax.numpy.ones(3)}
    report["host-local"] = _seen(lambda: ocp.save(folder / "local", local))
    meet()
    subset = ocp.Context()
    subset.multiprocessing.active_processes = {index}
    subset.multiprocessing.primary_host = index
    with subset:
        ocp.save(folder / f"alone {index}", {"local": jax.numpy.full(3, index)})
    ocp.save(folder / "last", small(7))
    return report


class Shard:
    """Saves and loads itself; each process has a file of its own, as Grain's iterators do."""

    def __init__(self, index: int, value: int = 0) -> None:
        self.file = f"process_{index}"
        self.value = value

    async def save(self, directory: Any) -> Awaitable[None]:
        """Writes later than any tree does."""

        async def write() -> None:
            path = await directory.await_creation()
            await asyncio.sleep(0.3 * self.value)
            (path / self.file).write_text(str(self.value))

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Reads this process's file."""

        async def read() -> None:
            self.value = int((directory / self.file).read_text())

        return read()


class Faulty(Shard):
    """Fails in a tier, on one process."""

    def __init__(self, index: int, tier: int) -> None:
        super().__init__(index)
        self.tier = tier

    async def save(self, directory: Any) -> Awaitable[None]:
        """Fails in the first tier, or returns what fails in the second."""

        async def write() -> None:
            if self.tier == 2:
                raise OSError("no tape")

        if self.tier == 1:
            raise OSError("no tape")
        return write()


def checkpointables(index: int, folder: Path) -> Report:
    """Saves trees, JSON and objects that save themselves together; fails; deletes."""
    import orbax_async as ocp

    report: Report = {}
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    objects = {
        "config": {"lr": 0.5},
        "state": state(1),
        "small": small(2),
        "data": Shard(index, 1 + index),
    }
    with context:
        ocp.save_checkpointables(folder / "all", objects)
    data = Shard(index)
    loaded = ocp.load_checkpointables(
        folder / "all",
        {"state": _abstract(SPECS, ("x",)), "data": data, "config": None, "small": None},
    )
    report["loaded"] = [differences(loaded["state"], 1), data.value, loaded["config"]]
    for tier in (1, 2):
        for culprit in (0, 1):
            trap = Faulty(index, tier if index == culprit else 0)
            given = {"state": small(3), "trap": trap}
            report[f"tier {tier} on {culprit}"] = _seen(
                lambda given=given: ocp.save_checkpointables(folder / "bad", given)
            )
            meet()
    report["left"] = sorted(path.name for path in folder.iterdir())
    report["part"] = ocp.delete(folder / "all", checkpointable_name="small")
    report["rest"] = sorted(ocp.checkpointables_metadata(folder / "all").metadata)
    meet()
    report["missing"] = _seen(lambda: ocp.delete(folder / "nothing"))
    report["allowed"] = ocp.delete(folder / "nothing", missing_ok=True)
    ocp.save(folder / "gone", small(4))
    report["whole"] = ocp.delete(folder / "gone")
    report["is gone"] = not (folder / "gone").exists()
    return report


def run(index: int, folder: Path) -> Report:
    """A Checkpointer on each process; only the primary's policies have an opinion."""
    from orbax_async import training

    def decides(step: Any, previous_steps: Any, *, context: Any) -> bool:
        return index == 0 and step.step % 2 == 0

    report: Report = {"saved": [], "due": [], "listed": []}
    with training.Checkpointer(
        folder,
        save_decision_policy=decides,
        preservation_policy=training.preservation_policies.LatestN(2),
        max_saves_in_flight=2,
        custom_metadata={"seed": 1},
    ) as checkpointer:
        meet()
        for step in range(9):
            report["due"].append(checkpointer.should_save(step))
            response = checkpointer.save_async(step, small(step), metrics={"loss": step})
            report["saved"].append(response is not None)
        checkpointer.wait()
        report["why"] = str(checkpointer.last_decision)
        report["exists"] = _seen(lambda: checkpointer.save(8, small(0)))
        for culprit in (0, 1):
            trap = Faulty(index, 2 if index == culprit else 0)
            given = {"trap": trap}
            report[f"failed on {culprit}"] = _seen(
                lambda given=given: checkpointer.save_checkpointables(10, given, force=True)
            )
            meet()
        report["forced"] = checkpointer.save(11, small(11), force=True)
        report["skipped"] = checkpointer.save(13, small(13))  # both hear what is left
        report["listed"] = [each.step for each in checkpointer.checkpoints]
        report["metrics"] = [each.metrics for each in checkpointer.checkpoints]
        report["root"] = checkpointer.root_metadata().custom_metadata
        loaded = checkpointer.load(11)["w"].addressable_shards
        right = np.arange(16, dtype=np.float32) + 11
        report["loaded"] = all(np.array_equal(each.data, right[each.index]) for each in loaded)
        report["deleted"] = checkpointer.delete(8)
        meet()
        report["closed"] = [each.step for each in checkpointer.checkpoints]
    meet()
    report["left"] = sorted(os.listdir(folder))
    return report


def failures(index: int, folder: Path) -> Report:
    """Fails in many ways, on one process at a time; each failure must end the save on both."""
    import orbax_async as ocp
    from orbax_async._commit.commits import NameChange
    from orbax_async._engine.save_pipeline import SavePipeline

    report: Report = {}
    fill = SavePipeline._fill
    steps = iter(range(100))

    def save_bad() -> None:
        ocp.save(folder / "bad", small(0))

    def both(name: str, call: Callable[[], object]) -> None:
        """Notes how a save ends, what it leaves, and whether the next one works."""
        report[name] = _seen(call)
        meet()
        report[name]["left"] = sorted(os.listdir(folder))
        meet()
        step = next(steps)
        ocp.save(folder / "good", small(step), overwrite=True)
        loaded = ocp.load(folder / "good")["w"].addressable_shards
        right = np.arange(16, dtype=np.float32) + step
        report[name]["next"] = all(
            np.array_equal(shard.data, right[shard.index]) for shard in loaded
        )

    def with_full_disk(owner: Any, function: str) -> None:
        with mock.patch.object(owner, function, side_effect=OSError(28, "No space left on device")):
            save_bad()

    def cancel(culprit: int) -> None:
        flag = folder.parent / f"cancelled {culprit}"

        def wait_and_fill(*args: Any) -> Any:
            while not flag.exists():
                time.sleep(0.01)
            return fill(*args)

        with mock.patch.object(SavePipeline, "_fill", wait_and_fill):
            response = ocp.save_async(folder / "bad", small(0))
            if index == culprit:
                assert response.cancel()
                flag.touch()
            response.result()

    both("other path", lambda: ocp.save(folder / f"bad {index}", small(0)))
    for culprit in (0, 1):
        is_here = index == culprit
        fails = functools.partial(with_full_disk, SavePipeline, "_fill")
        both(f"no space on {culprit}", fails if is_here else save_bad)
        bad = small(0) | {"x": object() if is_here else 1}
        both(f"refused on {culprit}", functools.partial(ocp.save, folder / "bad", bad))
        both(f"cancelled on {culprit}", functools.partial(cancel, culprit))
    fails = functools.partial(with_full_disk, NameChange, "make")
    both("no commit", fails if index == 0 else save_bad)

    hasty = ocp.Context()
    hasty.asynchronous.timeout_secs = 2.0
    if index == 0:
        with hasty:
            report["alone"] = _seen(lambda: ocp.save(folder / "bad", small(0)))
    meet()
    if index == 1:
        # It was expected, and did not come; it is told so when it does.
        report["alone"] = _seen(lambda: ocp.save(folder / "bad", small(0)))
    both("in step again", lambda: None)
    return report


def killed(index: int, folder: Path, *, victim: int) -> Report:
    """Process `victim` dies in the middle of writing."""
    import orbax_async as ocp
    from orbax_async._engine.save_pipeline import SavePipeline

    ocp.save(folder / "good", small(0))
    if index == victim:
        SavePipeline._fill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    context = ocp.Context()
    context.asynchronous.timeout_secs = 2.0
    with context:
        seen = _seen(lambda: ocp.save(folder / "good", small(1), overwrite=True))
    return {"killed": seen}


def tensors(index: int, folder: Path) -> Report:
    """Both load one safetensors file, each for its own devices."""
    import jax

    import orbax_async as ocp
    from orbax_async._storage import safetensors

    read = 0
    original = safetensors.read_into

    def read_into(file: Any, offset: int, into: memoryview) -> None:
        nonlocal read
        read += len(into)
        original(file, offset, into)

    report: Report = {}
    context = ocp.Context(checkpoint_layout="safetensors")
    context.safetensors.max_over_read_ratio = 1.0
    large = values(0)["large"]
    with mock.patch.object(safetensors, "read_into", read_into), context:
        for spec in ((), ("x",), ("y",), (None, "x"), ("x", "y"), (("y", "x"),)):
            read = 0
            wanted = jax.ShapeDtypeStruct(large.shape, large.dtype, sharding=_sharding(spec))
            loaded = ocp.load(folder / "m.safetensors", {"large": wanted})["large"]
            own = np.zeros(large.shape, bool)
            for shard in loaded.addressable_shards:
                np.testing.assert_array_equal(shard.data, large[shard.index])
                own[shard.index] = True
            report[str(spec)] = (read, int(own.sum()) * large.itemsize)
        loaded = ocp.load(folder / "m.safetensors", ocp.metadata(folder / "m.safetensors"))
        report["devices"] = len(loaded["large"].sharding.device_set)
    return report


SCENARIOS: dict[str, Callable[[int, Path], Report]] = {
    "saves": saves,
    "checkpointables": checkpointables,
    "run": run,
    "tensors": tensors,
    "failures": failures,
    "killed 0": lambda index, folder: killed(index, folder, victim=0),
    "killed 1": lambda index, folder: killed(index, folder, victim=1),
}


def main(scenario: str, index: int, port: str, folder: Path) -> None:
    """Plays one scenario as process `index`."""
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    (folder / "checkpoints").mkdir(exist_ok=True)
    report = SCENARIOS[scenario](index, folder / "checkpoints")
    (folder / f"report-{index}.json").write_text(json.dumps(report))
    if scenario.startswith("killed"):
        os._exit(0)  # leaving in order would wait for the process that is dead
    meet()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
