"""For each option, the tests that show its effect; and docs/parity.md, which says what has one.

An option that is added needs a line here, and a test that fails without its effect.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from surfaces import spelled

import orbax_async as ocp
from orbax_async.options._group import OptionGroup

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "parity.md"

# Below tests/: file, test.
EFFECTS: dict[str, list[str]] = {
    "pytree.saving.pytree_metadata_options.support_rich_types": [
        "test_saving_options.py::test_rich_types_come_back",
        "interop/test_saving_options_of_orbax.py::test_rich_types_are_recorded_and_loaded_alike",
    ],
    "pytree.loading.partial_load": [
        "test_loading_options.py::test_partial_loads_leave_out_what_is_not_asked_for",
        "interop/test_loading_options_of_orbax.py::test_partial_loads",
    ],
    "array.saving.storage_options.dtype": [
        "test_saving_options.py::test_the_cast_happens_to_what_is_written_alone",
        "interop/test_saving_options_of_orbax.py::test_casts_are_those_of_orbax",
    ],
    "array.saving.storage_options.chunk_byte_size": [
        "test_saving_options.py::test_chunks_divide_pieces_and_respect_the_limit",
        "interop/test_saving_options_of_orbax.py::test_chunks_are_those_of_orbax",
    ],
    "array.saving.storage_options.shard_axes": [
        "interop/test_saving_options_of_orbax.py::test_chunks_are_those_of_orbax",
    ],
    "array.saving.scoped_storage_options_creator": [
        "test_saving_options.py::test_the_creator_sees_the_users_own_leaves",
        "interop/test_saving_options_of_orbax.py::test_scoped_options_win_field_by_field",
    ],
    "array.saving.use_ocdbt": ["interop/test_formats.py::test_storage_switches"],
    "array.saving.use_zarr3": ["interop/test_formats.py::test_storage_switches"],
    "array.saving.use_compression": ["interop/test_formats.py::test_storage_switches"],
    "array.saving.compression_min_saving": [
        "interop/test_formats.py::test_compression_min_saving",
    ],
    "array.saving.ocdbt_target_data_file_size": [
        "interop/test_formats.py::test_target_data_file_size",
        "interop/test_saving_options_of_orbax.py::test_a_chunk_fits_into_a_data_file",
    ],
    "array.saving.enable_pinned_host_transfer": [
        "test_pipeline.py::test_i3_pinned_host_transfers",
    ],
    "array.saving.enable_post_merge_validation": [
        "test_saving_options.py::test_validation_finds_what_a_merge_has_lost",
    ],
    "array.saving.use_replica_parallel": ["interop/test_formats.py::test_replica_parallel"],
    "array.saving.min_slice_bytes_for_replica_parallel": [
        "interop/test_formats.py::test_replica_parallel",
    ],
    "array.saving.max_replicas_for_replica_parallel": [
        "interop/test_formats.py::test_replica_parallel",
    ],
    "array.saving.enable_replica_parallel_separate_folder": [
        "test_saving_options.py::test_shared_writes_go_to_a_folder_of_their_own",
        "multiprocess/test_two_processes.py::test_shared_writes_have_folders_of_their_own",
    ],
    "array.saving.enable_write_sharding_file": [
        "interop/test_formats.py::test_without_sharding_file",
    ],
    "array.saving.array_metadata_store": ["interop/test_formats.py::test_without_array_metadatas"],
    "array.loading.enable_padding_and_truncation": [
        "test_loading_options.py::test_arrays_are_padded_and_cut",
        "interop/test_loading_options_of_orbax.py::test_padding_and_truncation",
    ],
    "array.loading.raise_array_data_missing_error": [
        "test_loading_options.py::test_missing_data_is_an_error_or_zeros",
        "interop/test_loading_options_of_orbax.py::test_missing_data",
    ],
    "array.loading.use_load_and_broadcast": [
        "test_loading_options.py::test_one_replica_reads_and_sends_to_the_others",
        "interop/test_loading_options_of_orbax.py::test_load_and_broadcast",
    ],
    "array.loading.load_and_broadcast_options.replica_axis_index": [
        "test_loading_options.py::test_the_primary_replica_is_the_one_that_reads",
    ],
    "array.loading.load_and_broadcast_options.primary_replica_id": [
        "test_loading_options.py::test_the_primary_replica_is_the_one_that_reads",
    ],
    "array.loading.load_and_broadcast_options.broadcast_memory_limit_bytes": [
        "test_loading_options.py::test_broadcasts_stay_below_their_limit",
    ],
    "array.loading.load_and_broadcast_options.broadcast_memory_scaling_factor": [
        "test_loading_options.py::test_broadcasts_leave_a_share_of_free_memory",
    ],
    "asynchronous.timeout_secs": [
        "test_background_options.py::test_a_save_that_takes_too_long_is_undone"
    ],
    "asynchronous.post_finalization_callback": [
        "test_background_options.py::test_w26_the_finalization_callback_is_called_after_the_commit",
    ],
    "asynchronous.create_directories_asynchronously": [
        "test_background_options.py::test_directories_can_be_created_before_the_call_returns",
        "test_background_options.py::test_b8_7_directories_are_created_in_the_background",
    ],
    "asynchronous.staging": ["test_response.py::test_a_lazy_save_returns_at_once"],
    "asynchronous.exit_grace_secs": [
        "test_loop.py::test_i11_a_save_that_outlasts_its_grace_is_undone_and_told_of",
    ],
    "multiprocessing.primary_host": [
        "multiprocess/test_two_processes.py::test_another_process_can_be_the_primary",
    ],
    "multiprocessing.active_processes": [
        "multiprocess/test_processes.py::test_the_prefix_and_the_group_come_from_the_options",
        "multiprocess/test_two_processes.py::"
        "test_what_one_process_does_alone_leaves_the_others_in_step",
    ],
    "multiprocessing.barrier_sync_key_prefix": [
        "multiprocess/test_processes.py::test_the_prefix_and_the_group_come_from_the_options",
    ],
    "file.path_permission_mode": [
        "test_background_options.py::test_b8_6_permission_bits_are_those_of_the_root",
        "test_commit_in_place.py::test_permission_bits_are_those_asked_for",
    ],
    "file.path_class": ["test_background_options.py::test_paths_are_made_by_the_path_class"],
    "file.skip_sync_file_validations": [
        "test_background_options.py::test_skipped_validations_are_made_at_the_commit",
    ],
    "file.temporary_path_class": [
        "test_commit_in_place.py::test_the_older_option_chooses_the_mode",
    ],
    "checkpointables.registry": ["test_handlers.py::test_a_custom_handler"],
    "memory.write_concurrent_bytes": ["test_pipeline.py::test_w13_the_write_budget_holds"],
    "memory.read_concurrent_bytes": ["test_pipeline.py::test_w13_the_read_budget_holds"],
    "memory.transfer_concurrent_bytes": ["test_pipeline.py::test_w14_the_transfer_budget_holds"],
    "memory.regulator_options": ["test_saving_memory.py::test_the_limit_follows_measured_memory"],
    "memory.regulator_options.max_memory_limit_gib": [
        "interop/test_saving_options_of_orbax.py::"
        "test_each_parameter_of_the_regulator_acts_as_in_orbax",
    ],
    "memory.regulator_options.profiler": [
        "test_saving_memory.py::test_the_limit_follows_measured_memory",
    ],
    "memory.regulator_options.target_ratio": [
        "interop/test_saving_options_of_orbax.py::"
        "test_each_parameter_of_the_regulator_acts_as_in_orbax",
    ],
    "memory.regulator_options.min_memory_limit_gib": [
        "interop/test_saving_options_of_orbax.py::"
        "test_each_parameter_of_the_regulator_acts_as_in_orbax",
    ],
    "memory.regulator_options.kp": [
        "interop/test_saving_options_of_orbax.py::"
        "test_each_parameter_of_the_regulator_acts_as_in_orbax",
    ],
    "memory.regulator_options.ki": [
        "interop/test_saving_options_of_orbax.py::"
        "test_each_parameter_of_the_regulator_acts_as_in_orbax",
    ],
    "memory.regulator_options.kd": [
        "interop/test_saving_options_of_orbax.py::"
        "test_each_parameter_of_the_regulator_acts_as_in_orbax",
    ],
    "memory.expected_surge_bytes": [
        "test_saving_memory.py::test_a_surge_is_left_free_and_given_back",
    ],
    "memory.is_prioritized_key_fn": [
        "test_pipeline.py::test_w14_prioritized_leaves_are_captured_and_written_first",
    ],
    "memory.serialization_status_callback": [
        "test_saving_memory.py::test_w14_a_callback_is_told_all_of_each_leaf",
        "test_saving_memory.py::test_priorities_order_the_leaves",
    ],
    "memory.deepcopy_host_arrays": [
        "test_pipeline.py::test_host_arrays_are_shared_where_the_caller_says_so",
    ],
    "atomicity.mode": ["test_commit_in_place.py::test_a_save_writes_where_it_will_be_read"],
    "atomicity.allow_legacy_atomic_rename": [
        "test_commit_in_place.py::test_readers_in_the_same_mode_ask_for_the_proof",
    ],
    "safetensors.max_over_read_ratio": [
        "test_safetensors_reading.py::test_options_act_through_the_context"
    ],
    "safetensors.read_chunk_bytes": [
        "test_safetensors_reading.py::test_options_act_through_the_context"
    ],
    "checkpoint_layout": ["test_saving_options.py::test_the_layout_is_found_out_or_asked_for"],
}
# What is refused by name, and the tests that show that.
REFUSED: dict[str, list[str]] = {
    "pathways.checkpointing_impl": [
        "test_saving_options.py::test_pathways_options_are_refused_elsewhere",
    ],
    "deletion.gcs_deletion_options.todelete_full_path": [
        "test_deletion.py::test_moving_instead_of_deleting",
        "test_opening_a_run.py::test_moving_steps_away_is_refused",
    ],
    "safetensors.ignore_load_sharding": [
        "test_safetensors.py::test_an_option_of_older_versions_is_refused",
    ],
}


def options_of(group: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the dot path and the default of every option, also of the regulator's parameters."""
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        value = getattr(group, field.name)
        if isinstance(value, OptionGroup):
            yield from options_of(value, f"{prefix}{field.name}.")
            continue
        yield f"{prefix}{field.name}", value
    if isinstance(group, ocp.options.MemoryOptions):
        for field in dataclasses.fields(ocp.options.MemoryOptions.RegulatorOptions):
            if not field.name.startswith("_"):
                yield f"{prefix}regulator_options.{field.name}", field.default


