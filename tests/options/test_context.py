"""The ambient configuration: shape, inheritance, activation, snapshots, refusals (B6.11, B6.12).

Statements that hold for Orbax too are run against both libraries.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import gc
import inspect
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
from contexts import FROZEN, GROUPS, both, fields_of, groups_of, leaves_of, ours_or_theirs
from orbax.checkpoint import v1 as ocp

from orbax_async import context as context_room
from orbax_async import errors, options, registration
from orbax_async.context import Context, current, refuse_unbuilt, snapshot
from orbax_async.options._group import OptionGroup

KEYWORDS = {name: ("async" if name == "asynchronous" else name) + "_options" for name in GROUPS}


def assign(context: Context, path: str, value: Any) -> None:
    """Sets the option at a dot path."""
    *groups, name = path.split(".")
    owner: Any = context
    for group in groups:
        owner = getattr(owner, group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of older options
        setattr(owner, name, value)


class CommitFileTemporaryPath:
    """Stands for a class of Orbax, which is known by its name."""


# ----------------------------------------------------------------------- the shape of Context


def test_the_signature_is_that_of_orbax() -> None:
    """The same parameters in the same order, of the same kinds, all None by default."""
    ours = inspect.signature(Context).parameters
    theirs = inspect.signature(ocp.Context).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_the_attributes_are_those_of_orbax() -> None:
    """Every public attribute of Orbax's Context is here and leads to a group of the same class."""
    names = [name for name in dir(ocp.Context) if not name.startswith("_")]
    assert len(names) == len(GROUPS) + 11
    for name in names:
        ours, theirs = getattr(Context(), name), getattr(ocp.Context(), name)
        assert type(ours).__qualname__ == type(theirs).__qualname__, name
    assert {name for name in dir(Context()) if not name.startswith("_")} == set(names)


def test_the_older_names_read_the_same_groups() -> None:
    """Each `*_options` attribute is the group itself, not a copy."""
    context = Context()
    for name, alias in KEYWORDS.items():
        if name != "atomicity":
            assert getattr(context, alias) is getattr(context, name)


@both
def test_groups_can_be_configured_but_not_replaced(library: Any) -> None:
    """A group has no setter, so an option object that others hold stays the context's own."""
    context = library()
    for name in GROUPS:
        with pytest.raises(AttributeError, match="has no setter"):
            setattr(context, name, getattr(context, name))
    context.array.saving.use_zarr3 = False
    assert context.array.saving.use_zarr3 is False


@both
def test_keyword_groups_are_copied_and_win_over_the_parent(library: Any) -> None:
    """Later edits of the object passed have no effect; other groups come from the parent."""
    kinds = vars(options if library is Context else ocp.options)
    parent = library()
    parent.asynchronous.timeout_secs = 1
    parent.array.saving.use_ocdbt = False
    passed = kinds["AsyncOptions"](timeout_secs=2)
    child = library(parent, async_options=passed)
    passed.timeout_secs = 3
    assert child.asynchronous.timeout_secs == 2
    assert child.array.saving.use_ocdbt is False


@pytest.mark.parametrize("name", GROUPS)
def test_each_keyword_sets_its_group(name: str) -> None:
    """The keyword of a group replaces that group alone, and takes no other class."""
    path, value = next((p, v) for p, v in ALTERED.items() if p.startswith(f"{name}."))
    donor = Context()
    assign(donor, path, value)
    made = Context(**{KEYWORDS[name]: getattr(donor, name)})
    changed = {p for p, v in leaves_of(made).items() if v != leaves_of(Context())[p]}
    assert changed == {path}
    with pytest.raises(
        TypeError, match=rf"Context\.{name} must be of type {GROUPS[name].__name__}"
    ):
        Context(**{KEYWORDS[name]: OptionGroup()})


def test_the_layout_is_read_and_written_in_any_spelling() -> None:
    """Members and strings, by keyword and by assignment; anything else is a ValueError."""
    context = Context(checkpoint_layout="SafeTensors")
    assert context.checkpoint_layout is options.CheckpointLayout.SAFETENSORS
    context.checkpoint_layout = "auto"
    assert context.checkpoint_layout is options.CheckpointLayout.AUTO
    assert Context(context).checkpoint_layout is options.CheckpointLayout.AUTO
    with pytest.raises(ValueError, match=r"^Context.checkpoint_layout: 'x' is not a valid"):
        context.checkpoint_layout = "x"
    with pytest.raises(ValueError, match="'x' is not a valid CheckpointLayout"):
        Context(checkpoint_layout="x")
    assert context.checkpoint_layout is options.CheckpointLayout.AUTO


