"""What happens next to a rollout: a pure function of what is stored, what was counted, and the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from penstock_scheduler.domain.deployment import Deployment, DeploymentState
from penstock_scheduler.domain.replica import Replica, ReplicaState
from penstock_scheduler.domain.rollout.guards import bucket_of_95th, judge_metric, judge_traffic
from penstock_scheduler.domain.rollout.policy import Strategy
from penstock_scheduler.domain.rollout.state import Evidence, Rollout, RolloutState, Tally
from penstock_scheduler.domain.rollout.targets import new_versions, old_versions, way_back
from penstock_scheduler.domain.traffic import NO_COUNTS
from penstock_scheduler.domain.version import VersionKey

ACTOR = "penstock"
"""Who takes a version back by itself."""
STARTS_TRIED = 2
"""A new version whose process ended so often before it was ever ready does not load."""
CRASHES = 3
"""A new version whose processes ended so often while it had traffic is crashing."""
BACKOFF_SECONDS = 10.0
"""For so long a replica may fail for reasons outside its process, such as a registry that is away."""
BEFORE_SECONDS = 10.0
"""For so long at most a rollout waits to see how the earlier targets answer under all the traffic."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a decision rests on besides the deployment.

    Attributes:
        now: the moment.
        replicas: those of the deployment that are not STOPPED.
        metrics: what the versions record of themselves.
        obstacles: versions whose replicas would not answer, and why.
        counted: what was counted since the last decision.
    """

    now: datetime
    replicas: tuple[Replica, ...] = ()
    metrics: Mapping[VersionKey, Mapping[str, float]] = field(default_factory=dict)
    obstacles: Mapping[VersionKey, str] = field(default_factory=dict)
    counted: Tally = field(default_factory=Tally)

    def states(self, key: VersionKey) -> set[ReplicaState]:
        """States of the replicas of a version; none if they would not answer anyway."""
        return set() if key in self.obstacles else {r.state for r in self.replicas if r.version == key}

    def ready(self, key: VersionKey) -> bool:
        """Whether a version would answer."""
        return ReplicaState.READY in self.states(key)


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a deployment.

    Attributes:
        deployment: as it is from now on.
        rollouts: those that changed, the one that ended before the one that began.
        cause: why it asks for something else now; empty if it does not.
    """

    deployment: Deployment
    rollouts: tuple[Rollout, ...] = ()
    cause: str = ""


def due(deployment: Deployment) -> bool:
    """Whether a rollout is to begin: a version is asked for that does not serve, and a policy says how."""
    rollout = deployment.rollout
    serving = deployment.serving
    return (
        deployment.rollout_policy is not None
        and deployment.state is not DeploymentState.DELETING
        and not deployment.at_once
        and serving is not None
        and (rollout is None or rollout.ended)
        and not {t.version for t in deployment.asked.targets} <= {t.version for t in serving.targets}
    )


def decide(deployment: Deployment, facts: Facts) -> Decision:
    """Moves the rollout of a deployment as far as it goes now."""
    changed: list[Rollout] = []
    old = deployment.rollout
    if old is not None and not old.ended:
        left = _left_behind(deployment, old, facts.now)
        if left is not None:
            changed.append(left)
            deployment = replace(deployment, rollout=left)
    if due(deployment):
        deployment = replace(deployment, rollout=_begin(deployment, facts))
    rollout = deployment.rollout
    cause = ""
    if rollout is not None and not rollout.ended:
        if rollout.state is RolloutState.ROLLING_BACK and rollout == old:
            if all(facts.ready(key) for key in old_versions(rollout)):
                cause = f"rollout {rollout.number} rolled back: {rollout.message}"
                deployment = take_back(deployment, RolloutState.ROLLED_BACK, facts.now, ACTOR)
        else:
            deployment = replace(deployment, rollout=_onward(rollout, facts))
    rollout = deployment.rollout
    if rollout is not None and rollout != old and (not changed or rollout != changed[-1]):
        changed.append(rollout)
        if rollout.state is RolloutState.SUCCEEDED:
            deployment = replace(deployment, serving=deployment.asked)
    return Decision(deployment, tuple(changed), cause)


def take_back(
    deployment: Deployment, to: RolloutState, now: datetime, actor: str, message: str = ""
) -> Deployment:
    """Ends a rollout and asks for the earlier targets again, as a new revision.

    Raises:
        Internal: its state does not allow it.
    """
    rollout = deployment.rollout
    assert rollout is not None  # noqa: S101  callers look
    ended = rollout.advance(to, now, message or rollout.message)
    back = deployment.ask(way_back(deployment, rollout), now, actor)
    return replace(back, rollout=ended)


def _left_behind(deployment: Deployment, rollout: Rollout, now: datetime) -> Rollout | None:
    """The rollout as it ends as the deployment asks for something else or is deleted; None if neither."""
    deleting = deployment.state is DeploymentState.DELETING
    if not deleting and deployment.asked.targets == rollout.after:
        return None
    if rollout.state is RolloutState.ROLLING_BACK:
        return rollout.advance(RolloutState.ROLLED_BACK, now, rollout.message)
    why = (
        "The deployment is being deleted."
        if deleting
        else (f"Revision {deployment.revision} asks for other targets.")
    )
    return rollout.advance(RolloutState.ABORTED, now, why)


