"""Replicas: one runtime process each.

PENDING ──► STARTING ──► READY ─────┐
   │         │  ▲  │       │        │
   │         │  │  └─► BACKOFF ◄────┘
   │         │  └────────┘ │
   │         ▼             ▼
   │      DRAINING ◄───────┘   (from STARTING, READY and BACKOFF)
   ▼         ▼
  STOPPED ◄──┘                 (from every state)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import NamedTuple

from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints
from penstock_scheduler.domain.machine import step, walk
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.version import VersionKey


class ReplicaState(Enum):
    """The life of a replica; values are those of scheduler/v1/replica.proto."""

    PENDING = 1
    STARTING = 2
    READY = 3
    BACKOFF = 4
    DRAINING = 5
    STOPPED = 6


_NEXT: dict[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.PENDING: frozenset({ReplicaState.STARTING, ReplicaState.STOPPED}),
    ReplicaState.STARTING: frozenset(
        {ReplicaState.READY, ReplicaState.BACKOFF, ReplicaState.DRAINING, ReplicaState.STOPPED}
    ),
    ReplicaState.READY: frozenset({ReplicaState.BACKOFF, ReplicaState.DRAINING, ReplicaState.STOPPED}),
    ReplicaState.BACKOFF: frozenset({ReplicaState.STARTING, ReplicaState.DRAINING, ReplicaState.STOPPED}),
    ReplicaState.DRAINING: frozenset({ReplicaState.STOPPED}),
    ReplicaState.STOPPED: frozenset(),
}


class GroupKey(NamedTuple):
    """Replicas of one group are interchangeable: same version, same spec."""

    version: VersionKey
    spec_digest: str


@dataclass(frozen=True, slots=True)
class Observed:
    """What an agent sees of one of its replicas.

    `memory_bytes` changes all the time and is no news: reports that differ in it alone are equal.
    """

    state: ReplicaState
    message: str = ""
    pid: int = 0
    restarts: int = 0
    memory_bytes: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica: what it is to be, where it is, and how it was last seen.

    Attributes:
        id: the id in `replicas/{id}`.
        deployment: id of its deployment.
        group: version and spec digest.
        digest: tree digest of the version.
        resources: what it holds.
        batching: how requests are joined for it.
        state: where in its life it is.
        message: why, for people.
        node: id of its node; empty while PENDING.
        devices: names of the node's devices that it uses.
        restarts: times its process ended by itself.
        pid: process id on its node.
        constraints: the nodes that it may run on.
        surge: it succeeds another, and is beyond the quota of their project until that has ended.
        create_time: when it was made.
        update_time: when its state last changed.
    """

    id: str
    deployment: str
    group: GroupKey
    digest: str
    resources: Resources
    batching: Batching
    create_time: datetime
    update_time: datetime
    state: ReplicaState = ReplicaState.PENDING
    message: str = ""
    node: str = ""
    devices: tuple[str, ...] = ()
    restarts: int = 0
    pid: int = 0
    constraints: Constraints = NO_CONSTRAINTS
    surge: bool = False

    @property
    def version(self) -> VersionKey:
        """The version it serves."""
        return self.group.version

    @property
    def placed(self) -> bool:
        """Whether it holds a part of a node."""
        # Asked so often that looking the state up in a set costs a tenth of a plan.
        return self.state is not ReplicaState.PENDING and self.state is not ReplicaState.STOPPED

    @property
    def wanted(self) -> bool:
        """Whether it counts towards what its deployment asks for."""
        return self.state is not ReplicaState.DRAINING and self.state is not ReplicaState.STOPPED

    def advance(self, to: ReplicaState, now: datetime, message: str = "") -> Replica:
        """Takes one step of the table at the top of this module.

        Raises:
            Internal: the table does not allow the step.
        """
        step(_NEXT, self.state, to)
        ended = to is ReplicaState.STOPPED
        return replace(self, state=to, message=message, update_time=now, pid=0 if ended else self.pid)

    def is_known_as(self, seen: Observed) -> bool:
        """Whether what is seen is no news, as is almost always so."""
        return (
            seen.state is self.state
            and seen.pid == self.pid
            and seen.restarts == self.restarts
            and seen.message == self.message
        )

    def observe(self, seen: Observed | None, now: datetime) -> Replica:
        """Takes up what its agent reports; `None` means that the agent does not have it.

        A replica that the agent lacks, drains or reports STOPPED although it should run (because
        the agent itself is being stopped, say) stays in the desired state, so that the agent starts
        it again: it counts as BACKOFF until then.
        """
        if self.state is ReplicaState.DRAINING:
            if seen is None or seen.state is ReplicaState.STOPPED:
                return self.advance(ReplicaState.STOPPED, now, self.message)
            if (seen.pid, seen.restarts) == (self.pid, self.restarts):
                return self
            return replace(self, pid=seen.pid, restarts=seen.restarts)
        if seen is None:
            if self.state is ReplicaState.READY:
                lost = replace(self, pid=0)
                return lost.advance(ReplicaState.BACKOFF, now, "Its agent was restarted; it starts again.")
            return self
        to = seen.state
        if self.is_known_as(seen):
            return self
        if to in (ReplicaState.STOPPED, ReplicaState.DRAINING, ReplicaState.PENDING):
            to = ReplicaState.BACKOFF
        moved = self
        for state in walk(_NEXT, self.state, to):
            moved = moved.advance(state, now)
        return replace(moved, message=seen.message, pid=seen.pid, restarts=seen.restarts)
