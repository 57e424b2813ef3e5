"""States as trees: their sizes, their abstract trees, and whether two hold the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workloads import MIB, HostArray, State


def abstract_of(state: State) -> State:
    """Returns what a load is asked for: shapes, dtypes and shardings, no values."""

    def abstract(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        return np.empty_like(leaf) if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(abstract, state)


def host_pieces(tree: State) -> Iterator[HostArray]:
    """Yields every stored byte once, flat: arrays, and of sharded ones each distinct shard."""
    for leaf in jax.tree.leaves(tree):
        for piece in _stored(leaf):
            if isinstance(piece, jax.Array) and next(iter(piece.devices())).platform != "cpu":
                piece = jnp.copy(piece)  # jax keeps a host copy of what is asked for one
            yield np.ascontiguousarray(np.asarray(piece)).reshape(-1).view(np.uint8)


def stored_nbytes(tree: State) -> int:
    """Returns the bytes that a save has to keep: each element once."""
    return sum(
        piece.nbytes if hasattr(piece, "nbytes") else np.asarray(piece).nbytes
        for leaf in jax.tree.leaves(tree)
        for piece in _stored(leaf)
    )


def _stored(leaf: Any) -> list[Any]:
    if not isinstance(leaf, jax.Array):
        return [leaf]
    return [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]


def resident_nbytes(tree: State) -> int:
    """Returns the bytes that the tree takes in memory: each buffer once, replicas may share one."""
    sizes: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                sizes[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        else:
            sizes[id(leaf)] = np.asarray(leaf).nbytes
    return sum(sizes.values())


def same_values(loaded: State, wanted: State) -> bool:
    """Says whether two trees have the same containers, leaves and bits."""
    if jax.tree.structure(loaded) != jax.tree.structure(wanted):  # type: ignore[operator]
        return False
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True)
    if any(_kind(got) != _kind(want) for got, want in pairs):
        return False
    return same_bytes(host_pieces(loaded), host_pieces(wanted))


def _kind(leaf: Any) -> tuple[Any, ...]:
    is_on_device = isinstance(leaf, jax.Array)
    return is_on_device, getattr(leaf, "dtype", type(leaf)), np.shape(leaf)


def same_bytes(pieces: Iterator[HostArray], others: Iterator[HostArray]) -> bool:
    """Compares pieces of the same sizes, a slice at a time: a comparison takes memory too."""
    return all(
        piece.size == other.size
        and all(
            np.array_equal(piece[at : at + 64 * MIB], other[at : at + 64 * MIB])
            for at in range(0, piece.size, 64 * MIB)
        )
        for piece, other in zip(pieces, others, strict=True)
    )
