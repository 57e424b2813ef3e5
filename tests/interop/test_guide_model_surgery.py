"""Orbax's guide to model surgery: what is in memory is not what is on disk, in both libraries.

The guide shows placeholders. What it announces (omission, merging, stacking) is done here by what
has been released since: `partial_load`, `tree.merge`, and maps over trees.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from equality import assert_same
from guide import EITHER, described, laid_out, put, refused
from jax.sharding import PartitionSpec as P

import orbax_async as ocp


def layer(seed: int) -> dict[str, Any]:
    """Returns the kernel and bias of one layer."""
    rng = np.random.default_rng(seed)
    return {"bias": rng.normal(size=8), "kernel": rng.normal(size=(8, 4))}


def whole() -> dict[str, Any]:
    """Returns a train state: parameters, moments in a list, and the step."""
    tree = {
        "params": {"in": layer(1), "out": layer(2)},
        "opt_state": {"mu": np.full(8, 2.0), "rest": [np.ones(8), np.zeros(8)]},
        "step": np.asarray(31),
    }
    return put(tree)


@pytest.fixture
def saved(library: ModuleType, tmp_path: Path) -> Path:
    """The train state, saved by the library of the test."""
    library.save(tmp_path / "whole", whole())
    return tmp_path / "whole"


def partial(library: ModuleType) -> Any:
    """Returns a context in which keys may be left out."""
    context = library.Context()
    context.pytree.loading.partial_load = True
    return context


def without_moments(keypath: Any, leaf: Any) -> Any:
    """Returns a leaf, or a placeholder if it belongs to the optimizer."""
    return ... if keypath[0].key == "opt_state" else leaf


# Leaving out.


@EITHER
@pytest.mark.parametrize("known", ["by hand", "from the tree", "from the metadata"])
def test_placeholders(library: ModuleType, known: str, saved: Path) -> None:
    """What stands behind a placeholder is not loaded, and stays a placeholder."""
    any_array = np.array([])  # of any shape, in memory, and of float64
    if known == "by hand":
        each = {"bias": any_array, "kernel": any_array}
        wanted = {
            "params": {"in": each, "out": each},
            "opt_state": {"mu": library.PLACEHOLDER, "rest": [..., ...]},
            "step": any_array,
        }
    else:
        forms = whole() if known == "from the tree" else library.metadata(saved).metadata
        wanted = jtu.tree_map_with_path(lambda path, _: without_moments(path, any_array), forms)
    loaded = library.load(saved, wanted)
    doubles = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), whole())
    assert_same(loaded, jtu.tree_map_with_path(without_moments, doubles))


@EITHER
def test_placeholders_are_not_read(library: ModuleType, saved: Path) -> None:
    """A checkpoint whose moments are gone from the disk loads without them."""
    plain = library.Context()
    plain.array.saving.use_ocdbt = False
    with plain:
        library.save(saved.parent / "files", whole())
    for name in ("mu", "rest.0", "rest.1"):
        (saved.parent / "files" / "state" / f"opt_state.{name}" / "zarr.json").unlink()
    wanted = jtu.tree_map_with_path(without_moments, jax.tree.map(described, whole()))
    loaded = library.load(saved.parent / "files", wanted)
    assert_same(loaded["params"], whole()["params"])
    assert loaded["opt_state"] == {"mu": ..., "rest": [..., ...]}


@EITHER
def test_a_placeholder_for_a_subtree(library: ModuleType, saved: Path) -> None:
    """It fails, as the guide says; where keys may be left out, ours leaves the subtree out."""
    wanted = jax.tree.map(described, whole()) | {"opt_state": ...}
    with refused(library, ocp.errors.TreeMismatchError, ValueError):
        library.load(saved, wanted)
    with partial(library):
        if library is ocp:
            assert_same(library.load(saved, wanted), whole() | {"opt_state": ...})
        else:
            with pytest.raises(TypeError):
                library.load(saved, wanted)


@EITHER
def test_omission(library: ModuleType, saved: Path) -> None:
    """Keys that are not asked for are not in what is loaded, at any depth."""
    wanted = {"params": {"out": {"kernel": described(whole()["params"]["out"]["kernel"])}}}
    with partial(library):
        loaded = library.load(saved, wanted)
    assert_same(loaded, {"params": {"out": {"kernel": whole()["params"]["out"]["kernel"]}}})
    with refused(library, ocp.errors.TreeMismatchError, ValueError):
        library.load(saved, wanted)


@EITHER
def test_both_at_once(library: ModuleType, saved: Path) -> None:
    """Placeholders and omission together fail in Orbax (W34); ours does both."""
    wanted = {"params": {"in": {"bias": ..., "kernel": np.ndarray}}}
    with partial(library):
        if library is ocp:
            kernel = np.asarray(whole()["params"]["in"]["kernel"])
            expected = {"params": {"in": {"bias": ..., "kernel": kernel}}}
            assert_same(library.load(saved, wanted), expected)
        else:
            with pytest.raises(TypeError):
                library.load(saved, wanted)


# Another tree.


@EITHER
def test_new_leaves_of_the_model(library: ModuleType, saved: Path) -> None:
    """A head that the checkpoint lacks keeps what it was given, and the rest is loaded."""
    fresh = {"params": {**jax.tree.map(described, whole()["params"]), "head": np.ones((4, 2))}}
    with partial(library):
        loaded = library.load(saved, fresh)
    assert_same(loaded["params"]["in"], whole()["params"]["in"])
    assert_same(loaded["params"]["head"], np.ones((4, 2)))
    assert loaded.keys() == {"params"}


@EITHER
def test_renaming(library: ModuleType, saved: Path) -> None:
    """The tree is asked for by its stored names, and then renamed and put in another order."""
    forms = jax.tree.map(described, library.metadata(saved).metadata)
    loaded = library.load(saved, forms)
    names = {"out": "decoder", "in": "encoder"}
    renamed = {new: loaded["params"][old] for old, new in names.items()}
    library.save(saved.parent / "renamed", {"weights": renamed})
    assert_same(
        library.load(saved.parent / "renamed")["weights"],
        {"encoder": whole()["params"]["in"], "decoder": whole()["params"]["out"]},
    )


@EITHER
def test_stacking_and_unstacking(library: ModuleType, tmp_path: Path) -> None:
    """Layers of their own become one array with an axis of layers, and the reverse."""
    blocks = [put(layer(seed)) for seed in range(3)]
    library.save(tmp_path / "apart", {"blocks": blocks})
    loaded = library.load(tmp_path / "apart", {"blocks": [jax.tree.map(described, blocks[0])] * 3})
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loaded["blocks"])
    library.save(tmp_path / "stacked", {"blocks": stacked})
    shape = library.metadata(tmp_path / "stacked").metadata["blocks"]["kernel"].shape
    assert shape == (3, 8, 4)
    again = library.load(tmp_path / "stacked")["blocks"]
    apart = [jax.tree.map(lambda leaf, at=at: leaf[at], again) for at in range(3)]
    for one, other in zip(apart, blocks, strict=True):
        assert_same(jax.tree.map(np.asarray, one), jax.tree.map(np.asarray, other))


@EITHER
def test_containers_of_the_code(library: ModuleType, tmp_path: Path) -> None:
    """Moments saved by one optimizer chain come into the tuples of the one that is used now."""
    params = put(layer(5))
    state = optax.adam(1e-3).init(params)
    library.save(tmp_path / "c", {"params": params, "opt_state": state})
    abstract = jax.tree.map(described, {"params": params, "opt_state": state})
    loaded = library.load(tmp_path / "c", abstract)
    assert type(loaded["opt_state"][0]) is optax.ScaleByAdamState
    assert_same(loaded, {"params": params, "opt_state": state})
    bare = library.load(tmp_path / "c")["opt_state"]
    assert bare[0].keys() == {"count", "mu", "nu"}
    mu = {
        **abstract["opt_state"][0]._asdict(),
        "count": ...,
        "nu": jax.tree.map(lambda _: ..., params),
    }
    only = library.load(tmp_path / "c", {**abstract, "opt_state": [mu, None]})
    assert_same(only["opt_state"][0]["mu"], state[0].mu)


@EITHER
def test_merging_two_models(library: ModuleType, tmp_path: Path) -> None:
    """Parts of two checkpoints become one tree; a key of both is refused unless one may win."""
    library.save(tmp_path / "vision", {"params": {"eye": layer(1)}, "step": 3})
    library.save(tmp_path / "text", {"params": {"ear": layer(2)}, "step": 9})
    with partial(library):
        kernel = np.array([])
        forms = {"kernel": kernel, "bias": kernel}
        eye = library.load(tmp_path / "vision", {"params": {"eye": forms}})
        ear = library.load(tmp_path / "text", {"params": {"ear": forms}})
    both = library.tree.merge(eye, ear, {"step": 0})
    library.save(tmp_path / "both", both)
    expected = {"params": {"eye": layer(1), "ear": layer(2)}, "step": 0}
    assert_same(library.load(tmp_path / "both"), expected)
    with pytest.raises(ValueError, match="step"):
        library.tree.merge(both, {"step": 4})
    assert library.tree.merge(both, {"step": 4}, overwrite=True)["step"] == 4


@EITHER
def test_merging_what_was_loaded_into_what_is_there(library: ModuleType, saved: Path) -> None:
    """A student keeps its own moments and takes the teacher's parameters."""
    student = jax.tree.map(jnp.zeros_like, whole())
    with partial(library):
        teacher = library.load(saved, {"params": jax.tree.map(described, whole()["params"])})
    merged = library.tree.merge(student, teacher, overwrite=True)
    assert_same(merged["params"], whole()["params"])
    assert_same(merged["opt_state"], student["opt_state"])


