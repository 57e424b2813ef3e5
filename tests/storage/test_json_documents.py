"""Documents are read in bounds, and their damage is told by file."""

from __future__ import annotations

from typing import Any

import pytest
from memory_directory import MemoryStore

from orbax_async import errors
from orbax_async._storage.directory import Directory, damage_in, parse_json, read_json


@pytest.fixture
def directory() -> Directory:
    """One in memory."""
    return MemoryStore().open("/run")


def test_a_document_is_read(directory: Directory) -> None:
    """One that is missing is None; one that isn't a mapping may be asked for."""
    directory.write("document", b'{"a": [1, 2]}')
    directory.write("list", b"[1]")
    assert read_json(directory, "document") == {"a": [1, 2]}
    assert read_json(directory, "list", list) == [1]
    assert read_json(directory, "absent") is None
    assert read_json(directory, "document/absent") is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b"\xff\xfe\xff", "decode"),
        (b'{"a": "\xff"}', "decode"),
        (b"[1]", "it holds a list, not a dict"),
        (b"null", "it holds a NoneType"),
        (b'{"a": ' * 200_000, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "digits"),
    ],
    ids=lambda each: repr(each)[:16],
)
def test_i14_damage_is_an_error_with_the_file(
    directory: Directory, data: bytes, reason: str
) -> None:
    """I14: no document raises anything else, nor ends the process."""
    directory.write("document", data)
    with pytest.raises(errors.InvalidLayoutError, match=f"^/run/document is damaged: .*{reason}"):
        read_json(directory, "document")


def test_i14_a_document_has_a_limit(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """I14: not a byte more is read."""
    monkeypatch.setattr("orbax_async._storage.directory.MAX_NBYTES", 10)
    directory.write("document", b'{"a": 1}  ')
    assert read_json(directory, "document") == {"a": 1}
    directory.write("document", b'{"a": 1}   ')
    with pytest.raises(errors.InvalidLayoutError, match="more than 10 bytes"):
        read_json(directory, "document")
    with pytest.raises(errors.InvalidLayoutError, match="more than 10 bytes"):
        parse_json(bytes(100), "the document")


@pytest.mark.parametrize(
    ("pick", "reason"),
    [
        (lambda document: document["b"], "it lacks 'b'"),
        (lambda document: document["a"]["b"], "another form"),
        (lambda document: document["a"].keys(), "another form"),
        (lambda document: document["a"][7], "another form"),
        (lambda document: int(document["a"][0]), "invalid literal"),
    ],
)
def test_what_is_picked_out_of_a_document_may_be_damaged_too(pick: Any, reason: str) -> None:
    """The error says what to do, and is of the class that is asked for; ours pass."""
    kind = errors.DeletionRecoveryError
    with (
        pytest.raises(kind, match=rf"^/run/record is damaged: .*{reason}.*\. Remove it\.$"),
        damage_in("/run/record", "Remove it.", kind),
    ):
        pick({"a": ["x"]})
    own = errors.StepNotFoundError("as it is")
    with pytest.raises(errors.StepNotFoundError) as caught, damage_in("/run/record"):
        raise own
    assert caught.value is own
