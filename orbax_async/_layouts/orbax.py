"""The layout of Orbax: named checkpointables, each in a directory, or older, flat checkpoints.

`docs/format.md` tells what the files are. One listing of a directory tells what lies there, so that
a checkpoint is found with as few calls of its storage as can be.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._commit import session
from orbax_async._layouts.protocol import Checkpoint, Checkpointable, Damage, Details, StoredTree
from orbax_async._storage import zarr
from orbax_async._storage.directory import Directory
from orbax_async._storage.kvstore import ArrayStore, read_index
from orbax_async._trace import logger
from orbax_async.options import AtomicityMode
from orbax_async.options._file_options import mode_of_temporary_path
from orbax_async.tree import keypath, rich, schema, structure
from orbax_async.tree.keypath import KeyPath

__all__ = ["OrbaxCheckpoint", "OrbaxLayout", "check_name", "commit_mode"]

_AGAIN = "Copy it again from where the checkpoint came from."
# What reading a document raises that has another form than it should.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)


class OrbaxLayout:
    """Finds and opens what Orbax and this library write."""

    name = "orbax"
    what = "an Orbax checkpoint"

    def holds(self, directory: Directory) -> bool:
        """Says whether a checkpoint lies here, or a tree of one."""
        found = OrbaxCheckpoint(directory)
        return found.is_marked or found.has(names.TREE_METADATA) or bool(found.trees)

    def find(
        self, directory: Directory, options: ambient.Context, *, may_be_damaged: bool = False
    ) -> OrbaxCheckpoint | str:
        """Returns the checkpoint that lies in a directory, or why there is none."""
        found = OrbaxCheckpoint(directory)
        problem = found.problem()
        if problem is None and found.lacks_metadata and not may_be_damaged:
            problem = f"{names.CHECKPOINT_METADATA} is missing."
        elif (
            problem is None
            and not found.lacks_metadata
            and not found.has(names.COMMIT_MARKER)
            and commit_mode(options) is AtomicityMode.COMMIT_FILE
            and not options.atomicity.allow_legacy_atomic_rename
        ):
            problem = (
                f"it has no {names.COMMIT_MARKER}, which atomicity.mode = 'commit_file' asks for: "
                "its save has not finished, or has renamed it into place. Set "
                "atomicity.allow_legacy_atomic_rename to load the latter."
            )
        return found if problem is None else problem

    def open_tree(
        self, directory: Directory, options: ambient.Context, *, is_for_jax: bool
    ) -> StoredTree:
        """Reads the tree's document, and begins to read the index of its arrays."""
        return _OrbaxTree(directory)

    def explain(self, directory: Directory, error: Exception) -> list[Damage]:
        """Names the document that keeps a tree from being opened."""
        is_manifest = names.OCDBT_MANIFEST in str(error)
        file = names.OCDBT_MANIFEST if is_manifest else names.TREE_METADATA
        hint = "Nothing of this tree can be loaded without that file."
        return [Damage.of_file((directory / file).path, error, hint)]


