"""What the use cases of jobs need from the outside; `adapters` has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from penstock_scheduler.domain.job import EventKind, Job, JobState, Task
from penstock_scheduler.domain.job_events import JobEvent


@dataclass(frozen=True, slots=True)
class JobMark:
    """What grows whenever a watcher of a job would see something change."""

    revision: int
    last_event: int


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A caller's key that makes a retry safe, if there is one, and what was asked for with it."""

    id: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as callers see it.

    Attributes:
        job: the job.
        tasks: those of its present attempt, or of the last one.
        progress: the latest one, as a serialized scheduler.v1.JobProgress.
        metrics: the latest value of each.
        last_event: number of its last stored event.
    """

    job: Job
    tasks: tuple[Task, ...] = ()
    progress: bytes = b""
    metrics: Mapping[str, float] = field(default_factory=dict)
    last_event: int = 0


@dataclass(frozen=True, slots=True)
class TakenIn:
    """What became of events.

    Attributes:
        count: how many were new.
        last_events: number of the last stored event of each job that had new ones.
        awaited: whether one of these jobs is about to end, and may wait for them.
    """

    count: int
    last_events: Mapping[str, int]
    awaited: bool


class JobQueue(Protocol):
    """The way from whoever takes a call to the scheduler that leads."""

    async def put(self, job_id: str) -> None:
        """Says that a job is new or was changed, once that is committed. Never fails, and soon returns."""

    async def take(self) -> Sequence[str]:
        """The jobs that wait in the queue, oldest first; waits a while for the first, then none.

        Raises:
            Unavailable: Redis cannot be reached.
            DeadlineExceeded: Redis does not answer.
        """


class JobEventStore(Protocol):
    """Events of jobs in the open transaction."""

    async def take_in(self, events: Sequence[JobEvent]) -> TakenIn:
        """Stores events of tasks, exactly once each.

        Of each task only what follows the last one that is stored: what comes twice, after a gap, or of a
        task that nobody knows is passed over.
        """

    async def page(
        self, job_id: str, after: int, limit: int, kinds: Collection[EventKind]
    ) -> Sequence[JobEvent]:
        """Events with a sequence above `after`, in their order; no kinds let all through."""


class JobStore(Protocol):
    """Jobs in the open transaction."""

    async def add(self, job: Job, kind: str, request: JobRequest) -> Job:
        """Stores a new one; a name that was used before goes on counting its tasks.

        Raises:
            AlreadyExists: the name is taken.
        """

    async def claim(self, request: JobRequest) -> str | None:
        """The id of the job that an earlier request of this id made; None if the id is new or empty.

        A second request of the same id waits until the transaction of the first has ended.

        Raises:
            FailedPrecondition: the id was used for something else.
        """

    async def get(self, job_id: str, *, lock: bool = False) -> Job | None:
        """One; with `lock` nobody else changes it until the transaction ends."""

    async def replace(self, job: Job) -> None:
        """Stores what changed of one.

        Raises:
            Aborted: somebody changed it since it was read.
        """

    async def remove(self, job: Job) -> None:
        """Forgets one that has ended, with its tasks and events."""

    async def checkpoints(self, job: Job) -> Sequence[str]:
        """Names of its checkpoints at the registry, as its events have them."""

    async def ended_for(self, age: timedelta, limit: int, *, detailed: bool) -> Sequence[str]:
        """Ids of jobs that ended so long ago, oldest first; with `detailed` those with details to forget.

        A clock that is ahead does no harm: the database's must agree.
        """

    async def forget_details(self, job: Job) -> None:
        """Forgets the events of one that has ended, and the names of its checkpoints."""

    async def forget_names(self, age: timedelta) -> None:
        """Forgets the names of jobs that were deleted so long ago."""

    async def view(self, job_id: str) -> JobView | None:
        """One as callers see it."""

    async def views(
        self, after: tuple[datetime, str] | None, limit: int, project: str, states: Collection[JobState]
    ) -> Sequence[JobView]:
        """A page, newest first, after the one made at that moment with that id; empty filters pass all."""


class ResultStore(Protocol):
    """The registry, as far as results of jobs go. All calls may be repeated.

    Names of results come from processes that may run anybody's program: what another job or somebody else
    made is left alone.
    """

    async def finalize(self, name: str, job_id: str) -> None:
        """Makes a version or artifact that a job made READY; nothing if it is.

        Raises:
            NotFound, FailedPrecondition, InvalidArgument, DataLoss: it can never be, or the job did not
                make it.
            Unavailable: the registry cannot be reached.
        """

    async def delete(self, name: str, job_id: str) -> None:
        """Deletes a version or artifact; nothing if there is none.

        Raises:
            FailedPrecondition, InvalidArgument: somebody uses it, the job did not make it, or it is no name.
            Unavailable: the registry cannot be reached.
        """

    async def checkpoints(self, job: Job) -> Sequence[str]:
        """Names of the checkpoints that a job, or a deleted one of its name, has sent or is sending.

        Raises:
            Unavailable: the registry cannot be reached.
        """
