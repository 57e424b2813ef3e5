"""How each array of a tree is stored: what `StorageOptions` ask of it, found for every leaf.

The options of a leaf are what `scoped_storage_options_creator` returns for it, and where that says
nothing, `storage_options`. Two kinds of leaves keep their dtype: typed PRNG keys and `bytes` are
not numbers. Nothing is cast here; a save casts each piece when it writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

from orbax_async import errors
from orbax_async._engine import plan
from orbax_async._storage import zarr
from orbax_async.handlers import kinds, leaves
from orbax_async.handlers.forms import PreparedTree
from orbax_async.handlers.leaves import LeafForm
from orbax_async.options import ArrayOptions
from orbax_async.tree import schema

__all__ = ["Stored", "choose"]

_Saving = ArrayOptions.Saving
_StorageOptions = ArrayOptions.Saving.StorageOptions

_DATA_FILE_NBYTES = 2 << 30  # as much as one data file of OCDBT holds unless another size is set


class Stored(NamedTuple):
    """How one array is stored.

    Attributes:
      dtype: the dtype on disk.
      cast: the dtype to which values are cast first; None where they stay as they are.
      private: what only we record of the leaf.
      chunk_nbytes: the most bytes of a chunk; None for no limit.
      axes: the axes along which a chunk has a single element.
    """

    dtype: np.dtype[Any]
    cast: np.dtype[Any] | None
    private: Mapping[str, Any]
    chunk_nbytes: int | None
    axes: tuple[int, ...]

    @property
    def kind(self) -> Hashable:
        """What leaves have in common that are stored alike."""
        return self.dtype, self.cast, self.chunk_nbytes, self.axes

    def chunk_shape(self, shape: tuple[int, ...], write_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the chunks into which pieces of an array are divided."""
        count = None if self.chunk_nbytes is None else self.chunk_nbytes // self.dtype.itemsize
        return plan.chunk_shape(shape, write_shape, max_count=count, axes=self.axes)


def choose(prepared: PreparedTree, saving: _Saving) -> list[Stored]:
    """Returns how each array of a tree is stored, in the order of the tree's arrays.

    Raises:
      UnsupportedLeafError: what the options ask of a leaf can't be; all such leaves are named.
      TypeError: `scoped_storage_options_creator` returned something else.
      Exception: what it raised.
    """
    form, general = prepared.form, saving.storage_options
    limit = _data_file_nbytes(saving)
    if saving.scoped_storage_options_creator is not None:
        scoped = [
            _merged(saving.scoped_storage_options_creator(path, value), general)
            for path, value in prepared.array_leaves()
        ]
        return _all(form.arrays, scoped, limit)
    key: Hashable = (repr(general), limit)
    found: list[Stored] | None = form.stored.get(key)
    if found is None:
        form.stored.clear()  # whoever changes options seldom changes them back
        found = form.stored[key] = _all(form.arrays, [general] * len(form.arrays), limit)
    return found


def _data_file_nbytes(saving: _Saving) -> int | None:
    """Returns how large a chunk may be for a data file to hold it, as Orbax reckons."""
    size = saving.ocdbt_target_data_file_size
    if not saving.use_ocdbt or size == 0:
        return None
    return _DATA_FILE_NBYTES if size is None else size


def _merged(scoped: Any, general: _StorageOptions) -> _StorageOptions:
    if scoped is None:
        return general
    if not isinstance(scoped, _StorageOptions):
        raise TypeError(
            "array.saving.scoped_storage_options_creator must return StorageOptions or None, "
            f"not {scoped!r}"
        )
    merged = {
        field.name: getattr(general, field.name)
        if getattr(scoped, field.name) is None
        else getattr(scoped, field.name)
        for field in dataclasses.fields(_StorageOptions)
    }
    return _StorageOptions(**merged)


def _all(forms: list[LeafForm], wanted: list[_StorageOptions], limit: int | None) -> list[Stored]:
    chosen: list[Stored] = []
    refused: list[errors.LeafError] = []
    for leaf, options in zip(forms, wanted, strict=True):
        try:
            chosen.append(_stored(leaf, options, limit))
        except ValueError as error:
            refused.append(errors.UnsupportedLeafError(leaf.label, str(error)))
    if refused:
        raise leaves.summary(refused)
    return chosen


def _stored(leaf: LeafForm, options: _StorageOptions, limit: int | None) -> Stored:
    assert leaf.shape is not None
    dtype, cast, private = leaf.dtype, None, leaf.private
    if options.dtype is not None and _is_numeric(leaf):
        cast = np.dtype(options.dtype)
        dtype, private = _cast(leaf, cast)
    nbytes = options.chunk_byte_size
    if nbytes is not None and nbytes < dtype.itemsize:
        raise ValueError(
            f"storage_options.chunk_byte_size={nbytes} must be >= {dtype.itemsize}, the bytes of "
            f"one element of {dtype.name}"
        )
    if limit is not None:
        nbytes = max(dtype.itemsize, min(limit, limit if nbytes is None else nbytes))
    axes = options.shard_axes or ()
    if any(axis >= len(leaf.shape) for axis in axes):
        raise ValueError(
            f"All storage_options.shard_axes={axes} must be non-negative and less than "
            f"rank={len(leaf.shape)}; give leaves of different rank their own by "
            "scoped_storage_options_creator"
        )
    return Stored(dtype, cast, private, nbytes, axes)


def _is_numeric(leaf: LeafForm) -> bool:
    entry = schema.Entry(leaf.keys, leaf.kind, leaf.name, private=leaf.private)
    return leaf.prng_impl is None and kinds.of_stored(entry).may_be_cast


def _cast(leaf: LeafForm, cast: np.dtype[Any]) -> tuple[np.dtype[Any], Mapping[str, Any]]:
    """Returns the dtype on disk of a leaf that is cast, and what to record of it."""
    name = leaf.private.get("logical_dtype")
    own = leaf.dtype if name is None else zarr.dtype_named(name)
    if own.kind == "c" and cast.kind != "c":
        raise ValueError(
            f"storage_options.dtype={cast.name} would drop the imaginary part of {own.name}; give "
            "the leaf a complex dtype by scoped_storage_options_creator"
        )
    dtype, logical = kinds.disk_dtype(cast)
    private = dict(leaf.private)
    if own != cast:
        private.pop("weak_type", None)
    private.pop("logical_dtype", None)
    if logical is not None:
        private["logical_dtype"] = logical
    return dtype, private
