"""Orbax's guide to the Context: options that freeze, are inherited, and reach who needs them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk import codecs
from equality import assert_same
from guide import EITHER

import orbax_async as ocp

GROUPS = (
    "asynchronous",
    "multiprocessing",
    "file",
    "pytree",
    "array",
    "checkpointables",
    "pathways",
    "deletion",
    "memory",
    "safetensors",
)


def params() -> dict[str, Any]:
    """Returns a layer's weight and bias."""
    return {"weight": jnp.arange(12.0).reshape(3, 4) / 3, "bias": jnp.ones((4,))}


@EITHER
def test_groups(library: ModuleType) -> None:
    """Every group of the guide's table is an attribute, and its class an option class."""
    context = library.Context()
    names = {type(getattr(context, group)).__name__ for group in GROUPS}
    assert names == {
        *("AsyncOptions", "MultiprocessingOptions", "FileOptions", "PyTreeOptions"),
        *("ArrayOptions", "CheckpointablesOptions", "PathwaysOptions", "DeletionOptions"),
        *("MemoryOptions", "SafetensorsOptions"),
    }
    assert names <= set(dir(library.options))
    assert context.checkpoint_layout is library.options.CheckpointLayout.ORBAX


@EITHER
def test_a_template_freezes_while_it_is_used(library: ModuleType, tmp_path: Path) -> None:
    """Free to change before and after, refused between, whether or not the block fails."""
    context = library.Context()
    context.asynchronous.timeout_secs = 60
    with context:
        library.save(tmp_path / "c", params())
        with pytest.raises(RuntimeError, match="active"):
            context.asynchronous.timeout_secs = 120
        with pytest.raises(RuntimeError, match="active"):
            context.array.saving.storage_options.dtype = np.float16
    assert context.asynchronous.timeout_secs == 60
    with pytest.raises(ZeroDivisionError), context:
        1 / 0  # noqa: B018
    context.asynchronous.timeout_secs = 120
    assert_same(library.load(tmp_path / "c"), params())


@EITHER
def test_options_reach_functions_and_checkpointers(library: ModuleType, tmp_path: Path) -> None:
    """A block configures functions, an argument a Checkpointer; both write and read by it."""
    context = library.Context()
    context.asynchronous.timeout_secs = 300
    context.asynchronous.create_directories_asynchronously = True
    context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = False
    context.array.saving.use_ocdbt = False
    context.array.loading.enable_padding_and_truncation = True
    context.pytree.loading.partial_load = True
    wanted = {"bias": jax.ShapeDtypeStruct((6,), np.float32, sharding=params()["bias"].sharding)}
    padded = {"bias": jnp.asarray([1.0, 1, 1, 1, 0, 0])}

    with library.training.Checkpointer(tmp_path / "run", context=context) as checkpointer:
        checkpointer.save_checkpointables(0, {"params": params()})
        loaded = checkpointer.load_checkpointables(0, {"params": wanted})["params"]
        assert_same(loaded, padded)
    with context:
        library.save(tmp_path / "free", params())
        assert_same(library.load(tmp_path / "free", wanted), padded)
    for directory in (tmp_path / "run" / "0" / "params", tmp_path / "free" / "state"):
        assert (directory / "weight" / "zarr.json").exists()
        assert "zstd" not in codecs(directory, "weight")
    library.save(tmp_path / "default", params())
    assert (tmp_path / "default" / "state" / "manifest.ocdbt").exists()


@EITHER
def test_a_child_is_a_copy(library: ModuleType) -> None:
    """It begins with what its parent has; functions are shared, and all else is its own."""

    def rule(*_: Any) -> None:
        return None

    parent = library.Context()
    parent.pytree.loading.partial_load = True
    parent.multiprocessing.active_processes = {0}
    parent.array.saving.scoped_storage_options_creator = rule
    child = library.Context(parent)
    assert child.pytree.loading.partial_load is True
    assert child.array.saving.scoped_storage_options_creator is rule
    child.pytree.loading.partial_load = False
    child.multiprocessing.active_processes.add(1)
    parent.asynchronous.timeout_secs = 7
    assert parent.pytree.loading.partial_load is True
    assert parent.multiprocessing.active_processes == {0}
    assert child.asynchronous.timeout_secs == 1200


