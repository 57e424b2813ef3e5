"""The interpreter lock (GIL): how a worker leaves it to others, and how it keeps it.

Theory of operation
  A thread that wants the lock asks for it after 5 ms of waiting (`sys.getswitchinterval`), and
  waits anew if some call has let go of it and was quicker to take it back. A training step wants
  the lock once or twice, an event loop each time it wakes: beside a worker that computes, each
  would wait for long. So a loop over many items lets go of it every millisecond (`sliced`).

  A program that computes in Python never lets go by itself. Beside it each call of a worker that
  lets go of the lock takes 5 ms to get it back. To view a jax array is such a call; to ask for its
  address and to copy its bytes is not. So small arrays are copied (`bytes_of`).
"""

from __future__ import annotations

import ctypes
import operator
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

if sys.platform == "linux":
    import resource

T = TypeVar("T")

_SLICE_SECS, _PAUSE_SECS = 1e-3, 1e-5
_never = threading.Event()

_address_of = operator.methodcaller("unsafe_buffer_pointer")
_bytes_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


def sliced(items: Iterable[T]) -> Iterator[T]:
    """Yields the items of a loop on a worker, which lets go of the lock every millisecond.

    A worker that had to wait for something has let go of it already, and does not pause: beside a
    program in Python a pause takes the worker 5 ms, and the program a change of threads.
    """
    until, waits = time.perf_counter() + _SLICE_SECS, _waits()
    for item in items:
        if time.perf_counter() >= until:
            if _waits() == waits:
                # Not 0: whoever waits for the lock has to wake up first.
                _never.wait(_PAUSE_SECS)
            until, waits = time.perf_counter() + _SLICE_SECS, _waits()
        yield item


def _waits() -> int:
    """Returns how often this thread has waited for anything, if the system counts that."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw if sys.platform == "linux" else 0


def bytes_of(arrays: Iterable[Any], nbytes: Iterable[int]) -> Iterator[bytes]:
    """Copies the bytes of jax arrays in the memory of a CPU device.

    These are loops in C: no other Python code runs between an address and the copy of what is
    there.
    """
    return map(_bytes_at, map(_address_of, arrays), nbytes)
