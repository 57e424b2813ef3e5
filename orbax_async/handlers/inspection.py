"""Looking for damage in a stored tree: its documents, its index, and every byte of its arrays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from orbax_async import _names as names
from orbax_async import _operation as operation
from orbax_async import context as ambient
from orbax_async import errors
from orbax_async._engine import loop, plan
from orbax_async._engine.load_pipeline import ArrayRead, VerifyPipeline
from orbax_async._storage import files, safetensors, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.openers import open_directory
from orbax_async.handlers.stored import StoredTree
from orbax_async.handlers.tensors import TensorTree, is_of_tensors, open_tree
from orbax_async.tree import keypath, schema, selection
from orbax_async.tree.keypath import KeyPath

__all__ = ["Damage", "Findings", "inspect_tree"]

_REGION_NBYTES = 8 << 20  # of small chunks that are read together


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


@dataclasses.dataclass
class Findings:
    """What was found in one tree, or in several.

    Attributes:
      damage: what is wrong.
      leaves: how many leaves were looked at.
      nbytes: how many bytes of arrays were read, decoded.
      unproven: leaves that could be read, and have no checksum that proves their values.
    """

    damage: list[Damage] = dataclasses.field(default_factory=list)
    leaves: int = 0
    nbytes: int = 0
    unproven: list[str] = dataclasses.field(default_factory=list)


async def inspect_tree(
    name: str, directory: str, options: ambient.Context, doing: operation.Operation
) -> Findings:
    """Reads everything of a stored tree, under the read budget, and returns what is wrong."""
    inspection = _Inspection(name, directory)
    pipeline = await loop.to_worker(inspection.begin, options, doing)
    if pipeline is not None:
        await pipeline.run()
        for index, error in sorted(pipeline.damaged.items()):
            inspection.add_leaf(inspection.arrays[index].keys, error)
        inspection.findings.unproven = [
            f"{name}{keypath.label(entry.keys)}"
            for index, entry in inspection.arrays.items()
            if index not in pipeline.damaged
            and not zarr.has_checksum(inspection.reads[index].document)
        ]
    return inspection.findings


class _Inspection:
    """One tree: its findings, and the arrays whose documents are whole."""

    def __init__(self, name: str, directory: str) -> None:
        self._name = name
        self._directory = directory
        self.findings = Findings()
        self.arrays: dict[int, schema.Entry] = {}
        self.reads: dict[int, ArrayRead] = {}

    def begin(self, options: ambient.Context, doing: operation.Operation) -> VerifyPipeline | None:
        """Checks the documents; returns what checks the arrays. Blocks."""
        if is_of_tensors(self._directory, options):
            for path, problem in safetensors.find_damage(open_directory(self._directory)):
                self._add(path, problem, "Nothing can be loaded from here without it.")
            if self.findings.damage:
                return None
        try:
            stored = open_tree(self._directory, options)
        except (errors.InvalidLayoutError, OSError) as error:
            file = names.TREE_METADATA
            if names.OCDBT_MANIFEST in str(error):
                file = names.OCDBT_MANIFEST
            self._add(file, error, "Nothing of this tree can be loaded without that file.")
            return None
        entries = [entry for entry in stored.tree.entries if not entry.is_empty]
        self.findings.leaves = len(entries)
        self._check_documents(stored)
        self._check_strings(stored, [each for each in entries if each.kind == schema.STRING])
        if not stored.arrays:
            return None
        store = stored.open_store()
        self._plan(stored, self._array_documents(stored, store))
        pipeline = VerifyPipeline(
            self.arrays,
            self.reads,
            store,
            read_budget=doing.read_budget,
            recorder=doing.recorder,
        )
        self.findings.nbytes = pipeline.nbytes
        return pipeline

    def _check_documents(self, stored: StoredTree) -> None:
        try:
            stored.shardings()
        except (errors.InvalidLayoutError, OSError) as error:
            self._add(
                names.SHARDINGS, error, "Loading with shardings of your own works without it."
            )
        folder = os.path.join(self._directory, names.ARRAY_METADATAS)
        for found in sorted(files.scan(folder), key=lambda found: found.name):
            try:
                schema.load_array_metadatas(files.read_bytes(found.path) or b"")
            except Exception as error:
                self._add(
                    os.path.join(names.ARRAY_METADATAS, found.name),
                    error,
                    "Only typed random keys need it.",
                )

    def _check_strings(self, stored: StoredTree, texts: list[schema.Entry]) -> None:
        try:
            stored.strings(texts)
        except errors.LeafError:
            for entry in texts:
                self._attempt(entry.keys, stored.strings, [entry])
        except (errors.InvalidLayoutError, OSError) as error:
            self._add(names.STRINGS, error, "All leaves that are no strings load without it.")
            for entry in texts:
                self.add_leaf(entry.keys, error)

    def _array_documents(
        self, stored: StoredTree, store: ArrayStore
    ) -> list[tuple[schema.Entry, dict[str, Any]]]:
        """Reads the arrays' own documents, all of them or, if anything is damaged, each."""
        try:
            documents = stored.documents(store, stored.arrays)
        except errors.CheckpointError as error:
            if isinstance(error, errors.InvalidLayoutError):
                self._add(names.OCDBT_MANIFEST, error, "Leaves may be readable nevertheless.")
                store.forgo_direct()
        else:
            return [(entry, documents[entry.name]) for entry in stored.arrays]
        found = []
        for entry in stored.arrays:
            document = self._attempt(entry.keys, stored.documents, store, [entry])
            if document is not None:
                found.append((entry, document[entry.name]))
        return found

    def _plan(
        self, stored: StoredTree, documents: list[tuple[schema.Entry, dict[str, Any]]]
    ) -> None:
        is_divisible = isinstance(stored, TensorTree)
        alike: dict[int, ArrayRead] = {}
        for index, (entry, document) in enumerate(documents):
            if id(document) not in alike:
                planned = self._attempt(entry.keys, _planned, document, is_divisible)
                if planned is None:
                    continue
                alike[id(document)] = planned
            self.reads[index] = alike[id(document)]
            self.arrays[index] = entry

    def _attempt(self, keys: KeyPath, read: Callable[..., Any], *args: Any) -> Any:
        """Returns what `read` does; what it raises is damage of one leaf, and gives None."""
        try:
            return read(*args)
        except Exception as error:
            self.add_leaf(keys, error)
            return None

    def add_leaf(self, keys: KeyPath, error: Exception) -> None:
        """Notes that a leaf can't be loaded."""
        label, pattern = keypath.label(keys), selection.pattern_of(keys)
        self.findings.damage.append(
            Damage(
                checkpointable=self._name,
                keypath=label or "<root>",
                path=self._directory,
                problem=str(error).removeprefix(f"leaf {label or '<root>'}: "),
                hint="Copy the checkpoint again from where it came from, or load the rest: "
                f"load(path, select={'!' + pattern!r}).",
                pattern=pattern,
            )
        )

    def _add(self, file: str, error: Exception, hint: str) -> None:
        path = os.path.join(self._directory, file)
        self.findings.damage.append(
            Damage(
                checkpointable=self._name,
                keypath="",
                path=path,
                problem=str(error).removeprefix(f"{path} is damaged: ").removeprefix(f"{path}: "),
                hint=f"Copy the file again from where the checkpoint came from. {hint}",
            )
        )


def _planned(document: dict[str, Any], is_divisible: bool) -> ArrayRead:
    """Returns how an array is read; `is_divisible` says that chunks need not be read whole."""
    dtype = zarr.stored_dtype(document)
    shape = tuple(document["shape"])
    chunk_shape = (1,) * len(shape) if is_divisible else zarr.chunk_shape(document)
    regions = plan.chunk_regions(shape, chunk_shape, dtype.itemsize, _REGION_NBYTES)
    return ArrayRead(document, dtype, list(regions))
