"""docs/parity.md against the Orbax that is installed: every name, signature, default and member.

What the page says and what the two libraries are must agree line by line: a name that the page does
not have, a difference that it does not tell, and a line that no longer holds, each fails.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from orbax.checkpoint import v1
from surfaces import differences, find, public_names

import orbax_async as ocp

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
STATUSES = {"same", "extended", "differs", "absent", "added"}


@dataclass(frozen=True)
class Row:
    """What the page says of one name."""

    status: str
    differences: list[str]
    remark: str


def rows_of(text: str) -> dict[str, Row]:
    """Reads the tables of names, by full name.

    Raises:
        ValueError: a name is there twice, or a row is not one of these tables.
    """
    rows: dict[str, Row] = {}
    prefix = ""
    for line in text.partition("\n## Names\n")[2].partition("\n## ")[0].splitlines():
        if line.startswith("### "):
            module = re.fullmatch(r"### `([\w.]+)`", line)
            prefix = f"{module[1]}." if module else ""
        if not line.startswith("| `"):
            continue
        names, status, signature, remark = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            if prefix + name in rows:
                raise ValueError(f"{prefix}{name} is there twice")
            rows[prefix + name] = Row(status, sorted(re.findall(r"`([^`]+)`", signature)), remark)
    return rows


THEIRS = dict(public_names(v1))
OURS = dict(public_names(ocp))
ROWS = rows_of(PAGE.read_text(encoding="utf-8"))


def found_differences() -> dict[str, list[str]]:
    """How what we have differs from what Orbax has, by name, of classes' members too."""
    found: dict[str, list[str]] = {}
    for name, theirs in THEIRS.items():
        if (ours := find(ocp, name)) is not None:
            found |= differences(name, theirs, ours)
    return found


FOUND = found_differences()


def test_both_surfaces_are_walked() -> None:
    """The walk reaches functions, nested modules and classes of either library."""
    assert {"save", "options.MemoryOptions", "path.step.NameFormat", "tree.merge"} <= OURS.keys()
    assert OURS.keys() & THEIRS.keys() >= {"training.save_decision_policies.AnySavePolicy"}
    assert "training.preservation_policies.BestN" in THEIRS
    assert "training.errors.StepNotFoundError" in THEIRS
    assert len(THEIRS) > 100
    assert not [name for name in THEIRS if "_lib" in name or "typing" in name]


def test_the_page_names_the_version_it_was_checked_against() -> None:
    """It is the one that is installed, and departures are told of the same."""
    version = importlib.metadata.version("orbax-checkpoint")
    for page in (PAGE, PAGE.with_name("departures.md")):
        assert re.findall(r"\b0\.\d+\.\d+\b", page.read_text(encoding="utf-8"))[0] == version


def test_every_name_of_orbax_is_on_the_page() -> None:
    """And nothing else, but what is added and members that differ."""
    missing = THEIRS.keys() - ROWS.keys()
    assert not missing, f"docs/parity.md does not have {sorted(missing)}"
    added = {name for name, row in ROWS.items() if row.status == "added"}
    members = {name for name in ROWS if name.rpartition(".")[0] in ROWS}
    stale = ROWS.keys() - THEIRS.keys() - added - members
    assert not stale, f"Orbax has no {sorted(stale)}"


def test_every_name_of_ours_is_on_the_page() -> None:
    """What is added is there, Orbax has none of it, and the page has all of it."""
    added = {name for name, row in ROWS.items() if row.status == "added"}
    assert added == OURS.keys() - THEIRS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_the_page_says_what_is_so(name: str) -> None:
    """`same` has no difference, `absent` no name, and the differences are those that there are."""
    row = ROWS[name]
    assert row.status in STATUSES
    is_here = find(ocp, name) is not None
    assert is_here is (row.status != "absent")
    assert row.differences == FOUND.get(name, [])
    additions = [each for each in row.differences if _adds(name, each)]
    match row.status:
        case "same":
            assert not row.differences
        case "extended":
            assert additions == row.differences
        case "differs":
            assert additions != row.differences
        case "absent":
            assert row.remark, "an absent name needs a reason"
    if row.status == "differs" or (name not in THEIRS and row.status != "added"):
        assert row.differences, "the line is not needed any more"
    if row.status == "extended":
        assert row.differences or row.remark


def _adds(name: str, difference: str) -> bool:
    """Says whether a difference leaves a program for Orbax as it is."""
    return difference.startswith("+") or difference in COMPATIBLE.get(name, ())


# Differences that are no additions by their form, and yet take all that Orbax takes.
COMPATIBLE = {
    "load_async": ["checkpointable_name='AUTO'"],
    "handlers.register_handler": ["cls=None"],
    "multihost.sync_global_processes": ["operation_id=None"],
    "options.ArrayOptions.Saving": ["array_metadata_store=ArrayMetadataStore()"],
    "options.CheckpointablesOptions": ["registry=ReadOnlyHandlerRegistry()"],
    "path.PathLike": ["a value of its own"],
}


def test_every_difference_is_on_the_page() -> None:
    """Those of members, too: a method whose signature differs has a line of its own."""
    unexplained = {name: each for name, each in FOUND.items() if name not in ROWS}
    assert not unexplained
    for name, compatible in COMPATIBLE.items():
        assert set(compatible) <= set(FOUND[name]), name


def test_nothing_here_is_a_module_that_orbax_has_as_a_name() -> None:
    """The modules of Orbax are modules here, but for those all of whose names are absent."""
    modules = {name.rpartition(".")[0] for name in THEIRS} - {""}
    for module in modules:
        names = [name for name in THEIRS if name.rpartition(".")[0] == module]
        is_absent = all(ROWS[name].status == "absent" for name in names)
        assert (find(ocp, module) is None) is is_absent, module
