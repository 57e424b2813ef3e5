"""Saves and deletions of one process at one path: each has its turn, and many go on at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from listing import entries

import orbax_async as ocp
from orbax_async import errors
from orbax_async._commit import sequence

# Many saves at once.


def test_w7_a_second_save_to_one_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a save is under way another one to its path is refused, and does not harm it."""
    opened = threading.Event()
    original = sequence.Save._publish

    def held(self: sequence.Save) -> Any:
        opened.wait(30)
        return original(self)

    monkeypatch.setattr(sequence.Save, "_publish", held)
    final = tmp_path / "checkpoint"
    first = ocp.save_async(final, {"a": 1})
    with pytest.raises(errors.SaveInProgressError, match=r"(?s)checkpoint is under way.*overwrite"):
        ocp.save_async(f"{final}/", {"a": 2})
    elsewhere = ocp.save_async(tmp_path / "elsewhere", {"a": 3})
    opened.set()
    first.result()
    elsewhere.result()
    assert ocp.load(final) == {"a": 1}
    with pytest.raises(errors.DestinationExistsError):
        ocp.save_async(final, {"a": 4})


def test_w7_overwrites_of_one_path_follow_each_other(tmp_path: Path) -> None:
    """Saves with `overwrite` to one path commit in the order of their calls; the last one stays."""
    final = tmp_path / "checkpoint"
    order: list[int] = []
    responses = []
    for step in range(6):
        responses.append(ocp.save_async(final, {"step": step}, overwrite=True))
        responses[-1].add_done_callback(lambda _, step=step: order.append(step))  # type: ignore[misc]
    for response in reversed(responses):
        response.result()
    assert ocp.load(final) == {"step": 5}
    assert entries(tmp_path) == ["checkpoint"]


def test_w7_a_cancelled_save_does_not_let_the_next_one_pass_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three overwrites the middle one is cancelled; the third still waits for the first."""
    opened = threading.Event()
    original = sequence.Save._publish
    published: list[int] = []

    def held(self: sequence.Save) -> Any:
        if self.custom_metadata["step"] == 0:
            opened.wait(30)
        published.append(self.custom_metadata["step"])
        return original(self)

    monkeypatch.setattr(sequence.Save, "_publish", held)
    final = tmp_path / "checkpoint"
    first, second, third = (
        ocp.save_async(final, {"step": i}, overwrite=True, custom_metadata={"step": i})
        for i in range(3)
    )
    assert second.cancel()
    with pytest.raises(errors.OperationCancelledError):
        second.result()
    with pytest.raises(TimeoutError):
        third.result(timeout=0.1)
    with pytest.raises(errors.SaveInProgressError):
        ocp.save_async(tmp_path / "checkpoint", {"step": 9})
    opened.set()
    third.result()
    assert first.done()
    assert published == [0, 2]
    assert ocp.load(final) == {"step": 2}
    assert entries(tmp_path) == ["checkpoint"]


def test_w7_a_failed_save_lets_the_next_one_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the first of two saves fails, the second one is made all the same."""
    original = sequence.Save._publish

    def fail_first(self: sequence.Save) -> Any:
        if self.custom_metadata:
            raise errors.CommitError("the first one fails")
        return original(self)

    monkeypatch.setattr(sequence.Save, "_publish", fail_first)
    final = tmp_path / "checkpoint"
    first = ocp.save_async(final, {"a": 1}, overwrite=True, custom_metadata={"fails": True})
    second = ocp.save_async(final, {"a": 2}, overwrite=True)
    with pytest.raises(errors.CommitError, match="the first one fails"):
        first.result()
    second.result()
    assert ocp.load(final) == {"a": 2}


def test_w6_many_threads_save_and_load_at_once(
    tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """Six threads save and load to paths of their own and one of all, and none gets in the way."""
    rounds = soak(5, 20)
    problems: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for index in range(rounds):
                value = thread * 1000 + index
                state = {"w": np.full(100, value), "j": jnp.full(50, value), "s": str(value)}
                ocp.save(tmp_path / f"{thread}-{index}", state)
                loaded = ocp.load(tmp_path / f"{thread}-{index}")
                assert (loaded["w"] == value).all()
                assert (np.asarray(loaded["j"]) == value).all()
                assert loaded["s"] == str(value)
                ocp.save(tmp_path / "shared", state, overwrite=True)
                shared = ocp.load(tmp_path / "shared")
                assert (shared["w"] == int(shared["s"])).all()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    expected = {f"{thread}-{index}" for thread in range(6) for index in range(rounds)}
    assert set(os.listdir(tmp_path)) == expected | {"shared"}
