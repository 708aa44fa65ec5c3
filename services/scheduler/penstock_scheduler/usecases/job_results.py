"""What jobs made: final at the registry if they succeed, deleted if they do not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from penstock_kit.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, PenstockError
from penstock_scheduler.domain.job import Job, JobState, RegistryWord
from penstock_scheduler.usecases.job_ports import ResultStore
from penstock_scheduler.usecases.ports import Wakeup
from penstock_scheduler.usecases.wake import Wake

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
TICK_SECONDS = 30.0
AT_ONCE = 8


async def _no_canary(_: Job) -> str:
    return ""


class JobResults:
    """Asks the registry, outside of transactions, and gives the loop its word.

    Nothing is stored: whoever leads after a crash asks again, which the registry allows.

    Args:
        registry: the registry.
        wakeup: told when the registry has said something.
        leading: whether this scheduler leads.
        canary: gives final results to the deployment that a job names, and says what came of it; may be
            repeated.
    """

    def __init__(
        self,
        registry: ResultStore,
        wakeup: Wakeup,
        leading: Callable[[], bool],
        canary: Callable[[Job], Awaitable[str]] = _no_canary,
    ) -> None:
        self._registry = registry
        self._wakeup = wakeup
        self._leading = leading
        self._canary = canary
        self._wake = Wake()
        self._open: dict[str, Job] = {}
        self._words: dict[str, RegistryWord] = {}
        self._problems: dict[str, str] = {}

    def words(self) -> Mapping[str, RegistryWord]:
        """What the registry has said, by job."""
        return {**{id_: RegistryWord(problem=why) for id_, why in self._problems.items()}, **self._words}

    def follow(self, jobs: Iterable[Job]) -> None:
        """Takes up which jobs wait for the registry's word."""
        waiting = {
            job.id: job
            for job in jobs
            if (job.state is JobState.FINALIZING and job.results) or (job.ended and job.leftovers)
        }
        for kept in (self._words, self._problems):
            for id_ in [id_ for id_ in kept if id_ not in waiting]:
                del kept[id_]
        # A word about its results says nothing about what is to be deleted when it has ended.
        for id_, job in waiting.items():
            known = self._open.get(id_)
            if known is not None and (known.state, known.create_time) != (job.state, job.create_time):
                self._words.pop(id_, None)
        fresh = {id_ for id_ in waiting if id_ not in self._words}
        self._open = waiting
        if fresh:
            self._wake.wake()

    async def run(self) -> None:
        """Works until cancelled."""
        while True:
            again = await self.step() if self._leading() else False
            await self._wake.wait(RETRY_SECONDS if again else TICK_SECONDS)

    async def step(self) -> bool:
        """Asks for all jobs that wait; whether some have to be asked for again."""
        limit = asyncio.Semaphore(AT_ONCE)

        async def ask(job: Job) -> bool:
            async with limit:
                return await self._ask(job)

        waiting = [job for id_, job in self._open.items() if id_ not in self._words]
        failed = await asyncio.gather(*(ask(job) for job in waiting))
        return any(failed)

    async def _ask(self, job: Job) -> bool:
        """Whether it has to be asked for again."""
        try:
            word = await (self._clean(job) if job.ended else self._finalize(job))
        except PenstockError as error:
            log.warning("the registry cannot be asked about the results of job %s: %s", job.id, error)
            self._problems[job.id] = str(error)
            return True
        self._words[job.id] = word
        self._wakeup.wake()
        return False

    async def _finalize(self, job: Job) -> RegistryWord:
        for name in job.results:
            try:
                await self._registry.finalize(name, job.id)
            except (NotFound, FailedPrecondition, InvalidArgument, DataLoss) as error:
                return RegistryWord(refusal=f"The registry does not take {name}: {error}")
        return RegistryWord(final=True, note=await self._canary(job))

    async def _clean(self, job: Job) -> RegistryWord:
        deleted = []
        for name in job.leftovers:
            try:
                await self._registry.delete(name, job.id)
            except (FailedPrecondition, InvalidArgument) as error:
                log.warning("what job %s left behind, %s, stays: %s", job.id, name, error)
            deleted.append(name)
        return RegistryWord(deleted=frozenset(deleted))
