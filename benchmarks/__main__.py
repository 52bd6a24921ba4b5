"""Tables of figures: ``python -m benchmarks NAME ... [--peers [NAME=PYTHON ...]]``."""

import argparse
import dataclasses
import importlib
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import import_time, parity
from benchmarks.harness import THREADS, Harness, provenance, table
from benchmarks.workloads import Setup

RACES = [
    "forward",
    "capture",
    "hooks",
    "sample",
    "sweep",
    "splice",
    "encode",
    "train_step",
    "load",
    "collate",
]
"""Modules with ``races(setup)``."""
OTHERS = ["import", "judge", "parity", "planted", "recovery", "store", "viewer"]
PARTS = ["viewer_compute"]
"""Parts of others, which can also be run alone."""
GPU = "gpu"
"""A command by itself: tests and tables of a CUDA device, see :mod:`benchmarks.gpu`."""
LEARNING = ["quality", "end_to_end"]
"""Modules with ``run(corpus, scratch, pythons, quick)``."""
PEERS = sorted(path.stem for path in (Path(__file__).parent / "peers").glob("*.txt"))


def main(argv: list[str] | None = None) -> None:
    """Print the chosen tables, in markdown; progress goes to stderr."""
    parser = _parser()
    args = parser.parse_args(argv)
    pythons = {}
    for pair in args.peers or []:
        name, equals, python = pair.partition("=")
        if not equals or name not in PEERS:
            parser.error(
                f"--peers takes NAME=PYTHON, NAME one of {', '.join(PEERS)}; found {pair!r}"
            )
        pythons[name] = python
    if args.corpus is None and (missing := [name for name in args.names if name in LEARNING]):
        parser.error(f"{' and '.join(missing)} need --corpus, text to learn from")
    if GPU in args.names:
        if args.names != [GPU]:
            parser.error(f"{GPU} runs alone, not with {', '.join(args.names)}")
        sys.exit(importlib.import_module("benchmarks.gpu").run(args.out, args.quick))
    threads = 1 if args.quick else THREADS
    names = [*RACES, *OTHERS] if "all" in args.names else args.names
    print(f"{provenance()}\n")
    with (
        tempfile.TemporaryDirectory() as scratch,
        Harness(args.rounds, pythons, args.peers is not None, threads) as harness,
    ):
        setup = Setup(Path(scratch), args.quick, pythons)
        for name in names:
            print(f"## {name}\n", flush=True)
            start = time.monotonic()
            if name in RACES:
                for race in importlib.import_module(f"benchmarks.{name}").races(setup):
                    if args.only not in race.title:
                        continue
                    if args.entries is not None:
                        chosen = [entry for entry in race.entries if entry.shown in args.entries]
                        race = dataclasses.replace(race, entries=chosen)
                    print(table(race, harness.run(race)), flush=True)
            elif name in LEARNING:
                module = importlib.import_module(f"benchmarks.{name}")
                peers = None if args.peers is None else pythons
                print(module.run(args.corpus, Path(scratch), peers, args.quick))
            elif name == "viewer":
                for found in importlib.import_module("benchmarks.viewer").tables(args.quick):
                    print(found, flush=True)
                    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            elif name in ("judge", "planted", "recovery", "store", "viewer_compute"):
                print(importlib.import_module(f"benchmarks.{name}").run(args.quick))
            elif name == "import":
                print(import_time.run(min(args.rounds, 3), pythons))
            else:
                print(parity.run(args.rounds))
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="+", choices=[*RACES, *OTHERS, *PARTS, *LEARNING, GPU, "all"]
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME=PYTHON",
        help="let other libraries take part: those of this environment, and those of the "
        "environments whose interpreters are given, such as nnsight=/path/to/bin/python; "
        "NAME is that of a file in benchmarks/peers/",
    )
    parser.add_argument(
        "--corpus", type=Path, help="a file or folder of text, for quality and end_to_end"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu.json"),
        help="the file that gpu writes (default: gpu.json)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--only", default="", help="races whose headings have this text in them")
    parser.add_argument(
        "--entries", nargs="+", metavar="LABEL", help="only these lines of each race's table"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model and one thread: shows that it runs, not how fast",
    )
    return parser


if __name__ == "__main__":
    main()
