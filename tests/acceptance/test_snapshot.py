from __future__ import annotations

import collections
import ctypes
import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orbax_async as ocp
from acceptance import states

IN_FLIGHT = 4
# Elements: two that are stored as values, one in between, and two that are written by reference.
SIZES = [8, 16 << 10, 24 << 10, 256 << 10, 1 << 20]

pytestmark = pytest.mark.timeout(3600)


@functools.cache
def doubling(sharding: jax.sharding.Sharding | None) -> Callable[[Any], jax.Array]:
    """Returns what makes an array that XLA itself allocates, so that a donation may reuse it.

    The sharding is demanded: one that `jit` infers, not every jax can name (F44).
    """
    return jax.jit(lambda array: array * 2, out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def stepped(array: jax.Array) -> jax.Array:
    """Takes its input's buffer for a result with other values."""
    return array * 3 + 1


class Victims:
    """A state that can be destroyed in place, and what it was."""

    def __init__(self, seed: int, mesh: jax.sharding.Mesh) -> None:
        rng = np.random.default_rng(seed)
        sharded = [jax.NamedSharding(mesh, spec) for spec in _SPECS]
        self.expected: dict[str, Any] = {"seed": seed, "text": f"state {seed}"}
        self.state: dict[str, Any] = dict(self.expected)
        self.jax: dict[str, jax.Array] = {}
        self.numpy: dict[str, np.ndarray[Any, Any]] = {}
        for index, size in enumerate(rng.choice(SIZES, 3)):
            self._add_jax(f"jax{index}", _values(rng, (size,), index), None)
            self._add_numpy(f"numpy{index}", _values(rng, (size // 8, 8), index), index)
        for index, sharding in enumerate(sharded):
            rows = max(int(rng.choice(SIZES)) // 4, mesh.size)  # each device has one at least
            self._add_jax(f"sharded{index}", _values(rng, (rows, 4), index), sharding)
        # Containers belong to the caller, too.
        self.state["list"], self.expected["list"] = [1, 2.5], [1, 2.5]

    def _add_jax(self, name: str, values: np.ndarray[Any, Any], sharding: Any) -> None:
        self.jax[name] = self.state[name] = doubling(sharding)(values)
        self.expected[name] = values * 2

    def _add_numpy(self, name: str, values: np.ndarray[Any, Any], index: int) -> None:
        # Also as views: transposed, and with strides.
        view = [values, values.T, values[::2]][index]
        self.numpy[name] = self.state[name] = view
        self.expected[name] = view.copy()

    def mutate(self) -> None:
        """Overwrites every NumPy array and every container in place."""
        for array in self.numpy.values():
            array[...] = 77
        self.state["list"].append("late")
        self.state["list"][0] = -1
        self.state.clear()

    def donate(self) -> list[jax.Array]:
        """Donates every jax array; returns what may now lie in their buffers.

        XLA declines a donation while somebody else holds the buffer, and copies.
        """
        return [stepped(array) for array in self.jax.values()]

    def delete(self) -> list[jax.Array]:
        """Deletes every jax array, and fills as much memory with other values."""
        shapes = [(array.shape, array.dtype) for array in self.jax.values()]
        for array in self.jax.values():
            array.delete()
        return [jnp.full(shape, 99, dtype) for shape, dtype in shapes]

    def destroy(self, way: str) -> list[jax.Array]:
        """Does what a caller may do once the values are captured."""
        self.mutate()
        result = jax.block_until_ready(self.donate() if way == "donate" else self.delete())
        return [array + 1 for array in result]  # once more over freed memory


_SPECS = [jax.P("x", "y"), jax.P(("x", "y")), jax.P("x"), jax.P()]


def _values(rng: np.random.Generator, shape: tuple[int, ...], kind: int) -> np.ndarray[Any, Any]:
    """Returns values that compress, or not."""
    if kind % 2:
        return np.broadcast_to(
            rng.integers(0, 99, shape[:1] + (1,) * (len(shape) - 1)), shape
        ).astype(np.int32)
    return rng.standard_normal(shape, np.float32)


def check(path: Path, expected: dict[str, Any]) -> None:
    """Loads a checkpoint, compares it bit for bit, and removes it."""
    assert states.differences(ocp.load(path), expected) == []
    shutil.rmtree(path)


def test_a_donation_does_reuse_the_buffer() -> None:
    """Without a save, donation overwrites the values: what the tests below guard against."""
    array = doubling(None)(jnp.arange(1 << 16, dtype=jnp.float32))
    old = ctypes.string_at(array.unsafe_buffer_pointer(), array.nbytes)
    result = jax.block_until_ready(stepped(array))
    new = ctypes.string_at(result.unsafe_buffer_pointer(), result.nbytes)
    assert array.is_deleted()
    assert old != new


def test_nothing_done_after_save_async_reaches_the_checkpoint(
    tmp_path: Path, mesh8: jax.sharding.Mesh, soak: Callable[[int, int], int]
) -> None:
    """Donation, deletion and mutation right after `save_async` returns change no saved byte."""
    count = soak(40, 1000)
    ways = random.Random(0)
    done: collections.Counter[str] = collections.Counter()
    running: collections.deque[tuple[Any, Path, dict[str, Any]]] = collections.deque()

    def finish_one() -> None:
        response, path, expected = running.popleft()
        response.result()
        check(path, expected)

    for seed in range(count):
        victims = Victims(seed, mesh8)
        path = tmp_path / str(seed)
        response = ocp.save_async(path, victims.state)
        way = ways.choice(["donate", "delete"])
        victims.destroy(way)
        done[way] += 1
        running.append((response, path, victims.expected))
        if len(running) == IN_FLIGHT:
            finish_one()
    while running:
        finish_one()
    print(f"\n{count} saves ({dict(done)}, all mutated), no wrong byte")


async def test_nothing_done_after_staged_reaches_the_checkpoint(
    tmp_path: Path, mesh8: jax.sharding.Mesh, soak: Callable[[int, int], int]
) -> None:
    """With lazy staging, the same holds from `await response.staged()` on."""
    count = soak(10, 125)
    context = ocp.Context()
    context.asynchronous.staging = "lazy"
    for seed in range(count):
        victims = Victims(seed, mesh8)
        path = tmp_path / str(seed)
        with context:
            response = ocp.save_async(path, victims.state)
        await response.staged()
        victims.destroy(["donate", "delete"][seed % 2])
        await response
        check(path, victims.expected)
    print(f"\n{count} lazy saves, no wrong byte")
