"""Saving and loading a jax state with libraries of other formats, each the way its manual says.

None of them knows shardings: a sharded array is gathered to be saved, and placed after loading.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.workloads import State

Load = Callable[[Path, State], State]


def _named(tree: State) -> dict[str, Any]:
    """Returns the leaves by key path."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def placed(leaves: list[Any], abstract: State) -> State:
    """Returns host values as the abstract tree says; one transfer for all arrays."""
    wanted, structure = jax.tree.flatten(abstract)
    on_device = [
        index for index, want in enumerate(wanted) if isinstance(want, jax.ShapeDtypeStruct)
    ]
    arrays = jax.device_put(
        [leaves[index] for index in on_device], [wanted[index].sharding for index in on_device]
    )
    for index, want in enumerate(wanted):
        if not isinstance(want, jax.ShapeDtypeStruct | np.ndarray):
            leaves[index] = type(want)(np.asarray(leaves[index]).item())
    for index, array in zip(on_device, arrays, strict=True):
        leaves[index] = array
    return jax.tree.unflatten(structure, leaves)


def save_safetensors(path: Path, state: State) -> None:
    """One file, by `safetensors.numpy`."""
    library = importlib.import_module("safetensors.numpy")
    library.save_file({name: np.asarray(leaf) for name, leaf in _named(state).items()}, path)


def load_safetensors(path: Path, abstract: State) -> State:
    """Reads the file, then one transfer."""
    values = importlib.import_module("safetensors.numpy").load_file(path)
    return placed([values[name] for name in _named(abstract)], abstract)


def save_equinox(path: Path, state: State) -> None:
    """One file, leaf after leaf."""
    importlib.import_module("equinox").tree_serialise_leaves(path, state)


def load_equinox(path: Path, abstract: State) -> State:
    """Equinox makes jax arrays itself; sharded ones are placed afterwards."""
    loaded = importlib.import_module("equinox").tree_deserialise_leaves(path, abstract)
    return placed(jax.tree.leaves(loaded), abstract)


def save_flax(path: Path, state: State) -> None:
    """One msgpack message."""
    path.write_bytes(importlib.import_module("flax.serialization").to_bytes(state))


def load_flax(path: Path, abstract: State) -> State:
    """Reads the message, then one transfer."""
    library = importlib.import_module("flax.serialization")
    return placed(jax.tree.leaves(library.from_bytes(abstract, path.read_bytes())), abstract)


def save_dcp(path: Path, state: State) -> Any:
    """PyTorch's distributed checkpoint on CPU, in the background; tensors alias the arrays."""
    torch = importlib.import_module("torch")
    dcp = importlib.import_module("torch.distributed.checkpoint")

    def tensor(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and len(leaf.devices()) > 1:
            leaf = jax.device_put(leaf, jax.devices()[0])
        return torch.from_dlpack(leaf) if isinstance(leaf, jax.Array | np.ndarray) else leaf

    tensors = {name: tensor(leaf) for name, leaf in _named(state).items()}
    return dcp.async_save(tensors, checkpoint_id=path, no_dist=True)


def load_dcp(path: Path, abstract: State) -> State:
    """Loads in place into fresh tensors, which become arrays without a copy."""
    torch = importlib.import_module("torch")
    dcp = importlib.import_module("torch.distributed.checkpoint")

    def empty(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct | np.ndarray):
            return leaf
        return torch.empty(leaf.shape, dtype=getattr(torch, leaf.dtype.name))

    values = {name: empty(leaf) for name, leaf in _named(abstract).items()}
    dcp.load(values, checkpoint_id=path, no_dist=True)
    wanted = jax.tree.leaves(abstract)
    leaves = [
        (np.asarray(value) if isinstance(want, np.ndarray) else jax.dlpack.from_dlpack(value))
        if isinstance(value, torch.Tensor)
        else value
        for value, want in zip(values.values(), wanted, strict=True)
    ]
    return placed(leaves, abstract)
