"""Where the pieces of a jax array go: the boxes of a sharding, and which devices hold them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from orbax_async import arrays
from orbax_async._engine import plan
from orbax_async.options import ArrayOptions

__all__ = [
    "Placement",
    "concrete",
    "placement",
    "saved",
    "shards_of",
    "special_memory_kind",
]


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
    if kind in (None, "device") or kind == arrays.devices_of(sharding)[0].default_memory().kind:
        return None
    return str(kind)


def saved(document: Mapping[str, Any], memory_kind: Any) -> jax.sharding.Sharding:
    """Returns a sharding as it was saved.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: its devices are not here, or its document is
        damaged.
    """
    sharding = arrays.ShardingMetadata(document).to_jax_sharding()
    if memory_kind is None:
        return sharding
    device = arrays.devices_of(sharding)[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    return sharding.with_memory_kind(memory_kind) if memory_kind in kinds else sharding


@functools.lru_cache(maxsize=4096)
def shards_of(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> tuple[plan.ShardSpec, ...]:
    """Returns each device's box of an array, over all processes."""
    devices = arrays.devices_of(sharding)
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
            for device in arrays.devices_of(sharding, local=True)
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
