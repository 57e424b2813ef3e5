"""The table of leaf kinds: one entry is all that a new kind needs."""

from __future__ import annotations

import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orbax_async as ocp
from orbax_async import errors
from orbax_async._engine.leaf import Leaf
from orbax_async.handlers import kinds
from orbax_async.tree.keypath import Key, KeyPath


class FractionKind(kinds.Kind):
    """Fractions: an array of two integers."""

    types = (Fraction,)
    python_type = "fraction"

    def encode(self, keys: KeyPath, value: Fraction) -> kinds.Encoded:
        return self.encoded(keys, np.array([value.numerator, value.denominator], np.int64))

    def decode(self, stored: Any, record: kinds.LeafRecord, request: kinds.Request) -> Fraction:
        return Fraction(*stored.tolist())


class DateKind(kinds.Kind):
    """Dates: a text, which says nothing of its kind; it is a date to who asks for one."""

    types = (datetime.date,)
    value_type = "string"

    def encode(self, keys: KeyPath, value: datetime.date) -> kinds.Encoded:
        return Leaf(keys, self.value_type), value.isoformat()

    def decode(
        self, stored: Any, record: kinds.LeafRecord, request: kinds.Request
    ) -> datetime.date:
        return datetime.date.fromisoformat(stored)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds two kinds."""
    monkeypatch.setattr(kinds, "TABLE", (*kinds.TABLE, FractionKind(), DateKind()))


def test_a_new_kind_is_an_entry_of_the_table(tmp_path: Path) -> None:
    """It is saved, loaded with and without an abstract tree, and reported."""
    day = datetime.date(2024, 2, 29)
    state = {"rate": Fraction(2, 3), "day": day, "w": jnp.arange(3.0), "step": 5}
    ocp.save(tmp_path / "c", state)
    loaded = ocp.load(tmp_path / "c")
    assert loaded["rate"] == Fraction(2, 3) and type(loaded["rate"]) is Fraction
    assert loaded["day"] == "2024-02-29"
    asked = {"rate": Fraction, "day": datetime.date, "w": np.ndarray, "step": int}
    loaded = ocp.load(tmp_path / "c", asked)
    assert (loaded["rate"], loaded["day"], loaded["step"]) == (Fraction(2, 3), day, 5)
    loaded = ocp.load(tmp_path / "c", {**asked, "rate": np.ndarray, "day": str})
    assert loaded["rate"].tolist() == [2, 3]
    assert loaded["day"] == "2024-02-29"
    metadata = ocp.metadata(tmp_path / "c").metadata
    assert metadata["rate"].shape == (2,) and metadata["day"] == "string"


def test_a_kind_refuses_what_is_stored_as_another(tmp_path: Path) -> None:
    """The error names the leaf, and what the checkpoint holds there."""
    ocp.save(tmp_path / "c", {"a": np.arange(2), "b": "text", "c": Fraction(1, 2)})
    for abstract, message in (
        ({"a": Fraction, "b": ..., "c": ...}, r"\['a'\]: Fraction was asked for.* int64\[2\]"),
        ({"a": ..., "b": Fraction, "c": ...}, r"\['b'\]: the checkpoint holds a str"),
        ({"a": ..., "b": ..., "c": datetime.date}, r"\['c'\]: date was asked for.* int64\[2\]"),
        ({"a": bytes, "b": ..., "c": ...}, r"\['a'\]: bytes was asked for.* int64\[2\]"),
    ):
        with pytest.raises(errors.DtypeMismatchError, match=message):
            ocp.load(tmp_path / "c", abstract)
    with pytest.raises(errors.ShapeMismatchError, match=r"\['c'\]: a scalar was asked for"):
        ocp.load(tmp_path / "c", {"a": ..., "b": ..., "c": int})


def test_options_do_not_cast_what_is_no_number(tmp_path: Path) -> None:
    """A dtype for storage holds for arrays and numbers, not for values of a new kind."""
    context = ocp.Context()
    context.array.saving.storage_options.dtype = np.float16
    with context:
        state = {"rate": Fraction(1, 70_000), "w": jnp.arange(3.0), "raw": b"raw", "n": 1.5}
        ocp.save(tmp_path / "c", state)
    loaded = ocp.load(tmp_path / "c")
    assert (loaded["rate"], loaded["raw"], loaded["n"]) == (Fraction(1, 70_000), b"raw", 1.5)
    assert loaded["w"].dtype == jnp.float16


def test_a_kind_that_is_not_known_any_more_loads_as_what_it_is_stored_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has no such entry gets the array."""
    ocp.save(tmp_path / "c", {"rate": Fraction(2, 3)})
    monkeypatch.setattr(kinds, "TABLE", kinds.TABLE[:-2])
    assert ocp.load(tmp_path / "c")["rate"].tolist() == [2, 3]
    with pytest.raises(errors.UnsupportedLeafError, match=r"\['rate'\]: Unsupported leaf type"):
        ocp.save(tmp_path / "d", {"rate": Fraction(2, 3)})


ORDER = [
    # a value, its type in Orbax's document, what is reported, and what it comes back as
    (np.float64(1.5), "scalar", 0.0, np.float64),
    (np.int32(1), "np.ndarray", None, np.int32),
    (True, "scalar", False, bool),
    (7, "scalar", 0, int),
    (2**63, "scalar", 0, int),
    (1j, "np.ndarray", None, complex),
    (b"raw", "np.ndarray", None, bytes),
    (np.str_("text"), "string", "string", str),
]


@pytest.mark.parametrize(("value", "value_type", "reported", "loaded"), ORDER)
def test_the_first_entry_that_fits_is_taken(
    tmp_path: Path, value: Any, value_type: str, reported: Any, loaded: type
) -> None:
    """NumPy's float64 is a float, a bool is an int, a NumPy string a str."""
    leaf, _ = kinds.encode((Key("x", False),), value)
    assert leaf.kind == value_type
    ocp.save(tmp_path / "c", {"x": value})
    again = ocp.load(tmp_path / "c")["x"]
    assert again == value and type(again) is loaded
    if reported is not None:
        metadata = ocp.metadata(tmp_path / "c").metadata["x"]
        assert metadata == reported and type(metadata) is type(reported)


def test_keys_are_found_among_jax_arrays(tmp_path: Path) -> None:
    """What `encode` records of typed keys is their implementation."""
    leaf, array = kinds.encode((), jax.random.key(3, impl="rbg"))
    assert leaf.prng_impl == "rbg" and leaf.dtype == array.dtype == np.uint32
    leaf, _ = kinds.encode((), jnp.arange(3))
    assert leaf.prng_impl is None
    assert kinds.want((), jax.random.key(3)).kind is kinds.RANDOM_KEYS
    assert kinds.want((), jax.Array).kind is kinds.JAX_ARRAY
