"""The floor: the bytes of a state written to files and synced, and read into fresh memory.

No names, no checksums, no compression, no tree: what the disk and the memory allow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trees import host_pieces, same_bytes
from benchmarks.workloads import MIB, HostArray, State

_SLICE = 16 * MIB


def write(path: Path, state: State, threads: int) -> None:
    """Writes one file for each thread, and syncs the files and their names."""
    path.mkdir(parents=True)
    shares = _shares(list(host_pieces(state)), threads)

    def write_file(index: int) -> None:
        with open(path / str(index), "wb", buffering=MIB) as file:
            for piece in shares[index]:
                file.write(piece.data)
            file.flush()
            os.fsync(file.fileno())

    _each(threads, write_file)
    for folder in (path, path.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read(path: Path, abstract: State, threads: int) -> HostArray:
    """Reads everything into one new buffer; `abstract` is not needed."""
    sizes = [(path / str(index)).stat().st_size for index in range(threads)]
    ends = list(accumulate(sizes))
    buffer = np.empty(ends[-1], np.uint8)

    def read_file(index: int) -> None:
        part = buffer[ends[index] - sizes[index] : ends[index]].data
        with open(path / str(index), "rb", buffering=0) as file:
            filled = 0
            while filled < len(part):
                count = file.readinto(part[filled : filled + _SLICE])
                if not count:
                    raise OSError(f"{file.name} ends early")
                filled += count

    _each(threads, read_file)
    return buffer


def same_content(loaded: HostArray, wanted: State) -> bool:
    """Says whether the buffer holds the pieces of a state, one after the other."""

    def cut() -> Iterator[HostArray]:
        at = 0
        for piece in host_pieces(wanted):
            yield loaded[at : at + piece.size]
            at += piece.size

    return same_bytes(cut(), host_pieces(wanted))


def _each(threads: int, work: Callable[[int], Any]) -> None:
    if threads == 1:
        work(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def _shares(pieces: list[HostArray], threads: int) -> list[list[HostArray]]:
    """Cuts the pieces, taken as one stream, into as many parts of about the same size."""
    total = sum(piece.size for piece in pieces)
    bounds = [total * index // threads for index in range(threads + 1)]
    shares: list[list[HostArray]] = [[] for _ in range(threads)]
    at = 0
    for piece in pieces:
        for share, low, high in zip(shares, bounds[:-1], bounds[1:], strict=True):
            part = piece[max(low - at, 0) : max(high - at, 0)]
            if part.size:
                share.append(part)
        at += piece.size
    return shares