class OrbaxCheckpoint(Checkpoint):
    """What the listing of a directory tells, whether it is a checkpoint or not."""

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory, OrbaxLayout.what)
        self._inside = {entry.name: entry.is_directory for entry in directory.entries()}

    def has(self, name: str) -> bool:
        """Says whether there is a file or directory of a name."""
        return name in self._inside

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it, or no directory."""
        return not self._inside

    @property
    def is_marked(self) -> bool:
        """Whether it has what every checkpoint of a newer release has, whole or damaged."""
        return self.has(names.CHECKPOINT_METADATA) or self.has(names.CHECKPOINT_MARKER)

    @property
    def is_flat(self) -> bool:
        """Whether it is a tree itself, as in older releases."""
        return self.has(names.TREE_METADATA) and not self.has(names.CHECKPOINT_MARKER)

    @property
    def lacks_metadata(self) -> bool:
        """Whether it was a checkpoint before it lost its metadata."""
        return self.has(names.CHECKPOINT_MARKER) and not self.has(names.CHECKPOINT_METADATA)

    @functools.cached_property
    def _directories(self) -> list[str]:
        """The directories that may be checkpointables."""
        return [
            name
            for name, is_directory in self._inside.items()
            if is_directory
            and name not in names.RESERVED_CHECKPOINTABLES
            and names.TEMPORARY_MARK not in name
            and not self._lies_in(name, names.CHECKPOINT_METADATA)
        ]

    @functools.cached_property
    def trees(self) -> list[str]:
        """The names of its pytrees, the default one first."""
        found = [name for name in self._directories if self._lies_in(name, names.TREE_METADATA)]
        return sorted(found, key=lambda name: name != names.DEFAULT_CHECKPOINTABLE)

    def _lies_in(self, name: str, file: str) -> bool:
        return self.directory.status(f"{name}/{file}") is not None

    def problem(self) -> str | None:
        """Returns why this is no checkpoint; None if it is one, or was before it was damaged."""
        directory = self.directory
        if not self._inside:
            status = directory.status()
            if status is None:
                if session.find_additions(session.directory_of(directory.path)):
                    return "its partial saves are not finalized. Call partial.finalize first."
                return "there is no such directory. Check the path."
            if status.kind == "file":
                return "it is a file, not a directory."
        if names.TEMPORARY_MARK in directory.name:
            return "its name says that it is unfinished: a save is under way or was interrupted."
        if self.has(names.CHECKPOINT_METADATA):
            return None
        parent = directory.parent
        if parent.status(names.CHECKPOINT_METADATA) is not None:
            return (
                f"it appears to be a subdirectory of the checkpoint {parent.path}. Load that, with "
                f"checkpointable_name={directory.name!r}."
            )
        if self.lacks_metadata or self.is_flat or self.trees:
            return None
        if directory.name.endswith(names.SESSION_SUFFIX) and session.find_additions(directory.path):
            return "it holds partial saves. Call partial.finalize, and load the checkpoint beside."
        inside = [name for name, is_directory in self._inside.items() if is_directory]
        steps = [name for name in inside if self._lies_in(name, names.CHECKPOINT_METADATA)]
        if steps:
            return f"it holds checkpoints, and is none itself. Load one of {steps[:10]} in it."
        return f"it has none of the files of one; it holds {inside[:10] or 'no directories'}."

    def may_be_replaced(self, options: ambient.Context) -> bool:
        """Says whether it is a checkpoint, or what a save of Orbax in place has left of one."""
        if self.problem() is None and not self.lacks_metadata:
            return True
        if commit_mode(options) is not AtomicityMode.COMMIT_FILE or self.has(names.COMMIT_MARKER):
            return False
        return self.directory.read(names.CHECKPOINT_MARKER) == b""

    # What it says of itself.

    @functools.cached_property
    def _read_document(self) -> tuple[dict[str, Any], Exception | None]:
        """The checkpoint's own metadata, empty where there is none; and what is wrong with it."""
        data = self.directory.read(names.CHECKPOINT_METADATA)
        try:
            document = json.loads(data) if data is not None else {}
            if not isinstance(document, dict):
                raise ValueError(f"it holds a {type(document).__name__}")
        except ValueError as error:
            return {}, error
        return document, None

    @property
    def document(self) -> dict[str, Any]:
        """The checkpoint's own metadata; damage there costs only what it says."""
        document, error = self._read_document
        if error is not None:
            file = self.directory / names.CHECKPOINT_METADATA
            logger.error("%s is damaged and ignored: %s", file.path, error)
        return document

    @functools.cached_property
    def hidden(self) -> str | None:
        """The name whose deletion was begun and not finished.

        Raises:
          DeletionRecoveryError: the record of the deletion is damaged.
        """
        if not self.has(names.DELETION_RECORD):
            return None
        try:
            record = json.loads(self.directory.read(names.DELETION_RECORD) or b"")
            return str(record["checkpointable_name"])
        except (ValueError, KeyError, TypeError) as error:
            file = self.directory / names.DELETION_RECORD
            raise errors.DeletionRecoveryError(
                f"{file.path} is damaged: {error!r}. It is the record of a deletion that was "
                "begun: remove it if every checkpointable is whole, or delete the checkpoint."
            ) from error

    def details(self) -> Details:
        """Returns the times and the custom metadata that the document has, and the bytes of all."""
        found = self.document

        def nsecs(key: str) -> int | None:
            value = found.get(key)
            return value if isinstance(value, int) else None

        return Details(
            super().details().nbytes,
            nsecs("init_timestamp_nsecs"),
            nsecs("commit_timestamp_nsecs"),
            found.get("custom_metadata") or {},
        )

    # What it holds.

    def tree(self, name: str | None) -> tuple[str | None, Directory]:
        """Finds one pytree, and returns its name and where it lies."""
        path = self.directory.path
        found = [each for each in self.trees if each != self.hidden]
        if name == names.AUTO_CHECKPOINTABLE and found:
            return found[0], self.directory / found[0]
        if name in (None, names.AUTO_CHECKPOINTABLE) and self.is_flat:
            return None, self.directory
        if name == names.AUTO_CHECKPOINTABLE:
            raise errors.InvalidLayoutError(
                f"Failed to interpret path {path} as an Orbax checkpoint of a pytree: no directory "
                f"in it has a {names.TREE_METADATA}"
            )
        if name is None:
            raise errors.InvalidLayoutError(
                f"{path} is no flat checkpoint: checkpointable_name must be one of {found}"
            ) from ValueError(f"the name must be given; the checkpoint holds {found}")
        if name == self.hidden:
            raise self._in_deletion(name)
        if name not in found:
            flat = "; it is flat, load it with checkpointable_name=None" if self.is_flat else ""
            missing = f"checkpointable {name!r} is not in {path}; it holds {found}{flat}"
            raise errors.InvalidLayoutError(
                f"Failed to interpret path {path} as an Orbax checkpoint of a pytree: {missing}"
            ) from FileNotFoundError(missing)
        return name, self.directory / name

    def checkpointables(self, wanted: Collection[str] = ()) -> dict[str, Checkpointable]:
        """Returns what can be loaded, by name.

        A directory counts where the checkpoint records its handler, or records none at all, and
        where it looks like a pytree. Others were put there by somebody else.
        """
        if self.is_flat:
            raise errors.InvalidLayoutError(
                f"{self.directory.path} is a flat (direct) checkpoint with no named "
                "checkpointables: load it with load(path, checkpointable_name=None)"
            )
        recorded = self._recorded
        known = [
            name
            for name in self._directories
            if name != self.hidden and (not recorded or name in recorded or name in self.trees)
        ]
        if self.hidden in wanted:
            raise self._in_deletion(str(self.hidden))
        missing = [name for name in wanted if name not in known]
        if missing:
            raise errors.UnknownCheckpointableError(
                f"Requested checkpointables: {missing} for loading were not found in the "
                f"checkpoint {self.directory.path}. Available checkpointables: {known}"
            )
        return {name: self._checkpointable(name) for name in wanted or known}

    @property
    def _recorded(self) -> dict[str, str]:
        """The handlers that the document names."""
        recorded = self.document.get("item_handlers")
        return recorded if isinstance(recorded, dict) else {}

    def _checkpointable(self, name: str) -> Checkpointable:
        is_pytree = name in self.trees if name else self.is_flat
        return Checkpointable(self.directory / name, self._recorded.get(name), is_pytree)

    def _in_deletion(self, name: str) -> errors.DeletionInProgressError:
        path = self.directory.path
        return errors.DeletionInProgressError(
            f"checkpointable {name!r} of {path} is being deleted, or its deletion was interrupted; "
            f"delete it again to finish: delete({path!r}, checkpointable_name={name!r})"
        )

    def survey(self) -> tuple[dict[str, Checkpointable], list[Damage]]:
        """Returns all that is there, a flat tree under the name '', and what is wrong."""
        damage: list[Damage] = []

        def add(name: str, problem: str, hint: str) -> None:
            damage.append(Damage("", "", (self.directory / name).path, problem, hint))

        _, error = self._read_document
        if self.lacks_metadata:
            add(names.CHECKPOINT_METADATA, "it is missing", _AGAIN)
        elif error is not None:
            add(names.CHECKPOINT_METADATA, f"it is damaged: {error}", _AGAIN)
        hidden = None
        try:
            hidden = self.hidden
        except errors.DeletionRecoveryError as unreadable:
            file = (self.directory / names.DELETION_RECORD).path
            add(names.DELETION_RECORD, str(unreadable).removeprefix(f"{file} is "), "")
        if hidden is not None:
            add(hidden, "its deletion was not finished", "Delete it again.")
        found = [*self._directories, *([names.METRICS] if self.has(names.METRICS) else [])]
        for name in self._recorded:
            if name not in found and name != hidden:
                add(name, "it is recorded, and missing", _AGAIN)
        if self.is_flat:
            found = [""]
        return {name: self._checkpointable(name) for name in found if name != hidden}, damage


