"""Orbax's guide for people from PyTorch: a state, a run of states, and weights that they bring.

The guide does the first two with v0; here they are done with v1. The weights of PyTorch models come
as SafeTensors files, which both libraries load and describe.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from equality import assert_same
from flax.training.train_state import TrainState
from guide import EITHER, LIBRARIES, laid_out
from jax.sharding import PartitionSpec as P

import orbax_async as ocp

# The names of dtypes in a SafeTensors header.
CODES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int64): "I64",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}


class Net(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(1)(x)


INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(16, 10)), jnp.float32)


def begin() -> TrainState:
    """Returns the state at step 0."""
    net = Net()
    params = net.init(jax.random.key(0), INPUTS)["params"]
    return TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(1e-2))


@jax.jit
def learn(state: TrainState) -> TrainState:
    """Takes one step."""

    def loss(params: Any) -> Any:
        return jnp.mean((state.apply_fn({"params": params}, INPUTS) - INPUTS[:, :1]) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def after(steps: int) -> TrainState:
    """Returns the state after some steps."""
    state = begin()
    for _ in range(steps):
        state = learn(state)
    return state


@EITHER
def test_saving_and_loading_a_state(library: ModuleType, tmp_path: Path) -> None:
    """Parameters, moments and step in one call; the template says what class they belong to."""
    state = after(5)
    library.save(tmp_path / "c", state)
    # A template that is made anew holds its step as a Python number, which it then comes back as.
    template = learn(begin())
    loaded = library.load(tmp_path / "c", template)
    assert type(loaded) is TrainState
    assert int(loaded.step) == 5
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(state))
    assert_same(jax.tree.leaves(learn(loaded)), jax.tree.leaves(after(6)))


@EITHER
def test_a_run_that_keeps_three(library: ModuleType, tmp_path: Path) -> None:
    """Every sixth of twenty-four steps, the last three of them; the latest by its shapes alone."""
    training = library.training
    state = begin()
    with training.Checkpointer(
        tmp_path / "run",
        save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(6),
        preservation_policy=training.preservation_policies.LatestN(3),
    ) as checkpointer:
        for step in range(1, 25):
            state = learn(state)
            assert checkpointer.save(step, state) is (step % 6 == 0)
    with training.Checkpointer(tmp_path / "run") as checkpointer:
        assert [each.step for each in checkpointer.checkpoints] == [12, 18, 24]
        shapes = jax.eval_shape(lambda: learn(begin()))
        loaded = checkpointer.load(checkpointer.latest, shapes)
        assert int(checkpointer.load(12, shapes).step) == 12
    assert int(loaded.step) == 24
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(state))


def test_the_shapes_of_a_state_just_made_here(tmp_path: Path) -> None:
    """W29: a step that was saved as a number and is asked for as an array; Orbax can't load it."""
    ocp.save(tmp_path / "c", begin())
    loaded = ocp.load(tmp_path / "c", jax.eval_shape(begin))
    assert int(loaded.step) == 0
    assert_same(loaded.params, begin().params)


# Weights of PyTorch models.


def weights() -> dict[str, np.ndarray[Any, Any]]:
    """Returns tensors as a PyTorch model names them."""
    rng = np.random.default_rng(3)
    return {
        "encoder.0.weight": rng.normal(size=(8, 4)).astype(np.float32),
        "encoder.0.bias": rng.normal(size=8).astype(np.float16),
        "head.weight": rng.normal(size=(2, 8)).astype(ml_dtypes.bfloat16),
        "head.mask": np.array([True, False]),
        "steps": np.array([2**40, -1], np.int64),
    }


