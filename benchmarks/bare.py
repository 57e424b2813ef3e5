"""TensorStore alone: the arrays of a state in one OCDBT database, and nothing else.

No documents, no samples, no checksums of our own, one thread: what is left of a save is the calls
that TensorStore's Python API needs for each array. A library that stands on it has to make them
too, and a program beside the save waits for the GIL each time one of them takes it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from benchmarks.libraries import placed
from benchmarks.workloads import MIB, State

_BATCH_NBYTES = 64 * MIB


def save(path: Path, state: State) -> None:
    """Writes 64 MiB to a commit, fills one while another is under way, and syncs everything."""
    store, context = _database(path)
    under_way: list[Any] = []

    def end_one() -> None:
        committed, _writes = under_way.pop(0)  # a write of which no future is left is abandoned
        committed.result()

    for batch in _batches([np.asarray(leaf) for leaf in jax.tree.leaves(state)]):
        transaction = ts.Transaction(atomic=True)
        inside = store.with_transaction(transaction)
        writes = [
            _open(inside, context, index, array.shape, array.dtype).write(
                array, can_reference_source_data_indefinitely=True
            )
            for index, array in batch
        ]
        under_way.append((transaction.commit_async(), writes))
        if len(under_way) == 2:
            end_one()
    end_one()
    _sync(path)


def load(path: Path, abstract: State) -> State:
    """Reads every array as the abstract tree describes it, then one transfer."""
    store, context = _database(path)
    reads = [
        _open(store, context, index, np.shape(leaf), _dtype(leaf)).read()
        for index, leaf in enumerate(jax.tree.leaves(abstract))
    ]
    return placed([read.result() for read in reads], abstract)


def _dtype(leaf: Any) -> np.dtype[Any]:
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _database(path: Path) -> tuple[ts.KvStore, ts.Context]:
    context = ts.Context({"file_io_sync": False, "file_io_concurrency": {"limit": 4}})
    base = path.resolve().as_uri() + "/"
    return ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result(), context


def _open(
    store: ts.KvStore, context: ts.Context, index: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        },
        "store_data_equal_to_fill_value": True,
    }
    placed_at = store / f"{index}/"
    return ts.open(
        spec, kvstore=placed_at, context=context, open=True, assume_metadata=True
    ).result()


def _batches(arrays: list[np.ndarray[Any, Any]]) -> Iterator[list[tuple[int, Any]]]:
    batch: list[tuple[int, Any]] = []
    nbytes = 0
    for index, array in enumerate(arrays):
        batch.append((index, array))
        nbytes += array.nbytes
        if nbytes >= _BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
    yield batch


def _sync(path: Path) -> None:
    """Syncs all files and names, up to that of the folder that `path` was made in."""
    while any(path.rglob("*.__lock")):  # TensorStore removes it a moment after the commit
        time.sleep(1e-3)
    for each in (path.parent.parent, path.parent, path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(each, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
