"""From protos to domain objects and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from penstock.common.v1 import resources_pb2
from penstock.registry.v1 import version_pb2
from penstock.scheduler.v1 import deployment_pb2, node_pb2, node_service_pb2, replica_pb2, routing_service_pb2
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_kit.queue.keys import queue_name
from penstock_scheduler.domain.autoscaling.settings import Autoscaling
from penstock_scheduler.domain.deployment import (
    DEFAULT_QUEUE_DEPTH,
    NO_CACHE,
    DeploymentState,
    ResponseCache,
    Revision,
    Target,
)
from penstock_scheduler.domain.node import CPU_DEVICE, Device, DeviceKind, Node
from penstock_scheduler.domain.replica import Observed, Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching, Resources
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
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.attach import Desired
from penstock_scheduler.usecases.deployments import Asked
from penstock_scheduler.usecases.ports import AllocationView, DeploymentView, NodeView, Uses

MAX_MESSAGE_CHARACTERS = 4096


def _time(moment: datetime | None) -> Timestamp | None:
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
    resources, batching = message.resources, message.batching
    return Asked(
        targets=tuple(_target_asked(target) for target in message.targets),
        replicas=check_replicas(message.replicas),
        resources=check_resources(
            Resources(
                cpu_millis=resources.cpu_millis,
                memory_bytes=resources.memory_bytes,
                gpus=resources.gpus,
                gpu_memory_bytes=resources.gpu_memory_bytes,
                gpu_memory_millis=resources.gpu_memory_millis,
                disk_bytes=resources.disk_bytes,
            )
        ),
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
        labels=check_labels(dict(message.labels)),
        max_queue_depth=check_queue_depth(message.max_queue_depth, DEFAULT_QUEUE_DEPTH),
        cache=_cache_asked(message.cache),
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
        targets=_targets(spec.targets, view.ready),
        replicas=spec.replicas,
        resources=_resources(spec.resources),
        batching=None if spec.batching is None else _batching(spec.batching),
        labels=dict(deployment.labels),
        state=_deployment_state(deployment.state),
        message=deployment.message,
        serving=_targets(deployment.serving.targets, view.ready) if deployment.serving else (),
        revision=deployment.revision,
        ready_replicas=sum(view.ready.get(version, 0) for version in {t.version for t in current.targets}),
        create_time=_time(deployment.create_time),
        update_time=_time(deployment.update_time),
        updated_by=deployment.updated_by,
        etag=deployment.etag,
        max_queue_depth=deployment.max_queue_depth,
        cache=_cache(deployment.cache),
        autoscaling=_autoscaling(deployment.autoscaling),
        desired_replicas=deployment.desired_replicas,
    )


def revision_to_message(revision: Revision) -> deployment_pb2.DeploymentRevision:
    """A revision for callers."""
    return deployment_pb2.DeploymentRevision(
        deployment=names.deployment_name(revision.deployment),
        revision=revision.number,
        targets=_targets(revision.spec.targets, {}),
        replicas=revision.spec.replicas,
        time=_time(revision.time),
        actor=revision.actor,
        cause=revision.cause,
    )


def node_to_message(view: NodeView) -> node_pb2.Node:
    """A node for callers."""
    node = view.node
    return node_pb2.Node(
        name=names.node_name(node.name),
        state=node_pb2.NodeState.Value(f"NODE_STATE_{node.state.name}"),
        devices=[
            node_pb2.Device(
                id=device.id,
                kind=node_pb2.DeviceKind.Value(f"DEVICE_KIND_{device.kind.name}"),
                model=device.model,
                memory_bytes=device.memory_bytes,
                memory_bytes_allocated=(
                    view.memory_bytes if device.id == CPU_DEVICE else view.devices.get(device.id, 0)
                ),
            )
            for device in node.devices
        ],
        cpu_millis=node.cpu_millis,
        memory_bytes=node.memory_bytes,
        labels=dict(node.labels),
        cpu_millis_allocated=view.cpu_millis,
        memory_bytes_allocated=view.memory_bytes,
        address=node.address,
        last_seen_time=_time(node.last_seen_time),
        cached_digests=sorted(node.cached_digests),
        runtimes=node.runtimes,
        agent_version=node.agent_version,
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
        resources=_resources(replica.resources),
        restarts=replica.restarts,
        pid=replica.pid,
        create_time=_time(replica.create_time),
        update_time=_time(replica.update_time),
    )


def allocation_to_message(view: AllocationView) -> node_pb2.Allocation:
    """An allocation for callers; it has the id of its replica."""
    replica = view.replica
    return node_pb2.Allocation(
        name=f"allocations/{replica.id}",
        holder=names.replica_name(replica.id),
        node=names.node_name(replica.node),
        resources=_resources(replica.resources),
        devices=replica.devices,
        create_time=_time(view.create_time),
    )


# -- agents -----------------------------------------------------------------------------------------


def node_from_message(message: node_pb2.Node) -> Node:
    """A node as its agent describes it.

    Raises:
        InvalidArgument: a field is wrong; the message names it.
    """
    name = names.parse_node(message.name)
    if message.cpu_millis < 0 or message.memory_bytes < 0 or any(d.memory_bytes < 0 for d in message.devices):
        raise InvalidArgument(f"nodes/{name} reports a negative amount of CPU or memory.")
    ids = [device.id for device in message.devices]
    if len(set(ids)) != len(ids) or "" in ids:
        raise InvalidArgument(f"nodes/{name} reports devices whose ids are empty or not unique: {ids}.")
    texts = [message.address, message.agent_version, *message.runtimes, *message.cached_digests, *ids]
    texts += [*message.labels.keys(), *message.labels.values(), *(d.model for d in message.devices)]
    if any("\0" in text for text in texts):
        raise InvalidArgument(f"nodes/{name} reports a text with a NUL, which Postgres cannot store.")
    for device in message.devices:
        if device.kind == node_pb2.DEVICE_KIND_UNSPECIFIED:
            raise InvalidArgument(f"nodes/{name} does not say what its device {device.id} is.")
    return Node(
        name=name,
        cpu_millis=message.cpu_millis,
        memory_bytes=message.memory_bytes,
        devices=tuple(
            Device(d.id, DeviceKind(int(d.kind)), d.model, d.memory_bytes) for d in message.devices
        ),
        labels=tuple(sorted(message.labels.items())),
        runtimes=tuple(sorted(set(message.runtimes))),
        cached_digests=frozenset(message.cached_digests),
        address=message.address,
        agent_version=message.agent_version,
    )


def observed_from_messages(messages: Iterable[replica_pb2.ObservedReplica]) -> Mapping[str, Observed]:
    """What an agent sees of its replicas, by id.

    Raises:
        InvalidArgument: a name or state is wrong.
    """
    observed = {}
    for message in messages:
        id_ = names.parse_replica(message.name)
        # It may quote the output of a model, which may be anything.
        words = message.message.replace("\0", "\N{REPLACEMENT CHARACTER}")[:MAX_MESSAGE_CHARACTERS]
        if message.state in (replica_pb2.REPLICA_STATE_UNSPECIFIED, replica_pb2.REPLICA_STATE_PENDING):
            raise InvalidArgument(f"{message.name} is reported without a state that an agent can see.")
        observed[id_] = Observed(ReplicaState(int(message.state)), words, message.pid, message.restarts)
    return observed


def desired_to_message(generation: int, desired: Iterable[Desired]) -> node_service_pb2.AttachResponse:
    """What an agent is told."""
    return node_service_pb2.AttachResponse(
        generation=generation, replicas=[_replica_spec(item) for item in desired]
    )


def _replica_spec(desired: Desired) -> replica_pb2.ReplicaSpec:
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
        resources=_resources(replica.resources),
        devices=replica.devices,
        queue=queue_name(replica.deployment, replica.version.number, replica.digest),
        draining=desired.draining,
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
    )


# -- parts ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _document(document: bytes) -> version_pb2.Version:
    """The registry's message about a version, parsed once. Nobody may change it."""
    return version_pb2.Version.FromString(document)


def _targets(targets: Iterable[Target], ready: Mapping[VersionKey, int]) -> list[deployment_pb2.Target]:
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


def _resources(resources: Resources) -> resources_pb2.Resources:
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
