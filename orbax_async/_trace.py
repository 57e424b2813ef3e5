"""What an operation has done so far: progress counters, and spans for a timeline.

One `Recorder` belongs to one operation. Workers and the loop add to it; any thread takes
snapshots. It is the one seam for logs, metrics and tests.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

logger = logging.getLogger("orbax_async")

Phase = Literal["planned", "staged", "written", "committed", "failed"]


class Progress(NamedTuple):
    """A snapshot of an operation.

    Attributes:
      phase: the last phase that was reached as a whole.
      leaves_planned: leaves to move; for a load, to read.
      leaves_staged: leaves whose values are captured.
      leaves_written: leaves whose bytes are in storage, or, for a load, read.
      bytes_planned: bytes of all leaves before compression.
      bytes_staged: bytes captured.
      bytes_written: bytes in storage before compression, or, for a load, read.
      blocked_secs: seconds that the call kept its caller waiting.
      elapsed_secs: seconds since the call, up to now or to the end.
    """

    phase: Phase
    leaves_planned: int
    leaves_staged: int
    leaves_written: int
    bytes_planned: int
    bytes_staged: int
    bytes_written: int
    blocked_secs: float
    elapsed_secs: float


_COUNTERS = Progress._fields[1:-2]


class Span(NamedTuple):
    """One piece of work: seconds since the operation was called, and the bytes it moved."""

    name: str
    start_secs: float
    end_secs: float
    nbytes: int = 0


class Recorder:
    """Counts and times one operation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._ended: float | None = None
        self._phase: Phase = "planned"
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._blocked_secs = 0.0
        self._spans: list[Span] = []

    def add(self, **increments: int) -> None:
        """Adds to counters of `Progress`, by name."""
        with self._lock:
            for name, count in increments.items():
                self._counts[name] += count

    def enter(self, phase: Phase) -> None:
        """Notes that a phase was reached as a whole; the last ones stop the clock."""
        self._phase = phase
        if phase in ("committed", "failed"):
            self._ended = time.perf_counter()

    def unblock(self) -> None:
        """Notes that the caller goes on."""
        self._blocked_secs = time.perf_counter() - self._began

    @contextlib.contextmanager
    def span(self, name: str, nbytes: int = 0) -> Iterator[None]:
        """Times a block."""
        start = time.perf_counter() - self._began
        try:
            yield
        finally:
            end = time.perf_counter() - self._began
            with self._lock:
                self._spans.append(Span(name, start, end, nbytes))

    def progress(self) -> Progress:
        """Returns a snapshot of the counters."""
        with self._lock:
            elapsed = (self._ended or time.perf_counter()) - self._began
            return Progress(
                phase=self._phase,
                blocked_secs=self._blocked_secs,
                elapsed_secs=elapsed,
                **self._counts,
            )

    def timeline(self) -> tuple[Span, ...]:
        """Returns the spans that have ended, in the order in which they began."""
        with self._lock:
            return tuple(sorted(self._spans, key=lambda span: span.start_secs))
