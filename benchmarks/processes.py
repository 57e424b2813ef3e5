"""Processes of their own: a module of this harness, with the package of a chosen checkout."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(module: str, *args: str, checkout: Path = ROOT) -> list[str]:
    """Returns the command that runs a module of the harness with a checkout's package.

    Raises:
      SystemExit: there is no package.
    """
    run = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
    return [*python(run, checkout), *args]


def python(code: str, checkout: Path = ROOT) -> list[str]:
    """Returns the command that runs code which finds this harness and the checkout's package.

    The package is imported first, so that the harness does not bring its own.

    Raises:
      SystemExit: there is no package.
    """
    if not (checkout / "orbax_async" / "__init__.py").is_file():
        raise SystemExit(f"{checkout} is no checkout of orbax_async")
    ours, harness = str(checkout.resolve()), str(ROOT)
    begin = f"import sys; sys.path.insert(0, {ours!r}); import orbax_async; "
    return [sys.executable, "-c", f"{begin}sys.path.insert(0, {harness!r}); {code}"]
