"""One tree of several that have no leaf in common: their keys, and the documents about them.

Pure, on entries and on parsed JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orbax_async._trace import logger
from orbax_async.tree import rich
from orbax_async.tree.schema import Entry

__all__ = ["Taken", "merge_array_metadatas", "merge_json", "merge_trees"]

_Names = tuple[str, ...]


def _names(entry: Entry) -> _Names:
    return tuple([key.name for key in entry.keys])


class Taken:
    """The keys that trees have taken; another may only add to them."""

    def __init__(self) -> None:
        self._entries: dict[_Names, Entry] = {}
        self._above: set[_Names] = set()
        self._stored: dict[str, Entry] = {}

    def add(self, entries: Iterable[Entry]) -> None:
        """Takes the keys of one more tree."""
        for entry in entries:
            keys = _names(entry)
            if entry.is_empty and keys in self._above:
                continue
            self._entries.setdefault(keys, entry)
            self._above.update(keys[:count] for count in range(len(keys)))
            if not entry.is_empty:
                self._stored.setdefault(entry.name, entry)

    def replaced_by(self, entry: Entry) -> Entry | None:
        """Returns what an entry would take the place of, or None if it can be added.

        An empty node that is there already, or with something in it, adds nothing, and may.
        """
        keys = _names(entry)
        for count in range(len(keys)):
            above = self._entries.get(keys[:count])
            if above is not None:
                return above
        there = self._entries.get(keys)
        if there is not None:
            return None if entry.is_empty and there.kind == entry.kind else there
        if keys in self._above and not entry.is_empty:
            return next(each for known, each in self._entries.items() if known[: len(keys)] == keys)
        return None

    def confused_with(self, entry: Entry) -> Entry | None:
        """Returns what an entry, that can be added, would share its stored name with."""
        return None if entry.is_empty else self._stored.get(entry.name)


def merge_trees(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one `_METADATA` document for several; an empty node gives way to what is in it."""
    merged = dict(documents[0])
    tree: dict[str, Any] = {}
    for document in documents:
        tree = document["tree_metadata"] | tree
    in_order = [key for document in documents for key in document["tree_metadata"]]
    keys = {key: tuple(each["key"] for each in tree[key]["key_metadata"]) for key in in_order}
    above = {path[:count] for path in keys.values() for count in range(len(path))}
    merged["tree_metadata"] = {key: tree[key] for key, path in keys.items() if path not in above}
    merged.pop("value_metadata_tree", None)
    texts = [document.get("value_metadata_tree") for document in documents]
    if all(isinstance(text, str) for text in texts):
        description, *others = [json.loads(text) for text in texts if text is not None]
        try:
            for other in others:
                description = rich.merge(description, other)
        except ValueError as error:
            logger.warning("the rich types of partial saves do not fit together: %s", error)
        else:
            merged["value_metadata_tree"] = json.dumps(description)
    return merged


def merge_json(first: Any, second: Any) -> Any:
    """Returns the later of two JSON values, but the union of two objects; None says nothing."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first | {key: merge_json(first.get(key), value) for key, value in second.items()}
    return first if second is None else second


def merge_array_metadatas(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one `array_metadatas` document for several; of each array there is one."""
    found = {
        each["array_metadata"]["param_name"]: each
        for document in documents
        for each in document["array_metadatas"]
    }
    return {"array_metadatas": list(found.values())}
