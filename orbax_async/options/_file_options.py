"""How checkpoints lie in a file system, appear there and are deleted."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable
from typing import Any

from etils import epath

from orbax_async.options._group import (
    FROM_0,
    FROM_1,
    OptionGroup,
    function,
    instance_of,
    member_of,
    number,
    option,
)


class AtomicityMode(enum.StrEnum):
    """How a checkpoint becomes visible as a whole.

    Attributes:
      AUTO: what suits the file system.
      COMMIT_FILE: write in place, then add a marker file, which readers in this mode ask for. While
        a checkpoint is overwritten the old one is set aside, and there is none to be read.
      ATOMIC_RENAME: write beside, then rename.
    """

    AUTO = "auto"
    COMMIT_FILE = "commit_file"
    ATOMIC_RENAME = "atomic_rename"


_MODES_OF_TEMPORARY_PATHS = {
    "AtomicRenameTemporaryPath": AtomicityMode.ATOMIC_RENAME,
    "CommitFileTemporaryPath": AtomicityMode.COMMIT_FILE,
}


def mode_of_temporary_path(kind: type) -> AtomicityMode:
    """Return the commit protocol that a class of Orbax stands for; it is known by its name."""
    for each in kind.__mro__:
        if each.__name__ in _MODES_OF_TEMPORARY_PATHS:
            return _MODES_OF_TEMPORARY_PATHS[each.__name__]
    raise ValueError(f"{kind} is none of {', '.join(_MODES_OF_TEMPORARY_PATHS)}")


def _temporary_path_class(name: str, value: Any) -> type:
    kind: type = instance_of(type)(name, value)
    try:
        mode = mode_of_temporary_path(kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    warnings.warn(
        f"{name} is deprecated; set atomicity.mode = {mode.value!r} instead",
        DeprecationWarning,
        stacklevel=4,
    )
    return kind


class FileOptions(OptionGroup):
    """How checkpoint directories are made.

    Attributes:
      path_permission_mode: permission bits of a checkpoint's directory, for example 0o750; None
        leaves them to the umask.
      path_class: makes a path object of what the caller passes as a path. `etils.epath.Path`.
      skip_sync_file_validations: whether to leave out the check for an existing destination when
        a save starts, so that it is found only when the save commits.
      temporary_path_class: deprecated, the older way to choose `AtomicityOptions.mode`: Orbax's
        `AtomicRenameTemporaryPath` or `CommitFileTemporaryPath`, or a subclass. None means that
        `AtomicityOptions.mode` decides.
    """

    path_permission_mode: int | None = option(default=None, check=FROM_0)
    path_class: Callable[..., Any] = option(default=epath.Path, check=function)
    skip_sync_file_validations: bool = False
    temporary_path_class: Any = option(default=None, check=_temporary_path_class)


class AtomicityOptions(OptionGroup):
    """How a save commits, and what a load accepts as committed.

    Attributes:
      mode: an `AtomicityMode` or its value. AUTO.
      allow_legacy_atomic_rename: whether a load under COMMIT_FILE also accepts checkpoints that
        have no marker because they were renamed into place.
    """

    mode: AtomicityMode = option(default=AtomicityMode.AUTO, check=member_of(AtomicityMode))
    allow_legacy_atomic_rename: bool = False


class DeletionOptions(OptionGroup):
    """How checkpoints are deleted.

    Attributes:
      gcs_deletion_options: what differs on Google Cloud Storage.
    """

    class GcsDeletionOptions(OptionGroup):
        """How checkpoints on Google Cloud Storage are deleted.

        Attributes:
          todelete_full_path: a directory, relative to the bucket, into which deleted checkpoints
            are moved for something else to remove; None deletes them at once.
        """

        todelete_full_path: str | None = option(default=None, check=instance_of(str))

    gcs_deletion_options: GcsDeletionOptions = option(default_factory=GcsDeletionOptions)


class CheckpointLayout(enum.Enum):
    """The formats of a checkpoint. Values are accepted in any case: 'orbax', 'Orbax'.

    Attributes:
      ORBAX: Orbax's own format.
      SAFETENSORS: safetensors files, for `load` and `metadata` alone.
      AUTO: whichever is there when loading, ORBAX when saving.
    """

    ORBAX = "orbax"
    SAFETENSORS = "safetensors"
    AUTO = "auto"

    @classmethod
    def _missing_(cls, value: object) -> CheckpointLayout | None:
        spelled = value.lower() if isinstance(value, str) else value
        return next((layout for layout in cls if layout.value == spelled), None)


class SafetensorsOptions(OptionGroup):
    """How safetensors files are read.

    Attributes:
      max_over_read_ratio: bytes read for each byte needed, at most, where nearby ranges are read in
        one piece; 1.0 reads nothing that is not needed, None reads on over gaps of up to 16 KiB.
      read_chunk_bytes: bytes that one read asks for, at most; None for no limit of what goes
        straight into its place. What is read in one piece and then divided is 256 KiB at most.
      ignore_load_sharding: an option of older Orbax versions, which is refused when it is set.
    """

    max_over_read_ratio: float | None = option(default=None, check=number(at_least=1))
    read_chunk_bytes: int | None = option(default=None, check=FROM_1)
    ignore_load_sharding: bool = False
