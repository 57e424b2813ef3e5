"""Compares this checkout with another: pairs of saves and loads, in a process for each.

Both processes make the state and keep it. In each pair one has its turn and then the other, in an
order that a seed draws. What a turn saved is removed, and the disk's queue drained, before the next
timing; a process that waits does nothing.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import measures, processes, report, rounds
from benchmarks.peers import OURS
from benchmarks.rounds import Record
from benchmarks.states import WORKLOADS

NEW, OLD = "new", "old"
RATIOS = {f"{time}, new / old": report.ratio(time, below=OLD) for time in report.TIMES}


def compare(
    names: Sequence[str], other: Path, plan: rounds.Plan, scale: float, seed: int
) -> list[Record]:
    """Measures the workloads of these names with both checkouts, and returns their records."""
    draw, records = random.Random(seed), []
    for name in names:
        turns = []
        with contextlib.ExitStack() as stack:
            turn = {}
            for peer, checkout in {NEW: processes.ROOT, OLD: other}.items():
                args = (name, plan.directory / peer, scale)
                command = processes.command("benchmarks.against", *args, checkout=checkout)
                turn[peer] = stack.enter_context(_process(command))
                turn[peer]()  # the first is no figure
            for number in range(plan.rounds["timed"]):
                for peer in draw.sample([NEW, OLD], 2):
                    about = {"kind": "timed", "round": number, "peer": peer}
                    turns.append(about | {"figures": turn[peer]()})
        facts = {"machine": rounds.machine(plan.directory), "peers": {NEW: {}, OLD: {}}}
        records.append({"workload": name, "about": name, "turns": turns, **facts})
        plan.tell(f"{name}: {', '.join(ratio(records[-1], NEW) for ratio in RATIOS.values())}")
    return records


def text(records: Sequence[Record]) -> str:
    """Returns the ratios, and the times of both."""
    table = report.table(records, RATIOS | report.TIMES)
    return f"# New against old\n\n{records[0]['machine']}\n\n{table}"


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[Callable[[], measures.Figures]]:
    """Yields a function that has a process save and load once."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        told, answers = process.stdin, process.stdout
        assert told is not None and answers is not None

        def turn() -> measures.Figures:
            print(file=told, flush=True)
            found: measures.Figures = json.loads(answers.readline())
            return found

        yield turn  # the process ends when nothing more can be told


def _serve(name: str, path: str, scale: str) -> None:
    workload = WORKLOADS[name]
    state, settings = workload.build(float(scale)), workload.settings
    trial = measures.Trial(peer=OURS, path=Path(path), state=state, settings=settings)
    measures.first(trial)
    for _ in sys.stdin:
        found = measures.timed(trial)
        trial.clear()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
