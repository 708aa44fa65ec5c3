"""Keeps in sight what admission cannot know by itself: what other gateways have in the same queues."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from penstock_gateway.domain.admission import Waitlist
from penstock_gateway.domain.statistics import total
from penstock_gateway.usecases.ports import Queues
from penstock_kit.errors import PenstockError

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
# Replicas publish their counters each second.
TOTALS_SECONDS = 1.0


class QueueWatch:
    """Asks Redis for the depths of the queues in use: one round trip each tenth of a second, none when idle.

    Args:
        waitlists: Gives what waits here, by queue.
        queues: Answers.
    """

    def __init__(self, waitlists: Callable[[], Mapping[str, Waitlist]], queues: Queues) -> None:
        self._waitlists = waitlists
        self._queues = queues
        self._away = False
        self._totals_at = 0.0

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look(time.monotonic())

    async def look(self, now: float) -> None:
        """Look once. While Redis is away each gateway reckons for itself.

        Args:
            now: The time, on the clock of `time.monotonic`.
        """
        busy = []
        for waitlist in list(self._waitlists().values()):
            waitlist.age(now)
            if waitlist.busy:
                busy.append(waitlist)
        if not busy:
            return
        before = [[backlog.waiting for backlog in waitlist.backlogs] for waitlist in busy]
        try:
            depths = await self._queues.depths([waitlist.queue for waitlist in busy])
            for waitlist, own, depth in zip(busy, before, depths, strict=True):
                waitlist.see_depths(own, depth)
            if now >= self._totals_at:
                self._totals_at = now + TOTALS_SECONDS
                for waitlist in busy:
                    sums = total(await self._queues.read(waitlist.queue))
                    waitlist.see_totals(sums.success_count, sums.inference_count)
            self._away = False
        except PenstockError as error:
            if not self._away:
                log.warning("the depths of queues cannot be read: %s", error.message)
            self._away = True
            for waitlist in busy:
                waitlist.alone()
