"""Placing values on devices: from host memory, from another device, and as one global array."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from orbax_async._engine.host_memory import fills_bytes
from orbax_async._engine.leaf import Piece

__all__ = ["assemble", "free_nbytes", "place", "send"]

_MANY_ALIKE = 1000  # arrays for which it pays to compile what puts them on a device
_PER_CALL = 8  # compiling takes longer for more, and a call gets no cheaper for each
_COPIED_NBYTES = 64 << 10


def place(
    arrays: Sequence[np.ndarray[Any, Any]], wheres: Sequence[jax.sharding.Sharding | None]
) -> list[Piece]:
    """Puts host arrays on devices, and waits until they have arrived.

    Args:
      arrays: what to put there.
      wheres: for each array where it goes: all of it on the one device of a sharding, or nowhere.
    """
    placed: list[Piece] = list(arrays)
    alike: dict[Hashable, list[int]] = {}
    for index, (array, where) in enumerate(zip(arrays, wheres, strict=True)):
        if where is not None:
            alike.setdefault((id(where), array.shape, array.dtype), []).append(index)
    with _neutral_settings():
        for indexes in alike.values():
            array, where = arrays[indexes[0]], wheres[indexes[0]]
            assert where is not None
            rest = len(indexes)
            if len(indexes) >= _MANY_ALIKE and _can_compile(array, where):
                rest %= _PER_CALL
                put_some = _compiled(where)
                for start in range(rest, len(indexes), _PER_CALL):
                    some = indexes[start : start + _PER_CALL]
                    put = put_some(*[arrays[index] for index in some])
                    for index, each in zip(some, put, strict=True):
                        placed[index] = each
            for index in indexes[:rest]:
                placed[index] = _put(arrays[index], where)
        jax.block_until_ready(placed)
    return placed


@contextlib.contextmanager
def _neutral_settings() -> Iterator[None]:
    """Sets aside what jax would do to values, or not do, by the settings of the program."""
    with (
        jax.transfer_guard("allow"),
        jax.enable_x64(True),
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield


def _put(array: np.ndarray[Any, Any], where: jax.sharding.Sharding) -> jax.Array:
    # Half as much work for jax as device_put.
    return jax.make_array_from_callback(array.shape, where, lambda _: array)


def _can_compile(array: np.ndarray[Any, Any], where: jax.sharding.Sharding) -> bool:
    """Says whether compiled code may copy an array; some dtypes of few bits it can't."""
    device: Any = next(iter(where.device_set))
    return (
        device.platform == "cpu"
        and where.memory_kind in (None, device.default_memory().kind)
        and array.nbytes <= _COPIED_NBYTES
        and fills_bytes(array.dtype)
    )


@functools.lru_cache(maxsize=64)
def _compiled(where: jax.sharding.Sharding) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns what puts a few arrays on a device in one call, compiled for each shape and dtype.

    Compiling takes as long as putting some hundred arrays one by one, and a call a third.
    """
    return jax.jit(lambda *arrays: arrays, in_shardings=where, out_shardings=where)


def send(pieces: Sequence[tuple[jax.Array, jax.sharding.Sharding]]) -> list[jax.Array]:
    """Sends arrays from their device to another one, and waits until they have arrived."""
    with jax.transfer_guard("allow"), jax.enable_x64(True):
        sent = [jax.device_put(array, where) for array, where in pieces]
        jax.block_until_ready(sent)
    return sent


def free_nbytes(shardings: Sequence[jax.sharding.Sharding]) -> int | None:
    """Returns the free memory of the fullest of some devices; None where none of them tells."""
    devices: Any = {device for sharding in shardings for device in sharding.addressable_devices}
    free = []
    for device in devices:
        statistics = device.memory_stats() or {}
        if "bytes_limit" in statistics:
            free.append(statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    return min(free, default=None)


def assemble(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, shards: Sequence[jax.Array]
) -> jax.Array:
    """Makes one global array of the shards that this process holds."""
    if len(shards) == 1 and shards[0].sharding == sharding:
        return shards[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards))
