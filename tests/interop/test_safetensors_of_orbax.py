"""What Orbax makes of safetensors files, the real library's among them, we make too."""

from __future__ import annotations

import gc
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from equality import assert_same
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1
from tensor_files import DTYPES, write, write_index

import orbax_async as ocp

# Of those that a file may have, Orbax knows these.
KNOWN = [name for name in DTYPES if "fnu" not in name and name != "complex64"]
NARROW = [name for name in KNOWN if name not in ("int64", "uint64", "float64")]


def tensors(names: list[str] = KNOWN) -> dict[str, np.ndarray[Any, Any]]:
    """One tensor of each dtype, in odd shapes and under dotted names, none, and a large one."""
    made = {
        f"model.layers.{index}.{name}": (np.arange(24).reshape(4, 3, 2) % 7).astype(
            getattr(ml_dtypes, name, None) or name
        )
        for index, name in enumerate(names)
    }
    rng = np.random.default_rng(0)
    return made | {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 8), np.float32),
        "values": np.array([1.5, -2.7, 300, np.nan, np.inf, -np.inf, 1e20, -0.0], np.float32),
        "large": rng.standard_normal((256, 128)).astype(np.float32),
    }


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A file that the safetensors library wrote."""
    path = tmp_path / "one.safetensors"
    safetensors.numpy.save_file(tensors(), path, {"format": "pt", "by": "the library"})
    return path


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Three files and an index, in a directory with other things."""
    folder = tmp_path / "several"
    index = {}
    for part in range(3):
        held = {name: each for i, (name, each) in enumerate(tensors().items()) if i % 3 == part}
        file = f"model-{part + 1:05}-of-00003.safetensors"
        write(folder / file, held, {"part": str(part), f"only {part}": "x"})
        index |= dict.fromkeys(held, file)
    write_index(folder, index)
    (folder / "config.json").write_text("{}")
    return folder


def under(library: Any, name: str = "safetensors", **options: Any) -> Any:
    """A context of either library."""
    context = library.Context()
    context.checkpoint_layout = name
    for option, value in options.items():
        setattr(context.safetensors, option, value)
    return context


def both(path: Path, abstract: Any = None, **options: Any) -> list[Any]:
    """What Orbax and we load."""
    loaded = []
    for library in (v1, ocp):
        with under(library, **options), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of casts, which Orbax passes on
            loaded.append(library.load(path, abstract))
    return loaded


@pytest.mark.parametrize("where", ["one", "several"])
@pytest.mark.parametrize("name", ["safetensors", "auto"])
def test_everything(where: str, name: str, request: pytest.FixtureRequest) -> None:
    """Without an abstract tree both give the same NumPy arrays, in the same order."""
    path = request.getfixturevalue(where)
    with under(v1, name):
        theirs = v1.load(path)
    with under(ocp, name):
        ours = ocp.load(path)
    assert_same(ours, theirs)
    assert list(ours) == list(theirs)
    assert_same(ours, {each: tensors()[each] for each in ours})


SPECS: dict[str, Any] = {
    "first axis": ("x",),
    "both axes": ("x", "y"),
    "last axis": (None, "y"),
    "axes in one": (("y", "x"),),
    "replicated": (),
}


@pytest.mark.parametrize("options", [{}, {"max_over_read_ratio": 1.0, "read_chunk_bytes": 100}])
@pytest.mark.parametrize("spec", [*SPECS, "none", "one device"])
def test_jax_targets(spec: str, options: Any, one: Path, several: Path, mesh8: Mesh) -> None:
    """Arrays, dtypes and shardings are the same, also where no sharding is asked for."""
    how: dict[str, Any] = {}
    if spec == "one device":
        how["sharding"] = SingleDeviceSharding(jax.devices()[5])
    elif spec in SPECS:
        how["sharding"] = NamedSharding(mesh8, P(*SPECS[spec]))
    chosen = tensors(NARROW) if spec in ("none", "one device", "replicated") else ["large"]
    held = tensors()
    abstract = {
        name: jax.ShapeDtypeStruct(held[name].shape, held[name].dtype, **how)
        for name in chosen
        if name in held
    }
    for path in (one, several):
        theirs, ours = both(path, abstract, **options)
        assert_same(ours, theirs)
        assert {name: each.sharding for name, each in ours.items()} == {
            name: each.sharding for name, each in theirs.items()
        }


@pytest.mark.parametrize(
    "dtype", ["int8", "int32", "uint8", "bool", "float16", "bfloat16", "float8_e4m3fn", "complex64"]
)
def test_casts(dtype: str, one: Path) -> None:
    """Values that fit, values that don't, and values that are none become the same."""
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    held = tensors()
    names = ["values", "scalar", "large", next(name for name in held if name.endswith("int32"))]
    theirs, ours = both(one, {n: jax.ShapeDtypeStruct(held[n].shape, kind) for n in names})
    assert_same(ours, theirs)


