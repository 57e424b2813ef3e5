"""F21, I12: what is damaged, missing or of another checkpoint is found, whichever file it is."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from points import AbstractPoint, Point, PointHandler, using

import orbax_async as ocp
from orbax_async import errors
from orbax_async.partial import finalize
from orbax_async.partial import save as save_part

ARRAY_DOCUMENTS = {"zarr.json", ".zarray"}
DAMAGES = ["flip", "truncate", "remove", "swap"]


def state_of(number: int) -> dict[str, Any]:
    """Returns a state like that of any other number, with other values."""
    random_values = np.random.default_rng(number)
    return {
        "w": jnp.asarray(random_values.standard_normal((64, 300)), jnp.float32),
        "b": jnp.asarray(random_values.standard_normal(5), jnp.float32),
        "n": random_values.integers(0, 9, (100, 100)),
        "words": [f"text {number}", "the same"],
        "key": jax.random.key(number),
        "small": 2.5 + number,
        "pair": (number, b"bytes %d" % number),
    }


def save_files(path: Path, number: int, *, use_zarr3: bool = True) -> None:
    """Saves an array in files of its own."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = use_zarr3
    with context:
        ocp.save(path, state_of(number), custom_metadata={"number": number})


def save_in_place(path: Path, number: int) -> None:
    """Saves where readers look."""
    context = ocp.Context()
    context.atomicity.mode = "commit_file"
    with context:
        ocp.save(path, state_of(number), custom_metadata={"number": number})


def save_several(path: Path, number: int) -> None:
    """Saves checkpointables of several handlers, also a user's."""
    with using(PointHandler, config=ocp.handlers.JsonHandler):
        ocp.save_checkpointables(
            path,
            {"state": state_of(number), "config": {"rate": number}, "point": Point(number, 1.0)},
        )


def save_in_parts(path: Path, number: int) -> None:
    """Saves in two parts."""
    state = state_of(number)
    save_part(path, {key: state[key] for key in ("w", "words", "key")})
    save_part(path, {key: state[key] for key in ("b", "n", "small")})
    finalize(path)


KINDS: dict[str, Callable[[Path, int], None]] = {
    "database": lambda path, number: ocp.save(
        path, state_of(number), custom_metadata={"number": number}
    ),
    "files": save_files,
    "zarr2": lambda path, number: save_files(path, number, use_zarr3=False),
    "in-place": save_in_place,
    "several": save_several,
    "parts": save_in_parts,
}


def content(path: Path) -> list[Any]:
    """Returns all that a checkpoint gives, in a form that can be compared."""
    with using(PointHandler, config=ocp.handlers.JsonHandler):
        point = {"state": None, "config": None, "point": AbstractPoint()}
        abstract = point if (path / "point").exists() else None
        loaded = ocp.load_checkpointables(path, abstract)
        custom = ocp.checkpointables_metadata(path).custom_metadata
    leaves, tree = jax.tree.flatten((loaded, custom))
    return [str(tree), *map(comparable, leaves)]


def comparable(leaf: Any) -> Any:
    """Returns what tells a leaf from any other."""
    if isinstance(leaf, Point):
        return dataclasses.astuple(leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    if isinstance(leaf, jax.Array | np.ndarray):
        return type(leaf).__name__, str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
    return type(leaf).__name__, leaf


@dataclasses.dataclass
class Specimen:
    """A checkpoint to be damaged, and another one of the same form."""

    path: Path
    other: Path
    content: list[Any]

    @property
    def files(self) -> list[Path]:
        return sorted(file for file in self.path.rglob("*") if file.is_file())

    def counterpart(self, file: Path) -> Path | None:
        """Returns the other checkpoint's file of the same name, or of the same place."""
        named = self.other / file.relative_to(self.path)
        if named.is_file():
            return named
        place = self.path.joinpath(*file.relative_to(self.path).parts[:-1])
        siblings = sorted(each for each in place.iterdir() if each.is_file())
        others = self.other / place.relative_to(self.path)
        theirs = sorted(others.iterdir()) if others.is_dir() else []
        index = siblings.index(file)
        return theirs[index] if index < len(theirs) else None


@pytest.fixture(scope="module")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Specimen]:
    """Returns a checkpoint of each kind; what is damaged is put back."""
    made = {}
    for kind, save in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        save(folder / "1", 1)
        save(folder / "2", 2)
        made[kind] = Specimen(folder / "1", folder / "2", content(folder / "1"))
        assert made[kind].content != content(folder / "2")
    return made


@contextmanager
def damaged(specimen: Specimen, file: Path, damage: str, chance: random.Random) -> Iterator[bool]:
    """Damages a file for a while; says whether it is another one now."""
    before = file.read_bytes()
    after: bytes | None = before
    if damage == "flip" and before:
        position = chance.randrange(len(before))
        flipped = bytes([before[position] ^ 1 << chance.randrange(8)])
        after = before[:position] + flipped + before[position + 1 :]
    elif damage == "truncate" and before:
        after = before[: chance.randrange(len(before))]
    elif damage == "swap":
        theirs = specimen.counterpart(file)
        after = before if theirs is None else theirs.read_bytes()
    elif damage == "remove":
        after = None
    if after is None:
        file.unlink()
    else:
        file.write_bytes(after)
    try:
        yield after != before
    finally:
        file.write_bytes(before)


