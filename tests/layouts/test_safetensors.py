"""Safetensors files: what is read of them, and every way in which they can be bad."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tensor_files import DTYPES, layout, write, write_index, write_raw
from tensors import LARGE, TENSORS, load, same, sds
from watched_directory import Call, watched

import orbax_async as ocp
from orbax_async import errors
from orbax_async._storage import safetensors
from orbax_async._storage.local import LocalDirectory, opened_by


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One file of small tensors."""
    return write(tmp_path / "model.safetensors", TENSORS, {"format": "pt"})


# What is loaded.


def test_everything_is_loaded_as_writable_numpy_arrays(model: Path) -> None:
    """Without an abstract tree: a flat dict in the file's order, that its owner may change."""
    loaded = load(model)
    assert same(loaded, TENSORS)
    assert list(loaded) == list(TENSORS)
    for array in loaded.values():
        array[...] = 1
    assert same(load(model), TENSORS)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str, tmp_path: Path) -> None:
    """Each dtype of the format that takes whole bytes comes back bit for bit, large or small."""
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    small = np.arange(24).reshape(4, 6).astype(dtype)
    tensors = {"small": small, "large": np.resize(small, (300, 301))}
    path = write(tmp_path / "m.safetensors", tensors)
    assert same(load(path), tensors)


def test_jax_targets(model: Path, mesh8: Mesh) -> None:
    """Shardings are kept; where none is given, the array is replicated on all devices."""
    sharding = NamedSharding(mesh8, P("x", "y"))
    abstract = {
        "layers.0.weight": sds(TENSORS["layers.0.weight"], sharding=sharding),
        "layers.0.bias": sds(TENSORS["layers.0.bias"]),
        "half": jax.Array,
    }
    loaded = load(model, abstract)
    assert same(loaded, {name: TENSORS[name] for name in abstract})
    assert loaded["layers.0.weight"].sharding == sharding
    for name in ("layers.0.bias", "half"):
        assert loaded[name].sharding.is_fully_replicated
        assert loaded[name].sharding.device_set == set(jax.devices())


def test_other_targets(model: Path) -> None:
    """NumPy templates, types and scalars are understood, and what is skipped comes back."""
    abstract = {
        "layers.0.weight": np.zeros((8, 4), np.float64),
        "layers.0.bias": np.ndarray,
        "scale": float,
        "half": ...,
        "empty": None,
    }
    loaded = load(model, abstract)
    assert type(loaded["layers.0.weight"]) is np.ndarray
    assert loaded["layers.0.weight"].dtype == np.float64
    assert np.array_equal(loaded["layers.0.weight"], TENSORS["layers.0.weight"])
    assert np.array_equal(loaded["layers.0.bias"], TENSORS["layers.0.bias"])
    assert (loaded["scale"], loaded["half"], loaded["empty"]) == (3.5, ..., None)
    assert load(model, {}) == {}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.int8, jnp.float8_e4m3fn, np.bool_])
@pytest.mark.parametrize("is_large", [False, True])
def test_casting(dtype: Any, is_large: bool, tmp_path: Path, mesh8: Mesh) -> None:
    """Values are cast as NumPy casts them, on the way to NumPy, to one device, and to shards."""
    array = (LARGE if is_large else LARGE[:8, :8]) * 10
    path = write(tmp_path / "m.safetensors", {"w": array})
    expected = {"w": array.astype(dtype)}
    for target in (
        np.zeros(array.shape, dtype),
        sds(array, dtype, sharding=SingleDeviceSharding(jax.devices()[3])),
        sds(array, dtype, sharding=NamedSharding(mesh8, P("y", "x"))),
    ):
        assert same(load(path, {"w": target}), expected)


def test_parts_and_shardings_for_all(model: Path, mesh8: Mesh) -> None:
    """`select` picks tensors by patterns of names; `sharding` makes jax arrays of them all."""
    assert list(load(model, select="layers.0.*")) == ["layers.0.weight", "layers.0.bias"]
    replicated = NamedSharding(mesh8, P())
    loaded = load(model, sharding=replicated)
    assert same(loaded, TENSORS)
    assert all(array.sharding == replicated for array in loaded.values())

    def by_rank(path: Any, shape: tuple[int, ...], dtype: Any) -> NamedSharding | None:
        return NamedSharding(mesh8, P("x")) if len(shape) == 2 and shape[0] else None

    loaded = load(model, sharding=by_rank)
    assert loaded["layers.0.weight"].sharding == NamedSharding(mesh8, P("x"))
    assert loaded["half"].sharding.is_fully_replicated


