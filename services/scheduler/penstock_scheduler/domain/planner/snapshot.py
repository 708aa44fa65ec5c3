"""What the planner reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints
from penstock_scheduler.domain.deployment import Deployment, Spec
from penstock_scheduler.domain.job import Job, RegistryWord, Task
from penstock_scheduler.domain.node import Node, Report
from penstock_scheduler.domain.project import Project
from penstock_scheduler.domain.replica import GroupKey, Replica
from penstock_scheduler.domain.resources import Batching, Defaults, Resources, spec_digest
from penstock_scheduler.domain.version import Version, VersionKey


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a plan depends on, at one moment. Nobody changes it.

    Attributes:
        now: the moment.
        seed: makes the ids of new replicas; another one for every plan that is applied.
        nodes: by name.
        deployments: by name, also those being deleted.
        replicas: by id; STOPPED ones may be left out.
        versions: those that deployments ask for or serve.
        reports: the last word of each node's agent, by node.
        aliases: alias → number, by model, as the registry last said.
        jobs: by id, those that have not ended, or of which something is to be deleted.
        tasks: by id, those of jobs; STOPPED ones may be left out.
        registry: what the registry said about results, by job.
        projects: by name.
    """

    now: datetime
    seed: str
    nodes: Mapping[str, Node] = field(default_factory=dict)
    deployments: Mapping[str, Deployment] = field(default_factory=dict)
    replicas: Mapping[str, Replica] = field(default_factory=dict)
    versions: Mapping[VersionKey, Version] = field(default_factory=dict)
    reports: Mapping[str, Report] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    jobs: Mapping[str, Job] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    registry: Mapping[str, RegistryWord] = field(default_factory=dict)
    projects: Mapping[str, Project] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """Replicas that a deployment needs of one version, all alike."""

    key: GroupKey
    version: Version
    resources: Resources
    batching: Batching
    count: int
    constraints: Constraints = NO_CONSTRAINTS


def groups_of(
    spec: Spec | None, versions: Mapping[VersionKey, Version], defaults: Defaults
) -> dict[GroupKey, Group]:
    """Works out which replicas a spec needs; two targets that mean one version share their group."""
    if spec is None:
        return {}
    groups = (group_of(spec, versions[target.version], defaults) for target in spec.targets)
    return {group.key: group for group in groups}


def group_of(spec: Spec, version: Version, defaults: Defaults) -> Group:
    """Works out what the replicas of one version need under a spec.

    What was measured, and the disk of the bundle, change what new replicas hold and nothing else: they are
    no part of the key, so that replicas that run are left alone.
    """
    stated = spec.resources.or_else(version.resources)
    resources = stated.or_else(defaults.resources(version.size_bytes))
    batching = version.batching if spec.batching is None else spec.batching
    digest = spec_digest(version.digest, resources, batching, spec.constraints)
    if not stated.memory_bytes and version.measured_memory_bytes:
        memory = defaults.corrected_memory(version.measured_memory_bytes, version.size_bytes)
        resources = replace(resources, memory_bytes=memory)
    if not stated.disk_bytes:
        resources = replace(resources, disk_bytes=version.size_bytes)
    key = GroupKey(version.key, digest)
    return Group(key, version, resources, batching, spec.replicas, spec.constraints)
