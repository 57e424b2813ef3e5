"""Verifying a checkpoint: reading all of it, and reporting what is damaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._engine import loop, plan
from orbax_async._engine.load_pipeline import ArrayRead, VerifyPipeline
from orbax_async._layouts.layout import COPY_AGAIN, Checkpointable, Damage, StoredTree, reading
from orbax_async._layouts.reader import Reader, layout_of
from orbax_async._operation import Operation, starting
from orbax_async._response import AsyncResponse
from orbax_async._storage import seal, zarr
from orbax_async._storage.array_store import ArrayStore
from orbax_async._storage.directory import Directory
from orbax_async._storage.zarr import ArrayDocument
from orbax_async.handlers.documents import JsonHandler, MetricsHandler
from orbax_async.handlers.phases import TYPESTRS
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.path import Path, PathLike
from orbax_async.tree import keypath, schema
from orbax_async.tree.keypath import KeyPath

_REGION_NBYTES = 8 << 20  # of small chunks that are read together
_SHOWN = 20
_DOCUMENTS = {TYPESTRS[kind]: kind for kind in (JsonHandler, MetricsHandler)}
_TREES = (TYPESTRS[PyTreeHandler],)


@dataclasses.dataclass(frozen=True)
class VerificationReport:
    """What was found when a checkpoint was read as a whole.

    `str` gives it as text.

    Attributes:
      path: the checkpoint.
      damage: all that is wrong, by checkpointable, documents first.
      leaves: how many leaves were looked at.
      nbytes: how many bytes of arrays were read, decoded.
      elapsed_secs: how long it took.
      unproven: leaves that could be read, but whose values have no checksum that proves them, as
        `name['key']`. Orbax itself writes none.
      unchecked: checkpointables of which only their own handler could tell. Where they have
        digests, their files are what was saved.
      unproven_documents: checkpointables whose files have no digests that prove them, as of Orbax
        and of older versions; the checkpoint's path where it has no names.
      added: files that lie in the checkpoint and were not saved with it. Loads ignore them.
    """

    path: str
    damage: tuple[Damage, ...]
    leaves: int
    nbytes: int
    elapsed_secs: float
    unproven: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    unproven_documents: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def is_intact(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    @property
    def intact(self) -> tuple[str, ...]:
        """Patterns that leave out the damaged leaves, for `load(..., select=)`; `**` for none."""
        return tuple(f"!{each.pattern}" for each in self.damage if each.pattern) or ("**",)

    def __str__(self) -> str:
        verdict = "intact" if self.is_intact else f"damaged, {len(self.damage)} findings"
        lines = [
            f"{self.path}: {verdict} ({self.leaves} leaves, {self.nbytes / 1e6:.1f} MB read in "
            f"{self.elapsed_secs:.2f} s)"
        ]
        lines += [f"  {each}\n    {each.hint}" for each in self.damage[:_SHOWN]]
        if len(self.damage) > _SHOWN:
            lines.append(f"  and {len(self.damage) - _SHOWN} more")
        if self.unproven:
            lines.append(f"  without checksums: {_listed(self.unproven)}")
        if self.unchecked:
            lines.append(f"  not looked into: {_listed(self.unchecked)}")
        if self.unproven_documents:
            lines.append(f"  documents without digests: {_listed(self.unproven_documents)}")
        if self.added:
            lines.append(f"  added, and ignored: {_listed(self.added)}")
        return "\n".join(lines)


def _listed(items: tuple[str, ...]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def verify(path: PathLike) -> VerificationReport:
    """Reads all of a checkpoint, and returns a report of what is damaged.

    Takes and raises what `verify_async` does.

    Example:
      ::

        report = ocp.verify("/checkpoints/7")
        if not report.is_intact:
            print(report)
            state = ocp.load("/checkpoints/7", select=report.intact)
    """
    return verify_async(path)._finish()


def verify_async(path: PathLike) -> AsyncResponse[VerificationReport]:
    """Reads all of a checkpoint in the background, and reports what is damaged.

    Every document is parsed, every chunk of every array is read and decoded, and every checksum is
    checked, under `memory.read_concurrent_bytes`. Nothing is kept, and nothing is put on devices.
    Safetensors files have no checksums: their headers are checked, their sizes, and that every byte
    can be read; all of their tensors are `unproven`.

    Example:
      ::

        assert (await ocp.verify_async("/checkpoints/7")).is_intact

    Args:
      path: the checkpoint; under another `context.checkpoint_layout`, safetensors files.

    Returns:
      A response whose result is the report. Damage raises nothing.

    Raises:
      InvalidLayoutError: (when awaited) there is no checkpoint, not even a damaged one.
    """
    with starting("load") as operation:
        reader = Reader(operation, path)

        async def read(
            found: tuple[dict[str, Checkpointable], list[Damage]],
        ) -> VerificationReport:
            stored, damage = found
            findings = _Findings(damage)
            for name, each in stored.items():
                if each.is_pytree or each.typestr in _TREES:
                    await _Inspection(name, each.directory, operation, findings).run()
                elif each.typestr in _DOCUMENTS or name == names.METRICS:
                    kind = _DOCUMENTS.get(each.typestr or "", MetricsHandler)
                    findings.add(name, await _inspect_document(each.directory, kind()))
                else:
                    findings.unchecked.append(name)
            sealed = await loop.to_worker(_sealed, reader.directory, list(stored), findings.damage)
            return VerificationReport(
                reader.directory.path,
                (*findings.damage, *sealed.damage),
                findings.leaves,
                findings.nbytes,
                operation.recorder.progress().elapsed_secs,
                tuple(findings.unproven),
                tuple(findings.unchecked),
                tuple(name or reader.directory.path for name in sealed.unproven),
                tuple(sealed.added),
            )

        return reader.start(
            "verification of", lambda layout: layout.survey(), read, may_be_damaged=True
        )


class _Sealed(NamedTuple):
    """What the seal of a checkpoint says of it."""

    damage: list[Damage]
    unproven: list[str]  # checkpointables without digests
    added: list[str]


def _sealed(root: Directory, stored: Collection[str], known: Sequence[Damage]) -> _Sealed:
    """Compares all files with their digests; leaves out what is known in more detail. Blocks."""
    named = {each.path for each in known}
    with_damaged_leaves = {each.checkpointable for each in known if each.keypath}
    with reading(root.path):
        if seal.is_missing(root):
            file = (root / names.COMMIT_MARKER).path
            problem = "it is missing, and with it the digests of all other files"
            return _Sealed([Damage("", "", file, problem, COPY_AGAIN)], list(stored), [])
        try:
            found = seal.of_checkpoint(root)
        except errors.InvalidLayoutError as error:
            is_known = getattr(error, "path", None) in named
            damage = [] if is_known else [Damage.of(root, error)]
            return _Sealed(damage, list(stored), [])
        damage = []
        for name, problem, is_data in found.problems():
            top, _, inside = name.partition("/")
            file = (root / name).path
            is_gone = bool(inside) and top not in stored
            is_told = file in named or any(file in each.problem for each in known)
            if not (is_gone or is_told or (is_data and top in with_damaged_leaves)):
                owner = top if inside else ""
                damage.append(Damage(owner, "", file, problem, COPY_AGAIN))
        unproven = [name for name in stored if not found.covers(f"{name}/")]
        return _Sealed(damage, unproven, found.added())


@dataclasses.dataclass
class _Findings:
    """What is found of all checkpointables, as in the report."""

    damage: list[Damage]
    leaves: int = 0
    nbytes: int = 0
    unproven: list[str] = dataclasses.field(default_factory=list)
    unchecked: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, damage: Iterable[Damage]) -> None:
        """Adds what is wrong with the documents of a checkpointable."""
        self.damage += [dataclasses.replace(each, checkpointable=name) for each in damage]


async def _inspect_document(directory: Directory, handler: JsonHandler) -> list[Damage]:
    try:
        await (await handler.load(Path(directory.path)))
    except errors.InvalidLayoutError as error:
        return [Damage.of(directory, error)]
    return []


class _Inspection:
    """Reads everything of one stored tree, under the read budget, and notes what is wrong."""

    def __init__(
        self, name: str, directory: Directory, operation: Operation, findings: _Findings
    ) -> None:
        self._name = name
        self._directory = directory
        self._operation = operation
        self._findings = findings
        # The arrays whose documents are whole.
        self._arrays: dict[int, schema.Entry] = {}
        self._reads: dict[int, ArrayRead] = {}

    async def run(self) -> None:
        """Checks the documents, and then the arrays."""
        pipeline = await loop.to_worker(self._begin)
        if pipeline is None:
            return
        await pipeline.run()
        for index, error in sorted(pipeline.damaged.items()):
            self._add_leaf(self._arrays[index].keys, error)
        self._findings.unproven += [
            f"{self._name}{keypath.label(entry.keys)}"
            for index, entry in self._arrays.items()
            if index not in pipeline.damaged and not self._reads[index].document.has_checksum
        ]

    def _begin(self) -> VerifyPipeline | None:
        """Checks the documents; returns what checks the arrays. Blocks."""
        options = self._operation.context
        layout = layout_of(self._directory, options)
        damage: list[Damage] = []
        try:
            damage += layout.find_damage()
            stored = layout.open_tree()
        except errors.InvalidLayoutError as error:
            self._findings.add(self._name, damage or [Damage.of(self._directory, error)])
            return None
        self._findings.add(self._name, damage)
        entries = [entry for entry in stored.entries if not entry.is_empty]
        self._findings.leaves += len(entries)
        self._check_strings(stored, [each for each in entries if each.kind == schema.STRING])
        if not stored.arrays:
            return None
        store = stored.open_store()
        self._plan(store, self._documents(stored, store), stored.lies_plainly)
        pipeline = VerifyPipeline(
            self._arrays,
            self._reads,
            store,
            read_budget=self._operation.read_budget,
            recorder=self._operation.recorder,
        )
        self._findings.nbytes += pipeline.nbytes
        return pipeline

    def _check_strings(self, stored: StoredTree, texts: list[schema.Entry]) -> None:
        try:
            stored.strings(texts)
        except errors.LeafError:
            for entry in texts:
                self._attempt(entry.keys, stored.strings, [entry])
        except errors.InvalidLayoutError as error:
            hint = "All leaves that are no strings load without it."
            self._findings.add(self._name, [Damage.of(self._directory, error, hint)])
            for entry in texts:
                self._add_leaf(entry.keys, error)

    def _documents(
        self, stored: StoredTree, store: ArrayStore
    ) -> list[tuple[schema.Entry, ArrayDocument]]:
        """Reads the arrays' own documents, all of them or, if anything is damaged, each."""
        try:
            documents = stored.documents(store, stored.arrays)
            stored.prove(stored.arrays)
        except errors.CheckpointError as error:
            if isinstance(error, errors.InvalidLayoutError):
                hint = "Leaves may be readable without it."
                self._findings.add(self._name, [Damage.of(self._directory, error, hint)])
                store.forgo_direct()
        else:
            return [(entry, documents[entry.name]) for entry in stored.arrays]
        found = []
        for entry in stored.arrays:
            document = self._attempt(entry.keys, _proven, stored, store, entry)
            if document is not None:
                found.append((entry, document[entry.name]))
        return found

    def _plan(
        self,
        store: ArrayStore,
        documents: Sequence[tuple[schema.Entry, ArrayDocument]],
        lies_plainly: bool,
    ) -> None:
        """Decides how each array is read; those with one document share what is decided."""
        alike: dict[int, ArrayRead] = {}
        for index, (entry, document) in enumerate(documents):
            if document.nbytes > zarr.LARGE_NBYTES:
                absence = store.find_absence(entry.name, document)
                if absence is not None:
                    self._add_leaf(entry.keys, ValueError(absence))
                    continue
            read = alike.get(id(document))
            if read is None:
                read = self._attempt(entry.keys, _array_read, document, lies_plainly)
            if read is not None:
                self._arrays[index], self._reads[index] = entry, read
                alike[id(document)] = read

    def _attempt(self, keys: KeyPath, read: Callable[..., Any], *args: Any) -> Any:
        """Returns what `read` does; what it raises is damage of one leaf, and gives None."""
        try:
            return read(*args)
        except Exception as error:
            self._add_leaf(keys, error)
            return None

    def _add_leaf(self, keys: KeyPath, error: Exception) -> None:
        """Notes that a leaf can't be loaded."""
        label, pattern = keypath.label(keys) or "<root>", keypath.pattern_of(keys)
        self._findings.damage.append(
            Damage(
                checkpointable=self._name,
                keypath=label,
                path=self._directory.path,
                problem=str(error).removeprefix(f"leaf {label}: "),
                hint="Copy the checkpoint again from where it came from, or load the rest: "
                f"load(path, select={'!' + pattern!r}).",
                pattern=pattern,
            )
        )


def _proven(stored: StoredTree, store: ArrayStore, entry: schema.Entry) -> dict[str, ArrayDocument]:
    """Returns the document of one array, whose values lie where they were saved."""
    document = stored.documents(store, [entry])
    stored.prove([entry])
    return document


def _array_read(document: ArrayDocument, lies_plainly: bool) -> ArrayRead:
    """Returns how an array is read, in pieces that can be read alone."""
    shape, dtype = document.shape, document.dtype
    chunk_shape = (1,) * len(shape) if lies_plainly else document.chunk_shape
    regions = plan.chunk_regions(shape, chunk_shape, dtype.itemsize, _REGION_NBYTES)
    return ArrayRead(document, dtype, list(regions))