def test_options_of_loading_act(tmp_path: Path) -> None:
    """Partial loads and padding do for tensors what they do for Orbax checkpoints."""
    path = write(tmp_path / "m.safetensors", {"w": np.ones(3, np.float32)})
    context = layout()
    context.pytree.loading.partial_load = True
    context.array.loading.enable_padding_and_truncation = True
    wanted = {"w": np.zeros(5, np.float32), "new": np.zeros(2)}
    loaded = load(path, wanted, context=context)
    assert loaded["w"].tolist() == [1, 1, 1, 0, 0]
    assert loaded["new"] is wanted["new"]


def test_what_is_wider_than_jax_holds_is_refused(tmp_path: Path) -> None:
    """W43: a float64 tensor is not narrowed silently; NumPy and a narrower dtype get it."""
    path = write(tmp_path / "m.safetensors", {"w": np.arange(3.0)})
    with pytest.raises(errors.DtypeMismatchError, match=r"\['w'\].*jax_enable_x64"):
        load(path, {"w": jax.ShapeDtypeStruct((3,), np.float64)})
    assert load(path, {"w": jax.ShapeDtypeStruct((3,), np.float32)})["w"].dtype == np.float32


def test_several_files(tmp_path: Path) -> None:
    """The files of a directory are one checkpoint; what lies beside and below them is not."""
    folder = tmp_path / "model"
    write(folder / "a-2.safetensors", {"y": np.arange(3.0)}, {"k": "2"})
    write(folder / "a-1.safetensors", {"x": np.arange(2.0)}, {"k": "1", "format": "pt"})
    write(folder / "below" / "b.safetensors", {"z": np.arange(2.0)})
    (folder / "config.json").write_text("{}")
    (folder / "B.SAFETENSORS").write_bytes(b"")
    write_index(folder, {"x": "a-1.safetensors", "y": "a-2.safetensors"})
    assert list(load(folder)) == ["x", "y"]
    assert list(load(folder / "a-2.safetensors")) == ["y"]
    with layout():
        assert ocp.metadata(folder).custom_metadata == {"k": "2", "format": "pt"}


def test_the_index_settles_which_of_two_tensors_counts(tmp_path: Path) -> None:
    """Files that supersede tensors of others, and say so in the index, are loaded as they mean."""
    for index, name in enumerate(("a", "b", "c")):
        write(tmp_path / f"{name}.safetensors", {"w": np.full(3, index), name: np.zeros(1)})
    for index, name in enumerate(("a", "b", "c")):
        write_index(tmp_path, {"w": f"{name}.safetensors"})
        assert load(tmp_path)["w"].tolist() == [index] * 3


def test_metadata(model: Path) -> None:
    """Shapes and dtypes, the texts in the header, sizes and times; `load` takes it all."""
    os.utime(model, ns=(5, 7_000_000_001))
    with layout():
        described = ocp.metadata(model)
        loaded = ocp.load(model, described)
    assert described.metadata == {name: sds(array) for name, array in TENSORS.items()}
    assert all(type(each) is jax.ShapeDtypeStruct for each in described.metadata.values())
    assert described.custom_metadata == {"format": "pt"}
    assert (described.init_timestamp_nsecs, described.commit_timestamp_nsecs) == (None, 7000000001)
    assert described.nbytes == model.stat().st_size
    assert same(loaded, {name: TENSORS[name] for name in sorted(TENSORS)})


# Layouts.


