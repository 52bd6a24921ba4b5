"""Tables of figures: ``python -m benchmarks NAME ... [--peers [NAME=PYTHON ...]]``."""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from benchmarks import import_time, parity
from benchmarks.harness import Harness, provenance, table
from benchmarks.workloads import Setup

RACES = ["forward", "capture", "hooks", "sample", "encode", "train_step", "load"]
"""Modules with ``races(setup)``."""


def main(argv: list[str] | None = None) -> None:
    """Print the chosen tables, in markdown; progress goes to stderr."""
    args = _parser().parse_args(argv)
    pythons = dict(pair.split("=", 1) for pair in args.peers or [])
    names = [*RACES, "import", "parity"] if "all" in args.names else args.names
    print(f"{provenance()}\n")
    with (
        tempfile.TemporaryDirectory() as scratch,
        Harness(args.rounds, pythons, with_peers=args.peers is not None) as harness,
    ):
        setup = Setup(Path(scratch), args.quick, pythons)
        for name in names:
            print(f"## {name}\n", flush=True)
            if name in RACES:
                for race in importlib.import_module(f"benchmarks.{name}").races(setup):
                    print(table(race, harness.run(race)), flush=True)
            elif name == "import":
                print(import_time.run(args.rounds))
            else:
                print(parity.run(args.rounds))
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*RACES, "import", "parity", "all"])
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME=PYTHON",
        help="let other libraries take part: those of this environment, and those of the "
        "environments whose interpreters are given, such as nnsight=/path/to/bin/python; "
        "NAME is that of a file in benchmarks/peers/",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model: shows that it runs, not how fast"
    )
    return parser


if __name__ == "__main__":
    main()
