"""Asking stock Orbax for what it may refuse."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1


def load_or_refusal(path: Path, abstract: Any = None) -> tuple[Any, str]:
    """Returns what Orbax loads and "", or None and its message when it raises.

    A load that fails leaves coroutines behind that were never awaited; they are collected here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return v1.load(path, abstract), ""
        except Exception as error:
            message = repr(error) or type(error).__name__
        gc.collect()
    return None, message


def refusal(path: Path, abstract: Any = None) -> str:
    """Returns the message with which Orbax refuses a checkpoint; empty if it loads."""
    return load_or_refusal(path, abstract)[1]