# Other arrays.


@EITHER
def test_dtype_and_layout_and_shape_at_once(library: ModuleType, saved: Path) -> None:
    """Half the precision, spread over the devices, with more rows and fewer columns."""
    context = library.Context()
    context.array.loading.enable_padding_and_truncation = True
    context.pytree.loading.partial_load = True
    wanted = {
        "params": {
            "in": {"kernel": jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=laid_out(P("x")))}
        }
    }
    with context:
        loaded = library.load(saved, wanted)
    kernel = np.zeros((16, 3), np.float32)
    kernel[:8] = layer(1)["kernel"][:, :3]
    expected = put(jnp.asarray(np.asarray(kernel, np.float32)).astype(jnp.bfloat16), P("x"))
    assert_same(loaded["params"]["in"]["kernel"], expected)


@EITHER
@pytest.mark.parametrize("shape", [(4, 4), (8,), (8, 4, 1), (16, 8)])
def test_another_shape_is_refused(library: ModuleType, shape: tuple[int, ...], saved: Path) -> None:
    """Without the option any other shape is an error; with it, another rank still is."""
    wanted = jax.tree.map(described, whole())
    wanted["params"]["in"]["kernel"] = jax.ShapeDtypeStruct(
        shape, np.float32, sharding=laid_out(P())
    )
    with refused(library, ocp.errors.ShapeMismatchError, ValueError):
        library.load(saved, wanted)
    context = library.Context()
    context.array.loading.enable_padding_and_truncation = True
    with context:
        if len(shape) == 2:
            assert library.load(saved, wanted)["params"]["in"]["kernel"].shape == shape
        else:
            with refused(library, ocp.errors.ShapeMismatchError, ValueError):
                library.load(saved, wanted)
