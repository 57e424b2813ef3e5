"""The option classes: parity with Orbax, checks of names and values, copies."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import math
import pickle
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from orbax_async import options
from orbax_async.options import (
    ArrayMetadataStore,
    ArrayOptions,
    AsyncOptions,
    AtomicityMode,
    AtomicityOptions,
    CheckpointablesOptions,
    CheckpointLayout,
    DeletionOptions,
    FileOptions,
    MemoryOptions,
    MultiprocessingOptions,
    PathwaysOptions,
    PyTreeOptions,
    SafetensorsOptions,
)
from orbax_async.options._group import OptionGroup

# What we have and the newest Orbax has not: additions, and spellings of older releases.
EXTRA = {
    "ArrayOptions.Saving": {"compression_min_saving"},
    "AsyncOptions": {"staging", "exit_grace_secs"},
    "FileOptions": {"temporary_path_class"},
    "SafetensorsOptions": {"ignore_load_sharding"},
}


def _groups() -> list[type[OptionGroup]]:
    """Every option dataclass of ours, nested ones too."""
    found = []
    pending = [vars(options)[name] for name in options.__all__]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type):
            pending += [k for k in vars(kind).values() if isinstance(k, type) and k is not kind]
            if issubclass(kind, OptionGroup):
                found.append(kind)
    return sorted(set(found), key=lambda kind: kind.__qualname__)


GROUPS = _groups()
each_group = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__qualname__)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def _public_fields(kind: type) -> dict[str, Any]:
    fields = dataclasses.fields(kind)
    return {f.name: _default(f) for f in fields if not f.name.startswith("_")}


def _pairs() -> Iterator[tuple[type, type]]:
    """Every option dataclass of Orbax, and the class of the same name here."""
    pending = [
        (theirs, getattr(options, name))
        for name, theirs in vars(ocp.options).items()
        if isinstance(theirs, type) and theirs.__module__.startswith("orbax")
    ]
    while pending:
        theirs, ours = pending.pop()
        yield theirs, ours
        pending += [
            (nested, getattr(ours, name))
            for name, nested in vars(theirs).items()
            if isinstance(nested, type) and nested.__module__ == theirs.__module__
        ]
        if dataclasses.is_dataclass(theirs):
            pending += [
                (type(default), type(_public_fields(ours)[name]))
                for name, default in _public_fields(theirs).items()
                if dataclasses.is_dataclass(default)
            ]


PAIRS = sorted(set(_pairs()), key=lambda pair: pair[1].__qualname__)


def test_the_walk_finds_the_classes_it_should() -> None:
    """The parity tests below would prove nothing if the walk came back empty."""
    names = {ours.__qualname__ for _, ours in PAIRS}
    assert len(names) >= 20
    assert {
        "ArrayOptions.Saving.ScopedStorageOptionsCreator",
        "ArrayOptions.Loading.LoadAndBroadcastOptions",
        "DeletionOptions.GcsDeletionOptions",
        "MemoryOptions.RegulatorOptions",
        "PyTreeMetadataOptions",
        "CheckpointLayout",
    } <= names


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=[o.__qualname__ for _, o in PAIRS])
def test_each_class_has_the_fields_and_defaults_of_orbax(theirs: type, ours: type) -> None:
    """Names, nesting, order, defaults, keyword-only: as in the Orbax that is installed."""
    assert ours.__qualname__ == theirs.__qualname__
    if issubclass(theirs, enum.Enum):
        assert issubclass(ours, enum.Enum)
        assert [(m.name, m.value) for m in ours] == [(m.name, m.value) for m in theirs]
    if not dataclasses.is_dataclass(theirs):
        return
    expected, found = _public_fields(theirs), _public_fields(ours)
    assert [name for name in found if name in expected] == list(expected)
    assert set(found) - set(expected) == EXTRA.get(ours.__qualname__, set())
    assert all(field.kw_only for field in dataclasses.fields(ours))
    for name, default in expected.items():
        assert _same(default, found[name]), f"{name}: Orbax {default!r}, here {found[name]!r}"


def _same(theirs: Any, ours: Any) -> bool:
    match ours:
        case OptionGroup():
            return True  # Compared as a pair of its own.
        case enum.Enum():
            return bool(ours.value == theirs.value)
        case ArrayMetadataStore():
            return type(theirs).__name__ == "Store"
        case options.CheckpointablesOptions | _ if hasattr(ours, "get_all_entries"):
            return "ReadOnly" in type(theirs).__name__ and "ReadOnly" in type(ours).__name__
        case _:
            return type(ours) is type(theirs) and bool(ours == theirs)


def test_enumerations_and_callbacks_are_those_of_orbax() -> None:
    """Names and values of the types that Orbax does not export, found through its options."""
    memory = typing.get_type_hints(ocp.options.MemoryOptions)
    callback = typing.get_args(memory["serialization_status_callback"])[0]
    pathways = typing.get_type_hints(ocp.options.PathwaysOptions)
    for ours, theirs in (
        (options.TransferPriority, typing.get_type_hints(callback.key_priority)["return"]),
        (options.CheckpointingImpl, typing.get_args(pathways["checkpointing_impl"])[0]),
    ):
        assert [(m.name, m.value) for m in ours] == [(m.name, m.value) for m in theirs]
    methods = [name for name in vars(callback) if name.startswith(("key_", "on_"))]
    assert len(methods) == 5
    for name in methods:
        ours = getattr(options.SerializationStatusCallback, name)
        assert _parameters(ours) == _parameters(getattr(callback, name))


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@each_group
def test_groups_compare_by_value_and_take_keywords_only(group: type[OptionGroup]) -> None:
    """Equal when new, different after a change, unhashable, no positional arguments."""
    assert group() == group()
    changed = group()
    field = dataclasses.fields(group)[0].name
    vars(changed)[field] = object()
    assert changed != group()
    with pytest.raises(TypeError, match="unhashable"):
        hash(group())
    with pytest.raises(TypeError, match="positional"):
        group(1)


@each_group
def test_each_option_is_documented(group: type[OptionGroup]) -> None:
    """The docstring of a group has a line for each field, in the order of the fields."""
    lines = (inspect.getdoc(group) or "").partition("Attributes:\n")[2].splitlines()
    documented = [line.split(":")[0].strip() for line in lines if line[:2] == "  " != line[2:4]]
    assert documented == [field.name for field in dataclasses.fields(group)]


@each_group
def test_w35_typo_in_option_is_refused(group: type[OptionGroup]) -> None:
    """A misspelt option names the right one; a wholly unknown one, what there is."""
    instance = group()
    for field in dataclasses.fields(group):
        typo = field.name[:-1]
        with pytest.raises(AttributeError) as refused:
            setattr(instance, typo, field.default)
        assert str(refused.value) == (
            f"{group.__qualname__} has no option {typo!r}; did you mean {field.name!r}?"
        )
        assert not hasattr(instance, typo)
    with pytest.raises(AttributeError, match=f"it has {dataclasses.fields(group)[0].name}"):
        instance.qqqqq = 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'qqqqq'"):
        group(qqqqq=1)


def test_w35_the_example() -> None:
    """The typo that Orbax takes without a word."""
    ocp.Context().array.saving.use_zar3 = True
    with pytest.raises(AttributeError, match="did you mean 'use_zarr3'"):
        ArrayOptions().saving.use_zar3 = True


STORAGE = ArrayOptions.Saving.StorageOptions
BROADCAST = ArrayOptions.Loading.LoadAndBroadcastOptions
REFUSED: list[tuple[type[OptionGroup], str, Any, type[Exception]]] = [
    *((MemoryOptions, f"{verb}_concurrent_bytes", bad, error)
      for verb in ("write", "read", "transfer")
      for bad, error in ((0, ValueError), (-1, ValueError), (0.5, ValueError),
                         (math.nan, ValueError), (math.inf, ValueError),
                         ("1GB", TypeError), (True, TypeError))),
    (MemoryOptions, "expected_surge_bytes", -1, ValueError),
    (MemoryOptions, "is_prioritized_key_fn", "w", TypeError),
    (MemoryOptions, "regulator_options", {"kp": 1}, TypeError),
    (MemoryOptions, "deepcopy_host_arrays", None, TypeError),
    (AsyncOptions, "timeout_secs", "20", TypeError),
    (AsyncOptions, "timeout_secs", True, TypeError),
    (AsyncOptions, "timeout_secs", math.nan, ValueError),
    (AsyncOptions, "timeout_secs", math.inf, ValueError),
    (AsyncOptions, "post_finalization_callback", 5, TypeError),
    (AsyncOptions, "create_directories_asynchronously", "no", TypeError),
    (AsyncOptions, "staging", "eagre", ValueError),
    (AsyncOptions, "staging", None, ValueError),
    (AsyncOptions, "exit_grace_secs", -1, ValueError),
    (AsyncOptions, "exit_grace_secs", None, TypeError),
    (MultiprocessingOptions, "primary_host", -1, ValueError),
    (MultiprocessingOptions, "primary_host", "0", TypeError),
    (MultiprocessingOptions, "active_processes", 3, TypeError),
    (MultiprocessingOptions, "active_processes", "01", TypeError),
    (MultiprocessingOptions, "active_processes", {0, "1"}, TypeError),
    (MultiprocessingOptions, "active_processes", {-1}, ValueError),
    (MultiprocessingOptions, "barrier_sync_key_prefix", 1, TypeError),
    (FileOptions, "path_permission_mode", "750", TypeError),
    (FileOptions, "path_permission_mode", -1, ValueError),
    (FileOptions, "path_class", "Path", TypeError),
    (FileOptions, "temporary_path_class", "Path", TypeError),
    (PyTreeOptions, "saving", PyTreeOptions.Loading(), TypeError),
    (PyTreeOptions.Saving, "pytree_metadata_options", {}, TypeError),
    (ArrayOptions, "saving", None, TypeError),
    (ArrayOptions, "loading", ocp.options.ArrayOptions.Loading(), TypeError),
    (ArrayOptions.Saving, "use_zarr3", None, TypeError),
    (ArrayOptions.Saving, "use_ocdbt", "False", TypeError),
    (ArrayOptions.Saving, "use_replica_parallel", "yes", TypeError),
    (ArrayOptions.Saving, "compression_min_saving", -0.1, ValueError),
    (ArrayOptions.Saving, "ocdbt_target_data_file_size", -1, ValueError),
    (ArrayOptions.Saving, "min_slice_bytes_for_replica_parallel", -1, ValueError),
    (ArrayOptions.Saving, "max_replicas_for_replica_parallel", 0, ValueError),
    (ArrayOptions.Saving, "array_metadata_store", True, TypeError),
    (ArrayOptions.Saving, "scoped_storage_options_creator", STORAGE(), TypeError),
    (STORAGE, "chunk_byte_size", 0, ValueError),
    (STORAGE, "shard_axes", 3, TypeError),
    (STORAGE, "shard_axes", (0, "1"), TypeError),
    (BROADCAST, "primary_replica_id", -1, ValueError),
    (BROADCAST, "broadcast_memory_scaling_factor", "half", TypeError),
    (PathwaysOptions, "checkpointing_impl", 1, TypeError),
    (DeletionOptions.GcsDeletionOptions, "todelete_full_path", 1, TypeError),
    (SafetensorsOptions, "max_over_read_ratio", 0.9, ValueError),
    (SafetensorsOptions, "read_chunk_bytes", 0, ValueError),
    (AtomicityOptions, "mode", "rename", ValueError),
]  # fmt: skip


@pytest.mark.parametrize(
    ("group", "name", "value", "error"),
    REFUSED,
    ids=[f"{group.__qualname__}.{name}={value!r:.20}" for group, name, value, _ in REFUSED],
)
def test_an_impossible_value_is_refused_by_name(
    group: Callable[..., OptionGroup], name: str, value: Any, error: type[Exception]
) -> None:
    """At the assignment and in the constructor; the option keeps what it had."""
    instance = group()
    before = getattr(instance, name)
    with pytest.raises(error, match=name) as refused:
        setattr(instance, name, value)
    assert type(refused.value) is error
    assert getattr(instance, name) is before
    with pytest.raises(error):
        group(**{name: value})


@pytest.mark.parametrize(
    ("group", "name", "value", "kept"),
    [
        (MemoryOptions, "write_concurrent_bytes", 2e9, 2_000_000_000),
        (MemoryOptions, "read_concurrent_bytes", np.int64(7), 7),
        (MemoryOptions, "expected_surge_bytes", math.inf, math.inf),
        (AsyncOptions, "timeout_secs", None, None),
        (AsyncOptions, "timeout_secs", -1, -1),
        (AsyncOptions, "timeout_secs", 0.5, 0.5),
        (AsyncOptions, "staging", "lazy", "lazy"),
        (MultiprocessingOptions, "primary_host", None, None),
        (MultiprocessingOptions, "active_processes", [2, 1, 2], {1, 2}),
        (FileOptions, "path_class", str, str),
        (ArrayOptions.Saving, "use_zarr3", np.False_, False),
        (ArrayOptions.Saving, "use_ocdbt", 0, False),
        (ArrayOptions.Saving, "use_replica_parallel", 1, True),
        (ArrayOptions.Saving, "array_metadata_store", None, None),
        (ArrayOptions.Saving, "ocdbt_target_data_file_size", 0, 0),
        (STORAGE, "shard_axes", [0, 1], (0, 1)),
        (BROADCAST, "replica_axis_index", None, None),
        (AtomicityOptions, "mode", "commit_file", AtomicityMode.COMMIT_FILE),
    ],
)
def test_a_value_is_kept_in_one_spelling(
    group: Callable[..., Any], name: str, value: Any, kept: Any
) -> None:
    """Values that say the same in another type are accepted and stored in the declared type."""
    stored = getattr(group(**{name: value}), name)
    assert stored == kept
    assert type(stored) is type(kept)


def test_a_set_of_processes_stays_the_callers_own() -> None:
    """As in Orbax, a set is held by reference until the options are copied."""
    processes = {0, 1}
    group = MultiprocessingOptions(active_processes=processes)
    assert group.active_processes is processes
    twin = copy.deepcopy(group)
    processes.add(2)
    assert group.active_processes == {0, 1, 2}
    assert twin.active_processes == {0, 1}


def test_layouts_are_accepted_in_both_spellings() -> None:
    """The capitalised strings of the older documentation and the newer lower-case ones."""
    for name in ("orbax", "Orbax", "ORBAX"):
        assert CheckpointLayout(name) is CheckpointLayout.ORBAX
    assert CheckpointLayout("SafeTensors") is CheckpointLayout.SAFETENSORS
    assert CheckpointLayout("Auto") is CheckpointLayout.AUTO
    for junk in ("orbx", None, 1):
        with pytest.raises(ValueError, match="is not a valid CheckpointLayout"):
            CheckpointLayout(junk)


@each_group
def test_deleting_an_option_restores_its_default(group: type[OptionGroup]) -> None:
    """No option can go missing, also none that is a group."""
    instance = group()
    for field in dataclasses.fields(group):
        vars(instance)[field.name] = object()
        delattr(instance, field.name)
    assert instance == group()
    with pytest.raises(AttributeError, match="has no option 'qqqqq'"):
        del instance.qqqqq


def _callback() -> None:
    """A function that pickle finds by its name."""


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda group: pickle.loads(pickle.dumps(group)), OptionGroup._copied],
    ids=["deepcopy", "pickle", "copied"],
)
@each_group
def test_a_copy_is_equal_and_independent(group: type[OptionGroup], duplicate: Any) -> None:
    """No nested group is shared between a group and its copy."""
    original = group()
    twin = duplicate(original)
    assert twin == original
    assert type(twin) is group
    assert not {id(g) for g in _nested(twin)} & {id(g) for g in _nested(original)}


def _nested(group: OptionGroup) -> Iterator[OptionGroup]:
    yield group
    for value in vars(group).values():
        if isinstance(value, OptionGroup):
            yield from _nested(value)


def test_a_copy_shares_functions_and_callbacks() -> None:
    """A callback goes on reporting to the object that the caller holds."""
    callback = object()
    profiler = object()
    memory = MemoryOptions(
        serialization_status_callback=callback,
        is_prioritized_key_fn=_callback,
        regulator_options=MemoryOptions.RegulatorOptions(
            max_memory_limit_gib=100,
            profiler=profiler,
        ),
    )
    twin = copy.deepcopy(memory)
    assert twin.serialization_status_callback is callback
    assert twin.is_prioritized_key_fn is _callback
    assert twin.regulator_options is memory.regulator_options


def test_a_replaced_group_has_the_rest_of_the_values() -> None:
    """`dataclasses.replace` and `dataclasses.asdict` work on groups."""
    changed = dataclasses.replace(AsyncOptions(timeout_secs=5), staging="lazy")
    assert changed == AsyncOptions(timeout_secs=5, staging="lazy")
    assert dataclasses.asdict(ArrayOptions())["saving"]["storage_options"]["dtype"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_memory_limit_gib": 100, "profiler": None},
        {"max_memory_limit_gib": 0, "profiler": 1},
        {"max_memory_limit_gib": 100, "min_memory_limit_gib": 0, "profiler": 1},
        {"max_memory_limit_gib": 12.5, "profiler": 1},
    ],
)
@pytest.mark.parametrize("library", [options, ocp.options], ids=["ours", "orbax"])
def test_a_regulator_refuses_what_that_of_orbax_refuses(library: Any, arguments: Any) -> None:
    """No profiler, no limit, or a first limit above the target."""
    with pytest.raises(ValueError, match=r"profiler|_memory_limit_gib"):
        library.MemoryOptions.RegulatorOptions(**arguments)


def test_a_regulator_is_immutable() -> None:
    """Its state is shared between contexts, so its parameters can't change."""
    regulator = MemoryOptions.RegulatorOptions(max_memory_limit_gib=12.6, profiler=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        regulator.kp = 1.0


def test_the_list_of_names_contains_all_of_orbax() -> None:
    """`options.__all__` has every name that `orbax.checkpoint.v1.options` has."""
    theirs = {
        name
        for name, value in vars(ocp.options).items()
        if isinstance(value, type) and value.__module__.startswith("orbax")
    }
    assert theirs <= set(options.__all__)
    assert CheckpointablesOptions.__name__ in theirs