def test_auto_takes_what_is_there(tmp_path: Path, model: Path) -> None:
    """AUTO loads both kinds, sync and async, prefers Orbax's, and saves that."""
    state = {"w": np.arange(3)}
    with layout("auto"):
        ocp.save(tmp_path / "orbax", state)
        assert np.array_equal(ocp.load(tmp_path / "orbax")["w"], state["w"])
        assert same(ocp.load_async(model).result(), TENSORS)
        assert ocp.metadata(model).metadata.keys() == TENSORS.keys()
        write(tmp_path / "orbax" / "more.safetensors", TENSORS)
        assert ocp.load(tmp_path / "orbax").keys() == {"w"}
        assert ocp.load_checkpointables(tmp_path / "orbax").keys() == {"state"}
        assert ocp.verify(tmp_path / "orbax").leaves == 1
        with pytest.raises(errors.InvalidLayoutError, match=r"auto-detect.*no such directory"):
            ocp.load(tmp_path / "nothing")
        (tmp_path / "orbax" / "more.safetensors").unlink()
        (tmp_path / "orbax" / "state" / "_METADATA").unlink()
        (found,) = ocp.verify(tmp_path / "orbax").damage
        assert found.path.endswith("_METADATA")


def test_the_layout_is_asked_for(tmp_path: Path, model: Path) -> None:
    """Under ORBAX files of tensors are refused, and the message says what to set."""
    for path in (model, tmp_path):
        for verb in (ocp.load, ocp.metadata, ocp.load_checkpointables, ocp.verify):
            with pytest.raises(errors.InvalidLayoutError, match="layout = 'safetensors'"):
                verb(path)
        assert not ocp.is_orbax_checkpoint(path)
        with layout():
            assert not ocp.is_orbax_checkpoint(path)


def test_saving_is_refused_by_name(tmp_path: Path) -> None:
    """Nothing saves in this layout, and nothing is left of the attempt."""
    for save, value in (
        (ocp.save, TENSORS),
        (ocp.save_async, TENSORS),
        (ocp.save_checkpointables, {"state": TENSORS}),
    ):
        with layout(), pytest.raises(errors.UnsupportedOptionError, match="SAFETENSORS"):
            save(tmp_path / "c", value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["safetensors", "auto"])
def test_there_are_no_checkpointables(name: str, model: Path) -> None:
    """The verbs of several checkpointables say which verbs to use."""
    for verb in (ocp.load_checkpointables, ocp.checkpointables_metadata):
        with layout(name), pytest.raises(NotImplementedError, match="use `load` and `metadata`"):
            verb(model)


def test_names_are_checked_and_mean_nothing(model: Path) -> None:
    """A name that could be a checkpointable's loads the tensors; others are refused as always."""
    for name in ("state", "other", None):
        assert load(model, checkpointable_name=name).keys() == TENSORS.keys()
    for name in ("", "metrics"):
        with pytest.raises(ValueError, match="checkpointable"):
            load(model, checkpointable_name=name)


def test_an_option_of_older_versions_is_refused(model: Path) -> None:
    """`ignore_load_sharding` has no effect in released Orbax, and none is pretended."""
    with pytest.raises(errors.UnsupportedOptionError, match="ignore_load_sharding"):
        load(model, context=layout(ignore_load_sharding=True))


# Bad input.


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    """Changes a tensor's entry in a header."""
    return lambda header: header[name].update(fields)