@EITHER
def test_a_child_of_an_active_parent(library: ModuleType) -> None:
    """The child can be changed; the parent stays frozen, also while the child is active."""
    parent = library.Context()
    parent.asynchronous.timeout_secs = 600
    with parent:
        child = library.Context(parent)
        child.asynchronous.timeout_secs = 300
        for _ in range(2):
            with pytest.raises(RuntimeError):
                parent.asynchronous.timeout_secs = 900
            with child, pytest.raises(RuntimeError):
                parent.asynchronous.timeout_secs = 900
        child.asynchronous.timeout_secs = 30
    assert (parent.asynchronous.timeout_secs, child.asynchronous.timeout_secs) == (600, 30)


@EITHER
def test_a_checkpointer_branches_its_own(library: ModuleType, tmp_path: Path) -> None:
    """Given as an argument or found around it, the context may be changed afterwards."""
    context = library.Context()
    context.array.saving.use_ocdbt = False
    given = library.training.Checkpointer(tmp_path / "given", context=context)
    with context:
        found = library.training.Checkpointer(tmp_path / "found")
    context.array.saving.use_ocdbt = True
    for checkpointer in (given, found):
        with checkpointer:
            checkpointer.save(0, params())
        state = tmp_path / checkpointer.directory.name / "0" / "state"
        assert (state / "weight").is_dir()
        assert not (state / "manifest.ocdbt").exists()


@EITHER
def test_storage_rules_for_leaves(library: ModuleType, tmp_path: Path) -> None:
    """A rule chosen by key path goes before the rule for all, and None leaves it to that."""

    def rule(keypath: Any, _: Any) -> Any:
        if "weight" in jax.tree_util.keystr(keypath):
            return library.options.ArrayOptions.Saving.StorageOptions(dtype=jnp.float16)
        return None

    context = library.Context()
    context.array.saving.storage_options.dtype = jnp.bfloat16
    context.array.saving.scoped_storage_options_creator = rule
    with context:
        library.save(tmp_path / "c", {"params": params()})
    loaded = library.load(tmp_path / "c")["params"]
    expected = {"weight": jnp.float16, "bias": jnp.bfloat16}
    assert_same(loaded, {name: leaf.astype(expected[name]) for name, leaf in params().items()})


@EITHER
def test_a_registry_of_one_context(library: ModuleType, tmp_path: Path) -> None:
    """A handler for one name, known only inside of the context that holds its registry."""
    registry = library.handlers.local_registry()
    registry.add(library.handlers.JsonHandler, checkpointable_name="notes")
    context = library.Context()
    context.checkpointables.registry = registry
    notes = {"text": "free form", "list": [1, None]}
    with context:
        library.save_checkpointables(tmp_path / "c", {"notes": notes, "state": params()})
    library.save_checkpointables(tmp_path / "default", {"notes": {"text": "a tree"}})
    assert (tmp_path / "c" / "notes" / "data.json").exists()
    assert (tmp_path / "default" / "notes" / "_METADATA").exists()
    assert library.load_checkpointables(tmp_path / "c", {"notes": None}) == {"notes": notes}
    assert not library.handlers.global_registry().has("notes")


@EITHER
def test_saving_in_the_background_of_a_block(library: ModuleType, tmp_path: Path) -> None:
    """A save goes on by its options after its block was left."""
    context = library.Context()
    context.array.saving.use_ocdbt = False
    with context:
        response = library.save_async(tmp_path / "c", params())
    response.result()
    assert (tmp_path / "c" / "state" / "weight").is_dir()
    assert_same(library.load(tmp_path / "c"), params())


