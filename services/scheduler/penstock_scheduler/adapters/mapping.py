"""From rows to domain objects and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from penstock_scheduler.adapters.rollout_mapping import (
    policy_from_json,
    policy_to_json,
    rollout_from_json,
    rollout_to_json,
)
from penstock_scheduler.adapters.rows import DeploymentRow, DeviceRow, NodeRow, ReplicaRow, RevisionRow
from penstock_scheduler.domain.autoscaling.settings import Autoscaling, Scale
from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints, Taint, Toleration
from penstock_scheduler.domain.deployment import (
    NO_CACHE,
    Deployment,
    DeploymentState,
    ResponseCache,
    Revision,
    Spec,
    Target,
)
from penstock_scheduler.domain.node import Device, DeviceKind, Node, NodeState
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.version import VersionKey

Values = dict[str, Any]


def spec_to_json(spec: Spec) -> Values:
    """What the columns `asked`, `serving` and `spec` hold."""
    value = asdict(spec)
    for target in value["targets"]:
        # An earlier release, which may still read, does not know it.
        if not target["avoids"]:
            del target["avoids"]
    return value


def spec_from_json(value: Values) -> Spec:
    """The inverse of `spec_to_json`."""
    return Spec(
        targets=tuple(Target(**target) for target in value["targets"]),
        replicas=value["replicas"],
        resources=Resources(**value["resources"]),
        batching=None if value["batching"] is None else Batching(**value["batching"]),
        constraints=constraints_from_json(value.get("constraints")),
    )


def constraints_from_json(value: Values | None) -> Constraints:
    """The inverse of `asdict`; what an earlier release stored has none."""
    if not value:
        return NO_CONSTRAINTS
    return Constraints(
        node_selector=tuple((key, wanted) for key, wanted in value["node_selector"]),
        tolerations=tuple(Toleration(*each) for each in value["tolerations"]),
    )


def deployment_values(deployment: Deployment) -> Values:
    """Columns of a deployment, without its uid."""
    return {
        "name": deployment.name,
        "asked": spec_to_json(deployment.asked),
        "serving": None if deployment.serving is None else spec_to_json(deployment.serving),
        "labels": dict(deployment.labels),
        "project": deployment.project,
        "max_queue_depth": deployment.max_queue_depth,
        "cache": None if deployment.cache == NO_CACHE else asdict(deployment.cache),
        "rollout_policy": policy_to_json(deployment.rollout_policy),
        "rollout": None if deployment.rollout is None else rollout_to_json(deployment.rollout),
        "at_once": deployment.at_once,
        "autoscaling": None if deployment.autoscaling is None else asdict(deployment.autoscaling),
        "scale": None if deployment.scale is None else _scale_to_json(deployment.scale),
        "state": deployment.state.name,
        "message": deployment.message,
        "revision": deployment.revision,
        "updated_by": deployment.updated_by,
        "create_time": deployment.create_time,
        "update_time": deployment.update_time,
    }


def deployment_from_row(row: DeploymentRow) -> Deployment:
    """A deployment as stored."""
    return Deployment(
        name=row.name,
        asked=spec_from_json(row.asked),
        serving=None if row.serving is None else spec_from_json(row.serving),
        labels=tuple(sorted(row.labels.items())),
        project=row.project,
        max_queue_depth=row.max_queue_depth,
        cache=NO_CACHE if row.cache is None else ResponseCache(**row.cache),
        rollout_policy=policy_from_json(row.rollout_policy),
        rollout=None if row.rollout is None else rollout_from_json(row.rollout),
        at_once=row.at_once,
        autoscaling=None if row.autoscaling is None else Autoscaling(**row.autoscaling),
        scale=None if row.scale is None else _scale_from_json(row.scale),
        state=DeploymentState[row.state],
        message=row.message,
        revision=row.revision,
        updated_by=row.updated_by,
        create_time=row.create_time,
        update_time=row.update_time,
        uid=row.uid,
    )


def _scale_to_json(scale: Scale) -> Values:
    return {"desired": scale.desired, "capacities": [[*key, rate] for key, rate in scale.capacities]}


def _scale_from_json(value: Values) -> Scale:
    known = ((VersionKey(model, number), rate) for model, number, rate in value["capacities"])
    return Scale(value["desired"], tuple(known))


def revision_from_row(row: RevisionRow, deployment: str) -> Revision:
    """A revision as stored."""
    return Revision(deployment, row.number, spec_from_json(row.spec), row.time, row.actor, row.cause)


def node_values(node: Node) -> Values:
    """Columns of a node, without what is allocated and what operators say."""
    return {
        "name": node.name,
        "state": node.state.name,
        "address": node.address,
        "agent_version": node.agent_version,
        "labels": dict(node.labels),
        "runtimes": list(node.runtimes),
        "cached_digests": sorted(node.cached_digests),
        "cpu_millis": node.cpu_millis,
        "memory_bytes": node.memory_bytes,
        "instance": node.instance,
        "disk_bytes": node.disk_bytes,
        "disk_bytes_free": node.disk_bytes_free,
        "message": node.message,
        "last_seen_time": node.last_seen_time,
    }


def device_values(node: Node) -> list[Values]:
    """Columns of a node's devices, without what is allocated."""
    return [
        {
            "node": node.name,
            "id": device.id,
            "kind": device.kind.name,
            "model": device.model,
            "position": position,
            "memory_bytes": device.memory_bytes,
            "parent_uuid": device.parent_uuid,
        }
        for position, device in enumerate(node.devices)
    ]


