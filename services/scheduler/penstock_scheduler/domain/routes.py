"""The routing table: where the requests of every deployment go."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from penstock_kit.queue.keys import queue_name
from penstock_scheduler.domain.deployment import NO_CACHE, Deployment, DeploymentState, ResponseCache
from penstock_scheduler.domain.planner.ensembles import Obstacles, obstacles
from penstock_scheduler.domain.planner.snapshot import Snapshot
from penstock_scheduler.domain.replica import Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching
from penstock_scheduler.domain.rollout.targets import live_targets, mirrored
from penstock_scheduler.domain.version import Version, VersionKey


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """One version behind a deployment; weight 0 means that only its number or alias reaches it."""

    version: Version
    weight: int
    queue: str
    ready_replicas: int
    batching: Batching
    aliases: tuple[str, ...] = ()
    mirror_percent: int = 0
    mirror_tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Route:
    """Where the requests of one deployment go, or why nothing would answer."""

    deployment: str
    targets: tuple[RouteTarget, ...]
    max_queue_depth: int
    state: DeploymentState
    message: str = ""
    cache: ResponseCache = NO_CACHE
    scales_from_zero: bool = False


def routes_of(snapshot: Snapshot) -> tuple[Route, ...]:
    """Works out the table, sorted by deployment.

    A version stays in the table while any of its replicas lives, so that what waits in its queue
    is answered before the queue disappears. A deployment that is being deleted has only targets
    of weight 0. An ensemble has no ready replica while a step of it would not answer.
    """
    replicas: dict[str, list[Replica]] = defaultdict(list)
    for replica in snapshot.replicas.values():
        if replica.placed:
            replicas[replica.deployment].append(replica)
    blocked = obstacles(snapshot)
    return tuple(
        _route(deployment, replicas[name], snapshot, blocked)
        for name, deployment in sorted(snapshot.deployments.items())
    )


def _route(
    deployment: Deployment, replicas: Iterable[Replica], snapshot: Snapshot, blocked: Obstacles
) -> Route:
    deleting = deployment.state is DeploymentState.DELETING
    spec = deployment.serving or deployment.asked
    weights: dict[VersionKey, int] = {}
    batchings: dict[VersionKey, Batching] = {}
    for target in (live_targets(deployment) or spec.targets) if not deleting else ():
        weights[target.version] = weights.get(target.version, 0) + target.weight
        batchings[target.version] = spec.batching or snapshot.versions[target.version].batching
    mirrors = {} if deleting else mirrored(deployment)
    tolerance = deployment.rollout.policy.tolerance if deployment.rollout and mirrors else 0.0
    ready: Counter[VersionKey] = Counter()
    for replica in replicas:
        weights.setdefault(replica.version, 0)
        batchings.setdefault(replica.version, replica.batching)
        ready[replica.version] += replica.state is ReplicaState.READY
    targets = tuple(
        RouteTarget(
            version=(version := snapshot.versions[key]),
            weight=weight,
            queue=queue_name(deployment.name, key.number, version.digest),
            ready_replicas=0 if (deployment.name, key) in blocked else ready[key],
            batching=batchings[key],
            aliases=_aliases_of(key, snapshot.aliases),
            mirror_percent=mirrors.get(key, 0),
            mirror_tolerance=tolerance if key in mirrors else 0.0,
        )
        for key, weight in sorted(weights.items())
    )
    message = ""
    if deleting:
        message = f"Deployment {deployment.name} is being deleted."
    elif not any(target.weight and target.ready_replicas for target in targets):
        why = [blocked[deployment.name, key] for key in weights if (deployment.name, key) in blocked]
        message = why[0] if why else deployment.message or "Its replicas are starting."
    # Who follows an alias may come to an ensemble unawares: its answers change with what its steps call.
    cache = deployment.cache
    if any(target.version.steps for target in targets):
        cache = replace(cache, enabled=False)
    return Route(
        deployment.name,
        targets,
        deployment.max_queue_depth,
        deployment.state,
        message,
        cache,
        scales_from_zero=deployment.scales_from_zero,
    )


def _aliases_of(key: VersionKey, aliases: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    return tuple(sorted(name for name, number in aliases.get(key.model, {}).items() if number == key.number))
