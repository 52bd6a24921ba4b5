"""``python -m benchmarks NAME``: print one table."""

import argparse

from benchmarks import import_time, parity

BENCHMARKS = {"import": import_time.run, "parity": parity.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument(
        "--repeats", type=int, default=9, help="rounds to take medians of (default: 9)"
    )
    args = parser.parse_args()
    print(BENCHMARKS[args.name](args.repeats))


if __name__ == "__main__":
    main()
