"""A directory: the one seam between the library and where a checkpoint's files are.

Everything above this room names storage by a `Directory`. `LocalDirectory` is one of a file
system; a test brings one that counts, delays, fails or forgets; an object store brings another.

Rules
  - Every method blocks. Code on the engine's loop calls them on a worker.
  - Every failure is an `OSError` that names the path. Rooms above turn it into an error of ours.
  - What a store may lack is a `Capability`, and is asked for by name. Nobody looks at a scheme.
  - Names below a directory are relative and have `/` between their parts, on every system.
"""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, Self

from orbax_async import errors

MAX_NBYTES = 1 << 30
"""The most that a document may have: that of a tree with some two million leaves."""
_USUAL_NBYTES = 1 << 20  # of a document that is read in one go

Kind = Literal["file", "directory", "link"]


class Capability(enum.Enum):
    """What some directories can do and others cannot."""

    RENAME = "rename"
    """Move to another name in one step (`Directory.rename`)."""
    EXCHANGE = "exchange"
    """Exchange two names in one step (`Directory.exchange`)."""
    LINK = "link"
    """Give a file a second name (`Directory.link`)."""
    LOCK = "lock"
    """Be locked by a process, until that ends (`Directory.lock`)."""
    MAP = "map"
    """Be read as files of the local system below `Directory.path`."""


class Entry(NamedTuple):
    """One name directly inside a directory. A link counts as what it leads to."""

    name: str
    is_directory: bool


class Status(NamedTuple):
    """What is known of a file or a directory, or of a link that was not to be followed."""

    kind: Kind
    nbytes: int
    modified_nsecs: int  # by the clock of the store
    identity: Hashable  # tells it from what takes its name later


class Lock(Protocol):
    """A lock that is held; it ends with its process, too."""

    def release(self) -> None:
        """Ends it; once more does nothing."""


class Directory(Protocol):
    """A place that holds files under names. A value: it may be there or not.

    Where a method takes a `name`, the empty one means the directory itself.
    """

    @property
    def path(self) -> str:
        """The absolute path or the URL of the directory, for people and as a key."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    @property
    def parent(self) -> Self:
        """The directory that holds it; the root's is the root itself."""

    def __truediv__(self, name: str) -> Self:
        """Returns the directory of a name below this one."""

    def can(self, capability: Capability) -> bool:
        """Says whether it has a capability."""

    # Looking.

    def status(self, name: str = "", *, follow_links: bool = False) -> Status | None:
        """Returns what is known of a name, or of what a link leads to; None where nothing is."""

    def entries(self) -> list[Entry]:
        """Returns what lies directly inside, by name; nothing where there is no directory."""

    def walk(self) -> tuple[list[str], list[str]]:
        """Returns (files, directories) below it by relative name.

        The deepest directories come first, and the directory itself, as the empty name, last.
        """

    def outward_links(self) -> list[str]:
        """Returns links below it that lead out of it, pipes and devices, by relative name."""

    def read(self, name: str, start: int = 0, nbytes: int | None = None) -> bytes | None:
        """Returns the bytes of a file, or a range of them; None where there is no such file."""

    def is_writable(self) -> bool:
        """Says whether something can be made in it, as far as that can be known without trying."""

    # Changing.

    def make(self, *, mode: int | None = None) -> None:
        """Makes the directory, but not its parents; without a mode its bits are the umask's."""

    def write(self, name: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """Writes a whole file, and makes the directories above it."""

    def touch(self) -> None:
        """Renews the time at which the directory was last changed."""

    def remove(self, name: str = "") -> None:
        """Removes a file, or a directory with all that is in it; what is gone already is fine.

        What can't be removed stays; all else goes, and the first error is raised then.
        """

    def remove_if_empty(self) -> None:
        """Removes the directory, unless there is something in it, or no directory."""

    # Lasting.

    def sync(self, names: Iterable[str]) -> None:
        """Makes files, and the entries of directories, durable, in the order given."""

    def start_writeback(self, name: str) -> None:
        """Has the system begin to write a file to its disk; a hint that promises nothing."""

    def kvstore(self) -> dict[str, Any]:
        """Returns TensorStore's specification of the key-value store that lies here."""

    # Capabilities. Whoever calls one of these has asked `can` before.

    def rename(self, target: Self) -> None:
        """Gives the directory another name, which nothing may have."""

    def replace(self, name: str, target: str) -> None:
        """Gives a file another name, in place of what has it (with `Capability.RENAME`)."""

    def exchange(self, other: Self) -> bool:
        """Exchanges its name with another's in one step; False where that turns out impossible."""

    def link(self, name: str, target: Self, target_name: str) -> None:
        """Gives a file a second name in another directory; copies it where that can't be.

        A file that has that name already is a FileExistsError.
        """

    def lock(self) -> Lock | None:
        """Locks the directory for this process; None while another lock is held, or it is gone."""


def sizes(directory: Directory) -> dict[str, int]:
    """Returns the bytes of each file below a directory, by relative name."""
    found = {name: directory.status(name, follow_links=True) for name in directory.walk()[0]}
    return {name: status.nbytes for name, status in found.items() if status is not None}


# JSON documents: read in bounds, and their damage told by file (invariant I14).


def read_document(directory: Directory, name: str) -> bytes | None:
    """Reads a document; what is larger than any is refused before memory is taken for it."""
    data = directory.read(name, nbytes=_USUAL_NBYTES)
    if data is None or len(data) < _USUAL_NBYTES:
        return data
    status = directory.status(name, follow_links=True)
    if status is not None and status.nbytes > MAX_NBYTES:
        file = (directory / name).path
        raise errors.InvalidLayoutError.of_file(
            f"{file} is damaged: it has more than {MAX_NBYTES} bytes", file
        )
    return directory.read(name)


def read_json(directory: Directory, name: str, kind: type = dict) -> Any:
    """Reads a document; None where there is none."""
    data = read_document(directory, name)
    return None if data is None else parse_json(data, (directory / name).path, kind)


def parse_json(data: bytes, file: str, kind: type = dict) -> Any:
    """Returns what a document says."""
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
