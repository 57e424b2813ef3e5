"""How an operation runs, what it does with checkpointables, and how these lie in files."""

from __future__ import annotations

import copy
import enum
import warnings
from collections.abc import Callable
from typing import Any, Literal, Self

from etils import epath

from orbax_async import registration
from orbax_async.options._group import (
    FROM_0,
    FROM_1,
    Freeze,
    OptionGroup,
    each,
    function,
    instance_of,
    member_of,
    number,
    one_of,
    option,
    optional,
)


class AsyncOptions(OptionGroup):
    """How a save runs in the background.

    Attributes:
      timeout_secs: seconds for the background part of a save, after which it fails with
        `OperationTimeoutError`; zero or less fails at once, None means no limit. 20 minutes.
        Several processes wait for one another at most four fifths of it, or 16 minutes.
      post_finalization_callback: called without arguments after each commit, before the response
        is done; what it raises, the response raises. None means no call.
      create_directories_asynchronously: whether `save_async` may return before the temporary
        directory exists.
      staging: `'eager'` captures every value before `save_async` returns; `'lazy'` returns at once
        and captures in the background, and the caller promises to leave the values as they are
        until the response is `staged`.
      exit_grace_secs: seconds that the end of the interpreter waits for running saves to commit
        before it gives them up and says so on stderr.
    """

    timeout_secs: float | None = option(default=1200, check=optional(number()))
    post_finalization_callback: Callable[[], None] | None = option(default=None, check=function)
    create_directories_asynchronously: bool = True
    staging: Literal["eager", "lazy"] = option(default="eager", check=one_of("eager", "lazy"))
    exit_grace_secs: float = option(default=5.0, check=number(at_least=0))


class MultiprocessingOptions(OptionGroup):
    """Which processes take part, and how they meet.

    Attributes:
      primary_host: index of the process that creates directories, writes metadata and commits;
        None makes every process primary, each with storage of its own, which a save of several
        processes refuses in this version. Process 0.
      active_processes: indices of the processes that call the operation; None means all.
      barrier_sync_key_prefix: put before the name of each barrier, to keep apart operations that
        different subsets of processes run at the same time; None means no prefix.
    """

    primary_host: int | None = option(default=0, check=optional(FROM_0))
    active_processes: set[int] | None = option(default=None, check=each(FROM_0, set))
    barrier_sync_key_prefix: str | None = option(default=None, check=instance_of(str))


class CheckpointingImpl(enum.Enum):
    """The ways to checkpoint on Pathways."""

    COLOCATED_PYTHON = 1
    PERSISTENCE = 2
    NO_DISPATCHER = 3


class PathwaysOptions(OptionGroup):
    """How checkpointing works on Pathways.

    Attributes:
      checkpointing_impl: the way to use; None chooses by what the backend offers.
    """

    checkpointing_impl: CheckpointingImpl | None = option(
        default=None, check=instance_of(CheckpointingImpl)
    )


class PyTreeMetadataOptions(OptionGroup):
    """What is recorded about the structure of a tree.

    Attributes:
      support_rich_types: whether tuples and namedtuples are recorded as such, not as lists and
        dicts.
    """

    support_rich_types: bool = False


class PyTreeOptions(OptionGroup):
    """How trees are saved and loaded, apart from the arrays in them.

    Attributes:
      saving: options of saving.
      loading: options of loading.
    """

    class Saving(OptionGroup):
        """How trees are saved.

        Attributes:
          pytree_metadata_options: what is recorded about the structure.
        """

        pytree_metadata_options: PyTreeMetadataOptions = option(
            default_factory=PyTreeMetadataOptions
        )

    class Loading(OptionGroup):
        """How trees are loaded.

        Attributes:
          partial_load: whether the abstract tree may leave out parts of the stored tree, which
            are then not loaded.
        """

        partial_load: bool = False

    saving: Saving = option(default_factory=Saving)
    loading: Loading = option(default_factory=Loading)


def _registry(name: str, value: Any) -> Any:
    missing = [m for m in ("add", "get", "has", "get_all_entries") if not hasattr(value, m)]
    if missing:
        raise TypeError(f"{name} must be a handler registry, but {value!r} has no {missing[0]!r}")
    return value


class CheckpointablesOptions(OptionGroup):
    """Which handlers save and load checkpointables.

    Attributes:
      registry: the handlers to choose from; by default a read-only view of the global registry.
    """

    registry: registration.CheckpointableHandlerRegistry = option(
        default_factory=lambda: registration.ReadOnlyHandlerRegistry(
            registration.global_registry()
        ),
        check=_registry,
    )

    @classmethod
    def create_with_handlers(cls, *handlers: Any, **named_handlers: Any) -> Self:
        """Create options whose registry holds further handlers after the global ones.

        Args:
          *handlers: handler classes, or ready handlers, for checkpointables of any name.
          **named_handlers: the same, each for the checkpointable of its keyword only.

        Raises:
          AlreadyExistsError: A handler or a name is registered globally already.
          ValueError: Something given is neither a class nor a handler.
        """
        registry = registration.local_registry()
        for handler in handlers:
            registry.add(handler)
        for name, handler in named_handlers.items():
            registry.add(handler, checkpointable_name=name)
        return cls(registry=registry)

    def _copied(self, freeze: Freeze | None = None) -> Self:
        """Return a copy with a registry of its own, or with the same view of the global one."""
        twin = super()._copied(freeze)
        vars(twin)["registry"] = copy.deepcopy(self.registry)
        return twin


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
    for parent in kind.__mro__:
        if parent.__name__ in _MODES_OF_TEMPORARY_PATHS:
            return _MODES_OF_TEMPORARY_PATHS[parent.__name__]
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
