"""Checkpoints that nobody has saved, with documents, names and files of an attacker or a bad disk.

    python hostile.py DIRECTORY [CASE...]

makes each case, reads it with `load`, `metadata` and `verify`, and prints what came of it, one line
of JSON for each: the kind of outcome, the seconds, and the growth of the peak of memory.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HUGE = 1 << 36
LIMIT_NBYTES = 3 << 30  # of address space beyond what the process has; no case may come near it

Case = Callable[[Path], Any]
CASES: dict[str, tuple[str, Case]] = {}
"""By name: the good checkpoint that is altered, and what alters it."""


def put(name: str) -> Callable[[Path, bytes], None]:
    """Returns what replaces a file by some bytes."""
    return lambda path, data: (path / name).write_bytes(data) and None


def add(base: str, name: str, case: Case) -> None:
    """Adds a case to the corpus."""
    assert name not in CASES, name
    CASES[name] = (base, case)


# Files: any of them may be anything.

FILES = {
    "files": [
        *("_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding", "state/_strings.json"),
        *("state/array_metadatas/process_0", "state/a/zarr.json", "state/a/c/0"),
        "config/data.json",
    ],
    "database": ["state/manifest.ocdbt", "state/d"],
    "tensors": ["model.safetensors"],
}


def _file(path: Path, name: str) -> Path:
    file = path / name
    return next(file.iterdir()) if file.is_dir() else file


def _sparse(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.truncate(HUGE)


def _link(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


ALTERATIONS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "all zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "deep": lambda file: file.write_bytes(DEEP),
    "a list": lambda file: file.write_bytes(b"[1, 2]"),
    "null": lambda file: file.write_bytes(b"null"),
    "no text": lambda file: file.write_bytes(b"\xff\xfe" * 50),
    "wrong inside": lambda file: file.write_bytes(_wrong_inside(file.read_bytes())),
    "sparse": _sparse,
    "a loop of links": lambda file: _link(file, file.name),
    "a link to nothing": lambda file: _link(file, "/nowhere/at/all"),
    "a device": lambda file: _link(file, "/dev/zero"),
    "a directory": _directory,
    "a pipe": _pipe,
}


def _wrong_inside(data: bytes) -> bytes:
    """Returns a JSON document in which each inner value has another type."""
    try:
        document = json.loads(data)
    except ValueError:
        return data[::-1]
    return json.dumps({key: [3.5] for key in document}).encode()


for _base, _names in FILES.items():
    for _name in _names:
        for _how, _alter in ALTERATIONS.items():
            add(_base, f"{_name}: {_how}", lambda path, n=_name, a=_alter: a(_file(path, n)))


# Values in documents.


def edit(file: Path, *keys: Any, value: Any) -> None:
    """Sets one value of a JSON document."""
    document = json.loads(file.read_bytes())
    node = document
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    file.write_text(json.dumps(document))


def _values(file: str, keys: tuple[Any, ...], values: list[Any], *, base: str = "files") -> None:
    for value in values:
        told = f"{value!r}" if len(f"{value!r}") < 40 else f"{value!r:.30}... ({len(repr(value))})"
        add(
            base,
            f"{file} {keys[-1]} = {told}",
            lambda path, value=value: edit(path / file, *keys, value=value),
        )


_WRONG: list[Any] = [None, True, 3, 1.5, "x", [], {}, [[1]], [None], {"a": 1}]
_ARRAY = "state/a/zarr.json"
_values(
    _ARRAY,
    ("shape",),
    [
        *(*_WRONG, [-1], [0], [1.5], ["6"], [True], [7], [6, 6], [10**9], [10**12], [10**15]),
        *([2**63], [2**64], [10**400], [-(2**63)], [1] * 40, [1] * 2000, [10**6] * 3),
    ],
)
_values(_ARRAY, ("data_type",), [*_WRONG, "O", "V8", "S1000000000", "float1024", "int64", "M8[s]"])
_values(_ARRAY, ("fill_value",), [*_WRONG, 10**400, "NaN", "0xffffffffff"])
_values(_ARRAY, ("codecs",), [*_WRONG, [{"name": "zstd"}], [{"name": "bytes"}] * 1000])
_values(
    _ARRAY,
    ("chunk_grid", "configuration", "chunk_shape"),
    [*_WRONG, [0], [-1], [1], [10**15], [2**64], [6, 6]],
)
_values(_ARRAY, ("chunk_key_encoding",), [*_WRONG, {"name": "v2"}, {"name": "../.."}])
_values(_ARRAY, ("node_type",), ["group", 3])
_values(_ARRAY, ("zarr_format",), [*_WRONG, 2, 10**400])

_TREE = "state/_METADATA"
_LEAF = ("tree_metadata", "('a',)")
_values(_TREE, ("tree_metadata",), _WRONG)
_values(_TREE, _LEAF, _WRONG)
_values(_TREE, (*_LEAF, "key_metadata"), [*_WRONG, [{"key": "a"}]])
_values(
    _TREE,
    (*_LEAF, "key_metadata", 0, "key"),
    [*_WRONG, "", ".", "..", "../../..", "/etc", "b", "b/c", "a\0b", "k" * 5000, "\ud800", -1],
)
_values(_TREE, (*_LEAF, "key_metadata", 0, "key_type"), [*_WRONG, 1, 99])
_values(_TREE, (*_LEAF, "value_metadata", "value_type"), [*_WRONG, "string", "None", "Dict", "np"])
_values(
    _TREE, (*_LEAF, "value_metadata", "write_shape"), [*_WRONG, [-1], [10**400], [10**15], ["a"]]
)
_values(
    _TREE,
    (*_LEAF, "value_metadata", "orbax_async"),
    [
        *(*_WRONG, {"logical_dtype": "O"}, {"logical_dtype": 3}, {"python_type": "eval"}),
        *({"memory_kind": 7}, {"weak_type": "x"}, {"logical_dtype": "int2"}, {"python_type": []}),
    ],
)
_values(_TREE, ("use_zarr3",), [*_WRONG, False])
_values(_TREE, ("use_ocdbt",), _WRONG)
_values(_TREE, ("value_metadata_tree",), [*_WRONG, DEEP.decode(), "{}", "[" * 100_000])
_values(_TREE, ("custom_metadata",), _WRONG)

_ROOT = "_CHECKPOINT_METADATA"
_values(
    _ROOT,
    ("item_handlers",),
    [*_WRONG, {"state": 3}, {"state": "os.system"}, {"../x": "a"}, {"state": None}, {"": "x"}],
)
_values(_ROOT, ("init_timestamp_nsecs",), [*_WRONG, -1, 10**30, 10**400, float("nan")])
_values(_ROOT, ("custom_metadata",), _WRONG)

_SHARDING = "state/_sharding"
_values(
    _SHARDING,
    ("YQ==",),
    [*_WRONG, "{}", "[]", "null", "3", DEEP.decode(), '{"sharding_type": "NamedSharding"}']
    + ['{"sharding_type": "os.system"}', '{"sharding_type": "SingleDeviceSharding"}']
    + ['{"sharding_type": "SingleDeviceSharding", "device_str": 3}']
    + [
        json.dumps({"sharding_type": "NamedSharding", "shape": shape, "axis_names": axes} | more)
        for shape, axes in (([10**12], ["x"]), ([-1], ["x"]), ("x", 3), ([1], [["x"]]), ([1], []))
        for more in (
            {"partition_spec": ["x"]},
            {"partition_spec": [[["x"]]], "device_mesh": {"mesh": [[{"id": -1}]]}},
        )
    ],
)
_values(_SHARDING, ("\u00fc",), ["{}"])
_values(_SHARDING, ("a",), ["{}"])
_METADATAS = "state/array_metadatas/process_0"
_values(_METADATAS, ("array_metadatas",), _WRONG)
_values(_METADATAS, ("array_metadatas", 0, "array_metadata"), _WRONG)
_values(
    _METADATAS,
    ("array_metadatas", 0, "array_metadata", "ext_metadata"),
    [*_WRONG, {"random_key_impl": 3}, {"random_key_impl": "x"}, {"random_key_impl": []}],
)
_values(_METADATAS, ("array_metadatas", 0, "array_metadata", "param_name"), _WRONG)
_values("state/_strings.json", ("s",), [None, 3, [], {}, "\0", "\ud800"])


# Safetensors files.


def _tensors(header: Any, data: bytes = bytes(24), *, length: int | None = None) -> Case:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(raw) if length is None else length)
    return lambda path: (path / "model.safetensors").write_bytes(start + raw + data)


_TENSOR: dict[str, Any] = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
for _length in (0, 1, 99_999_999, 2**40, 2**63, 2**64 - 1):
    add("tensors", f"header of {_length}", _tensors({"a": _TENSOR}, length=_length))
for _field, _all in {
    "dtype": [*_WRONG, "O", "F1024", "f32"],
    "shape": [*_WRONG, [-6], [10**15], [2**63], [10**400], [0], [2, 3, 10**18], [1] * 2000],
    "data_offsets": [*_WRONG, [0], [24, 0], [-24, 0], [0, 10**15], [0, 2**64], [0.0, 24.0]],
}.items():
    for _each in _all:
        add(
            "tensors",
            f"tensor's {_field} = {_each!r:.40} ({len(repr(_each))})",
            _tensors({"a": {**_TENSOR, _field: _each}}),
        )
for _each in _WRONG:
    add("tensors", f"tensor = {_each!r}", _tensors({"a": _each}))
    add("tensors", f"tensors' texts = {_each!r}", _tensors({"a": _TENSOR, "__metadata__": _each}))
add("tensors", "two tensors in one place", _tensors({"a": _TENSOR, "b": _TENSOR}))
add("tensors", "deep header", _tensors(DEEP))
for _name in ("", "..", "/etc/passwd", "a\0b", "\ud800", "k" * 5000):
    add("tensors", f"tensor named {_name[:20]!r}", _tensors({_name: _TENSOR}))
for _each in [*_WRONG, {"a": "../../x"}, {"a": "/etc/passwd"}, {"a": "none.safetensors"}]:
    add(
        "tensors",
        f"index = {_each!r}",
        lambda path, each=_each: (path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": each})
        ),
    )


# Reading them.


def make_good(folder: Path) -> None:
    """Makes the checkpoints that are altered."""
    import jax.numpy as jnp
    import numpy as np

    import orbax_async as ocp

    state = {"a": jnp.arange(6.0), "b": np.arange(4), "n": 3, "s": "text"}
    for name in ("files", "database"):
        context = ocp.Context()
        context.array.saving.use_ocdbt = name == "database"
        context.checkpointables.registry = ocp.handlers.local_registry().add(
            ocp.handlers.JsonHandler, checkpointable_name="config"
        )
        with context:
            ocp.save_checkpointables(folder / name, {"state": state, "config": {"rate": 1}})
    (folder / "tensors").mkdir()
    _tensors({"a": _TENSOR})(folder / "tensors")


def _peak_nbytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def read(path: Path, base: str, *, asks_for_all: bool) -> dict[str, Any]:
    """Reads one checkpoint with each verb, and returns what came of it."""
    import orbax_async as ocp

    context = ocp.Context()
    if base == "tensors":
        context.checkpoint_layout = "safetensors"
    verbs: dict[str, Callable[[Path], Any]] = {
        "load": ocp.load,
        "metadata": lambda path: repr(ocp.metadata(path)),
        "verify": lambda path: str(ocp.verify(path)),
    }
    if asks_for_all:
        verbs["load_checkpointables"] = ocp.load_checkpointables
        verbs["checkpointables_metadata"] = lambda path: repr(ocp.checkpointables_metadata(path))
    outcomes: dict[str, Any] = {}
    for verb, act in verbs.items():
        Path("/proc/self/clear_refs").write_text("5")
        before, began = _peak_nbytes("VmRSS"), time.perf_counter()
        try:
            with context:
                act(path)
            outcome = "read"
        except ocp.errors.CheckpointError as error:
            outcome = f"typed: {type(error).__name__}: {error!s:.150}"
        except BaseException as error:
            outcome = f"UNTYPED: {type(error).__name__}: {error!s:.150}"
        secs = time.perf_counter() - began
        outcomes[verb] = [outcome, round(secs, 3), (_peak_nbytes("VmHWM") - before) >> 20]
    return outcomes


def main(folder: str, *wanted: str) -> None:
    """Makes and reads the cases that are wanted, or all."""
    good = Path(folder) / "good"
    if not good.exists():
        make_good(good)
    for base in ("files", "database", "tensors"):  # what is read once anyway counts for no case
        read(good / base, base, asks_for_all=base != "tensors")
    limit = _peak_nbytes("VmSize") + LIMIT_NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in wanted or CASES:
        base, alter = CASES[name]
        path = Path(folder) / "case"
        shutil.copytree(good / base, path)
        alter(path)
        faulthandler.dump_traceback_later(30, exit=True)
        asks_for_all = name.startswith(("_CHECKPOINT_METADATA", "config"))
        print(json.dumps([name, read(path, base, asks_for_all=asks_for_all)]), flush=True)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
