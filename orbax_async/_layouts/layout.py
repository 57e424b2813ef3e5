"""What a layout answers: is it this one, what does the checkpoint hold, how is a tree of it read.

`Layout` and `StoredTree` by themselves are the simplest layout, one tree of arrays and nothing
else; a layout overrides what differs in its own. Every method blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import jax

from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.directory import Directory, sizes
from orbax_async._storage.zarr import ArrayDocument
from orbax_async.tree import schema, structure
from orbax_async.tree.keypath import KeyPath

COPY_AGAIN = "Copy it again from where the checkpoint came from."


def reading(path: str) -> AbstractContextManager[None]:
    """Reports an OSError of the block as one of ours: what lies at a path can't be read."""
    return errors.reported_as(
        functools.partial(errors.UnreadableError.of_file, path=path),
        f"cannot read {path}",
        "Check that this process may read it, and that its storage works.",
    )


@dataclasses.dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a checkpoint.

    Attributes:
      checkpointable: its name; empty for the checkpoint itself, or a flat, older one.
      keypath: of the leaf that can't be loaded; empty where a document is damaged.
      path: the file or directory where it is.
      problem: what was found.
      hint: what can be done.
      pattern: selects the leaf, for `load(..., select=)`; empty where there is none.
    """

    checkpointable: str
    keypath: str
    path: str
    problem: str
    hint: str
    pattern: str = ""

    def __str__(self) -> str:
        where = f"{self.checkpointable}{self.keypath}" if self.keypath else self.path
        return f"{where}: {self.problem}"

    @classmethod
    def of(cls, directory: Directory, error: Exception, hint: str = "") -> Damage:
        """Describes what the use of a file, or else of a directory, has raised."""
        path = getattr(error, "path", None) or directory.path
        problem = str(error).removeprefix(f"{path} is damaged: ").removeprefix(f"{path}: ")
        if isinstance(error, errors.UnreadableError):  # which says what to do
            return cls("", "", path, problem, "")
        return cls("", "", path, problem, f"{COPY_AGAIN} {hint}".rstrip())


class Checkpointable(NamedTuple):
    """One checkpointable of a checkpoint: where it lies, and what it looks like."""

    directory: Directory
    typestr: str | None  # the handler that saved it, where the checkpoint says so
    is_pytree: bool


class Details(NamedTuple):
    """What a checkpoint says of itself, beside its tree; as in `CheckpointMetadata`."""

    nbytes: int
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None
    custom_metadata: dict[str, Any] | None = None


class Layout:
    """One way in which a checkpoint can lie, looked for in one directory."""

    what: ClassVar[str]
    """What its checkpoints consist of, for messages: "safetensors files"."""

    def __init__(self, directory: Directory, options: ambient.Context) -> None:
        self.directory = directory
        self.options = options

    @property
    def is_there(self) -> bool:
        """Whether what only this layout has lies here: a checkpoint, or a tree; maybe damaged."""
        raise NotImplementedError

    @property
    def is_damaged(self) -> bool:
        """Whether this was a checkpoint, and has lost what loading needs."""
        return False

    def problem(self) -> str | None:
        """Returns why no checkpoint can be loaded from here, as the end of a sentence."""
        return None if self.is_there else f"there are no {self.what}. Check the path."

    def tree(self, name: str | None) -> tuple[str | None, Directory]:
        """Returns one pytree's name, and where it lies; `AUTO` chooses, None asks for one without.

        It raises if there is no such pytree, or its deletion was begun and not finished.
        """
        return None, self.directory

    def checkpointables(self, wanted: Collection[str] = ()) -> dict[str, Checkpointable]:
        """Returns what can be loaded by name: what is wanted, or all."""
        raise errors.UnsupportedOptionError(
            f"{self.directory.path} is read as {self.what}, which hold no checkpointables: use "
            "`load` and `metadata`, or leave context.checkpoint_layout at 'orbax'"
        )

    def survey(self) -> tuple[dict[str, Checkpointable], list[Damage]]:
        """Returns all that is there, by name, and what is wrong with the checkpoint as a whole."""
        return {"": Checkpointable(self.directory, None, is_pytree=True)}, []

    def details(self) -> Details:
        """Returns what the checkpoint says of itself."""
        return Details(sum(sizes(self.directory).values()))

    def open_tree(self, *, is_for_jax: bool = False) -> StoredTree:
        """Opens the tree; `is_for_jax` makes jax arrays where nothing says what arrays become."""
        raise NotImplementedError

    def find_damage(self) -> Iterator[Damage]:
        """Yields what is wrong with the documents of the tree that lies in the directory."""
        try:
            self.open_tree()
        except errors.InvalidLayoutError as error:
            yield Damage.of(self.directory, error)


class StoredTree:
    """A tree that was found: its leaves and empty nodes, and how their values are read."""

    may_be_asked_in_part = False  # whether an abstract tree may leave out leaves
    lies_plainly = False  # whether elements lie as they are, so that any box of them is read alone
    mismatch: type[errors.TreeMismatchError] = errors.TreeMismatchError
    mismatch_hint = (
        "Give a tree with the same keys; `...` or None as a leaf skips that leaf, and "
        "pytree.loading.partial_load or `select` whole parts."
    )

    def __init__(self, directory: Directory, entries: Sequence[schema.Entry]) -> None:
        self.directory = directory
        self.entries = entries

    @functools.cached_property
    def arrays(self) -> list[schema.Entry]:
        """The leaves that are stored as arrays."""
        return [each for each in self.entries if not each.is_empty and each.kind != schema.STRING]

    def open_store(self) -> ArrayStore:
        """Opens the store of its arrays."""
        raise NotImplementedError

    def documents(
        self, store: ArrayStore, entries: Sequence[schema.Entry]
    ) -> dict[str, ArrayDocument]:
        """Returns what zarr documents say, or would say, of some arrays, by stored name."""
        raise NotImplementedError

    def prove(self, entries: Sequence[schema.Entry]) -> None:
        """Raises if what holds the values of some arrays is known to be another than was saved.

        Raises:
          CorruptDataError: what holds those of one.
          InvalidLayoutError: what holds those of all.
        """

    def strings(self, entries: Sequence[schema.Entry]) -> dict[str, str]:
        """Reads the texts of some leaves, by stored name."""
        return {}

    def shardings(self) -> Mapping[str, Mapping[str, Any]]:
        """Reads where jax arrays were, by stored name."""
        return {}

    def default_sharding(self) -> jax.sharding.Sharding | None:
        """Returns where jax arrays go of which nothing says where; None for the usual place."""
        return None

    def prng_impls(self) -> Mapping[str, str]:
        """Reads the implementations of typed keys, by stored name."""
        return {}

    def nest_for(self, options: ambient.Context) -> Callable[[Iterable[tuple[KeyPath, Any]]], Any]:
        """Returns what builds the tree out of key paths and values."""
        return structure.nest

    def metadata(self) -> Any:
        """Returns what `metadata` tells of the tree; None for what kinds of leaves tell."""
        return None
