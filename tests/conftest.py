"""What every test lives under: eight host devices, both loops, and the watchers.

Async tests need no marker: each runs twice, on asyncio and on uvloop. Three watchers look at every
test: no blocking call under a running loop, no temporary checkpoint left behind, no thread leaked.
"""

from __future__ import annotations

import builtins
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports jax, which reads both once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

import forbiddenfruit
import numpy as np
import pytest
from blockbuster import BlockBuster, BlockBusterFunction
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import jax

TESTS = Path(__file__).parent
LOOPS = {"asyncio": False} if sys.platform == "win32" else {"asyncio": False, "uvloop": True}

# Blockbuster imports forbiddenfruit, which replaces dir() by one that asks each object for its
# __name__; Orbax's Composite answers that with a KeyError.
builtins.dir = forbiddenfruit.__dir__

# What may block its caller, on whichever thread that is. Each entry is a promise of the API.
BLOCKING_BY_CONTRACT = {
    # The sync doors; an eager save_async waits for its values to be staged.
    "orbax_async/_response.py": {"result", "wait_staged", "_finish", "_wait_until_released"},
    # The calls themselves look at the path, and may be the first to ask for jax's devices.
    "orbax_async/_api/save.py": {"save_async", "save_checkpointables_async"},
    "orbax_async/_api/load.py": {"load_async", "load_checkpointables_async"},
    "orbax_async/_api/verify.py": {"verify_async"},
    "orbax_async/_api/metadata.py": {"metadata", "checkpointables_metadata"},
    "orbax_async/_api/delete.py": {"delete_async"},
    "orbax_async/partial.py": {"save_async", "finalize_async"},
    # Users' handlers may block, as Orbax lets them.
    "orbax_async/handlers/user_code.py": {"__await__"},
    # A run's directory is listed when it is opened; plain methods block, and so do those that begin
    # something. Coroutines do not: `ready`, `wait_async`, `aclose`.
    "orbax_async/training/checkpointer.py": {
        *("__init__", "checkpoints", "latest", "reload", "root_metadata", "should_save"),
        *("save_async", "save_checkpointables_async", "load_async", "load_checkpointables_async"),
        *("metadata", "checkpointables_metadata", "delete_async", "wait", "close"),
    },
    # What a step says of itself is read when it is first asked for.
    "orbax_async/path/step.py": {"metrics", "time", "custom_metadata"},
    # The first operation of a process waits for the loop thread to start.
    "orbax_async/_engine/loop.py": {"__init__"},
}
RUNS_THE_LOOP = ["orbax_async._engine.loop"]
# Reads of source lines for a traceback, in whichever thread something was raised.
READS_SOURCE = {
    "linecache.py": {"updatecache"},
    "<frozen linecache>": {"updatecache"},
}

settings.register_profile(
    "quick",
    database=None,
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz", settings.get_profile("quick"), derandomize=False, max_examples=5_000
)
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by the room it lies in, so that no file has to repeat it."""
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        match item.path.relative_to(TESTS).parts[0]:
            case "acceptance":
                item.add_marker("acceptance")
            case "fuzz":
                item.add_marker("fuzz")
            case "interop":
                item.add_marker("leaves_threads")
            case "multiprocess":
                item.add_marker("multiprocess")


@pytest.fixture(scope="module", params=LOOPS.values(), ids=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Runs each async test once on asyncio and once on uvloop."""
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
def mesh8() -> jax.sharding.Mesh:
    """Eight host devices as a 4x2 mesh with axes x and y."""
    import jax

    return jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded source of random values."""
    return np.random.default_rng(0)


@pytest.fixture
def soak() -> Callable[[int, int], int]:
    """Picks the size of a soak: ``soak(20, 1000)`` is 1000 only under ORBAX_ASYNC_SOAK=full."""
    is_full = os.environ.get("ORBAX_ASYNC_SOAK") == "full"
    return lambda quick, full: full if is_full else quick


@pytest.fixture(scope="session", autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """Raises BlockingError where orbax_async blocks a running loop: the caller's or the engine's.

    Only calls with a frame of the package on their stack count; tests may block their own loop, and
    users' tasks the engine's, whose thread begins in `_engine/loop.py`.
    """
    watcher = BlockBuster("orbax_async", excluded_modules=RUNS_THE_LOOP)
    watcher.functions |= _more_blocking_functions()
    for function in watcher.functions.values():
        for filename, names in (BLOCKING_BY_CONTRACT | READS_SOURCE).items():
            function.can_block_in(filename, names)
    watcher.activate()
    yield watcher
    watcher.deactivate()


def _more_blocking_functions() -> dict[str, BlockBusterFunction]:
    """The calls blockbuster doesn't know: opening and syncing files, waiting for TensorStore."""
    import tensorstore as ts

    files = ["builtins.open", "io.open", "os.open"]
    files += ["os.fdatasync", "os.fsync", "os.sync", "os.posix_fallocate", "os.copy_file_range"]
    files += ["os.pread", "os.preadv", "os.pwrite", "os.pwritev", "os.readv", "os.writev"]
    functions = {
        name: BlockBusterFunction(
            None, name, scanned_modules="orbax_async", excluded_modules=RUNS_THE_LOOP
        )
        for name in files
    }
    for method in ("result", "exception"):
        functions[f"tensorstore.Future.{method}"] = BlockBusterFunction(
            ts.Future,
            method,
            scanned_modules="orbax_async",
            excluded_modules=RUNS_THE_LOOP,
            can_block_predicate=lambda future, *_, **__: future.done(),
        )
    return functions


@pytest.fixture(autouse=True)
def no_leaked_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a Python thread running; the engine's own threads stay."""
    before = set(threading.enumerate())
    yield
    if request.node.get_closest_marker("leaves_threads"):
        return
    started = [t for t in threading.enumerate() if t not in before and _is_stray(t)]
    for thread in started:
        thread.join(timeout=2)
    leaked = [thread for thread in started if thread.is_alive()]
    if leaked:
        pytest.fail(f"threads outlive the test: {leaked}")


def _is_stray(thread: threading.Thread) -> bool:
    # A native thread that only passed through Python shows up as a dummy, for ever.
    is_native = isinstance(thread, threading._DummyThread)
    return not is_native and not thread.name.startswith("orbax_async")


@pytest.fixture(autouse=True)
def no_leftovers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a temporary checkpoint in its tmp_path."""
    # Requested first, so that it is still there when the test is over.
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is None or request.node.get_closest_marker("leaves_temporaries"):
        return
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.orbax-checkpoint-tmp*"))
    if left:
        pytest.fail(f"temporary checkpoints outlive the test: {left}")
