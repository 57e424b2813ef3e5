"""What a checkpoint says of itself, without its data."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any, Generic, TypeAlias, TypeVar

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import registration
from orbax_async._engine import loop
from orbax_async._layouts.layout import Checkpointable, Details, Layout, reading
from orbax_async._layouts.orbax import OrbaxLayout, check_name
from orbax_async._layouts.reader import Reader
from orbax_async._operation import Operation, older, starting
from orbax_async._storage.local import open_directory
from orbax_async._trace import logger
from orbax_async.handlers import phases, user_code
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.path import Path, PathLike, pathlike
from orbax_async.tree import AbstractLeaf, PyTreeOf

T = TypeVar("T")
PyTreeMetadata: TypeAlias = PyTreeOf[AbstractLeaf]


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class CheckpointMetadata(Generic[T]):
    """What is known of a checkpoint: its tree, its times, and its user's own metadata.

    Attributes:
      path: the checkpoint's directory.
      metadata: the abstract form of what it holds; `load` accepts it.
      init_timestamp_nsecs: when the save began, in nanoseconds since the epoch.
      commit_timestamp_nsecs: when it was committed.
      custom_metadata: what the user gave to `save`.
      nbytes: the bytes of all its files; None where it was not read from one.
    """

    path: Path
    metadata: T
    init_timestamp_nsecs: int | None
    commit_timestamp_nsecs: int | None
    custom_metadata: dict[str, Any] | None
    nbytes: int | None = None

    def __init__(
        self,
        path: PathLike,
        *,
        metadata: T,
        init_timestamp_nsecs: int | None = None,
        commit_timestamp_nsecs: int | None = None,
        custom_metadata: dict[str, Any] | None = None,
    ) -> None:
        vars(self).update(
            path=Path(path),
            metadata=metadata,
            init_timestamp_nsecs=init_timestamp_nsecs,
            commit_timestamp_nsecs=commit_timestamp_nsecs,
            custom_metadata=custom_metadata,
        )

    def __repr__(self) -> str:
        return (
            f"CheckpointMetadata({str(self.path)!r}, metadata={self.metadata!r}, "
            f"commit_timestamp={self.commit_timestamp}, custom_metadata={self.custom_metadata})"
        )

    @property
    def init_timestamp(self) -> datetime.datetime | None:
        """When the save began, in UTC."""
        return _as_datetime(self.init_timestamp_nsecs)

    @property
    def commit_timestamp(self) -> datetime.datetime | None:
        """When the checkpoint was committed, in UTC."""
        return _as_datetime(self.commit_timestamp_nsecs)


def _as_datetime(nsecs: int | None) -> datetime.datetime | None:
    if nsecs is None:
        return None
    return datetime.datetime.fromtimestamp(nsecs / 1e9, tz=datetime.UTC)


def metadata(
    path: PathLike, checkpointable_name: str | None = names.AUTO_CHECKPOINTABLE
) -> CheckpointMetadata[PyTreeMetadata]:
    """Returns what a checkpoint holds, without reading array data.

    Example:
      ::

        tree = ocp.metadata("/checkpoints/7").metadata
        tree["params"]["w"].shape

    Args:
      path: the checkpoint.
      checkpointable_name: as for `load`.

    Returns:
      Metadata whose tree has an `arrays.ArrayMetadata` for each jax array, an
      `arrays.NumpyMetadata` for each NumPy array, 0, 0.0 or False for scalars, and `'string'`. Its
      `nbytes` are those of the checkpoint's files, `storage_metadata.nbytes` those of an array. Of
      safetensors files it is a `jax.ShapeDtypeStruct` for each tensor, the texts beside them as
      custom metadata, and the time when the files were last changed.

    Raises:
      InvalidLayoutError: there is no such checkpoint, or its documents are damaged.
    """
    with starting("metadata") as operation:
        reader = Reader(operation, path)
        check_name(checkpointable_name, is_saved=False)

        def find(layout: Layout) -> tuple[Path, Details]:
            return Path(layout.tree(checkpointable_name)[1].path), layout.details()

        async def read(found: tuple[Path, Details]) -> CheckpointMetadata[PyTreeMetadata]:
            directory, details = found
            return _described(reader, await PyTreeHandler().metadata(directory), details)

        response = reader.start("metadata of", find, read)
    return response._finish()


def checkpointables_metadata(path: PathLike) -> CheckpointMetadata[dict[str, Any]]:
    """Returns what all checkpointables of a checkpoint are, without reading their data.

    Example:
      ::

        sorted(ocp.checkpointables_metadata("/checkpoints/7").metadata)

    Args:
      path: the checkpoint.

    Returns:
      Metadata with a dict of abstract forms by name; `load_checkpointables` accepts it. None stands
      for what has no abstract form (JSON, protobuf messages, objects that save themselves), and
      for what no registered handler can describe.

    Raises:
      InvalidLayoutError: there is no such checkpoint, it is a flat one of older Orbax versions, or
        the documents of a pytree are damaged.
    """
    with starting("metadata") as operation:
        reader = Reader(operation, path)

        def find(layout: Layout) -> tuple[dict[str, Checkpointable], Details]:
            return layout.checkpointables(), layout.details()

        async def read(
            found: tuple[dict[str, Checkpointable], Details],
        ) -> CheckpointMetadata[dict[str, Any]]:
            stored, details = found
            abstract = {name: await _abstract(operation, name, stored[name]) for name in stored}
            return _described(reader, abstract, details)

        response = reader.start("metadata of", find, read)
    return response._finish()


async def _abstract(operation: Operation, name: str, stored: Checkpointable) -> Any:
    """Returns what a checkpointable's handler says of it, None where nothing can be said."""
    path = stored.directory.path
    try:
        part = await loop.to_worker(
            lambda: phases.for_loading(
                name,
                None,
                operation.context.checkpointables.registry,
                typestr=stored.typestr,
                is_pytree=stored.is_pytree,
                path=stored.directory.parent.path,
            )
        )
    except registration.NoEntryError as error:
        logger.info("%s has no metadata: %s", path, error)
        return None
    code = part.code("metadata")
    with phases.naming(name):
        if isinstance(part.handler, PyTreeHandler):
            return await part.handler.metadata(Path(path))
        try:
            return await user_code.awaited(part.handler.metadata(Path(path)), str(code))
        except Exception as error:
            logger.warning("%s has no metadata: %s", path, error, exc_info=error)
            return None


def _described(reader: Reader, metadata: T, details: Details) -> CheckpointMetadata[T]:
    described = CheckpointMetadata(reader.directory.path, metadata=metadata)
    vars(described).update(details._asdict())
    return described


def is_orbax_checkpoint(path: PathLike) -> bool:
    """Says whether a path holds a finished Orbax checkpoint.

    An empty directory, a file, an unfinished save, a part of a checkpoint, and a directory of
    checkpoints are none.

    Example:
      ::

        steps = [p for p in run.iterdir() if ocp.is_orbax_checkpoint(p)]

    Args:
      path: what may be a checkpoint.

    Raises:
      UnreadableError: the system refuses to look there.
    """
    layout = OrbaxLayout(open_directory(pathlike.absolute(path)), ambient.current())
    with reading(layout.directory.path):
        return layout.problem() is None


# Older names, which Orbax has deprecated too.

pytree_metadata = older(metadata)
