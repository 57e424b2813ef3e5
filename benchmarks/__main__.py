"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import against, gpu, processes, report, rounds, states, sweeps, tuning
from benchmarks.peers import PEERS
from benchmarks.states import MIB, WORKLOADS, Workload

# An option has the type of its default; False makes a flag, a tuple lists choices, and Path stands
# for a path that must be given.
RESULTS = Path(__file__).parent / "results"
STORAGE = {"directory": Path(tempfile.gettempdir()), "out": RESULTS}
STATE = {"workload": "gpt2", "state": "", "checkpoint": "", "devices": 1, "scale": 1.0}
ROUNDS = {"rounds": 10, "cold": False}
COMPARED = "leaves-2000,gpt2,large-f32-plain,leaves-10000"
HELP = {
    "aim": "which times to shorten",
    "checkout": "the folder that holds an orbax_async",
    "checkpoint": "a checkpoint whose state to save and load, in place of a workload's",
    "cold": "drop files from the page cache before they are loaded",
    "devices": "host devices of your own state",
    "directory": "where to save: the storage to measure",
    "extra_rounds": "rounds of memory, gaps and paces",
    "memory": "MiB that a save or load may take at its peak; 0 for no limit",
    "orbax_secs": "Orbax is left out of sizes above one that takes it longer",
    "out": "the results folder",
    "peers": "names, separated by commas; all by default",
    "scale": "share of a workload's size",
    "seed": "draws who comes first in a pair",
    "state": "module:function that returns a state, in place of a workload's",
    "workload": "names, separated by commas",
}
COMMANDS: dict[str, tuple[Callable[[Namespace], int | None], dict[str, Any]]] = {}


def command(**options: Any) -> Callable[[Any], Any]:
    """Makes a function a command; it may return an exit status."""

    def add(act: Any) -> Any:
        COMMANDS[act.__name__.strip("_")] = act, options
        return act

    return add


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    root = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (act, options) in COMMANDS.items():
        each = commands.add_parser(name, help=act.__doc__, description=act.__doc__)
        for option, default in options.items():
            flag, about = f"--{option.replace('_', '-')}", HELP.get(option)
            if default is Path:
                each.add_argument(option, type=Path, help=about)
            elif default is False:
                each.add_argument(flag, action="store_true", help=about)
            elif isinstance(default, tuple):
                each.add_argument(flag, choices=default, default=default[0], help=about)
            else:
                each.add_argument(flag, type=type(default), default=default, help=about)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv, Namespace(argv=argv, state="", checkpoint="", cold=False))
    if args.command != "gpu" and not (args.state or args.checkpoint):
        jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each save
    return COMMANDS[args.command][0](args) or 0


@command()
def _list(_: Namespace) -> None:
    """Print the workloads, the peers, and which of them are installed."""
    print("workloads")
    for workload in WORKLOADS.values():
        print(f"  {workload.name:<18} {workload.about}")
    print("peers, and what survives a power cut once they have saved")
    for peer in PEERS.values():
        version = (peer.version or "built in") if peer.is_installed else "not installed"
        print(f"  {peer.name:<18} {version:<14} {peer.durable}")


@command(**STORAGE, **STATE, **ROUNDS, extra_rounds=3, peers="")
def _run(args: Namespace) -> int:
    """Measure workloads with all peers."""
    chosen = _workloads(args)
    if len(chosen) > 1:  # a process for each: none finds the memory that another has left
        commands = (
            processes.command("benchmarks", *args.argv, f"--workload={workload.name}")
            for workload in chosen
        )
        return max(subprocess.run(each).returncode for each in commands)
    (workload,) = chosen
    names = args.peers.split(",") if args.peers else PEERS
    peers = [_named("peer", PEERS, name) for name in names]
    counts = dict.fromkeys(rounds.KINDS, args.extra_rounds) | {"timed": args.rounds}
    state = workload.build(args.scale)
    with _plan(args, counts, settings=workload.settings) as plan:
        record = rounds.measure(workload.name, state, peers, plan, workload.about)
    report.publish(args.out, f"run-{workload.name}", [record], report.tables(record))
    return 1 if record["peers"].get("ours", {}).get("left_out") else 0


