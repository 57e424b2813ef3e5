"""Values on their way: captured before their owner may change them, and placed on devices.

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

  Pieces that were read come from host memory or from another device; of all pieces one global
  array is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orbax_async._engine import gil, plan
from orbax_async._engine.leaf import Mode, Piece, Small, Storage
from orbax_async._engine.plan import WriteRequest
from orbax_async.arrays import ShardingMetadata, devices_of
from orbax_async.options import ArrayOptions

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


# Placing.


_MANY_ALIKE = 1000  # arrays for which it pays to compile what puts them on a device
_PER_CALL = 8  # compiling takes longer for more, and a call gets no cheaper for each
_COPIED_NBYTES = 64 << 10


def concrete(sharding: Any) -> jax.sharding.Sharding | None:
    """Returns a sharding whose mesh is the one that is set, if its own is abstract.

    Raises:
      ValueError: no mesh is set, or another.
    """
    sharding = getattr(sharding, "sharding", sharding)  # a Format holds one
    if not isinstance(sharding, jax.sharding.NamedSharding) or not isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):
        return sharding  # type: ignore[no-any-return]
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.shape != sharding.mesh.shape:
        raise ValueError(
            f"its sharding {sharding.spec} is over an abstract mesh {dict(sharding.mesh.shape)}, "
            "and no such mesh is set; load inside `with jax.set_mesh(mesh):`"
        )
    return jax.sharding.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def special_memory_kind(sharding: jax.sharding.Sharding) -> str | None:
    """Returns the memory kind to record: none for that in which a device puts arrays anyway."""
    kind = sharding.memory_kind
    if kind in (None, "device") or kind == devices_of(sharding)[0].default_memory().kind:
        return None
    return str(kind)


def saved_sharding(document: Mapping[str, Any], memory_kind: Any) -> jax.sharding.Sharding:
    """Returns a sharding as it was saved.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: its devices are not here, or its document is
        damaged.
    """
    sharding = ShardingMetadata(document).to_jax_sharding()
    if memory_kind is None:
        return sharding
    device = devices_of(sharding)[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    return sharding.with_memory_kind(memory_kind) if memory_kind in kinds else sharding


@functools.lru_cache(maxsize=4096)
def shards_of(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> tuple[plan.ShardSpec, ...]:
    """Returns each device's box of an array, over all processes."""
    devices = devices_of(sharding)
    if len(devices) == 1:
        (device,) = devices
        return (plan.ShardSpec(device.id, device.process_index, plan.whole(shape)),)
    boxes = sharding.devices_indices_map(shape)
    return tuple(
        plan.ShardSpec(
            device.id,
            device.process_index,
            tuple(each.indices(side)[:2] for each, side in zip(index or (), shape, strict=True)),
        )
        for device in devices
        for index in (boxes[device],)
    )


class Placement(NamedTuple):
    """Where the pieces of an array go.

    Attributes:
      shards: what is read, for which device.
      devices: single-device shardings by device id, where there are several pieces.
      copies: by the id of a device, where its piece is sent from there.
    """

    shards: tuple[plan.ShardSpec, ...]
    devices: Mapping[int, jax.sharding.Sharding] = {}
    copies: Mapping[int, tuple[jax.sharding.Sharding, ...]] = {}

    def clipped(self, shape: tuple[int, ...]) -> Placement:
        """Leaves only what lies inside a shape to be read."""
        shards = tuple(
            shard._replace(
                box=tuple(
                    (min(start, side), min(stop, side))
                    for (start, stop), side in zip(shard.box, shape, strict=True)
                ),
            )
            for shard in self.shards
        )
        return self._replace(shards=shards)


def placement(
    sharding: jax.sharding.Sharding | None,
    shape: tuple[int, ...],
    process: int,
    options: ArrayOptions.Loading,
) -> Placement:
    """Puts the pieces of an array where a sharding says.

    Args:
      sharding: of the array; None to leave it on the host.
      shape: its global shape.
      process: whose devices get pieces.
      options: say whether one replica reads for all, or each gets its values from the host.

    Raises:
      ValueError: the sharding does not fit the shape, or has no such replicas.
    """
    if sharding is None:
        return Placement((plan.ShardSpec(-1, process, plan.whole(shape)),))
    try:
        shards = shards_of(sharding, shape)
    except (ValueError, IndexError) as error:  # jax looks at the rank only in passing
        raise ValueError(
            f"its shape {shape} does not fit the sharding {sharding}: {error}"
        ) from None
    devices: dict[int, jax.sharding.Sharding] = {}
    if len(shards) > 1:
        kind = sharding.memory_kind
        devices = {
            device.id: jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
            for device in devices_of(sharding, local=True)
        }
    if not options.use_load_and_broadcast:
        return Placement(shards, devices)
    primary = _primary_devices(sharding, options.load_and_broadcast_options)
    local = [shard for shard in shards if shard.process == process]
    sources: dict[plan.Box, plan.ShardSpec] = {}
    for shard in sorted(local, key=lambda shard: shard.device_id not in primary):
        sources.setdefault(shard.box, shard)
    copies: dict[int, tuple[jax.sharding.Sharding, ...]] = {}
    for shard in local:
        source = sources[shard.box]
        if shard is not source:
            sent = copies.get(source.device_id, ())
            copies[source.device_id] = (*sent, devices[shard.device_id])
    return Placement(tuple(sources.values()), devices, copies)


def _primary_devices(
    sharding: jax.sharding.Sharding, options: ArrayOptions.Loading.LoadAndBroadcastOptions
) -> set[int]:
    """Returns the ids of the devices of the replica that reads."""
    option = "array.loading.use_load_and_broadcast"
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise ValueError(
            f"{option}: Must provide `sharding`, a NamedSharding, for every jax array; this one "
            f"would go to {sharding}"
        )
    axis, replica = options.replica_axis_index or 0, options.primary_replica_id or 0
    mesh = sharding.mesh.devices
    if axis >= mesh.ndim or replica >= mesh.shape[axis]:
        raise ValueError(
            f"{option}: the mesh {dict(sharding.mesh.shape)} has no replica {replica} along axis "
            f"{axis}"
        )
    name = sharding.mesh.axis_names[axis]
    used = [part if isinstance(part, tuple) else (part,) for part in sharding.spec]
    if any(name in part for part in used):
        raise ValueError(
            f"{option}: the array is divided along {name!r}, so there are no replicas along it: "
            f"{sharding.spec}. Set load_and_broadcast_options.replica_axis_index to another axis"
        )
    return {device.id for device in mesh.take(replica, axis=axis).flat}


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


# The host's memory.


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
