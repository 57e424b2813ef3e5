"""The layout of Orbax: named checkpointables, each in a directory, or older, flat checkpoints.

`docs/format.md` tells what the files are. One listing of a directory tells what lies there, so that
a checkpoint is found with as few calls of its storage as can be.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._commit import removal, sessions
from orbax_async._layouts.layout import (
    COPY_AGAIN,
    Checkpointable,
    Damage,
    Details,
    Layout,
    StoredTree,
    reading,
)
from orbax_async._storage import seal, zarr
from orbax_async._storage.array_store import ArrayStore, holds_ocdbt, read_index
from orbax_async._storage.directory import Directory, damage_in, read_document, read_json
from orbax_async._trace import logger
from orbax_async.options import AtomicityMode
from orbax_async.options._operation_options import mode_of_temporary_path
from orbax_async.tree import keypath, schema, structure
from orbax_async.tree.keypath import KeyPath

T = TypeVar("T")

_LEADS_OUT = (
    "is a symbolic link that leads out of the checkpoint, a pipe or a device, and is not followed"
)
_PUT_IN_PLACE = "Put what it leads to in its place, if you trust it."


class OrbaxLayout(Layout):
    """What Orbax and this library write."""

    what = "Orbax checkpoints"

    @functools.cached_property
    def inside(self) -> dict[str, bool]:
        """What lies directly in the directory, and whether that is a directory itself."""
        return dict(self.directory.entries())

    @property
    def is_marked(self) -> bool:
        """Whether it has a file that only the root of a checkpoint has."""
        return bool({names.CHECKPOINT_METADATA, names.CHECKPOINT_MARKER} & self.inside.keys())

    @property
    def is_damaged(self) -> bool:
        """Whether it is a checkpoint without its metadata, or with links out of it."""
        is_there = names.CHECKPOINT_METADATA in self.inside
        return self.is_marked and (not is_there or bool(self._links))

    @property
    def is_flat(self) -> bool:
        """Whether it is a tree itself, as in older releases."""
        return names.TREE_METADATA in self.inside and names.CHECKPOINT_MARKER not in self.inside

    @property
    def is_there(self) -> bool:
        """Whether a checkpoint lies here, or a tree of one."""
        return self.is_marked or names.TREE_METADATA in self.inside or bool(self._trees)

    @functools.cached_property
    def _directories(self) -> list[str]:
        """The directories that may be checkpointables."""
        return [
            name
            for name, is_directory in self.inside.items()
            if is_directory
            and name not in names.RESERVED_CHECKPOINTABLES
            and names.TEMPORARY_MARK not in name
            and not self._lies_in(name, names.CHECKPOINT_METADATA)
        ]

    @functools.cached_property
    def _trees(self) -> list[str]:
        """The names of its pytrees, the default one first."""
        found = [name for name in self._directories if self._lies_in(name, names.TREE_METADATA)]
        return sorted(found, key=lambda name: name != names.DEFAULT_CHECKPOINTABLE)

    def _lies_in(self, name: str, file: str) -> bool:
        return self.directory.status(f"{name}/{file}") is not None

    # Whether it is a checkpoint.

    def problem(self) -> str | None:
        """Returns why no checkpoint can be loaded from here, as the end of a sentence."""
        problem = self._missing()
        if problem is None and self._links:
            return f"{self._links[0]!r} in it {_LEADS_OUT}. {_PUT_IN_PLACE}"
        if (
            problem is None
            and names.COMMIT_MARKER not in self.inside
            and writes_in_place(self.options)
            and not self.options.atomicity.allow_legacy_atomic_rename
        ):
            return (
                f"it has no {names.COMMIT_MARKER}, which atomicity.mode = 'commit_file' asks for: "
                "its save has not finished, or has renamed it into place. Set "
                "atomicity.allow_legacy_atomic_rename to load the latter."
            )
        return problem

    @functools.cached_property
    def _links(self) -> list[str]:
        """I14: the links that are not followed."""
        return self.directory.outward_links()

    def _missing(self) -> str | None:
        directory = self.directory
        if not self.inside:
            status = directory.status()
            session = directory.parent / sessions.session_path(directory.name)
            if status is None and sessions.find_parts(session):
                return "its partial saves are not finalized. Call partial.finalize first."
            if status is None:
                return "there is no such directory. Check the path."
            if status.kind == "file":
                return "it is a file, not a directory."
        if names.TEMPORARY_MARK in directory.name:
            return "its name says that it is unfinished: a save is under way or was interrupted."
        if names.CHECKPOINT_METADATA in self.inside:
            return None
        parent = directory.parent
        if parent.status(names.CHECKPOINT_METADATA) is not None:
            return (
                f"it appears to be a subdirectory of the checkpoint {parent.path}. Load that, with "
                f"checkpointable_name={directory.name!r}."
            )
        if self.is_damaged:
            return f"{names.CHECKPOINT_METADATA} is missing."
        if self.is_flat or self._trees:
            return None
        if directory.name.endswith(names.SESSION_SUFFIX) and sessions.find_parts(directory):
            return "it holds partial saves. Call partial.finalize, and load what that makes."
        inside = [name for name, is_directory in self.inside.items() if is_directory]
        steps = [name for name in inside if self._lies_in(name, names.CHECKPOINT_METADATA)]
        if steps:
            return f"it holds checkpoints, and is none itself. Load one of {steps[:10]} in it."
        return f"it has none of the files of one; it holds {inside[:10] or 'no directories'}."

    def may_be_replaced(self) -> bool:
        """Says whether it is a checkpoint, or what a save of Orbax in place has left of one."""
        if self._missing() is None:
            return True
        is_left = writes_in_place(self.options) and names.COMMIT_MARKER not in self.inside
        return is_left and self.directory.read(names.CHECKPOINT_MARKER) == b""

    # What it says of itself.

    @functools.cached_property
    def document(self) -> dict[str, Any]:
        """The checkpoint's own metadata; damage there costs only what they say, if unsealed.

        Raises:
          InvalidLayoutError: the checkpoint is sealed, and they are not what was saved.
        """
        with reading(self.directory.path):
            seal.of_checkpoint(self.directory).check_root()
        try:
            return self._read_document()
        except errors.UnreadableError:
            raise
        except errors.InvalidLayoutError as error:
            logger.error("%s; it is ignored", error)
            return {}

    def _read_document(self) -> dict[str, Any]:
        with reading((self.directory / names.CHECKPOINT_METADATA).path):
            return read_json(self.directory, names.CHECKPOINT_METADATA) or {}

    @functools.cached_property
    def hidden(self) -> str | None:
        """The name whose deletion was begun and not finished."""
        is_recorded = names.DELETION_RECORD in self.inside
        return removal.name_in_deletion(self.directory) if is_recorded else None

    def details(self) -> Details:
        """Returns the bytes of all files, and what the checkpoint's own metadata say."""
        found = self.document
        times = [found.get(key) for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs")]
        began, committed = (time if isinstance(time, int) else None for time in times)
        custom = found.get("custom_metadata") or {}
        return Details(super().details().nbytes, began, committed, custom)

    # What it holds.

    def tree(self, name: str | None) -> tuple[str | None, Directory]:
        """Returns one pytree's name, and where it lies."""
        found = [each for each in self._trees if each != self.hidden]
        is_auto = name == names.AUTO_CHECKPOINTABLE
        if is_auto and found:
            name = found[0]
        if name in found:
            return name, self.directory / str(name)
        if self.is_flat and (is_auto or name is None):
            return None, self.directory
        if name is not None and name == self.hidden:
            raise self._in_deletion(name)
        cause: Exception = FileNotFoundError(f"it has no {name!r}; it holds {found}")
        if is_auto:
            cause = FileNotFoundError(f"no directory in it has a {names.TREE_METADATA}")
        elif name is None:
            cause = ValueError(
                f"it is no flat checkpoint: checkpointable_name must be one of {found}"
            )
        elif self.is_flat:
            cause = FileNotFoundError(
                f"it has no {name!r}, but is flat: load it with checkpointable_name=None"
            )
        raise errors.InvalidLayoutError(
            f"Failed to interpret path {self.directory.path} as an Orbax checkpoint of a pytree: "
            f"{cause}"
        ) from cause

    def checkpointables(self, wanted: Collection[str] = ()) -> dict[str, Checkpointable]:
        """Returns what can be loaded by name: what is wanted, or all.

        A directory counts where the checkpoint records its handler, or records none at all, and
        where it looks like a pytree. Others were put there by somebody else.
        """
        path, hidden = self.directory.path, self.hidden
        if self.is_flat:
            raise errors.InvalidLayoutError(
                f"{path} is a flat (direct) checkpoint with no named checkpointables: load it with "
                "load(path, checkpointable_name=None)"
            )
        recorded = _recorded(self.document)
        known = {
            name: self._checkpointable(name, recorded)
            for name in self._directories
            if name != hidden and (not recorded or name in recorded or name in self._trees)
        }
        if hidden is not None and hidden in wanted:
            raise self._in_deletion(hidden)
        missing = [name for name in wanted if name not in known]
        if missing:
            raise errors.UnknownCheckpointableError(
                f"Requested checkpointables: {missing} for loading were not found in the "
                f"checkpoint {path}. Available checkpointables: {list(known)}"
            )
        return {name: known[name] for name in wanted or known}

    def _checkpointable(self, name: str, recorded: Mapping[str, str]) -> Checkpointable:
        is_pytree = name in self._trees if name else self.is_flat
        return Checkpointable(self.directory / name, recorded.get(name), is_pytree)

    def _in_deletion(self, name: str) -> errors.DeletionInProgressError:
        path = self.directory.path
        return errors.DeletionInProgressError(
            f"checkpointable {name!r} of {path} is being deleted, or its deletion was interrupted; "
            f"delete it again to finish: delete({path!r}, checkpointable_name={name!r})"
        )

    def survey(self) -> tuple[dict[str, Checkpointable], list[Damage]]:
        """Returns all that is there, a flat tree under the name '', and what is wrong."""
        damage: list[Damage] = []

        def add(name: str, problem: str, hint: str = COPY_AGAIN) -> None:
            damage.append(Damage("", "", (self.directory / name).path, problem, hint))

        for name in self._links:
            add(name, f"it {_LEADS_OUT}, and nothing else is read", _PUT_IN_PLACE)
        if damage:
            return {}, damage
        recorded: Mapping[str, str] = {}
        try:
            recorded = _recorded(self._read_document())
        except errors.InvalidLayoutError as error:
            damage.append(Damage.of(self.directory, error))
        if self.is_damaged:
            add(names.CHECKPOINT_METADATA, "it is missing")
        hidden = None
        try:
            hidden = self.hidden
        except errors.CheckpointError as error:
            add(names.DELETION_RECORD, str(error), "")
        if hidden is not None:
            add(hidden, "its deletion was not finished", "Delete it again.")
        found = [name for name in (*self._directories, names.METRICS) if name in self.inside]
        for name in recorded:
            if name not in found and name != hidden:
                add(name, "it is recorded, and missing")
        listed = [""] if self.is_flat else [name for name in found if name != hidden]
        return {name: self._checkpointable(name, recorded) for name in listed}, damage

    # Its trees.

    def open_tree(self, *, is_for_jax: bool = False) -> StoredTree:
        """Reads the tree's document, and begins to read the index of its arrays."""
        return _OrbaxTree(self.directory)

    def find_damage(self) -> Iterator[Damage]:
        """Yields what is wrong with the documents of the tree, apart from strings and arrays."""
        try:
            tree = _OrbaxTree(self.directory)
            records = tree.array_metadatas()
        except errors.InvalidLayoutError as error:
            hint = "Nothing of this tree can be loaded without it."
            yield Damage.of(self.directory, error, hint)
            return
        try:
            tree.shardings()
        except errors.InvalidLayoutError as error:
            hint = "Loading with shardings of your own works without it."
            yield Damage.of(self.directory, error, hint)
        for name in records:
            try:
                tree.read_array_metadatas(name)
            except errors.InvalidLayoutError as error:
                yield Damage.of(self.directory, error, "Only typed random keys need it.")


class _OrbaxTree(StoredTree):
    """A tree of zarr arrays, in one OCDBT database or in files, and its documents."""

    def __init__(self, directory: Directory) -> None:
        with reading(directory.path):
            self._seal = seal.of_tree(directory)
            index = read_index(directory)
            is_database = index is not None or holds_ocdbt(directory)
        self.directory = directory
        document = self._read(names.TREE_METADATA, schema.TreeDocument.load)
        if document is None:
            raise errors.InvalidLayoutError.of_file(
                f"{directory.path} holds no pytree: it has no {names.TREE_METADATA}",
                (directory / names.TREE_METADATA).path,
            )
        super().__init__(directory, document.entries)
        self._document = document
        uses_ocdbt = document.uses_ocdbt
        self._is_ocdbt = is_database if uses_ocdbt is None else uses_ocdbt
        self._index = index if self._is_ocdbt else None
        if self._is_ocdbt and not is_database and self.arrays:
            raise errors.InvalidLayoutError.of_file(
                f"{directory.path} is damaged: {names.OCDBT_MANIFEST} is missing",
                (directory / names.OCDBT_MANIFEST).path,
            )

    def nest_for(self, options: ambient.Context) -> Callable[[Iterable[tuple[KeyPath, Any]]], Any]:
        """Returns what builds the tree: of plain containers, or of those that were recorded."""
        text = self._document.rich
        if text is None or not options.pytree.saving.pytree_metadata_options.support_rich_types:
            return structure.nest

        def nest(entries: Iterable[tuple[KeyPath, Any]]) -> Any:
            try:
                return schema.nest_rich(text, entries)
            except ValueError as error:
                file = self.directory / names.TREE_METADATA
                raise errors.InvalidLayoutError(
                    f"the rich types in {file.path} can't be used: {error}. Load without "
                    "support_rich_types, or with an abstract tree."
                ) from error

        return nest

    def open_store(self) -> ArrayStore:
        """Opens the store of its arrays."""
        return ArrayStore(
            self.directory,
            ocdbt=self._is_ocdbt,
            zarr3=self._document.uses_zarr3,
            direct=self._index,
        )

    def documents(
        self, store: ArrayStore, entries: Sequence[schema.Entry]
    ) -> dict[str, zarr.ArrayDocument]:
        """Reads the zarr documents of some arrays, by stored name."""
        keys = [zarr.document_key(entry.name, zarr3=store.zarr3) for entry in entries]
        try:
            values = store.read_many(keys)
        except errors.CheckpointError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                with reading(self.directory.path):
                    raise
            text = str(error).split(" [source locations=")[0]
            file = names.OCDBT_MANIFEST if self._is_ocdbt else ""
            raise errors.InvalidLayoutError.of_file(
                f"the array store of {self.directory.path} is damaged: {text}",
                (self.directory / file).path,
            ) from error
        found = {}
        for entry, value in zip(entries, values, strict=True):
            if value is None:
                raise errors.ReadError(
                    keypath.label(entry.keys),
                    f"its array {entry.name!r} is missing from {self.directory.path}",
                )
            try:
                found[entry.name] = zarr.parse_document(bytes(value))
            except ValueError as error:
                raise errors.CorruptDataError(
                    keypath.label(entry.keys), f"the metadata of its array is damaged: {error}"
                ) from error
        self._prove_documents(entries, values)
        return found

    def _prove_documents(self, entries: Sequence[schema.Entry], documents: Sequence[Any]) -> None:
        if not self._seal.is_there:
            return
        if self._is_ocdbt:
            with reading(self.directory.path):
                self._seal.read(names.OCDBT_MANIFEST)
            return
        for entry, document in zip(entries, documents, strict=True):
            with _damage_of(entry):
                key = zarr.document_key(entry.name, zarr3=self._document.uses_zarr3)
                self._seal.check(key, bytes(document))

    def prove(self, entries: Sequence[schema.Entry]) -> None:
        """Raises if what holds the values of some arrays is not what was saved."""
        if not self._seal.is_there:
            return
        with reading(self.directory.path):
            if self._is_ocdbt:
                self._seal.check_data()
                return
            for entry in entries:
                with _damage_of(entry):
                    self._seal.check_data(entry.name, is_one_value=True)

    def shardings(self) -> Mapping[str, Mapping[str, Any]]:
        """Reads where jax arrays were, by stored name."""
        return self._read(names.SHARDINGS, schema.load_shardings) or {}

    def prng_impls(self) -> Mapping[str, str]:
        """Reads the implementations of typed keys, by stored name, as one process recorded them."""
        prefix = f"{names.ARRAY_METADATAS}/{names.PROCESS_METADATA.format('')}"
        found = (name for name in self.array_metadatas() if name.removeprefix(prefix).isdigit())
        return next((self.read_array_metadatas(name) for name in found), {})

    def array_metadatas(self) -> list[str]:
        """Returns the names of the documents that hold them."""
        if self._seal.is_there:
            return self._seal.names_below(names.ARRAY_METADATAS)
        directory = self.directory / names.ARRAY_METADATAS
        with reading(directory.path):
            return [f"{names.ARRAY_METADATAS}/{entry.name}" for entry in directory.entries()]

    def read_array_metadatas(self, name: str) -> dict[str, str]:
        """Reads one of those documents."""
        return self._read(name, schema.load_array_metadatas) or {}

    def strings(self, entries: Sequence[schema.Entry]) -> dict[str, str]:
        """Reads the texts of some leaves, by stored name."""
        wanted = [entry.name for entry in entries]
        parse = functools.partial(schema.load_strings, wanted=wanted)
        found = self._read(names.STRINGS, parse) or {}
        for entry in entries:
            if entry.name not in found:
                file = self.directory / names.STRINGS
                raise errors.ReadError(
                    keypath.label(entry.keys), f"its text is missing from {file.path}"
                )
        return found

    def _read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        """Returns what a document says; None where there is none."""
        path = (self.directory / name).path
        if self._seal.is_added(name):
            return None
        with reading(path):
            data = read_document(self.directory, name)
        with damage_in(path):
            found = None if data is None else parse(data)
        if data is not None or name != names.STRINGS:  # without texts each leaf is named
            self._seal.check(name, data)
        return found


@contextlib.contextmanager
def _damage_of(entry: schema.Entry) -> Iterator[None]:
    """Makes of damage of a file that holds one array alone that of the leaf."""
    try:
        yield
    except errors.InvalidLayoutError as error:
        raise errors.CorruptDataError(keypath.label(entry.keys), str(error)) from error


def _recorded(document: Mapping[str, Any]) -> Mapping[str, str]:
    """Returns the handlers that a checkpoint's own metadata name."""
    recorded = document.get("item_handlers")
    return recorded if isinstance(recorded, dict) else {}


def check_name(name: Any, *, is_saved: bool) -> None:
    """Raises for a name that no checkpointable can have; reading also knows `AUTO` and None."""
    if not is_saved and name in (None, names.AUTO_CHECKPOINTABLE):
        return
    if not isinstance(name, str):
        raise TypeError(
            f"a checkpointable's name must be a str, got {type(name).__name__}: {name!r}"
        )
    if not name:
        raise ValueError("Empty string is not supported as a checkpointable name; leave it out")
    if name in names.RESERVED_CHECKPOINTABLES:
        raise ValueError(f"Provided reserved checkpointable key: {name}.")
    is_file = name in (names.CHECKPOINT_METADATA, names.COMMIT_MARKER, names.CHECKPOINT_MARKER)
    if "/" in name or name in (".", "..") or is_file or names.TEMPORARY_MARK in name:
        raise ValueError(
            f"{name!r} can't name a checkpointable: it must be one directory name that the format "
            "does not use itself"
        )


def writes_in_place(options: ambient.Context) -> bool:
    """Says whether checkpoints are committed, and known, by a marker, under some options."""
    mode, older = options.atomicity.mode, options.file.temporary_path_class
    if older is not None:
        older_mode = mode_of_temporary_path(older)
        if mode not in (AtomicityMode.AUTO, older_mode):
            raise ValueError(
                f"file.temporary_path_class asks for {older_mode!r}, and atomicity.mode for "
                f"{mode!r}; leave out the former, which is deprecated"
            )
        mode = older_mode
    return mode is AtomicityMode.COMMIT_FILE
