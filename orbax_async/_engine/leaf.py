"""A leaf of a state on its way out: what it is, and how it is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from orbax_async._engine.plan import ShardSpec
from orbax_async._storage import codecs, zarr
from orbax_async.tree import keypath, schema
from orbax_async.tree.keypath import KeyPath

__all__ = ["Leaf", "Mode", "Piece", "Storage"]

Piece = np.ndarray[Any, Any] | jax.Array  # once it is captured, or placed on a device
Mode = Literal["view", "copy", "fetch", "pin"]

_UINT8 = np.dtype(np.uint8)


class Storage(NamedTuple):
    """How an array is divided, captured and stored; arrays that are alike share one.

    Attributes:
      dtype: the dtype on disk.
      cast: the dtype to which values are cast first; None where they stay as they are.
      itemsize: bytes of an element, as it is captured or on disk, whichever are more.
      shards: each device's part of the array.
      write_shape: the shape of the pieces that are written.
      chunk_shape: the shape of chunks; a piece is a whole number of them, most often one.
      mode: how values are captured.
      is_small: whether they may be captured by `copy_small`.
      encoding: how chunks are encoded; None where a sample of the first piece decides.
      min_saving: the share of bytes that compression must then save.
      is_separate: whether replicas write a part each, to a database of their own.
      zarr3: whether it is stored as zarr version 3.
    """

    dtype: np.dtype[Any]
    cast: np.dtype[Any] | None
    itemsize: int
    shards: tuple[ShardSpec, ...]
    write_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    mode: Mode
    is_small: bool
    encoding: codecs.Encoding | None
    min_saving: float
    is_separate: bool
    zarr3: bool

    @property
    def likely_encoding(self) -> codecs.Encoding:
        """How chunks are encoded, or mostly will be: for narrow floats and integers zstd pays."""
        return self.encoding or ("raw" if self.dtype.itemsize > 2 else "zstd")

    def reencodes(self, encoding: codecs.Encoding) -> bool:
        """Says whether an encoding makes other bytes than the array has, which take memory."""
        return not self.zarr3 or encoding != "raw"

    def stored(self, piece: Piece) -> np.ndarray[Any, Any]:
        """Returns a piece as elements of the dtype on disk."""
        array = np.asarray(piece)
        if self.cast is not None:
            with np.errstate(all="ignore"):  # what does not fit becomes what the dtype makes of it
                array = array.astype(self.cast, copy=False)
        return array if array.dtype == self.dtype else array.view(self.dtype)


@dataclasses.dataclass(slots=True)
class Leaf:
    """What is known of a leaf, or of an empty node, apart from its values.

    Attributes:
      keys: where it is in the tree.
      kind: as `schema.Entry.kind`.
      shape: the global shape of its array; None where it is not stored as one.
      dtype: the dtype that its values have on disk, unless they are cast.
      sharding: of a jax array.
      is_mutable: whether the caller could change its array in place.
      prng_impl: of typed PRNG keys, the name of their implementation.
      private: what only we record.
      priority: 0 if it is captured first, and outside of the limit of transfers; else 1, and more
        the longer it may wait.
      name: the name under which it is stored.
      storage: of an array, how it is stored.
    """

    keys: KeyPath
    kind: str
    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] = _UINT8
    sharding: jax.sharding.Sharding | None = None
    is_mutable: bool = False
    prng_impl: str | None = None
    private: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    priority: int = 1
    name: str = dataclasses.field(init=False)
    storage: Storage = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.name = keypath.stored_name(self.keys)

    @property
    def label(self) -> str:
        """Its key path, for messages."""
        return keypath.label(self.keys)

    @property
    def has_value(self) -> bool:
        """Whether it is a leaf, not an empty node."""
        return self.shape is not None or self.kind == schema.STRING

    @property
    def itemsize(self) -> int:
        """Bytes of an element of its array."""
        return self.storage.itemsize

    @property
    def shards(self) -> tuple[ShardSpec, ...]:
        """Each device's part of its array."""
        return self.storage.shards

    def entry(self, write_shape: tuple[int, ...] | None = None) -> schema.Entry:
        """Returns what the tree's document records of it.

        Args:
          write_shape: the shape of the pieces that are written, if that is recorded.
        """
        return schema.Entry(self.keys, self.kind, self.name, write_shape, self.private)

    def document(self, encoding: codecs.Encoding) -> bytes:
        """Returns the metadata document of its array."""
        storage, dtype_name = self.storage, zarr.name_of(self.storage.dtype)
        assert self.shape is not None
        return zarr.array_document(
            self.shape, storage.chunk_shape, dtype_name, encoding, zarr3=storage.zarr3
        )

    @property
    def document_key(self) -> str:
        """The key of that document."""
        return zarr.document_key(self.name, zarr3=self.storage.zarr3)

    def chunk_key(self, index: tuple[int, ...]) -> str:
        """Returns the key of a chunk by its place in the grid of chunks."""
        return zarr.chunk_key(self.name, index, zarr3=self.storage.zarr3)
