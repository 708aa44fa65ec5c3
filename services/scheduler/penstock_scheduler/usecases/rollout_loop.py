"""The loop's part of rollouts: it moves them, within the passes of the reconcile loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from penstock_scheduler.domain.deployment import Deployment, DeploymentState, Target
from penstock_scheduler.domain.planner import Snapshot
from penstock_scheduler.domain.planner.ensembles import obstacles
from penstock_scheduler.domain.replica import Replica, ReplicaState
from penstock_scheduler.domain.rollout import Tally
from penstock_scheduler.domain.rollout.decide import Facts, decide, due
from penstock_scheduler.domain.rollout.targets import live_targets, new_versions, old_versions
from penstock_scheduler.domain.traffic import NO_COUNTS, Counts
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.ports import Work


class Totals(Protocol):
    """What gateways have counted; `usecases.traffic.Traffic` has it."""

    def totals(self, deployment: str, version: VersionKey) -> Counts:
        """Everything counted of a version since this scheduler leads; never falls while it does."""


class RolloutLoop:
    """Moves rollouts within the passes of the reconcile loop.

    Where a rollout stands and what it has counted is in the database, so that another scheduler goes on where
    this one was; only what was counted since the last pass is lost with it.

    Args:
        totals: what gateways have counted.
    """

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._epoch: int | None = None
        self._known: dict[tuple[int, VersionKey], Counts] = {}
        self._fresh: dict[tuple[int, VersionKey], Counts] = {}
        self._served: dict[int, tuple[Target, ...]] | None = None
        self._serves: dict[int, tuple[Target, ...]] = {}

    async def move(self, work: Work, snapshot: Snapshot, epoch: int) -> Snapshot:
        """Decides on every deployment that has a rollout, or is to have one, and stores what it decides.

        Raises:
            Aborted: somebody changed one meanwhile.
        """
        if epoch != self._epoch:
            # Totals begin anew with the lead.
            self._epoch, self._known, self._served = epoch, {}, None
        self._fresh = {}
        busy = [d for d in snapshot.deployments.values() if due(d) or (d.rollout and not d.rollout.ended)]
        if not busy:
            return snapshot
        blocked = obstacles(snapshot)
        replicas: dict[str, list[Replica]] = {d.name: [] for d in busy}
        for replica in snapshot.replicas.values():
            if replica.deployment in replicas and replica.state is not ReplicaState.STOPPED:
                replicas[replica.deployment].append(replica)
        deployments = dict(snapshot.deployments)
        for before in busy:
            facts = Facts(
                now=snapshot.now,
                replicas=tuple(replicas[before.name]),
                metrics={t.version: _metrics(snapshot, t) for t in _targets(before)},
                obstacles={key: why for (owner, key), why in blocked.items() if owner == before.name},
                counted=self._counted(before),
            )
            decision = decide(before, facts)
            after = decision.deployment
            if after == before:
                continue
            await work.rollouts.decided(before, after)
            for rollout in decision.rollouts:
                await work.rollouts.keep(after, rollout)
            if decision.cause:
                await work.deployments.add_revision(after, decision.cause)
            deployments[after.name] = after
        if deployments == snapshot.deployments:
            return snapshot
        return replace(snapshot, deployments=deployments)

    async def record(self, work: Work, snapshot: Snapshot) -> bool:
        """Keeps what callers get from now on, where that has changed; whether anything has."""
        if self._served is None:
            self._served = dict(await work.rollouts.served_last())
        ready = {
            (r.deployment, r.version) for r in snapshot.replicas.values() if r.state is ReplicaState.READY
        }
        self._serves = {}
        for name, deployment in snapshot.deployments.items():
            deleting = deployment.state is DeploymentState.DELETING
            live = () if deleting else live_targets(deployment)
            self._serves[deployment.uid] = live if any((name, t.version) in ready for t in live) else ()
        gone = {uid: () for uid, live in self._served.items() if live and uid not in self._serves}
        changed = {
            uid: live for uid, live in self._serves.items() if live != self._served.get(uid, ())
        } | gone
        for uid, targets in changed.items():
            await work.rollouts.serves(uid, targets, snapshot.now)
        return bool(changed)

    def done(self) -> None:
        """The pass has ended well: what it decided and recorded is durable, or there was nothing."""
        self._known = self._fresh
        self._served = self._serves

    def _counted(self, deployment: Deployment) -> Tally:
        """What came since the last pass; nothing at the first one, which only learns where the totals are."""
        rollout = deployment.rollout
        if rollout is None or rollout.ended:
            return Tally()
        sides = []
        for versions in (old_versions(rollout), new_versions(rollout)):
            counts = NO_COUNTS
            for version in versions:
                key = (deployment.uid, version)
                total = self._totals.totals(deployment.name, version)
                counts += total - self._known.get(key, total)
                self._fresh[key] = total
            sides.append(counts)
        return Tally(*sides)


def _metrics(snapshot: Snapshot, target: Target) -> Mapping[str, float]:
    version = snapshot.versions.get(target.version)
    return {} if version is None else dict(version.metrics)


def _targets(deployment: Deployment) -> Sequence[Target]:
    serving = deployment.serving.targets if deployment.serving else ()
    return (*deployment.asked.targets, *serving)