BAD_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown dtype": (entry("b", dtype="F4"), "'b': its dtype 'F4' is unknown"),
    "dtype of another kind": (entry("b", dtype=["F32"]), r"'b': its dtype \['F32'\]"),
    "beyond the file": (entry("b", shape=[9], data_offsets=[16, 52]), "'b': .*truncated at"),
    "too few bytes": (entry("b", shape=[3]), r"'b': F32\[3\] takes 12 bytes, and it has 16"),
    "backwards": (entry("b", data_offsets=[32, 16]), "'b': .*no dtype, shape and data_offsets"),
    "before the data": (entry("b", data_offsets=[-8, 8]), "'b': .*data_offsets"),
    "overlap": (entry("b", data_offsets=[8, 24]), "the tensors 'a' and 'b' overlap"),
    "negative sides": (entry("b", shape=[-2, -2]), "'b': .*shape"),
    "no whole sides": (entry("b", shape=[4.0]), "'b': .*shape"),
    "bool side": (entry("b", shape=[True, 4]), "'b': .*shape"),
    "no shape": (lambda header: header["b"].pop("shape"), "'b': .*shape"),
    "one offset": (entry("b", data_offsets=[16]), "'b': .*data_offsets"),
    "sides by name": (entry("b", shape={}), "'b': .*shape"),
    "no entry": (lambda header: header.update(b=7), "'b': 7 is no dtype"),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_bad_headers(what: str, tmp_path: Path) -> None:
    """Each is one error that names file and tensor, whichever tensor is asked for."""
    alter, message = BAD_HEADERS[what]
    tensors = {"a": np.zeros(4, np.float32), "b": np.ones(4, np.float32)}
    path = write(tmp_path / "m.safetensors", tensors, alter=alter)
    for abstract in (None, {"a": np.ndarray}):
        with pytest.raises(errors.InvalidLayoutError, match=rf"m\.safetensors.*{message}"):
            load(path, abstract)
    with layout(), pytest.raises(errors.InvalidLayoutError, match=message):
        ocp.metadata(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes, fewer than"),
        (b"\x10\0\0", "it has 3 bytes, fewer than"),
        (b"\x10" + b"\0" * 7 + b"{}", "it has 10 bytes; its header should end at byte 24"),
        (b"\xff" * 64, "should end at byte 18446744073709551623"),
        (b"\x02" + b"\0" * 7 + b"[]", "its header is a list"),
        (b"\x02" + b"\0" * 7 + b"{x", "its header can't be read"),
        (b"\x02" + b"\0" * 7 + b"\xff\xfe", "its header can't be read"),
        (b"\xa0\x86\x01" + b"\0" * 5 + b"[" * 100_000, "its header can't be read"),
    ],
)
def test_no_safetensors_files(content: bytes, message: str, tmp_path: Path) -> None:
    """A file that is empty, cut short or something else is named, and nothing large is read."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(errors.InvalidLayoutError, match=rf"m\.safetensors: .*{message}"):
        load(path)


@given(data=st.data())
def test_any_damage_of_a_header_is_an_error_of_ours(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes of a header that change or go missing: it is refused, or read, and nothing else."""
    path = write(tmp_path_factory.getbasetemp() / "damaged.safetensors", TENSORS, {"a": "b"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 300))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        contents = safetensors.read_headers(LocalDirectory(str(path)))
    except errors.InvalidLayoutError as error:
        assert str(path) in str(error)
    else:
        ends = [each.extent.offset + each.extent.nbytes for each in contents.tensors.values()]
        assert max(ends) <= path.stat().st_size


def test_a_header_beyond_measure_is_not_read(tmp_path: Path) -> None:
    """A length of gigabytes is refused by itself, however large the file is."""
    path = tmp_path / "m.safetensors"
    path.write_bytes((3 << 30).to_bytes(8, "little"))
    os.truncate(path, 4 << 30)
    with pytest.raises(errors.InvalidLayoutError, match="its header should end at byte"):
        load(path)


def test_a_link_to_nothing_is_a_missing_part(tmp_path: Path) -> None:
    """F23: a file of a model that was not brought along is an error, not a smaller model."""
    write(tmp_path / "a.safetensors", TENSORS)
    (tmp_path / "b.safetensors").symlink_to("gone")
    with pytest.raises(errors.UnreadableError, match=r"b\.safetensors") as caught:
        load(tmp_path)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with layout():
        (found,) = ocp.verify(tmp_path).damage
    assert found.path.endswith("b.safetensors")
    (tmp_path / "gone").symlink_to(write(tmp_path / "c" / "blob", {"w": np.arange(2)}))
    assert load(tmp_path).keys() == {*TENSORS, "w"}


def test_one_name_twice(tmp_path: Path) -> None:
    """In one header, where JSON would forget one, and in two files without an index."""
    item = '"w": {"dtype": "U8", "shape": [1], "data_offsets": [%d, %d]}'
    header = f"{{{item % (0, 1)}, {item % (1, 2)}}}"
    path = write_raw(tmp_path / "twice" / "m.safetensors", header.encode(), b"ab")
    with pytest.raises(errors.InvalidLayoutError, match=r"m\.safetensors: .*two entries 'w'"):
        load(path)
    for name in ("a", "b"):
        write(tmp_path / "two" / f"{name}.safetensors", {"w": np.zeros(1)})
    with pytest.raises(errors.InvalidLayoutError, match=r"'w'.*a\.safetensors and .*b\.safeten"):
        load(tmp_path / "two")


