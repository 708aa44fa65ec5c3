"""What is kept of jobs that ended long ago."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from penstock_kit.errors import DeadlineExceeded, NotFound, PenstockError, Unavailable
from penstock_scheduler.usecases.jobs import Jobs
from penstock_scheduler.usecases.ports import Works

log = logging.getLogger(__name__)

LOOK_SECONDS = 3600.0
FOLLOWING_SECONDS = 60.0
BATCH = 100
"""Jobs at a time, so that the first look after an upgrade does not keep everything else waiting."""
PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Retention:
    """How long jobs are kept after their end; None is for ever.

    Attributes:
        details: their logs, points of metrics, progress and checkpoints, and the names of deleted jobs.
        jobs: the jobs themselves, with their last metrics, report and names of results.
    """

    details: timedelta | None
    jobs: timedelta | None


class JobRetention:
    """Lets go of what nobody looks at any more, while this scheduler leads; results of jobs always stay.

    Args:
        works: opens transactions.
        jobs: forgets and deletes.
        retention: how long they are kept.
        leading: whether this scheduler leads.
    """

    def __init__(self, works: Works, jobs: Jobs, retention: Retention, leading: Callable[[], bool]) -> None:
        self._works = works
        self._jobs = jobs
        self._retention = retention
        self._leading = leading

    async def run(self) -> None:
        """Works until cancelled."""
        while True:
            pause = FOLLOWING_SECONDS
            if self._leading():
                try:
                    pause = PAUSE_SECONDS if await self.step() else LOOK_SECONDS
                except PenstockError as error:
                    log.warning("jobs that ended long ago are kept for now: %s", error)
            await asyncio.sleep(pause)

    async def step(self) -> bool:
        """Lets go of one batch; whether there may be more.

        Raises:
            Unavailable: the registry or the database cannot be reached. A job that cannot be let go of for
                another reason stays, and the others go.
            DeadlineExceeded: the registry does not answer.
        """
        more = False
        if self._retention.jobs is not None:
            async with self._works() as work:
                old = await work.jobs.ended_for(self._retention.jobs, BATCH, detailed=False)
            more = await self._each(old, self._jobs.delete, "deleted") or more
        if self._retention.details is not None:
            async with self._works() as work:
                old = await work.jobs.ended_for(self._retention.details, BATCH, detailed=True)
                await work.jobs.forget_names(self._retention.details)
                await work.commit()
            more = (
                await self._each(old, self._jobs.forget_details, "left without its events and checkpoints")
                or more
            )
        return more

    async def _each(self, old: Sequence[str], let_go: Callable[[str], Awaitable[None]], how: str) -> bool:
        done = 0
        for job_id in old:
            try:
                await let_go(job_id)
            except NotFound:
                pass  # somebody deleted it meanwhile
            except (Unavailable, DeadlineExceeded):
                raise
            except PenstockError as error:
                log.warning("job %s, which ended long ago, is kept for now: %s", job_id, error)
                continue
            else:
                log.info("job %s, which ended long ago, is %s", job_id, how)
            done += 1
        return done > 0 and len(old) == BATCH
