"""Directories: the local one, and one in memory that is like a file system or like a bucket."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from directory_conformance import DirectoryConformance
from memory_directory import LIKE_A_BUCKET, LIKE_A_FILE_SYSTEM, MemoryStore

from orbax_async._storage import local
from orbax_async._storage.directory import Capability, Directory, Entry
from orbax_async._storage.local import LocalDirectory, open_directory, opened_by


class TestLocalDirectory(DirectoryConformance):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Directory:
        return LocalDirectory(str(tmp_path))


class TestMemoryDirectory(DirectoryConformance):
    @pytest.fixture(params=[LIKE_A_FILE_SYSTEM, LIKE_A_BUCKET], ids=["file system", "bucket"])
    def directory(self, request: pytest.FixtureRequest) -> Directory:
        directory = MemoryStore(request.param).open("/run")
        directory.make()
        return directory


def test_a_path_is_opened_as_a_local_directory_unless_a_block_says_otherwise(
    tmp_path: Path,
) -> None:
    """This is the way in for a test's own directories."""
    store = MemoryStore()
    with opened_by(store.open):
        assert open_directory("/run") == store.open("/run")
    assert open_directory(str(tmp_path)) == LocalDirectory(str(tmp_path))


# What only files of the local system have.


def test_a_link_is_not_followed_where_it_would_be_removed(tmp_path: Path) -> None:
    """A link counts as what it leads to where it is listed, and as itself where it is removed."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "file").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "to_nothing").symlink_to(tmp_path / "absent")
    directory = LocalDirectory(str(tmp_path / "run"))
    assert directory.entries() == [Entry("link", True), Entry("to_nothing", False)]
    assert [getattr(directory.status(each.name), "kind", None) for each in directory.entries()] == [
        *("link", "link")
    ]
    followed = directory.status("link", follow_links=True)
    assert followed is not None
    assert followed.kind == "directory"
    assert directory.status("to_nothing", follow_links=True) is None
    assert directory.read("link/file") == b"text"
    assert directory.read("to_nothing") is None
    for entry in directory.entries():
        directory.remove(entry.name)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    directory.remove()
    assert (tmp_path / "elsewhere" / "file").read_text() == "text"


@pytest.mark.skipif(os.name == "nt", reason="permission bits of POSIX")
def test_a_directory_has_the_mode_that_is_asked_for(tmp_path: Path) -> None:
    """Also where the umask would take bits away; the umask's own bits without one."""
    before = os.umask(0o027)
    try:
        (LocalDirectory(str(tmp_path)) / "shared").make(mode=0o777)
        (LocalDirectory(str(tmp_path)) / "usual").make()
    finally:
        os.umask(before)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()}
    assert modes == {"shared": 0o777, "usual": 0o750}


def test_what_is_synced_must_be_there(tmp_path: Path) -> None:
    """The error names the file that is missing, not the directory."""
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/absent"):
        LocalDirectory(str(tmp_path)).sync(["", "absent"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a lock of POSIX")
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """While another process holds it there is none; when that is killed, there is."""
    directory = LocalDirectory(str(tmp_path))
    code = (
        "from orbax_async._storage.local import LocalDirectory\n"
        f"lock = LocalDirectory({str(tmp_path)!r}).lock()\n"
        "print(lock is not None, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert directory.lock() is None
        process.kill()
        process.wait()
    lock = directory.lock()
    assert lock is not None
    lock.release()


def test_what_can_not_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two file systems."""

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    directory = LocalDirectory(str(tmp_path))
    directory.write("file", b"text")
    directory.link("file", directory / "below", "name")
    assert directory.read("below/name") == b"text"
    assert directory.can(Capability.LINK)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_writing_back_is_asked_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux is told to begin with all of a file, and takes it; other systems are not asked."""
    path, asked = tmp_path / "data", []
    path.write_bytes(b"x" * (4 << 20))
    ask: Any = local._sync_file_range()

    def asking(descriptor: int, *how: int) -> None:
        asked.append((os.readlink(f"/proc/self/fd/{descriptor}"), how, ask(descriptor, *how)))

    monkeypatch.setattr(local, "_sync_file_range", lambda: asking)
    directory = LocalDirectory(str(tmp_path))
    directory.start_writeback("data")
    assert asked == [(str(path), (0, 0, 2), 0)]
    with pytest.raises(FileNotFoundError):
        directory.start_writeback("nothing")
    monkeypatch.setattr(local, "_sync_file_range", lambda: None)
    directory.start_writeback("data")
    assert len(asked) == 1


FORKED = """
import os, sys, time
from orbax_async._storage.local import LocalDirectory

lock = LocalDirectory(sys.argv[1]).lock()
assert lock is not None
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(60)
print(child, flush=True)
os._exit(0)  # as if killed
"""


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_a_forked_child_does_not_hold_its_parents_locks(tmp_path: Path) -> None:
    """F24: a parent that is killed holds nothing any more, although its children live on."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)], stdout=subprocess.PIPE, check=True
    )
    child = int(done.stdout.split()[0])
    try:
        lock = LocalDirectory(str(tmp_path)).lock()
    finally:
        os.kill(child, signal.SIGKILL)
    assert lock is not None
    lock.release()


def test_what_can_be_removed_goes_although_something_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F25: one file that can't be removed keeps itself and the directories above it alone."""
    for name in ("a/1", "a/2", "b/3", "4"):
        LocalDirectory(str(tmp_path / "tree")).write(name, b"")
    unlink = os.unlink

    def refuse(path: object, **how: object) -> None:
        if os.path.basename(str(path)) == "2":
            raise PermissionError(1, "Operation not permitted", path)
        unlink(path, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(PermissionError, match="not permitted"):
            LocalDirectory(str(tmp_path / "tree")).remove()
    assert LocalDirectory(str(tmp_path / "tree")).walk() == (["a/2"], ["a", ""])
