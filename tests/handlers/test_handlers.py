"""Which handler is chosen: by object, by name, by what a checkpoint says, and by registry."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from points import AbstractPoint, Point, PointHandler, typestrs, using

import orbax_async as ocp
from orbax_async import errors, registration


class NewerHandler(PointHandler):
    """Handles the same objects."""

    file = "newer.json"


class Picky(PointHandler):
    """Can't be made without an argument."""

    def __init__(self, file: str) -> None:
        self.file = file


class DictHandler(PointHandler):
    """Handles dicts, as JSON of its own."""

    file = "dict.json"

    async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
        return self._write(directory, json.dumps(checkpointable))

    async def _read(self, directory: Any) -> Any:
        return json.loads((directory / self.file).read_text())

    def is_handleable(self, checkpointable: Any) -> bool:
        return isinstance(checkpointable, dict)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        return None


@pytest.fixture(autouse=True)
def global_entries() -> Iterator[None]:
    """Leaves the global registry as it was."""
    entries = registration.global_registry()._entries
    before = list(entries)
    yield
    entries[:] = before


# Choosing.


def test_a_custom_handler(tmp_path: Path) -> None:
    """A handler written for Orbax saves, loads and describes what it handles."""
    with using(PointHandler):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2.5), "state": {"a": 1}})
        assert ocp.load_checkpointables(tmp_path / "c") == {"p": Point(1, 2.5), "state": {"a": 1}}
        found = ocp.load_checkpointables(tmp_path / "c", {"p": AbstractPoint()})
        assert found == {"p": Point(1, 2.5)}
        described = ocp.checkpointables_metadata(tmp_path / "c").metadata
        assert isinstance(described["p"], AbstractPoint)
    document = json.loads((tmp_path / "c" / "_CHECKPOINT_METADATA").read_text())
    assert document["item_handlers"]["p"] == f"{PointHandler.__module__}.PointHandler"


def test_b9_8_without_its_handler(tmp_path: Path) -> None:
    """What nobody can load is said with the handler that saved it; the rest loads."""
    with using(PointHandler):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2), "state": {"a": 1}})
    with pytest.raises(
        registration.NoEntryError, match=r"'p' of .*PointHandler: register"
    ) as found:
        ocp.load_checkpointables(tmp_path / "c")
    assert isinstance(found.value, KeyError)
    assert ocp.load_checkpointables(tmp_path / "c", {"state": None}) == {"state": {"a": 1}}
    assert ocp.checkpointables_metadata(tmp_path / "c").metadata == {"p": None, "state": {"a": 0}}


def test_w40_what_is_registered_later_is_seen(tmp_path: Path) -> None:
    """A context made before, its child, and no context at all see a handler registered since."""
    contexts = [ocp.Context()]
    contexts.append(ocp.Context(contexts[0]))
    assert ocp.handlers.register_handler(PointHandler) is PointHandler
    for index, context in enumerate(contexts):
        with context:
            ocp.save_checkpointables(tmp_path / str(index), {"p": Point(index, 0)})
    ocp.save_checkpointables(tmp_path / "2", {"p": Point(2, 0)})
    assert [ocp.load_checkpointables(tmp_path / n)["p"].x for n in "012"] == [0, 1, 2]


def test_the_newest_handler_is_asked_first(tmp_path: Path) -> None:
    """Of two handlers for one object the one registered last saves it."""
    for first, last in ((PointHandler, NewerHandler), (NewerHandler, PointHandler)):
        with using(first, last):
            ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2)}, overwrite=True)
        assert typestrs(tmp_path / "c") == {"p": last.__name__}


def test_b9_9_a_bound_handler_serves_its_name_only(tmp_path: Path) -> None:
    """Of two equal dicts the one with the bound name goes to the handler, the other is a tree."""
    with using(one=DictHandler):
        ocp.save_checkpointables(tmp_path / "c", {"one": {"a": 1}, "two": {"a": 1}})
        loaded = ocp.load_checkpointables(tmp_path / "c")
    assert loaded == {"one": {"a": 1}, "two": {"a": 1}}
    assert typestrs(tmp_path / "c") == {"one": "DictHandler", "two": "PyTreeHandler"}


def test_a_bound_handler_is_not_asked(tmp_path: Path) -> None:
    """Its `is_handleable` does not count: what it then raises comes out, with the name."""
    with (
        using(p=PointHandler),
        pytest.raises(TypeError, match="dataclass instances") as caught,
    ):
        ocp.save_checkpointables(tmp_path / "c", {"p": {"no": "point"}})
    assert caught.value.__notes__ == ["checkpointable: 'p'"]
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_saves_itself_ignores_the_bound_handler(tmp_path: Path) -> None:
    """Its own verbs come first, even under the name of a state."""

    class Own:
        """Saves itself."""

        async def save(self, directory: Any) -> Awaitable[None]:
            return asyncio.sleep(0)

        async def load(self, directory: Any) -> Awaitable[None]:
            return asyncio.sleep(0)

    own = Own()
    ocp.save_checkpointables(tmp_path / "c", {"state": own})
    assert typestrs(tmp_path / "c") == {"state": "StatefulCheckpointableHandler"}
    assert ocp.load_checkpointables(tmp_path / "c", {"state": own}) == {"state": own}


