"""Kept plans: what is worked out once for a structure serves its later saves, and only those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import orbax_async as ocp
from orbax_async import errors
from orbax_async.handlers import kinds, write_plan


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each plan that is made, and each division into batches."""
    seen: list[str] = []
    write_batches = write_plan.write_batches

    class Noted(write_plan.WritePlan):
        def __init__(self, *args: Any) -> None:
            seen.append("plan")
            super().__init__(*args)

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append("batches")
        return write_batches(*args, **kwargs)

    monkeypatch.setattr(write_plan, "WritePlan", Noted)
    monkeypatch.setattr(write_plan, "write_batches", noted)
    monkeypatch.setattr(write_plan, "_kept", {})
    return seen


def state(seed: int) -> dict[str, Any]:
    """A state with leaves of every kind, whose values depend on the seed."""
    return {
        "w": jnp.full((3, 4), seed, jnp.float32),
        "half": jnp.full((3,), seed, jnp.bfloat16),
        "weak": jnp.asarray(seed),
        "key": jax.random.key(seed),
        "numpy": np.full((2, 2), seed),
        "big endian": np.full(3, seed, ">i4"),
        "int": seed,
        "wide": 2**63 + seed,
        "float": seed / 2,
        "bool": bool(seed % 2),
        "complex": complex(seed, 1),
        "text": f"seed {seed}",
        "none": None,
        "empty": [(), {}],
        "list": [seed, (np.float64(seed),)],
    }


