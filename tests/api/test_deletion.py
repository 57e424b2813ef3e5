"""Deleting: whole checkpoints in one step, one checkpointable so that a crash can't hide it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched_directory import Crash, Crashed, Fault, before, on, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._commit import removal
from orbax_async._storage.local import opened_by

RECORD = "_CHECKPOINT_DELETION"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of three checkpointables."""
    ocp.save_checkpointables(
        tmp_path / "c", {"state": {"w": np.arange(3)}, "other": {"b": 1}, "third": {"c": "t"}}
    )
    return tmp_path / "c"


def held(path: Path) -> list[str]:
    """Returns what a checkpoint holds, and checks that it loads."""
    names = sorted(ocp.load_checkpointables(path))
    recorded = json.loads((path / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    assert sorted(recorded) == names
    return names


INTERRUPTED = {
    "record": (1, on("remove", path="*/other")),
    "tree": (2, on("write", path="*/.orbax-delete-*")),
    "metadata": (1, on("remove", path=f"*/{RECORD}")),
}


@pytest.fixture(params=INTERRUPTED.values(), ids=INTERRUPTED)
def interrupted(request: pytest.FixtureRequest, path: Path) -> Path:
    """A checkpoint whose deletion of `other` has stopped after the step named."""
    with opened_by(watched(Crash(*request.param))), pytest.raises(Crashed):
        ocp.delete(path, checkpointable_name="other")
    assert (path / RECORD).is_file()
    return path


# Whole checkpoints.


def test_a_checkpoint_is_deleted(path: Path) -> None:
    """It is gone, with nothing beside it; again it is missing, which may be allowed."""
    assert ocp.delete(path) is True
    assert os.listdir(path.parent) == []
    with pytest.raises(FileNotFoundError, match="does not exist") as caught:
        ocp.delete(path)
    assert isinstance(caught.value, errors.NothingToDeleteError)
    assert ocp.delete(path, missing_ok=True) is False


async def test_deleting_can_be_awaited(path: Path) -> None:
    """B12.6: the response of `delete_async` is like any other; errors come before it."""
    seen = []
    response = ocp.delete_async(path)
    response.add_done_callback(lambda done: seen.append(done.result()))
    assert await response is True
    assert response.done()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        ocp.delete_async(path)
    assert await ocp.delete_async(path, missing_ok=True) is False


def test_a_checkpoint_goes_out_of_sight_in_one_step(path: Path) -> None:
    """I4: when the first file is removed, no reader finds a checkpoint any more."""
    seen = []

    def look() -> None:
        (hidden,) = path.parent.iterdir()
        seen.append((path.exists(), ocp.is_orbax_checkpoint(hidden), os.listdir(path.parent)))

    with opened_by(watched(before(on("remove"), look))):
        ocp.delete(path)
    ((is_there, is_checkpoint, beside),) = seen
    assert not is_there
    assert not is_checkpoint
    assert len(beside) == 1


@pytest.mark.leaves_temporaries
def test_a_deletion_that_fails_half_way_says_what_is_left(
    path: Path,
) -> None:
    """What could not be removed is named; the checkpoint is out of sight nevertheless."""
    fault = Fault(errno.EACCES, on("remove"))
    deleted = r"is deleted, but what it held, now at .*-new"
    with opened_by(watched(fault)), pytest.raises(errors.CommitError, match=deleted):
        ocp.delete(path)
    assert not path.exists()


def test_what_is_not_there_in_time_is_waited_for(path: Path) -> None:
    """A deletion follows a save to the same path that was begun before it."""
    saving = ocp.save_async(path, {"a": 1}, overwrite=True)
    deleting = ocp.delete_async(path)
    new = ocp.save_async(path.parent / "new", {"a": 1})
    assert deleting.result() is True
    saving.result()
    new.result()
    assert os.listdir(path.parent) == ["new"]


def test_a_first_save_is_waited_for(tmp_path: Path) -> None:
    """Also where the save is the one that makes the checkpoint."""
    saving = ocp.save_async(tmp_path / "c", {"a": np.zeros(100_000)})
    assert ocp.delete(tmp_path / "c") is True
    saving.result()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
        lambda path: (path / "_CHECKPOINT_METADATA").write_text("{"),
        lambda path: (path / RECORD).write_text("{"),
        lambda path: shutil.rmtree(path / "state"),
        lambda path: [shutil.rmtree(path), path.mkdir()],
    ],
    ids=["no metadata", "bad metadata", "bad record", "no state", "empty"],
)
def test_damaged_checkpoints_can_be_deleted(damage: Callable[[Path], Any], path: Path) -> None:
    """What once was a checkpoint, and what is empty, can go."""
    damage(path)
    assert ocp.delete(path) is True
    assert not path.exists()