def write(file: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    """Writes a SafeTensors file by hand: the length of the header, the header, the bytes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        place = [len(data), len(data) + tensor.nbytes]
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def reading(library: ModuleType, layout: Any = "safetensors") -> Any:
    """Returns a context in which SafeTensors are loaded."""
    context = library.Context()
    context.checkpoint_layout = layout
    return context


@EITHER
@pytest.mark.parametrize("layout", ["safetensors", "SAFETENSORS", "auto"])
def test_a_file_of_weights(library: ModuleType, layout: str, tmp_path: Path) -> None:
    """Every tensor comes back under its name, with its dtype, as a NumPy array.

    The layout may be a string or the member of the enumeration, or be found out.
    """
    file = write(tmp_path / "model.safetensors", weights())
    if layout == "SAFETENSORS":
        layout = library.options.CheckpointLayout.SAFETENSORS
    with reading(library, layout):
        assert_same(library.load(file), weights())


@EITHER
def test_weights_in_several_files(library: ModuleType, tmp_path: Path) -> None:
    """A directory is one model; a name that is in two of its files is an error."""
    names = list(weights())
    for number, chosen in enumerate((names[:2], names[2:])):
        part = {name: weights()[name] for name in chosen}
        write(tmp_path / "model" / f"model-{number + 1:05}-of-00002.safetensors", part)
    with reading(library):
        assert_same(library.load(tmp_path / "model"), weights())
    write(tmp_path / "model" / "more.safetensors", {"steps": np.zeros(1, np.float32)})
    with reading(library), pytest.raises(ValueError, match="steps"):
        library.load(tmp_path / "model")


@EITHER
def test_some_weights_as_they_are_needed(library: ModuleType, tmp_path: Path) -> None:
    """What is asked for, cast and spread over the devices; the rest is not loaded."""
    file = write(tmp_path / "model.safetensors", weights())
    wanted = {
        "encoder.0.weight": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=laid_out(P("x"))),
        "encoder.0.bias": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=laid_out(P())),
    }
    with reading(library):
        loaded = library.load(file, wanted)
    expected = {
        name: jax.device_put(weights()[name].astype(form.dtype), form.sharding)
        for name, form in wanted.items()
    }
    assert_same(loaded, expected)


@EITHER
def test_weights_that_are_not_there(library: ModuleType, tmp_path: Path) -> None:
    """A missing name, another shape, a nested tree, and what is no such file are errors."""
    file = write(tmp_path / "model.safetensors", weights())
    form = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=laid_out(P()))
    with reading(library):
        with pytest.raises(KeyError, match="decoder"):
            library.load(file, {"decoder": form})
        with pytest.raises(ValueError, match=r"(?i)shape"):
            library.load(file, {"encoder.0.weight": form.update(shape=(4, 8))})
        with pytest.raises(ValueError, match=r"(?i)flat"):
            library.load(file, {"encoder": {"0": {"weight": form}}})
        for path in (tmp_path / "missing.safetensors", tmp_path / "empty"):
            with pytest.raises(library.errors.InvalidLayoutError):
                library.load(path)
        with pytest.raises(NotImplementedError):
            library.save_checkpointables(tmp_path / "c", {"state": {"a": 1}})


@EITHER
def test_what_a_file_holds(library: ModuleType, tmp_path: Path) -> None:
    """Shapes and dtypes by name, and what PyTorch's tools wrote into the file about it."""
    file = write(tmp_path / "model.safetensors", weights(), format="pt", author="someone")
    with reading(library):
        found = library.metadata(file)
    assert found.custom_metadata == {"format": "pt", "author": "someone"}
    forms = {name: (form.shape, form.dtype) for name, form in found.metadata.items()}
    assert forms == {name: (tensor.shape, tensor.dtype) for name, tensor in weights().items()}


@EITHER
def test_loading_in_the_background(library: ModuleType, tmp_path: Path) -> None:
    """The one layout that Orbax loads asynchronously, too."""
    file = write(tmp_path / "model.safetensors", weights())
    with reading(library):
        response = library.load_async(file)
        assert_same(response.result(), weights())


@EITHER
def test_weights_become_a_model_of_flax(library: ModuleType, tmp_path: Path) -> None:
    """Renamed, transposed and nested, they run, and are saved as a checkpoint for all readers."""
    rng = np.random.default_rng(7)
    tensors = {
        "linear1.weight": rng.normal(size=(5, 10)).astype(np.float32),
        "linear1.bias": rng.normal(size=5).astype(np.float32),
        "linear2.weight": rng.normal(size=(1, 5)).astype(np.float32),
        "linear2.bias": rng.normal(size=1).astype(np.float32),
    }
    with reading(library):
        loaded = library.load(write(tmp_path / "pt.safetensors", tensors))
    params = {
        f"Dense_{number}": {
            "kernel": jnp.asarray(loaded[f"linear{number + 1}.weight"].T),
            "bias": jnp.asarray(loaded[f"linear{number + 1}.bias"]),
        }
        for number in range(2)
    }
    hidden = np.maximum(
        np.asarray(INPUTS) @ tensors["linear1.weight"].T + tensors["linear1.bias"], 0
    )
    expected = hidden @ tensors["linear2.weight"].T + tensors["linear2.bias"]
    library.save(tmp_path / "c", params)
    for reader in LIBRARIES.values():
        found = reader.load(tmp_path / "c", params)
        np.testing.assert_allclose(Net().apply({"params": found}, INPUTS), expected, rtol=1e-4)


@EITHER
def test_a_damaged_file(library: ModuleType, tmp_path: Path) -> None:
    """A file that ends too early is refused, before any of it is handed out."""
    file = write(tmp_path / "model.safetensors", weights())
    file.write_bytes(file.read_bytes()[:-4])
    with reading(library), pytest.raises(ValueError, match=r"(?i)truncated|ends"):
        library.load(file)


def test_the_older_layout_names_here(tmp_path: Path) -> None:
    """The older documentation's spelling of the layout, which only ours goes on taking."""
    file = write(tmp_path / "model.safetensors", weights())
    with ocp.Context(checkpoint_layout="SafeTensors"):
        assert_same(ocp.load(file), weights())
