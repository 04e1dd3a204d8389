"""What happens to output folders when things go wrong: `python -m benchmarks.reliability inject` and others."""

from __future__ import annotations

import argparse
import sys

from benchmarks.reliability.cost import reproducible
from benchmarks.reliability.flips import flips, loading
from benchmarks.reliability.inject import SCENARIOS, inject
from benchmarks.reliability.races import races


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    faults = commands.add_parser("inject", help="fail every file operation of a run, then repeat it")
    faults.add_argument("scenarios", nargs="*", help=f"some of {', '.join(SCENARIOS)}; all by default")
    faults.add_argument("--every", type=int, default=1, help="only every so many-th fault")
    faults.add_argument("--first", type=int, default=0, help="the first of them")
    raced = commands.add_parser("races", help="two processes write one folder at once")
    raced.add_argument("--count", type=int, default=50, help="races of each kind")
    flipped = commands.add_parser("flips", help="flip single bits of a finished folder")
    flipped.add_argument("--count", type=int, default=400)
    commands.add_parser("loading", help="what it costs to compare tensors when a folder is loaded")
    commands.add_parser("reproducible", help="what fits cost that have the same bytes on every processor")
    args = parser.parse_args()
    if args.command == "reproducible":
        reproducible()
        return 0
    if args.command == "loading":
        loading()
        return 0
    if args.command == "flips":
        return int(flips(args.count) > 0)
    if args.command == "races":
        return int(races(args.count) > 0)
    return int(inject(args.scenarios, args.every, args.first) > 0)


if __name__ == "__main__":
    sys.exit(main())
