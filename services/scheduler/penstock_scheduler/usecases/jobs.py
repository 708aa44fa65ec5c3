"""What callers do with jobs; the reconcile loop does the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from penstock_kit.errors import FailedPrecondition, InvalidArgument, NotFound, Reason
from penstock_scheduler.domain.job import Job, JobState
from penstock_scheduler.domain.node import NodeState
from penstock_scheduler.domain.planner.feasible import Rejection, Usage, check, closest
from penstock_scheduler.domain.planner.gangs import need_of, room_for
from penstock_scheduler.usecases.deployments import unknown_deployment
from penstock_scheduler.usecases.job_ports import JobMark, JobQueue, JobRequest, JobView, ResultStore
from penstock_scheduler.usecases.latest import Latest
from penstock_scheduler.usecases.ports import Registry, Wakeup, Work, Works

log = logging.getLogger(__name__)

MAX_NODES_LOOKED_AT = 1000
DELETED_AT_ONCE = 8
JobMarks = Mapping[str, JobMark]


class Reference(NamedTuple):
    """A dataset, artifact, version or deployment that a job names, as its maker wrote it.

    `answers` is the artifact that gets predictions; there need be none of that name yet.
    """

    kind: Literal["artifact", "answers", "version", "deployment"]
    name: str
    selector: str = ""


@dataclass(frozen=True, slots=True)
class AskedJob:
    """What a caller asks for.

    Attributes:
        job: the job; its work is what `write` gives.
        kind: which work it is: train, convert …
        references: what it names.
        write: the work as a serialized scheduler.v1.Job, once it is known what each reference means.
    """

    job: Job
    kind: str
    references: tuple[Reference, ...]
    write: Callable[[Mapping[Reference, str]], bytes]


class Jobs:
    """Creates, cancels, deletes and watches jobs.

    Args:
        works: opens transactions.
        registry: asked what a job's datasets and versions mean.
        results: deletes what a job left behind.
        wakeup: told of every change.
        queue: tells the scheduler that leads, if it is another.
        marks: what the loop last saw of jobs that have not ended.
    """

    def __init__(
        self,
        works: Works,
        registry: Registry,
        results: ResultStore,
        wakeup: Wakeup,
        queue: JobQueue,
        marks: Latest[JobMarks],
    ) -> None:
        self._works = works
        self._results = results
        self._registry = registry
        self._wakeup = wakeup
        self._queue = queue
        self._marks = marks

    async def create(self, asked: AskedJob, request: JobRequest) -> JobView:
        """Queues a job.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: what it refers to does not exist.
            FailedPrecondition: what it refers to is not READY, the cluster could never hold it, or the
                request id was used for something else.
            Unavailable: the registry or the database cannot be reached.
        """
        if request.id:
            async with self._works() as work:
                earlier = await work.jobs.claim(request)
            if earlier is not None:
                return await self.get(earlier)
        found = await asyncio.gather(*(self._resolve(each) for each in asked.references))
        job = replace(asked.job, work=asked.write(dict(zip(asked.references, found, strict=True))))
        async with self._works() as work:
            earlier = await work.jobs.claim(request)
            if earlier is None:
                await self._check_placeable(work, job)
                await work.jobs.add(job, asked.kind, request)
                await work.commit()
        await self._say_changed(job.id)
        return await self.get(earlier or job.id)

    async def get(self, job_id: str) -> JobView:
        """One job.

        Raises:
            NotFound: there is none of that name.
        """
        async with self._works() as work:
            view = await work.jobs.view(job_id)
        if view is None:
            raise unknown_job(job_id)
        return view

    async def page(
        self, after: tuple[datetime, str] | None, limit: int, project: str, states: Collection[JobState]
    ) -> Sequence[JobView]:
        """A page, newest first."""
        async with self._works() as work:
            return await work.jobs.views(after, limit, project, states)

    async def cancel(self, job_id: str, *, actor: str) -> JobView:
        """Ends a job. Once this returns it can only become CANCELLED.

        Raises:
            NotFound: there is none of that name.
            FailedPrecondition: it has ended otherwise, or its results are being made final.
        """
        async with self._works() as work:
            job = await work.jobs.get(job_id, lock=True)
            if job is None:
                raise unknown_job(job_id)
            if job.state in (JobState.SUCCEEDED, JobState.FAILED, JobState.FINALIZING):
                how = "its results are being made final" if not job.ended else f"it {job.state.name}"
                raise FailedPrecondition(
                    f"Job {job_id} cannot be cancelled any more: {how}.",
                    reason=Reason.WRONG_STATE,
                    metadata={"job": job_id, "state": job.state.name},
                )
            if not job.cancelling and not job.ended:
                now = datetime.now(UTC)
                why = f"{actor or 'Somebody'} cancelled it."
                cancelled = replace(job, cancelling=True, message=why, update_time=now)
                if job.state is JobState.QUEUED:
                    # It holds nothing: no need to wait for the loop.
                    cancelled = replace(cancelled, not_before=None).advance(JobState.CANCELLED, now, why)
                await work.jobs.replace(cancelled)
                await work.commit()
                log.info("job %s: %s", job_id, why)
        await self._say_changed(job_id)
        return await self.get(job_id)

    async def delete(self, job_id: str) -> None:
        """Removes a job that has ended, with its events and checkpoints. Its results stay.

        Raises:
            NotFound: there is none of that name.
            FailedPrecondition: it has not ended.
            Unavailable: the registry or the database cannot be reached; the job stays.
        """
        async with self._works() as work:
            job = await self._ended(work, job_id)
            names = {*job.leftovers, *await work.jobs.checkpoints(job)}
        # First what only the job knows of, outside of transactions; a second try finds it gone.
        await self._delete_made(job, names)
        async with self._works() as work:
            again = await self._ended(work, job_id)
            if again.create_time == job.create_time:
                await work.jobs.remove(again)
                await work.commit()
        await self._say_changed(job_id)

    async def forget_details(self, job_id: str) -> None:
        """Removes the events and checkpoints of a job that has ended. The job and its results stay.

        Raises:
            NotFound: there is none of that name.
            FailedPrecondition: it has not ended.
            Unavailable: the registry or the database cannot be reached; they stay.
        """
        async with self._works() as work:
            job = await self._ended(work, job_id)
            names = set(await work.jobs.checkpoints(job))
        await self._delete_made(job, names)
        async with self._works() as work:
            again = await self._ended(work, job_id)
            if again.create_time == job.create_time:
                await work.jobs.forget_details(again)
                await work.commit()

    async def _delete_made(self, job: Job, names: Collection[str]) -> None:
        """Deletes what is no result, checkpoints included whose upload ended, or ends, after the job."""
        limit = asyncio.Semaphore(DELETED_AT_ONCE)
        sent = await self._results.checkpoints(job) if job.attempt else ()

        async def delete(name: str) -> None:
            async with limit:
                try:
                    await self._results.delete(name, job.id)
                except (FailedPrecondition, InvalidArgument) as error:
                    log.warning("what job %s left behind, %s, stays: %s", job.id, name, error)

        await asyncio.gather(*(delete(name) for name in sorted({*names, *sent} - set(job.results))))

    async def _say_changed(self, job_id: str) -> None:
        self._wakeup.wake()
        await self._queue.put(job_id)

    async def _ended(self, work: Work, job_id: str) -> Job:
        job = await work.jobs.get(job_id, lock=True)
        if job is None:
            raise unknown_job(job_id)
        if not job.ended:
            raise FailedPrecondition(
                f"Job {job_id} is {job.state.name}; cancel it first.",
                reason=Reason.WRONG_STATE,
                metadata={"job": job_id, "state": job.state.name},
            )
        return job

    async def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """Gives the job at once and after every change, until it has ended or is gone.

        Raises:
            NotFound: there is none of that name.
            Unavailable: the database cannot be reached.
        """
        generation, mark = self._marks.generation, (self._marks.get() or {}).get(job_id)
        sent = await self.get(job_id)
        yield sent
        while not sent.job.ended:
            generation, marks = await self._marks.newer(generation)
            if marks.get(job_id) == mark and mark is not None:
                continue
            mark = marks.get(job_id)
            try:
                view = await self.get(job_id)
            except NotFound:
                return
            if view != sent:
                sent = view
                yield view

    async def _resolve(self, reference: Reference) -> str:
        if reference.kind == "deployment":
            async with self._works() as work:
                if await work.deployments.view(reference.name) is None:
                    raise unknown_deployment(reference.name)
            return f"deployments/{reference.name}"
        if reference.kind == "answers":
            await self._registry.check_answers(reference.name)
            return f"artifacts/{reference.name}"
        if reference.kind == "artifact":
            return await self._registry.artifact(reference.name)
        if not reference.selector:
            return await self._registry.newest(reference.name)
        return str((await self._registry.resolve(reference.name, reference.selector)).key)

    async def _check_placeable(self, work: Work, job: Job) -> None:
        """Refuses what the cluster could never hold, were it empty."""
        gang = job.gang
        if (gang.resources.gpu_memory_bytes or gang.resources.gpu_memory_millis) and not gang.resources.gpus:
            raise InvalidArgument(
                "Memory of GPUs is asked for, but no GPU; give resources.gpus too.",
                metadata={"field": "resources.gpus"},
            )
        nodes = [view.node for view in await work.cluster.nodes("", MAX_NODES_LOOKED_AT)]
        if not nodes or len(nodes) == MAX_NODES_LOOKED_AT:
            return  # nobody knows what nodes there will be, or there are more than were looked at
        empty = [
            Usage(replace(node, state=NodeState.READY, cordoned=False, draining=False)) for node in nodes
        ]
        need = need_of(gang)
        count = room_for(empty, need, gang.tasks)
        if count >= gang.tasks:
            return
        nearest = closest(v for usage in empty if isinstance(v := check(usage, need), Rejection))
        lacks = nearest.lacks if nearest else f"room for more than {count} of them"
        where = nearest.node if nearest else nodes[0].name
        what = "a task of it" if gang.tasks == 1 else f"its {gang.tasks} tasks"
        room = f"; there is room for {count} of them" if count else ""
        raise FailedPrecondition(
            f"The cluster could not hold {what} even if nothing else ran{room}. The closest node, "
            f"nodes/{where}, lacks {lacks}. Ask for fewer or smaller ranks, or add nodes.",
            reason=Reason.UNPLACEABLE,
            metadata={"node": where, "lacks": lacks, "room": str(count)},
        )


def unknown_job(job_id: str) -> NotFound:
    """The error of a name that no job has."""
    return NotFound(
        f"There is no job {job_id}; list them with `penstock jobs`.",
        reason=Reason.RESOURCE_NOT_FOUND,
        metadata={"job": job_id},
    )
