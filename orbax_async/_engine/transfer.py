"""Capturing values so that their owner may change them, and placing values on devices.

Rules
  I3   Once a value is captured, donating, deleting or mutating its source can't change what is
       written.

Theory of operation
  A jax array in a CPU device's memory is captured as a view of its buffer. Holding the view
  makes XLA copy instead of reusing the buffer when the array is donated, and keeps the memory
  when it is deleted. On other devices each shard is sent to `pinned_host`: the transfer is
  enqueued before anything the caller can do to the source, and the new array is ours alone. No
  host copy is ever made through the caller's own array, which would keep it cached.

  NumPy arrays are mutable, so they are copied.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from orbax_async._engine.plan import Box
from orbax_async.arrays import devices_of

__all__ = ["DeviceSource", "HostSource", "Staged", "aligned_empty", "assemble", "place"]

_ALIGNMENT = 64  # bytes; jax aliases host memory on CPU where it is aligned so


@dataclasses.dataclass(frozen=True)
class HostSource:
    """An array in host memory; `is_mutable` where its owner may change it during the save."""

    array: np.ndarray[Any, Any]
    is_mutable: bool

    @property
    def copies(self) -> bool:
        """Whether capturing takes memory of its own."""
        return self.is_mutable

    def capture(self, device_id: int, shard_box: Box, box: Box) -> Staged:
        """Captures one piece."""
        piece = self.array[_within(box, shard_box)]
        return Staged(np.array(piece, order="C") if self.is_mutable else piece)


@dataclasses.dataclass(frozen=True)
class DeviceSource:
    """A jax array; `use_pinned_host` is None for the default of its platform."""

    array: jax.Array
    use_pinned_host: bool | None = None

    @property
    def copies(self) -> bool:
        """Whether capturing takes host memory of its own."""
        return self._pins or not self._is_on_host

    def capture(self, device_id: int, shard_box: Box, box: Box) -> Staged:
        """Captures one piece, on the device's own stream where it has to be moved."""
        shard = self._shard(device_id)
        inner = _within(box, shard_box)
        if not self._pins:
            if not self._is_on_host:
                # The host copy stays cached on an array object: not on one that the caller holds.
                shard = jax.make_array_from_single_device_arrays(
                    shard.shape, shard.sharding, [shard]
                )
            return Staged(np.asarray(shard)[inner])
        if box != shard_box:
            shard = shard[inner]
        (device,) = shard.devices()
        pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        return Staged(jax.device_put(shard, pinned, may_alias=False))

    def _shard(self, device_id: int) -> jax.Array:
        """Returns a device's shard."""
        count = len(self.array.sharding.addressable_devices)
        if count == 1 and self._is_on_host:
            return self.array
        # Not addressable_data, which has the first device's shard alone of a replicated array.
        for shard in self.array.addressable_shards:
            if shard.device.id == device_id:
                data: jax.Array = shard.data
                return data
        raise ValueError(f"no shard on device {device_id}")

    @property
    def _is_on_host(self) -> bool:
        return _lies_on_host(self.array.sharding)

    @property
    def _pins(self) -> bool:
        if self.use_pinned_host is not None:
            return self.use_pinned_host
        if self._is_on_host:
            return False
        device = devices_of(self.array.sharding, local=True)[0]
        return any(memory.kind == "pinned_host" for memory in device.addressable_memories())


@functools.lru_cache(maxsize=4096)
def _lies_on_host(sharding: jax.sharding.Sharding) -> bool:
    device = devices_of(sharding, local=True)[0]
    return device.platform == "cpu" or "host" in (sharding.memory_kind or "")


Source = HostSource | DeviceSource


@dataclasses.dataclass
class Staged:
    """A captured piece: a host array, or a transfer to host memory that is under way."""

    piece: np.ndarray[Any, Any] | jax.Array

    def fetch(self) -> np.ndarray[Any, Any]:
        """Returns the host array; blocks until its transfer has arrived."""
        return np.asarray(self.piece)


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(box, outer, strict=True)
    )


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Returns an uninitialized array that jax can alias on CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def place(
    pieces: Sequence[np.ndarray[Any, Any]], devices: Sequence[jax.sharding.Sharding]
) -> list[jax.Array]:
    """Puts host arrays on single devices, all in one call, and waits until they have arrived."""
    # These settings belong to threads: a worker keeps every dtype as it is.
    with jax.transfer_guard("allow"), jax.enable_x64(True):
        placed = jax.device_put(list(pieces), list(devices))
        jax.block_until_ready(placed)
    return list(placed)


def assemble(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, shards: Sequence[jax.Array]
) -> jax.Array:
    """Makes one global array of the shards that this process holds."""
    if isinstance(sharding, jax.sharding.SingleDeviceSharding) and len(shards) == 1:
        return shards[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards))
