"""W12: a flipped bit in array data is found, by us and by stock Orbax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import disk
import numpy as np
import pytest
from equality import assert_same, differences
from stock import load_or_refusal
from trees import values

import orbax_async as ocp
from orbax_async import errors

FLIPS = 40
ORBAX_LOOKS_AT_EACH = 4  # it takes its time

CASES: dict[str, tuple[np.ndarray[Any, Any], dict[str, Any], list[str] | None]] = {
    # array, options, its codecs
    "raw": (values("float32", (300, 200)), {}, ["bytes", "crc32c"]),
    "zstd": (np.arange(60_000, dtype=np.int32) % 97, {}, ["bytes", "zstd"]),
    "zstd-of-noise": (
        values("float32", (200, 200)),
        {"compression_min_saving": 0},
        ["bytes", "zstd"],
    ),
    "stored": (values("float32", (50, 40)), {}, ["bytes", "gzip"]),
    "stored-inline": (values("float32", (10, 8)), {}, ["bytes", "gzip"]),
    "zarr2-raw": (values("float32", (300, 200)), {"use_zarr3": False}, None),
    "zarr2-compressed": (np.arange(60_000, dtype=np.int32) % 97, {"use_zarr3": False}, None),
    "files-raw": (values("float32", (300, 200)), {"use_ocdbt": False}, ["bytes", "crc32c"]),
    "files-stored": (values("float32", (50, 40)), {"use_ocdbt": False}, ["bytes", "gzip"]),
}


@contextmanager
def flipped(file: Path, position: int, bit: int) -> Iterator[None]:
    """Flips one bit of a file, and puts it back."""
    with open(file, "r+b", buffering=0) as opened:
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ (1 << bit)]))
        yield
        opened.seek(position)
        opened.write(bytes([byte]))


def data_of(directory: Path, chunk: bytes) -> tuple[Path, int, int]:
    """Returns the file and range that hold a chunk; the whole file where it is inside a node."""
    for file in sorted(directory.rglob("*")):
        if file.is_file() and chunk in (content := file.read_bytes()):
            return file, content.index(chunk), len(chunk)
    (file,) = (directory / "d").iterdir()
    return file, 0, file.stat().st_size


@pytest.mark.parametrize("case", CASES)
def test_flipped_bits_are_found(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """40 flips spread over an array's data: each one raises, or the values are all the same."""
    array, saving, codecs = CASES[case]
    context = ocp.Context()
    for name, value in saving.items():
        setattr(context.array.saving, name, value)
    with context:
        ocp.save(tmp_path / "ours", {"x": array})
    directory = tmp_path / "ours" / "state"
    if codecs is not None:
        assert disk.codecs(directory, "x") == codecs
    (key,) = (key for key in disk.keys(directory) if key.startswith(("x/c", "x/0")))
    file, start, length = data_of(directory, disk.value(directory, key))
    raised = 0
    for index in range(FLIPS):
        position = start + length * index // FLIPS + int(rng.integers(max(1, length // FLIPS)))
        with flipped(file, position, int(rng.integers(8))):
            try:
                loaded = ocp.load(tmp_path / "ours")
            except (errors.ReadError, errors.InvalidLayoutError):
                raised += 1
            else:
                assert not list(differences(loaded, {"x": array})), position
            if index % ORBAX_LOOKS_AT_EACH == 0:
                theirs, message = load_or_refusal(tmp_path / "ours")
                assert message or not list(differences(theirs, {"x": array})), position
    assert raised >= FLIPS * 3 // 4
    assert_same(ocp.load(tmp_path / "ours"), {"x": array})


def test_damage_names_the_leaf(tmp_path: Path) -> None:
    """I12: damage in one of several leaves is reported as its own, by its key path."""
    state = {"a": values("float32", (200, 200)), "b": [values("float32", (200, 200), 1)]}
    ocp.save(tmp_path / "ours", state)
    directory = tmp_path / "ours" / "state"
    file, start, _ = data_of(directory, disk.value(directory, "b.0/c/0/0"))
    with flipped(file, start + 1000, 3):
        with pytest.raises(errors.CorruptDataError, match=r"leaf \['b'\]\[0\]") as found:
            ocp.load(tmp_path / "ours")
        assert found.value.keypath == "['b'][0]"
        whole = ocp.load(tmp_path / "ours", {"a": np.ndarray, "b": [...]})
    assert_same(whole["a"], state["a"])
