"""Every public call, with the types that a user's program relies on; never run.

`nox -s types` checks this file with mypy in strict mode: a signature or a result that changes its
type fails here.
"""

from __future__ import annotations

import asyncio
import datetime
import pathlib
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import orbax_async as ocp

State = dict[str, Any]


def saving(state: State, folder: pathlib.Path) -> None:
    """Paths of every kind, every argument, and what comes back."""
    ocp.save("run/7", state)
    ocp.save(
        epath.Path(folder),
        state,
        checkpointable_name="state",
        overwrite=True,
        custom_metadata={"loss": 0.5, "tags": ["a", None]},
    )
    response = ocp.save_async(
        "run/8", state, checkpointable_name="state", overwrite=False, custom_metadata=None
    )
    assert_type(response, ocp.AsyncResponse[None])


def several(state: State, iterator: ocp.StatefulCheckpointable) -> None:
    """Several objects in one checkpoint, and parts of it deleted."""
    named: dict[str, Any] = {"state": state, "data": iterator, "config": {"lr": 0.1}}
    ocp.save_checkpointables("run/7", named)
    ocp.save_checkpointables("run/7", named, overwrite=True, custom_metadata={"loss": 0.5})
    response = ocp.save_checkpointables_async("run/8", named)
    assert_type(response, ocp.AsyncResponse[None])
    assert_type(ocp.load_checkpointables("run/7"), dict[str, Any])
    assert_type(ocp.load_checkpointables("run/7", {"data": iterator}), dict[str, Any])
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ocp.load_checkpointables("run/7", select="params/**", sharding=where)
    ocp.load_checkpointables_async(
        "run/7", select={"state": ["params", "!**/bias"]}, sharding={"state": where}
    )
    described = ocp.checkpointables_metadata("run/7")
    assert_type(described, ocp.CheckpointMetadata[dict[str, Any]])
    loading = ocp.load_checkpointables_async("run/7", described)
    assert_type(loading, ocp.AsyncResponse[dict[str, Any]])
    assert_type(ocp.partial.save_async("run/9", {"a": 1}), ocp.AsyncResponse[None])
    assert_type(ocp.partial.finalize_async("run/9"), ocp.AsyncResponse[None])
    assert_type(ocp.delete("run/7"), bool)
    assert_type(ocp.delete("run/7", checkpointable_name="data", missing_ok=True), bool)
    assert_type(ocp.delete_async("run/8", missing_ok=True), ocp.AsyncResponse[bool])
    anything: ocp.Checkpointable = state
    abstract: ocp.AbstractCheckpointable = 5
    del anything, abstract


