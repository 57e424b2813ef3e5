"""Fresh interpreters that run one of the programs beside this file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orbax_async

PROGRAMS = Path(__file__).parent / "programs"
TESTS = PROGRAMS.parent.parent


def _environment() -> dict[str, str]:
    path = [str(Path(orbax_async.__file__).parent.parent), str(TESTS)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu"}


def start(program: str, *arguments: object, devices: int = 1) -> subprocess.Popen[str]:
    """Starts a program; the caller waits for it."""
    command = [sys.executable, "-X", "faulthandler", str(PROGRAMS / program)]
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=_environment() | {"XLA_FLAGS": flags},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    program: str, *arguments: object, timeout: float = 300, devices: int = 1
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, and kills it if it has none."""
    with start(program, *arguments, devices=devices) as child:
        try:
            stdout, stderr = child.communicate(timeout=timeout)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def output(program: str, *arguments: object, timeout: float = 300, devices: int = 1) -> str:
    """Returns what a program that must succeed prints."""
    done = run(program, *arguments, timeout=timeout, devices=devices)
    assert done.returncode == 0, f"{program} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout
