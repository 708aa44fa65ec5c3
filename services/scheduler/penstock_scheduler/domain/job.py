"""Jobs: work that ends, done by one or several tasks that are placed all or none.

QUEUED ──► STARTING ──► RUNNING ──► FINALIZING ──► SUCCEEDED
 │   ▲          │          │         ▲      │
 │   │          └────┬─────┘         │      └─────► FAILED
 │   │               ▼               │                ▲
 │   └─────────── STOPPING ──────────┴────────────────┘
 ▼                   │
 CANCELLED ◄─────────┘

STOPPING lasts until no task of the attempt holds anything; `Job.stop` says what follows. FINALIZING may be
reached from STARTING (short work is done before anybody has seen it run) and from STOPPING (it was done
when it should have made room).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum

from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints
from penstock_scheduler.domain.machine import step
from penstock_scheduler.domain.resources import MIB, Resources

DEFAULT_PROJECT = "default"
DEFAULT_RESTARTS = 3
RANK = Resources(cpu_millis=500, memory_bytes=512 * MIB)
"""What a rank needs where nobody states it: torch alone takes 300 MiB."""


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
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.CANCELLED}),
    JobState.STARTING: frozenset({JobState.RUNNING, JobState.FINALIZING, JobState.STOPPING}),
    JobState.RUNNING: frozenset({JobState.FINALIZING, JobState.STOPPING}),
    JobState.FINALIZING: frozenset({JobState.SUCCEEDED, JobState.FAILED}),
    JobState.STOPPING: frozenset({JobState.CANCELLED, JobState.QUEUED, JobState.FAILED, JobState.FINALIZING}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
ENDED = frozenset(state for state, following in _NEXT.items() if not following)
"""The terminal states."""


class Stop(Enum):
    """Why the tasks of an attempt are being ended, and so what follows."""

    CANCEL = "CANCEL"
    """Somebody cancelled the job: CANCELLED."""
    FAIL = "FAIL"
    """It cannot be done: FAILED."""
    RETRY = "RETRY"
    """It failed in a way that may not come again: QUEUED, and it counts."""
    LOSS = "LOSS"
    """A node or an agent was lost: QUEUED, and it does not count."""
    YIELD = "YIELD"
    """It makes room: QUEUED, and it does not count."""


class TaskState(Enum):
    """The life of a task; values are those of scheduler/v1/job.proto."""

    PENDING = 1
    STARTING = 2
    RUNNING = 3
    SUCCEEDED = 4
    FAILED = 5
    STOPPED = 6


class EventKind(Enum):
    """What happened in a job; values are those of scheduler/v1/job_service.proto."""

    PROGRESS = 1
    METRICS = 2
    LOG = 3
    CHECKPOINT = 4


class Order(Enum):
    """What the agent is told about a task."""

    RUN = "RUN"
    """Run it; one that has ended stays in the desired state until its events are stored."""
    STOP = "STOP"
    """Have it write a checkpoint and end."""
    END = "END"
    """It is not in the desired state any more: end it at once."""


@dataclass(frozen=True, slots=True)
class Gang:
    """What the planner must place, all or none.

    Attributes:
        tasks: how many.
        least: how many it goes on with if no more can be placed.
        resources: what one task holds, all its ranks together.
        constraints: the nodes that they may run on.
        runtime: what a node must be able to run; empty for what every node can.
        keeps: its tasks write checkpoints, the newest of which are only on the disks of their nodes.
    """

    tasks: int = 1
    least: int = 1
    resources: Resources = RANK
    constraints: Constraints = NO_CONSTRAINTS
    runtime: str = ""
    keeps: bool = False


@dataclass(frozen=True, slots=True)
class ObservedTask:
    """What an agent sees of one of its tasks; see scheduler/v1/job.proto.

    `memory_bytes` changes all the time and is no news: reports that differ in it alone are equal.
    """

    state: TaskState
    message: str = ""
    pid: int = 0
    rendezvous: str = ""
    failure_reason: str = ""
    permanent: bool = False
    results: tuple[str, ...] = ()
    report: bytes = b""
    last_event: int = 0
    memory_bytes: int = field(default=0, compare=False)


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
        order: what its agent is told.
        node: id of its node; empty while PENDING.
        devices: names of the node's devices that it uses.
        rendezvous: host:port of its store; of the leading task only.
        last_event: number of the last event that its agent has sent.
        stored_event: number of the last event that is stored; written by the intake of events alone.
        update_time: when its state or order last changed.
    """

    job: str
    number: int
    index: int
    attempt: int
    resources: Resources
    create_time: datetime
    update_time: datetime
    state: TaskState = TaskState.PENDING
    order: Order = Order.RUN
    message: str = ""
    node: str = ""
    devices: tuple[str, ...] = ()
    pid: int = 0
    rendezvous: str = ""
    last_event: int = 0
    stored_event: int = field(default=0, compare=False)

    @property
    def id(self) -> str:
        """Its name without the collection: {job}/tasks/{number}."""
        return f"{self.job}/tasks/{self.number}"

    @property
    def digest(self) -> str:
        """Whose disk it holds: nobody shares that of a task."""
        return f"jobs/{self.id}"

    @property
    def placed(self) -> bool:
        """Whether it holds a part of a node."""
        return self.state is not TaskState.PENDING and self.state is not TaskState.STOPPED

    @property
    def working(self) -> bool:
        """Whether its process is still to do something."""
        return self.state is TaskState.STARTING or self.state is TaskState.RUNNING

    def told(self, order: Order, now: datetime) -> Task:
        """Changes what its agent is told."""
        return self if order is self.order else replace(self, order=order, update_time=now)

    def stopped(self, now: datetime, message: str = "") -> Task:
        """Lets go of what it holds."""
        return replace(self, state=TaskState.STOPPED, pid=0, message=message or self.message, update_time=now)


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
        cancelling: somebody cancelled it; the message says who.
        stop: while STOPPING, what follows.
        attempt: times it was started.
        restarts: of these, those after failures.
        losses: of these, those after nodes or agents were lost.
        tasks_made: tasks over all attempts; the next one's number.
        not_before: it waits for its turn after a failure until then.
        homes: nodes whose disks have its newest checkpoint, sorted: those of the last attempt that ran.
        start_time: when it was first placed.
        placed_time: when the present attempt was placed.
        ran: how long earlier attempts ran together.
        results: what it made, READY once it SUCCEEDED.
        leftovers: what it made on the way and is to be deleted when it has ended.
        report: what it found, as a serialized google.protobuf.Struct.
        revision: grows with every change that is stored; an older one is refused.
    """

    id: str
    create_time: datetime
    update_time: datetime
    project: str = DEFAULT_PROJECT
    priority: int = 0
    gang: Gang = Gang()
    work: bytes = field(default=b"", repr=False)
    labels: Mapping[str, str] = field(default_factory=dict)
    max_restarts: int = DEFAULT_RESTARTS
    timeout: timedelta | None = None
    created_by: str = ""
    state: JobState = JobState.QUEUED
    message: str = ""
    failure_reason: str = ""
    cancelling: bool = False
    stop: Stop | None = None
    attempt: int = 0
    restarts: int = 0
    losses: int = 0
    tasks_made: int = 0
    not_before: datetime | None = None
    homes: tuple[str, ...] = ()
    start_time: datetime | None = None
    placed_time: datetime | None = None
    ran: timedelta = timedelta()
    end_time: datetime | None = None
    results: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    report: bytes = field(default=b"", repr=False)
    revision: int = 0

    @property
    def ended(self) -> bool:
        """Whether its state is terminal."""
        return self.state in ENDED

    def digest_of(self, index: int) -> str:
        """Whose disk the task of an index holds in the next attempt; see `Task.digest`."""
        return f"jobs/{self.id}/tasks/{self.tasks_made + index}"

    @property
    def fewest(self) -> int:
        """Tasks that it can start with now: all at first; later it goes on with fewer, if it may."""
        return self.gang.least if self.attempt else self.gang.tasks

    def waits(self, now: datetime) -> bool:
        """Whether it waits for a place, and its turn has come."""
        return self.state is JobState.QUEUED and (self.not_before is None or self.not_before <= now)

    def ran_for(self, now: datetime) -> timedelta:
        """How long its attempts ran together."""
        present = timedelta() if self.placed_time is None else now - self.placed_time
        return self.ran + max(present, timedelta())

    def says(self, message: str, now: datetime) -> Job:
        """Changes its message."""
        return self if message == self.message else replace(self, message=message, update_time=now)

    def advance(self, to: JobState, now: datetime, message: str = "") -> Job:
        """Takes one step of the table at the top of this module.

        Raises:
            Internal: the table does not allow the step.
        """
        step(_NEXT, self.state, to)
        moved = replace(self, state=to, message=message, update_time=now)
        return replace(moved, end_time=now) if moved.ended else moved


@dataclass(frozen=True, slots=True)
class RegistryWord:
    """What the registry said about the results of a job.

    Attributes:
        final: all its results are READY.
        refusal: why one of them will never be; empty if none was refused.
        note: what became of them, for people.
        deleted: leftovers that are gone.
        problem: why it says nothing for now; it is asked again.
    """

    final: bool = False
    refusal: str = ""
    note: str = ""
    deleted: frozenset[str] = frozenset()
    problem: str = ""
