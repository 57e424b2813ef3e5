"""Capturing values before their owner may change them.

Rules
  I3   Once a value is captured, donating, deleting or mutating its source can't change what is
       written.

Theory of operation
  A jax array in a CPU device's memory is captured as a view of its buffer. Holding the view
  makes XLA copy instead of reusing the buffer when the array is donated, and keeps the memory
  when it is deleted. On other devices each shard is sent to `pinned_host`: the transfer is
  enqueued before anything the caller can do to the source, and the new array is ours alone. No
  host copy is ever made through the caller's own array, which would keep it cached.

  NumPy arrays are mutable, so they are copied. So are small jax arrays in a CPU device's memory:
  `gil` says why.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from orbax_async._engine import gil, plan
from orbax_async._engine.host_memory import aligned_empty, fills_bytes, lies_on_host
from orbax_async._engine.leaf import Mode, Piece, Storage
from orbax_async._engine.plan import WriteRequest
from orbax_async.arrays import devices_of

__all__ = ["Small", "capture", "capture_mode", "copy_small", "is_small"]


Small = tuple[int, tuple[int, ...], np.dtype[Any], int]  # the leaf, its shape, dtype and bytes

_SMALL_NBYTES = 16 << 10
_COPIED_AT_ONCE = 128  # small arrays for whose copies the interpreter lock is kept: 0.2 ms


def capture_mode(
    sharding: jax.sharding.Sharding | None,
    *,
    is_mutable: bool = False,
    use_pinned_host: bool | None = None,
) -> Mode:
    """Says how the values of an array are captured.

    Args:
      sharding: of a jax array; None for a NumPy array.
      is_mutable: whether a NumPy array's owner may change it during the save.
      use_pinned_host: whether to go through pinned memory; None for the platform's default.

    Returns:
      `view` where the values stay where they are, `copy` for a copy on the host, `fetch` and `pin`
      for a transfer from a device to ordinary or to pinned memory.
    """
    if sharding is None:
        return "copy" if is_mutable else "view"
    on_host = lies_on_host(sharding)
    if use_pinned_host is None:
        use_pinned_host = not on_host and _has_pinned_host(sharding)
    if use_pinned_host:
        return "pin"
    return "view" if on_host else "fetch"


def _has_pinned_host(sharding: jax.sharding.Sharding) -> bool:
    return any(
        memory.kind == "pinned_host"
        for device in devices_of(sharding, local=True)[:1]
        for memory in device.addressable_memories()
    )


def capture(array: Piece, storage: Storage, request: WriteRequest) -> Piece:
    """I3: captures one piece of an array.

    Args:
      array: the whole array.
      storage: how, and from how many devices.
      request: which piece.

    Returns:
      A host array, or, of mode `pin`, a jax array in host memory whose transfer may be under way:
      `np.asarray` waits for it.
    """
    is_single = len(storage.shards) == 1
    if storage.mode == "view" and is_single:  # most arrays by far
        return np.asarray(array)
    box, shard_box = request.box, request.shard_box
    is_whole = box is shard_box or box == shard_box
    if isinstance(array, np.ndarray):
        piece = array if is_whole else array[plan.within(box, shard_box)]
        if storage.mode == "copy":
            copied = aligned_empty(piece.shape, piece.dtype)
            copied[...] = piece
            return copied
        return piece
    shard = array if is_single else _shard(array, request.device_id)
    if storage.mode == "pin":
        if not is_whole:
            shard = shard[plan.within(box, shard_box)]
        (device,) = shard.devices()
        pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        moved: jax.Array = jax.device_put(shard, pinned, may_alias=False)
        return moved
    if storage.mode == "fetch":
        # The host copy stays cached on an array object: not on one that the caller holds.
        shard = jax.make_array_from_single_device_arrays(shard.shape, shard.sharding, [shard])
    host = np.asarray(shard)
    return host if is_whole else host[plan.within(box, shard_box)]


def _shard(array: jax.Array, device_id: int) -> jax.Array:
    # Not addressable_data, which has the first device's shard alone of a replicated array.
    for shard in array.addressable_shards:
        if shard.device.id == device_id:
            data: jax.Array = shard.data
            return data
    raise ValueError(f"no shard on device {device_id}")


def is_small(
    shape: tuple[int, ...], dtype: np.dtype[Any], sharding: jax.sharding.Sharding | None
) -> bool:
    """Says whether an array may be captured by `copy_small`.

    It lies in the memory of one CPU device, and its bytes in the order of its elements, which goes
    without saying for one dimension at most.
    """
    return (
        len(shape) <= 1
        and 0 < math.prod(shape) * dtype.itemsize <= _SMALL_NBYTES
        and fills_bytes(dtype)
        and sharding is not None
        and _is_on_one_cpu(sharding)
    )


@functools.lru_cache(maxsize=4096)
def _is_on_one_cpu(sharding: jax.sharding.Sharding) -> bool:
    if sharding.num_devices > 1 or not sharding.is_fully_addressable:
        return False
    return bool(devices_of(sharding)[0].platform == "cpu")


def copy_small(arrays: Sequence[Piece], small: Sequence[Small]) -> dict[int, Piece]:
    """I3: copies small jax arrays, without letting go of the interpreter lock for each.

    Args:
      arrays: those of all leaves.
      small: which of them to copy.

    Returns:
      Copies by leaf. One that can't be copied is left out, for `capture` to say what is wrong.
    """
    found: dict[int, Piece] = {}
    try:
        jax.block_until_ready([arrays[leaf] for leaf, *_ in small])
        for start in gil.sliced(range(0, len(small), _COPIED_AT_ONCE)):
            group = small[start : start + _COPIED_AT_ONCE]
            leaves, shapes, dtypes, nbytes = zip(*group, strict=True)
            sources = [arrays[leaf] for leaf in leaves]
            copies = list(map(_array_over, shapes, dtypes, gil.bytes_of(sources, nbytes)))
            for leaf, source, copied in zip(leaves, sources, copies, strict=True):
                # It may be donated meanwhile, against the rules, by a thread that computes. XLA
                # marks it as deleted before it writes to its memory.
                if not source.is_deleted():
                    found[leaf] = copied
    except (RuntimeError, ValueError):
        pass  # one was deleted, or what computes it has failed
    return found


_array_over: Callable[..., Piece] = np.ndarray
