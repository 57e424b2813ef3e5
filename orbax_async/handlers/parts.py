"""The trees of partial saves: which one another may join, and how they become one.

Each part has documents about its own leaves. Putting them together copies no array: the data files
get second names, and the databases are merged by reference.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from orbax_async import _names as names
from orbax_async import _operation as operation
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._commit.sessions import Session
from orbax_async._engine import loop
from orbax_async._storage import array_store, zarr
from orbax_async._storage.array_store import ArrayStore, holds_ocdbt
from orbax_async._storage.directory import Directory, damage_in, read_json
from orbax_async._storage.local import open_directory
from orbax_async.handlers import leaves
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.handlers.write_plan import WritePlan
from orbax_async.path import PathAwaitingCreation
from orbax_async.tree import keypath, merging, schema

__all__ = ["PartsHandler", "check_part"]

_DATABASES = names.PROCESS_DATABASE.format("")
_DOCUMENTS = {names.TREE_METADATA, names.SHARDINGS, names.STRINGS, names.ARRAY_METADATAS}
_ADVICE = "Remove that partial save and make it again."


def check_part(plan: WritePlan, parts: Sequence[Directory]) -> None:
    """Raises if a tree can't be added to those of earlier partial saves; blocks.

    Raises:
      PartialSaveReplacementError: it holds what one of them holds; all such leaves are named.
      DuplicateLeafError: a leaf would be stored under the name of another.
      PartialSaveError: they are stored in another format.
      InvalidLayoutError: a document of theirs is damaged.
    """
    saving = plan.saving
    taken = merging.Taken(as_files=not saving.use_ocdbt)
    for part, tree in _read_trees(parts):
        for name, theirs, ours in (
            ("use_ocdbt", tree.uses_ocdbt, saving.use_ocdbt),
            ("use_zarr3", tree.uses_zarr3, saving.use_zarr3),
        ):
            if theirs not in (None, ours):
                raise errors.PartialSaveError(
                    f"the partial save {part.path} has array.saving.{name} = {theirs}, and this "
                    f"one {ours}; the parts of one checkpoint are stored alike. Save with {theirs}."
                )
        taken.add(tree.entries)
    _refuse(taken, [leaf.entry() for leaf in plan.leaves], is_new=True)


def _refuse(taken: merging.Taken, entries: Iterable[schema.Entry], *, is_new: bool = False) -> None:
    refused = [each for entry in entries if (each := _refusal(taken, entry, is_new=is_new))]
    if refused:
        raise leaves.summary(refused)


def _refusal(taken: merging.Taken, entry: schema.Entry, *, is_new: bool) -> errors.LeafError | None:
    label = keypath.label(entry.keys)
    there = taken.replaced_by(entry)
    if there is not None:
        return errors.PartialSaveReplacementError(
            label,
            f"{keypath.label(there.keys) or '<root>'} was found in a previous partial save in this "
            "session, and partial saving does not support REPLACEMENT: it only adds what is new. "
            "Leave it out.",
        )
    container = taken.of_other_kind(entry) if is_new else None
    if container is not None:
        return errors.PartialSaveReplacementError(
            label,
            f"{keypath.label(container) or '<root>'} is a sequence in one partial save and has "
            "keys in the other, and partial saving does not support REPLACEMENT: nothing can hold "
            "both. Save it as what it was.",
        )
    namesake = taken.confused_with(entry)
    if namesake is not None:
        why = (
            "the format joins keys with '.', and one of the two would be lost"
            if entry.name == namesake.name
            else "the format makes folders of names with '/', and neither can lie in the other"
        )
        return errors.DuplicateLeafError(
            label,
            f"would be stored as {entry.name!r}, and leaf {keypath.label(namesake.keys)} of a "
            f"previous partial save is stored as {namesake.name!r}: {why}. Rename a key.",
        )
    return None


def _tree_of(part: Directory) -> Directory:
    return part / names.DEFAULT_CHECKPOINTABLE


def _read_trees(parts: Sequence[Directory]) -> list[tuple[Directory, schema.TreeDocument]]:
    # Orbax finalizes by moving files: when that died, the session has what its parts lack.
    is_rearranged = any(names.PART_MARK not in part.name for part in parts)
    trees = []
    for part in parts:
        file = (_tree_of(part) / names.TREE_METADATA).path
        with errors.reported_as(errors.UnreadableError, f"cannot read {file}"):
            data = _tree_of(part).read(names.TREE_METADATA)
        if data is not None:
            with damage_in(file, _ADVICE):
                trees.append((part, schema.TreeDocument.load(data)))
        elif part.status() is not None and not is_rearranged:
            raise errors.InvalidLayoutError(f"{file} is missing. {_ADVICE}")
    return trees


class PartsHandler(PyTreeHandler):
    """Saves all partial saves of a session as one tree."""

    async def save(
        self, directory: PathAwaitingCreation, checkpointable: Session
    ) -> Awaitable[None]:
        """Captures nothing, and returns what writes the tree."""
        return _put_together(directory, checkpointable)


async def _put_together(directory: PathAwaitingCreation, session: Session) -> None:
    """Writes the tree of all parts of a session, which is claimed once there is the directory."""
    target = open_directory(os.fspath(await directory.await_creation()))
    if not operation.current("save").processes.is_primary:
        return
    await loop.to_worker(_link_parts, session, target)
    if ambient.current().array.saving.enable_post_merge_validation:
        await loop.to_worker(_validate, target)


def _link_parts(session: Session, target: Directory) -> None:
    with errors.reported_as(
        errors.CommitError, f"cannot put the partial saves of {session.final.path} together"
    ):
        _write_documents(session.parts, target)
        for part in session.parts:
            serial = "" if part == session.directory else _serial(part)
            _link_data(_tree_of(part), target, serial)
        array_store.merge_process_databases(target)


def _serial(part: Directory) -> str:
    return "".join(each for each in part.name.rpartition("_")[2] if each.isalnum())


def _write_documents(parts: Sequence[Directory], target: Directory) -> None:
    """Writes the documents of all parts, and refuses them if they don't fit together."""
    taken = merging.Taken()
    formats = set()
    for _, tree in _read_trees(parts):
        _refuse(taken, tree.entries)
        taken.add(tree.entries)
        formats.add((tree.uses_ocdbt, tree.uses_zarr3))
    if len(formats) > 1:
        raise errors.PartialSaveError(
            f"the partial saves {[part.path for part in parts]} differ in use_ocdbt and use_zarr3, "
            f"{sorted(formats)}: no checkpoint can hold them all. Finalize what is alike."
        )

    def read(name: str) -> list[Any]:
        found = [read_json(_tree_of(part), name) for part in parts]
        return [document for document in found if document is not None]

    documents: dict[str, Any] = {}
    trees = read(names.TREE_METADATA)
    if trees:
        documents[names.TREE_METADATA] = merging.merge_trees(trees)
    for name in (names.SHARDINGS, names.STRINGS):
        found = read(name)
        if found:
            documents[name] = functools.reduce(merging.merge_json, found)
    of_processes = {
        f"{names.ARRAY_METADATAS}/{entry.name}"
        for part in parts
        for entry in (_tree_of(part) / names.ARRAY_METADATAS).entries()
    }
    for name in of_processes:
        documents[name] = merging.merge_array_metadatas(read(name))
    for name, document in documents.items():
        target.write(name, json.dumps(document).encode())


