"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import ROOT

RESULTS = Path(__file__).parent / "results"
COMPARED = "leaves-2000,gpt2,large-f32-plain,leaves-10000"
AIMS = ("both", "save", "load", "blocked")


def _options() -> dict[str, argparse.ArgumentParser]:
    """Returns the options that several commands share, by theme."""
    themes = ("directory", "out", "state", "rounds")
    directory, out, state, rounds = found = [
        argparse.ArgumentParser(add_help=False) for _ in themes
    ]
    directory.add_argument("--directory", type=Path, help="where to save: the storage to measure")
    out.add_argument("--out", type=Path, default=RESULTS, help="the results folder")
    what = state.add_mutually_exclusive_group()
    what.add_argument("--workload", default="gpt2", help="names, separated by commas")
    what.add_argument("--state", help="module:function that returns a state")
    what.add_argument("--checkpoint", help="a checkpoint whose state to save and load")
    state.add_argument("--devices", type=int, default=1, help="host devices of your own state")
    state.add_argument("--scale", type=float, default=1.0, help="share of a workload's size")
    rounds.add_argument("--rounds", type=int, default=10, help="rounds of timed turns")
    rounds.add_argument("--cold", action="store_true", help="drop files from the page cache")
    return dict(zip(themes, found, strict=True))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    options = _options()
    root = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, *themes: str) -> argparse.ArgumentParser:
        parents = [options[theme] for theme in themes]
        return commands.add_parser(name, help=about, description=about, parents=parents)

    command("list", "Print the workloads, the peers, and which of them are installed.")
    found = command("run", "Measure workloads with all peers.", *options)
    found.add_argument("--extra-rounds", type=int, default=3, help="rounds of the other turns")
    found.add_argument("--peers", help="names, separated by commas; all by default")
    command("report", "Write tables and plots again from the records of `run`.", "out")
    found = command("tune", "Find the options that suit a state and a storage path.", *options)
    found.add_argument("--aim", default="both", choices=AIMS, help="which times to shorten")
    found.add_argument("--memory", type=int, help="MiB that a save or load may take at its peak")
    themes = ("directory", "out", "rounds")
    found = command("scale", "Plot time over the number of leaves and over bytes.", *themes)
    found.add_argument("--most-leaves", type=int, default=100_000)
    found.add_argument("--most-mebibytes", type=int, default=4096)
    found.add_argument("--orbax-secs", type=float, default=30, help="when Orbax is left out")
    found = command("budgets", "Compare peaks of memory with their budgets.", "directory", "out")
    found.add_argument("--most-mebibytes", type=int, default=1024, help="the largest budget")
    themes = ("directory", "out", "state")
    found = command("growth", "Save over and over, and watch resident memory.", *themes)
    found.add_argument("--saves", type=int, default=30)
    found = command("gpu", "Measure staging from a GPU; 2 if there is none.", "directory", "out")
    found.add_argument("--count", type=int, default=16, help="arrays")
    found.add_argument("--mebibytes", type=int, default=256, help="size of each")
    found.add_argument("--rounds", type=int, default=5)
    found = command("calls", "Count own files, calls and stations of a small save and load.")
    found.add_argument("--checkout", type=Path, default=ROOT, help="whose package to count")
    found.add_argument("--by", choices=("function", "file"), default="function")
    found.add_argument("--top", type=int, default=20, help="how many lines of most calls")
    about = "Compare this checkout with another, in pairs."
    found = command("against", about, "directory", "out")
    found.add_argument("--workload", default=COMPARED, help="names, separated by commas")
    found.add_argument("--scale", type=float, default=1.0, help="share of a workload's size")
    found.add_argument("checkout", type=Path, help="the folder that holds its orbax_async")
    found.add_argument("--pairs", type=int, default=20)
    found.add_argument("--seed", type=int, default=0, help="draws who comes first in a pair")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    args = parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    is_own = getattr(args, "state", None) or getattr(args, "checkpoint", None)
    if args.command != "gpu" and not is_own:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    from benchmarks import commands

    status: int = commands.COMMANDS[args.command](args)
    return status


if __name__ == "__main__":
    sys.exit(main())
