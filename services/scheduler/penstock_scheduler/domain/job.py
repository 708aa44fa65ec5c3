"""Jobs: work that ends, done by one or several tasks that are placed all or none.

QUEUED ──► STARTING ──► RUNNING ──► FINALIZING ──► SUCCEEDED
  ▲ │         │  │        │  │          │
  │ │         │  └────────┤  │          ▼
  │ ▼         ▼           ▼  └───────► FAILED   (from STARTING, RUNNING and FINALIZING)
  │ CANCELLED ◄── STOPPING
  └───────────────────┘      (to make room, or to start again from the last checkpoint)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum

from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints
from penstock_scheduler.domain.machine import step
from penstock_scheduler.domain.resources import NO_RESOURCES, Resources

DEFAULT_PROJECT = "default"


class JobState(Enum):
    """The life of a job; values are those of scheduler/v1/job.proto."""

    QUEUED = 1
    STARTING = 2
    RUNNING = 3
    FINALIZING = 4
    STOPPING = 5
    SUCCEEDED = 6
    FAILED = 7
    CANCELLED = 8


_NEXT: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.FAILED, JobState.CANCELLED}),
    JobState.STARTING: frozenset(
        {JobState.RUNNING, JobState.FINALIZING, JobState.STOPPING, JobState.QUEUED, JobState.FAILED}
    ),
    JobState.RUNNING: frozenset({JobState.FINALIZING, JobState.STOPPING, JobState.QUEUED, JobState.FAILED}),
    JobState.FINALIZING: frozenset({JobState.SUCCEEDED, JobState.FAILED}),
    JobState.STOPPING: frozenset({JobState.CANCELLED, JobState.QUEUED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class TaskState(Enum):
    """The life of a task; values are those of scheduler/v1/job.proto."""

    PENDING = 1
    STARTING = 2
    RUNNING = 3
    SUCCEEDED = 4
    FAILED = 5
    STOPPED = 6


@dataclass(frozen=True, slots=True)
class Gang:
    """What the planner must place, all or none.

    Attributes:
        tasks: how many.
        least: how many it goes on with if no more can be placed.
        resources: what one task holds, all its ranks together.
        constraints: the nodes that they may run on.
    """

    tasks: int = 1
    least: int = 1
    resources: Resources = NO_RESOURCES
    constraints: Constraints = NO_CONSTRAINTS


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a job: a group of ranks on one node.

    Attributes:
        job: id of its job.
        number: counts the tasks of the job over all attempts, from 0; with the job, its name.
        index: its number in its attempt; 0 leads.
        attempt: the attempt it belongs to.
        resources: what it holds.
        state: where in its life it is; from STARTING to FAILED it holds a part of its node.
        node: id of its node; empty while PENDING.
        devices: names of the node's devices that it uses.
        rendezvous: host:port of its store; of the leading task only.
    """

    job: str
    number: int
    index: int
    attempt: int
    resources: Resources
    create_time: datetime
    update_time: datetime
    state: TaskState = TaskState.PENDING
    message: str = ""
    node: str = ""
    devices: tuple[str, ...] = ()
    pid: int = 0
    rendezvous: str = ""
    constraints: Constraints = NO_CONSTRAINTS

    @property
    def id(self) -> str:
        """Its name without the collection: {job}/tasks/{number}."""
        return f"{self.job}/tasks/{self.number}"

    @property
    def placed(self) -> bool:
        """Whether it holds a part of a node."""
        return self.state is not TaskState.PENDING and self.state is not TaskState.STOPPED


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the planner sees it; what is to be done stays a document that it never reads.

    Attributes:
        id: the id in `jobs/{id}`.
        project: id of its project.
        priority: higher comes first among the jobs of its project.
        gang: what is to be placed.
        work: the work, as a serialized scheduler.v1.Job of which only what was asked for is set.
        max_restarts: starts after failures at most.
        timeout: it fails after running for so long.
        cancelling: somebody cancelled it.
        attempt: times it was started.
        restarts: of these, those after failures.
        results: what it made, READY once it SUCCEEDED.
    """

    id: str
    create_time: datetime
    update_time: datetime
    project: str = DEFAULT_PROJECT
    priority: int = 0
    gang: Gang = Gang()
    work: bytes = b""
    labels: Mapping[str, str] = field(default_factory=dict)
    max_restarts: int = 3
    timeout: timedelta | None = None
    created_by: str = ""
    state: JobState = JobState.QUEUED
    message: str = ""
    failure_reason: str = ""
    cancelling: bool = False
    attempt: int = 0
    restarts: int = 0
    start_time: datetime | None = None
    end_time: datetime | None = None
    results: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether its state is terminal."""
        return not _NEXT[self.state]

    def advance(self, to: JobState, now: datetime, message: str = "") -> Job:
        """Takes one step of the table at the top of this module.

        Raises:
            Internal: the table does not allow the step.
        """
        step(_NEXT, self.state, to)
        moved = replace(self, state=to, message=message, update_time=now)
        return replace(moved, end_time=now) if moved.ended else moved