OPTIONS = dict(options_of(ocp.Context()))


# Programs that tests run, in which options are set.
PROGRAMS = {"multiprocess/test_two_processes.py": "multiprocess/two_process_worker.py"}
# How tests set an option otherwise than by its name.
SPELLINGS = {"atomicity.mode": "COMMIT_FILE"}


@functools.cache
def read(file: str) -> tuple[frozenset[str], str]:
    """The names of the tests of a file, and its source with that of the program it runs."""
    source = next(TESTS.rglob(file)).read_text(encoding="utf-8")
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = {node.name for node in ast.parse(source).body if isinstance(node, functions)}
    program = PROGRAMS.get(file)
    return frozenset(names), source + ((TESTS / program).read_text("utf-8") if program else "")


def test_every_option_has_a_test_of_its_effect() -> None:
    """Or of its refusal; and every line above is of an option."""
    assert not EFFECTS.keys() & REFUSED.keys()
    listed = EFFECTS.keys() | REFUSED.keys()
    assert OPTIONS.keys() - listed == set(), "show their effect, and list the tests above"
    assert listed - OPTIONS.keys() == set(), "there are no such options"


@pytest.mark.parametrize("option", [*EFFECTS, *REFUSED])
def test_the_tests_are_there_and_set_the_option(option: str) -> None:
    """A test that is renamed, or does not use the option any more, fails here."""
    shown_by = (EFFECTS | REFUSED)[option]
    assert shown_by
    for node in shown_by:
        file, _, name = node.partition("::")
        names, source = read(file)
        assert name.startswith("test_") and name in names, node
        word = SPELLINGS.get(option, option.rpartition(".")[2])
        assert word in source, f"{file} never sets {option}"