def test_b11_3_half_a_protocol_is_none(tmp_path: Path) -> None:
    """An object with `save` alone, and a class that has both, are not taken."""

    class Half:
        """Can't load itself."""

        async def save(self, directory: Any) -> None: ...

    class Whole(Half):
        """Can."""

        async def load(self, directory: Any) -> None: ...

    for value in (Half(), Whole):
        with pytest.raises(registration.NoEntryError, match="'x'"):
            ocp.save_checkpointables(tmp_path / "c", {"x": value})


def test_b9_7_a_renamed_handler_reads_old_checkpoints(tmp_path: Path) -> None:
    """A secondary type string stands for the handler that a checkpoint names."""
    with using(PointHandler):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(3, 4)})

    class Renamed(PointHandler):
        """Reads what PointHandler wrote."""

    registry = ocp.handlers.local_registry()
    registry.add(Renamed, secondary_typestrs=[f"{PointHandler.__module__}.PointHandler"])
    context = ocp.Context()
    context.checkpointables.registry = registry
    with context:
        assert ocp.load_checkpointables(tmp_path / "c") == {"p": Point(3, 4)}
        assert ocp.load_checkpointables(tmp_path / "c", {"p": AbstractPoint()})["p"].y == 4


def test_what_is_asked_for_can_choose_the_handler(tmp_path: Path) -> None:
    """The recorded handler can't load it, and another says that it can: that one does."""

    class AbstractText:
        """Asks for the text of a point."""

    class TextHandler(PointHandler):
        """Loads a point as text."""

        async def _read(self, directory: Any) -> Any:
            return (directory / "point.json").read_text()

        def is_handleable(self, checkpointable: Any) -> bool:
            return False

        def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
            return isinstance(abstract_checkpointable, AbstractText)

    with using(TextHandler, PointHandler):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2)})
        found = ocp.load_checkpointables(tmp_path / "c", {"p": AbstractText()})
        assert found == {"p": '{"x": 1, "y": 2}'}
        with pytest.raises(registration.NoEntryError, match="as str"):
            ocp.load_checkpointables(tmp_path / "c", {"p": "text"})


def test_w41_a_handler_that_cannot_tell_is_trusted(tmp_path: Path) -> None:
    """`is_abstract_handleable` may return None: the handler that the checkpoint names is used."""
    with using(DictHandler):
        ocp.save_checkpointables(tmp_path / "c", {"d": {"a": 1}})
        assert typestrs(tmp_path / "c") == {"d": "DictHandler"}
        assert ocp.load_checkpointables(tmp_path / "c", {"d": {"a": 0}}) == {"d": {"a": 1}}


