"""Faults below Python: whichever system call fails, nothing is lost and nothing is hidden."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import orbax_async

HERE = Path(__file__).parent
COMPILER = shutil.which("cc")
OPERATIONS = [
    *("save", "overwrite", "in-place", "overwrite-in-place", "checkpointables", "delete"),
    *("part", "finalize", "step", "load", "metadata", "verify"),
]
IS_FULL = os.environ.get("ORBAX_ASYNC_SOAK") == "full"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="preloads C code"),
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiles what stands between the process and libc."""
    built = tmp_path_factory.mktemp("faults") / "faults.so"
    flags = ["-O2", "-shared", "-fPIC", "-o", str(built)]
    subprocess.run([str(COMPILER), *flags, str(HERE / "faults.c"), "-ldl"], check=True)
    return built


def output_below(program: str, library: Path, *arguments: object) -> str:
    """Returns what a program prints that runs above the library, and must succeed."""
    source = str(Path(orbax_async.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(HERE / "programs" / program), str(library), *map(str, arguments)],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.acceptance
@pytest.mark.parametrize("is_sticky", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_that_fails_is_an_error_that_loses_nothing(
    library: Path, tmp_path: Path, operation: str, is_sticky: bool
) -> None:
    """F23, F25, F26, I15: each call fails; a typed error, the old state, and the next one works."""
    stride = 1 if IS_FULL else 17
    words = [operation, str(stride), *["sticky"] * is_sticky]
    said = output_below("fault_loop.py", library, tmp_path, *words)
    told = json.loads(said.splitlines()[-1])
    print(f"{operation}, sticky={is_sticky}: {told['cases']} faults, {told['raised']} errors")
    assert not told["wrong"], "\n".join(told["wrong"][:20])
    assert told["raised"] > 0


@pytest.mark.parametrize("options", [{"use_ocdbt": False}, {"compression_min_saving": 0.0}])
def test_f27_an_interrupted_read_is_begun_again(
    library: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """F27: a signal that interrupts any one open or read, TensorStore's too, fails no load."""
    said = output_below("interrupted_loads.py", library, tmp_path, json.dumps(options))
    assert int(said) > 20