@pytest.mark.parametrize("parent", [5, "context", options.ArrayOptions(), ocp.Context()])
def test_only_a_context_can_be_inherited_from(parent: Any) -> None:
    """Anything else is refused with a sentence about what was passed."""
    with pytest.raises(TypeError, match="inherits from another Context, not from"):
        Context(parent)


def test_w35_typo_in_context_attribute_is_refused() -> None:
    """Also on the Context itself, where the name of the group is suggested."""
    context = Context()
    with pytest.raises(AttributeError, match="did you mean 'asynchronous'"):
        context.asyncronous = 1
    with pytest.raises(AttributeError, match=r"it has pytree, array, .*, checkpoint_layout$"):
        context.qqqqq = 1


# ------------------------------------------------------------------------ inheriting, copying


@both
def test_b6_11_a_child_inherits_a_deep_copy(library: Any) -> None:
    """Changes flow neither way, nested groups and sets included; functions are shared."""

    def prioritized(keypath: Any) -> bool:
        return True

    parent = library()
    parent.array.saving.storage_options.chunk_byte_size = 1
    parent.multiprocessing.active_processes = {0}
    parent.memory.is_prioritized_key_fn = prioritized
    child = library(parent)
    assert child.array.loading == parent.array.loading
    assert child.memory.is_prioritized_key_fn is prioritized

    parent.array.saving.storage_options.chunk_byte_size = 2
    child.multiprocessing.active_processes.add(1)
    assert child.array.saving.storage_options.chunk_byte_size == 1
    assert parent.multiprocessing.active_processes == {0}


def _duplicates() -> dict[str, Callable[[Context], Context]]:
    return {
        "child": Context,
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda context: pickle.loads(pickle.dumps(context)),
        "snapshot": snapshot,
    }


@pytest.mark.filterwarnings("ignore:.*temporary_path_class:DeprecationWarning")
@pytest.mark.parametrize("duplicate", _duplicates().values(), ids=_duplicates())
@pytest.mark.parametrize("active", [False, True], ids=["inactive", "active"])
def test_a_copy_has_every_option_and_shares_no_group(
    duplicate: Callable[[Context], Context], active: bool
) -> None:
    """Also of a context that is active: the copy is not, and can be changed."""
    original = Context()
    for path, value in ALTERED.items():
        assign(original, path, value)
    with original if active else contextlib.nullcontext():
        twin = duplicate(original)
        expected = leaves_of(original) | {"checkpointables.registry": None}
        assert leaves_of(twin) | {"checkpointables.registry": None} == expected
        assert not {id(g) for _, g in groups_of(twin)} & {id(g) for _, g in groups_of(original)}
        for _, group, name in fields_of(twin):
            setattr(group, name, getattr(group, name))
        twin.checkpoint_layout = options.CheckpointLayout.ORBAX
    assert original.checkpoint_layout is options.CheckpointLayout.SAFETENSORS


@both
def test_a_new_context_inside_another_starts_from_the_defaults(library: Any) -> None:
    """There is no inheritance unless it is asked for."""
    outer = library()
    outer.array.saving.use_ocdbt = False
    with outer:
        assert library().array.saving.use_ocdbt is True
        assert library(outer).array.saving.use_ocdbt is False


# --------------------------------------------------------------------------------- activating


@both
def test_entering_returns_the_context_and_makes_it_current(library: Any) -> None:
    """Nested contexts hide each other and come back, also when a block raises."""
    outer, inner = library(), library()
    assert ours_or_theirs(library) not in (outer, inner)
    with outer as entered:
        assert entered is outer is ours_or_theirs(library)
        with contextlib.suppress(KeyError), inner:
            assert ours_or_theirs(library) is inner
            raise KeyError
        assert ours_or_theirs(library) is outer
    assert ours_or_theirs(library) is not outer


def test_outside_of_every_context_the_defaults_are_current() -> None:
    """Each time anew, so that changing them changes nothing for others."""
    current().array.saving.use_ocdbt = False
    assert current().array.saving.use_ocdbt is True
    assert leaves_of(current()) == leaves_of(Context())


