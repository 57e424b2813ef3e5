"""Ways to alter a saved checkpoint of the base state, and the check that it still loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
from equality import abstract_of, assert_same
from orbax.checkpoint import v1
from trees import base_state

import orbax_async as ocp

Change = Callable[[Path], Any]
WRITERS = ("ours", "orbax")


def assert_reads(path: Path, *, also_orbax: bool = True) -> None:
    """Fails unless the base state loads, with and without an abstract tree."""
    state = base_state()
    assert_same(ocp.load(path), state)
    assert_same(ocp.load(path, abstract_of(state)), state)
    if also_orbax:
        assert_same(v1.load(path), state)


def without(*names: str) -> Change:
    """Removes files or directories of a checkpoint."""

    def change(path: Path) -> None:
        for name in names:
            target = path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def writing(name: str, text: str) -> Change:
    """Gives a file other content, and makes it if it isn't there."""

    def change(path: Path) -> None:
        (path / name).parent.mkdir(exist_ok=True, parents=True)
        (path / name).write_text(text)

    return change


def editing(name: str, edit: Callable[[Any], Any]) -> Change:
    """Edits a JSON document."""
    return lambda path: disk.edit(path / name, edit)


def adding(name: str, **entries: Any) -> Change:
    """Adds entries at the top of a JSON document."""
    return editing(name, lambda content: content | entries)


def dropping(name: str, entry: str) -> Change:
    """Removes an entry at the top of a JSON document."""
    return editing(name, lambda content: {k: v for k, v in content.items() if k != entry})
