"""Tasks of jobs on this node: what should run, what does, and what the end of a process means.

The states of a task as its agent sees it (PENDING is the scheduler's alone):

    STARTING ──▶ RUNNING ──▶ SUCCEEDED ──▶ STOPPED
        │           └──────▶ FAILED ─────────▲ ▲
        └──────────────────────┴─────────────┘ │   (any state may lead to STOPPED)
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any

DEFAULT_CPU_MILLIS = 500
"""What a rank gets of a processor if its job asks for nothing (job.proto)."""


class TaskState(enum.Enum):
    """Where a task is in its life; the names are those of `penstock.scheduler.v1.TaskState`."""

    STARTING = "STARTING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


NEXT_STATES: dict[TaskState, frozenset[TaskState]] = {
    TaskState.STARTING: frozenset(
        {TaskState.RUNNING, TaskState.SUCCEEDED, TaskState.FAILED, TaskState.STOPPED}
    ),
    TaskState.RUNNING: frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.STOPPED}),
    TaskState.SUCCEEDED: frozenset({TaskState.STOPPED}),
    TaskState.FAILED: frozenset({TaskState.STOPPED}),
    TaskState.STOPPED: frozenset(),
}


@dataclasses.dataclass(frozen=True, slots=True)
class DesiredTask:
    """One task that the scheduler wants on this node."""

    name: str
    """jobs/{job}/tasks/{task}."""
    job: str
    """Id, without `jobs/`."""
    number: int
    """{task}."""
    attempt: int
    index: int
    """Its number in the attempt; 0 leads."""
    tasks: int
    """Tasks of the attempt."""
    least_tasks: int
    """Tasks that the attempt goes on with when others are lost."""
    ranks: int
    """Processes of this task."""
    kind: str
    """Name of the work: train, convert …"""
    spec: bytes
    """Serialized `penstock.scheduler.v1.Job`."""
    cpu_millis: int
    """All its ranks together, as is the memory."""
    memory_bytes: int
    devices: tuple[str, ...]
    user_code: bool = False
    """The work brings a program of the user's."""
    max_output_bytes: int = 0
    max_processes: int = 0
    rendezvous: str = ""
    """host:port of the store where the ranks meet, once known."""
    stopping: bool = False
    stored_event: int = 0
    made: int = 0
    """When the job was made, in nanoseconds of Unix time; 0 if the scheduler does not say. It tells a job
    from one of the same name that was deleted."""

    @property
    def distributed(self) -> bool:
        """Whether it has several ranks, here or with other tasks."""
        return self.ranks > 1 or self.tasks > 1

    @property
    def threads(self) -> int:
        """Threads that one rank may compute with: whole cores of its part, one at least."""
        return max(1, self.cpu_millis // self.ranks // 1000)


class EndKind(enum.Enum):
    """How a rank, or a group of them, ended."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    PEERS_LOST = "PEERS_LOST"
    """Another rank went away; nothing is wrong with this one."""


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """The end of a rank or of a task.

    Attributes:
        kind: How.
        message: Why, for people.
        cause: FAILED: stable word for it, such as OUT_OF_MEMORY.
        permanent: FAILED: starting again would meet the same.
    """

    kind: EndKind
    message: str = ""
    cause: str = ""
    permanent: bool = False

    def to_fields(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {**dataclasses.asdict(self), "kind": self.kind.value}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> End:
        """Read what `to_fields` wrote.

        Raises:
            KeyError, ValueError: It did not.
        """
        return cls(
            EndKind(fields["kind"]),
            str(fields.get("message", "")),
            str(fields.get("cause", "")),
            bool(fields.get("permanent", False)),
        )


def worst(ends: Iterable[End]) -> End | None:
    """Return the end that says most about why a group ended: a cause before what followed from it."""
    order = {EndKind.FAILED: 0, EndKind.STOPPED: 1, EndKind.PEERS_LOST: 2, EndKind.SUCCEEDED: 3}
    ranked = sorted(ends, key=lambda end: (order[end.kind], not end.permanent, not end.cause))
    return ranked[0] if ranked else None


@dataclasses.dataclass(frozen=True, slots=True)
class ObservedTask:
    """What the agent sees of one task."""

    name: str
    state: TaskState
    message: str = ""
    pid: int = 0
    """0 while no process runs."""
    rendezvous: str = ""
    cause: str = ""
    permanent: bool = False
    results: tuple[str, ...] = ()
    report: bytes = b""
    """Serialized google.protobuf.Struct."""
    memory_bytes: int = 0
    last_event: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class KilledRank:
    """A rank that a signal ended which was not ours.

    Attributes:
        rank: Which.
        signal: The signal.
        memory_bytes: What all ranks of the task had for themselves when last measured.
        limit_bytes: What the task was given.
        short: The kernel has killed something for lack of memory meanwhile.
    """

    rank: int
    signal: int
    memory_bytes: int
    limit_bytes: int
    short: bool

    def out_of_memory(self) -> End | None:
        """Return what it means, if it was for lack of memory; none if somebody else killed it.

        A task over what it was given would be again, so that is permanent; one that kept to it met a node
        that was short.
        """
        if not self.short:
            return None
        over = self.limit_bytes > 0 and self.memory_bytes >= self.limit_bytes
        used, given = megabytes(self.memory_bytes), megabytes(self.limit_bytes)
        if over:
            words = (
                f"Rank {self.rank} was killed for lack of memory: the task had {used}, and {given} were "
                "asked for. Raise resources.memory_bytes, or make batches or the model smaller."
            )
        else:
            words = (
                f"Rank {self.rank} was killed because the node was short of memory: the task had {used} "
                f"of the {given} it was given."
            )
        return End(EndKind.FAILED, words, "OUT_OF_MEMORY", permanent=over)


def megabytes(count: int) -> str:
    """Return a count of bytes for people: MB, or GB from 10 GB on."""
    return f"{count / 1e9:.1f} GB" if count >= 10_000_000_000 else f"{count / 1e6:.0f} MB"


class Allowance:
    """A budget that fills up again: so much at once, so much a second.

    Args:
        burst: At once, and at the beginning.
        per_second: What comes back.
    """

    def __init__(self, burst: float, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left = burst
        self._at = 0.0

    def take(self, amount: float, now: float) -> bool:
        """Tell whether so much may be spent now, and spend it; `now` in seconds of a clock that rises."""
        if self._at:
            self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if amount > self._left:
            return False
        self._left -= amount
        return True
