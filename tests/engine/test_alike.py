"""Loads of many leaves that are alike, and of structures that are known already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orbax_async as ocp
from orbax_async._engine import transfer
from orbax_async.tree import schema, structure
from orbax_async.tree.keypath import Key

COUNT = 1003  # enough to be compiled for, and three that make no full call

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "int4", "uint4"),
]


@pytest.fixture
def put_one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the arrays that were put on a device in calls of their own."""
    shapes: list[tuple[int, ...]] = []
    put = transfer._put

    def spy(array: np.ndarray[Any, Any], where: jax.sharding.Sharding) -> jax.Array:
        shapes.append(array.shape)
        return put(array, where)

    monkeypatch.setattr(transfer, "_put", spy)
    return shapes


def _random(dtype: str, count: int, rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """Returns arrays of any bits, of narrow integers and of bools any values."""
    kind = jnp.dtype(dtype)
    if dtype == "bool" or dtype.endswith("int4"):
        return [rng.integers(0, 2, (3, 5)).astype(kind) for _ in range(count)]
    return [np.frombuffer(rng.bytes(15 * kind.itemsize), kind).reshape(3, 5) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_come_back_bit_for_bit(dtype: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Of every dtype, NaNs of any kind among them, on the device that is asked for."""
    arrays = _random(dtype, COUNT, rng)
    ocp.save(tmp_path / "checkpoint", arrays)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    with jax.enable_x64(True):
        abstract = [jax.ShapeDtypeStruct((3, 5), jnp.dtype(dtype), sharding=where)] * COUNT
        loaded = ocp.load(tmp_path / "checkpoint", abstract)
    assert all(array.sharding == where and array.committed for array in loaded)
    assert {array.dtype for array in loaded} == {jnp.dtype(dtype)}
    for array, expected in zip(loaded, arrays, strict=True):
        assert np.asarray(array).tobytes() == expected.tobytes()


def test_many_take_few_calls(
    tmp_path: Path, put_one_by_one: list[tuple[int, ...]], rng: np.random.Generator
) -> None:
    """Eight are put on a device in one call; the rest, and what is not alike, one by one."""
    state = {
        "alike": [jnp.full((4,), i) for i in range(COUNT)],
        "others": [jnp.full((side,), 1.0) for side in range(1, 4)],
    }
    ocp.save(tmp_path / "checkpoint", state)
    loaded = ocp.load(tmp_path / "checkpoint", state)
    assert sorted(put_one_by_one) == [(1,), (2,), (3,), *[(4,)] * (COUNT % 8)]
    assert [int(array[0]) for array in loaded["alike"]] == list(range(COUNT))


def test_large_ones_are_not_copied(
    tmp_path: Path, put_one_by_one: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code copies what it is given, so arrays that jax can alias are kept from it."""
    monkeypatch.setattr(transfer, "_MANY_ALIKE", 2)
    side = transfer._COPIED_NBYTES // 4 + 1
    state = [jnp.arange(side, dtype=jnp.float32) + i for i in range(3)]
    ocp.save(tmp_path / "checkpoint", state)
    loaded = ocp.load(tmp_path / "checkpoint", state)
    assert put_one_by_one == [(side,)] * 3
    assert all(bool((a == b).all()) for a, b in zip(loaded, state, strict=True))


def test_settings_of_the_program_do_not_matter(tmp_path: Path) -> None:
    """Values load with jit off, and NaNs where jax looks for them, by the settings of all."""
    values = [np.full(4, np.nan, np.float32) for _ in range(COUNT)]
    ocp.save(tmp_path / "checkpoint", values)
    abstract = [jax.ShapeDtypeStruct((4,), jnp.float32)] * COUNT
    settings = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs")
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name in settings:
            jax.config.update(name, True)
        loaded = ocp.load(tmp_path / "checkpoint", abstract)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert all(isinstance(array, jax.Array) for array in loaded)
    assert all(np.isnan(np.asarray(array)).all() for array in loaded)


def test_equal_documents_are_read_once() -> None:
    """What a document says is kept, and found again by all of its bytes."""
    entry = schema.Entry((Key("a", False),), schema.JAX_ARRAY, "a", (2,))
    data = schema.TreeDocument((entry,), uses_zarr3=True, uses_ocdbt=True).dump()
    first = schema.TreeDocument.load(data)
    assert schema.TreeDocument.load(bytes(bytearray(data))) is first
    assert schema.TreeDocument.load(data.replace(b"jax.Array", b"np.ndarray")) is not first
    assert first.entries == (entry,)


@jax.tree_util.register_pytree_with_keys_class
class Labelled:
    """A node whose static part is of the user's own."""

    def __init__(self, label: Any, child: Any) -> None:
        self.label, self.child = label, child

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.DictKey(str(self.label)), self.child)], self.label

    @classmethod
    def tree_unflatten(cls, label: Any, children: Any) -> Labelled:
        return cls(label, *children)


class Incomparable:
    """A static part that can be neither hashed nor compared."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    def __str__(self) -> str:
        return "incomparable"


def test_key_paths_are_those_of_each_structure() -> None:
    """Trees of the same shape with other keys, or static parts, are not taken for each other."""
    assert structure.flatten({"a": 1, "b": 2}).keys == structure.flatten({"a": 3, "b": 4}).keys
    assert structure.flatten({"a": 1, "c": 2}).keys == ((Key("a", False),), (Key("c", False),))
    assert structure.flatten(Labelled("x", 1)).keys == ((Key("x", False),),)
    assert structure.flatten(Labelled("y", 1)).keys == ((Key("y", False),),)
    for _ in range(2):
        flat = structure.flatten(Labelled(Incomparable(), 1))
        assert flat.keys == ((Key("incomparable", False),),)
        assert flat.leaves == [1]
