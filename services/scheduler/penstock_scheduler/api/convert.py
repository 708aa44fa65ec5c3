"""From protos to domain objects and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from penstock.common.v1 import resources_pb2
from penstock.registry.v1 import version_pb2
from penstock.scheduler.v1 import deployment_pb2, node_pb2, replica_pb2, routing_service_pb2
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_kit.queue.keys import queue_name
from penstock_scheduler.api.policies import policy_from_message, policy_to_message
from penstock_scheduler.domain.autoscaling.settings import Autoscaling
from penstock_scheduler.domain.constraints import Constraints, Toleration
from penstock_scheduler.domain.deployment import (
    DEFAULT_QUEUE_DEPTH,
    NO_CACHE,
    DeploymentState,
    ResponseCache,
    Revision,
    Target,
)
from penstock_scheduler.domain.job import Task
from penstock_scheduler.domain.project import DEFAULT_PROJECT
from penstock_scheduler.domain.replica import Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.rollout.targets import live_targets
from penstock_scheduler.domain.routes import Route, RouteTarget
from penstock_scheduler.domain.validate import (
    TargetAsked,
    check_batching,
    check_cache,
    check_labels,
    check_queue_depth,
    check_replicas,
    check_resources,
)
from penstock_scheduler.domain.validate_nodes import check_constraints
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.attach import Desired
from penstock_scheduler.usecases.deployments import Asked
from penstock_scheduler.usecases.ports import AllocationView, DeploymentView, Uses


def time_to_message(moment: datetime | None) -> Timestamp | None:
    """A moment for callers."""
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


# -- what callers ask for ---------------------------------------------------------------------------


def asked_from_message(message: deployment_pb2.Deployment) -> Asked:
    """What a caller asks for.

    Raises:
        InvalidArgument: a field is wrong; the message names it.
    """
    batching = message.batching
    return Asked(
        targets=tuple(_target_asked(target) for target in message.targets),
        replicas=check_replicas(message.replicas),
        resources=check_resources(resources_from_message(message.resources)),
        batching=check_batching(
            Batching(
                batching.max_batch_size,
                batching.max_delay_microseconds,
                batching.pad_variable_dimensions,
                batching.latency_objective_microseconds,
            )
        )
        if message.HasField("batching")
        else None,
        constraints=check_constraints(
            Constraints(
                tuple(sorted(message.node_selector.items())),
                tuple(Toleration(each.key, each.value) for each in message.tolerations),
            )
        ),
        labels=check_labels(dict(message.labels)),
        project=names.parse_project(message.project) if message.project else DEFAULT_PROJECT,
        max_queue_depth=check_queue_depth(message.max_queue_depth, DEFAULT_QUEUE_DEPTH),
        cache=_cache_asked(message.cache),
        rollout_policy=policy_from_message(message.rollout_policy)
        if message.HasField("rollout_policy")
        else None,
        autoscaling=_autoscaling_asked(message.autoscaling) if message.HasField("autoscaling") else None,
    )


def _cache_asked(message: deployment_pb2.ResponseCache) -> ResponseCache:
    return check_cache(
        ResponseCache(message.enabled, _seconds(message.ttl), message.max_bytes, message.coalesce)
    )


def _autoscaling_asked(message: deployment_pb2.Autoscaling) -> Autoscaling:
    """As it was said: an update may say only a part of it."""
    return Autoscaling(
        min_replicas=message.min_replicas,
        max_replicas=message.max_replicas,
        queue_wait_seconds=_seconds(message.queue_wait_objective),
        idle_seconds=_seconds(message.idle),
        cool_down_seconds=_seconds(message.cool_down),
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _target_asked(message: deployment_pb2.Target) -> TargetAsked:
    model = names.parse_model(message.model)
    match message.WhichOneof("selector"):
        case "alias":
            return TargetAsked(model, message.weight, alias=names.check_alias(message.alias))
        case "version" if message.version >= 1:
            return TargetAsked(model, message.weight, version=message.version)
        case "version":
            raise InvalidArgument(
                f"{message.model} has no version {message.version}; versions are numbered from 1.",
                metadata={"field": "targets.version"},
            )
        case _:
            raise InvalidArgument(
                f"The target {message.model} needs a version or an alias.", metadata={"field": "targets"}
            )


def uses_from_text(text: str) -> Uses | None:
    """The filter `uses` of ListDeployments; None for an empty one.

    Raises:
        InvalidArgument: it has another form.
    """
    if not text:
        return None
    match text.split("/"):
        case ["models", _, "versions", _]:
            model, number = names.parse_version(text)
            return Uses(model, version=number)
        case ["models", _, "aliases", _]:
            model, alias = names.parse_alias(text)
            return Uses(model, alias=alias)
        case _:
            return Uses(names.parse_model(text))


# -- what callers get -------------------------------------------------------------------------------


def deployment_to_message(view: DeploymentView) -> deployment_pb2.Deployment:
    """A deployment for callers."""
    deployment = view.deployment
    spec = deployment.asked
    current = deployment.serving or spec
    return deployment_pb2.Deployment(
        name=names.deployment_name(deployment.name),
        targets=targets_to_messages(spec.targets, view.ready),
        replicas=spec.replicas,
        resources=resources_to_message(spec.resources),
        batching=None if spec.batching is None else _batching(spec.batching),
        labels=dict(deployment.labels),
        state=_deployment_state(deployment.state),
        message=deployment.message,
        serving=targets_to_messages(live_targets(deployment), view.ready),
        revision=deployment.revision,
        ready_replicas=sum(view.ready.get(version, 0) for version in {t.version for t in current.targets}),
        create_time=time_to_message(deployment.create_time),
        update_time=time_to_message(deployment.update_time),
        updated_by=deployment.updated_by,
        etag=deployment.etag,
        max_queue_depth=deployment.max_queue_depth,
        cache=_cache(deployment.cache),
        rollout_policy=policy_to_message(deployment.rollout_policy),
        rollout=(
            names.rollout_name(deployment.name, deployment.rollout.number)
            if deployment.rollout is not None and not deployment.rollout.ended
            else ""
        ),
        node_selector=dict(spec.constraints.node_selector),
        tolerations=[
            deployment_pb2.Toleration(key=each.key, value=each.value) for each in spec.constraints.tolerations
        ],
        autoscaling=_autoscaling(deployment.autoscaling),
        desired_replicas=deployment.desired_replicas,
        project=names.project_name(deployment.project),
    )


def revision_to_message(revision: Revision) -> deployment_pb2.DeploymentRevision:
    """A revision for callers."""
    return deployment_pb2.DeploymentRevision(
        deployment=names.deployment_name(revision.deployment),
        revision=revision.number,
        targets=targets_to_messages(revision.spec.targets, {}),
        replicas=revision.spec.replicas,
        time=time_to_message(revision.time),
        actor=revision.actor,
        cause=revision.cause,
    )


def replica_to_message(replica: Replica) -> replica_pb2.Replica:
    """A replica for callers."""
    return replica_pb2.Replica(
        name=names.replica_name(replica.id),
        deployment=names.deployment_name(replica.deployment),
        version=str(replica.version),
        state=_replica_state(replica.state),
        message=replica.message,
        node=names.node_name(replica.node) if replica.node else "",
        devices=replica.devices,
        resources=resources_to_message(replica.resources),
        restarts=replica.restarts,
        pid=replica.pid,
        create_time=time_to_message(replica.create_time),
        update_time=time_to_message(replica.update_time),
    )


def allocation_to_message(view: AllocationView) -> node_pb2.Allocation:
    """An allocation for callers; it has the id of its replica, or of its job and task."""
    holder = view.holder
    return node_pb2.Allocation(
        name=f"allocations/{view.key.replace('/', '.')}",
        holder=names.job_name(holder.job) if isinstance(holder, Task) else names.replica_name(holder.id),
        node=names.node_name(holder.node),
        resources=resources_to_message(holder.resources),
        devices=holder.devices,
        create_time=time_to_message(view.create_time),
    )


# -- agents -----------------------------------------------------------------------------------------


def replica_spec(desired: Desired) -> replica_pb2.ReplicaSpec:
    """What an agent is told of a replica."""
    replica = desired.replica
    document = _document(desired.version.document)
    return replica_pb2.ReplicaSpec(
        name=names.replica_name(replica.id),
        deployment=names.deployment_name(replica.deployment),
        version=str(replica.version),
        digest=replica.digest,
        manifest=document.manifest,
        files=document.files,
        batching=_batching(replica.batching),
        resources=resources_to_message(replica.resources),
        devices=replica.devices,
        queue=queue_name(replica.deployment, replica.version.number, replica.digest),
        draining=desired.draining,
        handed_over=desired.handed_over,
        profiles=document.profiles,
    )


# -- gateways ---------------------------------------------------------------------------------------


def routes_to_message(generation: int, routes: Iterable[Route]) -> routing_service_pb2.WatchRoutesResponse:
    """The routing table for gateways."""
    return routing_service_pb2.WatchRoutesResponse(
        generation=generation,
        routes=[
            routing_service_pb2.Route(
                deployment=route.deployment,
                targets=[_route_target(target) for target in route.targets],
                max_queue_depth=route.max_queue_depth,
                message=route.message,
                state=_deployment_state(route.state),
                cache=_cache(route.cache),
                scales_from_zero=route.scales_from_zero,
            )
            for route in routes
        ],
    )


def _route_target(target: RouteTarget) -> routing_service_pb2.RouteTarget:
    key = target.version.key
    return routing_service_pb2.RouteTarget(
        model=names.model_name(key.model),
        version=key.number,
        weight=target.weight,
        queue=target.queue,
        ready_replicas=target.ready_replicas,
        manifest=_document(target.version.document).manifest,
        batching=_batching(target.batching),
        aliases=target.aliases,
        digest=target.version.digest,
        mirror_percent=target.mirror_percent,
        mirror_tolerance=target.mirror_tolerance,
    )


# -- parts ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _document(document: bytes) -> version_pb2.Version:
    """The registry's message about a version, parsed once. Nobody may change it."""
    return version_pb2.Version.FromString(document)


