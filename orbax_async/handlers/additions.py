"""Additions: the trees of partial saves, which one may join, and which become one tree.

Each lies in a directory of its own, with documents about its own leaves. Putting them together
copies no array: the data files get second names, and the databases are merged by reference.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from typing import Any

from orbax_async import _names as names
from orbax_async import _operation as operation
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._commit.session import Session
from orbax_async._engine import loop
from orbax_async._storage import files, kvstore, ocdbt, zarr
from orbax_async._storage.kvstore import ArrayStore
from orbax_async.handlers import leaves
from orbax_async.handlers.forms import TreeForm
from orbax_async.path import PathAwaitingCreation
from orbax_async.tree import keypath, schema, union

__all__ = ["check_addition", "put_together"]

_DATABASES = names.PROCESS_DATABASE.format("")
_DOCUMENTS = {names.TREE_METADATA, names.SHARDINGS, names.STRINGS, names.ARRAY_METADATAS}


def check_addition(form: TreeForm, options: ambient.Context, additions: list[str]) -> None:
    """Raises if a tree can't be added to those of earlier partial saves; blocks.

    Raises:
      PartialSaveReplacementError: it holds what one of them holds; all such leaves are named.
      DuplicateLeafError: a leaf would be stored under the name of another.
      PartialSaveError: they are stored in another format.
      InvalidLayoutError: a document of theirs is damaged.
    """
    trees = _read_trees(additions)
    saving = options.array.saving
    for path, tree in trees:
        for name, theirs, ours in (
            ("use_ocdbt", tree.uses_ocdbt, saving.use_ocdbt),
            ("use_zarr3", tree.uses_zarr3, saving.use_zarr3),
        ):
            if theirs not in (None, ours):
                raise errors.PartialSaveError(
                    f"the partial save {path} has array.saving.{name} = {theirs}, and this one "
                    f"{ours}; the parts of one checkpoint are stored alike. Save with {theirs}."
                )
    taken = union.Taken(as_files=not saving.use_ocdbt)
    for _, tree in trees:
        taken.add(tree.entries)
    _refuse(
        taken, [schema.Entry(leaf.keys, leaf.kind, leaf.name) for leaf in form.leaves], is_new=True
    )


def _refuse(taken: union.Taken, entries: Iterable[schema.Entry], *, is_new: bool = False) -> None:
    refused: list[errors.LeafError] = []
    for entry in entries:
        label = keypath.label(entry.keys)
        there = taken.replaced_by(entry)
        if there is not None:
            there_label = keypath.label(there.keys) or "<root>"
            refused.append(
                errors.PartialSaveReplacementError(
                    label,
                    f"{there_label} was found in a previous partial save in this session, and "
                    "partial saving does not support REPLACEMENT: it only adds what is new. Leave "
                    "it out.",
                )
            )
            continue
        container = taken.of_other_kind(entry) if is_new else None
        if container is not None:
            refused.append(
                errors.PartialSaveReplacementError(
                    label,
                    f"{keypath.label(container) or '<root>'} is a sequence in one partial save and "
                    "has keys in the other, and partial saving does not support REPLACEMENT: "
                    "nothing can hold both. Save it as what it was.",
                )
            )
            continue
        namesake = taken.confused_with(entry)
        if namesake is not None:
            why = (
                "the format joins keys with '.', and one of the two would be lost"
                if entry.name == namesake.name
                else "the format makes folders of names with '/', and neither can lie in the other"
            )
            refused.append(
                errors.DuplicateLeafError(
                    label,
                    f"would be stored as {entry.name!r}, and leaf {keypath.label(namesake.keys)} "
                    f"of a previous partial save is stored as {namesake.name!r}: {why}. Rename a "
                    "key.",
                )
            )
    if refused:
        raise leaves.summary(refused)


def _read_json(path: str) -> Any:
    data = files.read_bytes(path)
    try:
        return None if data is None else json.loads(data)
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> errors.InvalidLayoutError:
    return errors.InvalidLayoutError(
        f"{path} is damaged: {error!r}. Remove that partial save and make it again."
    )


def _directory(addition: str) -> str:
    return os.path.join(addition, names.DEFAULT_CHECKPOINTABLE)


def _read_trees(additions: list[str]) -> list[tuple[str, schema.TreeDocument]]:
    # Orbax finalizes by moving files: when that died, the session has what its additions lack.
    is_rearranged = any(names.ADDITION_MARK not in os.path.basename(each) for each in additions)
    trees = []
    for addition in additions:
        path = os.path.join(_directory(addition), names.TREE_METADATA)
        data = files.read_bytes(path)
        if data is None:
            if os.path.isdir(addition) and not is_rearranged:
                raise errors.InvalidLayoutError(
                    f"{path} is missing. Remove that partial save and make it again."
                )
            continue
        try:
            trees.append((addition, schema.TreeDocument.load(data)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from error
    return trees


async def put_together(directory: PathAwaitingCreation, session: Session) -> None:
    """Writes the tree of all additions of a session that is claimed once there is the directory.

    Raises:
      PartialSaveError: the trees do not fit together.
      InvalidLayoutError: a document of theirs is damaged.
      CommitError: a file can't be linked or written.
      WriteError: an array is missing.
    """
    path = os.fspath(await directory.await_creation())
    if not operation.current("save").processes.is_primary:
        return
    try:
        await loop.to_worker(_write_documents, session.additions, path)
        for addition in session.additions:
            serial = "" if addition == session.directory else _serial(addition)
            await loop.to_worker(_link_data, _directory(addition), path, serial)
    except OSError as error:
        if isinstance(error, errors.CheckpointError):
            raise
        raise errors.CommitError(
            f"cannot put the partial saves of {session.final} together: "
            f"{error.strerror or error} ({error.filename})"
        ) from error
    await loop.to_worker(ocdbt.merge_process_databases, path)
    if ambient.current().array.saving.enable_post_merge_validation:
        await loop.to_worker(_validate, path)


def _serial(addition: str) -> str:
    return "".join(each for each in addition.rpartition("_")[2] if each.isalnum())


def _write_documents(additions: list[str], path: str) -> None:
    """Writes the documents of all additions, and refuses them if they don't fit together."""
    taken = union.Taken()
    formats = set()
    for _, tree in _read_trees(additions):
        _refuse(taken, tree.entries)
        taken.add(tree.entries)
        formats.add((tree.uses_ocdbt, tree.uses_zarr3))
    if len(formats) > 1:
        raise errors.PartialSaveError(
            f"the partial saves {additions} differ in use_ocdbt and use_zarr3, {sorted(formats)}: "
            "no checkpoint can hold them all. Finalize what is alike."
        )
    directories = [_directory(addition) for addition in additions]

    def read(name: str) -> list[Any]:
        found = [_read_json(os.path.join(directory, name)) for directory in directories]
        return [document for document in found if document is not None]

    documents: dict[str, Any] = {}
    trees = read(names.TREE_METADATA)
    if trees:
        documents[names.TREE_METADATA] = union.merge_trees(trees)
    for name in (names.SHARDINGS, names.STRINGS):
        found = read(name)
        if found:
            documents[name] = functools.reduce(union.merge_json, found)
    of_processes = {
        entry.name
        for directory in directories
        for entry in files.scan(os.path.join(directory, names.ARRAY_METADATAS))
    }
    for process in of_processes:
        name = os.path.join(names.ARRAY_METADATAS, process)
        documents[name] = union.merge_array_metadatas(read(name))
    for name, document in documents.items():
        files.write_bytes(os.path.join(path, name), json.dumps(document).encode())