@command(**STORAGE, **STATE, **ROUNDS, aim=tuple(tuning.AIMS), memory=0)
def _tune(args: Namespace) -> None:
    """Find the options that suit a state and a storage path."""
    for workload in _workloads(args):
        state, limit = workload.build(args.scale), args.memory * MIB or None
        with _plan(args, {"timed": args.rounds, "memory": 2}) as plan:
            records, chosen = tuning.tune(workload.name, state, plan, args.aim, limit)
        text = tuning.text(records, chosen, args.aim)
        report.publish(args.out, f"tune-{workload.name}", records, text)


@command(**STORAGE, **ROUNDS, most_leaves=100_000, most_mebibytes=4096, orbax_secs=30.0)
def _scale(args: Namespace) -> None:
    """Plot time over the number of leaves and over bytes."""
    with _plan(args, {"timed": args.rounds}) as plan:
        most = (args.most_leaves, args.most_mebibytes)
        records = sweeps.scale(plan, most, args.orbax_secs)
    report.publish(args.out, "scale", records, sweeps.scale_text(records))


@command(**STORAGE, most_mebibytes=1024)
def _budgets(args: Namespace) -> None:
    """Compare peaks of memory with their budgets."""
    sizes = [size for size in sweeps.BUDGETS if size <= args.most_mebibytes * MIB]
    with _plan(args, {"memory": 1}) as plan:
        records = sweeps.budgets(plan, sizes)
    text, peaks = sweeps.budgets_text(records), ("peak_save", "peak_load")
    report.publish(args.out, "budgets", records, text, peaks)


@command(**STORAGE, **STATE, saves=30)
def _growth(args: Namespace) -> None:
    """Save over and over, and watch resident memory."""
    for workload in _workloads(args):
        state = workload.build(args.scale)
        with _plan(args) as plan:
            # The first three warm up; the last of them is where growth is counted from.
            records = sweeps.growth(plan, workload.name, state, args.saves + 3)[2:]
        text = sweeps.growth_text(records)
        report.publish(args.out, f"growth-{workload.name}", records, text, ["resident"])


@command(**STORAGE, count=16, mebibytes=256, rounds=5)
def _gpu(args: Namespace) -> int:
    """Measure staging from a GPU; 2 if there is none."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        print("jax finds no GPU here; nothing was measured", file=sys.stderr)
        return 2
    with _plan(args, {"timed": args.rounds}) as plan:
        records = gpu.measure(device.device_kind, plan, args.count, args.mebibytes * MIB)
    report.publish(args.out, f"gpu-{device.device_kind}", records, gpu.text(records), ["staged"])
    return 0


@command(checkout=processes.ROOT, by=("function", "file"), top=20)
def _calls(args: Namespace) -> int:
    """Count own files, calls and stations of a small save and load."""
    command = processes.command("benchmarks.calls", args.by, args.top, checkout=args.checkout)
    return subprocess.run(command).returncode


@command(**STORAGE, checkout=Path, workload=COMPARED, scale=1.0, pairs=20, seed=0)
def _against(args: Namespace) -> None:
    """Compare this checkout with another, in pairs."""
    names = [workload.name for workload in _workloads(args)]
    with _plan(args, {"timed": args.pairs}) as plan:
        records = against.compare(names, args.checkout, plan, args.scale, args.seed)
    report.publish(args.out, "against", records, against.text(records))


def _workloads(args: Namespace) -> list[Workload]:
    if args.state:
        return [states.by_function(args.state, args.devices)]
    if args.checkpoint:
        return [states.by_checkpoint(args.checkpoint, args.devices)]
    return [_named("workload", WORKLOADS, name) for name in args.workload.split(",")]


def _named(what: str, found: dict[str, Any], name: str) -> Any:
    if name not in found:
        raise SystemExit(f"there is no {what} {name!r}; there are {', '.join(found)}")
    return found[name]


@contextlib.contextmanager
def _plan(
    args: Namespace, counts: dict[str, int] | None = None, **options: Any
) -> Iterator[rounds.Plan]:
    """Yields a plan with a new folder inside the chosen directory, and removes that at the end."""
    args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=args.directory) as folder:
        yield rounds.Plan(
            directory=Path(folder),
            rounds=counts or {},
            options=options | {"is_cold": args.cold},
            tell=lambda text: print(f"  {text}", flush=True),
        )


if __name__ == "__main__":
    sys.exit(main())
