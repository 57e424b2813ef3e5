"""Several checkpointables in one checkpoint: saved together, in tiers, and loaded in part."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import performers
import pytest
from performers import Counter, Meeting, notes

import orbax_async as ocp

json_named_config = performers.json_named_config


# Round trips.


def test_all_kinds_in_one_checkpoint(tmp_path: Path, json_named_config: ocp.Context) -> None:
    """Trees, JSON and an object that saves itself come back, each by its own handler."""
    state = {"w": jnp.arange(6.0), "step": 3}
    ocp.save_checkpointables(
        tmp_path / "c", {"state": state, "config": {"lr": [0.1, None]}, "data": Counter(7)}
    )
    data = Counter()
    loaded = ocp.load_checkpointables(tmp_path / "c", {"data": data, "state": None, "config": None})
    assert list(loaded) == ["data", "state", "config"]
    assert loaded["config"] == {"lr": [0.1, None]}
    assert loaded["data"] is data
    assert data.value == 7
    assert np.array_equal(loaded["state"]["w"], state["w"])
    document = json.loads((tmp_path / "c" / "_CHECKPOINT_METADATA").read_text())
    kinds = {name: typestr.rsplit(".", 1)[1] for name, typestr in document["item_handlers"].items()}
    assert kinds == {
        "state": "PyTreeHandler",
        "config": "JsonHandler",
        "data": "StatefulCheckpointableHandler",
    }
    assert os.listdir(tmp_path) == ["c"]


async def test_both_verbs_can_be_awaited(tmp_path: Path) -> None:
    """W1: the async doors work from a caller's loop, and stage before they commit."""
    data = Counter(5)
    response = ocp.save_checkpointables_async(tmp_path / "c", {"state": {"a": 1}, "data": data})
    data.value = 6
    assert await response is None
    loading = ocp.load_checkpointables_async(tmp_path / "c", {"state": None, "data": data})
    await loading.staged()
    assert await loading == {"state": {"a": 1}, "data": data}
    assert data.value == 5


def test_a_subset_is_loaded(tmp_path: Path) -> None:
    """Names select; None or an empty dict, or metadata, ask for all."""
    ocp.save_checkpointables(tmp_path / "c", {"a": {"x": 1}, "b": {"y": 2.5}, "state": {"z": "t"}})
    everything = {"a": {"x": 1}, "b": {"y": 2.5}, "state": {"z": "t"}}
    assert ocp.load_checkpointables(tmp_path / "c", {"b": None}) == {"b": {"y": 2.5}}
    assert ocp.load_checkpointables(tmp_path / "c", {"b": {"y": 0}}) == {"b": {"y": 2}}
    for all_of_it in (None, {}, ocp.checkpointables_metadata(tmp_path / "c")):
        assert ocp.load_checkpointables(tmp_path / "c", all_of_it) == everything
    assert ocp.load(tmp_path / "c") == {"z": "t"}
    assert ocp.load(tmp_path / "c", checkpointable_name="a") == {"x": 1}


def test_what_save_wrote_load_checkpointables_reads(tmp_path: Path) -> None:
    """One state is a checkpoint of one checkpointable."""
    ocp.save(tmp_path / "c", {"a": np.arange(3)}, checkpointable_name="model")
    loaded = ocp.load_checkpointables(tmp_path / "c")
    assert list(loaded) == ["model"]
    assert loaded["model"]["a"].tolist() == [0, 1, 2]


def test_metadata_of_all(tmp_path: Path, json_named_config: ocp.Context) -> None:
    """B7.5, B11.4: abstract forms by name, None where there is none; times and custom metadata."""
    ocp.save_checkpointables(
        tmp_path / "c",
        {"state": {"w": np.zeros((2, 3))}, "config": {"a": 1}, "data": Counter()},
        custom_metadata={"run": 4},
    )
    found = ocp.checkpointables_metadata(tmp_path / "c")
    assert found.metadata["state"]["w"].shape == (2, 3)
    assert found.metadata["config"] is found.metadata["data"] is None
    assert found.custom_metadata == {"run": 4}
    assert found.init_timestamp_nsecs is not None
    with pytest.raises(ValueError, match="must pass an instance") as caught:
        ocp.load_checkpointables(tmp_path / "c", found)
    assert "'data'" in notes(caught.value)


def test_json_is_captured_when_the_call_returns(
    tmp_path: Path, json_named_config: ocp.Context
) -> None:
    """W24: what is done to a dict of JSON after the call is not saved."""
    config = {"k": "before"}
    response = ocp.save_checkpointables_async(tmp_path / "c", {"config": config})
    config["k"] = "after"
    response.result()
    assert ocp.load_checkpointables(tmp_path / "c") == {"config": {"k": "before"}}


