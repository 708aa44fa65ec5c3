"""Many small clusters, each from a seed of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from performance.simulation.cluster import Cluster, Size, Tally
from performance.simulation.rules import Breach


@dataclass(frozen=True, slots=True)
class Lives:
    """What many clusters came to.

    Attributes:
        seeds: how many there were.
        breaches: what was broken, with the seed that shows it again.
        tally: the sum over all.
        seconds: how long it took.
    """

    seeds: int
    breaches: tuple[str, ...]
    tally: Tally
    seconds: float

    def __str__(self) -> str:
        rate = self.tally.decisions / self.tally.seconds if self.tally.seconds else 0.0
        return (
            f"{self.seeds} seeds, {self.tally.steps} passes, {self.tally.faults} faults, "
            f"{self.tally.placed} placements ({self.tally.surged} beyond a quota for a while), "
            f"{self.tally.started} jobs started, {self.tally.yielded} made room, "
            f"{self.tally.decisions} decisions ({rate:.0f} a second of planner time), "
            f"{len(self.breaches)} breaches, {self.seconds:.0f} s"
        )


def live(seed: int, size: Size) -> tuple[Tally, str]:
    """Let one cluster live; return its tally, and the rule that it broke, if it did."""
    cluster = Cluster(seed, size)
    try:
        return cluster.live(), ""
    except Breach as breach:
        return cluster.tally, f"seed {seed}, step {cluster.tally.steps}: {breach}"


def run(seeds: Iterable[int], size: Size, jobs: int, say: Callable[[str], None]) -> Lives:
    """Let clusters live, several at a time."""
    began = time.perf_counter()
    total = Tally()
    breaches: list[str] = []
    count = 0
    for tally, breach in _each(seeds, size, jobs):
        count += 1
        total.steps += tally.steps
        total.decisions += tally.decisions
        total.placed += tally.placed
        total.started += tally.started
        total.yielded += tally.yielded
        total.surged += tally.surged
        total.faults += tally.faults
        total.seconds += tally.seconds
        if breach:
            breaches.append(breach)
            say(breach)
    return Lives(count, tuple(breaches), total, time.perf_counter() - began)


def _each(seeds: Iterable[int], size: Size, jobs: int) -> Iterator[tuple[Tally, str]]:
    if jobs == 1:
        yield from (live(seed, size) for seed in seeds)
        return
    listed = list(seeds)
    # Forking a process that has threads is not safe, and pytest's may have some.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(live, listed, [size] * len(listed), chunksize=10)
