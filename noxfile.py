"""Everything one can run in this repository; ``nox --list`` prints it.

Sessions run in the environment that nox itself is installed in, so that nothing is installed twice:

    python3 -m venv .venv && .venv/bin/pip install -e ".[test,demo]" nox && .venv/bin/nox

Plain ``nox`` runs every quick gate; ``nox -s NAME`` runs one session, and what follows ``--`` goes
to its tool (``nox -s tests -- -k resharding``). Only ``build`` makes an environment of its own,
because it proves what a user gets from the wheel.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.sessions = [
    "lint",
    "layers",
    "types",
    "tests",
    "interop",
    "docs",
    "examples",
    "demo",
    "build",
]

INSTALL = 'pip install -e ".[test,demo]" nox'

# Runs against the installed wheel, from a directory that holds no source tree.
SMOKE = """
import asyncio, importlib.metadata, importlib.resources, sys
import jax, numpy as np
import orbax_async as ocp

assert importlib.resources.files(ocp).joinpath("py.typed").is_file()
assert "site-packages" in ocp.__file__, ocp.__file__

async def main(path):
    state = {"w": jax.numpy.arange(6.0).reshape(2, 3), "step": 7}
    await ocp.save_async(path, state)
    loaded = await ocp.load_async(path)
    assert loaded["step"] == 7
    np.testing.assert_array_equal(loaded["w"], state["w"])

asyncio.run(main(sys.argv[1]))
print("orbax-async", importlib.metadata.version("orbax-async"), "saved and loaded", sys.argv[1])
"""


def need(session: nox.Session, *modules: str) -> None:
    """Stops the session with the install command when a module it needs is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        session.error(f"{', '.join(missing)} not found beside nox. Run: {INSTALL}")


def python(session: nox.Session, *args: str, **env: str) -> None:
    """Runs the interpreter that runs nox."""
    session.run(sys.executable, *args, env=env, external=True)


def pytest(session: nox.Session, *args: str, **env: str) -> None:
    """Runs pytest quietly, with the session's own arguments last."""
    need(session, "pytest", "pytest_timeout", "blockbuster", "hypothesis", "orbax_async")
    python(session, "-m", "pytest", "-q", *args, *session.posargs, **env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, docstrings, banned names and formatting with ruff."""
    need(session, "ruff")
    python(session, "-m", "ruff", "check", *session.posargs)
    python(session, "-m", "ruff", "format", "--check")


@nox.session
def layers(session: nox.Session) -> None:
    """Prove that imports only point down, with import-linter."""
    need(session, "importlinter")
    # The console script, found beside the interpreter: import-linter has no ``python -m`` door.
    script = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    session.run(str(script), *session.posargs, external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with mypy in strict mode."""
    need(session, "mypy")
    targets = ["orbax_async", "benchmarks", *(str(p) for p in [Path("tests/typing")] if p.exists())]
    python(session, "-m", "mypy", *targets, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, soak and fuzz tests at their small size; stock Orbax has its own session."""
    apart = ["tests/interop", "tests/project/test_docs.py", "tests/project/test_examples.py"]
    ignored = [] if _names_a_test(session) else [f"--ignore={path}" for path in apart]
    pytest(session, *ignored)


@nox.session
def interop(session: nox.Session) -> None:
    """Read what stock Orbax wrote and let stock Orbax read what we wrote."""
    need(session, "orbax")
    pytest(session, "tests/interop")


@nox.session
def docs(session: nox.Session) -> None:
    """Run every Python block of README.md and docs/."""
    need(session, "flax", "optax", "orbax")
    pytest(session, "tests/project/test_docs.py")


@nox.session
def examples(session: nox.Session) -> None:
    """Run the scripts of examples/, stop them, run them again, and ask the server over HTTP."""
    need(session, "optax", "sklearn")
    pytest(session, "tests/project/test_examples.py")


@nox.session
def demo(session: nox.Session) -> None:
    """Train a real model, kill it in the middle of a save, resume it bit for bit."""
    need(session, "flax", "optax", "sklearn", "matplotlib", "orbax_async")
    python(session, "examples/demo/main.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure saving and loading beside Orbax and others (half an hour on a quiet machine)."""
    need(session, "orbax", "flax", "optax", "matplotlib", "orbax_async")
    workloads = "--workload=leaves-2000,gpt2,large-f32,large-f32-plain"
    python(session, "-m", "benchmarks", *(session.posargs or ["run", workloads]))


@nox.session
def gpu(session: nox.Session) -> None:
    """Measure staging from a GPU; fails where jax finds none."""
    need(session, "orbax", "optax", "matplotlib", "orbax_async")
    python(session, "-m", "benchmarks", "gpu", *session.posargs)


@nox.session
def acceptance(session: nox.Session) -> None:
    """Soak: 1,000 saves, 1,000 SIGKILLs, 50 exits of each kind (takes a while)."""
    pytest(session, "-m", "acceptance", "--timeout=3600", ORBAX_ASYNC_SOAK="full")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Run the randomised tests long, with fresh seeds (takes a while)."""
    pytest(session, "-m", "fuzz", "--hypothesis-profile=fuzz", "--timeout=3600")


@nox.session(venv_backend="venv")
def build(session: nox.Session) -> None:
    """Build the wheel, install it into an empty environment, save and load with it there."""
    wheels = Path(session.create_tmp()).resolve() / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    python(session, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels), ".")
    (wheel,) = wheels.glob("orbax_async-*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    forgotten = {p.as_posix() for p in Path("orbax_async").rglob("*.py*")} - shipped
    if forgotten := {name for name in forgotten if "__pycache__" not in name}:
        session.error(f"not in the wheel: {', '.join(sorted(forgotten))}")
    session.install(str(wheel))
    with session.chdir(wheels):
        session.run("python", "-c", SMOKE, str(wheels / "checkpoint"), env={"JAX_PLATFORMS": "cpu"})


def _names_a_test(session: nox.Session) -> bool:
    return any(Path(arg.partition("::")[0]).exists() for arg in session.posargs)
