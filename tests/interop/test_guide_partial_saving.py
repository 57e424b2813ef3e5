"""Orbax's guide to partial saving: a checkpoint in several calls, in both libraries.

The guide's `partial.save_pytree` has become `partial.save`, without an older name beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from equality import assert_same
from guide import EITHER, LIBRARIES, described, put
from jax.sharding import PartitionSpec as P

import orbax_async as ocp


def session(path: Path) -> Path:
    """Returns where the parts lie until they are finalized."""
    return path.with_name(f"{path.name}.partial_save")


@EITHER
def test_adding_to_a_checkpoint(library: ModuleType, tmp_path: Path) -> None:
    """Nothing is there until the end; then the parts are one tree, for either library."""
    path = tmp_path / "c"
    library.partial.save(path, {"params": {"first": np.arange(5)}, "step": 700})
    assert (path.exists(), session(path).exists()) == (False, True)
    library.partial.save(path, {"params": {"second": np.ones(3, np.float32)}})
    assert (path.exists(), session(path).exists()) == (False, True)
    with pytest.raises(library.errors.InvalidLayoutError):
        library.load(path)
    assert not library.is_orbax_checkpoint(path)
    library.partial.finalize(path)
    assert (path.exists(), session(path).exists()) == (True, False)
    expected = {"params": {"first": np.arange(5), "second": np.ones(3, np.float32)}, "step": 700}
    for reader in LIBRARIES.values():
        assert_same(reader.load(path), expected)
        assert reader.is_orbax_checkpoint(path)


@EITHER
def test_asynchronous_parts(library: ModuleType, tmp_path: Path) -> None:
    """Each part can be written while the program goes on, and is awaited by its response."""
    path = tmp_path / "c"
    for number in range(3):
        part = {f"layer{number}": np.full(4, number)}
        response = library.partial.save_async(path, part)
        assert response.result() is None
    library.partial.finalize(path)
    assert_same(library.load(path), {f"layer{number}": np.full(4, number) for number in range(3)})


def test_parts_at_once_here(tmp_path: Path) -> None:
    """W10: parts whose saves overlap, as the guide has them, are lost by Orbax; ours keeps them."""
    path = tmp_path / "c"
    parts = [{f"layer{number}": {"w": np.full(4, number)}} for number in range(4)]
    responses = [ocp.partial.save_async(path, part) for part in parts]
    for response in responses:
        response.result()
    ocp.partial.finalize(path)
    expected = {name: leaf for part in parts for name, leaf in part.items()}
    for reader in LIBRARIES.values():
        assert_same(reader.load(path), expected)


@EITHER
@pytest.mark.parametrize(
    "again",
    [
        {"step": 8},
        {"params": {"first": {"deeper": np.ones(2)}}},
        {"params": np.ones(2)},
        {"list": [np.ones(2), np.ones(2)]},
    ],
    ids=["the same leaf", "below a leaf", "above leaves", "a longer list"],
)
def test_replacing_is_refused(library: ModuleType, again: Any, tmp_path: Path) -> None:
    """Only new keys can be added; what was saved stays, and the session goes on.

    The guide has a NotImplementedError; the released package an error of its own.
    """
    path = tmp_path / "c"
    first = {"params": {"first": np.arange(3)}, "list": [np.zeros(2)], "step": 7}
    library.partial.save(path, first)
    with pytest.raises(Exception, match=r"(?i)replac"):
        library.partial.save(path, again)
    library.partial.save(path, {"more": 1})
    library.partial.finalize(path)
    assert_same(library.load(path), first | {"more": 1})


@EITHER
def test_an_interrupted_session_harms_nothing(library: ModuleType, tmp_path: Path) -> None:
    """A checkpoint beside is as it was, and the session can be taken up again."""
    library.save(tmp_path / "base", {"w": np.arange(3)})
    library.partial.save(tmp_path / "c", {"a": 1})
    assert_same(library.load(tmp_path / "base"), {"w": np.arange(3)})
    library.partial.save(tmp_path / "c", {"b": 2.5})
    library.partial.finalize(session(tmp_path / "c"))
    assert_same(library.load(tmp_path / "c"), {"a": 1, "b": 2.5})


@EITHER
def test_sessions_that_are_not_there(library: ModuleType, tmp_path: Path) -> None:
    """Nothing to finalize, nothing to save, and a checkpoint that is there: all are errors."""
    with pytest.raises(FileNotFoundError):
        library.partial.finalize(tmp_path / "c")
    with pytest.raises(ValueError, match=r"(?i)empty"):
        library.partial.save(tmp_path / "c", {})
    if library is not ocp:
        shutil.rmtree(tmp_path / "c.partial_save.orbax-checkpoint-tmp")  # Orbax leaves it (W28)
    assert list(tmp_path.iterdir()) == []
    library.partial.save(tmp_path / "d", {"a": 1})
    library.partial.finalize(tmp_path / "d")
    with pytest.raises(FileExistsError):
        library.partial.save(tmp_path / "d", {"b": 1})
    assert_same(library.load(tmp_path / "d"), {"a": 1})


@EITHER
def test_metadata_of_all_parts(library: ModuleType, tmp_path: Path) -> None:
    """What is said with each part adds up; the later word goes before the earlier."""
    path = tmp_path / "c"
    library.partial.save(path, {"a": 1}, custom_metadata={"by": "one", "run": 3})
    library.partial.save(path, {"b": 2})
    library.partial.save(path, {"c": 3}, custom_metadata={"by": "two"})
    library.partial.finalize(path)
    assert library.metadata(path).custom_metadata == {"by": "two", "run": 3}
    assert library.metadata(path).metadata == {"a": 0, "b": 0, "c": 0}


@EITHER
def test_a_model_to_serve_out_of_a_run(library: ModuleType, tmp_path: Path) -> None:
    """Load without the optimizer, change layer by layer, and save each as soon as it is done."""
    stack = {f"layer{number}": np.full(8, number, np.float32) for number in range(3)}
    base = put({"params": {"stack": stack}, "moments": [np.ones(16)] * 2}, P("x"))
    library.save(tmp_path / "base", base)
    # Both spellings: the keyword is the guide's, the attribute is today's.
    loading = library.options.PyTreeOptions.Loading(partial_load=True)
    keyword = library.Context(pytree_options=library.options.PyTreeOptions(loading=loading))
    attribute = library.Context()
    attribute.pytree.loading.partial_load = True
    forms = {"params": jax.tree.map(library.arrays.to_shape_dtype_struct, base["params"])}
    for context in (keyword, attribute):
        with context:
            loaded = library.load(tmp_path / "base", forms)
        assert_same(loaded, {"params": base["params"]})

    path = tmp_path / "served"
    expected: dict[str, Any] = {"version": "2-tuned", "params": {"stack": {}}}
    library.partial.save(path, {"version": "2-tuned"})
    for name, weights in loaded["params"]["stack"].items():
        tuned = weights + 0.5
        library.partial.save(path, {"params": {"stack": {name: tuned}}})
        expected["params"]["stack"][name] = tuned
    library.partial.finalize(path)

    abstract = jax.tree.map(lambda leaf: "" if isinstance(leaf, str) else described(leaf), expected)
    for reader in LIBRARIES.values():
        assert_same(reader.load(path, abstract), expected)
        assert_same(reader.load(path), expected)
