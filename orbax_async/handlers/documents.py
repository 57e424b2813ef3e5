"""Checkpointables that are one document: JSON values and protobuf messages."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from orbax_async import _operation as operation
from orbax_async import errors
from orbax_async._engine import loop
from orbax_async._layouts.layout import reading
from orbax_async._storage.directory import damage_in, parse_json, read_document
from orbax_async._storage.local import open_directory
from orbax_async.path import Path, PathAwaitingCreation

__all__ = ["JsonHandler", "MetricsHandler", "ProtoHandler"]

_JSON_FILE = "data.json"
_OLDER_JSON_FILE = "metadata"  # what older Orbax versions called it
_METRICS_FILE = "metrics"
_PROTO_FILE = "proto.pbtxt"


class Encoded(bytes):
    """A document as it will be written: what the first phase starts from."""


class _DocumentHandler:
    """Saves an object as one file, of the bytes that `encode` makes of it."""

    def __init__(self, filename: str) -> None:
        self._filename = filename

    def encode(self, checkpointable: Any) -> Encoded:
        """Captures an object; `save` accepts the result."""
        raise NotImplementedError

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """Captures an object (phase 1) and returns what writes it (phase 2)."""
        is_encoded = isinstance(checkpointable, Encoded)
        return self._write(directory, checkpointable if is_encoded else self.encode(checkpointable))

    async def _write(self, directory: PathAwaitingCreation, encoded: Encoded) -> None:
        where = open_directory(await directory.await_creation())
        if not operation.current().processes.is_primary:
            return
        with errors.reported_as(errors.CommitError, f"cannot write {self._filename}"):
            await loop.to_worker(where.write, self._filename, encoded)

    async def metadata(self, directory: Path) -> None:
        """Returns None, the abstract form of any document: it does not say what it holds."""


def _read(directory: Path, names: Sequence[str], parse: Callable[[bytes, str], Any]) -> Any:
    """Returns what the first of some files that is there holds."""
    where = open_directory(directory)
    for name in names:
        path = (where / name).path
        with reading(path):
            data = read_document(where, name)
        if data is not None:
            return parse(data, path)
    path = (where / names[0]).path
    raise errors.InvalidLayoutError.of_file(f"{path} is missing", path)


class JsonHandler(_DocumentHandler):
    """Saves and loads JSON values: dicts, lists, strings, numbers, booleans and None.

    A value comes back as JSON has it: tuples as lists, keys as strings.

    Example:
      ::

        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
        context.checkpointables.registry = registry

    Args:
      filename: the file to write; `data.json` unless given. Loading also finds the file of older
        Orbax versions, unless it is given.
    """

    def __init__(self, filename: str | None = None) -> None:
        super().__init__(filename or _JSON_FILE)
        self._names = [filename] if filename else [_JSON_FILE, _OLDER_JSON_FILE]

    def encode(self, checkpointable: Any) -> Encoded:
        """Captures a value; `save` accepts the result.

        Raises:
          NotJsonError: JSON can't hold the value; the message says where.
        """
        try:
            return Encoded(json.dumps(checkpointable).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise errors.NotJsonError(_explain(checkpointable, error)) from None

    async def load(self, directory: Path, abstract_checkpointable: None = None) -> Awaitable[Any]:
        """Returns what reads the value.

        Raises:
          AbstractLeafError: something is asked for: a document is loaded as it is.
          InvalidLayoutError: (in phase 2) the file is missing or damaged.
        """
        if abstract_checkpointable is not None:
            raise errors.AbstractLeafError(
                "", f"JSON is loaded as it is: ask for None, not for {abstract_checkpointable!r}"
            )
        parse = functools.partial(parse_json, kind=object)
        return loop.to_worker(_read, directory, self._names, parse)

    def is_handleable(self, checkpointable: Any) -> bool:
        """Says whether JSON can hold a value."""
        try:
            self.encode(checkpointable)
        except errors.NotJsonError:
            return False
        return True

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Returns None: what a value is loaded as does not tell that it is JSON."""


class MetricsHandler(JsonHandler):
    """Saves and loads the metrics of a step, JSON in a file of their own."""

    def __init__(self) -> None:
        super().__init__(_METRICS_FILE)


def _explain(value: Any, error: Exception, where: str = "") -> str:
    """Returns what JSON can't hold in a value, and where it is."""
    inner: Mapping[Any, Any] = {}
    if isinstance(value, dict):
        inner = value
    elif isinstance(value, (list, tuple)):
        inner = dict(enumerate(value))
    if not isinstance(error, (RecursionError, ValueError)):  # a value that contains itself
        for key, each in inner.items():
            try:
                json.dumps(each)
            except (TypeError, ValueError, RecursionError) as found:
                return _explain(each, found, f"{where}[{key!r}]")
    return f"not a JSON value{f' at {where}' if where else ''}: {error}"


class ProtoHandler(_DocumentHandler):
    """Saves and loads protobuf messages, as text.

    protobuf itself is imported when a message is at hand.

    Example:
      ::

        ocp.save_checkpointables("/checkpoints/7", {"config": Config(depth=4)})
        ocp.load_checkpointables("/checkpoints/7", {"config": Config})["config"].depth

    Args:
      filename: the file to write and read.
    """

    def __init__(self, filename: str = _PROTO_FILE) -> None:
        super().__init__(filename)

    def encode(self, checkpointable: Any) -> Encoded:
        """Captures a message; `save` accepts the result.

        Raises:
          UnsupportedLeafError: it is no protobuf message.
        """
        if not self.is_handleable(checkpointable):
            raise errors.UnsupportedLeafError(
                "", f"no protobuf message, but {type(checkpointable).__name__}"
            )
        return Encoded(_text_format().MessageToString(checkpointable).encode())

    async def load(
        self, directory: Path, abstract_checkpointable: type[Any] | None = None
    ) -> Awaitable[Any]:
        """Returns what reads a message of the class that is asked for.

        Raises:
          MissingAbstractError: no class is given.
          AbstractLeafError: what is given is no class of messages.
          InvalidLayoutError: (in phase 2) the file is missing, or holds no such message.
        """
        if abstract_checkpointable is None:
            raise errors.MissingAbstractError(
                "a protobuf message is loaded as its class: give that as the abstract form"
            )
        if not self.is_abstract_handleable(abstract_checkpointable):
            raise errors.AbstractLeafError(
                "", f"no class of protobuf messages, but {abstract_checkpointable!r}"
            )
        parse = functools.partial(_parse, message=abstract_checkpointable)
        return loop.to_worker(_read, directory, [self._filename], parse)

    def is_handleable(self, checkpointable: Any) -> bool:
        """Says whether an object is a protobuf message."""
        message = _message_class()
        return message is not None and isinstance(checkpointable, message)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Says whether an abstract object is a class of protobuf messages."""
        message = _message_class()
        is_class = message is not None and isinstance(abstract_checkpointable, type)
        return is_class and issubclass(abstract_checkpointable, message)


def _message_class() -> Any:
    """Returns the class of all messages, None where nobody has imported protobuf."""
    module = sys.modules.get("google.protobuf.message")
    return getattr(module, "Message", None)


def _text_format() -> Any:
    return importlib.import_module("google.protobuf.text_format")


def _parse(data: bytes, path: str, message: type[Any]) -> Any:
    text_format = _text_format()
    with damage_in(path):
        try:
            return text_format.Parse(data.decode(), message())
        except text_format.ParseError as error:
            raise ValueError(f"it is no {message.__name__}: {error}") from error
