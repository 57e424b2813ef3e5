"""Who saves and loads: ours, Orbax, and the table of all peers.

A peer is two functions. `save` returns once the caller may change its arrays, and what it returns
waits for the end; `load` gives back a tree like the abstract one. Libraries that can only block
are done when `save` returns.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks import bare, libraries, raw
from benchmarks.trees import same_values
from benchmarks.workloads import State

Settings = Mapping[str, Any]


class Pending(Protocol):
    """A save that is under way; one that can be awaited is awaited on an event loop."""

    def result(self) -> Any:
        """Blocks until the save has ended, and raises what went wrong."""
        ...


class Done:
    """A save that was over when the call returned."""

    def result(self) -> None:
        """Returns at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to save and load.

    Attributes:
      name: what it is called on the command line and in the results.
      module: what must be importable.
      package: the distribution whose version is recorded; "" for none.
      durable: what survives a power cut once the save is over.
      save: starts a save of a state at a path, with options by dot path.
      load: loads what is at a path as an abstract tree says.
      matches: compares what was loaded with what was saved.
      is_async: whether it writes in the background.
      is_floor: whether it stores bytes only, as fast as the machine does.
    """

    name: str
    module: str
    package: str
    durable: str
    save: Callable[[Path, State, Settings], Pending]
    load: Callable[[Path, State, Settings], State]
    matches: Callable[[State, State], bool] = same_values
    is_async: bool = False
    is_floor: bool = False

    @property
    def is_installed(self) -> bool:
        """Says whether it can be used here."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # not even the package around it
            return False

    @property
    def version(self) -> str:
        """The version of its distribution."""
        return importlib.metadata.version(self.package) if self.package else ""


def configured(library: Any, settings: Settings) -> Any:
    """Returns a context of ours or of Orbax, with options set by dot path."""
    context = library.Context()
    for path, value in settings.items():
        *groups, name = path.split(".")
        setattr(functools.reduce(getattr, groups, context), name, value)
    return context


def _v1(name: str, module: str, package: str, durable: str) -> Peer:
    """A library with Orbax's v1 API."""

    def library() -> Any:
        found = importlib.import_module(module)
        return getattr(found, "v1", found)

    def save(path: Path, state: State, settings: Settings) -> Pending:
        with configured(library(), settings):
            pending: Pending = library().save_async(path, state)
        return pending

    def load(path: Path, abstract: State, settings: Settings) -> State:
        with configured(library(), settings):
            return library().load(path, abstract)

    return Peer(
        name=name,
        module=module,
        package=package,
        durable=durable,
        save=save,
        load=load,
        is_async=True,
    )


def variant(name: str, settings: Settings) -> Peer:
    """Returns ours with some options set, under a name of its own."""

    def save(path: Path, state: State, common: Settings) -> Pending:
        return OURS.save(path, state, {**common, **settings})

    def load(path: Path, abstract: State, common: Settings) -> State:
        return OURS.load(path, abstract, {**common, **settings})

    return dataclasses.replace(OURS, name=name, save=save, load=load)


def _blocking(
    name: str,
    save: Callable[[Path, State], None],
    load: libraries.Load,
    durable: str = "nothing",
) -> Peer:
    """A library that has written everything when it returns; most sync nothing."""

    def save_now(path: Path, state: State, _: Settings) -> Pending:
        path.mkdir(parents=True)
        save(path / "state", state)
        return Done()

    return Peer(
        name=name,
        module=name,
        package=name,
        durable=durable,
        save=save_now,
        load=lambda path, abstract, _: load(path / "state", abstract),
    )


def _raw(threads: int) -> Peer:
    """The floor: the bytes of the state, to files and back, by so many threads."""

    def save(path: Path, state: State, _: Settings) -> Pending:
        raw.write(path, state, threads)
        return Done()

    return Peer(
        name=f"raw-{threads}",
        module="numpy",
        package="",
        durable="all",
        save=save,
        load=lambda path, abstract, _: raw.read(path, abstract, threads),
        matches=raw.same_content,
        is_floor=True,
    )


OURS = _v1("ours", "orbax_async", "orbax-async", "all")
ORBAX = _v1("orbax", "orbax.checkpoint", "orbax-checkpoint", "array data, not its JSON files")
DCP = Peer(
    name="dcp",
    module="torch",
    package="torch",
    durable="files, not their names",
    save=lambda path, state, _: libraries.save_dcp(path, state),
    load=lambda path, abstract, _: libraries.load_dcp(path, abstract),
    is_async=True,
)
PEERS = {
    peer.name: peer
    for peer in (
        OURS,
        ORBAX,
        _blocking("safetensors", libraries.save_safetensors, libraries.load_safetensors),
        _blocking("equinox", libraries.save_equinox, libraries.load_equinox),
        _blocking("flax", libraries.save_flax, libraries.load_flax),
        DCP,
        _blocking("tensorstore", bare.save, bare.load, "all"),
        _raw(1),
        _raw(2),
    )
}
