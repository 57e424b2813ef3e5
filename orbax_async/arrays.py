"""Abstract arrays: what an array is, without its values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

__all__ = [
    "AbstractArray",
    "AbstractScalar",
    "AbstractShardedArray",
    "ArrayLike",
    "ArrayMetadata",
    "DType",
    "NumpyMetadata",
    "Scalar",
    "Shape",
    "StorageMetadata",
    "to_shape_dtype_struct",
]

Shape = tuple[int, ...]
DType = np.dtype
Scalar = int | float | np.number | bytes | bool
AbstractScalar = Scalar


@runtime_checkable
class AbstractArray(Protocol):
    """Anything with a shape and a dtype, such as `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> Shape | None:
        """The global shape."""
        ...

    @property
    def dtype(self) -> DType | None:
        """The dtype."""
        ...


@runtime_checkable
class AbstractShardedArray(AbstractArray, Protocol):
    """An abstract array that also says where its pieces belong."""

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """The sharding, or None where it is left open."""
        ...


ArrayLike = AbstractArray | AbstractShardedArray


@dataclasses.dataclass(frozen=True)
class StorageMetadata:
    """How an array lies on disk.

    Attributes:
      chunk_shape: of the smallest piece that is read alone.
      write_shape: of the pieces that were written, of a jax array.
      nbytes: what it takes on disk, encoded; None where that is not known. It does not count when
        two are compared.
    """

    chunk_shape: Shape | None
    write_shape: Shape | None = None
    nbytes: int | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class NumpyMetadata:
    """A stored NumPy array: what `metadata` reports of it."""

    shape: Shape
    dtype: DType
    storage_metadata: StorageMetadata | None = None


@dataclasses.dataclass(frozen=True)
class ShardingMetadata:
    """A saved sharding, readable without the devices that saved it.

    Attributes:
      document: the recorded fields, as in the checkpoint's `_sharding` document.
    """

    document: Any

    def to_jax_sharding(self) -> jax.sharding.Sharding:
        """Rebuilds the sharding on this process's view of the devices.

        Raises:
          ValueError: a device that took part in the save is not here.
        """
        return _to_sharding(self.document)


@dataclasses.dataclass(frozen=True)
class ArrayMetadata:
    """A stored jax array: what `metadata` reports of it.

    PRNG keys are reported as the integers that they are stored as.
    """

    shape: Shape
    dtype: DType
    sharding_metadata: ShardingMetadata | None = None
    storage_metadata: StorageMetadata | None = None

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """The saved sharding on the devices here; ValueError where one of them is missing."""
        return None if self.sharding_metadata is None else self.sharding_metadata.to_jax_sharding()


def devices_of(sharding: jax.sharding.Sharding, *, local: bool = False) -> list[Any]:
    """Returns a sharding's devices by id, all of them or those of this process."""
    devices: Any = sharding.addressable_devices if local else sharding.device_set
    return sorted(devices, key=lambda device: int(device.id))


def device_name(device: Any) -> str:
    """Returns a device's name as the format spells it: `cpu:0`, `cuda:3`."""
    return str(device).replace("TFRT_CPU_", "cpu:")


def sharding_document(sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """Returns the fields that the `_sharding` document records.

    A sharding of a kind that the format cannot hold is recorded as its first device: a load
    without an abstract tree then still works, in one place.
    """
    if isinstance(sharding, jax.sharding.NamedSharding):
        mesh = sharding.mesh
        ids = np.empty(mesh.devices.shape, object)
        ids.ravel()[:] = [{"id": int(device.id)} for device in mesh.devices.flat]
        return {
            "sharding_type": "NamedSharding",
            "shape": list(mesh.devices.shape),
            "axis_names": list(mesh.axis_names),
            "axis_types": [str(kind) for kind in mesh.axis_types],
            "partition_spec": [_spec_item(item) for item in sharding.spec],
            "device_mesh": {"mesh": ids.tolist()},
        }
    device = devices_of(sharding)[0]
    return {"sharding_type": "SingleDeviceSharding", "device_str": device_name(device)}


def _spec_item(item: Any) -> Any:
    if item is None or isinstance(item, str):
        return item
    if isinstance(item, tuple):
        return list(item)
    return None  # P.UNCONSTRAINED


_MAX_DEVICES = 1 << 20
_AXIS_TYPES = jax.sharding.AxisType.__members__


def _to_sharding(document: dict[str, Any]) -> jax.sharding.Sharding:
    kind = document.get("sharding_type")
    if kind == "SingleDeviceSharding":
        wanted = document["device_str"].replace("TFRT_CPU_", "cpu:")
        for device in jax.devices():
            if device_name(device) == wanted:
                return jax.sharding.SingleDeviceSharding(device)
        raise ValueError(f"device {wanted}, where the array was saved, is not here")
    if kind != "NamedSharding":
        raise ValueError(f"a saved sharding of type {kind!r} cannot be rebuilt")
    by_id = {device.id: device for device in jax.devices()}
    mesh_shape = tuple(document["shape"])
    count = math.prod(mesh_shape)
    if not all(isinstance(side, int) and side > 0 for side in mesh_shape) or count > _MAX_DEVICES:
        raise ValueError(f"no mesh that saved an array has the shape {mesh_shape!r:.60}")
    recorded = (document.get("device_mesh") or {}).get("mesh")
    if not recorded:  # older checkpoints record only the mesh's shape
        wanted_ids = list(range(count))
    else:
        wanted_ids = [item["id"] for item in np.array(recorded, object).flat]
    missing = [index for index in wanted_ids if index not in by_id]
    if missing:
        raise ValueError(
            f"the mesh that saved the array had devices {wanted_ids}, of which {missing} are not "
            "here; give shardings in the abstract tree"
        )
    devices = np.empty(len(wanted_ids), object)
    devices[:] = [by_id[index] for index in wanted_ids]
    axis_types = tuple(
        _AXIS_TYPES.get(name.rpartition(".")[2], jax.sharding.AxisType.Auto)
        for name in document.get("axis_types") or ()
    )
    mesh = jax.sharding.Mesh(
        devices.reshape(mesh_shape), tuple(document["axis_names"]), axis_types=axis_types or None
    )
    spec = [tuple(item) if isinstance(item, list) else item for item in document["partition_spec"]]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def to_shape_dtype_struct(
    arr: Any,
    dtype: Any = None,
    scalar_dtype: type | None = None,
    support_format: bool = False,
) -> Any:
    """Returns the abstract form of an array; made for `jax.tree.map` over a state.

    Args:
      arr: a jax or NumPy array, an abstract array, metadata of an array, or a Python scalar.
      dtype: overrides the dtype.
      scalar_dtype: a Python type to convert Python scalars with; they pass unchanged without it.
      support_format: keep a jax array's layout along with its sharding.

    Returns:
      A `jax.ShapeDtypeStruct` with the sharding where there is one; scalars stay scalars. A typed
      PRNG key becomes the integers that it is stored as.

    Raises:
      ValueError: `arr` has no shape and is no scalar.
    """
    if isinstance(arr, (bool, int, float, np.number)) and not isinstance(arr, np.ndarray):
        return arr if scalar_dtype is None else scalar_dtype(arr)
    if isinstance(arr, jax.Array) and jax.dtypes.issubdtype(arr.dtype, jax.dtypes.prng_key):
        arr = jax.random.key_data(arr)
    if not hasattr(arr, "shape") or not hasattr(arr, "dtype"):
        raise ValueError(f"Object does not have a `shape` property: {arr!r}")
    where = getattr(arr, "format" if support_format else "sharding", None)
    return jax.ShapeDtypeStruct(arr.shape, dtype or arr.dtype, sharding=where)