# One checkpointable.


def test_one_is_deleted(path: Path) -> None:
    """B12.2: its directory and its entry go; the others, and all other metadata, stay."""
    before = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    assert ocp.delete(path, checkpointable_name="other") is True
    assert held(path) == ["state", "third"]
    after = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    assert before.pop("item_handlers").keys() - after.pop("item_handlers").keys() == {"other"}
    assert before == after
    names = {"_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint", "state", "third"}
    assert set(os.listdir(path)) == names
    with pytest.raises(FileNotFoundError, match=r"'other' does not exist at .*third"):
        ocp.delete(path, checkpointable_name="other")
    assert ocp.delete(path, checkpointable_name="other", missing_ok=True) is False


def test_the_last_one_is_not_deleted(path: Path) -> None:
    """B12.2: what would be left is no checkpoint."""
    ocp.delete(path, checkpointable_name="other")
    ocp.delete(path, checkpointable_name="third")
    with pytest.raises(ValueError, match="Cannot delete the final checkpointable"):
        ocp.delete(path, checkpointable_name="state")
    assert held(path) == ["state"]


def test_b12_4_readers_leave_out_what_is_being_deleted(interrupted: Path) -> None:
    """After a crash at any step the others load, and what was to go is said to be going."""
    assert sorted(ocp.load_checkpointables(interrupted)) == ["state", "third"]
    assert sorted(ocp.checkpointables_metadata(interrupted).metadata) == ["state", "third"]
    assert ocp.load(interrupted)["w"].tolist() == [0, 1, 2]
    for ask in (
        lambda: ocp.load_checkpointables(interrupted, {"other": None}),
        lambda: ocp.load(interrupted, checkpointable_name="other"),
        lambda: ocp.metadata(interrupted, "other"),
    ):
        with pytest.raises(errors.DeletionInProgressError, match="delete it again") as caught:
            ask()
        assert isinstance(caught.value, RuntimeError)


def test_b12_4_nothing_else_is_done_before_it_is_finished(interrupted: Path) -> None:
    """Neither a save nor another deletion touches the checkpoint."""
    before = sorted(interrupted.rglob("*"))
    for overwrite in (True, False):
        with pytest.raises(errors.DeletionInProgressError):
            ocp.save(interrupted, {"a": 1}, overwrite=overwrite)
    for name in ("third", "missing"):
        with pytest.raises(errors.DeletionRecoveryError, match="'other'"):
            ocp.delete(interrupted, checkpointable_name=name, missing_ok=True)
    assert sorted(interrupted.rglob("*")) == before


def test_b12_4_deleting_again_finishes(interrupted: Path) -> None:
    """From any step; nothing is left of the attempt."""
    assert ocp.delete(interrupted, checkpointable_name="other") is True
    assert held(interrupted) == ["state", "third"]
    assert not [name for name in os.listdir(interrupted) if "delet" in name.lower()]


def test_b12_4_the_whole_can_be_deleted_instead(interrupted: Path) -> None:
    """An unfinished deletion of a part does not protect the rest."""
    assert ocp.delete(interrupted) is True
    assert not interrupted.exists()


