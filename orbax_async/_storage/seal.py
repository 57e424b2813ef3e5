"""The seal of a checkpoint: digests of its files, in the file that says it is whole.

Rules
  I12  What a load reads of a sealed checkpoint is what was saved, and is this checkpoint's.

Theory of operation
  `commit_success.txt` has the line that Orbax writes too, then the seal as one line of JSON, then
  the SHA-256 of both. The seal holds the SHA-256 of each document. Array data has checksums of
  its own, so of its files the seal holds the size and the last bytes: these are a checksum, or
  of a node that has random names in it, and tell the file from that of another checkpoint.

  `_CHECKPOINT_METADATA` is unlike that of any other checkpoint, since it has the time of the save.
  Deleting a checkpointable takes a handler out of it, with Orbax too, and nothing else; that is
  accepted. A line feed at its end says that there is a seal: whoever writes it anew leaves it out.

  Every function blocks.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from orbax_async import _names as names
from orbax_async import errors
from orbax_async._storage.directory import Directory, damage_in, read_document, sizes

_DIGEST_CHARACTERS = 32
_TAIL_NBYTES = 8
_SMALL_NBYTES = 64 << 10  # of a file of data that has a digest too, for `verify`
_WITH_DIGEST = 3  # as long its mark is
_MOST_NBYTES = 1 << 62  # that a file can have
_CHANGED = "it is not what was saved"
_OF_ANOTHER = "it is of another save than the digests"
_WHOLE_NBYTES = 16 << 20  # of a file of a user's handler; of a larger one size and end are noted
_TREE_DOCUMENTS = {names.TREE_METADATA, names.SHARDINGS, names.STRINGS, names.OCDBT_MANIFEST}
_ARRAY_DOCUMENTS = {"zarr.json", ".zarray", ".zattrs", ".zgroup"}
_UNSEALED = {names.CHECKPOINT_MARKER, names.COMMIT_MARKER, names.DELETION_RECORD}
_COPY_AGAIN = "Copy it again from where the checkpoint came from."

Mark = str | list[Any]
"""The digest of a document; of a file of data its size and end, and of a small one its digest."""


def unsealed(root: Mapping[str, Any], proof: str) -> dict[str, bytes]:
    """Returns the documents of a part: what finalizes it keeps the proof, and merges the rest."""
    return {
        names.CHECKPOINT_METADATA: json.dumps(root).encode(),
        names.COMMIT_MARKER: proof.encode(),
    }


def documents(
    directory: Directory, files: Iterable[str], root: Mapping[str, Any], proof: str
) -> dict[str, bytes]:
    """Returns the checkpoint's own documents, the last of which has the seal.

    Args:
      directory: where everything else is written.
      files: all files in it, by relative name.
      root: what `_CHECKPOINT_METADATA` says.
      proof: the first line of the last document.
    """
    encoded = json.dumps(root).encode() + b"\n"
    files = set(files) - _UNSEALED
    marks: dict[str, Mark] = {names.CHECKPOINT_METADATA: _digest(encoded)}
    for name in sorted(files):
        mark = _mark(directory, name, is_data=_is_data(name, files))
        if mark is not None:
            marks[name] = mark
    sealed = {
        "handlers": root["item_handlers"],
        "rest": _digest_of_rest(json.loads(encoded)),
        "files": marks,
    }
    text = f"{proof}\n{json.dumps(sealed, separators=(',', ':'))}\n".encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    return {names.CHECKPOINT_METADATA: encoded, names.COMMIT_MARKER: text + digest + b"\n"}


class Seal:
    """What the seal of a checkpoint says of its files.

    Args:
      root: the checkpoint.
      prefix: what comes before the names that `read` is asked for: "state/".
      marks: what is known of each file, by relative name; nothing where there is no seal.
      problem: what is wrong with `_CHECKPOINT_METADATA`.
    """

    def __init__(
        self, root: Directory, prefix: str, marks: Mapping[str, Mark], problem: str | None = None
    ) -> None:
        self._is_of_another = problem == _OF_ANOTHER
        self._root = root
        self._prefix = prefix
        self._marks = marks
        self._names = sorted(marks)
        self._problem = problem
        self.is_there = self.covers(prefix)

    def read(self, name: str) -> bytes | None:
        """Reads a document; None where there is none, or one that the checkpoint did not have.

        Raises:
          InvalidLayoutError: it is another than was saved.
          OSError: it can't be read.
        """
        if self.is_added(name):
            return None
        data = read_document(self._root, self._prefix + name)
        self.check(name, data)
        return data

    def names_below(self, name: str) -> list[str]:
        """Returns the files of the checkpoint in a directory, by relative name."""
        below = self._below(f"{self._prefix}{name}/")
        return [each.removeprefix(self._prefix) for each in below]

    def is_added(self, name: str) -> bool:
        """Says whether a file was not saved with the checkpoint."""
        return self.is_there and self._prefix + name not in self._marks

    def check(self, name: str, data: bytes | None) -> None:
        """Raises if a document is another than was saved.

        Raises:
          InvalidLayoutError: it is.
        """
        mark = self._marks.get(self._prefix + name)
        problem = None if mark is None else _problem_of(mark, data)
        if problem is not None:
            raise self._error(self._prefix + name, problem)

    def check_root(self) -> None:
        """Raises if `_CHECKPOINT_METADATA` is not what was saved.

        Raises:
          InvalidLayoutError: it is not.
        """
        if self._problem is not None:
            raise self._error(names.CHECKPOINT_METADATA, self._problem)

    def check_data(self, name: str = "", *, is_one_value: bool = False) -> None:
        """Raises if a file of arrays is another checkpoint's; damage is what their checksums find.

        Args:
          name: the directory whose files are looked at.
          is_one_value: whether each file is one value, which another may be that is shorter. In a
            shorter file of several values each is where nobody looks for it.

        Raises:
          InvalidLayoutError: one is.
        """
        for each in self._below(f"{self._prefix}{name}/" if name else self._prefix):
            mark = self._marks[each]
            if isinstance(mark, list):
                nbytes, tail = mark[:2]
                found = self._root.read(each, max(0, nbytes - _TAIL_NBYTES), _TAIL_NBYTES + 1)
                is_cut = found == b"" and not is_one_value
                if found is not None and not is_cut and _differs_much(found, bytes.fromhex(tail)):
                    raise self._error(each, "it is not of this checkpoint")

    def check_all(self) -> None:
        """Raises if any file of a checkpointable is another than was saved.

        Raises:
          InvalidLayoutError: one is.
        """
        for name, problem, _ in self.problems():
            raise self._error(name, problem)

    def problems(self) -> Iterator[tuple[str, str, bool]]:
        """Yields each file that is another than was saved, what is wrong, and if it holds data."""
        if not self._prefix:
            if self._problem is not None:
                yield names.CHECKPOINT_METADATA, self._problem, False
                if self._is_of_another:
                    yield names.COMMIT_MARKER, "it is of another save than the metadata", False
            if self._marks and _nbytes_of(self._root, names.CHECKPOINT_MARKER) is None:
                yield names.CHECKPOINT_MARKER, "it is missing", False
        for name in self._below(self._prefix):
            if name != names.CHECKPOINT_METADATA:
                problem = self._problem_with(name)
                if problem is not None:
                    is_data = isinstance(self._marks[name], list)
                    yield name, problem, is_data or _is_of_array(name)

    def _problem_with(self, name: str) -> str | None:
        mark = self._marks[name]
        try:
            nbytes = _nbytes_of(self._root, name)
            if isinstance(mark, str) or nbytes is None:
                return _problem_of(mark, read_document(self._root, name))
            if nbytes != mark[0]:
                return f"it has {nbytes} bytes, {mark[0]} were saved"
            if len(mark) == _WITH_DIGEST and nbytes <= _SMALL_NBYTES:
                return _problem_of(mark[-1], self._root.read(name))
            tail = self._root.read(name, max(0, nbytes - _TAIL_NBYTES), _TAIL_NBYTES)
            return None if tail == bytes.fromhex(mark[1]) else _CHANGED
        except OSError as error:
            return f"it can't be read: {error.strerror or error}"

    def _below(self, beginning: str) -> Iterator[str]:
        for index in range(bisect.bisect_left(self._names, beginning), len(self._names)):
            if not self._names[index].startswith(beginning):
                return
            yield self._names[index]

    def _error(self, name: str, problem: str) -> errors.InvalidLayoutError:
        file = (self._root / name).path
        message = f"{file} is damaged: {problem}. {_COPY_AGAIN}"
        return errors.InvalidLayoutError.of_file(message, file)

    def covers(self, beginning: str) -> bool:
        """Says whether it knows of files whose names begin so."""
        return next(self._below(beginning), None) is not None

    def added(self) -> list[str]:
        """Returns the files that lie there and were not saved."""
        if not self._marks:
            return []
        found = set(sizes(self._root)) - _UNSEALED
        return sorted(found - self._marks.keys())


def _nbytes_of(directory: Directory, name: str) -> int | None:
    """Returns the bytes of one file; None where there is none."""
    status = directory.status(name, follow_links=True)
    return None if status is None else status.nbytes


def of_tree(directory: Directory) -> Seal:
    """Reads what the seal of a checkpoint says of one of its checkpointables.

    Args:
      directory: where the checkpointable lies.

    Raises:
      InvalidLayoutError: the seal is damaged.
      OSError: it can't be read.
    """
    return of_checkpoint(directory.parent, f"{directory.name}/")


def of_checkpoint(root: Directory, prefix: str = "") -> Seal:
    """Reads the seal of a checkpoint, and what it says of `_CHECKPOINT_METADATA`.

    Args:
      root: the checkpoint.
      prefix: the checkpointable that is asked about, and a slash.

    Raises:
      InvalidLayoutError: the seal is damaged.
      OSError: it can't be read.
    """
    proof = read_document(root, names.COMMIT_MARKER)
    if proof is None:
        return Seal(root, prefix, {})
    is_sealed = b"\n" in proof
    if not _proves_itself(proof) and root.read(names.CHECKPOINT_MARKER, nbytes=1):
        return Seal(root, prefix, {})  # a power cut has torn it, and all else was durable before
    document = read_document(root, names.CHECKPOINT_METADATA)
    file = (root / names.COMMIT_MARKER).path
    with damage_in(file, f"{_COPY_AGAIN} Without that file the rest can be loaded, unproven."):
        lines = proof.split(b"\n")
        if not is_sealed:
            if document is not None and document.endswith(b"\n"):
                raise ValueError("it has lost the digests of the other files")
            return Seal(root, prefix, {})
        if not _proves_itself(proof):
            raise ValueError("it does not match its own digest")
        sealed = json.loads(lines[1])
        marks = _checked(sealed["files"])
        problem = _problem_of(marks[names.CHECKPOINT_METADATA], document)
        handlers = None if problem is None else _handlers_left(document, sealed)
        if problem == _CHANGED and handlers is None and _is_of_another(document, sealed):
            problem = _OF_ANOTHER
            if document is not None and not document.endswith(b"\n"):
                return Seal(root, prefix, {})  # Orbax has added parts to it, and merged all
        if handlers is None:
            return Seal(root, prefix, marks, problem)
        gone = tuple(f"{name}/" for name in sealed["handlers"] if name not in handlers)
        left = {name: mark for name, mark in marks.items() if not name.startswith(gone)}
        return Seal(root, prefix, left)


def _proves_itself(proof: bytes) -> bool:
    """Says whether the last of three lines is the digest of the others."""
    lines = proof.split(b"\n")
    digest = hashlib.sha256(b"\n".join(lines[:2]) + b"\n").hexdigest().encode()
    return len(lines) == 4 and lines[2:] == [digest, b""]


def is_missing(root: Directory) -> bool:
    """Says whether a checkpoint had a seal, and has lost the file that held it."""
    if root.status(names.COMMIT_MARKER) is not None:
        return False
    return (read_document(root, names.CHECKPOINT_METADATA) or b"").endswith(b"\n")


def _is_data(name: str, files: set[str]) -> bool:
    """Says whether a file holds arrays, which have checksums of their own."""
    top, _, inside = name.partition("/")
    if f"{top}/{names.TREE_METADATA}" not in files:
        return False
    is_document = inside in _TREE_DOCUMENTS or inside.startswith(f"{names.ARRAY_METADATAS}/")
    return not is_document and not _is_of_array(name)


def _is_of_array(name: str) -> bool:
    return name.rpartition("/")[2] in _ARRAY_DOCUMENTS


def _mark(directory: Directory, name: str, *, is_data: bool) -> Mark | None:
    nbytes = _nbytes_of(directory, name)
    if nbytes is None:
        return None
    if not is_data and nbytes <= _WHOLE_NBYTES:
        data = directory.read(name)
        return None if data is None else _digest(data)
    is_small = nbytes <= _SMALL_NBYTES
    start = 0 if is_small else max(0, nbytes - _TAIL_NBYTES)
    data = directory.read(name, start, nbytes - start)
    if data is None:
        return None
    mark = [nbytes, data[-_TAIL_NBYTES:].hex()]
    return [*mark, _digest(data)] if is_small else mark


def _checked(marks: dict[str, Any]) -> dict[str, Mark]:
    """Returns marks that are what marks can be, of names inside of the checkpoint."""
    for name, mark in marks.items():
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"{name!r} names no file in it")
        if not isinstance(mark, str):
            nbytes, tail, *_ = mark
            bytes.fromhex(tail)
            if not (isinstance(nbytes, int) and 0 <= nbytes < _MOST_NBYTES):
                raise ValueError(f"{nbytes!r} is no size of a file")
    return marks


def _problem_of(mark: Mark, data: bytes | None) -> str | None:
    if data is None:
        return "it is missing"
    return None if _digest(data) == mark else _CHANGED


def _differs_much(found: bytes, expected: bytes) -> bool:
    """Says whether bytes differ as those of two files do, not as those of one that is damaged."""
    if len(found) != len(expected):
        return True
    return sum(a != b for a, b in zip(found, expected, strict=True)) > 1


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARACTERS]


def _digest_of_rest(root: Mapping[str, Any]) -> str:
    keys = ("init_timestamp_nsecs", "commit_timestamp_nsecs", "custom_metadata")
    return _digest(json.dumps([root.get(key) for key in keys], sort_keys=True).encode())


def _is_of_another(document: bytes | None, sealed: Mapping[str, Any]) -> bool:
    try:
        return bool(_digest_of_rest(json.loads(document or b"")) != sealed["rest"])
    except (ValueError, AttributeError, RecursionError):
        return False


def _handlers_left(document: bytes | None, sealed: Mapping[str, Any]) -> dict[str, str] | None:
    """Returns the handlers of a checkpoint of which some were deleted; None if that is not it."""
    try:
        root = json.loads(document or b"")
        handlers, saved = root["item_handlers"].items(), sealed["handlers"].items()
        is_edited = handlers < saved and _digest_of_rest(root) == sealed["rest"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return dict(handlers) if is_edited else None
