"""The deprecated names do what the newer ones do, and warn in Orbax's words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1

import orbax_async as ocp

STATE = {"a": np.arange(3), "b": {"c": 1.5}}


def warnings_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """Returns a result, and the deprecations that were told to this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        result = function(*args, **kwargs)
    return result, [str(each.message) for each in caught if each.filename == __file__]


@pytest.mark.parametrize("are_of_run", [False, True], ids=["verbs", "Checkpointer"])
def test_older_names_do_what_the_newer_ones_do(are_of_run: bool, tmp_path: Path) -> None:
    """Each takes the newer one's arguments, gives its result, and warns as Orbax's does."""
    told = {}
    for name, library in (("ours", ocp), ("orbax", v1)):
        where: Any = tmp_path / name
        it: Any = library
        if are_of_run:
            where = 0
            it = library.training.Checkpointer(tmp_path / name)
        said = told[name] = []
        _, text = warnings_of(it.save_pytree, where, STATE, custom_metadata={"run": 1})
        said += text
        again, text = warnings_of(it.save_pytree_async, where, STATE, overwrite=True)
        said += text
        again.result()
        loaded, text = warnings_of(it.load_pytree, where, {"a": np.ndarray, "b": {"c": 0.0}})
        said += text
        assert loaded["a"].tolist() == [0, 1, 2]
        assert loaded["b"] == STATE["b"]
        described, text = warnings_of(it.pytree_metadata, where)
        said += text
        assert described.metadata["a"].shape == (3,)
        assert not described.custom_metadata
        if library is ocp:  # Orbax can't load asynchronously
            response, text = warnings_of(it.load_pytree_async, where)
            assert text == ["Use `load_async` instead."]
            assert response.result()["b"] == STATE["b"]
        if are_of_run:
            it.close()
    assert len(told["ours"]) == 4
    assert told["ours"] == told["orbax"]
