"""The freezing of active contexts: rules B6.1 to B6.9 of Orbax, threads, tasks, assigned groups.

Statements that hold for Orbax too are run against both libraries.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from contexts import FROZEN, both, fields_of, groups_of, ours_or_theirs

from orbax_async import options
from orbax_async.context import Context, current, snapshot

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> T:
    """Calls a function in a thread that inherits nothing, and returns or raises what it does."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


# ----------------------------------------------------------------------------------- freezing


@both
def test_b6_1_options_of_an_active_context_are_frozen(library: Any) -> None:
    """At every depth, for plain values and for whole nested groups."""
    context = library()
    with context:
        for group, name, value in (
            (context.array, "saving", context.array.saving),
            (context.array.saving, "use_ocdbt", False),
            (context.array.saving.storage_options, "dtype", "float16"),
            (context.asynchronous, "timeout_secs", 5),
            (context.deletion.gcs_deletion_options, "todelete_full_path", "trash"),
            (context.atomicity, "allow_legacy_atomic_rename", True),
        ):
            with pytest.raises(RuntimeError, match=FROZEN):
                setattr(group, name, value)
    assert context.array.saving.use_ocdbt is True


def test_b6_1_no_option_escapes_the_freeze() -> None:
    """Every field of every group refuses to be set and to be deleted, from any thread."""
    context = Context()

    def check() -> int:
        checked = 0
        for _, group, name in fields_of(context):
            for change in (lambda g=group, n=name: setattr(g, n, getattr(g, n)),
                           lambda g=group, n=name: delattr(g, n)):  # fmt: skip
                with pytest.raises(RuntimeError, match=FROZEN):
                    change()
            checked += 1
        return checked

    with context:
        assert check() == in_thread(check) == len(list(fields_of(context))) > 50
    for _, group, name in fields_of(context):
        setattr(group, name, getattr(group, name))
        delattr(group, name)


@both
def test_b6_2_the_layout_of_an_active_context_is_frozen(library: Any) -> None:
    """With a message of its own, as in Orbax."""
    context = library()
    with context, pytest.raises(RuntimeError, match="Cannot mutate an active Context"):
        context.checkpoint_layout = "auto"
    context.checkpoint_layout = "auto"


@both
def test_b6_3_a_context_thaws_when_it_is_left(library: Any) -> None:
    """By the end of the block or by an exception; it can be entered again afterwards."""
    context = library()
    with contextlib.suppress(KeyError), context:
        raise KeyError
    context.array.saving.use_ocdbt = False
    with context, pytest.raises(RuntimeError, match=FROZEN):
        context.array.saving.use_ocdbt = True
    context.array.saving.use_ocdbt = True


@both
def test_b6_4_leaving_the_inner_context_thaws_only_the_inner(library: Any) -> None:
    """Both are frozen while both are active."""
    outer, inner = library(), library()
    with outer:
        with inner:
            for context in (outer, inner):
                with pytest.raises(RuntimeError, match=FROZEN):
                    context.array.saving.use_ocdbt = False
        inner.array.saving.use_ocdbt = False
        with pytest.raises(RuntimeError, match=FROZEN):
            outer.array.saving.use_ocdbt = False


@both
def test_b6_5_an_inactive_context_can_be_changed_while_another_is_active(library: Any) -> None:
    """A child made from the active one included, at every depth."""
    active, other = library(), library()
    with active:
        child = library(active)
        for context in (other, child):
            context.array.saving.storage_options.dtype = "float16"
            context.checkpoint_layout = "auto"
    assert active.array.saving.storage_options.dtype is None


@both
def test_b6_6_unknown_names_and_functions_are_frozen_too(library: Any) -> None:
    """While active, even a name that does not exist is answered with the reason."""
    context = library()
    with context:
        with pytest.raises(RuntimeError, match=FROZEN):
            context.array.anything = 1
        with pytest.raises(RuntimeError, match=FROZEN):
            context.memory.is_prioritized_key_fn = print


def test_b6_7_deleting_is_frozen_and_sets_stay_the_users_own() -> None:
    """Orbax lets `del` through; a set is shared with the user, but not with an operation."""
    context = Context()
    context.multiprocessing.active_processes = {0}
    with context:
        with pytest.raises(RuntimeError, match=FROZEN):
            del context.array.saving.use_zarr3
        private = snapshot()
        context.multiprocessing.active_processes.add(1)
    assert private.multiprocessing.active_processes == {0}


@both
async def test_b6_8_a_task_keeps_the_context_it_was_created_in(library: Any) -> None:
    """It stays current and frozen in the task after the creator left, who may change it again."""
    left, changed = asyncio.Event(), asyncio.Event()
    context = library()
    seen = []

    async def task() -> None:
        seen.append(ours_or_theirs(library) is context)
        await left.wait()
        seen.append(ours_or_theirs(library) is context)
        with pytest.raises(RuntimeError, match=FROZEN):
            context.array.saving.use_ocdbt = True
        await changed.wait()
        seen.append(ours_or_theirs(library).array.saving.use_ocdbt)

    with context:
        running = asyncio.create_task(task())
        await asyncio.sleep(0)
    left.set()
    await asyncio.sleep(0)
    context.array.saving.use_ocdbt = False
    changed.set()
    await running
    assert seen == [True, True, False]
    context.array.saving.use_ocdbt = True


