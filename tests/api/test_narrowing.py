"""Parts of several checkpointables, and of a run's steps: `select` and `sharding` everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import orbax_async as ocp
from orbax_async import errors

Load = Callable[..., Any]


@pytest.fixture(params=["verb", "verb_async", "Checkpointer", "Checkpointer_async"])
def load_several(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Load]:
    """Every way to load several checkpointables, of a model, its average, and a document."""
    objects = {
        "model": {"w": jnp.arange(8.0), "b": jnp.ones(4), "step": 3},
        "average": {"w": jnp.zeros(8), "b": jnp.zeros(4)},
        "config": {"text": [1, "two"]},
    }
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name="config"
    )
    with context, ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.save_checkpointables(0, objects)
        if request.param.startswith("verb"):
            ocp.save_checkpointables(tmp_path / "c", objects)
            where: Any = tmp_path / "c"
            load: Load = ocp.load_checkpointables
            load_async: Load = ocp.load_checkpointables_async
        else:
            where = 0
            load = checkpointer.load_checkpointables
            load_async = checkpointer.load_checkpointables_async
        if request.param.endswith("_async"):
            yield lambda *args, **kwargs: load_async(where, *args, **kwargs).result()
        else:
            yield lambda *args, **kwargs: load(where, *args, **kwargs)


def test_leaves_are_selected_by_the_name_of_their_tree(load_several: Load) -> None:
    """A dict narrows the trees that it names, and leaves the others whole."""
    loaded = load_several(select={"model": ["step", "b"]})
    assert loaded["model"].keys() == {"b", "step"}
    assert loaded["average"].keys() == {"w", "b"}
    assert loaded["config"] == {"text": [1, "two"]}
    loaded = load_several(
        {"model": {"w": np.ndarray, "b": np.ndarray, "step": 0}}, select={"model": "w"}
    )
    assert loaded["model"]["w"].tolist() == list(range(8))
    assert loaded["model"]["b"] is loaded["model"]["step"] is ...
    assert loaded.keys() == {"model"}


def test_one_selection_serves_all_trees(load_several: Load) -> None:
    """Patterns, of a generator too, or a function; documents are loaded whole."""
    for select in ("w", (name for name in ["w"]), lambda path: path[0].key == "w"):
        loaded = load_several(select=select)
        assert loaded["model"].keys() == loaded["average"].keys() == {"w"}
        assert loaded["config"] == {"text": [1, "two"]}
    with pytest.raises(errors.TreeMismatchError, match="'step'"):  # the average has none
        load_several(select="step")


def test_shardings_for_all_trees_or_each(load_several: Load, mesh8: Mesh) -> None:
    """One for all, one by name, or a function; others stay where they were saved."""
    split, whole = NamedSharding(mesh8, P("x")), NamedSharding(mesh8, P())
    saved_on = SingleDeviceSharding(jax.devices()[0])

    def shardings(loaded: Any) -> list[Any]:
        return [loaded[tree][leaf].sharding for tree in ("model", "average") for leaf in "wb"]

    assert shardings(load_several(sharding=whole)) == [whole] * 4
    by_name = {"model": split, "average": lambda path, *_: whole if path[0].key == "b" else None}
    assert shardings(load_several(sharding=by_name)) == [split, split, saved_on, whole]
    assert shardings(load_several(sharding={"average": whole})) == [saved_on] * 2 + [whole] * 2
    loaded = load_several(select={"model": "w"}, sharding=split)
    assert loaded["model"].keys() == {"w"}
    assert loaded["model"]["w"].sharding == loaded["average"]["b"].sharding == split


@pytest.mark.parametrize(
    ("abstract", "options", "error", "message"),
    [
        (None, {"select": {"modle": "w"}}, ValueError, r"select: \['modle'\].*'average', 'model'"),
        (None, {"select": {"config": "text"}}, ValueError, r"select: \['config'\] can't"),
        (None, {"sharding": {"config": None}}, ValueError, r"sharding: \['config'\] can't"),
        ({"average": None}, {"select": {"model": "w"}}, ValueError, r"'model'.*\['average'\]"),
        ({"config": None}, {"select": "w"}, ValueError, r"\['config'\].*pytrees: \[\]"),
        (None, {"select": 5}, TypeError, "select must be"),
        (None, {"select": {"model": 5}}, TypeError, "select must be"),
        (None, {"select": {"model": []}}, ValueError, "no pattern"),
        (None, {"sharding": "x"}, TypeError, "sharding must be"),
        (None, {"sharding": {"model": "x"}}, TypeError, "sharding must be"),
    ],
)
def test_bad_selections_are_refused_by_name(
    load_several: Load, abstract: Any, options: Any, error: type[Exception], message: str
) -> None:
    """Names that are not loaded, or no pytrees; nothing to narrow; what is no selection."""
    with pytest.raises(error, match=message):
        load_several(abstract, **options)


@pytest.mark.parametrize("verb", ["load", "load_async"])
def test_a_step_is_loaded_in_part(verb: str, tmp_path: Path, mesh8: Mesh) -> None:
    """`Checkpointer.load` takes what `load` does, of the latest step or another."""
    replicated = NamedSharding(mesh8, P())
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        for step in range(2):
            assert checkpointer.save(step, {"w": jnp.full(4, step), "step": step})

        def load(*args: Any, **kwargs: Any) -> Any:
            result = getattr(checkpointer, verb)(*args, **kwargs)
            return result.result() if verb == "load_async" else result

        assert load(select="step") == {"step": 1}
        assert load(0, select="step") == {"step": 0}
        loaded = load(0, {"w": jnp.zeros(4), "step": 9}, select="w")
        assert loaded["w"].tolist() == [0] * 4 and loaded["step"] is ...
        assert load(sharding=replicated)["w"].sharding == replicated
        assert load(sharding=lambda path, shape, dtype: replicated)["w"].sharding == replicated
        with pytest.raises(TypeError, match="select must be"):
            load(select=5)
        with pytest.raises(TypeError, match="sharding must be"):
            load(sharding=5)
        with pytest.raises(errors.TreeMismatchError, match="'stepp'"):
            load(select="stepp")
