"""Reading a tree's arrays to see whether they can be read, and keeping nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from orbax_async import errors
from orbax_async._engine.load_pipeline import LoadPipeline, Placed, read_error
from orbax_async._engine.plan import ReadRequest

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

    def _read_and_place(self, batch: list[ReadRequest], nbytes: int) -> Placed:
        with self._recorder.span("verify", nbytes):
            try:
                self._check(batch)
            except errors.LeafError:  # of one of them; the others have not all been read
                for request in batch:
                    try:
                        self._check([request])
                    except errors.LeafError as error:
                        self.damaged.setdefault(request.leaf, error)
        return Placed([], [])

    def _check(self, batch: Sequence[ReadRequest]) -> None:
        arrays = self._read(list(batch))
        # What was read by its blocks has one more checksum, which only TensorStore computes.
        for request, array in zip(batch, arrays, strict=True):
            form = self._forms[request.leaf]
            if form.whole is None and form.raw is not None and form.raw.has_crc32c:
                self._read_again(request, array)

    def _read_again(self, request: ReadRequest, array: np.ndarray[Any, Any]) -> None:
        entry, box = self._entries[request.leaf], request.region.box
        slices = tuple(slice(start, stop) for start, stop in box)
        try:
            source = self._store.open_array(entry.name, self._forms[request.leaf].document)
            ts.array(array).write(source[slices]).result()
        except Exception as error:
            raise read_error(entry, error) from error
