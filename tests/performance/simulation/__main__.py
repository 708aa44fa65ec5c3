"""`make bench-scheduler`: the planner at full size, many small clusters, and how well GPUs are packed."""

from __future__ import annotations

import argparse
import os
import sys

from performance.simulation import many, packing, scale
from performance.simulation.cluster import Size

PARTS = ("scale", "seeds", "packing")
LOADS = (0.8, 1.0, 1.3)


def main(arguments: list[str] | None = None) -> int:
    """Simulate what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="make bench-scheduler", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="of " + ", ".join(PARTS) + "; all by default"
    )
    parser.add_argument("--nodes", type=int, default=10_000, help="nodes of eight GPUs, at full size")
    parser.add_argument("--seeds", type=int, default=1000, help="small clusters")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="to see a breach again: its seed, with --seeds 1"
    )
    parser.add_argument(
        "--cases", type=int, default=30, help="small clusters to fill, at each of three loads"
    )
    parser.add_argument(
        "--ortools", action="store_true", help="find the optimum with OR-tools, not with HiGHS"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="small clusters at a time")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"{part} is not one of {', '.join(PARTS)}")
    parts = options.parts or PARTS
    failed = False
    if "scale" in parts:
        # Nine settled replicas and one new on every node: at 10,000 nodes the size that must hold.
        scale.measure(scale.Size(options.nodes, 9 * options.nodes, options.nodes), 1, _say)
    if "seeds" in parts:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        lives = many.run(seeds, Size(), options.jobs if options.seeds > 1 else 1, _say)
        _say(str(lives))
        failed = bool(lives.breaches)
    if "packing" in parts:
        packing.report(range(options.cases), LOADS, _say, ortools=options.ortools)
    return int(failed)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
