"""Interleaved repetitions: in each round every peer has one turn, each round in another order.

A record is what was measured at one state: who took part, one entry in `turns` for each turn, and
the machine. It is a dictionary, as JSON has it.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import measures
from benchmarks.measures import Figures, Trial
from benchmarks.peers import Peer
from benchmarks.states import State, stored_nbytes

Record = dict[str, Any]
PACKAGES = ["orbax-async", "orbax-checkpoint", "jax", "jaxlib", "tensorstore", "numpy"]
KINDS: dict[str, Callable[[Trial], Figures]] = {
    "timed": measures.timed,
    "memory": measures.memory,
    "gap": measures.gap,
    "pace": measures.pace,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a workload is measured."""

    directory: Path  # each peer has a folder of its own there for its turn
    rounds: Mapping[str, int]  # of each kind of turn that is listed
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of each trial
    tell: Callable[[str], object] = lambda _: None


def measure(
    name: str, state: State, peers: Sequence[Peer], plan: Plan, about: str = "", **more: Any
) -> Record:
    """Measures peers at one state, and returns the record, with what else it should hold.

    The first round stands apart: each peer saves, loads, imports what it takes for that, and what
    it loads is compared. A peer that is not installed or that fails, then or later, is left out
    from there on, with the reason in the record.
    """
    found: Record = {}
    trials = {}
    for peer in peers:
        found[peer.name] = {
            "durable": peer.durable,
            "is_floor": peer.is_floor,
            "left_out": "" if peer.is_installed else "not installed",
        }
        if peer.is_installed:
            path = plan.directory / f"{peer.name}-{os.getpid()}"
            trials[peer.name] = Trial(peer=peer, path=path, state=state, **plan.options)
    turns: list[Record] = []

    def turn(kind: str, number: int, peer: str, act: Callable[[Trial], Figures]) -> None:
        trial = trials[peer]
        try:
            figures = act(trial)
            turns.append({"kind": kind, "round": number, "peer": peer, "figures": figures})
        except Exception as error:
            found[peer]["left_out"] = f"{type(error).__name__}: {error}".splitlines()[0]
            plan.tell(f"{peer} is left out: {found[peer]['left_out']}")
            del trials[peer]
        finally:
            shutil.rmtree(trial.path, ignore_errors=True)

    for each in list(trials):
        turn("first", 0, each, measures.first)
    for kind, count in plan.rounds.items():
        for number in range(count):
            order = list(trials)
            first = number % max(len(order), 1)
            for each in order[first:] + order[:first]:
                turn(kind, number, each, KINDS[kind])
        plan.tell(f"{name} {about}: {count} rounds of {kind}")
    return {
        "workload": name,
        "about": about,
        "leaves": len(jax.tree.leaves(state)),
        "nbytes": stored_nbytes(state),
        "is_cold": plan.options.get("is_cold", False),
        "machine": machine(plan.directory),
        "peers": found,
        "turns": turns,
        **more,
    }


def machine(directory: Path) -> str:
    """Returns hardware, versions, and how busy it is; `directory` is what is written to."""
    found = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if directory.resolve().is_relative_to(mount[1])]
    device, _, system = max(inside, key=lambda mount: len(mount[1]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = (f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    return (
        f"{found[1] if found else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory:.0f} GiB, {system} on {device}, load {os.getloadavg()[0]:.2f}, "
        f"{datetime.date.today()}, {platform.platform()}; Python {platform.python_version()}, "
        f"{', '.join(versions)}"
    )