def assert_same(loaded: Any, expected: Any) -> None:
    """Compares all leaves."""
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        if isinstance(other, jax.Array) and jax.dtypes.issubdtype(other.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.array_equal(one, other)
        assert getattr(one, "dtype", type(one)) == getattr(other, "dtype", type(other)) or (
            other.dtype.byteorder == ">"
        )


def test_a_structure_is_described_and_planned_once(tmp_path: Path, made: list[str]) -> None:
    """Saves of other values of one structure share its plan, and hold their own values."""
    for seed in range(4):
        ocp.save(tmp_path / str(seed), state(seed))
    assert made == ["plan", "batches"]
    for seed in range(4):
        assert_same(ocp.load(tmp_path / str(seed)), state(seed))
        described = ocp.metadata(tmp_path / str(seed)).metadata
        assert described["text"] == "string"
        assert described["none"] is None
        assert described["empty"] == [(), {}]


@pytest.mark.usefixtures("made")
def test_arrays_of_a_known_structure_are_not_described_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is stored as other than it is given is encoded anew; arrays are not."""
    ocp.save(tmp_path / "first", state(1))
    encode, described = kinds.encode, []

    def noted(keys: Any, value: Any) -> Any:
        described.append(keys[0].name)
        return encode(keys, value)

    monkeypatch.setattr(kinds, "encode", noted)
    ocp.save(tmp_path / "second", state(2))
    assert not {"w", "half", "weak", "numpy"} & set(described)
    assert {"key", "big endian", "int", "text"} <= set(described)
    monkeypatch.undo()
    assert_same(ocp.load(tmp_path / "second"), state(2))


CHANGES: dict[str, Any] = {
    "a shape": {"w": jnp.ones((4, 4))},
    "a dtype": {"w": jnp.ones((3, 4), jnp.int32)},
    "weakness": {"weak": jnp.asarray(np.int32(1))},
    "NumPy for jax": {"w": np.ones((3, 4), np.float32)},
    "a host scalar for an array": {"w": 1.5},
    "a NumPy shape": {"numpy": np.ones((2, 3), int)},
    "byte order": {"big endian": np.ones(3, "<i4")},
    "an int that needs another dtype": {"wide": 5},
    "a bool for an int": {"int": True},
    "text for a number": {"float": "x"},
    "a PRNG implementation": {"key": jax.random.key(1, impl="rbg")},
    "another key": {"more": 1},
    "a leaf for an empty node": {"none": 1},
    "another empty node": {"empty": [[], {}]},
    "a tuple for a list": {"list": (1, (np.float64(1),))},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_structure_has_a_plan_of_its_own(
    change: str, tmp_path: Path, made: list[str]
) -> None:
    """Whatever of a leaf or the containers is different makes another plan."""
    ocp.save(tmp_path / "first", state(1))
    other = state(2) | CHANGES[change]
    ocp.save(tmp_path / "second", other)
    assert made == ["plan", "batches"] * 2
    assert_same(ocp.load(tmp_path / "first"), state(1))
    assert_same(ocp.load(tmp_path / "second"), other)


def test_another_sharding_has_a_plan_of_its_own(
    tmp_path: Path, made: list[str], mesh8: Mesh
) -> None:
    """The same values on other devices, or divided in another way, are planned anew."""
    value = jnp.arange(64.0).reshape(8, 8)
    for index, spec in enumerate([("x",), ("y",), ("x", "y"), ()]):
        sharding = NamedSharding(mesh8, PartitionSpec(*spec))
        path = tmp_path / str(index)
        ocp.save(path, {"w": jax.device_put(value, sharding)})
        loaded = ocp.load(path)["w"]
        assert loaded.sharding == sharding
        assert np.array_equal(loaded, value)
    assert made == ["plan", "batches"] * 4


def test_other_options_are_planned_anew(tmp_path: Path, made: list[str]) -> None:
    """A plan is shared among contexts with the same options only."""
    values = {"w": np.zeros(100_000, np.float32)}
    sizes = []
    for index, compresses in enumerate([True, False, False]):
        context = ocp.Context()
        context.array.saving.use_compression = compresses
        with context:
            ocp.save(tmp_path / str(index), values)
        files = (each for each in (tmp_path / str(index)).rglob("*") if each.is_file())
        sizes.append(sum(each.stat().st_size for each in files))
    assert made == ["plan", "batches"] * 2
    assert sizes[0] < 50_000 < 400_000 < sizes[1]


def test_a_priority_function_is_asked_at_each_save(tmp_path: Path, made: list[str]) -> None:
    """What a callback may decide otherwise next time is never kept."""
    asked: list[Any] = []
    context = ocp.Context()
    context.memory.is_prioritized_key_fn = lambda path: bool(asked.append(path))
    with context:
        for index in range(3):
            ocp.save(tmp_path / str(index), {"a": index})
    assert len(asked) == 3
    assert made == ["plan", "batches"] * 3


class Unhashable:
    """A pytree whose definition can be neither hashed nor compared."""

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_pytree_with_keys(
    Unhashable,
    lambda node: (((jax.tree_util.GetAttrKey("value"), node.value),), np.zeros(3)),
    lambda _, children: Unhashable(*children),
)


def test_a_definition_that_cannot_be_compared_is_saved_all_the_same(
    tmp_path: Path, made: list[str]
) -> None:
    """Where nothing can be kept, each save is described by itself."""
    for index in range(2):
        ocp.save(tmp_path / str(index), [Unhashable(jnp.full(3, index))])
        assert np.array_equal(ocp.load(tmp_path / str(index))[0]["value"], np.full(3, index))
    assert made == ["plan", "batches"] * 2


def test_a_known_structure_with_a_bad_leaf_is_refused(tmp_path: Path) -> None:
    """A deleted array or an int that is too large is told by key path, kept plan or not."""
    good = {"a": [jnp.ones(3), 5]}
    ocp.save(tmp_path / "good", good)
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(errors.StagingError, match=r"\['a'\]\[0\].*deleted"):
        ocp.save(tmp_path / "gone", {"a": [gone, 5]})
    with pytest.raises(errors.UnsupportedLeafError, match=r"\['a'\]\[1\].*outside of int64"):
        ocp.save(tmp_path / "large", {"a": [jnp.ones(3), -(2**80)]})
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_few_plans_are_kept(tmp_path: Path, made: list[str]) -> None:
    """A program that saves ever other structures does not collect their plans."""
    for count in range(20):
        ocp.save(tmp_path / str(count), [1] * (count + 1))
    assert len(write_plan._kept) <= 8


def test_another_limit_makes_other_batches_of_the_same_plan(
    tmp_path: Path, made: list[str]
) -> None:
    """What is decided of leaves holds under any budget; how many go together does not."""
    for index, limit in enumerate([None, None, 1 << 20, 1 << 20, None]):
        context = ocp.Context()
        context.memory.write_concurrent_bytes = limit
        with context:
            ocp.save(tmp_path / str(index), state(index))
        assert_same(ocp.load(tmp_path / str(index)), state(index))
    assert made == ["plan", "batches", "batches", "batches"]