def _link_data(source: str, path: str, serial: str) -> None:
    """Gives the data of one addition names in the directory of all."""
    is_merged = kvstore.holds_ocdbt(source)  # of a finalization that was interrupted
    for entry in files.scan(source):
        if entry.name in _DOCUMENTS:
            continue
        if is_merged and entry.name in (names.OCDBT_MANIFEST, names.OCDBT_DATA):
            continue
        is_database = entry.name.startswith(_DATABASES) and kvstore.holds_ocdbt(entry.path)
        name = entry.name + serial if is_database else entry.name
        files.link_tree(entry.path, os.path.join(path, name))


def _validate(path: str) -> None:
    """Checks that every array of the tree is in the store."""
    document = files.read_bytes(os.path.join(path, names.TREE_METADATA))
    tree = schema.TreeDocument.load(document or b"")
    arrays = [each for each in tree.entries if not each.is_empty and each.kind != schema.STRING]
    if not arrays:
        return
    is_ocdbt = kvstore.holds_ocdbt(path)
    keys = ArrayStore(path, ocdbt=is_ocdbt, zarr3=tree.uses_zarr3).list_keys()
    for entry in arrays:
        key = zarr.document_key(entry.name, zarr3=tree.uses_zarr3)
        if key not in keys:
            raise errors.WriteError(
                keypath.label(entry.keys), f"{key} is missing in what partial saves have written"
            )
