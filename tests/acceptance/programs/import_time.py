"""Prints the milliseconds of `import jax`, and of `import orbax_async` after it: wall and CPU."""

from __future__ import annotations

import sys
import time


def now() -> tuple[float, float]:
    """Returns what the clock on the wall and that of the process show."""
    return time.perf_counter() * 1e3, time.process_time() * 1e3


began = now()
import jax  # noqa: E402

between = now()
import orbax_async  # noqa: E402

ended = now()
assert {jax.__name__, orbax_async.__name__} <= sys.modules.keys()
print(*(b - a for a, b in zip((*began, *between), (*between, *ended), strict=True)))