def test_an_index_that_is_not_kept(tmp_path: Path) -> None:
    """A file or a tensor that the index names and nobody brought; an index that is none."""
    write(tmp_path / "a.safetensors", {"w": np.zeros(1)})
    write_index(tmp_path, {"w": "a.safetensors", "v": "gone.safetensors"})
    with pytest.raises(errors.InvalidLayoutError, match=r"gone\.safetensors is missing.*'v'"):
        load(tmp_path)
    write_index(tmp_path, {"w": "a.safetensors", "v": "a.safetensors"})
    with pytest.raises(errors.InvalidLayoutError, match=r"a\.safetensors has no tensor 'v'"):
        load(tmp_path)
    for text in ("", "[]", '{"weight_map": 3}', '{"weight_map": {"w": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(errors.InvalidLayoutError, match=r"index\.json is damaged"):
            load(tmp_path)
    assert load(tmp_path / "a.safetensors").keys() == {"w"}  # by itself it needs no index


@pytest.mark.parametrize("name", ["nothing", "nothing.safetensors", "empty", "model.bin", "orbax"])
def test_paths_without_tensors(name: str, tmp_path: Path) -> None:
    """A path that is not there, or holds something else, is no safetensors checkpoint."""
    (tmp_path / "empty").mkdir()
    write(tmp_path / "model.bin", TENSORS)
    ocp.save(tmp_path / "orbax", {"w": 1})
    for verb in (ocp.load, ocp.metadata, ocp.verify, ocp.load_checkpointables):
        with layout(), pytest.raises(errors.InvalidLayoutError, match=rf"{name} as a valid Safe"):
            verb(tmp_path / name)


def test_all_that_is_wrongly_asked_for_is_named(model: Path) -> None:
    """Unknown names are a KeyError too, as in Orbax; with shapes and dtypes they are one report."""
    wanted = {
        "layers": {"0": {"bias": np.ndarray}},
        "nothing": np.ndarray,
        "layers.0.weight": np.zeros((3, 3)),
    }
    with pytest.raises(errors.UnknownTensorError) as caught:
        load(model, wanted)
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)
    for found in ("['nothing']", "['layers']['0']['bias']", "(3, 3)", "flat dict", str(model)):
        assert found in str(caught.value)
    with pytest.raises(errors.ShapeMismatchError) as mismatch:
        load(model, {"layers.0.weight": np.zeros((3, 3))})
    assert mismatch.value.keypath == "['layers.0.weight']"
    with pytest.raises(errors.AbstractLeafError, match=r"\['scale'\]"):
        load(model, {"scale": object()})


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """Bytes that were there when the header was read, and are gone, are damage of their tensor."""
    path = write(tmp_path / "model" / "m.safetensors", {"a": np.zeros(3), "w": LARGE})

    def shrink(call: Call, proceed: Callable[[], Any]) -> Any:
        found = proceed()
        if call == Call("read", str(path)) and len(found) > 8:  # the header, whose length is known
            os.truncate(path, path.stat().st_size - 1000)
        return found

    with (
        opened_by(watched(shrink)),
        pytest.raises(errors.CorruptDataError, match=r"\['w'\].*bytes found"),
    ):
        load(path.parent, {"w": np.ndarray})


# Verification.


def test_verify_says_what_can_be_known(tmp_path: Path) -> None:
    """Headers, sizes and every byte are read; that values are right, nothing proves."""
    write(tmp_path / "a.safetensors", TENSORS)
    write(tmp_path / "b.safetensors", {"w": LARGE})
    with layout():
        report = ocp.verify(tmp_path)
    assert report.is_intact
    assert report.leaves == len(TENSORS) + 1
    assert report.nbytes == LARGE.nbytes + sum(array.nbytes for array in TENSORS.values())
    assert set(report.unproven) == {f"[{name!r}]" for name in (*TENSORS, "w")}


