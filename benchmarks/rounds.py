"""Interleaved repetitions: in each round every peer has one turn, each round in another order."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import machine, measures
from benchmarks.figures import Record
from benchmarks.peers import Peer, Settings
from benchmarks.trees import abstract_of, stored_nbytes
from benchmarks.workloads import State

Tell = Callable[[str], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a workload is measured.

    Attributes:
      directory: where the peers save; each has a folder of its own there for its turn.
      rounds: rounds of each kind of turn that is listed; see `measures.KINDS`.
      is_cold: whether files are dropped from the page cache before they are loaded.
      pace_secs: how long a program beside the saves is watched.
    """

    directory: Path
    rounds: dict[str, int]
    is_cold: bool = False
    pace_secs: float = 1.0


def rounds_of(timed: int, extra: int) -> dict[str, int]:
    """Returns so many rounds of timed turns, and so many of each other kind."""
    return {kind: timed if kind == "timed" else extra for kind in measures.KINDS}


def measure(
    workload: str,
    state: State,
    peers: Sequence[Peer],
    plan: Plan,
    *,
    settings: Settings | None = None,
    about: str = "",
    tell: Tell = lambda _: None,
) -> Record:
    """Measures peers at one state, and returns the record.

    The first round stands apart: each peer saves, loads, imports what it takes for that, and what
    it loads is compared. A peer that is not installed or that fails, then or later, is left out
    from there on, with the reason in the record.
    """
    record: Record = {
        "kind": "run",
        "workload": workload,
        "about": about,
        "leaves": len(jax.tree.leaves(state)),
        "nbytes": stored_nbytes(state),
        "is_cold": plan.is_cold,
        "machine": machine.facts(plan.directory),
        "peers": {},
        "turns": [],
    }
    abstract = abstract_of(state)
    trials = {}
    for peer in peers:
        record["peers"][peer.name] = {
            "durable": peer.durable,
            "version": peer.version if peer.is_installed else "",
            "is_floor": peer.is_floor,
            "left_out": "" if peer.is_installed else "not installed",
        }
        if peer.is_installed:
            trials[peer.name] = measures.Trial(
                peer=peer,
                path=plan.directory / f"{peer.name}-{os.getpid()}",
                state=state,
                abstract=abstract,
                settings=settings or {},
                is_cold=plan.is_cold,
                pace_secs=plan.pace_secs,
            )

    def turn(peer: str, act: Callable[[measures.Trial], Any]) -> Any:
        try:
            return act(trials[peer])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            record["peers"][peer]["left_out"] = reason
            del trials[peer]
            tell(f"  {peer} is left out: {reason}")
        finally:
            shutil.rmtree(plan.directory / f"{peer}-{os.getpid()}", ignore_errors=True)

    def note(kind: str, number: int, peer: str, figures: Any) -> None:
        if figures is not None:
            entry = {"kind": kind, "round": number, "peer": peer, "figures": figures}
            record["turns"].append(entry)

    for name in list(trials):
        note("first", 0, name, turn(name, measures.first))
    for kind, count in plan.rounds.items():
        for number in range(count):
            order = list(trials)
            first = number % max(len(order), 1)
            for name in order[first:] + order[:first]:
                note(kind, number, name, turn(name, measures.KINDS[kind]))
        tell(f"  {count} rounds of {kind}")
    return record
