"""Who saves and loads: ours, Orbax, other libraries each the way its manual says, and the floor.

A peer is two functions. `save` returns once the caller may change its arrays, and what it returns
has `result()`, which waits for the end; `load` gives back a tree like the abstract one. Libraries
that can only block are done when `save` returns. Those other than ours and Orbax know no shardings:
a sharded array is gathered to be saved, and placed after loading.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.states import HostArray, State, host_pieces

Settings = Mapping[str, Any]  # options of a context by dot path; only ours and Orbax have any


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to save and load."""

    name: str
    module: str  # what must be importable
    package: str  # the distribution whose version is recorded; "" for none
    durable: str  # what survives a power cut once the save is over
    save: Callable[[Path, State, Settings], Any]
    load: Callable[[Path, State, Settings], State]
    is_async: bool = False  # whether it writes in the background
    is_floor: bool = False  # whether it stores bytes only, as fast as the machine does

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


def _v1(name: str, module: str, package: str, durable: str, fixed: Settings) -> Peer:
    """A library with Orbax's v1 API, with some options fixed."""

    def call(verb: str, settings: Settings, *args: Any) -> Any:
        found = import_module(module)
        library = getattr(found, "v1", found)
        with configured(library, {**settings, **fixed}):
            return getattr(library, verb)(*args)

    def save(path: Path, state: State, settings: Settings) -> Any:
        return call("save_async", settings, path, state)

    def load(path: Path, abstract: State, settings: Settings) -> State:
        return call("load", settings, path, abstract)

    return Peer(name, module, package, durable, save, load, is_async=True)


def ours(name: str = "ours", fixed: Settings | None = None) -> Peer:
    """Returns this library with some options fixed, under a name of its own."""
    return _v1(name, "orbax_async", "orbax-async", "all", fixed or {})


def _blocking(
    name: str,
    save: Callable[[Path, State], Any],
    load: Callable[[Path, State], State],
    durable: str = "nothing",
) -> Peer:
    """A library that has written everything when it returns; most sync nothing."""

    def save_now(path: Path, state: State, _: Settings) -> Future[None]:
        path.mkdir(parents=True)
        save(path / "state", state)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def load_now(path: Path, abstract: State, _: Settings) -> State:
        return load(path / "state", abstract)

    return Peer(name, name, name, durable, save_now, load_now)


def _named(tree: State) -> dict[str, Any]:
    """Returns the leaves by key path."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _placed(leaves: list[Any], abstract: State) -> State:
    """Returns host values as the abstract tree says; one transfer for all arrays."""
    wanted, structure = jax.tree.flatten(abstract)
    shardings = {}
    for index, want in enumerate(wanted):
        if isinstance(want, jax.ShapeDtypeStruct):
            shardings[index] = want.sharding
        elif not isinstance(want, np.ndarray):
            leaves[index] = type(want)(np.asarray(leaves[index]).item())
    arrays = jax.device_put({index: leaves[index] for index in shardings}, shardings)
    return jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])


def _save_safetensors(path: Path, state: State) -> None:
    values = {name: np.asarray(leaf) for name, leaf in _named(state).items()}
    import_module("safetensors.numpy").save_file(values, path)


def _load_safetensors(path: Path, abstract: State) -> State:
    values = import_module("safetensors.numpy").load_file(path)
    return _placed([values[name] for name in _named(abstract)], abstract)


def _save_equinox(path: Path, state: State) -> None:
    import_module("equinox").tree_serialise_leaves(path, state)


def _load_equinox(path: Path, abstract: State) -> State:
    loaded = import_module("equinox").tree_deserialise_leaves(path, abstract)
    return _placed(jax.tree.leaves(loaded), abstract)


def _save_flax(path: Path, state: State) -> None:
    path.write_bytes(import_module("flax.serialization").to_bytes(state))


def _load_flax(path: Path, abstract: State) -> State:
    loaded = import_module("flax.serialization").from_bytes(abstract, path.read_bytes())
    return _placed(jax.tree.leaves(loaded), abstract)


def _raw(threads: int) -> Peer:
    """The floor: the bytes of a state, one file for each thread, written and synced, and read.

    No names, no checksums, no compression, no tree: what the disk and the memory allow.
    """

    def on_threads(work: Callable[[int], Any]) -> list[Any]:
        if threads == 1:
            return [work(0)]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, range(threads)))

    def save(path: Path, state: State) -> None:
        path.mkdir()
        pieces = list(host_pieces(state))
        total = sum(piece.size for piece in pieces)

        def write_share(index: int) -> None:
            low, high = total * index // threads, total * (index + 1) // threads
            at = 0
            with open(path / str(index), "wb", buffering=1 << 20) as file:
                for piece in pieces:
                    file.write(piece[max(low - at, 0) : max(high - at, 0)].data)
                    at += piece.size
                file.flush()
                os.fsync(file.fileno())

        on_threads(write_share)
        for folder in (path, path.parent, path.parent.parent):
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def load(path: Path, _: State) -> list[HostArray]:
        return on_threads(lambda index: np.fromfile(path / str(index), np.uint8))

    found = _blocking("numpy", save, load, "all")
    return dataclasses.replace(found, name=f"raw-{threads}", package="", is_floor=True)


OURS = ours()
ORBAX = _v1("orbax", "orbax.checkpoint", "orbax-checkpoint", "array data, not its JSON files", {})
_ALL = [
    OURS,
    ORBAX,
    _blocking("safetensors", _save_safetensors, _load_safetensors),
    _blocking("equinox", _save_equinox, _load_equinox),
    _blocking("flax", _save_flax, _load_flax),
    _raw(1),
    _raw(2),
]
PEERS = {peer.name: peer for peer in _ALL}
