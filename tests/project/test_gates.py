"""The quality gates bite: each is shown to reject what it exists to reject."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import tensorstore as ts
from anyio.from_thread import start_blocking_portal
from blockbuster import BlockingError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "orbax_async"
TESTS = ROOT / "tests"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
# A path with an underscored part is private; ``__init__`` is not such a part.
PUBLIC = [p for p in SOURCES if not re.search(r"(^|/)_(?!_init__)", str(p.relative_to(PACKAGE)))]
# All that is written here by hand; what an environment or a build puts into the folder is not.
FOLDERS = ("orbax_async", "tests", "benchmarks", "examples")
EVERY_FILE = sorted(
    [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
)
MAX_LINES = 600

STRAYS = {
    "asyncio.run": "import asyncio\nasyncio.run(None)\n",
    "asyncio.Runner": "import asyncio\nasyncio.Runner()\n",
    "asyncio.new_event_loop": "import asyncio\nasyncio.new_event_loop()\n",
    "asyncio.get_event_loop": "import asyncio\nasyncio.get_event_loop()\n",
    "asyncio.create_task": "from asyncio import create_task\ncreate_task(None)\n",
    "asyncio.ensure_future": "import asyncio as aio\naio.ensure_future(None)\n",
    "asyncio.to_thread": "import asyncio\nasyncio.to_thread(print)\n",
    "anyio.run": "import anyio\nanyio.run(None)\n",
    "anyio.to_thread.run_sync": "from anyio import to_thread\nto_thread.run_sync(print)\n",
    "anyio.from_thread.start_blocking_portal": (
        "from anyio.from_thread import start_blocking_portal\nstart_blocking_portal()\n"
    ),
    "concurrent.futures.ThreadPoolExecutor": (
        "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor()\n"
    ),
    "concurrent.futures.ProcessPoolExecutor": (
        "import concurrent.futures\nconcurrent.futures.ProcessPoolExecutor()\n"
    ),
    "jax._src": "from jax._src import distributed\nprint(distributed)\n",
    "nest_asyncio": "import nest_asyncio\nnest_asyncio.apply()\n",
    "orbax": "import orbax.checkpoint\nprint(orbax)\n",
    "threading.Thread": "import threading\nthreading.Thread()\n",
    "threading.Timer": "from threading import Timer\nTimer(1, print)\n",
    "time.sleep": "import time\ntime.sleep(1)\n",
    "uvloop.install": "import uvloop\nuvloop.install()\n",
    "uvloop.new_event_loop": "import uvloop\nuvloop.new_event_loop()\n",
    "uvloop.run": "import uvloop\nuvloop.run(None)\n",
}
# What reaches for files without a `Directory`: functions of `os` and `os.path`, methods of paths.
FILE_FUNCTIONS = {
    *("access", "chmod", "fdatasync", "fsync", "fwalk", "link", "listdir", "lstat", "makedirs"),
    *("mkdir", "open", "readlink", "remove", "removedirs", "rename", "renames", "replace", "rmdir"),
    *("scandir", "stat", "statvfs", "symlink", "sync", "truncate", "unlink", "utime", "walk"),
    *("exists", "getmtime", "getsize", "isdir", "isfile", "islink", "lexists", "samefile"),
}
FILE_METHODS = {
    *("exists", "glob", "is_dir", "is_file", "is_symlink", "iterdir", "lstat", "mkdir", "rmdir"),
    *("read_bytes", "read_text", "rglob", "unlink", "write_bytes", "write_text"),
}
FILE_MODULES = {"fcntl", "shutil", "tempfile"}
# The directories themselves, and what looks at a process in /proc.
REACHES_FOR_FILES = ("_storage/", "_commit/leftovers.py")
# Methods of a loop that start a thread, or drive a loop that someone else owns.
LOOP_METHODS = {"run_forever", "run_in_executor", "run_until_complete"}


def _ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _ruff(source: str, filename: str) -> list[str]:
    """Returns the messages of ruff for ``source``, as if it lay at ``filename`` in this project."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=json"]
    done = subprocess.run(
        [*command, "--stdin-filename", filename, "-"],
        cwd=ROOT,
        input=source,
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    return [f"{found['code']} {found['message']}" for found in json.loads(done.stdout)]


COMPLEX = {
    "C901": 'def f(a):\n    """Docs."""\n' + "    if a:\n        a = 1\n" * 13,
    "PLR0912": 'def f(a):\n    """Docs."""\n' + "    if a:\n        a = 1\n" * 13,
    "PLR0913": 'def f(a, b, c, d, e, g, h):\n    """Docs."""\n',
    "PLR0915": 'def f(a):\n    """Docs."""\n' + "    a = 1\n" * 51,
    "PLR1702": 'def f(a):\n    """Docs."""\n'
    + "".join(f"{'    ' * (depth + 1)}while a:\n" for depth in range(7))
    + f"{'    ' * 8}a = 1\n",
}


@pytest.mark.parametrize("code", COMPLEX)
def test_ruff_bans_what_is_hard_to_follow(code: str) -> None:
    """A function has bounded branches, arguments, statements and nesting."""
    messages = _ruff(COMPLEX[code], "orbax_async/_storage/hard.py")
    assert any(m.startswith(code) for m in messages), messages


def test_no_function_is_too_long() -> None:
    """No function of the package has more than 60 lines, its docstring aside."""
    for path in SOURCES:
        for node in ast.walk(_parsed(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            assert node.end_lineno is not None
            told = len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert node.end_lineno - node.lineno + 1 - told <= 60, f"{path}: {node.name}"


@pytest.mark.parametrize("name", STRAYS)
def test_ruff_bans_stray_loops_and_threads(name: str) -> None:
    """A room can't start a loop or a thread, sleep, or reach into JAX or Orbax."""
    messages = _ruff(STRAYS[name], "orbax_async/_storage/stray.py")
    assert any(m.startswith(f"TID251 `{name}") for m in messages), messages


def test_every_banned_name_is_shown_to_be_banned() -> None:
    """The configuration and the samples above list the same names."""
    ruff = PYPROJECT["tool"]["ruff"]["lint"]
    assert set(ruff["flake8-tidy-imports"]["banned-api"]) == set(STRAYS)


def test_the_loop_alone_may_start_a_thread() -> None:
    """One file of the package is excused, and the tests and examples are."""
    source = STRAYS["threading.Thread"]
    for place in ("orbax_async/_engine/loop.py", "tests/test_x.py", "examples/demo/main.py"):
        assert not [m for m in _ruff(source, place) if m.startswith("TID251")], place
    assert [m for m in _ruff(source, "orbax_async/_engine/pool.py") if m.startswith("TID251")]


def test_ruff_asks_each_test_what_it_proves() -> None:
    """A test without a docstring is refused."""
    assert any(m.startswith("D103") for m in _ruff("def test_x():\n    pass\n", "tests/test_x.py"))


def test_the_config_of_ruff_excuses_no_other_file() -> None:
    """The ban on stray loops isn't lifted for a whole room."""
    ignores = PYPROJECT["tool"]["ruff"]["lint"]["per-file-ignores"]
    excused = [place for place, codes in ignores.items() if "TID251" in codes]
    assert excused == ["orbax_async/_engine/loop.py", "{benchmarks,examples,tests}/**"]


@pytest.mark.parametrize("path", SOURCES, ids=_ids)
def test_no_ban_is_lifted_by_a_comment(path: Path) -> None:
    """No file of the package silences the ban on stray loops and threads for itself."""
    assert not re.search(r"#\s*(ruff:\s*)?noqa(?!:)|noqa:.*TID", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=_ids)
def test_loops_are_driven_by_the_loop_room_alone(path: Path) -> None:
    """No other file calls the methods of a loop that start a thread or run the loop."""
    if path == PACKAGE / "_engine" / "loop.py":
        return
    names = {node.attr for node in ast.walk(_parsed(path)) if isinstance(node, ast.Attribute)}
    assert not names & LOOP_METHODS


@pytest.mark.parametrize("path", SOURCES, ids=_ids)
def test_files_are_reached_through_directories(path: Path) -> None:
    """No other room opens, lists, moves or removes files by itself, and none looks for them."""
    if path.relative_to(PACKAGE).as_posix().startswith(REACHES_FOR_FILES):
        return
    assert not _file_calls(path.read_text("utf-8"))


def _file_calls(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                found += [alias.name for alias in aliases if alias.name in FILE_MODULES]
            case ast.ImportFrom(module=str(module), names=aliases):
                of_os = module in ("os", "os.path", "pathlib")
                found += [a.name for a in aliases if of_os or module in FILE_MODULES]
            case ast.Attribute(value=ast.Name("os"), attr=name) if name in FILE_FUNCTIONS:
                found.append(f"os.{name}")
            case ast.Attribute(value=ast.Attribute(attr="path"), attr=name) if (
                name in FILE_FUNCTIONS
            ):
                found.append(f"os.path.{name}")
            case ast.Call(func=ast.Attribute(attr=name)) if name in FILE_METHODS:
                found.append(f".{name}()")
            case ast.Call(func=ast.Name("open")):
                found.append("open()")
    return found


@pytest.mark.parametrize(
    "source",
    [
        *("open('x')", "os.open('x', 0)", "os.path.exists('x')", "path.read_text()"),
        *("import shutil", "from os import rename", "from os.path import isdir"),
        *("from shutil import rmtree", "from pathlib import Path", "(a / 'b').mkdir()"),
    ],
)
def test_the_search_for_files_that_are_reached_for_finds_them(source: str) -> None:
    """The test above would fail."""
    assert _file_calls(source)


def test_mypy_is_strict_and_excuses_nothing_of_ours() -> None:
    """Strict mode is on, covers the package, and no override loosens it."""
    mypy = PYPROJECT["tool"]["mypy"]
    assert mypy["strict"] is True
    assert "orbax_async" in mypy["files"]
    assert "exclude" not in mypy
    for override in mypy["overrides"]:
        assert not [name for name in override["module"] if name.startswith("orbax_async")]


def test_mypy_refuses_what_has_no_type(tmp_path: Path) -> None:
    """With this project's configuration, a function without annotations is an error."""
    sample = tmp_path / "sample.py"
    sample.write_text("def double(x):\n    return 2 * x\n")
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *config, str(sample)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "[no-untyped-def]" in done.stdout


@pytest.mark.parametrize("path", EVERY_FILE, ids=_ids)
def test_no_file_is_too_long(path: Path) -> None:
    """No Python file is longer than 600 lines, be it of the package, a test or an example."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_two_modules_share_a_name() -> None:
    """A basename says which module is meant, and no room has a drawer for what fits nowhere."""
    names = [path.stem for path in SOURCES if path.stem != "__init__"]
    assert len(names) == len(set(names)), sorted(names)
    assert not set(names) & {"base", "common", "helpers", "impl", "manager", "types", "utils"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=_ids)
def test_a_room_says_what_it_does_and_does_not(path: Path) -> None:
    """A room opens with its two lists and re-exports only."""
    tree = _parsed(path)
    if path.parent != PACKAGE:
        docstring = ast.get_docstring(tree) or ""
        assert re.search(r"^\W*Does\b(?! not)", docstring, re.M), "no list of what it does"
        assert re.search(r"^\W*Does not\b", docstring, re.M), "no list of what it does not"
    defined = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    names = {definition.name for definition in defined}
    assert names <= {"__getattr__", "__dir__"}, names


@pytest.mark.parametrize("path", PUBLIC, ids=_ids)
def test_all_is_sorted_and_true(path: Path) -> None:
    """Each public module lists its names once, in ruff's order, and each of them exists."""
    if len(_parsed(path).body) == 1:
        return  # A room with nothing but its docstring.
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    names = list(module.__all__)
    assert names == sorted(set(names), key=_order)
    assert not [name for name in names if not hasattr(module, name)]


def test_public_names_are_reexported_by_their_own_name() -> None:
    """``X as X`` for type checkers; the package takes each name from the same place."""
    package = importlib.import_module("orbax_async")
    shown = _reexported(PACKAGE / "__init__.py")
    assert set(package.__all__) == shown.keys() == set(dir(package))
    for name, home in shown.items():
        value = getattr(importlib.import_module(home), name, None)
        assert getattr(package, name) is (value or importlib.import_module(f"{home}.{name}")), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def _reexported(path: Path) -> dict[str, str]:
    """Returns what a module takes from others of the package by its own name, and from where."""
    found = {}
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orbax_async"):
            for alias in node.names:
                assert alias.asname == alias.name, f"line {node.lineno}"
                found[alias.name] = str(node.module)
    return found


def test_the_import_leaves_the_engine_alone() -> None:
    """Importing the package imports none of its parts, nor TensorStore or anyio."""
    program = "import sys, orbax_async; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = done.stdout.split()
    assert "orbax_async" in modules
    assert not {"jax", "tensorstore", "anyio", "orbax_async._engine"} & set(modules)


def test_each_module_can_be_the_first() -> None:
    """No module needs another one of the package to have been imported before it."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    program = f"""
        import importlib, os, anyio, jax.experimental.multihost_utils, tensorstore, uvloop
        for name in {[name.removesuffix(".__init__") for name in modules]}:
            if os.fork() == 0:
                importlib.import_module(name)
                os._exit(0)
            assert os.wait()[1] == 0, name
    """
    program = textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_imports_the_private_half_of_jax(folder: str) -> None:
    """No file imports ``jax._src``, not even a test."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(_parsed(path)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [n for n in names if f"{n}.".startswith("jax._src.")], f"{path}:{node}"


def test_readme_and_ci_name_the_same_commands() -> None:
    """``.ci/run`` runs the test command that README.md and the noxfile give, word for word."""
    command = (
        r'python3 -m venv .venv && .venv/bin/pip install -e ".[test,demo]" nox && .venv/bin/nox'
    )
    for name in ("README.md", "noxfile.py", ".ci/run"):
        assert re.search(rf"^\s*{re.escape(command)}$", (ROOT / name).read_text("utf-8"), re.M), (
            name
        )
    assert f"{command} -s demo\n" in (ROOT / "README.md").read_text("utf-8")


# ------------------------------------------------------------------------------- the layers

ROOMS = {
    "_names": "",
    "errors": "",
    "registration": "from orbax_async import errors",
    "options": "import jax\nfrom orbax_async import registration",
    "arrays": "import jax",
    "_trace": "",
    "_storage": "from orbax_async import options, multihost",
    "tree": "from orbax_async import options, _trace",
    "path": "from orbax_async import _storage, multihost",
    "path.step": "from orbax_async import _names",
    "multihost": "",
    "_engine": "from orbax_async import _storage",
    "_engine.plan": "from orbax_async import errors\nimport dataclasses",
    "context": "from orbax_async import _engine, options",
    "_response": "from orbax_async import context",
    "_operation": "from orbax_async import _response",
    "_commit": "from orbax_async import _operation, _storage",
    "handlers": "from orbax_async import _commit, context",
    "_api": "from orbax_async import handlers",
    "training": "from orbax_async import _api, path",
}
DOWN = "Imports only point down"
PURE = "The plan is pure"
OFFENCES = {
    "upwards": (DOWN, "errors", "from orbax_async import handlers"),
    "upwards from the engine": (DOWN, "_engine", "from orbax_async import _commit"),
    "sideways below": (DOWN, "tree", "from orbax_async import path"),
    "a room without a layer": (DOWN, "drawer", ""),
    "an impure plan": (PURE, "_engine.plan", "import tensorstore"),
    "an impure plan by way of a room": (PURE, "_engine.plan", "from orbax_async import options"),
    "orbax": ("Orbax is never a runtime dependency", "_storage", "import orbax.checkpoint"),
}


def _lint_imports(folder: Path, rooms: dict[str, str]) -> subprocess.CompletedProcess[str]:
    config = str(ROOT / "pyproject.toml")
    (folder / "orbax_async").mkdir()
    (folder / "orbax_async" / "__init__.py").touch()
    for name, source in rooms.items():
        path = folder / "orbax_async" / name.replace(".", "/")
        path.mkdir()
        (path / "__init__.py").write_text(source)
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", config],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_imports_that_point_down_pass(tmp_path: Path) -> None:
    """The contracts accept a package in which each room only looks down."""
    done = _lint_imports(tmp_path, ROOMS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("name", OFFENCES)
def test_imports_that_point_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    """Up, sideways, a room without a layer, an impure plan and Orbax: each breaks its contract."""
    contract, room, source = OFFENCES[name]
    done = _lint_imports(tmp_path, ROOMS | {room: source})
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout


# ------------------------------------------------------------------- the fixtures of conftest


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty test suite under this project's settings and fixtures."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text("utf-8"))
    (pytester.mkdir("tests") / "conftest.py").write_text((TESTS / "conftest.py").read_text("utf-8"))
    return pytester


def test_async_tests_run_on_both_loops(suite: pytest.Pytester) -> None:
    """An async test needs no marker and runs on asyncio and on uvloop, each truly running."""
    _write(
        suite,
        """
        import asyncio

        async def test_loop(request):
            running = type(asyncio.get_running_loop()).__module__.split(".")[0]
            assert running == request.node.callspec.id
    """,
    )
    result = suite.runpytest_subprocess("-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*test_loop?asyncio? PASSED*", "*test_loop?uvloop? PASSED*"])


def test_a_warning_is_an_error(suite: pytest.Pytester) -> None:
    """A warning fails the test that causes it."""
    _write(
        suite,
        """
        import warnings

        def test_warns():
            warnings.warn("careful", stacklevel=1)
    """,
    )
    suite.runpytest_subprocess().assert_outcomes(failed=1)


def test_a_leaked_thread_is_an_error(suite: pytest.Pytester) -> None:
    """A thread that outlives its test fails it, unless it is the engine's or excused."""
    _write(
        suite,
        """
        import threading
        import pytest

        stop = threading.Event()

        def start(name):
            threading.Thread(target=stop.wait, name=name, daemon=True).start()

        def test_leaks():
            start("worker")

        def test_engine():
            start("orbax_async-loop")

        @pytest.mark.leaves_threads
        def test_excused():
            start("worker")
    """,
    )
    suite.runpytest_subprocess().assert_outcomes(passed=3, errors=1)


def test_a_leftover_is_an_error(suite: pytest.Pytester) -> None:
    """A temporary checkpoint in tmp_path fails its test, at any depth, unless it is excused."""
    _write(
        suite,
        """
        import pytest

        def leave(folder):
            (folder / "run" / "3.orbax-checkpoint-tmp").mkdir(parents=True)

        def test_leaves(tmp_path):
            leave(tmp_path)

        @pytest.mark.leaves_temporaries
        def test_excused(tmp_path):
            leave(tmp_path)
    """,
    )
    suite.runpytest_subprocess().assert_outcomes(passed=2, errors=1)


def test_a_room_marks_its_tests(suite: pytest.Pytester) -> None:
    """A test in tests/fuzz or tests/acceptance can be selected by mark without naming one."""
    for room in ("acceptance", "fuzz", "multiprocess"):
        _write(suite, "def test_it(): pass", f"{room}/test_{room}.py")
    for room in ("acceptance", "fuzz", "multiprocess"):
        suite.runpytest_subprocess("-m", room).assert_outcomes(passed=1, deselected=2)


def test_dir_is_the_builtin() -> None:
    """The watcher's library doesn't change how stock Orbax behaves in these tests."""
    with_composite = type("Composite", (), {"__getattr__": lambda self, name: {}[name]})
    assert "__getattr__" in dir(with_composite())


BLOCKING = {
    "time.sleep": "time.sleep(0)",
    "open": "open(path).close()",
    "read": "path.read_bytes()",
    "stat": "os.stat(path)",
    "fsync": "os.fsync(fd)",
    "pread": "os.pread(fd, 1, 0)",
    "tensorstore": "future.result()",
}


@pytest.fixture
def sample(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The names that the blocking calls need."""
    path = tmp_path / "sample"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDONLY)
    promise, future = ts.Promise.new()
    yield {"os": os, "time": time, "path": path, "fd": fd, "promise": promise, "future": future}
    os.close(fd)


@pytest.mark.parametrize("name", BLOCKING)
async def test_a_blocking_call_on_a_loop_is_an_error(name: str, sample: dict[str, Any]) -> None:
    """A blocking call of the package raises under a running loop, and passes in a worker."""
    code = compile(BLOCKING[name], str(PACKAGE / "_storage" / "sample.py"), "exec")
    with pytest.raises(BlockingError):
        exec(code, sample)

    sample["promise"].set_result(None)
    await anyio.to_thread.run_sync(exec, code, sample)


def test_a_loop_in_another_thread_is_watched(sample: dict[str, Any]) -> None:
    """A loop that the test doesn't run itself, such as the engine's, is watched as well."""
    code = compile(BLOCKING["fsync"], str(PACKAGE / "_storage" / "sample.py"), "exec")
    with start_blocking_portal() as portal, pytest.raises(BlockingError):
        portal.call(exec, code, sample)


# ---------------------------------------------------------------------------------- helpers


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _write(suite: pytest.Pytester, source: str, name: str = "test_it.py") -> None:
    path = suite.path / "tests" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(source))


def _order(name: str) -> tuple[int, str]:
    """Ruff's order of ``__all__``: CONSTANTS, then Classes, then functions."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)
