"""Checkpoints that tests copy and alter, and the noise that stock Orbax makes when it fails."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from orbax.checkpoint import v1
from seals import unseal
from trees import base_state

import orbax_async as ocp

HERE = Path(__file__).parent

# A failed operation of Orbax closes its event loop under reads that go on, and leaves coroutines
# that nobody awaited. Both are reported whenever they are found, often in the next test.
NOISE = (
    r"ignore:Exception ignored in. None[\s\S]*Event loop is closed",
    r"ignore:Exception ignored in. <coroutine object (_create_paths|_read_array_index_and_)",
    r"ignore:Exception ignored in. <coroutine object PyTreeHandler\._background_load",
    r"ignore:Exception ignored in. <coroutine object Store\._get_array_metadatas",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the noise pass in these tests alone."""
    for item in items:
        if item.path.is_relative_to(HERE):
            for noise in NOISE:
                warning = "pytest.PytestUnraisableExceptionWarning"
                item.add_marker(pytest.mark.filterwarnings(f"{noise}:{warning}"))


@pytest.fixture(scope="module", autouse=True)
def no_noise_elsewhere() -> Iterator[None]:
    """Brings forth what Orbax left behind, before other tests run."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base state, saved once by either library."""
    folder = tmp_path_factory.mktemp("saved")
    for name, library in (("ours", ocp), ("orbax", v1)):
        library.save(folder / name, base_state())
    return {name: folder / name for name in ("ours", "orbax")}


@pytest.fixture
def copy_of(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of a saved checkpoint, free to be altered."""

    def copy(writer: str) -> Path:
        path = Path(shutil.copytree(saved[writer], tmp_path / writer))
        unseal(path)
        return path

    return copy
