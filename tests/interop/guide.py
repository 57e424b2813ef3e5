"""What the tests of Orbax's guides share: both libraries, and the trees that guides are about."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1

import orbax_async as ocp

LIBRARIES = {"ours": ocp, "orbax": v1}
EITHER = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
OLDER_NAMES = {
    "save": "save_pytree",
    "save_async": "save_pytree_async",
    "load": "load_pytree",
    "load_async": "load_pytree_async",
    "metadata": "pytree_metadata",
}


def older(owner: Any, name: str) -> Callable[..., Any]:
    """Returns a verb of a library, or of a Checkpointer, by its older name; each call must warn."""
    verb = getattr(owner, OLDER_NAMES[name])

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = verb(*args, **kwargs)
        told = [str(each.message) for each in caught if each.category is DeprecationWarning]
        assert f"Use `{name}` instead." in told
        return result

    return call


@contextlib.contextmanager
def refused(library: ModuleType, ours: type[Exception], orbax: type[Exception]) -> Iterator[None]:
    """Expects an error of a library; ours is always of the class that Orbax raises, too."""
    with pytest.raises(ours if library is ocp else orbax) as caught:
        yield
    assert isinstance(caught.value, orbax)


def line() -> Mesh:
    """Returns all eight devices in a row."""
    return Mesh(np.array(jax.devices()), ("x",))


def laid_out(spec: P) -> NamedSharding:
    """Returns a sharding over the row of devices."""
    return NamedSharding(line(), spec)


def put(tree: Any, spec: P = P()) -> Any:  # noqa: B008 - immutable
    """Puts every leaf of a tree on the row of devices."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, laid_out(spec)), tree)


def described(leaf: Any, **changes: Any) -> jax.ShapeDtypeStruct:
    """Returns the abstract leaf of an array, or of its metadata, with some of it changed."""
    known = {"shape": leaf.shape, "dtype": leaf.dtype, "sharding": leaf.sharding}
    return jax.ShapeDtypeStruct(**(known | changes))
