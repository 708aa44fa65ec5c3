"""What callers of a deployment get while its targets change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from penstock_scheduler.domain.deployment import Deployment, Spec, Target
from penstock_scheduler.domain.rollout.policy import ALL
from penstock_scheduler.domain.rollout.state import Rollout
from penstock_scheduler.domain.version import VersionKey


def live_targets(deployment: Deployment) -> tuple[Target, ...]:
    """The targets that get traffic now, with weights that sum to 100; empty before anything ever answered."""
    if deployment.serving is None:
        return ()
    rollout = deployment.rollout
    if rollout is None or not rollout.moving or rollout.shadow or not rollout.percent:
        return deployment.serving.targets
    return mix(deployment.serving.targets, rollout.after, rollout.percent)


def mirrored(deployment: Deployment) -> dict[VersionKey, int]:
    """Which versions get a copy of how many percent of the requests."""
    rollout = deployment.rollout
    if rollout is None or not rollout.shadow or not rollout.percent:
        return {}
    return dict.fromkeys(new_versions(rollout), rollout.percent)


def new_versions(rollout: Rollout) -> frozenset[VersionKey]:
    """The versions that a rollout brings."""
    return frozenset(t.version for t in rollout.after) - frozenset(t.version for t in rollout.before)


def old_versions(rollout: Rollout) -> frozenset[VersionKey]:
    """The versions with which they are compared: those that had traffic before."""
    return frozenset(t.version for t in rollout.before if t.weight)


def mix(before: Sequence[Target], after: Sequence[Target], percent: int) -> tuple[Target, ...]:
    """Gives `percent` of the traffic to the new targets, each by its own weight; the sum is exactly 100.

    A version that is on both sides is one target. Weights are rounded to whole percents by the largest
    remainder, new targets first.
    """
    exact: dict[VersionKey, int] = {}
    targets: dict[VersionKey, Target] = {}
    for side, share in ((after, percent), (before, ALL - percent)):
        for target in side if share else ():
            targets.setdefault(target.version, target)
            exact[target.version] = exact.get(target.version, 0) + target.weight * share
    whole = {key: weight // ALL for key, weight in exact.items()}
    left = ALL - sum(whole.values())
    for key in sorted(exact, key=lambda key: -(exact[key] % ALL))[:left]:
        whole[key] += 1
    return tuple(replace(targets[key], weight=whole[key]) for key in sorted(targets))


def way_back(deployment: Deployment, rollout: Rollout) -> Spec:
    """What a deployment asks for after its rollout was taken back.

    A target that follows an alias goes on following it, but stays away from the version that was taken back
    until the alias points at another one: following it there would begin the same rollout at once.
    """
    moved = {(t.model, t.alias): t.resolved_version for t in rollout.after if t.alias}
    spec = deployment.serving or deployment.asked
    targets = []
    for target in rollout.before:
        to = moved.get((target.model, target.alias)) if target.alias else None
        away = to is not None and to != target.resolved_version
        targets.append(replace(target, avoids=to) if away and to is not None else target)
    return replace(spec, targets=tuple(targets), replicas=deployment.asked.replicas)
