"""Every Python block of README.md and docs/ runs.

The blocks of one page run in order, as one script, in an empty directory. A block that opens with
```` ```python no-run ```` is only compiled: it shows a machine the tests don't have.

A guide that leads from one library to another has two sides: `before` and `after` mark the blocks
of one of them, `both` one that is run on each. Each side is a script of its own, in a directory of
its own, which begins with what the page has defined so far; and what a pair of blocks binds under
the same name has to be equal.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType

import jax
import numpy as np
import pytest

# Imported before any loop runs: reading a module that pytest rewrites is a blocking call.
from orbax_async import load_async, save_async  # noqa: F401

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")])
DATA = (jax.Array, np.ndarray, np.generic, bool, int, float, str)
FENCE = re.compile(
    r"^(?P<indent> *)```python(?P<tags>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```\s*$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block, compiled so that a traceback names the page and the page's line."""

    code: CodeType
    tags: frozenset[str]
    names: frozenset[str]  # that it binds itself, outside of functions and imports

    @property
    def is_run(self) -> bool:
        """Whether it runs, and is not only compiled."""
        return "no-run" not in self.tags


def blocks_of(page: Path) -> list[Block]:
    """Compiles every Python block of a page.

    Raises:
        SyntaxError: A block doesn't compile, also one that isn't run.
    """
    text = page.read_text(encoding="utf-8")
    blocks = []
    for fence in FENCE.finditer(text):
        lines_above = text.count("\n", 0, fence.start("code"))
        source = "\n" * lines_above + textwrap.dedent(fence["code"])
        code = compile(source, str(page), "exec", dont_inherit=True)
        bound = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
        names = frozenset(node.id for node in bound if isinstance(node.ctx, ast.Store))
        blocks.append(Block(code, frozenset(fence["tags"].split()), names))
    return blocks


@dataclass
class Side:
    """One script of a page, and the directory it runs in."""

    cwd: Path
    script: ModuleType = field(default_factory=lambda: ModuleType("__main__"))

    def run(self, block: Block) -> None:
        """Runs a block as part of ``__main__``."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "__main__", self.script)
            patch.chdir(self.cwd)
            exec(block.code, self.script.__dict__)

    def fork(self, name: str) -> Side:
        """Returns a side that begins with what this one has defined."""
        side = Side(self.cwd / name)
        side.cwd.mkdir()
        side.script.__dict__.update(self.script.__dict__)
        return side


def run_page(page: Path, cwd: Path) -> int:
    """Runs a page's blocks in order in ``cwd``, compares its sides, and returns how many ran."""
    main, sides = Side(cwd), dict[str, Side]()
    pending: Block | None = None
    blocks = [block for block in blocks_of(page) if block.is_run]
    for block in blocks:
        of = {"before", "after"} if "both" in block.tags else block.tags & {"before", "after"}
        if not of:
            main.run(block)
            continue
        sides = sides or {name: main.fork(name) for name in ("before", "after")}
        for name in sorted(of, reverse=True):
            sides[name].run(block)
        if "before" not in of:
            assert pending is not None, f"{page}: a block `after` without one `before`"
            shared = pending.names & block.names
            assert shared or not pending.names, f"{page}: no name of {sorted(pending.names)} again"
            assert_alike(page, sides, shared)
        elif "after" in of:
            assert_alike(page, sides, block.names)
        pending = block
    return len(blocks)


def assert_alike(page: Path, sides: dict[str, Side], names: frozenset[str]) -> None:
    """Compares what both sides have under the same names, as far as it is data."""
    compared = 0
    bound = names.intersection(*(side.script.__dict__ for side in sides.values()))
    for name in sorted(bound):
        before, after = (sides[side].script.__dict__[name] for side in ("before", "after"))
        (ours, treedef), (theirs, other) = jax.tree.flatten(after), jax.tree.flatten(before)
        if not all(isinstance(leaf, DATA) for leaf in [*ours, *theirs]):
            continue
        compared += 1
        assert treedef == other, f"{page}: {name}"
        for one, two in zip(ours, theirs, strict=True):
            assert type(one) is type(two), f"{page}: {name}"
            np.testing.assert_array_equal(one, two, err_msg=f"{page}: {name}")
    assert compared or not names, f"{page}: no data to compare among {sorted(names)}"


@pytest.mark.leaves_threads  # Orbax's, in the guide that leads from it
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """What the documentation shows works as written."""
    run_page(page, tmp_path)


def test_readme_opens_with_a_block_that_runs() -> None:
    """The first thing a reader can copy is among the blocks that are run."""
    assert blocks_of(ROOT / "README.md")[0].is_run


def test_blocks_of_a_page_share_their_names(tmp_path: Path) -> None:
    """Blocks run in order, as one script, and a block in a list item is one of them."""
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\n- item\n\n  ```python\n  b = a + 1\n  ```\n\n"
        "```python\nfrom pathlib import Path\nPath('out').write_text(str(b))\n```\n"
    )

    assert run_page(page, tmp_path) == 3
    assert (tmp_path / "out").read_text() == "2"


def test_a_failing_block_is_reported_with_the_line_of_its_page(tmp_path: Path) -> None:
    """A block that raises fails its page, at the line where it stands."""
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nText.\n\n```python\nfine = 1\nraise RuntimeError('broken')\n```\n")

    with pytest.raises(RuntimeError, match="broken") as caught:
        run_page(page, tmp_path)
    where = caught.traceback[-1]
    assert (Path(where.path), where.lineno + 1) == (page, 7)


def test_a_block_that_is_not_run_must_still_compile(tmp_path: Path) -> None:
    """``no-run`` excuses a block from running, not from being Python."""
    page = tmp_path / "page.md"
    page.write_text("```python no-run\nraise RuntimeError('never run')\n```\n")
    assert run_page(page, tmp_path) == 0

    page.write_text("```python no-run\ndef broken(:\n```\n")
    with pytest.raises(SyntaxError):
        run_page(page, tmp_path)


SIDES = """```python
n = 2
```
```python before
total = n + 1
open("there", "w").close()
```
```python after
import os
total = 3
files = os.listdir()
```
```python both
twice = total * 2
```
"""


def test_a_guide_has_two_sides_that_must_agree(tmp_path: Path) -> None:
    """Sides share what stands before them, and no directory; a difference fails the page."""
    page = tmp_path / "page.md"
    for index, (old, new) in enumerate([("", ""), ("= 3", "= 4"), ("total = 3", "other = 3")]):
        page.write_text(SIDES.replace(old, new) if old else SIDES)
        (tmp_path / str(index)).mkdir()
        if not old:
            assert run_page(page, tmp_path / "0") == 4
            assert (tmp_path / "0" / "before" / "there").exists()
            continue
        with pytest.raises((AssertionError, NameError), match="total"):
            run_page(page, tmp_path / str(index))
