"""Files that say that they hold more than they do, or hold more than they should (I14)."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from seals import unseal

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage import codecs

STATE = {"large": np.arange(100_000.0), "small": np.arange(10), "good": np.arange(3)}


def saved(path: Path, **options: Any) -> Path:
    """Saves `STATE`; returns where its arrays are."""
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    with context:
        ocp.save(path / "checkpoint", STATE)
    unseal(path / "checkpoint")  # an enemy would seal what he writes
    return path / "checkpoint" / "state"


def bomb(nbytes: int) -> bytes:
    """Returns a gzip member that is a thousandth of what it holds."""
    stream = zlib.compressobj(9, wbits=31)
    return b"".join(stream.compress(bytes(1 << 20)) for _ in range(nbytes >> 20)) + stream.flush()


def test_f5_no_more_is_decompressed_than_is_declared(tmp_path: Path) -> None:
    """F5: of 64 MiB in a member that should hold 80 bytes, 81 are decompressed."""
    state = saved(tmp_path, use_ocdbt=False)
    data = bomb(64 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 80 bytes found"):
            codecs.inflate(data, 80)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    (state / "small" / "c" / "0").write_bytes(data)
    with pytest.raises(errors.CorruptDataError, match=r"\['small'\].*more than 80 bytes found"):
        ocp.load(tmp_path / "checkpoint")
    assert np.array_equal(ocp.load(tmp_path / "checkpoint", select="good")["good"], [0, 1, 2])


@pytest.mark.parametrize("cut", [1, 4, 8, 9])
def test_a_member_that_is_cut_off_is_told(cut: int) -> None:
    """Also where all of its bytes are there, and its checksum is not."""
    with pytest.raises(ValueError, match="checksum"):
        codecs.inflate(codecs.encode_stored(np.arange(10))[:-cut], 80)


@pytest.mark.parametrize("use_zarr3", [True, False])
@pytest.mark.parametrize("name", ["large", "small"])
@pytest.mark.parametrize("is_document", [True, False])
def test_f5_a_file_that_is_too_large_is_refused(
    name: str, is_document: bool, use_zarr3: bool, tmp_path: Path
) -> None:
    """F5: 64 GiB without a byte on the disk are a typed error of their leaf, not an abort."""
    state = saved(tmp_path, use_ocdbt=False, use_zarr3=use_zarr3)
    files = {False: [".zarray", "0"], True: ["zarr.json", "c/0"]}[use_zarr3]
    os.truncate(state / name / files[not is_document], 64 << 30)
    with pytest.raises(errors.CheckpointError, match=r"68719476736 bytes found") as caught:
        ocp.load(tmp_path / "checkpoint")
    assert is_document or caught.value.keypath == f"['{name}']"  # type: ignore[attr-defined]
    report = ocp.verify(tmp_path / "checkpoint")
    assert f"['{name}']" in [each.keypath for each in report.damage]


def test_f5_a_manifest_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """F5: nor does TensorStore read one of 64 GiB, where a check goes on without our index."""
    os.truncate(saved(tmp_path) / "manifest.ocdbt", 64 << 30)
    with pytest.raises(errors.InvalidLayoutError, match=r"index is damaged"):
        ocp.load(tmp_path / "checkpoint")
    report = ocp.verify(tmp_path / "checkpoint")
    assert {each.keypath for each in report.damage} >= {"['large']", "['small']"}


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("side", [10**12, 10**15])
@pytest.mark.parametrize("is_one_chunk", [True, False])
def test_f6_a_shape_that_cannot_be_there_is_refused(
    side: int, is_one_chunk: bool, use_ocdbt: bool, tmp_path: Path
) -> None:
    """F6: where a document declares a petabyte, loads and checks end at once, and name the leaf."""
    state = saved(tmp_path, use_ocdbt=use_ocdbt)
    base = {"driver": "file", "path": f"{state}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base} if use_ocdbt else base).result()
    document = json.loads(store["large/zarr.json"])
    document["shape"] = [side]
    if is_one_chunk:
        document["chunk_grid"]["configuration"]["chunk_shape"] = [side]
    store["large/zarr.json"] = json.dumps(document)
    began = time.monotonic()
    with pytest.raises(errors.CorruptDataError, match=rf"\['large'\].*its shape \({side},\)"):
        ocp.load(tmp_path / "checkpoint")
    report = ocp.verify(tmp_path / "checkpoint")
    assert time.monotonic() - began < 10
    assert [each.keypath for each in report.damage] == ["['large']"]
    assert np.array_equal(
        ocp.load(tmp_path / "checkpoint", select=report.intact)["good"], [0, 1, 2]
    )


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("target", ["state", "state/_METADATA", "state/large/c", "state/d"])
def test_f29_a_link_out_of_a_checkpoint_is_not_followed(
    target: str, use_ocdbt: bool, tmp_path: Path
) -> None:
    """F29: a directory or a file elsewhere is not read; the error and the report name the link."""
    saved(tmp_path, use_ocdbt=use_ocdbt)
    link = tmp_path / "checkpoint" / target
    if not link.exists():
        pytest.skip("of the other format")
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    for verb in (ocp.load, ocp.metadata):
        with pytest.raises(errors.InvalidLayoutError, match=f"'{target}' in it is a symbolic link"):
            verb(tmp_path / "checkpoint")
    (damage,) = ocp.verify(tmp_path / "checkpoint").damage
    assert damage.path == str(link)
    assert "not followed" in damage.problem


def test_links_that_stay_inside_and_to_a_checkpoint_are_followed(tmp_path: Path) -> None:
    """Such as `latest`, and a file that lies elsewhere in the checkpoint."""
    state = saved(tmp_path)
    (state / "_METADATA").rename(state / "tree")
    (state / "_METADATA").symlink_to("tree")
    (tmp_path / "latest").symlink_to("checkpoint")
    assert np.array_equal(ocp.load(tmp_path / "latest")["good"], STATE["good"])
    assert ocp.verify(tmp_path / "latest").is_intact


def crc32c(data: bytes) -> bytes:
    """Returns the checksum that a record of an index ends with."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


