"""Tells the scheduler that leads what this gateway counts, and at once when a request needs a replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock_gateway.domain.admission import Waitlist
from penstock_gateway.domain.traffic import Tallies, Tally
from penstock_kit.errors import PenstockError

log = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
# A request that needs a replica is told of at once, but all that come within this time together; and as often
# it is tried again until a scheduler has taken it.
URGENT_SECONDS = 0.05
# What a scheduler takes in one report.
MAX_TARGETS = 4096


@dataclass(frozen=True, slots=True)
class Reported:
    """What is said of one version.

    Attributes:
        tally: What has been counted since the process began.
        waiting: Requests that wait for an answer now.
        waiting_for_replica: Those among them that wait because no replica is ready.
    """

    tally: Tally
    waiting: int = 0
    waiting_for_replica: int = 0


class Counted(Protocol):
    """What the dispatcher is to this module."""

    tallies: Tallies
    waitlists: dict[str, Waitlist]
    wanting: asyncio.Event


class TrafficSink(Protocol):
    """The scheduler that leads."""

    async def report(self, gateway: str, uptime_seconds: float, targets: Sequence[Reported]) -> None:
        """Take what a gateway process has counted.

        Raises:
            PenstockError: No scheduler took it.
        """
        ...


class TrafficReport:
    """Reports once a second, and sooner when a request waits for a replica where there is none.

    Each report has the whole of what was counted, so that a lost one costs nothing.

    Args:
        gateway: Name of this process.
        counted: What it counts.
        sink: Who is told.
        taken: Called after each report that a scheduler took, and so has shown that it leads.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        gateway: str,
        counted: Counted,
        sink: TrafficSink,
        taken: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway = gateway
        self._counted = counted
        self._sink = sink
        self._taken = taken
        self._clock = clock
        self._began = clock()
        self._away = False

    async def run(self) -> None:
        """Report for ever."""
        while True:
            urgent = not await self.report() and self._counted.wanting.is_set()
            await asyncio.sleep(URGENT_SECONDS)
            if urgent:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS - URGENT_SECONDS):
                    await self._counted.wanting.wait()

    async def report(self) -> bool:
        """Report once; return whether a scheduler took it."""
        wanting = self._counted.wanting.is_set()
        self._counted.wanting.clear()
        try:
            await self._sink.report(self._gateway, self._clock() - self._began, self.targets())
        except PenstockError as error:
            if not self._away:
                log.warning("no scheduler takes reports of the traffic: %s", error.message)
            self._away = True
            if wanting:
                self._counted.wanting.set()
            return False
        self._away = False
        self._taken()
        return True

    def targets(self) -> list[Reported]:
        """Return what a report says now: first of versions that requests can reach, then of those gone."""
        waiting: Counter[Tally] = Counter()
        for waitlist in self._counted.waitlists.values():
            waiting[waitlist.tally] += waitlist.waiting
        here = [
            Reported(tally, waiting[tally], 0 if tally.ready else waiting[tally])
            for tally in self._counted.tallies.here
        ]
        room = MAX_TARGETS - len(here)
        gone = self._counted.tallies.gone[-room:] if room > 0 else []
        return here[:MAX_TARGETS] + [Reported(tally) for tally in gone]
