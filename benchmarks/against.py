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
from typing import Any

from benchmarks import figures, machine, measures, processes, report
from benchmarks.figures import Record
from benchmarks.peers import OURS
from benchmarks.rounds import Tell
from benchmarks.trees import abstract_of
from benchmarks.workloads import WORKLOADS

NEW, OLD = "new", "old"


def compare(
    names: Sequence[str],
    other: Path,
    directory: Path,
    pairs: int,
    *,
    scale: float = 1,
    seed: int = 0,
    tell: Tell = print,
) -> dict[str, Any]:
    """Measures the workloads of these names with both checkouts, and returns the result."""
    draw, records = random.Random(seed), []
    for name in names:
        turns: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            turn = {
                peer: stack.enter_context(_process(checkout, name, directory / peer, scale))
                for peer, checkout in {NEW: processes.ROOT, OLD: other}.items()
            }
            for number in range(pairs):
                for peer in draw.sample([NEW, OLD], 2):
                    turns.append({"round": number, "peer": peer, "figures": turn[peer]()})
        records.append({"workload": name, "turns": turns})
        ratios = (figures.ratio(records[-1], time, NEW, OLD) for time in report.TIMES)
        tell(f"{name}: {', '.join(map(report.times, ratios))}")
    return {"kind": "against", "machine": machine.facts(directory), "records": records}


@contextlib.contextmanager
def _process(
    checkout: Path, workload: str, path: Path, scale: float
) -> Iterator[Callable[[], dict[str, float]]]:
    """Yields a function that has a process of a checkout save and load once."""
    command = processes.command(
        "benchmarks.against", workload, str(path), str(scale), checkout=checkout
    )
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        told, answers = process.stdin, process.stdout

        def turn() -> dict[str, float]:
            print(file=told, flush=True)
            answer = answers.readline()
            if not answer:
                raise RuntimeError(f"the process of {checkout} ended: {process.wait()}")
            found: dict[str, float] = json.loads(answer)
            return found

        try:
            turn()  # the first is no figure
            yield turn
        finally:
            process.kill()


def _serve(name: str, path: Path, scale: float) -> None:
    workload = WORKLOADS[name]
    state = workload.build(scale)
    trial = measures.Trial(
        peer=OURS,
        path=path,
        state=state,
        abstract=abstract_of(state),
        settings=workload.settings,
    )
    measures.first(trial)
    for _ in sys.stdin:
        found = measures.timed(trial)
        trial.clear()
        print(json.dumps(found), flush=True)


def summary(result: dict[str, Any]) -> str:
    """Returns the ratios and the times of both."""
    rows = [_row(record, time) for record in result["records"] for time in report.TIMES]
    header = ["workload", "time", "new / old", NEW, OLD]
    facts = machine.line(result["machine"])
    return f"# New against old\n\n{facts}\n\n{report.markdown(header, rows)}\n"


def _row(record: Record, time: str) -> list[str]:
    both = (report.secs(figures.of(record, peer, time)) for peer in (NEW, OLD))
    return [
        record["workload"],
        time,
        report.times(figures.ratio(record, time, NEW, OLD)),
        *both,
    ]


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