def test_w39_a_handler_that_cannot_be_made_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It spoils no save of others; where it is the one bound to the name it is named."""
    with using(PointHandler, Picky), caplog.at_level(logging.WARNING):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2), "state": {"a": 1}})
        assert ocp.load_checkpointables(tmp_path / "c")["p"] == Point(1, 2)
        with pytest.raises(registration.NoEntryError, match="Picky could not be"):
            ocp.save_checkpointables(tmp_path / "d", {"x": object()})
    assert "Picky could not be default-constructed" in caplog.text
    with using(p=Picky):
        for verb, given in (
            (ocp.save_checkpointables, {"p": Point(1, 2)}),
            (ocp.load_checkpointables, {"p": None}),
        ):
            with pytest.raises(ValueError, match="Picky could not be") as caught:
                verb(tmp_path / ("d" if verb is ocp.save_checkpointables else "c"), given)
            assert caught.value.__notes__ == ["checkpointable: 'p'"]


def test_a_ready_handler_is_used_as_it_is(tmp_path: Path) -> None:
    """An instance may be registered, and is found again by its class."""
    with using(Picky("chosen.json")):
        ocp.save_checkpointables(tmp_path / "c", {"p": Point(1, 2)})
        assert ocp.load_checkpointables(tmp_path / "c") == {"p": Point(1, 2)}
    assert [path.name for path in (tmp_path / "c" / "p").iterdir()] == ["chosen.json"]


def test_an_error_of_is_handleable_comes_out(tmp_path: Path) -> None:
    """A handler that fails when it is asked is not passed over in silence."""

    class Broken(PointHandler):
        """Fails."""

        def is_handleable(self, checkpointable: Any) -> bool:
            raise ZeroDivisionError("broken")

    with using(Broken), pytest.raises(ZeroDivisionError) as caught:
        ocp.save_checkpointables(tmp_path / "c", {"x": {"a": 1}})
    assert caught.value.__notes__ == ["checkpointable: 'x'"]


def test_a_tree_that_cannot_be_stored_does_not_become_json(tmp_path: Path) -> None:
    """JSON could hold it, but whoever loads it expects a tree."""
    for tree, kind in (
        ({"a.b": 1, "a": {"b": 2}}, errors.DuplicateLeafError),
        ({"n": 2**70}, errors.UnsupportedLeafError),
    ):
        with pytest.raises(kind) as caught:
            ocp.save_checkpointables(tmp_path / "c", {"x": tree})
        assert caught.value.__notes__ == ["checkpointable: 'x'"]


def test_a_handler_of_trees_of_the_users_own(tmp_path: Path) -> None:
    """A subclass of PyTreeHandler gets the object itself, in `save` as in `load`."""

    class Doubling(ocp.handlers.PyTreeHandler):
        """Stores twice the values."""

        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            return await super().save(directory, {"w": checkpointable["w"] * 2})

    with using(alone=True, state=Doubling):
        ocp.save(tmp_path / "c", {"w": np.arange(3)})
        assert ocp.load(tmp_path / "c")["w"].tolist() == [0, 2, 4]
    assert typestrs(tmp_path / "c") == {"state": "Doubling"}
    assert ocp.load(tmp_path / "c")["w"].tolist() == [0, 2, 4]
    assert ocp.load_checkpointables(tmp_path / "c")["state"]["w"].tolist() == [0, 2, 4]


def test_a_handler_made_of_others(tmp_path: Path) -> None:
    """A handler may use the built-in ones in directories below its own."""

    class Both(PointHandler):
        """Saves a tree and a document."""

        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            tree = await ocp.handlers.PyTreeHandler().save(directory / "tree", checkpointable[0])
            text = await ocp.handlers.JsonHandler().save(directory / "text", checkpointable[1])

            async def write() -> None:
                await asyncio.gather(tree, text)

            return write()

        async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any:
            tree = await ocp.handlers.PyTreeHandler().load(directory / "tree")
            text = await ocp.handlers.JsonHandler().load(directory / "text")

            async def read() -> Any:
                return [await tree, await text]

            return read()

        def is_handleable(self, checkpointable: Any) -> bool:
            return isinstance(checkpointable, list)

    with using(Both):
        ocp.save_checkpointables(tmp_path / "c", {"both": [{"w": np.arange(3)}, {"k": "v"}]})
        (tree, text) = ocp.load_checkpointables(tmp_path / "c")["both"]
    assert tree["w"].tolist() == [0, 1, 2]
    assert text == {"k": "v"}


BUILT_IN = [
    ("ProtoHandler", None),
    ("JsonHandler", None),
    ("StatefulCheckpointableHandler", None),
    ("MetricsHandler", "metrics"),
    ("PyTreeHandler", None),
    ("PyTreeHandler", "state"),
]


def in_new_process(program: str) -> Any:
    """Returns what a program leaves in `registry`, as names of classes and of checkpointables."""
    end = "print([(each.__name__, name) for each, name in registry.get_all_entries()])"
    code = f"{textwrap.dedent(program)}\n{end}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


@pytest.mark.parametrize(
    "first",
    [
        "ocp.handlers.global_registry()",
        "ocp.Context().checkpointables.registry",
        "ocp.options.CheckpointablesOptions.create_with_handlers().registry",
    ],
)
def test_the_global_registry_begins_with_the_built_in_handlers(first: str) -> None:
    """However it is reached first, in a new process: they are there, in Orbax's order."""
    assert in_new_process(f"import orbax_async as ocp; registry = {first}") == BUILT_IN


def test_what_is_registered_before_them_comes_after_the_built_in_handlers() -> None:
    """Below the public names nobody imports the built-in handlers; they join what is there then."""
    begin = """
    from orbax_async.context import Context
    from orbax_async.options import CheckpointablesOptions
    from orbax_async.registration import global_registry, register_handler

    class Early:
        async def save(self, directory, checkpointable): ...
        async def load(self, directory, abstract_checkpointable=None): ...

    register_handler(Early)
    made = CheckpointablesOptions.create_with_handlers(state=Early)
    context = Context(checkpointables_options=made)
    registry = global_registry()
    """
    assert in_new_process(begin) == [("Early", None)]
    begin += "\n    import orbax_async.handlers"
    assert in_new_process(begin) == [*BUILT_IN, ("Early", None)]
    begin += "\n    registry = context.checkpointables.registry"
    assert in_new_process(begin) == [*BUILT_IN[:-1], ("Early", None), ("Early", "state")]


def test_the_default_registry_is_read_only() -> None:
    """B1.7: a handler is added to the global registry, or to a local one."""
    with pytest.raises(NotImplementedError, match="local_registry"):
        ocp.Context().checkpointables.registry.add(PointHandler)