def test_b6_12_the_active_context_wins_over_a_constructors() -> None:
    """A default is returned only where no context is active."""
    constructor, active = Context(), Context()
    constructor.array.saving.use_ocdbt = False
    assert current(constructor) is constructor
    assert snapshot(constructor).array.saving.use_ocdbt is False
    with active:
        assert current(constructor) is active
        assert snapshot(constructor).array.saving.use_ocdbt is True


def test_leaving_what_was_not_entered_is_refused() -> None:
    """A context can't be unfrozen from outside of its blocks."""
    context = Context()
    with pytest.raises(RuntimeError, match="had not been entered"):
        context.__exit__(None, None, None)
    with context, pytest.raises(RuntimeError, match=FROZEN):
        context.array.saving.use_ocdbt = False


def test_contexts_may_be_left_in_another_order() -> None:
    """The outer one left first, the inner one stays current until it is left too."""
    outer, inner = Context(), Context()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert current() is inner
    outer.array.saving.use_ocdbt = False
    inner.__exit__(None, None, None)
    assert current() is not inner


def test_a_context_may_be_left_elsewhere_than_entered() -> None:
    """Fixtures and generators do: the context thaws, and nothing else on the stack is touched."""
    entered, active = Context(), Context()
    contextvars.copy_context().run(entered.__enter__)
    with active:
        entered.__exit__(None, None, None)
        assert current() is active
    entered.array.saving.use_ocdbt = False


# --------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize("active", [False, True], ids=["inactive", "active"])
def test_i7_a_snapshot_is_out_of_reach(active: bool) -> None:
    """Nothing that is changed in the context afterwards shows in it."""
    context = Context()
    if active:
        with context:
            private = snapshot()
    else:
        private = snapshot(context)
    before = leaves_of(private)
    for path, value in ALTERED.items():
        assign(context, path, value)
    assert leaves_of(private) == before
    assert isinstance(private.checkpointables.registry, registration.HandlerRegistry)
    assert private.checkpointables.registry is not registration.global_registry()


def test_i7_a_snapshot_without_a_context_has_the_defaults() -> None:
    """And belongs to the caller alone."""
    snapshot().array.saving.use_ocdbt = False
    expected = leaves_of(Context())
    registry = expected.pop("checkpointables.registry")
    found = leaves_of(snapshot())
    private = found.pop("checkpointables.registry")
    assert found == expected
    assert private.get_all_entries() == registry.get_all_entries()


def test_a_snapshot_shares_callbacks() -> None:
    """A callback reports to the user's object, not to a copy of it."""
    callback = object()
    context = Context()
    context.memory.serialization_status_callback = callback
    assert snapshot(context).memory.serialization_status_callback is callback


def test_contexts_are_no_garbage_cycles() -> None:
    """A context goes with its last reference, so snapshots do not wait for the collector."""
    gc.disable()
    try:
        with Context() as context:
            reference = weakref.ref(context)
        del context
        assert reference() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------- options without effect