@EITHER
def test_an_agreed_prefix(library: ModuleType, tmp_path: Path) -> None:
    """What all processes have to set alike can be set for one."""
    context = library.Context()
    context.multiprocessing.barrier_sync_key_prefix = "run_7"
    context.multiprocessing.primary_host = 0
    with context:
        library.save(tmp_path / "c", params())
    assert_same(library.load(tmp_path / "c"), params())


@EITHER
def test_actors_with_contexts_of_their_own(library: ModuleType, tmp_path: Path) -> None:
    """Nested blocks do not add up: each begins from the defaults, or from its parent."""
    outer, inner = library.Context(), library.Context()
    outer.array.saving.use_ocdbt = False
    with outer:
        with inner:
            library.save(tmp_path / "inner", params())
        with library.Context():
            library.save(tmp_path / "fresh", params())
        library.save(tmp_path / "outer", params())
    manifests = {
        name: (tmp_path / name / "state" / "manifest.ocdbt").exists()
        for name in ("inner", "fresh", "outer")
    }
    assert manifests == {"inner": True, "fresh": True, "outer": False}


@EITHER
def test_functions_beside_a_checkpointer(library: ModuleType, tmp_path: Path) -> None:
    """A block holds for functions, too, after a Checkpointer was used in it.

    In Orbax the Checkpointer's first call ends it (W23), and a block of their own is needed.
    """
    context = library.Context()
    context.array.saving.use_ocdbt = False
    with context, library.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(0, params())
        library.save(tmp_path / "beside", params())
    with context:
        library.save(tmp_path / "own", params())
    manifests = {
        name: (tmp_path / name / "state" / "manifest.ocdbt").exists()
        for name in ("run/0", "beside", "own")
    }
    assert manifests == {"run/0": False, "beside": library is not ocp, "own": False}


@EITHER
def test_tasks_inherit(library: ModuleType, tmp_path: Path) -> None:
    """A task begun in a block has its options, and can't change them."""
    context = library.Context()
    context.array.saving.use_ocdbt = False

    async def child() -> None:
        with pytest.raises(RuntimeError):
            context.array.saving.use_ocdbt = True
        await asyncio.to_thread(library.save, tmp_path / "c", params())

    async def parent() -> None:
        with context:
            await asyncio.create_task(child())

    asyncio.run(parent())
    assert (tmp_path / "c" / "state" / "weight").is_dir()


@EITHER
def test_option_objects_as_arguments(library: ModuleType, tmp_path: Path) -> None:
    """The older spelling: each group as a keyword, copied, beside what the parent has."""
    options = library.options
    array = options.ArrayOptions(saving=options.ArrayOptions.Saving(use_ocdbt=False))
    parent = library.Context()
    parent.asynchronous.timeout_secs = 44
    context = library.Context(
        parent,
        array_options=array,
        pytree_options=options.PyTreeOptions(
            loading=options.PyTreeOptions.Loading(partial_load=True)
        ),
        file_options=options.FileOptions(path_permission_mode=0o750),
        checkpoint_layout=options.CheckpointLayout.ORBAX,
    )
    array.saving.use_ocdbt = True
    assert context.asynchronous.timeout_secs == 44
    assert context.array_options.saving.use_ocdbt is False
    assert context.pytree_options.loading.partial_load is True
    with context:
        library.save(tmp_path / "c", params())
        loaded = library.load(tmp_path / "c", {"bias": np.ndarray})
    assert_same(loaded, {"bias": np.ones(4, np.float32)})
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "c" / "state" / "weight").is_dir()


def test_older_spellings_here(tmp_path: Path) -> None:
    """What older documentation has, and the released package not: ours takes both."""
    handler = ocp.handlers.JsonHandler
    options = ocp.options.CheckpointablesOptions.create_with_handlers(notes=handler())
    context = ocp.Context(checkpoint_layout="Orbax", checkpointables_options=options)
    registry = ocp.handlers.local_registry()
    registry.add(handler, "older")
    assert registry.has("older")
    with context:
        ocp.save_checkpointables(tmp_path / "c", {"notes": {"a": [1]}})
    assert (tmp_path / "c" / "notes" / "data.json").exists()
