"""Whether more of ours gives more: two replicas of a 20 ms model, two gateways on the echo."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from performance import load
from performance.doors import WrongAnswer
from performance.results import Results
from performance.servers.base import CannotStart
from performance.servers.ours import Ours
from performance.workloads import WORKLOADS

NAME = "scaling"
# Four full batches of each replica.
_SLEEP_CONCURRENCY = 64
_ECHO_CONCURRENCY = 256

Say = Callable[[str], None]


def measure(results: Results, seconds: float, rounds: int, say: Say) -> None:
    """Measure one and two of each in turn."""
    found: dict[str, dict[str, float]] = results.experiments.setdefault(NAME, {})
    cases: dict[str, tuple[str, int, Callable[[int], Ours]]] = {
        "replicas": ("sleep", _SLEEP_CONCURRENCY, lambda number: Ours(replicas=number)),
        "gateways": ("w1", _ECHO_CONCURRENCY, lambda number: Ours(gateways=number)),
    }
    for name, (key, concurrency, make) in cases.items():
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for number in rates:
                try:
                    rates[number].append(_rate(make(number), key, concurrency, seconds))
                except (CannotStart, WrongAnswer, load.LoadFailed) as error:
                    results.absent[f"{number} {name}"] = str(error)
        if all(rates.values()):
            one, two = (statistics.fmean(rates[number]) for number in (1, 2))
            found[name] = {"one": one, "two": two, "ratio": two / one}
            say(f"{name}: one {one:.0f}/s, two {two:.0f}/s, {two / one:.2f} ×")


def _rate(server: Ours, key: str, concurrency: int, seconds: float) -> float:
    workload = WORKLOADS[key]
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder = Path(name)
        with server.serve(workload, folder) as running:
            load.closed_loop(running.doors[0], workload, concurrency, 1.0, folder)
            return load.closed_loop(running.doors[0], workload, concurrency, seconds, folder).rate
