"""Deployments: what is offered under a name.

PENDING ──► READY ◄──► UPDATING ──► FAILED
   │          ▲ ▲         ▲  │      ▲  │
   │          │ └─────────┼──┼──────┼──┤
   │          ▼           │  ▼      │  │
   │       DEGRADED ◄─────┴──┴──────┘  │   DEGRADED ──► FAILED, FAILED ──► UPDATING
   └──► FAILED                         │
every state ──► DELETING
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING

from penstock_scheduler.domain.autoscaling.settings import Autoscaling, Scale
from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints
from penstock_scheduler.domain.machine import step, walk
from penstock_scheduler.domain.project import DEFAULT_PROJECT
from penstock_scheduler.domain.resources import MIB, NO_RESOURCES, Batching, Resources
from penstock_scheduler.domain.version import VersionKey

if TYPE_CHECKING:
    from penstock_scheduler.domain.rollout.policy import RolloutPolicy
    from penstock_scheduler.domain.rollout.state import Rollout

MAX_TARGETS = 16
MAX_REPLICAS = 1000
DEFAULT_QUEUE_DEPTH = 4096
# Versions do not change, so that an answer could be kept for ever: a minute is for models that are not as
# constant as their owner believes, and costs one computation a minute.
DEFAULT_CACHE_SECONDS = 60.0
DEFAULT_CACHE_BYTES = 64 * MIB


class DeploymentState(Enum):
    """Where a deployment stands; values are those of scheduler/v1/deployment.proto."""

    PENDING = 1
    READY = 2
    UPDATING = 3
    DEGRADED = 4
    FAILED = 5
    DELETING = 6


_S = DeploymentState
_NEXT: dict[DeploymentState, frozenset[DeploymentState]] = {
    _S.PENDING: frozenset({_S.READY, _S.FAILED, _S.DELETING}),
    _S.READY: frozenset({_S.UPDATING, _S.DEGRADED, _S.DELETING}),
    _S.UPDATING: frozenset({_S.READY, _S.DEGRADED, _S.FAILED, _S.DELETING}),
    _S.DEGRADED: frozenset({_S.READY, _S.UPDATING, _S.FAILED, _S.DELETING}),
    _S.FAILED: frozenset({_S.READY, _S.UPDATING, _S.DELETING}),
    _S.DELETING: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Target:
    """One version behind a deployment.

    Attributes:
        model: id of the model.
        weight: part of the traffic; the weights of a deployment sum to 100.
        resolved_version: the version that the selector means now.
        alias: the alias it follows; empty for a fixed version.
        avoids: the version that a rollout took back: the alias is not followed there; 0 for none.
    """

    model: str
    weight: int
    resolved_version: int
    alias: str = ""
    avoids: int = 0

    @property
    def version(self) -> VersionKey:
        """The version that the selector means now."""
        return VersionKey(self.model, self.resolved_version)

    def __str__(self) -> str:
        return f"models/{self.model}@{self.alias}" if self.alias else str(self.version)


@dataclass(frozen=True, slots=True)
class Spec:
    """What a deployment runs.

    Attributes:
        targets: the versions.
        replicas: replicas of each target.
        resources: needs of one replica; fields at 0 come from the version's manifest.
        batching: how requests are joined; None leaves it to the version's manifest.
        constraints: the nodes that replicas may run on.
    """

    targets: tuple[Target, ...]
    replicas: int = 1
    resources: Resources = NO_RESOURCES
    batching: Batching | None = None
    constraints: Constraints = NO_CONSTRAINTS


@dataclass(frozen=True, slots=True)
class ResponseCache:
    """How gateways treat equal requests; see scheduler/v1/deployment.proto.

    Attributes:
        enabled: whether answers are kept and given to equal requests.
        ttl_seconds: how long an answer is kept.
        max_bytes: bytes of answers that one gateway process keeps at most.
        coalesce: whether a request waits for an equal one that is being computed.
    """

    enabled: bool = False
    ttl_seconds: float = DEFAULT_CACHE_SECONDS
    max_bytes: int = DEFAULT_CACHE_BYTES
    coalesce: bool = False


NO_CACHE = ResponseCache()
"""Every request is computed."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment: what is asked for, what answers, and why they differ.

    Attributes:
        name: the id in `deployments/{id}`.
        asked: what its owner wants.
        serving: what callers get; None until every target has answered once.
        labels: free key-value pairs, sorted.
        max_queue_depth: unanswered requests at one gateway at most.
        cache: how gateways treat equal requests.
        autoscaling: lets the number of replicas follow the load; None keeps it at `asked.replicas`.
        scale: what autoscaling has decided; None before it has.
        state: where it stands.
        message: why, for people.
        revision: counts the changes of what is asked for, from 1.
        create_time: when it was made.
        update_time: when it last changed.
        updated_by: who last changed it.
        rollout_policy: how targets change; None changes them all at once, when the new ones are ready.
        rollout: the latest rollout, ended or not; None if there was none.
        at_once: what is asked for now is to be served as soon as it is ready, whatever the policy says.
        uid: number that no other deployment ever has, also none of the same name; 0 before it is stored.
        project: id of the project whose quota its replicas count against; no part of the spec, as another one
            replaces nothing.
    """

    name: str
    asked: Spec
    create_time: datetime
    update_time: datetime
    serving: Spec | None = None
    labels: tuple[tuple[str, str], ...] = ()
    max_queue_depth: int = DEFAULT_QUEUE_DEPTH
    cache: ResponseCache = NO_CACHE
    autoscaling: Autoscaling | None = None
    scale: Scale | None = None
    state: DeploymentState = DeploymentState.PENDING
    message: str = ""
    revision: int = 1
    updated_by: str = ""
    rollout_policy: RolloutPolicy | None = None
    rollout: Rollout | None = None
    at_once: bool = False
    uid: int = 0
    project: str = DEFAULT_PROJECT

    @property
    def etag(self) -> str:
        """Changes with what is asked for, not with how far it has come."""
        return f"{self.uid}-{self.revision}"

    @property
    def desired_replicas(self) -> int:
        """Replicas of each target that it is to have now."""
        if self.autoscaling is None:
            return self.asked.replicas
        # Of the first replica it is learnt whether a version loads at all.
        wanted = max(1, self.asked.replicas) if self.scale is None else self.scale.desired
        return self.autoscaling.clamp(wanted)

    @property
    def scales_from_zero(self) -> bool:
        """Whether a request brings a replica back where there is none."""
        return (
            self.autoscaling is not None
            and self.autoscaling.min_replicas == 0
            and self.serving is not None
            and self.state is not DeploymentState.DELETING
        )

    def sized(self, spec: Spec | None) -> Spec | None:
        """What it asks for, or serves, with as many replicas as it is to have now."""
        if spec is None or self.autoscaling is None:
            return spec
        # New targets cannot take over before they have answered.
        least = 0 if spec == self.serving else 1
        return replace(spec, replicas=max(least, self.desired_replicas))

    def advance(self, to: DeploymentState, now: datetime, message: str = "") -> Deployment:
        """Takes one step of the table at the top of this module.

        Raises:
            Internal: the table does not allow the step.
        """
        step(_NEXT, self.state, to)
        return replace(self, state=to, message=message, update_time=now)

    def move(self, to: DeploymentState, now: datetime, message: str) -> Deployment:
        """Goes to a state by the shortest legal way; a mere new message keeps the times."""
        if to is self.state:
            return self if message == self.message else replace(self, message=message)
        moved = self
        for state in walk(_NEXT, self.state, to):
            moved = moved.advance(state, now, message)
        return moved

    def ask(self, asked: Spec, now: datetime, actor: str, *, at_once: bool = False) -> Deployment:
        """A new revision that asks for something else; `at_once` goes past the rollout policy."""
        changed = replace(
            self,
            asked=asked,
            revision=self.revision + 1,
            update_time=now,
            updated_by=actor,
            at_once=at_once,
        )
        if self.state is DeploymentState.PENDING or asked == self.asked:
            return changed
        return changed.move(DeploymentState.UPDATING, now, "New targets are starting.")


@dataclass(frozen=True, slots=True)
class Revision:
    """What was asked for at one revision, who asked, and why."""

    deployment: str
    number: int
    spec: Spec
    time: datetime
    actor: str
    cause: str
