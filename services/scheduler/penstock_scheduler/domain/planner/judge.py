"""Where a deployment stands, judged by its replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from penstock_scheduler.domain.deployment import Deployment, DeploymentState
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.version import VersionKey

IDLE = "Idle; the next request starts a replica."
WAKING = "A replica is starting for the requests that wait."


@dataclass(frozen=True, slots=True)
class Standing:
    """A deployment with what it has.

    Attributes:
        deployment: the deployment, not being deleted.
        replicas: those that are not STOPPED.
        asked: the groups that it asks for.
        serving: the groups that callers get.
        obstacles: versions whose replicas would not answer, and why (ensembles whose steps cannot be called).
    """

    deployment: Deployment
    replicas: tuple[Replica, ...]
    asked: frozenset[GroupKey]
    serving: frozenset[GroupKey]
    obstacles: Mapping[VersionKey, str] = field(default_factory=dict)

    def ready(self, groups: frozenset[GroupKey]) -> Counter[GroupKey]:
        """Counts the replicas that answer, by group."""
        counts = Counter(r.group for r in self.replicas if r.state is ReplicaState.READY)
        for key in list(counts):
            if key not in groups or key.version in self.obstacles:
                del counts[key]
        return counts

    def growing(self, wanted: int) -> bool:
        """Whether replicas are missing only because they were never there: none has failed or got lost."""
        for key in self.asked:
            young = [r for r in self.replicas if r.group == key and r.wanted]
            if len(young) < wanted or any(
                r.state is ReplicaState.BACKOFF or (r.state is not ReplicaState.READY and r.restarts)
                for r in young
            ):
                return False
        return True

    def obstacle(self) -> str:
        """Says what keeps replicas of what is asked for from answering; empty if nothing does."""
        return next(filter(None, (self.obstacles.get(key.version) for key in sorted(self.asked))), "")

    def trouble(self) -> Replica | None:
        """The replica of what is asked for that says most about why it is not there."""
        waiting = [
            r
            for r in self.replicas
            if r.message
            and r.state in (ReplicaState.BACKOFF, ReplicaState.PENDING, ReplicaState.STARTING)
            and r.group in self.asked
        ]
        worst = {ReplicaState.BACKOFF: 0, ReplicaState.PENDING: 1, ReplicaState.STARTING: 2}
        return min(waiting, key=lambda r: (worst[r.state], r.id), default=None)


def is_settled(deployment: Deployment) -> bool:
    """Whether a deployment that has all that it asks for already says so."""
    return (
        deployment.state is DeploymentState.READY
        and not deployment.message
        and deployment.serving == deployment.asked
    )


def judge(standing: Standing, now: datetime, failing_seconds: float) -> Deployment:
    """Moves a deployment to the state that its replicas justify, with a message that says why."""
    deployment = standing.deployment
    state, message = _verdict(standing, now, failing_seconds)
    return deployment.move(state, now, message)


def _verdict(standing: Standing, now: datetime, failing_seconds: float) -> tuple[DeploymentState, str]:
    deployment = standing.deployment
    asked_ready = standing.ready(standing.asked)
    trouble = standing.trouble()
    why = f" replicas/{trouble.id}: {trouble.message}" if trouble else ""
    obstacle = standing.obstacle()
    if trouble is None and obstacle:
        why = f" {obstacle}"
    crashing = trouble is not None and trouble.state is ReplicaState.BACKOFF

    if deployment.serving is None:
        # Nothing has answered yet.
        if deployment.state is DeploymentState.FAILED or crashing:
            return DeploymentState.FAILED, f"It could not be started; retrying.{why}"
        waiting = "Replicas are starting." if trouble or not obstacle else "It waits for other deployments."
        return deployment.state, f"{waiting}{why}"

    same = standing.serving == standing.asked
    answering = sum((asked_ready if same else standing.ready(standing.serving)).values()) > 0
    if deployment.serving != deployment.asked:
        rollout = deployment.rollout
        if answering and rollout is not None and not rollout.ended:
            return DeploymentState.UPDATING, f"Rollout {rollout.number}: {rollout.message}{why}"
        if answering:
            return DeploymentState.UPDATING, f"The earlier targets answer until the new ones do.{why}"
        if crashing or deployment.state is DeploymentState.FAILED:
            return (
                DeploymentState.FAILED,
                f"Neither the earlier targets nor the new ones answer; retrying.{why}",
            )
        return DeploymentState.UPDATING, f"New targets are starting; the earlier ones do not answer.{why}"

    wanted = deployment.desired_replicas
    if all(asked_ready[key] >= wanted for key in standing.asked):
        return DeploymentState.READY, "" if wanted else IDLE
    if deployment.autoscaling is not None and not why and standing.growing(wanted):
        # The load asks for more than there are: nothing is broken.
        count = sum(min(asked_ready[key], wanted) for key in standing.asked)
        if answering:
            return DeploymentState.READY, f"{count} of {wanted * len(standing.asked)} replicas answer so far."
        if deployment.state is DeploymentState.READY:
            return DeploymentState.READY, WAKING
    if answering:
        total = wanted * len(standing.asked)
        count = sum(min(asked_ready[key], wanted) for key in standing.asked)
        return DeploymentState.DEGRADED, f"{count} of {total} replicas answer.{why}"
    # It did answer; a restart of its processes takes a moment and is no failure yet.
    silent = (now - deployment.update_time).total_seconds()
    long_enough = deployment.state is DeploymentState.DEGRADED and silent >= failing_seconds
    if deployment.state is DeploymentState.FAILED or (long_enough and _none_starting(standing)):
        return DeploymentState.FAILED, f"No replica answers; retrying.{why}"
    return DeploymentState.DEGRADED, f"No replica answers.{why}"


def _none_starting(standing: Standing) -> bool:
    return not any(r.state is ReplicaState.STARTING for r in standing.replicas if r.group in standing.asked)
