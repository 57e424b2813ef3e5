"""How arrays are stored and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orbax_async.options._group import (
    FROM_0,
    FROM_1,
    OptionGroup,
    each,
    flag,
    function,
    instance_of,
    number,
    option,
    optional,
)

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


@dataclass(frozen=True)
class ArrayMetadataStore:
    """Stands for the `array_metadatas` files of a checkpoint; they are written where it is set."""


class ArrayOptions(OptionGroup):
    """How arrays are stored and loaded.

    Attributes:
      saving: options of saving.
      loading: options of loading.
    """

    class Saving(OptionGroup):
        """How arrays are stored.

        Attributes:
          storage_options: how each array is stored, unless `scoped_storage_options_creator` says
            otherwise for a leaf.
          use_ocdbt: whether all arrays share one OCDBT database; otherwise each has a directory.
          use_zarr3: whether arrays are stored as zarr version 3; otherwise as version 2.
          use_compression: whether data is compressed with zstd where that pays.
          compression_min_saving: the share of bytes that compression must save, measured on a
            sample of each large array, for it to pay; 0 compresses every large array.
          ocdbt_target_data_file_size: bytes after which OCDBT begins another data file; 0 means no
            limit, None means 2 GB.
          enable_pinned_host_transfer: whether device memory is copied to pinned host memory; None
            means where the platform gains by it.
          enable_post_merge_validation: whether the primary process checks the merged database of
            several processes before it commits.
          use_replica_parallel: whether the replicas of an array share the work of writing it; None
            means True, except on GPU.
          min_slice_bytes_for_replica_parallel: bytes that each replica must have to write for the
            work to be shared; None means no minimum.
          max_replicas_for_replica_parallel: the most replicas among which an array is divided; None
            means all.
          enable_replica_parallel_separate_folder: whether shared writes go to OCDBT folders of
            their own.
          enable_write_sharding_file: whether the shardings are recorded, which a load without
            explicit shardings uses.
          array_metadata_store: writes one file per process about shapes and chunks; None leaves
            these files out.
          scoped_storage_options_creator: called with the key path and value of each leaf; where it
            returns `StorageOptions`, their fields that are not None win over `storage_options`.
        """

        class StorageOptions(OptionGroup):
            """How one array is stored.

            Attributes:
              dtype: data type to cast to before writing; None keeps the array's own.
              chunk_byte_size: the most bytes of a chunk; None means one chunk for each shard.
              shard_axes: axes to divide first when chunks are made smaller; None means those that
                are sharded already.
            """

            dtype: DTypeLike | None = None
            chunk_byte_size: int | None = option(default=None, check=FROM_1)
            shard_axes: tuple[int, ...] | None = option(default=None, check=each(FROM_0, tuple))

        class ScopedStorageOptionsCreator(Protocol):
            """Chooses the `StorageOptions` of each leaf."""

            def __call__(
                self, key: tuple[Any, ...], value: Any
            ) -> ArrayOptions.Saving.StorageOptions | None:
                """Return options for a leaf, or None to leave it to `storage_options`."""

        storage_options: StorageOptions = option(default_factory=StorageOptions)
        use_ocdbt: bool = True
        use_zarr3: bool = True
        use_compression: bool = True
        compression_min_saving: float = option(default=0.1, check=number(at_least=0))
        ocdbt_target_data_file_size: int | None = option(default=None, check=FROM_0)
        enable_pinned_host_transfer: bool | None = option(default=None, check=flag)
        enable_post_merge_validation: bool = True
        use_replica_parallel: bool | None = option(default=None, check=flag)
        min_slice_bytes_for_replica_parallel: int | None = option(default=None, check=FROM_0)
        max_replicas_for_replica_parallel: int | None = option(default=None, check=FROM_1)
        enable_replica_parallel_separate_folder: bool = False
        enable_write_sharding_file: bool = True
        array_metadata_store: ArrayMetadataStore | None = option(
            default=ArrayMetadataStore(), check=optional(instance_of(ArrayMetadataStore))
        )
        scoped_storage_options_creator: ScopedStorageOptionsCreator | None = option(
            default=None, check=function
        )

    class Loading(OptionGroup):
        """How arrays are loaded.

        Attributes:
          enable_padding_and_truncation: whether an array whose stored shape differs from the shape
            asked for is padded with zeros or cut; otherwise that is an error.
          raise_array_data_missing_error: whether data that is absent on disk is an error; otherwise
            it loads as zeros.
          use_load_and_broadcast: whether one replica reads and sends to the others.
          load_and_broadcast_options: how that is done.
        """

        class LoadAndBroadcastOptions(OptionGroup):
            """How one replica reads for all.

            Attributes:
              replica_axis_index: the axis of the device mesh along which the replicas lie.
              primary_replica_id: index along that axis of the replica that reads.
              broadcast_memory_limit_bytes: the most bytes sent at a time; None means a share of
                the free memory.
              broadcast_memory_scaling_factor: that share, as a fraction.
            """

            replica_axis_index: int | None = option(default=0, check=optional(FROM_0))
            primary_replica_id: int | None = option(default=0, check=optional(FROM_0))
            broadcast_memory_limit_bytes: int | None = option(default=None, check=FROM_1)
            broadcast_memory_scaling_factor: float | None = option(
                default=0.75, check=optional(number(at_least=0))
            )

        enable_padding_and_truncation: bool = False
        raise_array_data_missing_error: bool = True
        use_load_and_broadcast: bool = False
        load_and_broadcast_options: LoadAndBroadcastOptions = option(
            default_factory=LoadAndBroadcastOptions
        )

    saving: Saving = option(default_factory=Saving)
    loading: Loading = option(default_factory=Loading)
