"""The graph of imports, read from the source: it has no circle, however a module is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "orbax_async"


def _modules(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yields the modules that one imports: at its top, in a function, and by `import_module`.

    What is imported for type checkers alone counts too. A name that the root of the package looks
    up lazily does not make the root depend on its home.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in modules:
                    yield full
                elif node.module in modules:
                    yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = ast.unparse(node.args[0]).strip("'\"")
            yield from (each for each in modules if each == name)


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns modules that import each other in a circle; an empty list where there are none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for imported in sorted(graph[module]):
            if circle := visit(imported):
                return circle
        done.add(path.pop())
        return []

    for module in sorted(graph):
        if circle := visit(module):
            return circle
    return []


def _graph(root: Path) -> dict[str, set[str]]:
    modules = _modules(root)
    graph = {name: set(_imports(path, modules)) - {name} for name, path in modules.items()}
    graph[PACKAGE] = set()  # the root looks its names up when they are first used
    return graph


def test_no_module_imports_itself_by_way_of_others() -> None:
    """The package has no circle of imports, local ones and `import_module` counted."""
    graph = _graph(ROOT)
    assert len(graph) > 50
    assert _circle(graph) == []


@pytest.mark.parametrize(
    "source",
    [
        "from orbax_async import two\n",
        "def f():\n    from orbax_async.two import x\n",
        "import importlib\nimportlib.import_module('orbax_async.two')\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import orbax_async.two\n",
    ],
    ids=["at the top", "local", "import_module", "for types"],
)
def test_a_circle_is_found(source: str, tmp_path: Path) -> None:
    """A circle of two modules is found, whatever way one of them imports the other."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text(source)
    (folder / "two.py").write_text("from orbax_async.one import f\n")
    assert set(_circle(_graph(tmp_path))) == {"orbax_async.one", "orbax_async.two"}
