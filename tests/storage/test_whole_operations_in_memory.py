"""Saves, loads and all else go through directories alone: nothing of them is a local file."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from directory_conformance import needs
from memory_directory import LIKE_A_BUCKET, LIKE_A_FILE_SYSTEM, MemoryStore
from watched_directory import Call, Fault, Log, Watcher, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage.directory import Capability, Directory
from orbax_async._storage.local import opened_by

STATE: dict[str, Any] = {
    "w": jnp.arange(1000.0),
    "large": np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024),
    "text": "some",
    "step": 3,
}


@pytest.fixture(params=[LIKE_A_FILE_SYSTEM, LIKE_A_BUCKET], ids=["file system", "bucket"])
def run(request: pytest.FixtureRequest) -> Iterator[Directory]:
    """A run's directory in memory; meanwhile every path means something in the same memory."""
    store = MemoryStore(request.param)
    store.open("/run").make()
    context = ocp.Context()
    if request.param == LIKE_A_BUCKET:  # nothing is renamed: a file says that a save is whole
        context.atomicity.mode = "commit_file"
    with context, opened_by(store.open):
        yield store.open("/run")


def test_what_is_saved_comes_back(run: Directory) -> None:
    """Whole, in parts, described and verified."""
    ocp.save_checkpointables("/run/1", {"state": STATE, "config": {"rate": 0.1}})
    loaded = ocp.load("/run/1")
    assert loaded.keys() == STATE.keys()
    assert np.array_equal(loaded["w"], STATE["w"])
    assert np.array_equal(loaded["large"], STATE["large"])
    assert (loaded["text"], loaded["step"]) == ("some", 3)
    assert ocp.load_checkpointables("/run/1", {"config": None}) == {"config": {"rate": 0.1}}
    assert ocp.metadata("/run/1").metadata["large"].shape == (1024, 1024)
    assert ocp.verify("/run/1").is_intact
    with pytest.raises(errors.DestinationExistsError):
        ocp.save("/run/1", STATE)
    assert [entry.name for entry in run.entries()] == ["1"]


def test_damage_is_found(run: Directory) -> None:
    """I12: by a load and by a check, also where TensorStore reads it all."""
    ocp.save("/run/1", STATE)
    directory = run / "1/state/d"
    name = max(directory.walk()[0], key=lambda each: len(directory.read(each) or b""))
    data = bytearray(directory.read(name) or b"")
    data[len(data) // 2] ^= 1
    directory.write(name, bytes(data))
    with pytest.raises(errors.CorruptDataError, match="large"):
        ocp.load("/run/1")
    assert not ocp.verify("/run/1").is_intact


def test_what_is_renamed_is_replaced_gathered_and_deleted(run: Directory) -> None:
    """Overwriting, partial saves and deletions."""
    needs(run, Capability.RENAME)
    ocp.save("/run/1", {"a": 1})
    ocp.save("/run/1", {"a": 2}, overwrite=True)
    assert ocp.load("/run/1") == {"a": 2}
    ocp.partial.save("/run/2", {"a": 1})
    ocp.partial.save("/run/2", {"b": np.arange(3)})
    ocp.partial.finalize("/run/2")
    assert ocp.load("/run/2")["b"].tolist() == [0, 1, 2]
    assert ocp.delete("/run/1")
    assert ocp.delete("/run/2")
    assert run.entries() == []


def what_lies_there(call: Call) -> bool:
    """Says of a call whether it asks the storage; a specification is known without."""
    return call.verb != "kvstore"


def overwritten(*watchers: Watcher) -> MemoryStore:
    """Overwrites a checkpoint under the eyes of watchers, and returns where."""
    store = MemoryStore()
    with opened_by(store.open):
        ocp.save("/run/1", {"a": "old"})
    with opened_by(watched(*watchers, inner=store.open)):
        ocp.save("/run/1", {"a": "new"}, overwrite=True)
    return store


def test_i4_whatever_call_fails_the_checkpoint_is_there() -> None:
    """I4: the old one or the new one; what is raised is an error of ours, with its cause."""
    log = Log()
    overwritten(log)
    calls = [call for call in log.calls if what_lies_there(call)]
    found = set()
    for nth in range(1, len(calls) + 1):
        store = MemoryStore()
        with opened_by(store.open):
            ocp.save("/run/1", {"a": "old"})
            with opened_by(watched(Fault(errno.EIO, what_lies_there, nth=nth), inner=store.open)):
                try:
                    ocp.save("/run/1", {"a": "new"}, overwrite=True)
                except errors.CheckpointError as error:
                    assert "Input/output error" in str(error), calls[nth - 1]
            found.add(ocp.load("/run/1")["a"])
            ocp.save("/run/1", {"a": "next"}, overwrite=True)
            assert [each.name for each in store.open("/run").entries()] == ["1"]
    assert found == {"old", "new"}
