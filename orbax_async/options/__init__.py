"""The options of every operation, in groups; a `Context` holds one of each group.

Groups are keyword-only, mutable dataclasses that compare by value. They are configured by dots:

    context = Context()
    context.array.saving.use_zarr3 = False
    with context:
        save(path, state)

An unknown name or an impossible value is refused where it is assigned, and everything is frozen
while the context is active. Sizes are in bytes, times in seconds. The names and defaults are those
of Orbax v1; `AsyncOptions.staging`, `AsyncOptions.exit_grace_secs` and
`ArrayOptions.Saving.compression_min_saving` are additions.

**Does**: declare options, their defaults and the values they take.
**Does not**: act on them.
"""

from orbax_async.options._array_options import ArrayMetadataStore, ArrayOptions
from orbax_async.options._memory_options import (
    MemoryOptions,
    MemoryProfiler,
    SerializationStatusCallback,
    TransferPriority,
)
from orbax_async.options._operation_options import (
    AsyncOptions,
    AtomicityMode,
    AtomicityOptions,
    CheckpointablesOptions,
    CheckpointingImpl,
    CheckpointLayout,
    DeletionOptions,
    FileOptions,
    MultiprocessingOptions,
    PathwaysOptions,
    PyTreeMetadataOptions,
    PyTreeOptions,
    SafetensorsOptions,
)

__all__ = [
    "ArrayMetadataStore",
    "ArrayOptions",
    "AsyncOptions",
    "AtomicityMode",
    "AtomicityOptions",
    "CheckpointLayout",
    "CheckpointablesOptions",
    "CheckpointingImpl",
    "DeletionOptions",
    "FileOptions",
    "MemoryOptions",
    "MemoryProfiler",
    "MultiprocessingOptions",
    "PathwaysOptions",
    "PyTreeMetadataOptions",
    "PyTreeOptions",
    "SafetensorsOptions",
    "SerializationStatusCallback",
    "TransferPriority",
]