def node_from_row(row: NodeRow, devices: Iterable[DeviceRow]) -> Node:
    """A node as stored."""
    return Node(
        name=row.name,
        state=NodeState[row.state],
        address=row.address,
        agent_version=row.agent_version,
        labels=tuple(sorted(row.labels.items())),
        runtimes=tuple(row.runtimes),
        cached_digests=frozenset(row.cached_digests),
        cpu_millis=row.cpu_millis,
        memory_bytes=row.memory_bytes,
        last_seen_time=row.last_seen_time,
        instance=row.instance,
        disk_bytes=row.disk_bytes,
        disk_bytes_free=row.disk_bytes_free,
        cordoned=row.cordoned,
        draining=row.draining,
        taints=tuple(Taint(*taint) for taint in row.taints),
        message=row.message,
        devices=tuple(
            Device(d.id, DeviceKind[d.kind], d.model, d.memory_bytes, d.parent_uuid)
            for d in sorted(devices, key=lambda d: d.position)
        ),
    )


def replica_values(replica: Replica, deployment_uid: int) -> Values:
    """Columns of a replica."""
    return {
        "id": replica.id,
        "deployment_uid": deployment_uid,
        "model": replica.version.model,
        "version": replica.version.number,
        "digest": replica.digest,
        "spec_digest": replica.group.spec_digest,
        "state": replica.state.name,
        "message": replica.message,
        "node": replica.node or None,
        "devices": list(replica.devices),
        "resources": asdict(replica.resources),
        "batching": asdict(replica.batching),
        "constraints": asdict(replica.constraints) if replica.constraints else None,
        "surge": replica.surge,
        "restarts": replica.restarts,
        "pid": replica.pid,
        "create_time": replica.create_time,
        "update_time": replica.update_time,
    }


def replica_from_row(row: ReplicaRow, deployment: str) -> Replica:
    """A replica as stored."""
    return Replica(
        id=row.id,
        deployment=deployment,
        group=GroupKey(VersionKey(row.model, row.version), row.spec_digest),
        digest=row.digest,
        resources=Resources(**row.resources),
        batching=Batching(**row.batching),
        constraints=constraints_from_json(row.constraints),
        surge=row.surge,
        state=ReplicaState[row.state],
        message=row.message,
        node=row.node or "",
        devices=tuple(row.devices),
        restarts=row.restarts,
        pid=row.pid,
        create_time=row.create_time,
        update_time=row.update_time,
    )
