"""Jobs and tasks, from protos to domain objects and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.struct_pb2 import Struct

from penstock.scheduler.v1 import job_pb2
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs import check
from penstock_scheduler.api.convert import resources_from_message, resources_to_message
from penstock_scheduler.api.job_references import references, replace_references
from penstock_scheduler.domain.constraints import Constraints, Toleration
from penstock_scheduler.domain.job import (
    DEFAULT_PROJECT,
    DEFAULT_RESTARTS,
    RANK,
    Gang,
    Job,
    ObservedTask,
    Task,
    TaskState,
)
from penstock_scheduler.domain.job_events import JobEvent
from penstock_scheduler.domain.resources import Resources
from penstock_scheduler.domain.validate import check_labels, check_resources
from penstock_scheduler.domain.validate_nodes import check_constraints
from penstock_scheduler.usecases.attach import DesiredTask
from penstock_scheduler.usecases.job_ports import JobView
from penstock_scheduler.usecases.jobs import AskedJob, Reference

MAX_TASKS = 1024
MAX_RANKS = 1024
MAX_PRIORITY = 100
MAX_RESTARTS = 100
MAX_WORK_BYTES = 1024 * 1024
MAX_TASKS_REPORTED = 10_000
MAX_RESULTS = 1000
MAX_REPORT_BYTES = 2 * 1024 * 1024
MAX_WORDS = 4096
MAX_COUNT = 2**53
_KEEP_CHECKPOINTS = ("train", "compress", "batch_predict")
"""Work that is long, and goes on from checkpoints."""

_OUTPUT_ONLY: tuple[Any, ...] = (
    "state",
    "message",
    "failure_reason",
    "attempt",
    "restarts",
    "progress",
    "metrics",
    "results",
    "report",
    "tasks",
    "create_time",
    "start_time",
    "end_time",
    "update_time",
    "created_by",
    "last_event",
)
# What an agent can see; PENDING is the scheduler's own.
_SEEN = {state.value: state for state in TaskState if state is not TaskState.PENDING}


def asked_from_message(message: job_pb2.Job, actor: str) -> AskedJob:
    """What a caller asks for.

    Raises:
        InvalidArgument: a field is wrong; the message names it.
    """
    wanted = job_pb2.Job()
    wanted.CopyFrom(message)
    for name in _OUTPUT_ONLY:
        wanted.ClearField(name)
    job_id = names.parse_job(wanted.name)
    if wanted.ByteSize() > MAX_WORK_BYTES:
        raise InvalidArgument(
            f"The job is described in {wanted.ByteSize()} bytes; use at most {MAX_WORK_BYTES}.",
            metadata={"field": "job"},
        )
    check(wanted)
    project = wanted.project.removeprefix("projects/") or DEFAULT_PROJECT
    names.check_id(project, "project")
    now = datetime.now(UTC)
    job = Job(
        id=job_id,
        project=project,
        priority=_between("priority", wanted.priority, -MAX_PRIORITY, MAX_PRIORITY),
        labels=dict(check_labels(dict(wanted.labels))),
        gang=_gang(wanted),
        max_restarts=_max_restarts(wanted),
        timeout=_timeout(wanted),
        created_by=actor,
        message="It waits for its turn.",
        create_time=now,
        update_time=now,
    )
    wanted.project = f"projects/{project}"
    wanted.created_by = actor

    def write(found: Mapping[Reference, str]) -> bytes:
        replace_references(wanted, found)
        return wanted.SerializeToString(deterministic=True)

    return AskedJob(job, wanted.WhichOneof("work") or "", references(wanted), write)


def job_to_message(view: JobView) -> job_pb2.Job:
    """A job for callers."""
    job = view.job
    message = job_pb2.Job.FromString(job.work)
    message.state = job_pb2.JobState.Value(f"JOB_STATE_{job.state.name}")
    message.message = job.message
    message.failure_reason = job.failure_reason
    message.attempt = job.attempt
    message.restarts = job.restarts
    if view.progress:
        message.progress.ParseFromString(view.progress)
    for name, value in view.metrics.items():
        message.metrics[name] = value
    message.results.extend(job.results)
    if job.report:
        message.report.ParseFromString(job.report)
    message.tasks.extend(task_to_message(task) for task in view.tasks)
    for field, moment in (
        ("create_time", job.create_time),
        ("start_time", job.start_time),
        ("end_time", job.end_time),
        ("update_time", job.update_time),
    ):
        if moment is not None:
            getattr(message, field).FromDatetime(moment)
    message.created_by = job.created_by
    message.last_event = view.last_event
    return message


def task_to_message(task: Task) -> job_pb2.JobTask:
    """A task for callers."""
    return job_pb2.JobTask(
        name=names.task_name(task.job, task.number),
        index=task.index,
        attempt=task.attempt,
        state=job_pb2.TaskState.Value(f"TASK_STATE_{task.state.name}"),
        message=task.message,
        node=names.node_name(task.node) if task.node else "",
        devices=task.devices,
        pid=task.pid,
        resources=resources_to_message(task.resources),
    )


def event_to_message(event: JobEvent) -> job_pb2.JobEvent:
    """An event for callers."""
    message = job_pb2.JobEvent.FromString(event.document)
    message.sequence = event.sequence
    return message


def task_spec(desired: DesiredTask) -> job_pb2.TaskSpec:
    """What an agent is told of a task."""
    task = desired.task
    job = job_pb2.Job.FromString(desired.job.work)
    job.create_time.FromDatetime(desired.job.create_time)
    return job_pb2.TaskSpec(
        name=names.task_name(task.job, task.number),
        attempt=task.attempt,
        index=task.index,
        tasks=desired.tasks,
        job=job,
        resources=resources_to_message(task.resources),
        devices=task.devices,
        rendezvous=desired.rendezvous,
        stopping=desired.stopping,
        stored_event=task.stored_event,
    )


def observed_tasks_from_messages(messages: Iterable[job_pb2.ObservedTask]) -> Mapping[str, ObservedTask]:
    """What an agent sees of its tasks, by id.

    Raises:
        InvalidArgument: a name, state or number is wrong, or a task is reported twice.
    """
    observed: dict[str, ObservedTask] = {}
    for message in messages:
        job, number = names.parse_task(message.name)
        id_ = f"{job}/tasks/{number}"
        if id_ in observed:
            raise InvalidArgument(f"{message.name} is reported twice in one message.")
        if len(observed) == MAX_TASKS_REPORTED:
            raise InvalidArgument(f"More than {MAX_TASKS_REPORTED} tasks are reported at once.")
        state = _SEEN.get(int(message.state))
        if state is None:
            raise InvalidArgument(f"{message.name} is reported without a state that an agent can see.")
        for what in ("pid", "memory_bytes", "last_event"):
            if not 0 <= getattr(message, what) <= MAX_COUNT:
                raise InvalidArgument(f"{message.name} is reported with {what} {getattr(message, what)}.")
        if len(message.results) > MAX_RESULTS or message.report.ByteSize() > MAX_REPORT_BYTES:
            raise InvalidArgument(f"{message.name} is reported with more results than a job can have.")
        observed[id_] = ObservedTask(
            state=state,
            message=_words(message.message),
            pid=message.pid,
            rendezvous=_words(message.rendezvous),
            failure_reason=_words(message.failure_reason),
            permanent=message.permanent,
            results=tuple(message.results),
            report=_struct(message.report) if message.HasField("report") else b"",
            memory_bytes=message.memory_bytes,
            last_event=message.last_event,
        )
    return observed


def _words(text: str) -> str:
    """It may quote the output of a program, which may be anything."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")[:MAX_WORDS]


