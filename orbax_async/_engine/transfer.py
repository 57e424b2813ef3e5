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

  NumPy arrays are mutable, so they are copied. So are the first small jax arrays in a CPU device's
  memory: a copy takes no longer than a view, for which jax lets go of the GIL, and beside a program
  that computes in Python it takes 5 ms to get it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import operator
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orbax_async._engine import loop
from orbax_async._engine.plan import Box
from orbax_async.arrays import devices_of

__all__ = [
    "Mode",
    "Piece",
    "aligned_empty",
    "assemble",
    "capture",
    "capture_mode",
    "copy_small",
    "free_nbytes",
    "give_back_freed",
    "lies_on_host",
    "place",
    "send",
    "small_ones",
]

_MAPPED_NBYTES = 256 << 10
_ALIGNMENT = 64  # bytes; jax aliases host memory on CPU where it is aligned so
_MANY_ALIKE = 1000  # arrays for which it pays to compile what puts them on a device
_PER_CALL = 8  # compiling takes longer for more, and a call gets no cheaper for each
_COPIED_NBYTES = 64 << 10
_SMALL_NBYTES, _SMALL_NBYTES_IN_ALL = 16 << 10, 16 << 20
_SMALL_AT_ONCE = 128  # arrays for whose copies the GIL is kept: 0.2 ms

Piece = np.ndarray[Any, Any] | jax.Array
Mode = Literal["view", "copy", "fetch", "pin"]


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


def capture(array: Piece, mode: Mode, *, device_id: int | None, shard_box: Box, box: Box) -> Piece:
    """I3: captures one piece of an array.

    Args:
      array: the whole array.
      mode: how; see `capture_mode`.
      device_id: whose shard to take; None where the array is a single one.
      shard_box: where that shard lies in the array.
      box: where the piece lies in the array.

    Returns:
      A host array, or, of mode `pin`, a jax array in host memory whose transfer may be under way:
      `np.asarray` waits for it.
    """
    is_whole = box is shard_box or box == shard_box
    if isinstance(array, np.ndarray):
        piece = array if is_whole else array[_within(box, shard_box)]
        if mode == "copy":
            copied = aligned_empty(piece.shape, piece.dtype)
            copied[...] = piece
            return copied
        return piece
    shard = array if device_id is None else _shard(array, device_id)
    if mode == "pin":
        if not is_whole:
            shard = shard[_within(box, shard_box)]
        (device,) = shard.devices()
        pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        moved: jax.Array = jax.device_put(shard, pinned, may_alias=False)
        return moved
    if mode == "fetch":
        # The host copy stays cached on an array object: not on one that the caller holds.
        shard = jax.make_array_from_single_device_arrays(shard.shape, shard.sharding, [shard])
    host = np.asarray(shard)
    return host if is_whole else host[_within(box, shard_box)]


class Small(NamedTuple):
    """Small jax arrays of a state, by column: which they are, and what their bytes are."""

    indexes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]
    nbytes: tuple[int, ...]


def small_ones(
    described: Iterable[tuple[tuple[int, ...], np.dtype[Any], jax.sharding.Sharding | None]],
) -> list[Small]:
    """Returns which arrays `copy_small` copies, in groups, of all arrays of a state in order.

    They lie in the memory of one CPU device, and their bytes in the order of their elements, which
    goes without saying for one dimension at most. All of them together take a bounded memory.
    """
    found = []
    room = _SMALL_NBYTES_IN_ALL
    for index, (shape, dtype, sharding) in enumerate(described):
        nbytes = math.prod(shape) * dtype.itemsize
        if (
            0 < nbytes <= min(_SMALL_NBYTES, room)
            and len(shape) <= 1
            and _fills_bytes(dtype)
            and sharding is not None
            and _is_on_one_cpu(sharding)
        ):
            room -= nbytes
            found.append((index, shape, dtype, nbytes))
    groups = range(0, len(found), _SMALL_AT_ONCE)
    return [Small(*zip(*found[at : at + _SMALL_AT_ONCE], strict=True)) for at in groups]


def copy_small(arrays: list[Piece], small: Sequence[Small]) -> None:
    """I3: puts copies in place of small jax arrays, without letting go of the GIL for each.

    An array that can't be copied stays where it is, for `capture` to say what is wrong with it.
    """
    if small and isinstance(arrays[small[0].indexes[0]], np.ndarray):
        return  # they are copied already: it is captured once more
    try:
        jax.block_until_ready([arrays[index] for group in small for index in group.indexes])
        for indexes, shapes, dtypes, nbytes in loop.sliced(small):
            sources = [arrays[index] for index in indexes]
            # Loops in C: no other Python code runs between a pointer and the copy of its bytes.
            held = map(_bytes_at, map(_pointer_of, sources), nbytes)
            copies: list[Piece] = list(map(_array_over, shapes, dtypes, held))
            for index, source, copied in zip(indexes, sources, copies, strict=True):
                # It may be donated meanwhile, against the rules, by a thread that computes. XLA
                # marks it as deleted before it writes to its memory.
                if not source.is_deleted():  # type: ignore[union-attr]
                    arrays[index] = copied
    except (RuntimeError, ValueError):
        pass  # one was deleted, or what computes it has failed


_array_over: Callable[..., Piece] = np.ndarray
_pointer_of = operator.methodcaller("unsafe_buffer_pointer")
_bytes_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


def _fills_bytes(dtype: np.dtype[Any]) -> bool:
    """Says whether elements of a dtype take whole bytes on a CPU device, as they do in NumPy."""
    return dtype.kind in "biufc" or dtype == jnp.bfloat16


@functools.lru_cache(maxsize=4096)
def _is_on_one_cpu(sharding: jax.sharding.Sharding) -> bool:
    if sharding.num_devices > 1 or not sharding.is_fully_addressable:
        return False
    return bool(devices_of(sharding)[0].platform == "cpu")


def _shard(array: jax.Array, device_id: int) -> jax.Array:
    # Not addressable_data, which has the first device's shard alone of a replicated array.
    for shard in array.addressable_shards:
        if shard.device.id == device_id:
            data: jax.Array = shard.data
            return data
    raise ValueError(f"no shard on device {device_id}")


@functools.lru_cache(maxsize=4096)
def lies_on_host(sharding: jax.sharding.Sharding) -> bool:
    device = devices_of(sharding)[0]  # of a process that has none of them, too
    return device.platform == "cpu" or "host" in (sharding.memory_kind or "")


def _has_pinned_host(sharding: jax.sharding.Sharding) -> bool:
    return any(
        memory.kind == "pinned_host"
        for device in devices_of(sharding, local=True)[:1]
        for memory in device.addressable_memories()
    )


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(box, outer, strict=True)
    )


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


@functools.cache
def _malloc_trim() -> Any:
    """Returns glibc's function of that name; None where there is another C library."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def give_back_freed() -> None:
    """Gives memory that was freed back to the system, where the C library would keep it; blocks.

    glibc gives each thread an arena of its own, and an arena keeps what was freed at its end. Of
    TensorStore's threads that is what each encoded last: several times what is encoded at a time.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


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
        and _fills_bytes(array.dtype)
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
