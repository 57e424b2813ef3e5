from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from acceptance import children


def test_the_import_adds_little_to_that_of_jax(
    tmp_path: Path, soak: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`import orbax_async` takes at most 50 ms after `import jax`; a busy machine's waits aside."""
    # From bytecode, as an installed package is; the first run compiles it.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    children.output("import_time.py")
    runs = [children.output("import_time.py").split() for _ in range(soak(3, 7))]
    jax_wall, jax_cpu, wall, cpu = (
        statistics.median(map(float, figures)) for figures in zip(*runs, strict=True)
    )
    print(
        f"\nimport jax: {jax_wall:.0f} ms ({jax_cpu:.0f} ms of CPU); "
        f"import orbax_async after it: {wall:.0f} ms ({cpu:.0f} ms of CPU)"
    )
    assert cpu <= soak(500, 50)
