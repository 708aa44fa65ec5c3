"""Nodes, their devices, and the reports of their agents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from enum import Enum
from operator import attrgetter

from penstock_scheduler.domain.constraints import Taint
from penstock_scheduler.domain.job import ObservedTask
from penstock_scheduler.domain.replica import Observed


class NodeState(Enum):
    """Whether a node takes work; values are those of scheduler/v1/node.proto."""

    READY = 1
    LOST = 2


class DeviceKind(Enum):
    """What a device is."""

    CPU = 1
    GPU = 2


CPU_DEVICE = "cpu"
"""Name of the processor among a node's devices."""


@dataclass(frozen=True, slots=True)
class Device:
    """A processor or GPU of a node; a MIG slice is a GPU of its own that names the whole one."""

    id: str
    kind: DeviceKind
    model: str = ""
    memory_bytes: int = 0
    parent_uuid: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine with an agent on it: what the agent says of it, and what operators say.

    What operators say (cordoned, draining, taints) is stored by them alone; a report says nothing of it.

    Attributes:
        name: the id in `nodes/{id}`.
        cpu_millis: cores that replicas may use, in thousandths.
        memory_bytes: memory that replicas may use.
        devices: its processor and GPUs.
        labels: free key-value pairs, sorted.
        runtimes: runtimes it can run, sorted.
        cached_digests: digests of the bundles in its cache.
        address: address of the agent's own gRPC service.
        agent_version: release of the agent.
        state: whether it takes work.
        last_seen_time: when it was last heard of; written down rarely, see the planner.
        instance: which installation of a worker bears the name; empty if the agent does not say.
        disk_bytes: disk that bundles may use; 0 if the agent does not say, and then nothing is counted.
        disk_bytes_free: disk that was free when the agent attached.
        cordoned: nothing new is placed on it.
        draining: what runs on it moves elsewhere; implies `cordoned`.
        taints: what a replica must bear to be placed on it.
        message: what its drain waits for, for people.
    """

    name: str
    cpu_millis: int
    memory_bytes: int
    devices: tuple[Device, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    runtimes: tuple[str, ...] = ()
    cached_digests: frozenset[str] = frozenset()
    address: str = ""
    agent_version: str = ""
    state: NodeState = NodeState.READY
    last_seen_time: datetime | None = None
    instance: str = ""
    disk_bytes: int = 0
    disk_bytes_free: int = 0
    cordoned: bool = False
    draining: bool = False
    taints: tuple[Taint, ...] = ()
    message: str = ""

    def described_by(self, seen: Node) -> Node:
        """The node as its agent sees it now, with what operators said of it and what the planner did."""
        return replace(
            seen,
            cordoned=self.cordoned,
            draining=self.draining,
            taints=self.taints,
            message=self.message,
        )

    def looks_like(self, seen: Node) -> bool:
        """Whether its agent says nothing new of it; when it was heard of does not count."""
        return _described(self) == _described(seen)

    @property
    def gpus(self) -> tuple[Device, ...]:
        """Its GPUs."""
        return tuple(device for device in self.devices if device.kind is DeviceKind.GPU)


_NOT_DESCRIBED = ("cordoned", "draining", "taints", "message", "last_seen_time")
_described = attrgetter(*(each.name for each in fields(Node) if each.name not in _NOT_DESCRIBED))


@dataclass(frozen=True, slots=True)
class Report:
    """The last word of a node's agent.

    Attributes:
        node: the node as the agent sees it, READY; None if nothing was heard since the
            scheduler began to lead.
        replicas: what runs or has just ended there, by replica id.
        attached: whether the stream is still open.
        silent_seconds: seconds since the last message (or since the scheduler began to lead).
        tasks: what runs or has just ended there, by task id.
    """

    node: Node | None
    replicas: Mapping[str, Observed] = field(default_factory=dict)
    attached: bool = True
    silent_seconds: float = 0.0
    tasks: Mapping[str, ObservedTask] = field(default_factory=dict)