def test_metadata(one: Path, several: Path) -> None:
    """Shapes, dtypes and texts are the same; and what either gives, both take."""
    for path in (one, several):
        with under(v1):
            theirs = v1.metadata(path)
        with under(ocp):
            ours = ocp.metadata(path)
        assert ours.metadata == theirs.metadata
        assert list(ours.metadata) == list(theirs.metadata)
        assert ours.custom_metadata == theirs.custom_metadata
        assert ours.init_timestamp_nsecs is theirs.init_timestamp_nsecs is None
        assert str(ours.path) == str(theirs.path)
        narrow = {n: each for n, each in theirs.metadata.items() if each.dtype.itemsize < 8}
        from_theirs, from_ours = both(path, narrow)
        assert_same(from_ours, from_theirs)


def test_asynchronous_loads(one: Path) -> None:
    """What `load_async` gives in either library is what `load` gives."""
    with under(v1):
        theirs = v1.load_async(one).result()
    with under(ocp):
        assert_same(ocp.load_async(one).result(), theirs)


REFUSED: dict[str, Any] = {
    "unknown": {"nothing": jax.ShapeDtypeStruct((3,), np.float32)},
    "nested": {"model": {"layers": jax.ShapeDtypeStruct((3,), np.float32)}},
    "list": [jax.ShapeDtypeStruct((), np.float32)],
    "bare": jax.ShapeDtypeStruct((), np.float32),
    "shape": {"scalar": jax.ShapeDtypeStruct((2,), np.float32)},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_as_an_abstract_tree(what: str, one: Path) -> None:
    """Our error is of the builtin class that Orbax raises there."""
    check_refusals(one, lambda library: library.load(one, REFUSED[what]))


def check_refusals(path: Path, verb: Any) -> None:
    """Fails unless Orbax refuses something, and we do with an error of that class."""
    with under(v1), pytest.raises(Exception) as theirs:
        verb(v1)
    (kind,) = [
        each for each in (KeyError, NotImplementedError, ValueError) if theirs.errisinstance(each)
    ]
    with under(ocp), pytest.raises(kind) as ours:
        verb(ocp)
    assert isinstance(ours.value, ocp.errors.CheckpointError)


def damaged(one: Path, what: str) -> Path:
    """Something that neither library should load."""
    data = one.read_bytes()
    match what:
        case "empty file":
            one.write_bytes(b"")
        case "cut in the length":
            one.write_bytes(data[:5])
        case "cut in the header":
            one.write_bytes(data[:100])
        case "cut in the data":
            one.write_bytes(data[:-1])
        case "unknown dtype":
            write(one, {"w": np.zeros(4)}, alter=lambda header: header["w"].update(dtype="F3"))
        case "two files with one tensor":
            shutil.copy(one, one.with_name("two.safetensors"))
            return one.parent
        case "wrong suffix":
            return one.rename(one.with_suffix(".bin"))
        case "empty directory":
            one.unlink()
            return one.parent
        case "tensors further down":
            one.parent.joinpath("below").mkdir()
            one.rename(one.parent / "below" / one.name)
            return one.parent
        case "nothing there":
            one.unlink()
    return one


@pytest.mark.parametrize(
    "what",
    [
        *("empty file", "cut in the length", "cut in the header", "cut in the data"),
        *("unknown dtype", "two files with one tensor", "wrong suffix", "empty directory"),
        *("tensors further down", "nothing there"),
    ],
)
def test_bad_files(what: str, one: Path) -> None:
    """What Orbax refuses we refuse, loading and describing."""
    path = damaged(one, what)
    check_refusals(path, lambda library: library.load(path))
    if what != "cut in the data":  # Orbax describes it
        check_refusals(path, lambda library: library.metadata(path))


def test_what_the_layout_does_not_have(one: Path, tmp_path: Path) -> None:
    """Saving and checkpointables are NotImplementedError in both; a name means nothing."""
    state = {"w": np.arange(3)}
    for verb in (
        lambda library: library.load_checkpointables(one),
        lambda library: library.checkpointables_metadata(one),
        lambda library: library.save(tmp_path / "c", state),
        lambda library: library.save_checkpointables(tmp_path / "c", {"state": state}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a coroutine that Orbax forgets
            check_refusals(one, verb)
            gc.collect()
    for name in ("state", "other", None):
        theirs, ours = (_loaded(library, one, checkpointable_name=name) for library in (v1, ocp))
        assert_same(ours, theirs)


def _loaded(library: Any, path: Path, **how: Any) -> Any:
    with under(library):
        return library.load(path, **how)


def test_the_library_reads_what_these_tests_write(tmp_path: Path) -> None:
    """The files that the tests write by themselves are safetensors files."""
    held = tensors(list(DTYPES))
    path = write(tmp_path / "m.safetensors", held, {"format": "pt"})
    read = dict(safetensors.deserialize(path.read_bytes()))
    assert read.keys() == held.keys()
    for name, array in held.items():
        assert read[name]["dtype"] == DTYPES[array.dtype.name]
        assert tuple(read[name]["shape"]) == array.shape
        assert bytes(read[name]["data"]) == array.tobytes()
