"""What every directory must do, as a class of tests to subclass."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tensorstore as ts

from orbax_async._storage.array_store import shared_context
from orbax_async._storage.directory import Capability, Directory, Entry, sizes


class DirectoryConformance:
    """A subclass gives the fixture `directory`: one that is there, with nothing in it."""

    @pytest.fixture
    def directory(self) -> Directory:
        raise NotImplementedError

    # Names.

    def test_a_name_below_is_a_directory_with_a_path_of_its_own(self, directory: Directory) -> None:
        below = directory / "a" / "b"
        assert below == directory / "a/b"
        assert hash(below) == hash(directory / "a/b")
        assert below != directory / "a"
        assert below.path == f"{directory.path}/a/b"
        assert (below.name, below.parent.name) == ("b", "a")
        assert below.parent.parent == directory == directory / ""

    def test_the_root_is_its_own_parent(self, directory: Directory) -> None:
        each = directory
        for _ in range(100):
            each = each.parent
        assert each.parent == each

    def test_a_directory_is_there_or_not(self, directory: Directory) -> None:
        absent = directory / "absent" / "below"
        assert absent.status() is None
        assert absent.entries() == []
        assert absent.walk() == ([], [])
        assert absent.read("file") is None
        absent.remove()
        absent.remove("file")
        absent.remove_if_empty()
        assert directory.entries() == []

    # Looking.

    def test_status_tells_what_there_is(self, directory: Directory) -> None:
        directory.write("file", b"12345")
        (directory / "below").make()
        found = {name: directory.status(name) for name in ("", "file", "below", "absent")}
        assert {name: each and each.kind for name, each in found.items()} == {
            **{"": "directory", "file": "file", "below": "directory"},
            "absent": None,
        }
        assert found["file"] is not None
        assert found["file"].nbytes == 5
        assert (directory / "below").status() == found["below"]
        for name, each in found.items():  # no link is among them
            assert directory.status(name, follow_links=True) == each
        assert directory.status("file/below") is None

    def test_status_tells_a_file_from_the_next_of_its_name(self, directory: Directory) -> None:
        seen = []
        for text in (b"one", b"two"):
            directory.write("file", text)
            seen += [directory.status("file"), directory.status("file")]
            directory.write("other", text)
            directory.remove("file")
        first, again, second, _ = seen
        assert first is not None
        assert second is not None
        assert first == again
        assert first.identity != second.identity
        assert 0 < first.modified_nsecs <= second.modified_nsecs

    def test_entries_are_what_lies_directly_inside_by_name(self, directory: Directory) -> None:
        for name in ("b", "a/1", "a/deep/2", "c.d"):
            directory.write(name, b"")
        (directory / "empty").make()
        assert directory.entries() == [
            *(Entry("a", True), Entry("b", False), Entry("c.d", False), Entry("empty", True))
        ]
        assert (directory / "a").entries() == [Entry("1", False), Entry("deep", True)]
        assert (directory / "empty").entries() == (directory / "b").entries() == []

    def test_a_walk_finds_everything_and_the_deepest_first(self, directory: Directory) -> None:
        for name in ("b", "a/1", "a/deep/2", "other/3"):
            directory.write(name, b"")
        files, directories = directory.walk()
        assert sorted(files) == ["a/1", "a/deep/2", "b", "other/3"]
        assert sorted(directories) == ["", "a", "a/deep", "other"]
        assert directories[-1] == ""
        assert directories.index("a/deep") < directories.index("a")
        files, directories = (directory / "a").walk()
        assert (sorted(files), directories) == (["1", "deep/2"], ["deep", ""])

    def test_sizes_are_those_of_all_files(self, directory: Directory) -> None:
        for name in ("b", "a/1", "a/deep/22"):
            directory.write(name, name.encode())
        (directory / "empty").make()
        assert sizes(directory) == {"b": 1, "a/1": 3, "a/deep/22": 9}
        assert sizes(directory / "absent") == {}

    @pytest.mark.parametrize(
        ("start", "nbytes"), [(0, None), (3, None), (3, 4), (0, 0), (8, 5), (10, None), (20, 5)]
    )
    def test_a_file_is_read_whole_or_in_ranges(
        self, directory: Directory, start: int, nbytes: int | None
    ) -> None:
        data = bytes(range(10))
        directory.write("below/file", data)
        stop = None if nbytes is None else start + nbytes
        assert directory.read("below/file", start, nbytes) == data[start:stop]
        assert (directory / "below").read("file", start, nbytes) == data[start:stop]
        assert directory.read("below/absent", start, nbytes) is None
        assert directory.read("below/file/absent", start, nbytes) is None

    def test_something_can_be_made_in_a_directory(self, directory: Directory) -> None:
        assert directory.is_writable()
        assert not (directory / "absent").is_writable()

    # Changing.

    def test_a_directory_is_made_once_and_below_another(self, directory: Directory) -> None:
        below = directory / "below"
        below.make()
        assert directory.entries() == [Entry("below", True)]
        with refused(FileExistsError, below.path):
            below.make()
        directory.write("file", b"")
        with refused(FileExistsError, f"{directory.path}/file"):
            (directory / "file").make()
        with refused(FileNotFoundError, f"{directory.path}/absent/below"):
            (directory / "absent" / "below").make()
        (directory / "private").make(mode=0o700)
        assert (directory / "private").status() is not None

    def test_one_of_many_makes_a_directory(self, directory: Directory) -> None:
        assert at_once(8, (directory / "below").make) == 1

    @pytest.mark.parametrize("data", [b"", b"text", bytes(3 << 20)], ids=len)
    def test_a_file_is_written_whole(self, directory: Directory, data: bytes) -> None:
        directory.write("a/b/file", b"something else")
        directory.write("a/b/file", data)
        assert directory.read("a/b/file") == data
        assert directory.walk()[0] == ["a/b/file"]

    def test_a_file_is_written_only_if_there_is_none(self, directory: Directory) -> None:
        directory.write("a/file", b"first", only_if_absent=True)
        with refused(FileExistsError, f"{directory.path}/a/file"):
            directory.write("a/file", b"second", only_if_absent=True)
        assert directory.read("a/file") == b"first"

    def test_one_of_many_writes_a_file(self, directory: Directory) -> None:
        assert at_once(8, lambda: directory.write("file", b"x", only_if_absent=True)) == 1

    def test_removal_takes_all_that_is_inside(self, directory: Directory) -> None:
        for name in ("file", "a/1", "a/deep/2", "a.b", "b/3"):
            directory.write(name, b"")
        directory.remove("file")
        directory.remove("a")
        (directory / "b").remove()
        for name in ("file", "a", "b", "absent", "a.b/absent"):
            directory.remove(name)  # what is gone already is fine
        assert directory.entries() == [Entry("a.b", False)]
        directory.remove()
        assert directory.status() is None

    def test_only_an_empty_directory_is_removed_if_empty(self, directory: Directory) -> None:
        directory.write("below/file", b"")
        (directory / "below").remove_if_empty()
        (directory / "below" / "file").remove_if_empty()
        assert directory.read("below/file") == b""
        (directory / "empty").make()
        (directory / "empty").remove_if_empty()
        assert directory.entries() == [Entry("below", True)]

    def test_a_touch_renews_the_time_of_the_last_change(self, directory: Directory) -> None:
        (directory / "below").make()
        first = (directory / "below").status()
        (directory / "below").touch()
        second = (directory / "below").status()
        assert first is not None and second is not None
        assert first.modified_nsecs <= second.modified_nsecs != 0
        with refused(FileNotFoundError, f"{directory.path}/absent"):
            (directory / "absent").touch()

    # Lasting.

    def test_files_and_directories_are_made_durable(self, directory: Directory) -> None:
        directory.write("below/file", b"text")
        directory.start_writeback("below/file")
        directory.sync(["below/file", "below", ""])
        directory.sync([])
        assert directory.read("below/file") == b"text"

    # Seen by TensorStore.

    def test_tensorstore_sees_the_same_files(self, directory: Directory) -> None:
        directory.write("below/ours", b"text")
        store = open_kvstore(directory.kvstore())
        assert store["below/ours"] == b"text"
        store["below/deep/theirs"] = bytes(5000)
        assert directory.read("below/deep/theirs") == bytes(5000)
        assert sorted(directory.walk()[0]) == ["below/deep/theirs", "below/ours"]
        assert (directory / "below").entries() == [Entry("deep", True), Entry("ours", False)]
        assert open_kvstore((directory / "below").kvstore())["ours"] == b"text"
        directory.remove("below")
        assert store.list().result() == []

    def test_a_database_lies_in_it(self, directory: Directory) -> None:
        spec = {"driver": "ocdbt", "base": (directory / "database").kvstore()}
        transaction = ts.Transaction(atomic=True)
        open_kvstore(spec).with_transaction(transaction)["key"] = bytes(5000)
        transaction.commit_sync()
        assert open_kvstore(spec)["key"] == bytes(5000)
        names = [entry.name for entry in (directory / "database").entries()]
        assert names == ["d", "manifest.ocdbt"]

    # Capabilities.

    def test_what_it_can_do_is_known(self, directory: Directory) -> None:
        for capability in Capability:
            answer = directory.can(capability)
            assert answer is (directory / "below").can(capability)

    def test_a_directory_takes_another_name(self, directory: Directory) -> None:
        needs(directory, Capability.RENAME)
        directory.write("old/a/file", b"text")
        (directory / "elsewhere").make()
        (directory / "old").rename(directory / "new")
        (directory / "new").rename(directory / "elsewhere" / "old")
        assert directory.entries() == [Entry("elsewhere", True)]
        assert directory.read("elsewhere/old/a/file") == b"text"
        with refused(FileNotFoundError, f"{directory.path}/old"):
            (directory / "old").rename(directory / "new")

    def test_a_file_takes_the_name_of_another(self, directory: Directory) -> None:
        needs(directory, Capability.RENAME)
        directory.write("below/new", b"new")
        directory.write("below/old", b"old")
        directory.replace("below/new", "below/old")
        directory.replace("below/old", "name")
        assert (directory / "below").entries() == []
        assert directory.read("name") == b"new"
        with refused(FileNotFoundError, f"{directory.path}/absent"):
            directory.replace("absent", "name")

    def test_two_directories_exchange_their_names(self, directory: Directory) -> None:
        needs(directory, Capability.EXCHANGE)
        directory.write("one/a", b"1")
        directory.write("below/two/b", b"2")
        if not (directory / "one").exchange(directory / "below/two"):
            assert directory.read("one/a") == b"1"
            pytest.skip("it turns out that it can't")
        assert directory.read("one/b") == b"2"
        assert directory.read("below/two/a") == b"1"
        assert len(directory.walk()[0]) == 2
        with pytest.raises(FileNotFoundError):
            (directory / "one").exchange(directory / "absent")
        assert directory.read("one/b") == b"2"

    def test_a_file_has_a_second_name(self, directory: Directory) -> None:
        needs(directory, Capability.LINK)
        directory.write("one/file", b"text")
        (directory / "one").link("file", directory / "two", "below/name")
        assert directory.read("two/below/name") == b"text"
        with refused(FileExistsError, f"{directory.path}/two/below/name"):
            (directory / "one").link("file", directory / "two", "below/name")
        with refused(FileNotFoundError, f"{directory.path}/one/absent"):
            (directory / "one").link("absent", directory / "two", "other")
        directory.remove("one")
        assert directory.read("two/below/name") == b"text"

    def test_a_lock_is_held_until_it_is_released(self, directory: Directory) -> None:
        needs(directory, Capability.LOCK)
        below = directory / "below"
        assert below.lock() is None
        below.make()
        lock = below.lock()
        assert lock is not None
        assert below.lock() is None
        assert directory.entries() == [Entry("below", True)]
        lock.release()
        lock.release()  # once more does nothing
        other = below.lock()
        assert other is not None
        lock.release()
        assert below.lock() is None
        other.release()

    def test_a_lock_goes_with_the_directory(self, directory: Directory) -> None:
        needs(directory, Capability.LOCK)
        needs(directory, Capability.RENAME)
        (directory / "old").make()
        lock = (directory / "old").lock()
        assert lock is not None
        (directory / "old").rename(directory / "new")
        assert (directory / "new").lock() is None
        (directory / "old").make()
        other = (directory / "old").lock()
        assert other is not None
        other.release()
        lock.release()

    def test_its_files_are_files_of_the_system(self, directory: Directory) -> None:
        needs(directory, Capability.MAP)
        directory.write("below/file", b"text")
        with open(f"{directory.path}/below/file", "rb") as file:
            assert file.read() == b"text"


def refused(kind: type[OSError], path: str) -> Any:
    """Expects an OSError that names a path."""
    return pytest.raises(kind, match=path)


def needs(directory: Directory, capability: Capability) -> None:
    """Skips a test of what a directory can't do."""
    if not directory.can(capability):
        pytest.skip(f"no {capability.value}")


def at_once(count: int, action: Callable[[], None]) -> int:
    """Does something on many threads; returns how many did not find that it exists."""
    begin, successes = threading.Barrier(count), itertools.count()

    def run() -> None:
        begin.wait()
        try:
            action()
        except FileExistsError:
            return
        next(successes)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next(successes)


def open_kvstore(spec: dict[str, Any]) -> ts.KvStore:
    """Opens what a directory says of itself, in a context of its own."""
    return ts.KvStore.open(spec, context=ts.Context({}, parent=shared_context())).result()
