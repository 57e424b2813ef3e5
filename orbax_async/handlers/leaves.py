"""The leaves of a state: what each is, and which trees of them are refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._engine.leaf import Leaf
from orbax_async.handlers import kinds
from orbax_async.tree import keypath
from orbax_async.tree.keypath import KeyPath

__all__ = [
    "Described",
    "describe",
    "describe_all",
    "summary",
]


_DOCUMENTS = {names.TREE_METADATA, names.SHARDINGS, names.STRINGS, names.ARRAY_METADATAS}


Described = tuple[Leaf, Any]  # with its array, its text, or None


def describe(keys: KeyPath, value: Any) -> Described:
    """Describes one leaf or empty node.

    Returns:
      What it is, and its value as it is stored: a jax or NumPy array, a str, or None.

    Raises:
      UnsupportedLeafError: a checkpoint can't hold it.
      StagingError: it is a jax array whose buffer is gone.
    """
    try:
        return kinds.encode(keys, value)
    except ValueError as reason:
        raise errors.UnsupportedLeafError(keypath.label(keys), str(reason)) from None
    except RuntimeError as reason:
        raise errors.StagingError(keypath.label(keys), str(reason)) from None


def describe_all(
    entries: Iterable[tuple[KeyPath, Any]], *, as_files: bool, are_several: bool = False
) -> list[Described]:
    """Describes every leaf of a flattened tree, and refuses it as a whole if any can't be held.

    Args:
      entries: leaves and empty nodes by key path.
      as_files: whether each leaf becomes a directory, whose name then has to be a legal one.
      are_several: whether several processes save the tree together.

    Raises:
      UnsupportedLeafError: leaves that can't be held, all named in one message.
      DuplicateLeafError: two leaves would be stored under the same name.
      StagingError: a jax array was deleted or donated.
    """
    described: list[Described] = []
    refused: list[errors.LeafError] = []
    for keys, value in entries:
        try:
            form, stored = describe(keys, value)
            if are_several and isinstance(stored, jax.Array):
                _check_shared(form.label, stored)
            described.append((form, stored))
        except errors.LeafError as error:
            refused.append(error)
    if refused:
        raise summary(refused)
    _check_names([form for form, _ in described], as_files=as_files)
    return described


def summary(refused: list[errors.LeafError]) -> errors.LeafError:
    """Makes one error of several, of the class and the key path of the first."""
    first, *others = refused
    if not others:
        return first
    listing = "".join(f"\n  {error}" for error in others)
    message = str(first).split(": ", 1)[1] + f"\nand {len(others)} more:{listing}"
    summary = type(first)(first.keypath, message)
    summary.others = tuple(others)
    return summary


def _check_shared(label: str, array: jax.Array) -> None:
    if array.is_fully_addressable:
        raise errors.UnsupportedLeafError(
            label,
            "a host-local jax.Array: its devices all belong to this process, and each process "
            "would store its own under the same name. Make it one array of all processes "
            "(`jax.make_array_from_process_local_data`), or a NumPy array, which the primary saves",
        )


def _check_names(forms: list[Leaf], *, as_files: bool) -> None:
    by_name: dict[str, Leaf] = {}
    for leaf in forms:
        if not leaf.has_value:
            continue
        other = by_name.setdefault(leaf.name, leaf)
        if other is not leaf:
            raise errors.DuplicateLeafError(
                leaf.label,
                f"would be stored as {leaf.name!r}, which is also the name of leaf {other.label}: "
                "the format joins keys with '.', and one of the two would be lost. Rename a key.",
            )
    if not as_files:
        return
    for leaf in forms:
        parts = leaf.name.split("/")
        if leaf.shape is not None and parts[0] in _DOCUMENTS:
            raise errors.UnsupportedLeafError(
                leaf.label,
                f"{parts[0]!r} is the name of a document, beside which use_ocdbt=False can't hold "
                "this leaf; rename the key or leave use_ocdbt on",
            )
        if leaf.name and any(part in ("", ".", "..") for part in parts):
            raise errors.UnsupportedLeafError(
                leaf.label,
                f"its name {leaf.name!r} is no relative file path, which use_ocdbt=False needs; "
                "rename the key or leave use_ocdbt on",
            )
        for count in range(1, len(parts)):
            above = by_name.get("/".join(parts[:count]))
            if above is not None and above.shape is not None:
                raise errors.DuplicateLeafError(
                    leaf.label,
                    f"its directory would lie inside that of leaf {above.label}, which "
                    "use_ocdbt=False can't hold; rename a key or leave use_ocdbt on",
                )