async def test_tasks_have_stacks_of_their_own() -> None:
    """Two tasks interleaved in different contexts see each its own; the creator sees neither."""
    arrived = asyncio.Barrier(2)

    async def task(context: Context) -> list[bool]:
        with context:
            await arrived.wait()
            inside = current() is context
            await arrived.wait()
        return [inside, current() is not context]

    contexts = [Context(), Context()]
    shared = Context()
    for pair in (contexts, [shared, shared]):
        assert await asyncio.gather(*map(task, pair)) == [[True, True]] * 2
    assert current() not in [*contexts, shared]
    shared.array.saving.use_ocdbt = False


@both
async def test_b6_9_to_thread_inherits_and_other_threads_see_the_defaults(library: Any) -> None:
    """A raw thread has no active context; one started by `asyncio.to_thread` has the caller's."""

    def seen() -> Any:
        return ours_or_theirs(library)

    context = library()
    with context:
        assert await asyncio.to_thread(seen) is context
        assert await asyncio.get_running_loop().run_in_executor(None, seen) is not context
    await asyncio.get_running_loop().shutdown_default_executor()


def test_w23_context_is_reentrant_and_frozen_across_threads() -> None:
    """B6.9 and B6.10: Orbax thaws it at the inner exit, and never froze it for other threads."""
    context = Context()

    def change() -> None:
        context.array.saving.use_ocdbt = False

    with context:
        with context:
            assert current() is context
        assert current() is context
        for run in (lambda function: function(), in_thread):
            with pytest.raises(RuntimeError, match=FROZEN):
                run(change)
        with pytest.raises(RuntimeError, match="Cannot mutate an active Context"):
            in_thread(lambda: setattr(context, "checkpoint_layout", "auto"))
    in_thread(change)
    assert context.array.saving.use_ocdbt is False


def test_w23_leaving_the_inner_of_two_blocks_uncovers_what_lay_between() -> None:
    """With one context entered around and inside another, each exit undoes its own entry."""
    context, between = Context(), Context()
    with context:
        with between:
            with context:
                assert current() is context
            assert current() is between
        assert current() is context


def test_w23_context_is_usable_from_two_threads_at_once() -> None:
    """It is current in both, and frozen until the last of them has left."""
    context = Context()
    entered, leave = threading.Event(), threading.Event()

    def other() -> bool:
        with context:
            entered.set()
            leave.wait()
            return current() is context

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(other)
        entered.wait()
        with context:
            assert current() is context
        assert current() is not context
        with pytest.raises(RuntimeError, match=FROZEN):
            context.array.saving.use_ocdbt = False
        leave.set()
        assert running.result() is True
    context.array.saving.use_ocdbt = False


def test_w23_many_threads_entering_and_leaving_leave_it_thawed() -> None:
    """No count is lost when threads take turns at every step."""
    context = Context()

    def enter_and_leave(_: int) -> None:
        for _ in range(50):
            with context, context:
                assert current() is context

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(enter_and_leave, range(8)))
    finally:
        sys.setswitchinterval(interval)
    context.array.saving.use_ocdbt = False


# --------------------------------------------------------------------- assigning whole groups


def test_a_group_assigned_later_joins_the_freeze() -> None:
    """It stays the object that was assigned, and freezes and thaws with its new owner."""
    context = Context()
    saving = options.ArrayOptions.Saving(use_zarr3=False)
    context.array.saving = saving
    saving.use_ocdbt = False
    assert context.array.saving is saving
    with context:
        for group in (saving, saving.storage_options):
            with pytest.raises(RuntimeError, match=FROZEN):
                delattr(group, dataclasses.fields(group)[0].name)
    saving.use_ocdbt = True


def test_two_contexts_never_share_a_group() -> None:
    """A group that one context owns is copied when it is assigned to another, at any depth."""
    first, second = Context(), Context()
    second.array.saving = first.array.saving
    second.array.loading = options.ArrayOptions.Loading(
        load_and_broadcast_options=first.array.loading.load_and_broadcast_options
    )
    assert not {id(g) for _, g in groups_of(first)} & {id(g) for _, g in groups_of(second)}
    with first:
        second.array.saving.storage_options.chunk_byte_size = 1
        second.array.loading.load_and_broadcast_options.primary_replica_id = 1
    assert first.array.saving.storage_options.chunk_byte_size is None
    assert first.array.loading.load_and_broadcast_options.primary_replica_id == 0


def test_assigning_a_group_to_where_it_is_changes_nothing() -> None:
    """It is not copied."""
    context = Context()
    saving = context.array.saving
    context.array.saving = saving
    assert context.array.saving is saving


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_a_copy_of_a_frozen_group_can_be_changed(duplicate: Any) -> None:
    """The freeze belongs to the context, not to the values."""
    context = Context()
    with context:
        saving = duplicate(context.array.saving)
        saving.use_zarr3 = False
    assert context.array.saving.use_zarr3 is True