def targets_to_messages(
    targets: Iterable[Target], ready: Mapping[VersionKey, int]
) -> list[deployment_pb2.Target]:
    """Targets for callers, with the replicas of each that would answer."""
    messages = []
    for target in targets:
        message = deployment_pb2.Target(
            model=names.model_name(target.model),
            weight=target.weight,
            resolved_version=target.resolved_version,
            ready_replicas=ready.get(target.version, 0),
        )
        if target.alias:
            message.alias = target.alias
        else:
            message.version = target.resolved_version
        messages.append(message)
    return messages


def resources_from_message(message: resources_pb2.Resources) -> Resources:
    """Needs as a caller states them."""
    return Resources(
        cpu_millis=message.cpu_millis,
        memory_bytes=message.memory_bytes,
        gpus=message.gpus,
        gpu_memory_bytes=message.gpu_memory_bytes,
        gpu_memory_millis=message.gpu_memory_millis,
        disk_bytes=message.disk_bytes,
    )


def resources_to_message(resources: Resources) -> resources_pb2.Resources:
    """Needs for callers and agents."""
    return resources_pb2.Resources(
        cpu_millis=resources.cpu_millis,
        memory_bytes=resources.memory_bytes,
        gpus=resources.gpus,
        gpu_memory_bytes=resources.gpu_memory_bytes,
        gpu_memory_millis=resources.gpu_memory_millis,
        disk_bytes=resources.disk_bytes,
    )


