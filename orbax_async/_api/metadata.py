"""What a checkpoint says of itself, without its data."""

from __future__ import annotations

import datetime
import os
from typing import Any, Generic, TypeAlias, TypeVar

from orbax_async import _names as names
from orbax_async import context as ambient
from orbax_async import registration
from orbax_async._api import layout
from orbax_async._engine import loop
from orbax_async._operation import Operation, starting
from orbax_async._storage import files
from orbax_async._trace import logger
from orbax_async.handlers import foreign, resolve, tiers
from orbax_async.handlers.pytree import PyTreeHandler
from orbax_async.handlers.tensors import TensorTree
from orbax_async.path import Path, PathLike, pathlike
from orbax_async.tree import AbstractLeaf, PyTreeOf

__all__ = ["CheckpointMetadata", "PyTreeMetadata", "checkpointables_metadata", "metadata"]

T = TypeVar("T")
PyTreeMetadata: TypeAlias = PyTreeOf[AbstractLeaf]


class CheckpointMetadata(Generic[T]):
    """What is known of a checkpoint: its tree, its times, and its user's own metadata.

    Args:
      path: the checkpoint.
      metadata: the abstract form of what it holds; `load` accepts it.
      init_timestamp_nsecs: when the save began, in nanoseconds since the epoch.
      commit_timestamp_nsecs: when it was committed.
      custom_metadata: what the user gave to `save`.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        metadata: T,
        init_timestamp_nsecs: int | None = None,
        commit_timestamp_nsecs: int | None = None,
        custom_metadata: dict[str, Any] | None = None,
    ) -> None:
        self._path = Path(path)
        self._metadata = metadata
        self._init_timestamp_nsecs = init_timestamp_nsecs
        self._commit_timestamp_nsecs = commit_timestamp_nsecs
        self._custom_metadata = custom_metadata
        self._nbytes: int | None = None

    def __repr__(self) -> str:
        return (
            f"CheckpointMetadata({str(self._path)!r}, metadata={self._metadata!r}, "
            f"commit_timestamp={self.commit_timestamp}, custom_metadata={self._custom_metadata})"
        )

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self._path

    @property
    def metadata(self) -> T:
        """The abstract form of what the checkpoint holds."""
        return self._metadata

    @property
    def init_timestamp_nsecs(self) -> int | None:
        """When the save began, in nanoseconds since the epoch."""
        return self._init_timestamp_nsecs

    @property
    def commit_timestamp_nsecs(self) -> int | None:
        """When the checkpoint was committed, in nanoseconds since the epoch."""
        return self._commit_timestamp_nsecs

    @property
    def init_timestamp(self) -> datetime.datetime | None:
        """When the save began, in UTC."""
        return _as_datetime(self._init_timestamp_nsecs)

    @property
    def commit_timestamp(self) -> datetime.datetime | None:
        """When the checkpoint was committed, in UTC."""
        return _as_datetime(self._commit_timestamp_nsecs)

    @property
    def custom_metadata(self) -> dict[str, Any] | None:
        """What the user gave to `save`."""
        return self._custom_metadata

    @property
    def nbytes(self) -> int | None:
        """The bytes of all files of the checkpoint; None where it was not read from one."""
        return self._nbytes


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
    with starting("metadata") as doing:
        where = pathlike.absolute(path, doing.context.file.path_class)
        layout.check_name(checkpointable_name, is_saved=False)

        async def read() -> CheckpointMetadata[PyTreeMetadata]:
            located = await layout.when_settled(
                where, lambda path: layout.locate(path, checkpointable_name)
            )
            if located.is_of_tensors:
                return await loop.to_worker(_of_tensors, where, doing.context)
            tree = await PyTreeHandler().metadata(Path(located.directory))
            return await _described(where, tree, located.document)

        response = doing.start(f"metadata of {where}", lambda: layout.read_whole(where, read))
    return response.result()


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
    with starting("metadata") as doing:
        where = pathlike.absolute(path, doing.context.file.path_class)

        async def read() -> CheckpointMetadata[dict[str, Any]]:
            contents = await layout.when_settled(where, layout.contents)
            forms = {
                name: await _abstract_form(contents, name, doing) for name in contents.typestrs
            }
            return await _described(where, forms, contents.document)

        response = doing.start(f"metadata of {where}", lambda: layout.read_whole(where, read))
    return response.result()


async def _abstract_form(contents: layout.Contents, name: str, doing: Operation) -> Any:
    """Returns what a checkpointable's handler says of it, None where nothing can be said."""
    directory = contents.directory(name)
    try:
        part = await loop.to_worker(
            lambda: resolve.for_loading(
                name,
                None,
                doing.context.checkpointables.registry,
                typestr=contents.typestrs[name],
                is_pytree=name in contents.pytrees,
                path=contents.root,
            )
        )
    except registration.NoEntryError as error:
        logger.info("%s has no metadata: %s", directory, error)
        return None
    code = part.code("metadata")
    with tiers.naming(name):
        if isinstance(part.handler, PyTreeHandler):
            return await part.handler.metadata(Path(directory))
        try:
            return await foreign.awaited(part.handler.metadata(Path(directory)), str(code))
        except Exception as error:
            logger.warning("%s has no metadata: %s", directory, error, exc_info=error)
            return None


async def _described(path: str, metadata: T, document: dict[str, Any]) -> CheckpointMetadata[T]:
    described = CheckpointMetadata(
        path,
        metadata=metadata,
        init_timestamp_nsecs=_int(document.get("init_timestamp_nsecs")),
        commit_timestamp_nsecs=_int(document.get("commit_timestamp_nsecs")),
        custom_metadata=document.get("custom_metadata") or {},
    )
    described._nbytes = sum((await loop.to_worker(files.sizes, path)).values())
    return described


def _of_tensors(path: str, options: ambient.Context) -> CheckpointMetadata[PyTreeMetadata]:
    """Returns what the headers of safetensors files say; blocks."""
    tree = TensorTree(path, options.safetensors)
    stats = [os.stat(file) for file in tree.contents.files]
    described = CheckpointMetadata(
        path,
        metadata=tree.metadata(),
        commit_timestamp_nsecs=max(stat.st_mtime_ns for stat in stats),
        custom_metadata=tree.contents.metadata,
    )
    described._nbytes = sum(stat.st_size for stat in stats)
    return described


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) else None
