"""The host's memory: which arrays lie there, room for new ones, and what is given back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orbax_async.arrays import devices_of

__all__ = ["aligned_empty", "fills_bytes", "give_back_freed", "lies_on_host"]

_MAPPED_NBYTES = 256 << 10
_ALIGNMENT = 64  # bytes; jax aliases host memory on CPU where it is aligned so


@functools.lru_cache(maxsize=4096)
def lies_on_host(sharding: jax.sharding.Sharding) -> bool:
    """Says whether arrays of a sharding lie in the host's memory."""
    device = devices_of(sharding)[0]  # of a process that has none of them, too
    return device.platform == "cpu" or "host" in (sharding.memory_kind or "")


def fills_bytes(dtype: np.dtype[Any]) -> bool:
    """Says whether elements of a dtype take whole bytes on a CPU device, as they do in NumPy."""
    return dtype.kind in "biufc" or dtype == jnp.bfloat16


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Returns an uninitialized array that jax can alias on CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    block = _mapped(nbytes) if nbytes >= _MAPPED_NBYTES else None
    if block is None:
        block = np.empty(nbytes + _ALIGNMENT, np.uint8)
    address: int = block.__array_interface__["data"][0]
    offset = -address % _ALIGNMENT
    return block[offset : offset + nbytes].view(dtype).reshape(shape)


def _mapped(nbytes: int) -> np.ndarray[Any, Any] | None:
    """Returns memory that goes back to the system as soon as it is freed, if there is any.

    What the C allocator gives may stay in one of its arenas, and every thread has its own.
    """
    if sys.platform == "win32":
        return None
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # there may be too many mappings
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system may have none
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8)


def give_back_freed() -> None:
    """Gives memory that was freed back to the system, where the C library would keep it; blocks.

    glibc gives each thread an arena of its own, and an arena keeps what was freed at its end. Of
    TensorStore's threads that is what each encoded last: several times what is encoded at a time.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """Returns glibc's function of that name; None where there is another C library."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
