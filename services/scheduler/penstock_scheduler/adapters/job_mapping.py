"""Jobs and tasks, from rows to domain objects and back."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta

from penstock_scheduler.adapters.mapping import Values, constraints_from_json
from penstock_scheduler.adapters.rows import JobRow, TaskRow
from penstock_scheduler.domain.job import Gang, Job, JobState, Order, Stop, Task, TaskState
from penstock_scheduler.domain.resources import Resources

JOB_CHANGING = (
    "state",
    "message",
    "failure_reason",
    "cancelling",
    "stop",
    "attempt",
    "restarts",
    "losses",
    "tasks_made",
    "not_before",
    "homes",
    "start_time",
    "placed_time",
    "ran_seconds",
    "end_time",
    "results",
    "leftovers",
    "report",
    "update_time",
)
"""Columns of a job that change after it was made, but for those of the intake of events."""
TASK_CHANGING = ("state", "order", "message", "pid", "rendezvous", "last_event", "update_time")
"""Columns of a task that change after it was made, likewise."""


def job_values(job: Job) -> Values:
    """Columns of a job, without its revision, its request and those of the intake of events."""
    return {
        "id": job.id,
        "project": job.project,
        "priority": job.priority,
        "labels": dict(job.labels),
        "work": job.work,
        "gang": asdict(job.gang),
        "max_restarts": job.max_restarts,
        "timeout_seconds": None if job.timeout is None else job.timeout.total_seconds(),
        "created_by": job.created_by,
        "state": job.state.name,
        "message": job.message,
        "failure_reason": job.failure_reason,
        "cancelling": job.cancelling,
        "stop": None if job.stop is None else job.stop.value,
        "attempt": job.attempt,
        "restarts": job.restarts,
        "losses": job.losses,
        "tasks_made": job.tasks_made,
        "not_before": job.not_before,
        "homes": list(job.homes),
        "start_time": job.start_time,
        "placed_time": job.placed_time,
        "ran_seconds": job.ran.total_seconds(),
        "end_time": job.end_time,
        "results": list(job.results),
        "leftovers": list(job.leftovers),
        "report": job.report,
        "create_time": job.create_time,
        "update_time": job.update_time,
    }


def job_from_row(row: JobRow) -> Job:
    """A job as stored."""
    gang = row.gang
    return Job(
        id=row.id,
        project=row.project,
        priority=row.priority,
        labels=row.labels,
        work=row.work,
        gang=Gang(
            tasks=gang["tasks"],
            least=gang["least"],
            resources=Resources(**gang["resources"]),
            constraints=constraints_from_json(gang["constraints"]),
            runtime=gang["runtime"],
            keeps=gang.get("keeps", False),
        ),
        max_restarts=row.max_restarts,
        timeout=None if row.timeout_seconds is None else timedelta(seconds=row.timeout_seconds),
        created_by=row.created_by,
        state=JobState[row.state],
        message=row.message,
        failure_reason=row.failure_reason,
        cancelling=row.cancelling,
        stop=None if row.stop is None else Stop(row.stop),
        attempt=row.attempt,
        restarts=row.restarts,
        losses=row.losses,
        tasks_made=row.tasks_made,
        not_before=row.not_before,
        homes=tuple(row.homes),
        start_time=row.start_time,
        placed_time=row.placed_time,
        ran=timedelta(seconds=row.ran_seconds),
        end_time=row.end_time,
        results=tuple(row.results),
        leftovers=tuple(row.leftovers),
        report=row.report,
        create_time=row.create_time,
        update_time=row.update_time,
        revision=row.revision,
    )


def task_values(task: Task) -> Values:
    """Columns of a task, without what the intake of events writes."""
    return {
        "job": task.job,
        "number": task.number,
        "index": task.index,
        "attempt": task.attempt,
        "state": task.state.name,
        "order": task.order.value,
        "message": task.message,
        "node": task.node or None,
        "devices": list(task.devices),
        "resources": asdict(task.resources),
        "pid": task.pid,
        "rendezvous": task.rendezvous,
        "last_event": task.last_event,
        "create_time": task.create_time,
        "update_time": task.update_time,
    }


def task_from_row(row: TaskRow) -> Task:
    """A task as stored."""
    return Task(
        job=row.job,
        number=row.number,
        index=row.index,
        attempt=row.attempt,
        resources=Resources(**row.resources),
        state=TaskState[row.state],
        order=Order(row.order),
        message=row.message,
        node=row.node or "",
        devices=tuple(row.devices),
        pid=row.pid,
        rendezvous=row.rendezvous,
        last_event=row.last_event,
        stored_event=row.stored_event,
        create_time=row.create_time,
        update_time=row.update_time,
    )
