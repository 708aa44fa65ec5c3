"""Which ensembles would not answer now although their replicas do: a step of theirs has nobody to call."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from penstock_kit.ensembles import MAX_DEPTH, ModelType, Step, tensor_types
from penstock_kit.errors import FailedPrecondition
from penstock_scheduler.domain.deployment import Deployment, DeploymentState
from penstock_scheduler.domain.planner.snapshot import Snapshot
from penstock_scheduler.domain.replica import Replica, ReplicaState
from penstock_scheduler.domain.version import Version, VersionKey

Obstacles = Mapping[tuple[str, VersionKey], str]
"""By deployment and version: why a request would fail, in words that name the step."""


@dataclass(frozen=True, slots=True)
class _Served:
    """One version behind a deployment."""

    version: Version
    weight: int
    aliases: frozenset[str]
    ready: bool


def obstacles(snapshot: Snapshot) -> Obstacles:
    """Say of every deployed ensemble that would not answer which step keeps it from it."""
    if not any(version.steps for version in snapshot.versions.values()):
        return {}
    return _Survey(snapshot).obstacles()


def callers_of(name: str, deployments: Iterable[Deployment], versions: Mapping[VersionKey, Version]) -> str:
    """Return who calls a deployment, as "step a of deployment b"; empty if nobody does."""
    for deployment in deployments:
        if deployment.name == name or deployment.state is DeploymentState.DELETING:
            continue
        for spec in filter(None, (deployment.asked, deployment.serving)):
            for target in spec.targets:
                version = versions.get(target.version)
                for step in version.steps if version else ():
                    if step.deployment == name:
                        return f"step {step.name} of deployment {deployment.name}"
    return ""


class _Survey:
    """What is behind every deployment, and what follows from it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._found: dict[tuple[str, VersionKey], str] = {}
        # How many ensembles a request passes through from there on, that one included.
        self._depths: Counter[tuple[str, VersionKey]] = Counter()
        self._served: dict[str, list[_Served]] = {}
        replicas: dict[str, list[Replica]] = defaultdict(list)
        for replica in snapshot.replicas.values():
            replicas[replica.deployment].append(replica)
        for name, deployment in snapshot.deployments.items():
            if deployment.state is DeploymentState.DELETING:
                continue
            ready = Counter(r.group.version for r in replicas[name] if r.state is ReplicaState.READY)
            weights: Counter[VersionKey] = Counter()
            for target in (deployment.serving or deployment.asked).targets:
                weights[target.version] += target.weight
            # New targets that do not serve yet: they may when nothing keeps them from it.
            for target in deployment.asked.targets:
                weights.setdefault(target.version, 0)
            self._served[name] = [
                _Served(snapshot.versions[key], weight, _aliases(key, snapshot), ready[key] > 0)
                for key, weight in weights.items()
                if key in snapshot.versions
            ]

    def obstacles(self) -> Obstacles:
        for name, served in self._served.items():
            for one in served:
                self._obstacle(name, one, (name,))
        return {key: words for key, words in self._found.items() if words}

    def _obstacle(self, name: str, served: _Served, way: tuple[str, ...]) -> str:
        """Return what keeps a version from answering; `way` leads from the first ensemble to it."""
        key = (name, served.version.key)
        if key not in self._found:
            steps = served.version.steps
            words = next(filter(None, (self._step(key, step, way) for step in steps)), "")
            if not words and self._depths[key] > MAX_DEPTH:
                words = f"It nests {self._depths[key]} ensembles; at most {MAX_DEPTH} are run."
            words = words or self._misfit(served.version)
            if len(way) > 1 and words:
                return words  # seen from another's way: a circle there says nothing about this one alone
            self._found[key] = words
        return self._found[key]

    def _misfit(self, version: Version) -> str:
        """Return why an ensemble does not fit what most of its calls reach now; empty if it does."""
        if version.kind is None or not version.steps:
            return ""
        models: dict[str, ModelType] = {}
        for step in version.steps:
            chosen = [one for one in _chosen(step.selector, self._served[step.deployment]) if one.ready]
            kind = max(chosen, key=lambda one: one.weight).version.kind
            if kind is not None:
                models[step.name] = kind
        try:
            tensor_types(version.steps, models, version.kind.inputs, version.kind.outputs)
        except FailedPrecondition as error:
            return error.message
        return ""

    def _step(self, caller: tuple[str, VersionKey], step: Step, way: tuple[str, ...]) -> str:
        name = step.deployment
        if name in way:
            circle = " → ".join((*way[way.index(name) :], name))
            return f"Step {step.name}: {circle} is a circle of ensembles that call each other."
        served = self._served.get(name)
        if served is None:
            return f"Step {step.name}: there is no deployment {name}; deploy it."
        chosen = _chosen(step.selector, served)
        if not chosen:
            return f"Step {step.name}: deployment {name} serves no {step.model.removeprefix(name)}."
        why = ""
        for one in chosen:
            if one.ready:
                why = self._obstacle(name, one, (*way, name))
                if not why:
                    # An ensemble is one deeper than the deepest that it calls.
                    depth = self._depths[name, one.version.key] + 1
                    self._depths[caller] = max(self._depths[caller], depth)
                    return ""
        return f"Step {step.name}: deployment {name} is not ready. {why}".rstrip()


def _chosen(selector: str, served: Iterable[_Served]) -> list[_Served]:
    if selector.startswith("@"):
        return [one for one in served if selector[1:] in one.aliases]
    if selector:
        return [one for one in served if one.version.key.number == int(selector)]
    return [one for one in served if one.weight > 0]


def _aliases(key: VersionKey, snapshot: Snapshot) -> frozenset[str]:
    known = snapshot.aliases.get(key.model, {})
    return frozenset(name for name, number in known.items() if number == key.number)
