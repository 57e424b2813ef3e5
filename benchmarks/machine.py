"""What the figures were taken on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = (
    "orbax-async",
    "orbax-checkpoint",
    "jax",
    "jaxlib",
    "tensorstore",
    "numpy",
    "safetensors",
    "equinox",
    "flax",
    "torch",
)


def facts(directory: Path) -> dict[str, Any]:
    """Returns hardware, versions, and how busy it is; `directory` is what is written to."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "disk": _disk(directory),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _disk(directory: Path) -> str:
    """Returns file system type and device of the mount point that a directory lies under."""
    resolved = directory.resolve()
    mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if resolved.is_relative_to(mount[1])]
    device, _, kind = max(inside, key=lambda mount: len(mount[1]))
    return f"{kind} on {device}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def line(facts: dict[str, Any]) -> str:
    """Returns the facts in one line of text."""
    memory = facts["memory_nbytes"] / (1 << 30)
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {memory:.0f} GiB, {facts['disk']}, "
        f"load {facts['load_average']:.2f}; Python {facts['python']}, {packages}"
    )