# For each option a value that is not its default, and whether an effect for it exists.
BUILT: dict[str, Any] = {
    "asynchronous.timeout_secs": 5,
    "asynchronous.post_finalization_callback": print,
    "asynchronous.create_directories_asynchronously": False,
    "asynchronous.staging": "lazy",
    "asynchronous.exit_grace_secs": 0,
    "multiprocessing.primary_host": None,
    "multiprocessing.active_processes": {0},
    "multiprocessing.barrier_sync_key_prefix": "run",
    "file.path_permission_mode": 0o750,
    "file.path_class": str,
    "file.skip_sync_file_validations": True,
    "atomicity.mode": options.AtomicityMode.COMMIT_FILE,
    "array.saving.use_ocdbt": False,
    "array.saving.use_zarr3": False,
    "array.saving.use_compression": False,
    "array.saving.compression_min_saving": 0,
    "array.saving.ocdbt_target_data_file_size": 0,
    "array.saving.enable_pinned_host_transfer": True,
    "array.saving.enable_post_merge_validation": False,
    "array.saving.use_replica_parallel": False,
    "array.saving.min_slice_bytes_for_replica_parallel": 1,
    "array.saving.max_replicas_for_replica_parallel": 1,
    "array.saving.enable_write_sharding_file": False,
    "pytree.saving.pytree_metadata_options.support_rich_types": True,
    "array.saving.enable_replica_parallel_separate_folder": True,
    "atomicity.allow_legacy_atomic_rename": True,
    "file.temporary_path_class": CommitFileTemporaryPath,
    "array.saving.storage_options.dtype": "float16",
    "array.saving.storage_options.chunk_byte_size": 1,
    "array.saving.storage_options.shard_axes": (0,),
    "array.saving.scoped_storage_options_creator": print,
    "array.saving.array_metadata_store": None,
    "pytree.loading.partial_load": True,
    "array.loading.enable_padding_and_truncation": True,
    "array.loading.raise_array_data_missing_error": False,
    "array.loading.use_load_and_broadcast": True,
    "array.loading.load_and_broadcast_options.replica_axis_index": 1,
    "array.loading.load_and_broadcast_options.primary_replica_id": None,
    "array.loading.load_and_broadcast_options.broadcast_memory_limit_bytes": 1,
    "array.loading.load_and_broadcast_options.broadcast_memory_scaling_factor": 0.5,
    "checkpointables.registry": registration.HandlerRegistry(),
    "memory.write_concurrent_bytes": 1,
    "memory.read_concurrent_bytes": 1,
    "memory.transfer_concurrent_bytes": 1,
    "memory.is_prioritized_key_fn": print,
    "memory.regulator_options": options.MemoryOptions.RegulatorOptions(
        max_memory_limit_gib=100,
        profiler="profiler",
    ),
    "memory.expected_surge_bytes": 1,
    "memory.serialization_status_callback": "callback",
    "memory.deepcopy_host_arrays": False,
    "deletion.gcs_deletion_options.todelete_full_path": "trash",
    "safetensors.max_over_read_ratio": 1.0,
    "safetensors.read_chunk_bytes": 1,
    "checkpoint_layout": options.CheckpointLayout.SAFETENSORS,
}
UNBUILT: dict[str, Any] = {
    "pathways.checkpointing_impl": options.CheckpointingImpl.PERSISTENCE,
    "safetensors.ignore_load_sharding": True,
}
ALTERED = BUILT | UNBUILT

Operation = Literal["save", "load", "metadata"]
OPERATIONS: tuple[Operation, ...] = ("save", "load", "metadata")


def test_the_tables_above_know_every_option() -> None:
    """An option added later has to be put in one of them."""
    defaults = leaves_of(Context())
    assert set(ALTERED) == set(defaults)
    for path, value in [*BUILT.items(), *UNBUILT.items()]:
        assert value != defaults[path], path


def test_built_options_are_not_refused() -> None:
    """With every option that has an effect changed, each operation may start."""
    context = Context()
    for path, value in BUILT.items():
        assign(context, path, value)
    for operation in OPERATIONS:
        refuse_unbuilt(context, operation=operation)
        refuse_unbuilt(snapshot(context), operation=operation)


@pytest.mark.parametrize("path", UNBUILT)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_option_without_effect_is_refused_by_name(path: str, operation: Operation) -> None:
    """The message names operation, dot path, the value found and the default to leave it at."""
    default = leaves_of(Context())[path]
    context = Context()
    assign(context, path, UNBUILT[path])
    with pytest.raises(errors.UnsupportedOptionError) as refused:
        refuse_unbuilt(snapshot(context), operation=operation)
    assert str(refused.value).startswith(f"{operation} does not start")
    assert str(refused.value).endswith(
        f"context.{path} = {UNBUILT[path]!r}; leave it at its default, {default!r}"
    )


def test_all_options_without_effect_are_named_at_once() -> None:
    """One message lists each of them."""
    context = Context()
    for path, value in UNBUILT.items():
        assign(context, path, value)
    with pytest.raises(errors.UnsupportedOptionError) as refused:
        refuse_unbuilt(context, operation="load")
    assert all(f"context.{path} = " in str(refused.value) for path in UNBUILT)


def test_the_table_of_options_without_effect_is_in_use() -> None:
    """Each path in it leads to an option, and each is covered by the tests above."""
    paths = context_room._UNBUILT
    assert all(any(f"{known}.".startswith(f"{p}.") for known in UNBUILT) for p in paths)
