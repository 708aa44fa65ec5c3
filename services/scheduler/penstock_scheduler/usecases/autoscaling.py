"""The loop's part of autoscaling: it decides, within the passes of the reconcile loop, how many replicas."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from penstock_scheduler.domain.autoscaling.decide import (
    STEADY_SECONDS,
    SUDDEN_SECONDS,
    Facts,
    Memory,
    Target,
    decide,
)
from penstock_scheduler.domain.autoscaling.evict import evicted
from penstock_scheduler.domain.autoscaling.settings import Autoscaling, Scale
from penstock_scheduler.domain.deployment import Deployment, DeploymentState
from penstock_scheduler.domain.planner import Snapshot
from penstock_scheduler.domain.replica import ReplicaState
from penstock_scheduler.domain.traffic import NO_COUNTS
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.traffic import Traffic

log = logging.getLogger(__name__)

EVICTABLE_SECONDS = 10.0
"""A deployment that scales to zero gives up its replicas for others after so long without a request."""
# The fastest twentieth of the answers did not wait.
_FASTEST = 0.05


class Autoscaler:
    """Decides how many replicas every deployment with autoscaling is to have.

    What was decided and measured is stored with the deployment, so that another scheduler goes on from there;
    what came lately is not, and its cool-down and idle time begin anew.

    Args:
        traffic: what gateways report.
        clock: seconds that only grow.
    """

    def __init__(self, traffic: Traffic, clock: Callable[[], float] = time.monotonic) -> None:
        self._traffic = traffic
        self._clock = clock
        self._epoch: int | None = None
        self._memories: dict[int, Memory] = {}

    def scale(self, snapshot: Snapshot, epoch: int) -> tuple[Snapshot, Sequence[Deployment]]:
        """Returns the snapshot with the numbers that the load asks for, and the deployments that changed."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._memories.clear()
        scaled = {
            d.name: d
            for d in snapshot.deployments.values()
            if d.autoscaling is not None and d.state is not DeploymentState.DELETING
        }
        self._memories = {d.uid: m for d in scaled.values() if (m := self._memories.get(d.uid))}
        if not scaled:
            return snapshot, ()
        now = self._clock()
        ready: dict[str, dict[VersionKey, int]] = {name: {} for name in scaled}
        for replica in snapshot.replicas.values():
            if replica.deployment in ready and replica.state is ReplicaState.READY:
                counts = ready[replica.deployment]
                counts[replica.version] = counts.get(replica.version, 0) + 1
        called = _called(snapshot)
        idle = [name for name in self._idle(scaled, now) if name not in called]
        starved = evicted(snapshot, idle)
        changed = []
        for name, deployment in scaled.items():
            if deployment.autoscaling is None:
                continue
            settings = deployment.autoscaling
            if name in called:
                # Replicas of ensembles call it, past the gateways: nobody counts these requests, and nothing
                # would tell that one waits for a replica.
                settings = replace(settings, min_replicas=max(1, settings.min_replicas))
            facts = self._facts(deployment, settings, ready[name], snapshot, name in starved)
            scale, self._memories[deployment.uid] = decide(facts, self._memories.get(deployment.uid), now)
            if scale != deployment.scale:
                changed.append(replace(deployment, scale=scale))
                if scale.desired != deployment.desired_replicas:
                    why = " to make room" if name in starved else ""
                    log.info(
                        "deployment %s goes from %d to %d replicas%s; %s",
                        name,
                        deployment.desired_replicas,
                        scale.desired,
                        why,
                        _account(facts, scale),
                    )
        if not changed:
            return snapshot, ()
        deployments = {**snapshot.deployments, **{d.name: d for d in changed}}
        return replace(snapshot, deployments=deployments), changed

    def _idle(self, scaled: Mapping[str, Deployment], now: float) -> list[str]:
        """Deployments that could give up their replicas for others, idle for longest first."""
        idle = []
        for name, deployment in scaled.items():
            memory = self._memories.get(deployment.uid)
            if memory and deployment.scales_from_zero and deployment.desired_replicas:
                seconds = now - memory.busy_at
                if seconds >= EVICTABLE_SECONDS and deployment.serving == deployment.asked:
                    idle.append((-seconds, name))
        return [name for _, name in sorted(idle)]

    def _facts(
        self,
        deployment: Deployment,
        settings: Autoscaling,
        ready: Mapping[VersionKey, int],
        snapshot: Snapshot,
        starved: bool,
    ) -> Facts:
        targets = []
        arrived = 0
        for version, batch in _versions(deployment, snapshot).items():
            totals = self._traffic.totals(deployment.name, version)
            arrived += totals.arrived
            targets.append(
                Target(
                    version,
                    self._traffic.window(deployment.name, version, STEADY_SECONDS),
                    self._traffic.window(deployment.name, version, SUDDEN_SECONDS),
                    ready.get(version, 0),
                    None if totals == NO_COUNTS else totals.latency_quantile_seconds(_FASTEST),
                    max(1, batch),
                    _profiled(snapshot, version),
                )
            )
        scale = deployment.scale or Scale(deployment.desired_replicas)
        return Facts(settings, scale, tuple(targets), arrived, starved)


def _called(snapshot: Snapshot) -> frozenset[str]:
    """The deployments that a step of a deployed ensemble calls."""
    return frozenset(
        step.deployment
        for deployment in snapshot.deployments.values()
        if deployment.state is not DeploymentState.DELETING
        for spec in filter(None, (deployment.asked, deployment.serving))
        for target in spec.targets
        for step in snapshot.versions[target.version].steps
    )


def _profiled(snapshot: Snapshot, version: VersionKey) -> float | None:
    """What one replica did in a profile, on the slowest kind of device that the cluster has."""
    models = {device.model for node in snapshot.nodes.values() for device in node.devices}
    found = [rate for device, rate in snapshot.versions[version].profiles if device in models]
    return min(found, default=None)


def _versions(deployment: Deployment, snapshot: Snapshot) -> Mapping[VersionKey, int]:
    """The versions that are asked for or serve, with how many requests each computes at once."""
    found = {}
    for spec in filter(None, (deployment.asked, deployment.serving)):
        for target in spec.targets:
            batching = spec.batching or snapshot.versions[target.version].batching
            found[target.version] = batching.max_batch_size
    return found


def _account(facts: Facts, scale: Scale) -> str:
    """What came, for the log."""
    capacities = dict(scale.capacities)
    return "; ".join(
        f"{target.version}: {target.sudden.arrivals_per_second:.1f}/s come, {target.sudden.waiting} wait, "
        + (
            f"a replica answers {capacities[target.version]:.1f}/s"
            if target.version in capacities
            else "what a replica can do is not known yet"
        )
        for target in facts.targets
    )