def is_self_proving(specimen: Specimen, file: Path) -> bool:
    """Says whether a file is one of an array, whose damage is its leaf's."""
    inside = file.relative_to(specimen.path).parts
    is_chunk = "c" in inside or file.name.replace(".", "").isdigit()
    return is_chunk or "d" in inside or file.name in ARRAY_DOCUMENTS


def outcome(specimen: Specimen, file: Path) -> str:
    """Loads and verifies what is damaged: tells what came of it, in a few words."""
    try:
        loaded = "the same" if content(specimen.path) == specimen.content else "SOMETHING ELSE"
    except errors.CheckpointError:
        loaded = "an error"
    except Exception as error:
        loaded = f"UNTYPED {type(error).__name__}"
    report = ocp.verify(specimen.path)
    paths = {each.path for each in report.damage}
    if str(file) in paths or any(str(file) in each.problem for each in report.damage):
        verified = "named"
    elif is_self_proving(specimen, file) and not report.is_intact:
        verified = "named by leaf"
    elif is_self_proving(specimen, file) and loaded == "the same":
        verified = "no value is in these bytes"
    else:
        verified = "UNNOTICED"
    return f"{loaded}, {verified}"


def explain(kind: str, specimen: Specimen, file: Path, damage: str, result: str) -> str:
    """Tells of a case that went wrong."""
    return f"{kind} {file.relative_to(specimen.path)} {damage}: {result}"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_f21_damage_of_each_document_is_found_and_named(
    specimens: dict[str, Specimen], kind: str, damage: str
) -> None:
    """F21: no damaged document loads as something else, and `verify` names it."""
    specimen, chance = specimens[kind], random.Random(f"{kind} {damage}")
    wrong = []
    for file in specimen.files:
        if is_self_proving(specimen, file):
            continue
        for _ in range(3 if damage in ("flip", "truncate") else 1):
            with damaged(specimen, file, damage, chance) as is_another:
                result = outcome(specimen, file) if is_another else ""
            if any(word.isupper() for word in result.replace(",", "").split()):
                wrong.append(explain(kind, specimen, file, damage, result))
    assert not wrong, "\n".join(wrong)


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_i12_random_damage_never_loads_something_else(
    specimens: dict[str, Specimen], soak: Callable[[int, int], int]
) -> None:
    """I12: flips, truncations and swaps over every kind of file."""
    chance = random.Random(19)
    counts: Counter[str] = Counter()
    wrong = []
    tried, wanted = 0, soak(200, 5000)
    while tried < wanted:
        kind = chance.choice(list(specimens))
        specimen = specimens[kind]
        file = chance.choice(specimen.files)
        damage = chance.choice(["flip", "truncate", "swap"])
        with damaged(specimen, file, damage, chance) as is_another:
            if not is_another:
                continue
            result = outcome(specimen, file)
        tried += 1
        counts[f"{damage}: {result}"] += 1
        if any(word.isupper() for word in result.replace(",", "").split()):
            wrong.append(explain(kind, specimen, file, damage, result))
    for line, count in sorted(counts.items()):
        print(f"{count:6}  {line}")
    assert not wrong, "\n".join(wrong)


def test_what_was_added_is_ignored_and_reported(specimens: dict[str, Specimen]) -> None:
    """Files that were not saved change nothing."""
    specimen = specimens["database"]
    added = [specimen.path / "state/array_metadatas/process_00", specimen.path / "state/extra"]
    for file in added:
        file.write_text("[]")
    try:
        assert content(specimen.path) == specimen.content
        report = ocp.verify(specimen.path)
        assert report.is_intact
        assert report.added == ("state/array_metadatas/process_00", "state/extra")
        assert "added, and ignored" in str(report)
    finally:
        for file in added:
            file.unlink()


def test_a_copy_elsewhere_and_a_deletion_prove_themselves(
    specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    """Neither another path nor a checkpointable less is damage."""
    copy = Path(shutil.copytree(specimens["several"].path, tmp_path / "copy"))
    assert ocp.verify(copy).is_intact
    ocp.delete(copy, checkpointable_name="config")
    report = ocp.verify(copy)
    assert report.is_intact, report
    assert report.unproven_documents == ()
    assert set(ocp.load_checkpointables(copy, {"state": None})) == {"state"}


def test_what_has_no_digests_loads_and_is_said_to_be_unproven(
    specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    """As Orbax and older versions have written it."""
    copy = Path(shutil.copytree(specimens["database"].path, tmp_path / "copy"))
    (copy / "commit_success.txt").write_text("Checkpoint commit was successful to copy")
    document = copy / "_CHECKPOINT_METADATA"
    document.write_bytes(document.read_bytes().rstrip())
    assert content(copy) == specimens["database"].content
    report = ocp.verify(copy)
    assert report.is_intact
    assert report.unproven_documents == ("state",)
    assert "documents without digests: state" in str(report)