def test_arrays_of_all_trees_can_be_donated(tmp_path: Path) -> None:
    """I3: all trees are captured when the call returns, not the first alone."""
    trees = {name: {"w": jnp.full((1000,), value)} for value, name in enumerate("abc")}
    response = ocp.save_checkpointables_async(tmp_path / "c", trees)
    for tree in trees.values():
        jax.block_until_ready(jax.jit(lambda x: x - 1, donate_argnums=0)(tree["w"]))
        tree["w"].delete()
    response.result()
    loaded = ocp.load_checkpointables(tmp_path / "c")
    assert {name: float(tree["w"].mean()) for name, tree in loaded.items()} == {
        "a": 0.0,
        "b": 1.0,
        "c": 2.0,
    }


def test_directories_of_others_are_not_loaded(tmp_path: Path) -> None:
    """A directory that nobody recorded and that is no tree does not break loading all."""
    ocp.save_checkpointables(tmp_path / "c", {"a": {"x": 1}})
    (tmp_path / "c" / "logs").mkdir()
    assert ocp.load_checkpointables(tmp_path / "c") == {"a": {"x": 1}}
    with pytest.raises(KeyError, match=r"\['logs'\].*Available checkpointables: \['a'\]"):
        ocp.load_checkpointables(tmp_path / "c", {"logs": None})


def test_b8_11_one_is_gone(tmp_path: Path) -> None:
    """What was removed by hand is unknown; the others load."""
    ocp.save_checkpointables(tmp_path / "c", {"a": {"x": 1}, "b": {"y": 2}})
    for path in sorted((tmp_path / "c" / "b").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "c" / "b").rmdir()
    assert ocp.load_checkpointables(tmp_path / "c") == {"a": {"x": 1}}
    with pytest.raises(KeyError, match="'b'"):
        ocp.load_checkpointables(tmp_path / "c", {"b": None})


# Tiers.


def test_tiers_are_run_one_after_the_other(tmp_path: Path) -> None:
    """B10.1: every first tier comes before every second one, for saves and loads."""
    log: list[str] = []
    objects = {name: Counter(1, log, name) for name in "abc"}
    ocp.save_checkpointables(tmp_path / "c", objects)
    assert sorted(log[:3]) == ["a1", "b1", "c1"]
    assert sorted(log[3:]) == ["a2", "b2", "c2"]
    log.clear()
    ocp.load_checkpointables(tmp_path / "c", dict(objects))
    assert sorted(log[:3]) == ["a1", "b1", "c1"]
    assert sorted(log[3:]) == ["a2", "b2", "c2"]


@pytest.mark.parametrize("tier", [1, 2])
def test_each_tier_is_concurrent(tier: int, tmp_path: Path) -> None:
    """Handlers that wait for each other in a tier all come through, saving and loading."""
    meeting = Meeting(tier, 3)
    objects = {name: meeting.member() for name in "abc"} | {"state": {"w": np.arange(10)}}
    ocp.save_checkpointables(tmp_path / "c", objects)
    members = {name: meeting.member() for name in "abc"}
    assert set(ocp.load_checkpointables(tmp_path / "c", members)) == set("abc")


def test_directories_come_after_the_call(tmp_path: Path) -> None:
    """B10.2: in tier 1 the directory is a promise; with the option it is there."""
    seen = []

    class Looker(Counter):
        async def save(self, directory: Any) -> Awaitable[None]:
            seen.append((directory.path.name, directory.path.exists()))
            return await super().save(directory)

    for at_once in (True, False):
        context = ocp.Context()
        context.asynchronous.create_directories_asynchronously = not at_once
        with context:
            ocp.save_checkpointables(tmp_path / str(at_once), {"x": Looker()})
    assert [name for name, _ in seen] == ["x", "x"]
    assert seen[1][1] is False
    assert seen[0][1] is True


def test_lazy_staging_returns_before_tier_one(tmp_path: Path) -> None:
    """With lazy staging the call does not wait for a handler's first tier."""

    class Slow(Counter):
        async def save(self, directory: Any) -> Awaitable[None]:
            while not gate.is_file():  # noqa: ASYNC110 - opened from another thread
                await asyncio.sleep(0.002)
            return await super().save(directory)

    gate = tmp_path / "gate"
    context = ocp.Context()
    context.asynchronous.staging = "lazy"
    with context:
        response = ocp.save_checkpointables_async(tmp_path / "c", {"x": Slow(3)})
    with pytest.raises(TimeoutError):
        response.wait_staged(0.02)
    gate.write_text("")
    response.wait_staged(20)
    response.result()
    gate.unlink()