class _OrbaxTree(StoredTree):
    """A tree of zarr arrays, in one OCDBT database or in files, and its documents."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        data = directory.read(names.TREE_METADATA)
        if data is None:
            raise errors.InvalidLayoutError(
                f"{directory.path} holds no pytree: it has no {names.TREE_METADATA}"
            )
        index = read_index(directory.path)
        try:
            self._document = schema.TreeDocument.load(data)
        except _DAMAGED as error:
            raise self._damaged(names.TREE_METADATA, error) from error
        super().__init__(directory, self._document.entries)
        uses_ocdbt = self._document.uses_ocdbt
        self._is_ocdbt = index is not None if uses_ocdbt is None else uses_ocdbt
        self._index = index if self._is_ocdbt else None
        if self._is_ocdbt and index is None and self.arrays:
            raise errors.InvalidLayoutError(
                f"{directory.path} is damaged: {names.OCDBT_MANIFEST} is missing"
            )

    def _damaged(self, name: str, error: Exception) -> errors.InvalidLayoutError:
        said = repr(error) if isinstance(error, KeyError) else str(error)
        return errors.InvalidLayoutError(f"{(self.directory / name).path} is damaged: {said}")

    def nest_for(self, options: ambient.Context) -> Callable[[Iterable[tuple[KeyPath, Any]]], Any]:
        """Returns what builds the tree: of plain containers, or of those that were recorded."""
        text = self._document.rich
        if text is None or not options.pytree.saving.pytree_metadata_options.support_rich_types:
            return structure.nest

        def nest(entries: Iterable[tuple[KeyPath, Any]]) -> Any:
            try:
                return rich.nest(text, entries)
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
            self.directory.path,
            ocdbt=self._is_ocdbt,
            zarr3=self._document.uses_zarr3,
            direct=self._index,
        )

    def documents(
        self, store: ArrayStore, entries: Sequence[schema.Entry]
    ) -> dict[str, dict[str, Any]]:
        """Reads the zarr documents of some arrays, by stored name."""
        keys = [zarr.document_key(entry.name, zarr3=store.zarr3) for entry in entries]
        try:
            values = store.read_many(keys)
        except Exception as error:
            text = str(error).split(" [source locations=")[0]
            raise errors.InvalidLayoutError(
                f"the array store of {self.directory.path} is damaged: {text}"
            ) from error
        parsed: dict[bytes, dict[str, Any]] = {}  # few differ
        found = {}
        for entry, value in zip(entries, values, strict=True):
            if value is None:
                raise errors.ReadError(
                    keypath.label(entry.keys),
                    f"its array {entry.name!r} is missing from {self.directory.path}",
                )
            data = bytes(value)
            document = parsed.get(data)
            if document is None:
                try:
                    document = parsed[data] = zarr.parse_document(data)
                except ValueError as error:
                    raise errors.CorruptDataError(
                        keypath.label(entry.keys),
                        f"the metadata of its array is damaged: {error}",
                    ) from error
            found[entry.name] = document
        return found

    def shardings(self) -> Mapping[str, Mapping[str, Any]]:
        """Reads where jax arrays were, by stored name."""
        data = self.directory.read(names.SHARDINGS)
        try:
            return {} if data is None else schema.load_shardings(data)
        except _DAMAGED as error:
            raise self._damaged(names.SHARDINGS, error) from error

    def prng_impls(self) -> Mapping[str, str]:
        """Reads the implementations of typed keys, by stored name, as one process recorded them."""
        prefix = names.PROCESS_METADATA.format("")
        for entry in (self.directory / names.ARRAY_METADATAS).entries():
            if entry.name.removeprefix(prefix).isdigit():
                return self._array_metadatas(entry.name)
        return {}

    def _array_metadatas(self, file: str) -> dict[str, str]:
        name = f"{names.ARRAY_METADATAS}/{file}"
        try:
            return schema.load_array_metadatas(self.directory.read(name) or b"")
        except _DAMAGED as error:
            raise self._damaged(name, error) from error

    def strings(self, entries: Sequence[schema.Entry]) -> dict[str, str]:
        """Reads the texts of some leaves, by stored name."""
        data = self.directory.read(names.STRINGS)
        try:
            found = schema.load_strings(data or b"{}", [entry.name for entry in entries])
        except ValueError as error:
            raise self._damaged(names.STRINGS, error) from error
        for entry in entries:
            if entry.name not in found:
                file = self.directory / names.STRINGS
                raise errors.ReadError(
                    keypath.label(entry.keys), f"its text is missing from {file.path}"
                )
        return found

    def find_damage(self) -> Iterator[Damage]:
        """Yields what is wrong with `_sharding` and with the records of arrays."""
        own = "Loading with shardings of your own works without it."
        yield from self._checked(names.SHARDINGS, self.shardings, own)
        for entry in (self.directory / names.ARRAY_METADATAS).entries():
            read = functools.partial(self._array_metadatas, entry.name)
            name = f"{names.ARRAY_METADATAS}/{entry.name}"
            yield from self._checked(name, read, "Only typed random keys need it.")

    def _checked(self, name: str, read: Callable[[], Any], hint: str) -> Iterator[Damage]:
        try:
            read()
        except (errors.InvalidLayoutError, OSError) as error:
            yield Damage.of_file((self.directory / name).path, error, hint)


def check_name(name: Any, *, is_saved: bool) -> None:
    """Raises for a name that no checkpointable can have.

    Args:
      name: what the user gave.
      is_saved: whether it is to be written; reading also knows `AUTO` and None.
    """
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


def commit_mode(options: ambient.Context) -> AtomicityMode:
    """Returns how checkpoints are committed, and recognized as such, under some options.

    Raises:
      ValueError: the older option and the newer one ask for different things.
    """
    mode, older = options.atomicity.mode, options.file.temporary_path_class
    if older is None:
        return mode
    older_mode = mode_of_temporary_path(older)
    if mode not in (AtomicityMode.AUTO, older_mode):
        raise ValueError(
            f"file.temporary_path_class asks for {older_mode!r}, and atomicity.mode for {mode!r}; "
            "leave out the former, which is deprecated"
        )
    return older_mode
