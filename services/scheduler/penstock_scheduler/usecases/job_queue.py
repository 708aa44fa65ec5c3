"""Jobs that callers put in or change come to the scheduler that leads through a queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from penstock_kit.errors import PenstockError
from penstock_scheduler.usecases.job_ports import JobQueue
from penstock_scheduler.usecases.ports import Wakeup

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
FOLLOWING_SECONDS = 0.5


class JobQueueIntake:
    """Takes jobs out of the queue while this scheduler leads, and has the planner look at them.

    Any scheduler may take a call; the one that leads would otherwise notice at its next look at the database,
    up to a second later. The database is the truth: whatever is lost on the way here is found at that look.

    Args:
        queue: the queue.
        wakeup: the loop that plans.
        leading: whether this scheduler leads.
    """

    def __init__(self, queue: JobQueue, wakeup: Wakeup, leading: Callable[[], bool]) -> None:
        self._queue = queue
        self._wakeup = wakeup
        self._leading = leading

    async def run(self) -> None:
        """Works until cancelled."""
        away = False
        while True:
            if not self._leading():
                await asyncio.sleep(FOLLOWING_SECONDS)
                continue
            try:
                jobs = await self._queue.take()
            except PenstockError as error:
                log.log(logging.DEBUG if away else logging.WARNING, "the queue of jobs is away: %s", error)
                away = True
                await asyncio.sleep(RETRY_SECONDS)
                continue
            away = False
            if jobs:
                log.debug("%d jobs are new or changed: %s", len(jobs), ", ".join(jobs[:10]))
                self._wakeup.wake()
