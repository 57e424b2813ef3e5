"""Every name that appears on disk, once (invariant I10: Orbax reads what we write, and back).

The meaning of each file is in `docs/format.md`.
"""

from __future__ import annotations

import re

# At the root of a checkpoint.
CHECKPOINT_MARKER = "orbax.checkpoint"
CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
COMMIT_MARKER = "commit_success.txt"
DELETION_RECORD = "_CHECKPOINT_DELETION"

# Inside a checkpointable's directory.
TREE_METADATA = "_METADATA"
SHARDINGS = "_sharding"
STRINGS = "_strings.json"
ARRAY_METADATAS = "array_metadatas"
OCDBT_MANIFEST = "manifest.ocdbt"
OCDBT_DATA = "d"
PROCESS_DATABASE = "ocdbt.process_{}"
PROCESS_REPLICA_DATABASE = "ocdbt.process_replica_{}"
PROCESS_METADATA = "process_{}"

# Beside Orbax's own format: files of tensors, and what says which file holds which tensor.
SAFETENSORS = ".safetensors"
SAFETENSORS_INDEX = ".safetensors.index.json"
# The axis over which Orbax spreads tensors of which nothing else is asked.
SAFETENSORS_AXIS = "_safetensors_replica"

# Names that a checkpointable cannot have.
DEFAULT_CHECKPOINTABLE = "state"
AUTO_CHECKPOINTABLE = "AUTO"
METRICS = "metrics"
RESERVED_CHECKPOINTABLES = frozenset({METRICS, AUTO_CHECKPOINTABLE, DELETION_RECORD})

# Beside the steps of a run.
ROOT_METADATA_DIRECTORY = "metadata"
ROOT_METADATA = "_ROOT_METADATA"
OLDER_ROOT_METADATA = "metadata"

# A directory whose name contains this mark is unfinished, to every Orbax reader and to ours.
TEMPORARY_MARK = ".orbax-checkpoint-tmp"
# Ours are `<checkpoint>.orbax-checkpoint-tmp-<owner>-<use>`: see `_commit.leftovers`.
OWNED_TEMPORARY = re.compile(
    r"(?P<checkpoint>.+)\.orbax-checkpoint-tmp"
    r"-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-(?P<serial>\d+)-(?P<use>new|old)"
)

# The partial saves to `<checkpoint>` gather in `<checkpoint>.partial_save`, one directory each.
SESSION_SUFFIX = ".partial_save"
PART_MARK = ".pending"
PART = "{session}.pending_{nsecs}_{serial}"

# The handler class that stock Orbax resolves for a pytree.
PYTREE_TYPESTR = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"

# Key of our private entries inside documents whose readers ignore what they don't know.
PRIVATE = "orbax_async"
