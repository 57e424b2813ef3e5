"""Committing beside others: what the dead have left is put back or swept, and many save at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from listing import entries

import orbax_async as ocp
from orbax_async import errors
from orbax_async._api import reader, writing
from orbax_async._commit import atomicity
from orbax_async._engine import loop
from orbax_async.tree import schema


def save_and_sweep(final: Path, state: Any) -> None:
    """Saves, and waits for the sweep that follows, so that it does not meet what a test makes."""
    ocp.save(final, state)
    while any(each.label == "sweep" for each in list(loop._current().running)):
        time.sleep(0.001)


# Leftovers: recovering and sweeping.


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owned(final: Path, use: str, *, pid: int, host: str | None = None, started: int = 1) -> Path:
    """Returns a temporary name of some owner."""
    host = atomicity._host() if host is None else host
    return final.with_name(f"{final.name}.orbax-checkpoint-tmp-{host}-{pid}-{started}-0-{use}")


def test_i4_an_interrupted_overwrite_is_put_back_by_a_reader(tmp_path: Path, dead_pid: int) -> None:
    """A checkpoint that a dead process had set aside returns to its place, and loads."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    assert ocp.load(final) == {"a": 1}
    assert entries(tmp_path) == ["checkpoint"]


def test_i4_an_interrupted_overwrite_is_put_back_by_a_save(tmp_path: Path, dead_pid: int) -> None:
    """A save sees the checkpoint that was set aside, and refuses or replaces it."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    with pytest.raises(errors.DestinationExistsError):
        ocp.save(final, {"a": 2})
    assert ocp.load(final) == {"a": 1}
    final.rename(owned(final, "old", pid=dead_pid))
    ocp.save(final, {"a": 2}, overwrite=True)
    assert ocp.load(final) == {"a": 2}
    assert entries(tmp_path) == ["checkpoint"]


def test_i4_two_readers_put_back_the_same_checkpoint(
    tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader whose rename comes second finds what the first one has put in place."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    aside = final.rename(owned(final, "old", pid=dead_pid))
    rename = os.rename

    def come_second(source: Any, target: Any) -> None:
        if source == str(aside):
            rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", come_second)
    assert ocp.load(final) == {"a": 1}
    assert entries(tmp_path) == ["checkpoint"]


def test_i4_what_is_read_across_an_overwrite_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that begins with the old checkpoint and ends with the new one gives no mixture."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"s": "old", "a": 1})
    original, seen = schema.load_strings, []

    def load_strings(data: bytes, wanted: Any) -> dict[str, str]:
        seen.append(original(data, wanted))
        if len(seen) == 1:  # the text is the old one's; now the arrays become the new one's
            writer = threading.Thread(
                target=ocp.save, args=(final, {"s": "new", "a": 2}), kwargs={"overwrite": True}
            )
            writer.start()
            writer.join()
        return dict(seen[-1])

    monkeypatch.setattr(schema, "load_strings", load_strings)
    assert ocp.load(final) == {"s": "new", "a": 2}
    assert [each["s"] for each in seen] == ["old", "new"]


def test_i4_a_reader_waits_for_a_writer_between_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that a living process has set aside is left alone, and looked for again."""
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    aside = Path(atomicity.temporary_path(str(final), "old"))
    final.rename(aside)
    original, looks = atomicity.recover, []

    def recover(path: str) -> bool:
        looks.append(original(path))
        if looks == [True, True]:
            aside.rename(final)
        return looks[-1]

    monkeypatch.setattr(atomicity, "recover", recover)
    assert ocp.load(final) == {"a": 1}
    assert looks == [True, True]


def test_i4_a_reader_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the living writer never puts anything in place, the reader says what is missing."""
    monkeypatch.setattr(reader, "_LOOKS", 2)
    final = tmp_path / "checkpoint"
    ocp.save(final, {"a": 1})
    aside = Path(atomicity.temporary_path(str(final), "old"))
    final.rename(aside)
    with pytest.raises(errors.InvalidLayoutError, match=str(final)):
        ocp.load(final)
    aside.rename(final)


def test_an_aside_is_not_put_back_over_a_checkpoint(tmp_path: Path, dead_pid: int) -> None:
    """What was set aside is only a leftover where its place is taken."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    shutil.copytree(owned(final, "old", pid=dead_pid), final)
    assert atomicity.recover(str(final)) is False
    assert atomicity.sweep(str(tmp_path)) == [str(owned(final, "old", pid=dead_pid))]
    assert entries(tmp_path) == ["checkpoint"]