def page() -> dict[str, tuple[str, str]]:
    """What docs/parity.md says: by option, its default and its status."""
    text = PAGE.read_text(encoding="utf-8").partition("\n## Options\n")[2]
    rows = {}
    for names, default, status in re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \|$", text, re.M):
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in rows, f"{name} is there twice"
            rows[name] = (default.strip("`"), re.split(r"\W", status)[0])
    return rows


def test_the_page_has_every_option_with_its_default_and_status() -> None:
    """`built` and `added` options have a test of their effect, `refused` ones of that."""
    rows = page()
    parameters = {name for name in OPTIONS if name.startswith("memory.regulator_options.")}
    assert rows.keys() == OPTIONS.keys() - parameters
    for name, (default, status) in rows.items():
        assert default == spelled(OPTIONS[name]), name
        assert status in (["refused"] if name in REFUSED else ["built", "added"]), name


def test_the_page_knows_which_options_orbax_has() -> None:
    """`added` are those that Orbax has not; those of its older versions say so."""
    from orbax.checkpoint import v1

    text = PAGE.read_text(encoding="utf-8").partition("\n## Options\n")[2]
    for name, (_, status) in page().items():
        value: object = v1.Context()
        for part in name.split("."):
            value = getattr(value, part, ...)
        (line,) = [
            each
            for each in text.splitlines()
            if each.startswith("|") and f"`{name}`" in each.split(" | ")[0]
        ]
        is_older = "of older Orbax versions" in line
        assert (value is ...) is (status == "added" or is_older), name
