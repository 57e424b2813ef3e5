"""JSON documents: read in bounds, and their damage told by file (invariant I14)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from orbax_async import errors
from orbax_async._storage.directory import Directory

__all__ = ["MAX_NBYTES", "damage_in", "parse_json", "read_json"]

MAX_NBYTES = 1 << 30
"""The most that a document may have: that of a tree with some two million leaves."""


def read_json(directory: Directory, name: str, kind: type = dict) -> Any:
    """Reads a document; None where there is none.

    Args:
      directory: where it lies.
      name: its name there.
      kind: the type that it must have at the top.

    Raises:
      InvalidLayoutError: it is damaged.
    """
    data = directory.read(name, nbytes=MAX_NBYTES + 1)
    return None if data is None else parse_json(data, (directory / name).path, kind)


def parse_json(data: bytes, file: str, kind: type = dict) -> Any:
    """Returns what a document says.

    Args:
      data: the document.
      file: where it was read, for the error.
      kind: the type that it must have at the top.

    Raises:
      InvalidLayoutError: it is damaged, or larger or deeper than any that is not.
    """
    with damage_in(file):
        if len(data) > MAX_NBYTES:
            raise ValueError(f"it has more than {MAX_NBYTES} bytes")
        document = json.loads(data)
        if not isinstance(document, kind):
            raise ValueError(f"it holds a {type(document).__name__}, not a {kind.__name__}")
    return document


@contextlib.contextmanager
def damage_in(
    file: str, advice: str = "", kind: type[errors.InvalidLayoutError] = errors.InvalidLayoutError
) -> Iterator[None]:
    """Turns what a document of another form than it should have raises into an error of ours.

    Whoever parses a document, or picks values out of one, does it inside the block.

    Args:
      file: the document.
      advice: sentences at the end of the message.
      kind: the class of the error.
    """
    try:
        yield
    except errors.CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        message = f"{file} is damaged: {_reason(error)}"
        raise kind.of_file(f"{message}. {advice}" if advice else message, file) from error


def _reason(error: Exception) -> str:
    match error:
        case RecursionError():  # of the parser, or of what walks through the document
            return "it is nested too deeply"
        case KeyError():
            return f"it lacks {error}"
        case ValueError():
            return str(error)
        case _:
            return f"it has another form than it should ({error})"
