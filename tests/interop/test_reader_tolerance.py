"""FORMAT 5.4 and 5.5: documents that are missing, damaged, or say more than is known."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
import jax
import numpy as np
import pytest
from alterations import WRITERS, Change, adding, assert_reads, dropping, editing, without, writing
from equality import abstract_of, assert_same
from orbax.checkpoint import v1
from stock import refusal
from trees import base_state

import orbax_async as ocp
from orbax_async import errors

ROOT = "_CHECKPOINT_METADATA"


def _more_in_each_entry(content: Any) -> None:
    for entry in content["tree_metadata"].values():
        entry["acme"] = 1
        entry["value_metadata"]["acme"] = {"x": None}
        for key in entry["key_metadata"]:
            key["acme"] = []


def _rename_entries(content: Any) -> None:
    entries = content["tree_metadata"].values()
    content["tree_metadata"] = {f"entry {i}": entry for i, entry in enumerate(entries)}


def _keep_only_the_key(content: Any) -> None:
    items = content["array_metadatas"]
    content["array_metadatas"] = [i for i in items if i["array_metadata"]["param_name"] == "k"]


def _more_in_array_metadatas(content: Any) -> None:
    content["acme"] = 1
    for item in content["array_metadatas"]:
        item["acme"] = 1
        item["array_metadata"]["acme"] = 1
        if item["array_metadata"]["ext_metadata"] is not None:
            item["array_metadata"]["ext_metadata"]["acme"] = 1


def _only_process_7(path: Path) -> None:
    folder = path / "state" / "array_metadatas"
    (folder / "process_0").rename(folder / "process_7")


def _more_keys(path: Path) -> None:
    disk.put(path / "state", {"__acme__/crc": b"1", "w/acme": b"2", "w/c/acme": b"3"})


def _unpadded(content: Any) -> Any:
    return {key.rstrip("="): value for key, value in content.items()}


READ_BY_BOTH: dict[str, Change] = {
    "no marker": without("orbax.checkpoint"),
    "no marker, no root document": without("orbax.checkpoint", ROOT),
    "no root files at all": without("orbax.checkpoint", ROOT, "commit_success.txt"),
    "no commit file": without("commit_success.txt"),
    "empty commit file": writing("commit_success.txt", ""),
    "root document {}": writing(ROOT, "{}"),
    "root document is no JSON": writing(ROOT, "{ not json"),
    "root document is empty": writing(ROOT, ""),
    "root document is a list": writing(ROOT, "[]"),
    "root document names no handlers": dropping(ROOT, "item_handlers"),
    "root document with unknown handler": adding(ROOT, item_handlers={"state": "acme.Handler"}),
    "root document with unknown key": adding(ROOT, acme=1),
    "array_metadatas lists only the key": editing(
        "state/array_metadatas/process_0", _keep_only_the_key
    ),
    "array_metadatas knows more": editing(
        "state/array_metadatas/process_0", _more_in_array_metadatas
    ),
    "array_metadatas of process 7 only": _only_process_7,
    "another file in array_metadatas": writing("state/array_metadatas/acme.json", "{}"),
    "_METADATA knows more": adding("state/_METADATA", acme=[1], custom_metadata={"a": 1}),
    "_METADATA entries know more": editing("state/_METADATA", _more_in_each_entry),
    "_METADATA entries of other names": editing("state/_METADATA", _rename_entries),
    "_METADATA doesn't mention OCDBT": dropping("state/_METADATA", "use_ocdbt"),
    "_sharding knows more": adding("state/_sharding", acme="{}"),
    "more keys in the store": _more_keys,
    "more files": lambda path: [
        (path / name).write_text("?") for name in ("acme.json", "state/acme", "state/d/acme")
    ],
    "a directory in the state": lambda path: (path / "state" / "acme").mkdir(),
    "a directory at the root": lambda path: (path / "_acme").mkdir(),
    "a metrics directory": writing("metrics/metrics", "{}"),
}

READ_BY_US: dict[str, Change] = {
    "root document with unknown statistics": adding(ROOT, performance_metrics={"acme": 1.5}),
    "root document with strange times": adding(ROOT, init_timestamp_nsecs="yesterday"),
    "array_metadatas of a process without number": writing(
        "state/array_metadatas/process_acme", "?"
    ),
    "_sharding with unpadded names": editing("state/_sharding", _unpadded),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("alteration", READ_BY_BOTH)
def test_tolerated(alteration: str, writer: str, copy_of: Callable[[str], Path]) -> None:
    """B8.12: what does not matter to Orbax does not matter to us."""
    path = copy_of(writer)
    READ_BY_BOTH[alteration](path)
    assert_reads(path)
    assert ocp.is_orbax_checkpoint(path)
    assert_same(ocp.load(path, ocp.metadata(path)), base_state())


@pytest.mark.parametrize("alteration", READ_BY_US)
def test_tolerated_by_us_alone(alteration: str, copy_of: Callable[[str], Path]) -> None:
    """Documents on which Orbax stumbles are no reason not to load the data."""
    path = copy_of("orbax")
    READ_BY_US[alteration](path)
    assert_reads(path, also_orbax=False)
    assert refusal(path)
    assert ocp.metadata(path).metadata["w"].shape == (8, 16)


def _edit_sharding(change: Callable[[dict[str, Any], str], None]) -> Change:
    def edit(content: dict[str, Any]) -> None:
        change(content, base64.urlsafe_b64encode(b"w").decode())

    return editing("state/_sharding", edit)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "change",
    [
        without("state/_sharding"),
        _edit_sharding(lambda content, key: content.pop(key)),
        _edit_sharding(lambda content, key: content.update({key: None})),
        _edit_sharding(lambda content, key: content.update({key: ""})),
    ],
    ids=["gone", "without one leaf", "null", "empty"],
)
def test_no_saved_sharding(change: Change, writer: str, copy_of: Callable[[str], Path]) -> None:
    """A leaf whose sharding is unknown loads on one device, or wherever it is asked for."""
    path = copy_of(writer)
    change(path)
    state = base_state()
    assert_same(ocp.load(path, abstract_of(state)), state)
    here = jax.device_put(state["w"], jax.devices()[0])
    assert_same(ocp.load(path), state | {"w": here})
    assert ocp.metadata(path).metadata["w"].sharding is None
    assert refusal(path)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "change",
    [
        without("state/array_metadatas"),
        without("state/array_metadatas/process_0"),
        writing("state/array_metadatas/process_0", '{"array_metadatas": []}'),
    ],
    ids=["gone", "empty", "lists nothing"],
)
def test_no_key_implementation(change: Change, writer: str, copy_of: Callable[[str], Path]) -> None:
    """Without the implementation's name keys load as integers; as keys when keys are asked for."""
    path = copy_of(writer)
    change(path)
    state = base_state()
    raw = state | {"k": jax.random.key_data(state["k"])}
    assert_same(ocp.load(path), raw)
    assert_same(v1.load(path), raw)
    assert_same(ocp.load(path, abstract_of(state)), state)


