"""Placing arrays on devices: which device gets which piece, and how the pieces get there.

A piece comes from host memory or from another device; of all pieces one global array is made.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from orbax_async._engine import plan
from orbax_async._engine.host_memory import fills_bytes
from orbax_async._engine.leaf import Piece
from orbax_async.arrays import ShardingMetadata, devices_of
from orbax_async.options import ArrayOptions

__all__ = [
    "Placement",
    "assemble",
    "concrete",
    "free_nbytes",
    "place",
    "placement",
    "saved_sharding",
    "send",
    "shards_of",
    "special_memory_kind",
]

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
