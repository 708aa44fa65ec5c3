"""Nodes, from protos to domain objects and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from penstock.scheduler.v1 import node_pb2, node_service_pb2, replica_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit import names
from penstock_kit.errors import InvalidArgument
from penstock_scheduler.api.convert import replica_spec, time_to_message
from penstock_scheduler.api.job_messages import task_spec
from penstock_scheduler.domain.constraints import Taint
from penstock_scheduler.domain.node import CPU_DEVICE, Device, DeviceKind, Node
from penstock_scheduler.domain.replica import Observed, ReplicaState
from penstock_scheduler.domain.validate_nodes import (
    MAX_REPLICAS_REPORTED,
    check_observed,
    check_reported,
    check_taints,
)
from penstock_scheduler.usecases.attach import Wanted
from penstock_scheduler.usecases.nodes import CHANGEABLE
from penstock_scheduler.usecases.ports import NodeView, OperatorSays

MAX_MESSAGE_CHARACTERS = 4096

_KINDS = {node_pb2.DEVICE_KIND_CPU: DeviceKind.CPU, node_pb2.DEVICE_KIND_GPU: DeviceKind.GPU}
# What an agent can see; PENDING is the scheduler's own.
_SEEN = {state.value: state for state in ReplicaState if state is not ReplicaState.PENDING}


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
                parent_uuid=device.parent_uuid,
            )
            for device in node.devices
        ],
        cpu_millis=node.cpu_millis,
        memory_bytes=node.memory_bytes,
        labels=dict(node.labels),
        cpu_millis_allocated=view.cpu_millis,
        memory_bytes_allocated=view.memory_bytes,
        address=node.address,
        last_seen_time=time_to_message(node.last_seen_time),
        cached_digests=sorted(node.cached_digests),
        runtimes=node.runtimes,
        agent_version=node.agent_version,
        cordoned=node.cordoned,
        draining=node.draining,
        taints=[node_pb2.Taint(key=taint.key, value=taint.value) for taint in node.taints],
        disk_bytes=node.disk_bytes,
        disk_bytes_free=node.disk_bytes_free,
        disk_bytes_allocated=view.disk_bytes,
        message=node.message,
        instance=node.instance,
    )


def update_from_message(request: pb.UpdateNodeRequest) -> tuple[str, OperatorSays, frozenset[str]]:
    """Which node an operator speaks of, what is said, and which fields are meant.

    Raises:
        InvalidArgument: a field is wrong; the message names it.
    """
    name = names.parse_node(request.node.name)
    paths = list(request.update_mask.paths)
    if not paths or paths == ["*"]:
        paths = list(CHANGEABLE)
    for path in paths:
        if path not in CHANGEABLE:
            raise InvalidArgument(
                f"update_mask names {path!r}; use {', '.join(CHANGEABLE)}.", metadata={"field": "update_mask"}
            )
    taints = check_taints(Taint(taint.key, taint.value) for taint in request.node.taints)
    return name, OperatorSays(request.node.cordoned, request.node.draining, taints), frozenset(paths)


def node_from_message(message: node_pb2.Node) -> Node:
    """A node as its agent describes it; what operators say of it is not the agent's to say.

    Raises:
        InvalidArgument: a field is wrong; the message names it.
    """
    name = names.parse_node(message.name)
    for device in message.devices:
        if device.kind not in _KINDS:
            raise InvalidArgument(f"nodes/{name} does not say what its device {device.id} is.")
    return check_reported(
        Node(
            name=name,
            cpu_millis=message.cpu_millis,
            memory_bytes=message.memory_bytes,
            devices=tuple(
                Device(d.id, _KINDS[d.kind], d.model, d.memory_bytes, d.parent_uuid) for d in message.devices
            ),
            labels=tuple(sorted(message.labels.items())),
            runtimes=tuple(sorted(set(message.runtimes))),
            cached_digests=frozenset(message.cached_digests),
            address=message.address,
            agent_version=message.agent_version,
            disk_bytes=message.disk_bytes,
            disk_bytes_free=message.disk_bytes_free,
            instance=message.instance,
        )
    )


def wanted_to_message(wanted: Wanted) -> node_service_pb2.AttachResponse:
    """What an agent is told."""
    return node_service_pb2.AttachResponse(
        generation=wanted.generation,
        replicas=[replica_spec(desired) for desired in wanted.replicas],
        tasks=[task_spec(desired) for desired in wanted.tasks],
    )


def observed_from_messages(messages: Iterable[replica_pb2.ObservedReplica]) -> Mapping[str, Observed]:
    """What an agent sees of its replicas, by id.

    Raises:
        InvalidArgument: a name, state or number is wrong, or a replica is reported twice.
    """
    observed: dict[str, Observed] = {}
    for message in messages:
        id_ = names.parse_replica(message.name)
        if id_ in observed:
            raise InvalidArgument(f"{message.name} is reported twice in one message.")
        if len(observed) == MAX_REPLICAS_REPORTED:
            raise InvalidArgument(f"More than {MAX_REPLICAS_REPORTED} replicas are reported at once.")
        # It may quote the output of a model, which may be anything.
        words = message.message.replace("\0", "\N{REPLACEMENT CHARACTER}")[:MAX_MESSAGE_CHARACTERS]
        state = _SEEN.get(int(message.state))
        if state is None:
            raise InvalidArgument(f"{message.name} is reported without a state that an agent can see.")
        observed[id_] = check_observed(
            id_, Observed(state, words, message.pid, message.restarts, message.memory_bytes)
        )
    return observed
