"""Stores of arrays: an OCDBT database or plain files, as TensorStore sees a directory.

A store belongs to one operation: its TensorStore context, with its caches and thread limits, is
made for that operation and dropped with it, so that nothing stays pinned in memory.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import tensorstore as ts

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._storage import zarr
from orbax_async._storage.direct import MAX_VALUE_NBYTES, DirectReader
from orbax_async._storage.directory import Capability, Directory, sizes
from orbax_async._storage.safetensors import TensorReader

_COPY_THREADS = max(2, min(8, os.cpu_count() or 2))
# For raw arrays a thread only computes a CRC-32C, quicker than any disk writes; a second one would
# keep the core from whoever writes, and a worker that has just been given the GIL.
_RAW_COPY_THREADS = max(1, _COPY_THREADS // 4)
_CONTEXT = {
    "file_io_concurrency": {"limit": 4},
    "data_copy_concurrency": {"limit": _COPY_THREADS},
    "data_copy_concurrency#raw": {"limit": _RAW_COPY_THREADS},
    "cache_pool": {"total_bytes_limit": 0},
    # Decoded B-tree nodes may be kept, but only as long as the store lives.
    "cache_pool#nodes": {"total_bytes_limit": 100_000_000},
}
# Small values live in the B-tree's nodes. A commit rewrites each node that it changes, so nodes
# of a limited size keep many commits of a large tree from rewriting all of it each time.
_OCDBT_CONFIG = {
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 2_000_000,
    "version_tree_arity_log2": 4,
    "compression": {"id": "zstd"},
}
_MERGED_CONFIG = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}
_LARGE_FILE_NBYTES = 8 << 20
_INTERRUPTED = os.strerror(errno.EINTR)
_REPEATS = 5
_MAX_MANIFEST_NBYTES = 64 << 20
_MOST_EXPANSION = 1 << 16  # more bytes than any encoding makes of one

_used_by: int | None = None


def _check_process() -> None:
    """Raises where TensorStore would abort: in a child that was forked after its first use."""
    global _used_by
    if _used_by is None:
        _used_by = os.getpid()
    if _used_by != os.getpid():
        raise errors.LoopError(
            f"this process was forked from process {_used_by} after that had saved or loaded, and "
            "TensorStore's threads do not survive a fork. Fork before the first checkpoint, or "
            'start processes by "spawn" or "forkserver".'
        )


class ArrayStore:
    """The arrays below one directory, by stored name."""

    def __init__(
        self,
        directory: Directory,
        *,
        ocdbt: bool,
        zarr3: bool,
        direct: DirectReader | TensorReader | None = None,
    ) -> None:
        _check_process()
        self.directory = directory
        self.zarr3 = zarr3
        self.is_ocdbt = ocdbt
        self._given = direct
        self._is_new = False
        self._context = _context()
        self._spec = directory.kvstore()
        if ocdbt:
            self._spec = {"driver": "ocdbt", "base": self._spec, "cache_pool": "cache_pool#nodes"}
        self._seen: set[str] = set()

    @classmethod
    def create(
        cls,
        directory: Directory,
        *,
        ocdbt: bool,
        zarr3: bool,
        syncs: bool = False,
        target_data_file_nbytes: int | None = None,
    ) -> Self:
        """Returns a store to write to; its directory need not be there.

        A commit syncs what is written on its own machine, but not what others write: `syncs` has
        TensorStore do it.
        """
        store = cls(directory, ocdbt=ocdbt, zarr3=zarr3)
        store._is_new = True
        store._context = _context(syncs=syncs)
        if ocdbt:
            store._spec |= {"config": _OCDBT_CONFIG, "assume_config": True}
            if target_data_file_nbytes is not None:
                store._spec["target_data_file_size"] = target_data_file_nbytes
        return store

    @functools.cached_property
    def _kvstore(self) -> ts.KvStore:
        if self.is_ocdbt and not self._is_new:
            found = _nbytes(self.directory, names.OCDBT_MANIFEST)
            if found > _MAX_MANIFEST_NBYTES:
                raise ValueError(f"{found} bytes found in {names.OCDBT_MANIFEST}")
        return ts.KvStore.open(self._spec, context=self._context).result()

    # Writing.

    def begin(self) -> ts.Transaction:
        """Starts a transaction; on OCDBT it is atomic, on files it only groups the writes."""
        return ts.Transaction(atomic=self.is_ocdbt)

    def values(self, transaction: ts.Transaction) -> ts.KvStore:
        """Returns where to put whole values, by key, as part of a transaction."""
        return self._kvstore.with_transaction(transaction)

    def put_chunk(
        self,
        transaction: ts.Transaction,
        name: str,
        document: bytes,
        box: Sequence[tuple[int, int]],
        array: np.ndarray[Any, Any],
    ) -> ts.Future[None]:
        """Adds the elements of `box` to a transaction, referring to `array` until it commits.

        The caller must hold the returned future until the commit: TensorStore abandons a write of
        which no future is left. One is enough; each takes the GIL when it is done.
        """
        target = ts.open(
            _array_spec(document),
            kvstore=self._kvstore.with_transaction(transaction) / _prefix(name),
            context=self._context,
            open=True,
            assume_metadata=True,
        ).result()
        if target.shape != array.shape:  # each of these calls lets go of the GIL
            target = target[tuple(slice(start, stop) for start, stop in box)]
        return target.write(array, can_reference_source_data_indefinitely=True).copy

    def start_writeback(self) -> None:
        """Has the disk begin with the large data files that commits have added since the last call.

        The commit of the checkpoint syncs every file, and finds little left to wait for.
        """
        if not self.is_ocdbt:
            return
        data = self.directory / names.OCDBT_DATA
        with contextlib.suppress(OSError):  # for the commit's syncs to tell
            for name, _ in data.entries():
                if name in self._seen:
                    continue
                self._seen.add(name)
                # One that is still being written has another name, and may be gone from there.
                with contextlib.suppress(FileNotFoundError):
                    found = data.status(name)
                    if found is not None and found.nbytes >= _LARGE_FILE_NBYTES:
                        data.start_writeback(name)

    # Reading.

    @functools.cached_property
    def direct(self) -> DirectReader | TensorReader | None:
        """What reads values without TensorStore; None where nothing does."""
        if self._given is not None:
            return self._given
        is_read_directly = self.is_ocdbt and not self._is_new
        return _direct_reader(self.directory) if is_read_directly else None

    def forgo_direct(self) -> None:
        """Leaves all reading to TensorStore, which needs only the nodes on the way to a value."""
        self.direct = None

    def read_many(self, keys: Sequence[str]) -> list[bytes | memoryview | None]:
        """Reads whole values, None for each key that is absent; all reads are under way at once."""
        if self.direct is not None:
            return self.direct.values(keys)
        self._check_sizes(keys, MAX_VALUE_NBYTES)
        reads = [functools.partial(self._kvstore.read, key) for key in keys]
        begun = [read() for read in reads]
        results = map(result_of, begun, reads)
        return [result.value if result.state == "value" else None for result in results]

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each value by key, as far as they are known without reading any."""
        if self.direct is not None:
            return self.direct.sizes()
        return {} if self.is_ocdbt else sizes(self.directory)

    def open_array(
        self,
        name: str,
        document: zarr.ArrayDocument,
        dtype: np.dtype[Any] | None = None,
        box: Sequence[tuple[int, int]] | None = None,
        *,
        fills_missing: bool = False,
    ) -> ts.TensorStore:
        """Opens a stored array for reading: a box of it, cast to `dtype` where it is given.

        A chunk that is missing is an error, or reads as the array's fill value.
        """
        box = box or [(0, side) for side in document.shape]
        self._check_sizes(*zarr.stored_chunks(document, name, box))
        array = ts.open(
            {**_unplaced(document), "fill_missing_data_reads": fills_missing},
            kvstore=self._kvstore / _prefix(name),
            context=self._context,
            open=True,
            assume_metadata=True,
            read=True,
        ).result()
        if dtype is not None and array.dtype.numpy_dtype != dtype:
            array = ts.cast(array, ts.dtype(dtype))
        return array[tuple(slice(start, stop) for start, stop in box)]

    def _check_sizes(self, keys: Iterable[str], limit: int) -> None:
        """I14: refuses values that are larger than they can be: TensorStore takes memory for all.

        A file may be as large as it likes without taking room on a disk.
        """
        is_direct = self.direct is not None
        if is_direct or (not self.is_ocdbt and self.directory.can(Capability.MAP)):
            for key in keys:
                found = self._sizes.get(key, 0) if is_direct else _nbytes(self.directory, key)
                if found > limit:
                    raise ValueError(f"{found} bytes found in {key}, at most {limit} expected")

    def find_absence(self, name: str, document: zarr.ArrayDocument) -> str | None:
        """I14: returns why an array can't all be there, whatever its document says."""
        if self.direct is not None:
            prefix = _prefix(name)
            found = [size for key, size in self._sizes.items() if key.startswith(prefix)]
        elif not self.is_ocdbt:
            found = list(sizes(self.directory / name).values())
        else:
            return None
        axes = zip(document.shape, document.stored_shape, strict=True)
        chunks = math.prod(-(-side // of_chunk) for side, of_chunk in axes)
        if chunks <= len(found) and document.nbytes <= sum(found) * _MOST_EXPANSION:
            return None
        return (
            f"its shape {document.shape} means {document.nbytes} bytes in {chunks} chunks, and "
            f"{sum(found)} bytes are stored in {len(found)}. Copy the checkpoint again from its "
            "source, or leave this leaf out."
        )

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        return self.sizes()

    def list_keys(self) -> set[str]:
        """Returns every key that is stored."""
        with _storing(f"cannot read what was written to {self.directory.path}"):
            return {key.decode() for key in self._kvstore.list().result()}


def result_of(future: Any, begin: Callable[[], Any]) -> Any:
    """Returns what a read gives; one that a signal has interrupted is begun again, a few times."""
    for _ in range(_REPEATS):
        try:
            return future.result()
        except ValueError as error:
            if _INTERRUPTED not in str(error):
                raise
        future = begin()
    return future.result()


@contextlib.contextmanager
def _storing(problem: str) -> Iterator[None]:
    """Makes a CommitError of what TensorStore raises for a fault of the system."""
    try:
        yield
    except ValueError as error:
        cause = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
        raise errors.CommitError(f"{problem}: {cause}") from error


@functools.cache
def shared_context() -> ts.Context:
    """Returns what the stores of this process share: connections, and what lies in memory."""
    return ts.Context()


def _context(*, syncs: bool = False) -> ts.Context:
    return ts.Context({**_CONTEXT, "file_io_sync": syncs}, parent=shared_context())


def _nbytes(directory: Directory, name: str) -> int:
    found = directory.status(name, follow_links=True)
    return 0 if found is None else found.nbytes


def _prefix(name: str) -> str:
    return f"{name}/" if name else ""


def _unplaced(document: zarr.ArrayDocument) -> dict[str, Any]:
    """Describes an array to TensorStore, but not where it is stored."""
    return {
        "driver": "zarr3" if document.zarr3 else "zarr",
        "metadata": dict(document.content),
        "store_data_equal_to_fill_value": True,
    }


@functools.lru_cache(maxsize=256)
def _array_spec(document: bytes) -> ts.Spec:
    """Returns what TensorStore makes of a document, which is half the work of opening an array."""
    parsed = zarr.parse_document(document)
    is_raw = parsed.raw is not None
    copies = {"data_copy_concurrency": "data_copy_concurrency#raw"} if is_raw else {}
    return ts.Spec({**_unplaced(parsed), **copies})


# Databases.


def holds_ocdbt(directory: Directory) -> bool:
    """Says whether a directory is an OCDBT database."""
    manifest = directory.status(names.OCDBT_MANIFEST, follow_links=True)
    return manifest is not None and manifest.kind == "file"


def read_index(directory: Directory) -> DirectReader | None:
    """Returns what reads the values of a database from its files; None where nothing can."""
    _check_process()
    return _direct_reader(directory) if holds_ocdbt(directory) else None


def _direct_reader(directory: Directory) -> DirectReader | None:
    return DirectReader(directory) if directory.can(Capability.MAP) else None


def merge_process_databases(directory: Directory) -> int:
    """Merges the databases that several processes wrote below a directory, in one atomic commit.

    Each process writes `ocdbt.process_<i>/`. The merged database, in the directory itself, refers
    to their data files: no array byte is copied, and the files must stay where they are.
    """
    prefix = names.PROCESS_DATABASE.format("")
    databases = [
        directory / entry.name
        for entry in directory.entries()
        if entry.name.startswith(prefix) and holds_ocdbt(directory / entry.name)
    ]
    if not databases:
        return 0
    context = _context()  # copying by reference needs one for source and target
    spec = {"driver": "ocdbt", "base": directory.kvstore(), "config": _MERGED_CONFIG}
    transaction = ts.Transaction(atomic=True)
    with _storing(f"cannot merge the databases in {directory.path}"):
        target = ts.KvStore.open(spec, context=context).result().with_transaction(transaction)
        pending = [
            ts.KvStore.open({"driver": "ocdbt", "base": each.kvstore()}, context=context)
            .result()
            .experimental_copy_range_to(target)
            for each in databases
        ]
        for copied in pending:
            copied.result()
        transaction.future.result()  # begins the commit, without the GIL that commit_async holds
    return len(databases)
