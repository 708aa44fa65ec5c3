"""A queue, its replicas and its gateways in virtual time: what admission has to cope with, without a clock.

Requests arrive at random (Poisson) at gateways, wait in one stream for each priority, and are computed in
batches; everything is drawn from one seed.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from penstock_gateway.domain.admission import Backlog

# From replica to caller, and from gateway to replica.
WAY_SECONDS = 0.001
COUNT_SECONDS = 0.1


@dataclass(slots=True)
class Call:
    """One request on its way."""

    gateway: int
    priority: int
    came: float
    deadline: float
    reckoned: float = 0.0
    open: bool = True


@dataclass(slots=True)
class Model:
    """How long a batch takes.

    Attributes:
        batch: Requests in one call at most.
        seconds: Of a call with so many requests.
        noise: Relative spread of it.
    """

    batch: int = 32
    seconds: Callable[[int], float] = lambda n: 0.006 + 0.0006 * n
    noise: float = 0.1

    @property
    def capacity(self) -> float:
        """Requests per second of one replica at its best."""
        return max(n / self.seconds(n) for n in range(1, self.batch + 1))


@dataclass(slots=True)
class Load:
    """Arrivals of one kind.

    Attributes:
        rate: Requests per second, from `start` to `end`.
        timeout: Seconds that each may take.
    """

    rate: float
    start: float = 0.0
    end: float = float("inf")
    priority: int = 1
    timeout: float = 0.25
    gateway: int = 0


@dataclass(slots=True)
class Seen:
    """What became of the requests that came in one stretch of time."""

    came: int = 0
    good: int = 0
    refused: int = 0
    late: int = 0
    took: list[float] = field(default_factory=list)


class Simulation:
    """Runs gateways, one queue and its replicas.

    Args:
        model: What the replicas compute.
        replicas: How many there are at first.
        gateways: How many processes.
        seed: Of all that is random.
        depth: Unanswered requests of one gateway at most.
        drops: Whether replicas drop what cannot be answered in time, not only what is late.
        first_seconds: How much longer each replica's first call takes.
        share: Of the batches, the part that begins with the lowest priority.
    """

    def __init__(
        self,
        model: Model,
        *,
        replicas: int = 1,
        gateways: int = 1,
        seed: int = 0,
        depth: int = 4096,
        drops: bool = True,
        first_seconds: float = 0.0,
        share: float = 0.1,
        slice_seconds: float = 0.25,
    ) -> None:
        self.random = random.Random(seed)
        self.model = model
        self.now = 0.0
        # A gamma distribution of mean 1 has the spread `noise` with this shape.
        self.shape = model.noise**-2
        self.depth = depth
        self.drops = drops
        self.share = share
        self.slice = slice_seconds
        self.backlogs = [[Backlog() for _ in range(3)] for _ in range(gateways)]
        self.queues: list[deque[Call]] = [deque() for _ in range(3)]
        self.idle = replicas
        self.cold = replicas
        self.first_seconds = first_seconds
        self.leaving = 0
        self.replicas = replicas
        self.paused_until = 0.0
        self.computed = 0
        # By time slice and priority.
        self.seen: dict[tuple[int, int], Seen] = {}
        self.refusals: Counter[int] = Counter()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._tell()
        self.at(COUNT_SECONDS, self._count)

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        """Do something at a time."""
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, arguments))

    def offer(self, *loads: Load) -> None:
        """Add arrivals."""
        for load in loads:
            self.at(load.start + self.random.expovariate(load.rate), self._arrive, load)

    def burst(self, when: float, count: int, **of: Any) -> None:
        """Add so many arrivals at one moment."""
        for _ in range(count):
            self.at(when, self._call, Load(1.0, **of))

    def run(self, until: float) -> None:
        """Go on to a time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, what, arguments = heapq.heappop(self._events)
            what(*arguments)
        self.now = until

    def resize(self, replicas: int) -> None:
        """Have so many replicas from now on; gateways are told at once."""
        change = replicas - self.replicas
        self.replicas = replicas
        if change > 0:
            self.idle += change
        else:
            self.leaving -= change
            gone = min(self.idle, self.leaving)
            self.idle -= gone
            self.leaving -= gone
        self._tell()
        self._work()

    def _tell(self) -> None:
        for backlogs in self.backlogs:
            for backlog in backlogs:
                backlog.see_replicas(self.replicas, self.model.batch)

    def pause(self, seconds: float) -> None:
        """Let no replica begin a batch for so long: they died, or Redis is away."""
        self.paused_until = self.now + seconds
        self.at(self.paused_until, self._work)

    def sum(self, start: float, end: float, priorities: Iterable[int] = (0, 1, 2)) -> Seen:
        """Return what became of those who came between two times (whole slices)."""
        total = Seen()
        for number in range(round(start / self.slice), round(end / self.slice)):
            for priority in priorities:
                one = self.seen.get((number, priority), Seen())
                total.came += one.came
                total.good += one.good
                total.refused += one.refused
                total.late += one.late
                total.took += one.took
        return total

    def _slice(self, call: Call) -> Seen:
        return self.seen.setdefault((int(call.came / self.slice), call.priority), Seen())

    def _arrive(self, load: Load) -> None:
        if self.now >= load.end:
            return
        self.at(self.now + self.random.expovariate(load.rate), self._arrive, load)
        self._call(load)

    def _call(self, load: Load) -> None:
        call = Call(load.gateway, load.priority, self.now, self.now + load.timeout)
        seen = self._slice(call)
        seen.came += 1
        backlog = self.backlogs[call.gateway][call.priority]
        if sum(b.waiting for b in self.backlogs[call.gateway]) >= self.depth:
            seen.refused += 1
            return
        call.reckoned = backlog.enter(load.timeout)
        if call.reckoned < 0:
            seen.refused += 1
            return
        self.at(call.deadline, self._miss, call)
        self.at(self.now + WAY_SECONDS, self._queue, call)

    def _queue(self, call: Call) -> None:
        self.queues[call.priority].append(call)
        self._work()

    def _miss(self, call: Call) -> None:
        if call.open:
            call.open = False
            self._slice(call).late += 1
            backlog = self.backlogs[call.gateway][call.priority]
            backlog.missed(self.now, self.now - call.came, call.reckoned)

    def _take(self) -> list[Call]:
        order = (2, 0, 1) if self.random.random() < self.share else (0, 1, 2)
        batch: list[Call] = []
        hopeless: list[Call] = []
        waiting = min(self.model.batch, sum(map(len, self.queues)))
        needed = self.model.seconds(max(1, waiting)) + WAY_SECONDS
        for priority in order:
            queue = self.queues[priority]
            while queue and len(batch) < self.model.batch:
                call = queue.popleft()
                if not call.open or call.deadline <= self.now:
                    continue
                if self.drops and call.deadline < self.now + needed:
                    hopeless.append(call)
                    continue
                batch.append(call)
        return batch or hopeless[: self.model.batch]

    def _work(self) -> None:
        while self.idle and self.now >= self.paused_until and any(self.queues):
            batch = self._take()
            if not batch:
                return
            self.idle -= 1
            seconds = self.model.seconds(len(batch)) * self.random.gammavariate(self.shape, 1 / self.shape)
            if self.cold:
                self.cold -= 1
                seconds += self.first_seconds
            self.computed += len(batch)
            self.at(self.now + seconds, self._done, batch)

    def _done(self, batch: list[Call]) -> None:
        if self.leaving:
            self.leaving -= 1
        else:
            self.idle += 1
        for call in batch:
            self.at(self.now + WAY_SECONDS, self._answer, call)
        self._work()

    def _answer(self, call: Call) -> None:
        if not call.open:
            return
        call.open = False
        took = self.now - call.came
        seen = self._slice(call)
        seen.good += 1
        seen.took.append(took)
        self.backlogs[call.gateway][call.priority].answered(self.now, took, call.reckoned)

    def _count(self) -> None:
        self.at(self.now + COUNT_SECONDS, self._count)
        for number, backlogs in enumerate(self.backlogs):
            for priority, backlog in enumerate(backlogs):
                others = [g[priority].waiting for n, g in enumerate(self.backlogs) if n != number]
                backlog.see_others(sum(others))
                backlog.age(self.now)
