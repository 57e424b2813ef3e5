"""One tree of several that have no leaf in common: their keys, and the documents about them.

Pure, on entries and on parsed JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orbax_async._trace import logger
from orbax_async.tree import rich
from orbax_async.tree.keypath import KeyPath
from orbax_async.tree.schema import STRING, Entry

__all__ = ["Taken", "merge_array_metadatas", "merge_json", "merge_trees"]

_Names = tuple[str, ...]


def _names(entry: Entry) -> _Names:
    return tuple([key.name for key in entry.keys])


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


class Taken:
    """The keys that trees have taken; another may only add to them.

    Args:
      as_files: whether each array becomes a directory, which can't lie inside that of another.
    """

    def __init__(self, *, as_files: bool = False) -> None:
        self._as_files = as_files
        self._entries: dict[_Names, Entry] = {}
        self._above: dict[_Names, bool] = {}  # of each container, whether it is a sequence
        self._stored: dict[str, Entry] = {}
        self._below: dict[tuple[str, bool], Entry] = {}  # by a name above, and if it is a string

    def add(self, entries: Iterable[Entry]) -> None:
        """Takes the keys of one more tree."""
        for entry in entries:
            keys = _names(entry)
            if entry.is_empty and keys in self._above:
                continue
            self._entries.setdefault(keys, entry)
            for count, key in enumerate(entry.keys):
                self._above.setdefault(keys[:count], key.is_index)
            if not entry.is_empty:
                self._stored.setdefault(entry.name, entry)
                for above in _above(entry.name):
                    self._below.setdefault((above, entry.kind == STRING), entry)

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
            return None if _is_same_empty(entry, there) else there
        if keys in self._above and not entry.is_empty:
            return next(each for known, each in self._entries.items() if known[: len(keys)] == keys)
        return None

    def of_other_kind(self, entry: Entry) -> KeyPath | None:
        """Returns where an entry takes a sequence for a dict, or a dict for a sequence."""
        keys = _names(entry)
        for count, key in enumerate(entry.keys):
            if self._above.get(keys[:count], key.is_index) != key.is_index:
                return entry.keys[:count]
        return None

    def confused_with(self, entry: Entry) -> Entry | None:
        """Returns what an entry, that can be added, can't be stored beside.

        That is one of the same stored name; also a string above or below another, which nest in
        their document, and an array above or below another, where they are files.
        """
        is_string = entry.kind == STRING
        if entry.is_empty:
            return None
        there = self._stored.get(entry.name)
        if there is not None or not (is_string or self._as_files):
            return there
        for name in _above(entry.name):
            above = self._stored.get(name)
            if above is not None and (above.kind == STRING) == is_string:
                return above
        return self._below.get((entry.name, is_string))


def _is_same_empty(entry: Entry, other: Entry) -> bool:
    # What an empty named tuple is recorded as depends on the options of the part.
    return entry.is_empty and other.is_empty and entry.empty_value() == other.empty_value()


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
