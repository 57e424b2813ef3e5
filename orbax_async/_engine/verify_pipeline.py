"""Reading a tree's arrays to see whether they can be read, and keeping nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from orbax_async import errors
from orbax_async._engine import plan
from orbax_async._engine.load_pipeline import LoadPipeline, ReadableLeaf, read_error
from orbax_async._engine.plan import ReadRequest
from orbax_async._engine.transfer import Piece

__all__ = ["VerifyPipeline"]


class VerifyPipeline(LoadPipeline):
    """Reads as a load does, under its budget, and checks every checksum that there is.

    After `run`, `damaged` holds by leaf the first error that it met there.
    """

    damaged: dict[int, errors.LeafError]

    async def run(self) -> None:
        """Reads everything; damage ends nothing."""
        self.damaged = {}
        await super().run()

    def _map_memory(self) -> None:
        """Maps nothing: what is read is dropped again, batch by batch."""

    def _read_and_place(self, batch: list[ReadRequest], nbytes: int) -> list[list[Piece]]:
        with self._recorder.span("verify", nbytes):
            try:
                self._check(batch)
            except errors.LeafError:  # of one of them; the others have not all been read
                for request in batch:
                    try:
                        self._check([request])
                    except errors.LeafError as error:
                        self.damaged.setdefault(request.leaf, error)
        return [[] for _ in batch]

    def _check(self, batch: Sequence[ReadRequest]) -> None:
        arrays = self._read(list(batch))
        # What was read by its blocks has one more checksum, which only TensorStore computes.
        for request, array in zip(batch, arrays, strict=True):
            leaf = self._leaves[request.leaf]
            raw = leaf.form.raw
            if leaf.form.whole is None and raw is not None and raw.has_crc32c:
                self._read_again(leaf, request.region.box, array)

    def _read_again(self, leaf: ReadableLeaf, box: plan.Box, array: np.ndarray[Any, Any]) -> None:
        slices = tuple(slice(start, stop) for start, stop in box)
        try:
            source = self._store.open_array(leaf.name, leaf.form.document)
            ts.array(array).write(source[slices]).result()
        except Exception as error:
            raise read_error(leaf, error) from error