@pytest.mark.leaves_temporaries
def test_a_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path: Path, dead_pid: int) -> None:
    """Leftovers of dead processes go; those of the living, of other hosts, and all else stay."""
    final = tmp_path / "checkpoint"
    dead = owned(final, "new", pid=dead_pid)
    reused = owned(final, "new", pid=os.getpid(), started=1)  # our number, an earlier process
    long_ago = owned(final, "new", pid=1, host="0123abcd")
    kept = [
        Path(atomicity.temporary_path(str(final))),
        Path(atomicity.temporary_path(str(final), "old")),
        owned(final, "new", pid=1, host="89ef0123"),
        tmp_path / "notes",
        tmp_path / "checkpoint.orbax-checkpoint-tmp",  # of stock Orbax
        tmp_path / "my.orbax-checkpoint-tmp-backup",
        tmp_path / f"{dead.name}.bak",
        tmp_path / "new",
    ]
    for path in (dead, reused, long_ago, *kept):
        (path / "state").mkdir(parents=True)
        (path / "state" / "data").write_text("data")
    day_before_yesterday = time.time() - 2 * 24 * 3600
    for path in (long_ago, long_ago / "state", long_ago / "state" / "data"):
        os.utime(path, (day_before_yesterday, day_before_yesterday))
    assert sorted(atomicity.sweep(str(tmp_path))) == sorted(map(str, (dead, reused, long_ago)))
    assert entries(tmp_path) == sorted(path.name for path in kept)
    assert all((path / "state" / "data").read_text() == "data" for path in kept)


def test_a_sweep_spares_who_could_not_say_when_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that had too many open files to look it up keeps what it writes."""
    monkeypatch.setattr(atomicity, "_own_starts", {})
    with monkeypatch.context() as patch:
        patch.setattr(atomicity, "_started", lambda _: 0)
        unknown = atomicity.temporary_path(str(tmp_path / "1"))
    known = atomicity.temporary_path(str(tmp_path / "2"))
    for path in (unknown, known):
        os.mkdir(path)
    assert unknown.split("-")[-3] == "0" != known.split("-")[-3]  # it asks again
    assert atomicity.sweep(str(tmp_path)) == []
    for path in (unknown, known):
        os.rmdir(path)  # neither was removed


def test_a_sweep_puts_back_what_was_set_aside(tmp_path: Path, dead_pid: int) -> None:
    """The only copy of a checkpoint is never swept, but returned to its place."""
    final = tmp_path / "checkpoint"
    save_and_sweep(final, {"a": 1})
    final.rename(owned(final, "old", pid=dead_pid))
    assert atomicity.sweep(str(tmp_path)) == []
    assert ocp.load(final) == {"a": 1}


def test_w28_each_commit_sweeps_in_the_background(tmp_path: Path, dead_pid: int) -> None:
    """A leftover beside a checkpoint is gone soon after the next commit there."""
    dead = owned(tmp_path / "other", "new", pid=dead_pid)
    (dead / "state").mkdir(parents=True)
    ocp.save(tmp_path / "checkpoint", {"a": 1})
    for _ in range(1000):
        if not dead.exists():
            break
        time.sleep(0.01)
    assert entries(tmp_path) == ["checkpoint"]


def test_only_temporary_directories_can_be_discarded(tmp_path: Path) -> None:
    """The last line of defence: a path without our mark is never removed."""
    with pytest.raises(AssertionError, match="not ours"):
        atomicity.discard(str(tmp_path))
    assert tmp_path.is_dir()


# Many saves at once.


def test_w7_a_second_save_to_one_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a save is under way another one to its path is refused, and does not harm it."""
    opened = threading.Event()
    original = writing.Save._publish

    def held(self: writing.Save) -> str | None:
        opened.wait(30)
        return original(self)

    monkeypatch.setattr(writing.Save, "_publish", held)
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
    original = writing.Save._publish
    published: list[int] = []

    def held(self: writing.Save) -> str | None:
        if self._custom_metadata["step"] == 0:
            opened.wait(30)
        published.append(self._custom_metadata["step"])
        return original(self)

    monkeypatch.setattr(writing.Save, "_publish", held)
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
    original = writing.Save._publish

    def fail_first(self: writing.Save) -> str | None:
        if self._custom_metadata:
            raise errors.CommitError("the first one fails")
        return original(self)

    monkeypatch.setattr(writing.Save, "_publish", fail_first)
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
