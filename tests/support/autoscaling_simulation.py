"""A deployment in virtual time: requests, replicas that take a while to start, and the real decider."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from penstock_scheduler.domain.autoscaling.decide import (
    STEADY_SECONDS,
    SUDDEN_SECONDS,
    Facts,
    Memory,
    Target,
    decide,
)
from penstock_scheduler.domain.autoscaling.settings import Autoscaling, Scale
from penstock_scheduler.domain.traffic import LATENCY_BUCKETS, Counts, Seen, TrafficKey, latency_bucket
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.traffic import Traffic

VERSION = VersionKey("sim", 1)
KEY = TrafficKey("sim", VERSION)


@dataclass
class Simulation:
    """One deployment of one version; every second its gateway reports and the decider decides.

    Attributes:
        settings: what its owner asks for.
        rate: requests per second at a moment; None if `callers` ask instead.
        capacity: answers per second of one replica, which computes one at a time.
        callers: callers who each ask again as soon as they are answered.
        random_service: whether the time of an answer is exponential; it is constant otherwise.
        start_seconds: how long a replica takes to start.
        seed: of everything that chance decides.
        replicas: at the beginning.
        profiled: what a profile says that one replica does.
        history: number of desired replicas after each second.
        waits: for each request, in order: when it came, and how long it was in the queue.
    """

    settings: Autoscaling
    rate: Callable[[float], float] | None = None
    capacity: float = 100.0
    callers: int = 0
    random_service: bool = False
    start_seconds: float = 1.0
    seed: int = 1
    replicas: int = 1
    profiled: float | None = None
    history: list[int] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)

    def wake(self) -> None:
        """Implements `Wakeup`; the decider looks every second here."""

    def run(self, seconds: int) -> Simulation:
        """Lets time pass from 0."""
        chance = random.Random(self.seed)
        now = 0.0
        traffic = Traffic(self, clock=lambda: now)
        traffic.follow(True)
        scale, memory = Scale(self.replicas), None
        ready, starting = self.replicas, deque[float]()
        queue: deque[float] = deque()
        busy: list[tuple[float, float]] = []
        arrived = answered = microseconds = 0
        latencies = [0] * LATENCY_BUCKETS
        arrivals: list[float] = [0.0] * self.callers
        if self.rate is not None:
            arrivals = [self._next(chance, 0.0)]
        for second in range(seconds):
            end = second + 1.0
            while True:
                coming = arrivals[0] if arrivals else end
                done = busy[0][0] if busy else end
                started = starting[0] if starting else end
                at = min(coming, done, started)
                if at >= end:
                    break
                if at == started:
                    starting.popleft()
                    ready += 1
                elif at == done:
                    _, came = heapq.heappop(busy)
                    answered += 1
                    microseconds += round((at - came) * 1e6)
                    latencies[latency_bucket(at - came)] += 1
                    if self.rate is None:
                        heapq.heappush(arrivals, at)
                else:
                    heapq.heappop(arrivals)
                    queue.append(at)
                    arrived += 1
                    if self.rate is not None:
                        arrivals = [self._next(chance, at)]
                while queue and len(busy) < ready:
                    came = queue.popleft()
                    self.waits.append((came, at - came))
                    takes = chance.expovariate(self.capacity) if self.random_service else 1 / self.capacity
                    heapq.heappush(busy, (at + takes, came))
            now = end
            waiting = len(queue) + len(busy)
            counts = Counts(arrived, answered, latency_microseconds=microseconds, latencies=tuple(latencies))
            asking = waiting if not ready else 0
            traffic.report("gateway", now, [Seen(KEY, counts, waiting, asking)])
            scale, memory = self._decide(traffic, scale, memory, ready, now)
            self.history.append(scale.desired)
            while ready + len(starting) < scale.desired:
                starting.append(now + self.start_seconds)
            while ready + len(starting) > scale.desired:
                if starting:
                    starting.pop()
                else:
                    ready -= 1
        return self

    def _decide(
        self, traffic: Traffic, scale: Scale, memory: Memory | None, ready: int, now: float
    ) -> tuple[Scale, Memory]:
        totals = traffic.totals(*KEY)
        target = Target(
            VERSION,
            traffic.window(*KEY, STEADY_SECONDS),
            traffic.window(*KEY, SUDDEN_SECONDS),
            ready,
            totals.latency_quantile_seconds(0.05),
            profiled=self.profiled,
        )
        return decide(Facts(self.settings, scale, (target,), totals.arrived), memory, now)

    def _next(self, chance: random.Random, after: float) -> float:
        """The next arrival at random: a Poisson process whose rate changes, by thinning."""
        assert self.rate is not None
        most = 1.3 * max(self.rate(after + i) for i in range(3)) + 1e-3
        while True:
            after += chance.expovariate(most)
            if chance.random() * most <= self.rate(after):
                return after
            if most <= 2e-3:
                return after

    def late_seconds(self) -> list[int]:
        """The seconds of whose requests more than a twentieth waited longer than the objective."""
        late: dict[int, int] = {}
        came: dict[int, int] = {}
        for at, wait in self.waits:
            second = int(at)
            came[second] = came.get(second, 0) + 1
            late[second] = late.get(second, 0) + (wait > self.settings.queue_wait_seconds)
        return [second for second, count in sorted(came.items()) if late[second] > 0.05 * count]

    def changes(self, since: int = 0) -> int:
        """Replicas that were started or ended after the second `since`."""
        return changes(self.history[since:])


def changes(numbers: Sequence[int]) -> int:
    """Replicas started or ended over time, when so many were wanted."""
    return sum(abs(after - before) for before, after in pairwise(numbers))