def test_unknown_kind_of_leaf(copy_of: Callable[[str], Path]) -> None:
    """FORMAT 2.2: a leaf of a handler that we don't know loads as a NumPy array."""
    path = copy_of("orbax")

    def rename(content: Any) -> None:
        content["tree_metadata"]["('w',)"]["value_metadata"]["value_type"] = "acme.Handler"

    disk.edit(path / "state" / "_METADATA", rename)
    state = base_state()
    assert_same(ocp.load(path), state | {"w": np.asarray(state["w"])})
    assert_same(ocp.load(path, abstract_of(state)), state)


# What is refused, and as what.


def _flip(name: str, position: int) -> Change:
    def change(path: Path) -> None:
        file = max(path.glob(name), key=lambda file: file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[position] ^= 0x10
        file.write_bytes(data)

    return change


def _claim(name: str, value: bool) -> Change:
    return adding("state/_METADATA", **{name: value})


def _deleting(name: str) -> Change:
    record = {"operation_id": "0" * 32, "checkpointable_name": name, "destination": None}
    documents = {"original_metadata": {}, "updated_metadata": {}}
    return writing("_CHECKPOINT_DELETION", json.dumps(record | documents))


REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "marker without root document": (without(ROOT), errors.InvalidLayoutError, ROOT),
    "no tree": (without("state/_METADATA"), errors.InvalidLayoutError, "_METADATA"),
    "tree is no JSON": (writing("state/_METADATA", "{"), errors.InvalidLayoutError, "damaged"),
    "tree is empty": (writing("state/_METADATA", ""), errors.InvalidLayoutError, "damaged"),
    "tree is a list": (writing("state/_METADATA", "[]"), errors.InvalidLayoutError, "damaged"),
    "tree without entries": (
        dropping("state/_METADATA", "tree_metadata"),
        errors.InvalidLayoutError,
        "tree_metadata",
    ),
    "no strings": (without("state/_strings.json"), errors.ReadError, r"leaf \['s'\]"),
    "strings are no JSON": (
        writing("state/_strings.json", "?"),
        errors.InvalidLayoutError,
        "_strings.json is damaged",
    ),
    "strings without this one": (
        writing("state/_strings.json", "{}"),
        errors.ReadError,
        r"leaf \['s'\]",
    ),
    "shardings are no JSON": (
        writing("state/_sharding", "?"),
        errors.InvalidLayoutError,
        "_sharding is damaged",
    ),
    "no manifest": (without("state/manifest.ocdbt"), errors.InvalidLayoutError, "manifest.ocdbt"),
    "damaged manifest": (
        _flip("state/manifest.ocdbt", 40),
        errors.InvalidLayoutError,
        "array store",
    ),
    "no data files": (without("state/d"), errors.InvalidLayoutError, "array store"),
    "claims to be files": (_claim("use_ocdbt", False), errors.ReadError, "missing"),
    "claims to be zarr2": (_claim("use_zarr3", False), errors.ReadError, "missing"),
    "damaged deletion record": (
        writing("_CHECKPOINT_DELETION", "{"),
        errors.InvalidLayoutError,
        "_CHECKPOINT_DELETION is damaged",
    ),
    "unfinished deletion": (_deleting("state"), errors.InvalidLayoutError, "pytree"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("alteration", REFUSED)
def test_refused(alteration: str, writer: str, copy_of: Callable[[str], Path]) -> None:
    """B8.12: what can't be read is refused by an error that says what is wrong, as by Orbax."""
    path = copy_of(writer)
    change, kind, message = REFUSED[alteration]
    change(path)
    with pytest.raises(kind, match=message):
        ocp.load(path)


def test_list_with_a_gap(tmp_path: Path) -> None:
    """FORMAT 2.2: a list that lacks an element in the middle is damaged, and never closed up."""
    ocp.save(tmp_path / "ours", {"l": [np.arange(2), np.arange(3), np.arange(4)]})

    def forget(content: Any) -> None:
        del content["tree_metadata"]["('l', '1')"]

    disk.edit(tmp_path / "ours" / "state" / "_METADATA", forget)
    with pytest.raises(errors.InvalidLayoutError, match="only the indexes"):
        ocp.load(tmp_path / "ours")
    with pytest.raises(errors.InvalidLayoutError, match="only the indexes"):
        ocp.metadata(tmp_path / "ours")


def test_another_checkpointable_in_deletion(copy_of: Callable[[str], Path]) -> None:
    """The unfinished deletion of one checkpointable doesn't hide the others."""
    path = copy_of("orbax")
    _deleting("opt")(path)
    assert_reads(path, also_orbax=False)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_data_file(writer: str, keep: float, copy_of: Callable[[str], Path]) -> None:
    """A data file that was cut short, or emptied, is an error and never wrong values."""
    path = copy_of(writer)
    files = [file for file in (path / "state").rglob("d/*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, int(largest.stat().st_size * keep))
    with pytest.raises((errors.ReadError, errors.InvalidLayoutError)):
        ocp.load(path)


@pytest.mark.parametrize("writer", WRITERS)
def test_missing_data_file(writer: str, copy_of: Callable[[str], Path]) -> None:
    """A data file that is gone is an error, whichever it is."""
    path = copy_of(writer)
    for file in sorted(file for file in (path / "state").rglob("d/*") if file.is_file()):
        content = file.read_bytes()
        file.unlink()
        if writer == "ours":
            with pytest.raises((errors.ReadError, errors.InvalidLayoutError)):
                ocp.load(path)
        else:
            # Orbax's processes leave nodes behind that the merged database doesn't refer to.
            try:
                assert_same(ocp.load(path), base_state())
            except (errors.ReadError, errors.InvalidLayoutError):
                assert refusal(path)
        file.write_bytes(content)
    assert_reads(path)


@pytest.mark.parametrize("name", ["x.orbax-checkpoint-tmp", "x.orbax-checkpoint-tmp-1234"])
@pytest.mark.leaves_temporaries
def test_unfinished_directory(name: str, copy_of: Callable[[str], Path]) -> None:
    """B8.10: a directory whose name says that it is unfinished is no checkpoint."""
    path = copy_of("orbax")
    path = path.rename(path.with_name(name))
    with pytest.raises(errors.InvalidLayoutError, match="unfinished"):
        ocp.load(path)
    assert not ocp.is_orbax_checkpoint(path)