def _struct(report: Struct) -> bytes:
    return report.SerializeToString(deterministic=True)


def _gang(message: job_pb2.Job) -> Gang:
    tasks = _between("nodes", message.nodes, 0, MAX_TASKS) or 1
    ranks = _between("ranks_per_node", message.ranks_per_node, 0, MAX_RANKS) or 1
    least = _between("min_nodes", message.min_nodes, 0, tasks) or tasks
    rank = check_resources(resources_from_message(message.resources)).or_else(RANK)
    constraints = check_constraints(
        Constraints(
            tuple(sorted(message.node_selector.items())),
            tuple(Toleration(each.key, each.value) for each in message.tolerations),
        )
    )
    work = message.WhichOneof("work")
    script = work == "train" and message.train.WhichOneof("way") == "script"
    return Gang(
        tasks, least, _times(rank, ranks), constraints, "script" if script else "", work in _KEEP_CHECKPOINTS
    )


def _times(rank: Resources, ranks: int) -> Resources:
    """What so many ranks on one node hold together; each has GPUs of its own."""
    return replace(
        rank,
        cpu_millis=rank.cpu_millis * ranks,
        memory_bytes=rank.memory_bytes * ranks,
        gpus=rank.gpus * ranks,
        disk_bytes=rank.disk_bytes * ranks,
    )


def _max_restarts(message: job_pb2.Job) -> int:
    asked = _between("max_restarts", message.max_restarts, -1, MAX_RESTARTS)
    return max(asked or DEFAULT_RESTARTS, 0)


def _timeout(message: job_pb2.Job) -> timedelta | None:
    timeout = message.timeout.ToTimedelta()
    if timeout < timedelta():
        raise InvalidArgument("timeout is negative; leave it out for none.", metadata={"field": "timeout"})
    return timeout or None


def _between(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidArgument(f"{field} is {value}; use {low} to {high}.", metadata={"field": field})
    return value
