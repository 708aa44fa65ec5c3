"""Jobs, tasks and what tasks hold, in Postgres."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import and_, delete, exists, func, insert, or_, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from penstock_kit.db import violated_constraint
from penstock_kit.errors import Aborted, AlreadyExists, FailedPrecondition, Reason
from penstock_scheduler.adapters.job_mapping import (
    JOB_CHANGING,
    TASK_CHANGING,
    job_from_row,
    job_values,
    task_from_row,
    task_values,
)
from penstock_scheduler.adapters.rows import (
    JobEventRow,
    JobNameRow,
    JobRow,
    TaskAllocationDeviceRow,
    TaskAllocationRow,
    TaskRow,
)
from penstock_scheduler.domain.job import Job, JobState, Task, TaskState
from penstock_scheduler.domain.project import unknown_project
from penstock_scheduler.usecases.job_ports import JobMark, JobRequest, JobView
from penstock_scheduler.usecases.ports import AllocationView

_STOPPED = TaskState.STOPPED.name
Sizes = Mapping[tuple[str, str], int]


class SqlJobs:
    """Implements `JobStore` in an open session."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    # -- the loop ---------------------------------------------------------------------------------

    async def load(self) -> tuple[Mapping[str, Job], Mapping[str, Task], Mapping[str, JobMark]]:
        """All that the planner reads, and what watchers would see change."""
        # Word for word the condition of the index, so that jobs that have ended long ago cost nothing.
        unfinished = text("jobs.end_time IS NULL OR jobs.leftovers <> '[]'")
        query = select(JobRow).where(unfinished)
        rows = list(await self._session.scalars(query.order_by(JobRow.id)))
        jobs = {row.id: job_from_row(row) for row in rows}
        marks = {row.id: JobMark(row.revision, row.last_event) for row in rows}
        if not jobs:
            return {}, {}, {}
        live = select(TaskRow).where(TaskRow.state != _STOPPED)
        # The statements see different moments; the leader alone makes tasks.
        tasks = [task_from_row(row) for row in await self._session.scalars(live) if row.job in jobs]
        return jobs, {task.id: task for task in tasks}, marks

    async def free(self, tasks: Collection[Task]) -> None:
        """Takes back what tasks held."""
        keys = [(task.job, task.number) for task in tasks]
        if keys:
            held = tuple_(TaskAllocationRow.job, TaskAllocationRow.number)
            await self._session.execute(delete(TaskAllocationRow).where(held.in_(keys)))

    async def save(self, jobs: Sequence[Job], tasks: Sequence[Task]) -> None:
        """Stores what a plan changes.

        Raises:
            Aborted: somebody changed one of the jobs since the plan was made.
        """
        for job in sorted(jobs, key=lambda job: job.id):
            await self.replace(job)
        if tasks:
            statement = upsert(TaskRow).values([task_values(task) for task in tasks])
            changing: Any = {column: statement.excluded[column] for column in TASK_CHANGING}
            await self._session.execute(
                statement.on_conflict_do_update(index_elements=["job", "number"], set_=changing)
            )

    async def held(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Those of the tasks that have their part of a node already."""
        if not tasks:
            return []
        key = tuple_(TaskAllocationRow.job, TaskAllocationRow.number)
        query = select(TaskAllocationRow.job, TaskAllocationRow.number).where(
            key.in_([(task.job, task.number) for task in tasks])
        )
        known = {tuple(row) for row in await self._session.execute(query)}
        return [task for task in tasks if (task.job, task.number) in known]

    async def allocate(self, tasks: Sequence[Task], sizes: Sizes) -> None:
        """Gives tasks their parts of nodes.

        Args:
            tasks: those that have none yet.
            sizes: memory of GPUs, by node and device.
        """
        now = datetime.now(UTC)
        await self._session.execute(
            insert(TaskAllocationRow),
            [
                {
                    "job": task.job,
                    "number": task.number,
                    "node": task.node,
                    "cpu_millis": task.resources.cpu_millis,
                    "memory_bytes": task.resources.memory_bytes,
                    "gpus": task.resources.gpus,
                    "gpu_memory_bytes": task.resources.gpu_memory_bytes,
                    "gpu_memory_millis": task.resources.gpu_memory_millis,
                    "digest": task.digest,
                    "disk_bytes": task.resources.disk_bytes,
                    "create_time": now,
                }
                for task in tasks
            ],
        )
        devices = [
            {
                "job": task.job,
                "number": task.number,
                "node": task.node,
                "device": device,
                "memory_bytes": task.resources.gpu_bytes(sizes.get((task.node, device), 0)),
            }
            for task in tasks
            if task.resources.gpus
            for device in task.devices
        ]
        if devices:
            await self._session.execute(insert(TaskAllocationDeviceRow), devices)

    async def allocations(self, after: str, limit: int, *, node: str) -> Sequence[AllocationView]:
        """A page of what tasks hold, after the key of one."""
        job, _, number = after.partition("/")
        key = tuple_(TaskAllocationRow.job, TaskAllocationRow.number)
        same = and_(TaskRow.job == TaskAllocationRow.job, TaskRow.number == TaskAllocationRow.number)
        query = (
            select(TaskRow, TaskAllocationRow.create_time)
            .join(TaskAllocationRow, same)
            .where(key > (job, int(number or -1)))
            .order_by(TaskAllocationRow.job, TaskAllocationRow.number)
            .limit(limit)
        )
        if node:
            query = query.where(TaskAllocationRow.node == node)
        return [
            AllocationView(f"{row.job}/{row.number}", task_from_row(row), time)
            for row, time in await self._session.execute(query)
        ]

    # -- callers ----------------------------------------------------------------------------------

    async def add(self, job: Job, kind: str, request: JobRequest) -> Job:
        """See `JobStore.add`."""
        before = await self._session.get(JobNameRow, job.id)
        job = replace(job, tasks_made=before.tasks_made if before else 0)
        values = {
            **job_values(job),
            "kind": kind,
            "revision": 0,
            "request_id": request.id,
            "fingerprint": request.fingerprint,
        }
        try:
            await self._session.execute(insert(JobRow).values(**values))
        except IntegrityError as error:
            if violated_constraint(error) == "pk_jobs":
                raise AlreadyExists(
                    f"Job {job.id} exists already; choose another name, or delete it when it has ended.",
                    metadata={"job": job.id},
                ) from error
            if violated_constraint(error) == "fk_jobs_project":
                raise unknown_project(job.project) from error
            raise
        return job

    async def claim(self, request: JobRequest) -> str | None:
        """See `JobStore.claim`."""
        if not request.id:
            return None
        await self._session.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:id, 0))"),
            {"id": f"scheduler/jobs/{request.id}"},
        )
        query = select(JobRow.id, JobRow.fingerprint).where(JobRow.request_id == request.id)
        found = (await self._session.execute(query)).first()
        if found is None:
            return None
        if found.fingerprint != request.fingerprint:
            raise FailedPrecondition(
                f"The request_id {request.id} was used before for something else; use a new one.",
                reason=Reason.REQUEST_ID_REUSED,
                metadata={"request_id": request.id},
            )
        return str(found.id)

    async def get(self, job_id: str, *, lock: bool = False) -> Job | None:
        """See `JobStore.get`."""
        query = select(JobRow).where(JobRow.id == job_id)
        row = await self._session.scalar(query.with_for_update() if lock else query)
        return None if row is None else job_from_row(row)

    async def replace(self, job: Job) -> None:
        """See `JobStore.replace`."""
        values = job_values(job)
        done = await self._session.execute(
            update(JobRow)
            .where(JobRow.id == job.id, JobRow.revision == job.revision)
            .values({**{column: values[column] for column in JOB_CHANGING}, "revision": job.revision + 1})
            .returning(JobRow.id)
        )
        if done.first() is None:
            raise Aborted(f"Job {job.id} changed meanwhile.", reason=Reason.CONFLICT)

    async def remove(self, job: Job) -> None:
        """See `JobStore.remove`."""
        values = {"tasks_made": job.tasks_made, "delete_time": func.now()}
        statement = upsert(JobNameRow).values(id=job.id, **values)
        await self._session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))
        await self._session.execute(delete(JobRow).where(JobRow.id == job.id))

    async def checkpoints(self, job: Job) -> Sequence[str]:
        """See `JobStore.checkpoints`."""
        found = await self._session.scalar(select(JobRow.checkpoints).where(JobRow.id == job.id))
        return list(found or ())

    async def ended_for(self, age: timedelta, limit: int, *, detailed: bool) -> Sequence[str]:
        """See `JobStore.ended_for`."""
        query = select(JobRow.id).where(JobRow.end_time < func.least(func.now(), datetime.now(UTC)) - age)
        if detailed:
            has_events = exists().where(JobEventRow.job == JobRow.id)
            query = query.where(or_(JobRow.checkpoints != [], has_events))
        return list(await self._session.scalars(query.order_by(JobRow.end_time).limit(limit)))

    async def forget_details(self, job: Job) -> None:
        """See `JobStore.forget_details`."""
        await self._session.execute(delete(JobEventRow).where(JobEventRow.job == job.id))
        await self._session.execute(update(JobRow).where(JobRow.id == job.id).values(checkpoints=[]))

    async def forget_names(self, age: timedelta) -> None:
        """See `JobStore.forget_names`."""
        await self._session.execute(delete(JobNameRow).where(JobNameRow.delete_time < func.now() - age))

    async def view(self, job_id: str) -> JobView | None:
        """See `JobStore.view`."""
        found = await self._views([await self._session.get(JobRow, job_id)])
        return found[0] if found else None

    async def views(
        self, after: tuple[datetime, str] | None, limit: int, project: str, states: Collection[JobState]
    ) -> Sequence[JobView]:
        """See `JobStore.views`."""
        query = select(JobRow).order_by(JobRow.create_time.desc(), JobRow.id).limit(limit)
        if after is not None:
            moment, job_id = after
            older = JobRow.create_time < moment
            query = query.where(or_(older, and_(JobRow.create_time == moment, JobRow.id > job_id)))
        if project:
            query = query.where(JobRow.project == project)
        if states:
            query = query.where(JobRow.state.in_([state.name for state in states]))
        return await self._views(list(await self._session.scalars(query)))

    async def _views(self, rows: Sequence[JobRow | None]) -> Sequence[JobView]:
        present = [row for row in rows if row is not None]
        tasks: dict[str, list[Task]] = defaultdict(list)
        if present:
            own = tuple_(TaskRow.job, TaskRow.attempt).in_([(row.id, row.attempt) for row in present])
            for row in await self._session.scalars(select(TaskRow).where(own).order_by(TaskRow.index)):
                tasks[row.job].append(task_from_row(row))
        return [
            JobView(job_from_row(row), tuple(tasks[row.id]), row.progress, row.metrics, row.last_event)
            for row in present
        ]
