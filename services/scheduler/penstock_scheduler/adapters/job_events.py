"""Events of jobs in Postgres: each once, and no more of them than a job may have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import delete, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from penstock.scheduler.v1 import job_pb2
from penstock_scheduler.adapters.rows import JobEventRow, JobRow, TaskRow
from penstock_scheduler.domain.job import EventKind, JobState
from penstock_scheduler.domain.job_events import (
    LIMITS,
    MAX_LOG_LINES,
    JobEvent,
    following,
    keep,
    latest_metrics,
    newest_checkpoints,
)
from penstock_scheduler.usecases.job_ports import TakenIn

# How many events may come between two looks whether there are too many.
_LOOK_EVERY = 250


_ENDING = frozenset({JobState.FINALIZING.name, JobState.STOPPING.name})


class SqlJobEvents:
    """Implements `JobEventStore` in an open session."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def take_in(self, events: Sequence[JobEvent]) -> TakenIn:
        """See `JobEventStore.take_in`."""
        by_job: dict[str, dict[int, list[JobEvent]]] = defaultdict(lambda: defaultdict(list))
        for event in events:
            by_job[event.job][event.task].append(event)
        # In one order, so that two schedulers never wait for each other.
        found = [await self._take_in(job_id, by_job[job_id]) for job_id in sorted(by_job)]
        taken = [each for each in found if each is not None]
        return TakenIn(
            sum(each.count for each in taken),
            {job_id: number for each in taken for job_id, number in each.last_events.items()},
            any(each.awaited for each in taken),
        )

    async def _take_in(self, job_id: str, by_task: dict[int, list[JobEvent]]) -> TakenIn | None:
        # The lock makes the sequence gapless and the numbers of each task follow each other.
        row = await self._session.scalar(select(JobRow).where(JobRow.id == job_id).with_for_update())
        if row is None:
            return None
        keys = tuple_(TaskRow.job, TaskRow.number).in_([(job_id, number) for number in by_task])
        known = {
            found.number: found.stored_event
            for found in await self._session.execute(select(TaskRow.number, TaskRow.stored_event).where(keys))
        }
        fresh: list[JobEvent] = []
        for number, at in known.items():
            of_task = following(by_task[number], at)
            fresh.extend(of_task)
            if of_task:
                await self._session.execute(
                    update(TaskRow)
                    .where(TaskRow.job == job_id, TaskRow.number == number)
                    .values(stored_event=of_task[-1].number)
                )
        if not fresh:
            return None
        fresh.sort(key=lambda event: (event.time, event.task, event.number))
        kept = keep(fresh, row.log_lines)
        # The update below changes the row that was read, too.
        sequence = before = row.last_event
        values = []
        for event in kept.events:
            sequence += 1
            values.append(
                {
                    "job": job_id,
                    "sequence": sequence,
                    "task": event.task,
                    "number": event.number,
                    "kind": event.kind.value,
                    "time": event.time,
                    "document": _notice(event) if event is kept.cut else event.document,
                }
            )
        if values:
            await self._session.execute(insert(JobEventRow), values)
        changes: dict[str, Any] = {"last_event": sequence, "log_lines": kept.log_lines}
        if kept.progress:
            changes["progress"] = kept.progress
        if kept.metrics:
            changes["metrics"] = latest_metrics(row.metrics, kept.metrics)
        if kept.artifacts:
            changes["checkpoints"] = newest_checkpoints(row.checkpoints, kept.artifacts)
        await self._session.execute(update(JobRow).where(JobRow.id == job_id).values(changes))
        if sequence // _LOOK_EVERY != before // _LOOK_EVERY:
            await self._thin_out(job_id)
        return TakenIn(len(fresh), {job_id: sequence}, row.state in _ENDING)

    async def _thin_out(self, job_id: str) -> None:
        """Forgets every second event of the kinds of which there are too many, but for the newest quarter."""
        own = JobEventRow.job == job_id
        counted = select(JobEventRow.kind, func.count().label("events")).where(own).group_by(JobEventRow.kind)
        counts = {row.kind: row.events for row in await self._session.execute(counted)}
        for kind, limit in LIMITS.items():
            of_kind = (own, JobEventRow.kind == kind.value)
            if counts.get(kind.value, 0) <= limit:
                continue
            numbered = (
                select(
                    JobEventRow.sequence,
                    func.row_number().over(order_by=JobEventRow.sequence.desc()).label("place"),
                )
                .where(*of_kind)
                .subquery()
            )
            surplus = select(numbered.c.sequence).where(
                numbered.c.place > limit // 4, numbered.c.place % 2 == 0
            )
            await self._session.execute(delete(JobEventRow).where(own, JobEventRow.sequence.in_(surplus)))

    async def page(
        self, job_id: str, after: int, limit: int, kinds: Collection[EventKind]
    ) -> Sequence[JobEvent]:
        """See `JobEventStore.page`."""
        query = (
            select(JobEventRow)
            .where(JobEventRow.job == job_id, JobEventRow.sequence > after)
            .order_by(JobEventRow.sequence)
            .limit(limit)
        )
        if kinds:
            query = query.where(JobEventRow.kind.in_([kind.value for kind in kinds]))
        return [
            JobEvent(
                job=row.job,
                task=row.task,
                number=row.number,
                kind=EventKind(row.kind),
                time=row.time,
                document=row.document,
                sequence=row.sequence,
            )
            for row in await self._session.scalars(query)
        ]


def _notice(event: JobEvent) -> bytes:
    """What stands in the place of the first line that is not kept."""
    message = job_pb2.JobEvent.FromString(event.document)
    message.log.text = f"The log has more than {MAX_LOG_LINES:,} lines; further ones are not kept."
    return message.SerializeToString()
