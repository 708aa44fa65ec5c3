"""`make bench`: ours, the floors and every peer that can be had, side by side."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from performance import machine, matrix, overload, plots, report, scaling
from performance.environments import STORE
from performance.results import Results
from performance.servers import SERVERS
from performance.workloads import WORKLOADS

EXPERIMENTS = (overload.NAME, scaling.NAME)
QUICK_SERVERS = ("ours", "triton", "mosec", "floor-grpc")


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    options = _parse(arguments)
    if options.table:
        finish(Results.read(options.table), options.table.parent)
        return 0
    folder = options.out or STORE / "results" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    servers = [SERVERS[name] for name in options.peers]
    plan = matrix.Plan(
        options.workloads,
        options.concurrency,
        options.rates,
        options.doors,
        options.seconds,
        options.warm_up,
        options.rounds,
    )
    kept = folder / "results.json"
    results = Results.read(kept) if kept.exists() else Results(machine=machine.describe())
    results.options = {"seconds": options.seconds, "rounds": options.rounds, "command": sys.argv[1:]}
    # Who could not be had the other time is tried again.
    for server in servers:
        results.absent.pop(server.name, None)
    results.titles |= {server.name: server.title for server in servers}
    began = time.monotonic()

    def keep() -> None:
        results.save(kept)

    # A server is ended, and what was measured is shown, however the run is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        matrix.run(plan, servers, results, keep, _say)
        if overload.NAME in options.experiments:
            overload.measure(servers, results, max(3.0, options.seconds / 2), options.seed, keep, _say)
        if scaling.NAME in options.experiments:
            scaling.measure(results, options.seconds, options.rounds, _say)
    except KeyboardInterrupt:
        print("cut short; this is what there is", file=sys.stderr)
    finish(results, folder)
    print(f"{time.monotonic() - began:.0f} s")
    return 0


def finish(results: Results, folder: Path) -> None:
    """Write what was measured in all its forms."""
    results.save(folder / "results.json")
    (folder / "results.txt").write_text(report.text(results))
    (folder / "results.md").write_text(report.markdown(results))
    drawn = plots.draw(results, folder / "results.png")
    print("\n" + report.text(results))
    print(f"{folder}: results.json, .txt, .md" + (" and .png" if drawn else ""))


def _say(line: str) -> None:
    print(line, flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    quick = parser.add_argument
    quick("--quick", action="store_true", help="two minutes: few servers, few levels, one start, 3 s a point")
    quick("--peers", type=_names(SERVERS), help="servers, or all: " + ", ".join(SERVERS))
    quick("--workloads", type=_names(WORKLOADS), help="of " + ", ".join(WORKLOADS))
    quick(
        "--doors", type=_names(("grpc", "http", "wrk", "h2load")), help="of grpc, http, wrk, h2load, or all"
    )
    quick("--concurrency", type=_numbers(int), help="requests kept open, as 1,16,64,256")
    quick("--rates", type=_numbers(float), help="requests sent per second (Poisson), as 1000,4000; or none")
    quick("--seconds", type=float, help="of each point")
    quick("--warm-up", type=float, help="seconds of load before each point")
    quick("--rounds", type=int, help="starts of each server")
    quick("--experiments", type=_names(EXPERIMENTS), help="of overload, scaling; or none")
    quick("--seed", type=int, default=1, help="of the random moments of the overload")
    quick("--out", type=Path, help="folder for the results; those that it has are added to")
    quick(
        "--table",
        type=Path,
        metavar="RESULTS.JSON",
        help="only write the tables and the plot of an earlier run anew",
    )
    options = parser.parse_args(arguments)
    fast = options.quick
    defaults = {
        "peers": list(QUICK_SERVERS if fast else SERVERS),
        "workloads": ["w1", "w2"],
        "doors": ["grpc", "wrk"] if fast else ["grpc", "http", "wrk", "h2load"],
        "concurrency": [16, 64] if fast else [1, 16, 64, 256],
        "rates": [] if fast else None,
        "seconds": 3.0 if fast else 10.0,
        "warm_up": 1.0 if fast else 3.0,
        "rounds": 1 if fast else 2,
        "experiments": [] if fast else list(EXPERIMENTS),
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(value: str) -> list[str]:
        if value == "none":
            return []
        names = list(known) if value == "all" else value.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(known)}")
        return names

    return parse


def _numbers(kind: type[float]) -> Callable[[str], list[float]]:
    def parse(value: str) -> list[float]:
        return [kind(number) for number in value.split(",") if number and value != "none"]

    return parse


if __name__ == "__main__":
    sys.exit(main())
