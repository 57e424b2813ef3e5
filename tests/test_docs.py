"""Every Python block of README.md and docs/ runs.

The blocks of one page run in order, as one script, in an empty directory. A block that opens with
```` ```python no-run ```` is only compiled: it shows a machine the tests don't have.
"""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(
    r"^(?P<indent> *)```python(?P<tags>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```\s*$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block, compiled so that a traceback names the page and the page's line."""

    code: CodeType
    is_run: bool


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
        blocks.append(Block(code, is_run="no-run" not in fence["tags"].split()))
    return blocks


def run_page(page: Path, cwd: Path) -> int:
    """Runs a page's blocks in order as ``__main__`` in ``cwd`` and returns how many ran."""
    script = ModuleType("__main__")
    blocks = [block for block in blocks_of(page) if block.is_run]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", script)
        patch.chdir(cwd)
        for block in blocks:
            exec(block.code, script.__dict__)
    return len(blocks)


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