def _link_data(source: Directory, target: Directory, serial: str) -> None:
    """Gives the data of one part names in the directory of all."""
    is_merged = holds_ocdbt(source)  # of a finalization that was interrupted
    for name, is_directory in source.entries():
        if name in _DOCUMENTS:
            continue
        if is_merged and name in (names.OCDBT_MANIFEST, names.OCDBT_DATA):
            continue
        if not is_directory:
            source.link(name, target, name)
            continue
        is_database = name.startswith(_DATABASES) and holds_ocdbt(source / name)
        files, _ = (source / name).walk()
        for file in files:
            new = name + serial if is_database else name
            source.link(f"{name}/{file}", target, f"{new}/{file}")


def _validate(directory: Directory) -> None:
    """Checks that every array of the tree is in the store."""
    with errors.reported_as(errors.CommitError, f"cannot look at {directory.path}"):
        document = directory.read(names.TREE_METADATA)
        is_ocdbt = holds_ocdbt(directory)
    tree = schema.TreeDocument.load(document or b"")
    arrays = [each for each in tree.entries if not each.is_empty and each.kind != schema.STRING]
    if not arrays:
        return
    with errors.reported_as(errors.CommitError, f"cannot look at {directory.path}"):
        keys = ArrayStore(directory, ocdbt=is_ocdbt, zarr3=tree.uses_zarr3).list_keys()
    for entry in arrays:
        key = zarr.document_key(entry.name, zarr3=tree.uses_zarr3)
        if key not in keys:
            raise errors.WriteError(
                keypath.label(entry.keys), f"{key} is missing in what partial saves have written"
            )
