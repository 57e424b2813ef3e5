"""Small arrays are captured by copies, for which the GIL is not let go of one by one."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine import gil, transfer
from orbax_async._engine.save_pipeline import SavePipeline
from orbax_async._operation import Operation
from orbax_async.handlers import write_plan
from orbax_async.handlers.pytree import TreeWriter


def pipeline_of(state: Any, context: ocp.Context | None = None) -> SavePipeline:
    """Returns what would capture a state, and write it."""
    with context or ocp.Context() as options:
        return TreeWriter(write_plan.prepare(state, options), Operation("save")).pipeline


def captured(state: Any) -> list[Any]:
    """Captures a state, and returns its arrays as they are captured."""
    pipeline = pipeline_of(state)
    return [piece for pieces in pipeline._capture_some(pipeline._batches) for piece in pieces]


def copied(state: Any, context: ocp.Context | None = None) -> dict[int, int]:
    """Returns the bytes of each array, by its index, that would be captured by a copy."""
    batches = pipeline_of(state, context)._batches
    return {leaf: nbytes for batch in batches for leaf, _, _, nbytes in batch.small}


def is_view(piece: Any, source: jax.Array) -> bool:
    """Says whether a captured array is where its source is."""
    address: int = np.asarray(piece).ctypes.data
    return address == source.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("shape", "dtype", "is_copied"),
    [
        ((), "float32", True),
        ((256,), "bfloat16", True),
        ((7,), "bool", True),
        ((3,), "complex64", True),
        ((1 << 12,), "float32", True),
        (((1 << 12) + 1,), "float32", False),
        ((16, 16), "float32", False),
    ],
)
def test_which_arrays_are_copied(shape: tuple[int, ...], dtype: str, is_copied: bool) -> None:
    """Up to 16 KiB and one dimension, whose elements lie in their order in any layout."""
    source = jnp.ones(shape, dtype)
    (piece,) = captured([source])
    assert is_view(piece, source) != is_copied
    assert piece.shape == shape and piece.dtype == source.dtype
    assert np.array_equal(piece, source)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "float8_e4m3fn", "float4_e2m1fn"])
def test_elements_that_numpy_has_no_type_for_are_left_to_jax(dtype: str) -> None:
    """How a device packs them is its own business."""
    assert copied([jnp.ones(4, dtype)]) == {}


def test_copies_take_a_bounded_memory() -> None:
    """The first 16 MiB of a state are copied, and of what follows views are taken."""
    state = [jnp.ones(1 << 12)] * 1500
    assert copied(state) == dict.fromkeys(range(1024), 1 << 14)


def test_no_copies_are_made_that_a_budget_does_not_count() -> None:
    """Where copies are limited, views are taken of all."""
    context = ocp.Context()
    context.memory.write_concurrent_bytes = 1 << 30
    assert copied([jnp.ones(3)]) == {0: 12}
    assert copied([jnp.ones(3)], context) == {}


def test_only_what_is_on_one_cpu_device_is_copied(mesh8: Mesh) -> None:
    """Not what is spread over devices or a copy on each, nor what belongs to NumPy."""
    wheres = [
        NamedSharding(mesh8, PartitionSpec("x")),
        NamedSharding(mesh8, PartitionSpec()),
        None,
        SingleDeviceSharding(jax.devices()[3]),
    ]
    values = [
        np.ones(8) if where is None else jax.device_put(jnp.ones(8), where) for where in wheres
    ]
    assert list(copied(values)) == [3]


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_an_array_that_other_processes_hold_is_captured_by_them(kind: str) -> None:
    """A process with no device of a mesh saves all the same; real ones take three processes."""

    class Elsewhere:
        memory_kind, num_devices = kind, 1
        is_fully_addressable, addressable_devices = False, frozenset[Any]()
        device_set = (types.SimpleNamespace(id=7, platform="gpu"),)

    where: Any = Elsewhere()
    assert transfer.capture_mode(where) == ("view" if kind == "pinned_host" else "fetch")
    assert not transfer.is_small((8,), np.dtype(np.float32), where)


def test_i3_small_arrays_survive_what_their_owner_does(tmp_path: Path) -> None:
    """Donated, deleted or dropped once the save is staged, they are saved as they were."""
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    donated, deleted = [jnp.full(300, i + 0.5) for i in range(200)], jnp.arange(5.0)
    # Copies, a view and a copy of a NumPy leaf.
    state = [donated, deleted, jnp.ones((2, 2)), np.zeros(3)]
    response = ocp.save_async(tmp_path / "checkpoint", state)
    for array in donated:
        update(array).block_until_ready()
    deleted.delete()
    del state, donated, deleted
    response.result()
    loaded = ocp.load(tmp_path / "checkpoint")
    assert all(np.array_equal(leaf, np.full(300, i + 0.5)) for i, leaf in enumerate(loaded[0]))
    assert np.array_equal(loaded[1], np.arange(5.0))


def test_i3_an_array_that_is_donated_while_it_is_copied_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another thread takes away meanwhile is told by key path, not saved as it happens to be.

    This rests on XLA marking arrays as deleted before it writes to their memory.
    """

    def address_of(array: jax.Array) -> int:
        address: int = original(array)
        if array is victim:
            array.delete()
        return address

    victim = jnp.arange(5.0)
    original = gil._address_of
    monkeypatch.setattr(gil, "_address_of", address_of)
    with pytest.raises(errors.StagingError, match=r"\['b'\].*captured.*deleted"):
        ocp.save(tmp_path / "checkpoint", {"a": jnp.ones(3), "b": victim})
    assert list(tmp_path.iterdir()) == []


def test_where_one_cannot_be_waited_for_each_is_captured_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of a computation is not told of all its neighbours: views tell whose it is."""

    def fail(_: Any) -> None:
        raise RuntimeError("nothing comes of it")

    sources = [jnp.ones(3), jnp.zeros(3)]
    monkeypatch.setattr(jax, "block_until_ready", fail)
    assert all(map(is_view, captured(sources), sources))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count a thread's waits")
def test_beside_a_program_in_python_capturing_waits_seldom() -> None:
    """Of 2,000 arrays views would ask for the GIL each, and wait for it some hundred times."""
    state = jax.block_until_ready([jnp.full(8, i) for i in range(2000)])
    pipeline = pipeline_of(state)
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            pass

    counting = threading.Thread(target=count)
    counting.start()
    try:
        before = gil._waits()
        (pieces,) = pipeline._capture_some(pipeline._batches)
        waits = gil._waits() - before
    finally:
        stop.set()
        counting.join()
    assert waits < 100
    assert [piece[0] for piece in pieces] == list(range(2000))
