"""What the commands of the command line do; each returns the exit status."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import (
    against,
    footprint,
    gpu,
    processes,
    report,
    rounds,
    scaling,
    tuning,
    workloads,
)
from benchmarks.peers import PEERS
from benchmarks.workloads import MIB, WORKLOADS, State, Workload


def _list(_: Namespace) -> int:
    print("workloads")
    for workload in WORKLOADS.values():
        print(f"  {workload.name:<18} {workload.about}")
    print("peers, and what survives a power cut once they have saved")
    for peer in PEERS.values():
        version = (peer.version or "built in") if peer.is_installed else "not installed"
        print(f"  {peer.name:<18} {version:<14} {peer.durable}")
    return 0


def _run(args: Namespace) -> int:
    chosen = _workloads(args)
    if len(chosen) > 1:  # a process for each: none finds the memory that another has left
        package = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        status = 0
        for workload in chosen:
            again = [*args.argv, f"--workload={workload.name}"]
            command = [sys.executable, "-m", "benchmarks", *again]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path})
            status = max(status, done.returncode)
        return status
    (workload,) = chosen
    names = args.peers.split(",") if args.peers else PEERS
    peers = [_named("peer", PEERS, name) for name in names]
    print(f"{workload.name}: {workload.about}", flush=True)
    with _made(args, workload) as (state, directory):
        plan = rounds.Plan(
            directory=directory,
            rounds=rounds.rounds_of(args.rounds, args.extra_rounds),
            is_cold=args.cold,
        )
        record = rounds.measure(
            workload.name,
            state,
            peers,
            plan,
            settings=workload.settings,
            about=workload.about,
            tell=_tell,
        )
    report.write_json(record, args.out / f"run-{report.file_name(workload.name)}.json")
    print(report.tables(record))
    report.write_runs(args.out)
    return 1 if record["peers"].get("ours", {}).get("left_out") else 0


def _report(args: Namespace) -> int:
    print(report.write_runs(args.out))
    return 0


def _tune(args: Namespace) -> int:
    for workload in _workloads(args):
        with _made(args, workload) as (state, directory):
            kinds = {"timed": args.rounds, "memory": 2}
            plan = rounds.Plan(directory=directory, rounds=kinds, is_cold=args.cold)
            limit = args.memory and args.memory * MIB
            result = tuning.tune(workload.name, state, plan, aim=args.aim, limit=limit, tell=_tell)
        _write(args, f"tune-{workload.name}", result, tuning.summary, tuning.draw)
    return 0


def _scale(args: Namespace) -> int:
    most = {"leaves": args.most_leaves, "mebibytes": args.most_mebibytes}
    steps = {"leaves": scaling.LEAVES, "mebibytes": scaling.MEBIBYTES}
    sizes = {axis: [step for step in steps[axis] if step <= most[axis]] for axis in steps}
    with _directory(args) as directory:
        plan = rounds.Plan(directory=directory, rounds={"timed": args.rounds}, is_cold=args.cold)
        result = scaling.scale(plan, sizes, orbax_secs=args.orbax_secs, tell=_tell)
    _write(args, "scale", result, scaling.summary, scaling.draw)
    return 0


def _budgets(args: Namespace) -> int:
    budgets = [size for size in footprint.BUDGETS if size <= args.most_mebibytes * MIB]
    with _directory(args) as directory:
        result = footprint.sweep(directory, budgets, tell=_tell)
    _write(args, "budgets", result, footprint.sweep_summary, footprint.draw_sweep)
    return 0


def _growth(args: Namespace) -> int:
    for workload in _workloads(args):
        with _made(args, workload) as (state, directory):
            result = footprint.growth(directory, workload.name, state, args.saves)
        name = f"growth-{workload.name}"
        _write(args, name, result, footprint.growth_summary, footprint.draw_growth)
    return 0


def _gpu(args: Namespace) -> int:
    device = gpu.device()
    if device is None:
        print("jax finds no GPU here; nothing was measured", file=sys.stderr)
        return 2
    with _directory(args) as directory:
        found = gpu.measure(device, directory, args.count, args.mebibytes * MIB, args.rounds)
    _write(args, f"gpu-{found['device']}", found, gpu.summary)
    return 0


def _calls(args: Namespace) -> int:
    options = [f"--by={args.by}", f"--top={args.top}"]
    command = processes.command("benchmarks.calls", *options, checkout=args.checkout)
    return subprocess.run(command).returncode


def _against(args: Namespace) -> int:
    names = args.workload.split(",")
    for name in names:
        _named("workload", WORKLOADS, name)
    with _directory(args) as directory:
        result = against.compare(
            names,
            args.checkout,
            directory,
            args.pairs,
            scale=args.scale,
            seed=args.seed,
            tell=_tell,
        )
    _write(args, "against", result, against.summary)
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "list": _list,
    "run": _run,
    "report": _report,
    "tune": _tune,
    "scale": _scale,
    "budgets": _budgets,
    "growth": _growth,
    "gpu": _gpu,
    "calls": _calls,
    "against": _against,
}


def _tell(text: str) -> None:
    print(f"  {text}", flush=True)


def _workloads(args: Namespace) -> list[Workload]:
    if args.state:
        return [workloads.by_function(args.state, args.devices)]
    if args.checkpoint:
        return [workloads.by_checkpoint(args.checkpoint, args.devices)]
    return [_named("workload", WORKLOADS, name) for name in args.workload.split(",")]


def _named(what: str, found: dict[str, Any], name: str) -> Any:
    if name not in found:
        raise SystemExit(f"there is no {what} {name!r}; there are {', '.join(found)}")
    return found[name]


@contextmanager
def _made(args: Namespace, workload: Workload) -> Iterator[tuple[State, Path]]:
    """Yields a workload's state on the devices that it needs, and a folder to save it in."""
    with _directory(args) as directory:
        yield workload.build(args.scale), directory


@contextmanager
def _directory(args: Namespace) -> Iterator[Path]:
    """Yields a new folder inside the chosen directory, and removes it at the end."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each save
    parent = args.directory or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="benchmarks-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    args: Namespace,
    name: str,
    result: Any,
    summary: Callable[[Any], str],
    draw: Callable[[Any, Path], None] | None = None,
) -> None:
    """Writes a result as JSON, Markdown and plot, and prints the text."""
    stem = report.file_name(name)
    report.write_json(result, args.out / f"{stem}.json")
    text = summary(result)
    (args.out / f"{stem}.md").write_text(text, encoding="utf-8")
    if draw is not None:
        draw(result, args.out / f"{stem}.png")
    print(text)