def test_verify_names_every_bad_file(tmp_path: Path) -> None:
    """Each damaged file is one finding; where all are whole, what is wrong between them is."""
    write(tmp_path / "good.safetensors", TENSORS)
    for name in ("bad", "worse"):
        cut = write(tmp_path / f"{name}.safetensors", {"w": LARGE})
        os.truncate(cut, 1000)
    with layout():
        report = ocp.verify(tmp_path)
        assert [Path(each.path).name for each in report.damage] == [
            "bad.safetensors",
            "worse.safetensors",
        ]
        assert "'w': it should end at byte" in report.damage[0].problem
        for name in ("bad", "worse"):
            write(tmp_path / f"{name}.safetensors", {"w": LARGE})
        (found,) = ocp.verify(tmp_path).damage
        assert (found.path, found.keypath) == (str(tmp_path), "")
        assert "'w'" in found.problem


# What it is for.


def torch_state(rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """The state dict of a small convolutional net as PyTorch lays it out."""
    return {
        "conv.weight": rng.standard_normal((6, 3, 5, 5)).astype(np.float32),  # out, in, h, w
        "conv.bias": rng.standard_normal(6).astype(np.float32),
        "fc.0.weight": rng.standard_normal((16, 24)).astype(np.float32),  # out, in
        "fc.0.bias": rng.standard_normal(16).astype(np.float32),
        "num_batches_tracked": np.array(7, np.int64),
    }


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 6, (5, 5), padding="VALID", rngs=rngs)
        self.fc = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(x))
        return self.fc(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def test_weights_of_pytorch_in_a_flax_model(
    tmp_path: Path, rng: np.random.Generator, mesh8: Mesh
) -> None:
    """A state dict, renamed and transposed, makes a model that computes what PyTorch's would."""
    weights = torch_state(rng)
    write(tmp_path / "1.safetensors", {"conv.weight": weights["conv.weight"]})
    rest = {name: each for name, each in weights.items() if name != "conv.weight"}
    write(tmp_path / "2.safetensors", rest, {"format": "pt"})
    names = {
        ("conv", "kernel"): ("conv.weight", (2, 3, 1, 0)),
        ("conv", "bias"): ("conv.bias", (0,)),
        ("fc", "kernel"): ("fc.0.weight", (1, 0)),
        ("fc", "bias"): ("fc.0.bias", (0,)),
    }
    with layout():
        stored = ocp.metadata(tmp_path).metadata
        replicated = NamedSharding(mesh8, P())
        wanted = {
            name: jax.ShapeDtypeStruct(stored[name].shape, jnp.float32, sharding=replicated)
            for name, _ in names.values()
        }
        loaded = ocp.load(tmp_path, wanted)
    assert loaded.keys() == wanted.keys()
    model = Net(nnx.Rngs(0))
    state = nnx.state(model)
    for (part, kind), (name, axes) in names.items():
        state[part][kind][...] = jnp.transpose(loaded[name], axes)
    nnx.update(model, state)

    image = rng.standard_normal((2, 3, 6, 6)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(image, (5, 5), axis=(2, 3))
    features = np.einsum("nchwij,ocij->nohw", windows, weights["conv.weight"])
    features = np.maximum(features + weights["conv.bias"][:, None, None], 0).reshape(2, -1)
    expected = features @ weights["fc.0.weight"].T + weights["fc.0.bias"]
    assert np.allclose(model(image.transpose(0, 2, 3, 1)), expected, atol=1e-4)
    ocp.save(tmp_path / "converted", nnx.state(model))
    kept = ocp.load(tmp_path / "converted", jax.eval_shape(lambda: nnx.state(model)))
    assert np.array_equal(kept["fc"]["kernel"][...], weights["fc.0.weight"].T)


def test_what_the_format_allows_beyond_what_is_common(tmp_path: Path) -> None:
    """Odd names, holes between tensors, bytes after the last, and no metadata are all fine."""
    tensors = {"": np.arange(2), "a/c/0": np.arange(3), "a": np.arange(4), "w.é": np.arange(5)}
    path = write(tmp_path / "m.safetensors", tensors, gap=3)
    assert same(load(path), tensors)
    path = write(tmp_path / "m.safetensors", tensors, alter=lambda h: h.update(__metadata__=None))
    assert same(load(path), tensors)
    assert load(write(tmp_path / "none.safetensors", {})) == {}
    header = json.dumps({"__metadata__": {"only": "texts"}}).encode()
    with layout():
        path = write_raw(tmp_path / "texts.safetensors", header)
        assert ocp.metadata(path).custom_metadata == {"only": "texts"}