def frame(nbytes: int, blocks: int, *, says_length: bool) -> bytes:
    """Returns a zstd frame of blocks that repeat one byte."""
    start = b"\xa0" + nbytes.to_bytes(4, "little") if says_length else b"\0\x38"
    headers = [(128 << 10) << 3 | 1 << 1 | (each == blocks - 1) for each in range(blocks)]
    return b"\x28\xb5\x2f\xfd" + start + b"".join(h.to_bytes(3, "little") + b"\0" for h in headers)


BODIES = {
    "a frame that says that it is long": frame(1 << 31, 1, says_length=True),
    "a frame of many blocks": frame(0, 5000, says_length=False),
    "a frame without its end": frame(0, 5000, says_length=False)[:-7],
    "no frame": b"\0" * 40,
    "nothing": b"",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_f5_an_index_is_decompressed_in_bounds(body: bytes, tmp_path: Path) -> None:
    """F5: a manifest whose checksum is right takes no more memory than its size allows for."""
    resource = pytest.importorskip("resource")
    state = saved(tmp_path)
    head = bytes.fromhex("0cdb3a2a") + (18 + len(body)).to_bytes(8, "little") + b"\0\1"
    (state / "manifest.ocdbt").write_bytes(head + body + crc32c(head + body))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(errors.InvalidLayoutError, match=r"manifest\.ocdbt|is damaged"):
        ocp.load(tmp_path / "checkpoint")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("body", [b"\0" * 60, b"\xff" * 60, b"\xff" * 200_000, bytes(range(200))])
def test_an_index_of_nonsense_is_damaged(body: bytes, tmp_path: Path) -> None:
    """Whatever its fields say, they are of no other type, and end."""
    state = saved(tmp_path)
    head = bytes.fromhex("0cdb3a2a") + (18 + len(body)).to_bytes(8, "little") + b"\0\0"
    (state / "manifest.ocdbt").write_bytes(head + body + crc32c(head + body))
    with pytest.raises(errors.CheckpointError):
        ocp.load(tmp_path / "checkpoint")