def test_before_the_record_nothing_has_happened(path: Path) -> None:
    """A deletion that can't be recorded changes nothing, and says why."""
    fault = Fault(errno.ENOSPC, on("sync"))
    said = r"_CHECKPOINT_DELETION.*No space"
    with opened_by(watched(fault)), pytest.raises(errors.CommitError, match=said):
        ocp.delete(path, checkpointable_name="other")
    assert held(path) == ["other", "state", "third"]
    assert not [name for name in os.listdir(path) if "delet" in name.lower()]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"checkpointable_name": "other"}', "it lacks"),
    ],
)
def test_a_damaged_record(record: str, said: str, path: Path) -> None:
    """A record that can't be understood is named, and no part is deleted."""
    (path / RECORD).write_text(record)
    with pytest.raises(errors.DeletionRecoveryError, match=f"{RECORD} is damaged.*{said}|{said}"):
        ocp.delete(path, checkpointable_name="other")
    assert (path / "other").is_dir()


def test_a_record_of_a_move(path: Path) -> None:
    """A deletion that was to move the files elsewhere is not finished by removing them."""
    removal.begin(str(path), "other", {})
    record = json.loads((path / RECORD).read_text())
    (path / RECORD).write_text(json.dumps(record | {"destination": "trash"}))
    with pytest.raises(errors.DeletionRecoveryError, match="moved to 'trash'"):
        ocp.delete(path, checkpointable_name="other")
    assert (path / "other").is_dir()


# Guards.


def test_b12_3_what_is_no_checkpoint_is_not_deleted(path: Path) -> None:
    """A directory of checkpoints, a part of one, a file, a link and a root are each refused."""
    folder = path.parent
    (folder / "file").write_text("")
    (folder / "link").symlink_to(path)
    (folder / "junk" / "sub").mkdir(parents=True)
    for target, kind, said in (
        (folder, errors.InvalidLayoutError, "holds checkpoints"),
        (folder / "junk", errors.InvalidLayoutError, "Not an Orbax checkpoint root"),
        (path / "state", errors.InvalidLayoutError, "subdirectory of the checkpoint"),
        (folder / "file", NotADirectoryError, "is a file"),
        (folder / "link", ValueError, "through a symlink"),
        (Path("/"), ValueError, "storage root"),
    ):
        for verb in (ocp.delete, ocp.delete_async):
            with pytest.raises(kind, match=said):
                verb(target, missing_ok=True)
    assert held(path) == ["other", "state", "third"]
    assert (folder / "link").is_symlink()


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "metrics", "AUTO", RECORD])
def test_b12_3_names_are_checked(name: str, path: Path) -> None:
    """A name that nothing can have is refused, even where it may be missing."""
    with pytest.raises(ValueError):
        ocp.delete(path, checkpointable_name=name, missing_ok=True)


def test_b12_3_types_are_checked(path: Path) -> None:
    """Names are strings, flags are bools, paths are paths."""
    with pytest.raises(TypeError):
        ocp.delete(path, checkpointable_name=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing_ok"):
        ocp.delete(path, missing_ok=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ocp.delete(None)  # type: ignore[arg-type]
    assert path.is_dir()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("", ValueError),
        ("/trash", ValueError),
        ("a/../b", ValueError),
        ("gs://bucket/trash", ValueError),
        ("trash", errors.UnsupportedOptionError),
    ],
)
def test_moving_instead_of_deleting(value: str, kind: type[Exception], path: Path) -> None:
    """The option of cloud storage is checked and refused; saving and loading ignore it."""
    context = ocp.Context()
    context.deletion.gcs_deletion_options.todelete_full_path = value
    with context:
        for name in (None, "other"):
            with pytest.raises(kind, match="todelete_full_path"):
                ocp.delete(path, checkpointable_name=name)
        ocp.save(path.parent / "d", {"a": 1})
        assert ocp.load(path.parent / "d") == {"a": 1}
    assert held(path) == ["other", "state", "third"]
