"""Events of jobs: from agents, through a stream in Redis, into the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock_kit.errors import NotFound, PenstockError
from penstock_scheduler.domain.job import EventKind
from penstock_scheduler.domain.job_events import JobEvent
from penstock_scheduler.usecases.jobs import Jobs, unknown_job
from penstock_scheduler.usecases.ports import Wakeup, Works

log = logging.getLogger(__name__)

BATCH = 500
RETRY_SECONDS = 1.0
IDLE_SECONDS = 0.25
FOLLOWING_SECONDS = 2.0
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the stream; without an event if nobody can make sense of it."""

    id: bytes
    event: JobEvent | None


class EventStream(Protocol):
    """The stream that agents write."""

    async def read(self, count: int) -> Sequence[Entry]:
        """The oldest entries, at most so many, at once.

        Raises:
            Unavailable: Redis cannot be reached.
        """

    async def drop(self, ids: Sequence[bytes]) -> None:
        """Removes entries.

        Raises:
            Unavailable: Redis cannot be reached.
        """


class EventIntake:
    """Stores what agents say, while this scheduler leads.

    Entries are removed once they are stored, so that none is lost; what is read twice is stored once, by its
    number. The stream is bounded by those who write it: what is lost there they send again, as they are told
    what is stored.

    Args:
        stream: the stream.
        works: opens transactions.
        say: told of what was stored: the last event of each job. Events come all the time, and are nothing
            that the loop need look at.
        wakeup: the loop, told when a job may have waited for its last events.
        leading: whether this scheduler leads.
    """

    def __init__(
        self,
        stream: EventStream,
        works: Works,
        say: Callable[[Mapping[str, int]], None],
        wakeup: Wakeup,
        leading: Callable[[], bool],
    ) -> None:
        self._stream = stream
        self._works = works
        self._say = say
        self._wakeup = wakeup
        self._leading = leading

    async def run(self) -> None:
        """Works until cancelled."""
        away = False
        while True:
            try:
                read = await self.step() if self._leading() else -1
            except PenstockError as error:
                log.log(logging.DEBUG if away else logging.WARNING, "events of jobs wait: %s", error)
                away = True
                await asyncio.sleep(RETRY_SECONDS)
                continue
            away = False
            if read < BATCH:
                await asyncio.sleep(FOLLOWING_SECONDS if read < 0 else IDLE_SECONDS)

    async def step(self) -> int:
        """Takes in one batch; returns how many entries it had."""
        entries = await self._stream.read(BATCH)
        events = [entry.event for entry in entries if entry.event is not None]
        if events:
            async with self._works() as work:
                taken = await work.job_events.take_in(events)
                await work.commit()
            self._say(taken.last_events)
            if taken.awaited:
                self._wakeup.wake()
        if entries:
            await self._stream.drop([entry.id for entry in entries])
        return len(entries)


class JobEvents:
    """Shows the events of jobs.

    Args:
        works: opens transactions.
        jobs: watches jobs.
    """

    def __init__(self, works: Works, jobs: Jobs) -> None:
        self._works = works
        self._jobs = jobs

    async def page(
        self, job_id: str, after: int, limit: int, kinds: Collection[EventKind]
    ) -> Sequence[JobEvent]:
        """Events with a sequence above `after`, in their order; no kinds let all through.

        Raises:
            NotFound: there is no such job.
        """
        async with self._works() as work:
            found = await work.job_events.page(job_id, after, limit, kinds)
            if not found and await work.jobs.get(job_id) is None:
                raise unknown_job(job_id)
        return found

    async def watch(self, job_id: str, after: int, kinds: Collection[EventKind]) -> AsyncIterator[JobEvent]:
        """Gives events as they come, until the job has ended and all were given, or it is gone.

        Raises:
            NotFound: there is no such job.
            Unavailable: the database cannot be reached.
        """
        async for view in self._jobs.watch(job_id):
            while after < view.last_event:
                try:
                    found = await self.page(job_id, after, PAGE, kinds)
                except NotFound:
                    return  # it was deleted meanwhile
                for event in found:
                    yield event
                last = found[-1].sequence if found else after
                after = last if len(found) == PAGE else max(last, view.last_event)
