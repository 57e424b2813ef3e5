"""What tests of the context share: every group and option by name, and both libraries."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from orbax.checkpoint import v1 as ocp

from orbax_async import options
from orbax_async.context import Context, current
from orbax_async.options._group import OptionGroup

GROUPS = {
    "pytree": options.PyTreeOptions,
    "array": options.ArrayOptions,
    "asynchronous": options.AsyncOptions,
    "multiprocessing": options.MultiprocessingOptions,
    "file": options.FileOptions,
    "checkpointables": options.CheckpointablesOptions,
    "pathways": options.PathwaysOptions,
    "deletion": options.DeletionOptions,
    "memory": options.MemoryOptions,
    "safetensors": options.SafetensorsOptions,
    "atomicity": options.AtomicityOptions,
}
FROZEN = r"Cannot mutate options of an active context\. Configure before entering"

both = pytest.mark.parametrize("library", [Context, ocp.Context], ids=["ours", "orbax"])


def groups_of(owner: Any) -> Iterator[tuple[str, OptionGroup]]:
    """Yields (dot path, group) for every group of a context or group, nested ones too."""
    names = GROUPS if isinstance(owner, Context) else vars(owner)
    for name in names:
        group = getattr(owner, name)
        if isinstance(group, OptionGroup):
            yield name, group
            yield from ((f"{name}.{path}", inner) for path, inner in groups_of(group))


def fields_of(context: Context) -> Iterator[tuple[str, OptionGroup, str]]:
    """Yields (dot path, group, field) for every field of every group."""
    for path, group in groups_of(context):
        for field in dataclasses.fields(group):
            yield f"{path}.{field.name}", group, field.name


def leaves_of(context: Context) -> dict[str, Any]:
    """Returns every option that is no group by its dot path, the layout included."""
    values = {path: getattr(group, name) for path, group, name in fields_of(context)}
    leaves = {path: v for path, v in values.items() if not isinstance(v, OptionGroup)}
    return leaves | {"checkpoint_layout": context.checkpoint_layout}


def ours_or_theirs(library: Any) -> Any:
    """Returns the context that is current for either library."""
    if library is Context:
        return current()
    return sys.modules[library.__module__].get_context()  # not exported, wherever it lies
