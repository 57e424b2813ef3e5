"""The one door: what every way to start an operation refuses, waits for, and how it ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from held_saves import STATE

import orbax_async as ocp
from orbax_async import _operation as operation
from orbax_async import errors
from orbax_async._commit import sequence
from orbax_async._engine import loop
from orbax_async.options import TransferPriority
from orbax_async.training import Checkpointer

Save = Callable[[Path, Any], Any]


def _of_run(path: Path, state: Any) -> Any:
    return Checkpointer(path).save_async(0, state)


SAVES: dict[str, Save] = {
    "save_async": ocp.save_async,
    "save_checkpointables_async": lambda path, state: ocp.save_checkpointables_async(
        path, {"state": state}
    ),
    "partial.save_async": ocp.partial.save_async,
    "Checkpointer": _of_run,
}
saves = pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)


@saves
def test_f28_no_save_writes_orbax_where_safetensors_are_asked_for(
    save: Save, tmp_path: Path
) -> None:
    """A layout that can only be loaded is refused by every save, the Checkpointer's too."""
    with (
        ocp.Context(checkpoint_layout="safetensors"),
        pytest.raises(errors.UnsupportedOptionError, match="SAFETENSORS is for loading alone"),
    ):
        save(tmp_path / "c", STATE)
    assert not list(tmp_path.rglob("*ocdbt*"))


class _Late:
    """Delays the leaf `late`, and holds its transfer until it is told to go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def key_priority(self, keypath: tuple[Any, ...]) -> TransferPriority:
        is_late = keypath[0].key == "late"
        return TransferPriority["ASYNCHRONOUS_DEPRIORITIZED" if is_late else "SYNCHRONOUS"]

    def on_transfer_start(self, keypath: tuple[Any, ...]) -> None:
        if keypath[0].key == "late":
            assert self.go_on.wait(30)

    def on_transfer_end(self, keypath: tuple[Any, ...]) -> None: ...

    def on_write_start(self, keypath: tuple[Any, ...]) -> None: ...

    def on_write_end(self, keypath: tuple[Any, ...]) -> None: ...


@saves
def test_f28_no_save_waits_for_delayed_leaves(save: Save, tmp_path: Path) -> None:
    """Every eager save returns once all is captured but the leaves that may be late."""
    late = _Late()
    context = ocp.Context()
    context.memory.serialization_status_callback = late
    context.memory.transfer_concurrent_bytes = 1000
    state = {"now": jnp.ones(4), "late": jnp.ones(4), "host": np.ones(4)}
    try:
        with context:
            response = save(tmp_path / "c", state)
        state["host"][:] = 7  # captured already
        with pytest.raises(TimeoutError):
            response.wait_staged(0.05)
    finally:
        late.go_on.set()
    response.result()
    assert response.progress.blocked_secs > 0


# I15: a response always settles.


@pytest.fixture
def exiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes every save end with a SystemExit of its own."""

    def leave(*_: Any, **__: Any) -> None:
        sys.exit(3)

    monkeypatch.setattr(sequence.Save, "_complete", leave)
    yield


@saves
def test_i15_what_would_end_the_thread_ends_the_response(
    save: Save, tmp_path: Path, exiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A BaseException inside an operation is its result; path and engine are free again."""
    response = save(tmp_path / "c", STATE)
    with pytest.raises(SystemExit):
        response.result(30)
    monkeypatch.undo()
    ocp.save(tmp_path / "other", STATE)
    assert not operation.PathLock._last


@pytest.mark.parametrize("owner", [operation.Operation, loop.anyio], ids=["operation", "engine"])
def test_i15_a_task_that_dies_settles_its_response(
    owner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the task ends before the operation could, its response tells of what."""

    def die(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of what nobody thought of")

    ocp.save(tmp_path / "first", STATE)
    with monkeypatch.context() as patched:
        patched.setattr(owner, "_run" if owner is operation.Operation else "CancelScope", die)
        context = ocp.Context()
        context.asynchronous.staging = "lazy"
        with context:
            response = ocp.save_async(tmp_path / "c", STATE)
        for wait in (response.result, response.wait_staged):
            with pytest.raises(ZeroDivisionError, match="nobody thought of"):
                wait(30)
    ocp.save(tmp_path / "c", STATE)


def test_what_fails_before_the_start_holds_nothing(tmp_path: Path) -> None:
    """A save that is refused after it queued for its path leaves the path free."""
    ocp.partial.save(tmp_path / "c", {"a": 1})
    with pytest.raises(errors.PartialSaveReplacementError):
        ocp.partial.save(tmp_path / "c", {"a": 2})
    assert not operation.PathLock._last
    ocp.partial.save(tmp_path / "c", {"b": 2})


def test_f4_a_callback_that_exits_ends_no_thread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`sys.exit` in a callback is logged; later callbacks run, of this and other operations."""
    for serial in range(2):
        called = threading.Event()
        context = ocp.Context()
        context.asynchronous.staging = "lazy"
        with context:
            response = ocp.save_async(tmp_path / str(serial), STATE)
            response.add_done_callback(lambda _: sys.exit(3))
            response.add_done_callback(lambda _, called=called: called.set())  # type: ignore[misc]
        assert called.wait(30)
    assert [each for each in caplog.messages if "tried to end its thread" in each]