def loading(abstract: State) -> None:
    """A state is any pytree, so its type is the caller's to know."""
    assert_type(ocp.load("run/7"), Any)
    assert_type(ocp.load("run/7", abstract, checkpointable_name="AUTO"), Any)
    assert_type(ocp.load(epath.Path("run"), checkpointable_name=None), Any)
    response = ocp.load_async("run/7", abstract, checkpointable_name="state")
    assert_type(response, ocp.AsyncResponse[Any])
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert_type(ocp.load("run/7", select="params/*/kernel"), Any)
    assert_type(ocp.load("run/7", abstract, select=["params", "!**/bias"], sharding=where), Any)

    def choose(
        path: tuple[Any, ...], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> jax.sharding.Sharding | None:
        return where if len(path) > 1 and len(shape) == dtype.itemsize else None

    ocp.load_async("run/7", select=lambda path: len(path) > 1, sharding=choose)
    skipped = {"params": ocp.PLACEHOLDER, "step": 0}
    state: State = ocp.load("run/7", skipped)
    del state


def waiting(response: ocp.AsyncResponse[int]) -> None:
    """A response from plain code."""
    assert_type(response.result(), int)
    assert_type(response.result(timeout=1.5), int)
    assert_type(response.exception(timeout=None), BaseException | None)
    response.wait_staged(timeout=1)
    assert_type(response.done(), bool)
    assert_type(response.cancel(), bool)

    def ended(of: ocp.AsyncResponse[int]) -> None:
        assert_type(of.result(), int)

    def succeeded(result: int) -> None:
        del result

    response.add_done_callback(ended)
    response.on_complete(succeeded)


def watching(response: ocp.AsyncResponse[None]) -> None:
    """Progress and timeline are plain numbers."""
    progress = response.progress
    assert_type(progress.leaves_planned, int)
    assert_type(progress.leaves_staged, int)
    assert_type(progress.leaves_written, int)
    assert_type(progress.bytes_planned, int)
    assert_type(progress.bytes_staged, int)
    assert_type(progress.bytes_written, int)
    assert_type(progress.blocked_secs, float)
    assert_type(progress.elapsed_secs, float)
    is_over: bool = progress.phase in ("committed", "failed")
    del is_over
    for span in response.timeline:
        assert_type(span.name, str)
        assert_type(span.end_secs - span.start_secs, float)
        assert_type(span.nbytes, int)


async def awaiting(state: State) -> None:
    """A response from a coroutine."""
    response = ocp.save_async("run/9", state)
    staged: Awaitable[None] = response.staged()
    await staged
    await response
    loaded: State = await ocp.load_async("run/9", state)
    del loaded


def describing() -> None:
    """Metadata, and whether there is a checkpoint."""
    found = ocp.metadata("run/7", checkpointable_name="AUTO")
    assert_type(found, ocp.CheckpointMetadata[Any])
    assert_type(found.path, Any)
    assert_type(found.metadata, Any)
    assert_type(found.init_timestamp_nsecs, int | None)
    assert_type(found.commit_timestamp_nsecs, int | None)
    assert_type(found.init_timestamp, datetime.datetime | None)
    assert_type(found.commit_timestamp, datetime.datetime | None)
    assert_type(found.custom_metadata, dict[str, Any] | None)
    assert_type(found.nbytes, int | None)
    tree: ocp.PyTreeMetadata = found.metadata
    made = ocp.CheckpointMetadata("run/7", metadata={"w": tree}, custom_metadata={})
    assert_type(made.metadata, dict[str, Any])
    ocp.load("run/7", made)
    assert_type(ocp.is_orbax_checkpoint("run/7"), bool)
    assert_type(ocp.is_orbax_checkpoint(pathlib.Path("run")), bool)


async def verifying() -> None:
    """A report, and what it says of each damage."""
    report = ocp.verify("run/7")
    assert_type(report, ocp.VerificationReport)
    assert_type(ocp.verify_async("run/7"), ocp.AsyncResponse[ocp.VerificationReport])
    assert_type(await ocp.verify_async(epath.Path("run/7")), ocp.VerificationReport)
    assert_type(report.damage, tuple[ocp.Damage, ...])
    assert_type(report.is_intact, bool)
    assert_type(report.intact, tuple[str, ...])
    assert_type(report.path, str)
    assert_type(report.leaves + report.nbytes, int)
    assert_type(report.elapsed_secs, float)
    assert_type(report.unproven + report.unchecked, tuple[str, ...])
    for each in report.damage:
        texts: list[str] = [each.checkpointable, each.keypath, each.path, each.problem]
        texts += [each.hint, each.pattern]
    ocp.load("run/7", select=report.intact)


def configuring() -> None:
    """Every group of options by dots, and a context as a block."""
    context = ocp.Context(checkpoint_layout="orbax")
    context = ocp.Context(context, memory_options=ocp.options.MemoryOptions())
    context.asynchronous.staging = "lazy"
    context.asynchronous.timeout_secs = None
    context.asynchronous.exit_grace_secs = 10.0
    context.asynchronous.post_finalization_callback = lambda: None
    context.multiprocessing.primary_host = None
    context.multiprocessing.active_processes = {0, 1}
    context.multiprocessing.barrier_sync_key_prefix = "eval"
    context.file.path_permission_mode = 0o750
    context.file.skip_sync_file_validations = True
    context.atomicity.mode = ocp.options.AtomicityMode.ATOMIC_RENAME
    context.checkpoint_layout = ocp.options.CheckpointLayout.ORBAX
    context.memory.write_concurrent_bytes = 2**30
    context.memory.read_concurrent_bytes = 2**30
    context.memory.transfer_concurrent_bytes = 2**30
    context.memory.is_prioritized_key_fn = _is_parameter
    context.memory.deepcopy_host_arrays = False
    saving = context.array.saving
    assert_type(saving, ocp.options.ArrayOptions.Saving)
    saving.use_ocdbt = False
    saving.use_zarr3 = False
    saving.use_compression = False
    saving.compression_min_saving = 0.2
    saving.use_replica_parallel = True
    saving.enable_pinned_host_transfer = False
    saving.array_metadata_store = None
    saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(dtype=jnp.bfloat16)
    context.array.loading.enable_padding_and_truncation = False
    context.pytree.loading.partial_load = False
    context.pytree.saving.pytree_metadata_options = ocp.options.PyTreeMetadataOptions()
    context.pathways.checkpointing_impl = None
    context.deletion.gcs_deletion_options.todelete_full_path = None
    context.safetensors.read_chunk_bytes = None
    with context as entered:
        assert_type(entered, ocp.Context)


def grouping(context: ocp.Context) -> None:
    """The class of every group, and the groups as arguments, which is the older way."""
    assert_type(context.pytree, ocp.options.PyTreeOptions)
    assert_type(context.array, ocp.options.ArrayOptions)
    assert_type(context.asynchronous, ocp.options.AsyncOptions)
    assert_type(context.multiprocessing, ocp.options.MultiprocessingOptions)
    assert_type(context.file, ocp.options.FileOptions)
    assert_type(context.checkpointables, ocp.options.CheckpointablesOptions)
    assert_type(context.pathways, ocp.options.PathwaysOptions)
    assert_type(context.deletion, ocp.options.DeletionOptions)
    assert_type(context.memory, ocp.options.MemoryOptions)
    assert_type(context.safetensors, ocp.options.SafetensorsOptions)
    assert_type(context.atomicity, ocp.options.AtomicityOptions)
    assert_type(context.checkpoint_layout, ocp.options.CheckpointLayout)
    ocp.Context(
        pytree_options=context.pytree,
        array_options=ocp.options.ArrayOptions(
            saving=ocp.options.ArrayOptions.Saving(
                array_metadata_store=ocp.options.ArrayMetadataStore()
            )
        ),
        async_options=ocp.options.AsyncOptions(timeout_secs=60, staging="eager"),
        checkpointables_options=ocp.options.CheckpointablesOptions.create_with_handlers(
            PointHandler, point=PointHandler()
        ),
        checkpoint_layout=ocp.options.CheckpointLayout.AUTO,
    )
    context.memory.serialization_status_callback = Listener()
    context.memory.regulator_options = ocp.options.MemoryOptions.RegulatorOptions(
        max_memory_limit_gib=64, profiler=Profiler()
    )
    context.pathways.checkpointing_impl = ocp.options.CheckpointingImpl.PERSISTENCE


class Listener:
    """What `serialization_status_callback` asks for."""

    def key_priority(self, keypath: tuple[Any, ...]) -> ocp.options.TransferPriority:
        """Chooses when a leaf is transferred."""
        return ocp.options.TransferPriority.SYNCHRONOUS

    def on_transfer_start(self, keypath: tuple[Any, ...]) -> None:
        """Hears of it."""

    def on_transfer_end(self, keypath: tuple[Any, ...]) -> None:
        """Hears of it."""

    def on_write_start(self, keypath: tuple[Any, ...]) -> None:
        """Hears of it."""

    def on_write_end(self, keypath: tuple[Any, ...]) -> None:
        """Hears of it."""


class Profiler:
    """What `RegulatorOptions` asks for."""

    peak_usage_bytes = 0
    total_memory_gib = 1.0

    def profiler_start(self) -> None:
        """Begins."""

    def profiler_end(self) -> None:
        """Ends."""

    def get_expected_surge_gib(self) -> float:
        """Returns nothing much."""
        return 0.0

    def get_prev_blocking_time_sec(self) -> float:
        """Returns nothing much."""
        return 0.0


def _protocols(listener: Listener, profiler: Profiler) -> None:
    callback: ocp.options.SerializationStatusCallback = listener
    memory: ocp.options.MemoryProfiler = profiler
    del callback, memory


def _is_parameter(keys: tuple[Any, ...]) -> bool:
    return bool(keys) and str(keys[0]) == "['params']"


def abstracting(state: State, array: jax.Array) -> None:
    """Abstract arrays, for `jax.tree.map` and by hand."""
    jax.tree.map(ocp.arrays.to_shape_dtype_struct, state)
    ocp.arrays.to_shape_dtype_struct(array, dtype=jnp.bfloat16, scalar_dtype=int)
    wanted: ocp.arrays.AbstractArray = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    placed: ocp.arrays.AbstractShardedArray = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    del wanted, placed
    stored = ocp.arrays.ArrayMetadata((2, 3), np.dtype(np.float32))
    assert_type(stored.shape, tuple[int, ...])
    assert_type(stored.sharding, jax.sharding.Sharding | None)
    host = ocp.arrays.NumpyMetadata((2,), np.dtype(np.int8), ocp.arrays.StorageMetadata((2,)))
    assert_type(host.dtype, np.dtype[Any])
    values: list[ocp.arrays.ArrayLike] = [array, np.zeros(3)]
    scalars: list[ocp.arrays.Scalar] = [1, 2.0, np.float32(3)]
    abstract: ocp.arrays.AbstractScalar = 0
    path: ocp.path.PathLike = "run/7"
    shape: ocp.arrays.Shape = array.shape
    dtype: ocp.arrays.DType = host.dtype
    del values, scalars, abstract, path, shape, dtype


def trees(state: State, path: ocp.tree.PyTreeKeyPath) -> None:
    """Names for trees and their parts; to a checker a pytree is anything."""
    params: ocp.tree.PyTreeOf[jax.Array] = state["params"]
    merged: ocp.tree.PyTree = ocp.tree.merge(params, {"head": 0}, overwrite=True, is_leaf=callable)
    leaves: list[ocp.tree.Leaf] = [jnp.ones(3), np.zeros(3), 1, "text"]
    asked: list[ocp.tree.AbstractLeaf] = [jax.ShapeDtypeStruct((2,), jnp.float32), 0, ""]
    keys: list[ocp.tree.PyTreeKey] = [*path, jax.tree_util.DictKey("w")]
    document: ocp.tree.JsonType = {"layers": [1, {"dropout": None}]}
    assert_type(merged["head"], Any)
    del leaves, asked, keys, document


def older_names(state: State) -> None:
    """What Orbax has deprecated."""
    ocp.save_pytree("run/7", state)
    assert_type(ocp.save_pytree_async("run/8", state), ocp.AsyncResponse[None])
    assert_type(ocp.load_pytree("run/7"), Any)
    assert_type(ocp.load_pytree_async("run/7"), ocp.AsyncResponse[Any])
    ocp.pytree_metadata("run/7").metadata["params"]


class Point:
    """An object that a handler saves."""

    x: float = 0.0


class PointHandler:
    """A handler by structure: the protocol needs no base class."""

    async def save(
        self, directory: ocp.path.PathAwaitingCreation, checkpointable: Point
    ) -> Awaitable[None]:
        """Captures a point."""
        text = str(checkpointable.x)

        async def write() -> None:
            folder = await directory.await_creation()
            (folder / "point.txt").write_text(text)

        assert_type(directory / "below", ocp.path.PathAwaitingCreation)
        return write()

    async def load(
        self, directory: ocp.path.Path, abstract_checkpointable: Point | None = None
    ) -> Awaitable[Point]:
        """Reads a point."""

        async def read() -> Point:
            point = abstract_checkpointable or Point()
            point.x = float((directory / "point.txt").read_text())
            return point

        return read()

    async def metadata(self, directory: ocp.path.Path) -> Point:
        """Describes a point."""
        return Point()

    def is_handleable(self, checkpointable: Any) -> bool:
        """Says whether it is a point."""
        return isinstance(checkpointable, Point)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Says whether it asks for a point."""
        return isinstance(abstract_checkpointable, Point)


class Counter:
    """An object that saves itself, by structure."""

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Awaitable[None]:
        """Captures nothing."""
        return asyncio.sleep(0)

    async def load(self, directory: ocp.path.Path) -> Awaitable[None]:
        """Reads nothing."""
        return asyncio.sleep(0)


def documents(counter: Counter) -> None:
    """Built-in handlers, and an object that needs none."""
    stateful: ocp.StatefulCheckpointable = counter
    values: ocp.CheckpointableHandler[Any, None] = ocp.handlers.JsonHandler()
    values = ocp.handlers.JsonHandler(filename="config.json")
    messages: ocp.CheckpointableHandler[Any, Any] = ocp.handlers.ProtoHandler("run.pbtxt")
    assert_type(values.is_handleable({"a": 1}), bool)
    assert_type(messages.is_abstract_handleable(dict), bool | None)
    del stateful


def handling() -> None:
    """Handlers and registries."""
    handler: ocp.CheckpointableHandler[Point, Point] = PointHandler()
    registry: ocp.handlers.CheckpointableHandlerRegistry = ocp.handlers.local_registry(
        include_global_registry=False
    )
    registry.add(PointHandler, checkpointable_name="point", secondary_typestrs=["old.Handler"])
    assert_type(registry.has("point"), bool)
    assert_type(registry.get_secondary_typestrs(PointHandler), Sequence[str])
    entries: Sequence[tuple[Any, str | None]] = registry.get_all_entries()
    context = ocp.Context()
    context.checkpointables.registry = registry
    assert_type(ocp.handlers.register_handler(PointHandler), type[PointHandler])
    assert_type(ocp.handlers.global_registry().has("point"), bool)
    trees = ocp.handlers.PyTreeHandler(context=context)
    assert_type(trees.is_handleable({"w": 1}), bool)
    del handler, entries


def a_run(state: State, folder: pathlib.Path) -> None:
    """A Checkpointer from plain code."""
    with ocp.training.Checkpointer(
        folder,
        context=ocp.Context(),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(10),
        preservation_policy=lambda checkpoints, *, context: [True] * len(checkpoints),
        step_name_format=ocp.path.step.standard_name_format(step_prefix="step"),
        custom_metadata={"seed": 1},
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
        logger=None,
        max_saves_in_flight=2,
        supersede_queued=True,
    ) as checkpointer:
        assert_type(checkpointer, ocp.training.Checkpointer)
        assert_type(checkpointer.directory, epath.Path)
        assert_type(checkpointer.checkpoints, Sequence[ocp.training.CheckpointMetadata[None]])
        latest = checkpointer.latest
        assert_type(latest, ocp.training.CheckpointMetadata[None] | None)
        assert_type(checkpointer.should_save(1), bool)
        saved = checkpointer.save(
            1,
            state,
            checkpointable_name="state",
            force=True,
            overwrite=True,
            metrics={"loss": 0.5},
            custom_metadata={"lr": 1e-3},
        )
        assert_type(saved, bool)
        assert_type(checkpointer.save_async(2, state), ocp.AsyncResponse[bool] | None)
        assert_type(checkpointer.save_checkpointables(3, {"a": state}, metrics=1), bool)
        response = checkpointer.save_checkpointables_async(4, {"a": state})
        assert_type(response, ocp.AsyncResponse[bool] | None)
        why = checkpointer.last_decision
        assert_type(why, ocp.training.save_decision_policies.Decision | None)
        assert_type(checkpointer.load(latest, state, checkpointable_name="a"), Any)
        assert_type(checkpointer.load_checkpointables(3, {"a": None}), dict[str, Any])
        assert_type(checkpointer.metadata(), ocp.training.CheckpointMetadata[Any])
        several = checkpointer.checkpointables_metadata(3)
        assert_type(several, ocp.training.CheckpointMetadata[dict[str, Any]])
        assert_type(checkpointer.root_metadata(), ocp.training.RootMetadata)
        assert_type(checkpointer.delete(3, checkpointable_name="a", missing_ok=True), bool)
        assert_type(checkpointer.delete_async(4), ocp.AsyncResponse[bool])
        assert_type(checkpointer.is_saving_in_progress(), bool)
        assert_type(checkpointer.cancel(4), bool)
        checkpointer.reload()
        checkpointer.wait()
        checkpointer.close()


async def an_async_run(state: State) -> None:
    """A Checkpointer from a coroutine, in a job that may be preempted."""
    async with ocp.training.Checkpointer("run") as checkpointer:
        await checkpointer.ready()
        response = checkpointer.save_async(0, state)
        if response is not None:
            assert_type(await response, bool)
        assert_type(await checkpointer.load_async(0, state, checkpointable_name="state"), Any)
        assert_type(await checkpointer.load_checkpointables_async(), dict[str, Any])
        await checkpointer.wait_async()
        await checkpointer.aclose()
    with ocp.training.preemption.watched(signal.SIGTERM, signal.SIGUSR1):
        assert_type(ocp.training.preemption.is_noticed(), bool)
        assert_type(ocp.training.preemption.noticed_at(), float | None)
        assert_type(ocp.training.preemption.reached(3), bool)


async def together() -> None:
    """Several processes."""
    assert_type(ocp.multihost.process_index(), int)
    assert_type(ocp.multihost.process_count(), int)
    assert_type(ocp.multihost.is_primary_host(0), bool)
    assert_type(ocp.multihost.is_pathways_backend(), bool)
    await ocp.multihost.sync_global_processes("evaluated", operation_id="7", timeout=60)


def failing(error: ocp.errors.LeafError, save: Callable[[], None]) -> None:
    """Errors are of our tree, and of the builtin that Orbax raises."""
    assert_type(error.keypath, str)
    assert_type(error.others, tuple[ocp.errors.LeafError, ...])
    try:
        save()
    except ocp.errors.TreeMismatchError as mismatch:
        assert_type(mismatch.mismatches, tuple[str, ...])
    except ocp.errors.BarrierTimeoutError as late:
        assert_type(late.missing, tuple[int, ...])
    except ocp.errors.CheckpointError:
        pass
    value_errors: list[type[ValueError]] = [
        ocp.errors.DestinationExistsError,
        ocp.errors.DtypeMismatchError,
        ocp.errors.DuplicateLeafError,
        ocp.errors.InvalidLayoutError,
        ocp.errors.SaveInProgressError,
        ocp.errors.ShapeMismatchError,
        ocp.errors.TreeMismatchError,
        ocp.errors.UnsupportedLeafError,
    ]
    os_errors: list[type[OSError]] = [
        ocp.errors.CommitError,
        ocp.errors.CorruptDataError,
        ocp.errors.ReadError,
        ocp.errors.WriteError,
    ]
    others: list[type[Exception]] = [
        ocp.errors.AbstractLeafError,
        ocp.errors.LoopError,
        ocp.errors.MultihostError,
        ocp.errors.OperationCancelledError,
        ocp.errors.OperationTimeoutError,
        ocp.errors.StagingError,
        ocp.errors.UnsupportedOptionError,
    ]
    del value_errors, os_errors, others
