"""Telling a user's callback how far each leaf of a save is."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

__all__ = ["Reporter", "Stage"]

Stage = Literal["transfer", "write"]


class Reporter:
    """Counts the pieces of leaves, and calls back for the first that starts and the last that ends.

    Args:
      callbacks: what to call with a leaf's key path, by "on_transfer_start" and the like.
      keypaths: of the leaves to tell of.
      pieces: how many of each leaf there are.
    """

    def __init__(
        self,
        callbacks: Mapping[str, Callable[[Any], None]],
        keypaths: Mapping[int, Any],
        pieces: Mapping[int, int],
    ) -> None:
        self._callbacks = callbacks
        self._keypaths = keypaths
        self._pieces = pieces
        self._lock = threading.Lock()
        self._started: dict[Stage, Counter[int]] = {"transfer": Counter(), "write": Counter()}
        self._ended: dict[Stage, Counter[int]] = {"transfer": Counter(), "write": Counter()}

    def start(self, stage: Stage, leaves: Iterable[int]) -> None:
        """Notes that a piece of each of these leaves, with repetitions, is begun."""
        self._note(self._started[stage], leaves, lambda _: 1, f"on_{stage}_start")

    def end(self, stage: Stage, leaves: Iterable[int]) -> None:
        """Notes that a piece of each of these leaves, with repetitions, is done."""
        self._note(self._ended[stage], leaves, self._pieces.__getitem__, f"on_{stage}_end")

    def _note(
        self,
        counts: Counter[int],
        leaves: Iterable[int],
        awaited: Callable[[int], int],
        callback: str,
    ) -> None:
        for leaf in leaves:
            if leaf not in self._keypaths:
                continue
            with self._lock:
                counts[leaf] += 1
                is_due = counts[leaf] == awaited(leaf)
            if is_due:
                self._callbacks[callback](self._keypaths[leaf])