def _begin(deployment: Deployment, facts: Facts) -> Rollout:
    policy, serving = deployment.rollout_policy, deployment.serving
    assert policy is not None and serving is not None  # noqa: S101, PT018  see `due`
    rollout = Rollout(
        number=deployment.revision,
        policy=policy,
        before=serving.targets,
        after=deployment.asked.targets,
        create_time=facts.now,
        step_time=facts.now,
        actor=deployment.updated_by,
        message="The new targets start.",
    )
    evidence = _judge_metrics(rollout, facts)
    rollout = replace(rollout, evidence=evidence)
    breach = next((e for e in evidence if e.breached), None)
    return rollout if breach is None else _go_back(rollout, breach.words, facts.now)


def _judge_metrics(rollout: Rollout, facts: Facts) -> tuple[Evidence, ...]:
    """Compares each new version with the running one of its model, or with the one that has most traffic."""
    evidence = []
    heaviest = max(rollout.before, key=lambda t: t.weight)
    for guard in rollout.policy.metrics:
        found = []
        for key in sorted(new_versions(rollout)):
            same = [t for t in rollout.before if t.model == key.model]
            beside = max(same, key=lambda t: t.weight, default=heaviest).version
            found.append(
                judge_metric(guard, facts.metrics.get(beside, {}), facts.metrics.get(key, {}), facts.now)
            )
        evidence.append(next((e for e in found if e.breached), found[0]))
    return tuple(evidence)


def _onward(rollout: Rollout, facts: Facts) -> Rollout:
    if rollout.state is RolloutState.STARTING:
        return _start(rollout, facts)
    if not rollout.moving:
        return rollout
    rollout = _count(rollout, facts)
    why = _crashing(rollout, facts)
    if why:
        return _go_back(rollout, why, facts.now)
    absent = not all(facts.ready(key) for key in new_versions(rollout))
    if absent != rollout.absent:
        waiting = "The new targets have no ready replica; the earlier ones answer meanwhile."
        rollout = replace(rollout, absent=absent, message=waiting if absent else _at(rollout))
    if rollout.policy.strategy is Strategy.ALL_AT_ONCE:
        return rollout if rollout.absent else rollout.next_step(facts.now)
    evidence = judge_traffic(rollout, facts.now)
    breach = next((e for e in evidence if e.breached), None)
    held = (facts.now - rollout.step_time).total_seconds()
    passing = (
        rollout.state is RolloutState.RUNNING
        and not rollout.absent
        and held >= rollout.policy.step_seconds
        and (all(e.passed for e in evidence) or 0 < rollout.policy.patience_seconds <= held)
    )
    if breach is not None or passing or _news(facts):
        kept = tuple(e for e in rollout.evidence if e.kind not in {e.kind for e in evidence})
        rollout = replace(rollout, evidence=kept + evidence)
    if breach is not None:
        return _go_back(rollout, breach.words, facts.now)
    return rollout.next_step(facts.now) if passing else rollout


def _start(rollout: Rollout, facts: Facts) -> Rollout:
    rollout = _count(rollout, facts)
    news = new_versions(rollout)
    unready = [r for r in facts.replicas if r.version in news and r.state is not ReplicaState.READY]
    for replica in unready:
        long = (facts.now - replica.update_time).total_seconds() >= BACKOFF_SECONDS
        if replica.restarts >= STARTS_TRIED or (replica.state is ReplicaState.BACKOFF and long):
            why = f"{replica.version} does not start: {replica.message or 'its process ended.'}"
            return _go_back(rollout, why, facts.now)
    answers = all(facts.ready(key) and ReplicaState.STARTING not in facts.states(key) for key in news)
    # How the earlier targets answer under all the traffic can be seen now only.
    patience = min(rollout.policy.step_seconds, BEFORE_SECONDS)
    waited = (facts.now - rollout.step_time).total_seconds() >= patience
    compares = rollout.policy.strategy in (Strategy.CANARY, Strategy.BLUE_GREEN)
    seen = rollout.bucket >= 0 and sum(rollout.tally.old.latencies) >= rollout.policy.min_answers
    if not answers or (compares and not seen and not waited):
        return rollout
    known = replace(rollout, full=rollout.tally.old, full_bucket=rollout.bucket)
    return known.advance(RolloutState.RUNNING, facts.now, "").enter(facts.now)


def _count(rollout: Rollout, facts: Facts) -> Rollout:
    """Adds what was counted, and finds where the running version's 95th percentile lies."""
    if not _news(facts):
        return rollout
    old = facts.counted.old
    fixed = rollout.moving and rollout.heavy
    if fixed:
        old = replace(old, latencies=NO_COUNTS.latencies)
    tally = rollout.tally.add(old, facts.counted.new)
    bucket = rollout.bucket
    if bucket < 0 and not fixed:
        bucket = bucket_of_95th(tally.old)
        if bucket >= 0:
            # Those that chose the bucket would flatter the running version.
            none = NO_COUNTS.latencies
            tally = Tally(replace(tally.old, latencies=none), replace(tally.new, latencies=none))
    return replace(rollout, tally=tally, bucket=bucket)


def _news(facts: Facts) -> bool:
    return facts.counted != Tally()


def _crashing(rollout: Rollout, facts: Facts) -> str:
    replicas = [r for r in facts.replicas if r.version in new_versions(rollout) and r.wanted]
    if sum(r.restarts for r in replicas) >= CRASHES:
        worst = max(replicas, key=lambda r: r.restarts)
        return f"{worst.version} crashes: {worst.message or 'its process ended again and again.'}"
    return ""


def _go_back(rollout: Rollout, why: str, now: datetime) -> Rollout:
    return rollout.advance(RolloutState.ROLLING_BACK, now, why)


def _at(rollout: Rollout) -> str:
    percent = rollout.policy.steps[rollout.step]
    if rollout.shadow:
        return f"The new targets get a copy of {percent} % of the traffic."
    return f"The new targets get {percent} % of the traffic."