def _batching(batching: Batching) -> resources_pb2.Batching:
    return resources_pb2.Batching(
        max_batch_size=batching.max_batch_size,
        max_delay_microseconds=batching.max_delay_microseconds,
        pad_variable_dimensions=batching.pad_variable_dimensions,
        latency_objective_microseconds=batching.latency_objective_microseconds,
    )


def _cache(cache: ResponseCache) -> deployment_pb2.ResponseCache | None:
    """None where nothing was ever set, so that it is left out for callers too."""
    if cache == NO_CACHE:
        return None
    return deployment_pb2.ResponseCache(
        enabled=cache.enabled,
        ttl=_duration(cache.ttl_seconds),
        max_bytes=cache.max_bytes,
        coalesce=cache.coalesce,
    )


def _autoscaling(autoscaling: Autoscaling | None) -> deployment_pb2.Autoscaling | None:
    if autoscaling is None:
        return None
    return deployment_pb2.Autoscaling(
        min_replicas=autoscaling.min_replicas,
        max_replicas=autoscaling.max_replicas,
        queue_wait_objective=_duration(autoscaling.queue_wait_seconds),
        idle=_duration(autoscaling.idle_seconds),
        cool_down=_duration(autoscaling.cool_down_seconds),
    )


def _deployment_state(state: DeploymentState) -> deployment_pb2.DeploymentState.ValueType:
    return deployment_pb2.DeploymentState.Value(f"DEPLOYMENT_STATE_{state.name}")


def _replica_state(state: ReplicaState) -> replica_pb2.ReplicaState.ValueType:
    return replica_pb2.ReplicaState.Value(f"REPLICA_STATE_{state.name}")
