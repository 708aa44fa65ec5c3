"""What a node is and has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """The processor or one GPU."""

    id: str
    """`cpu`, `gpu0`, `gpu1`, …"""
    gpu: bool
    model: str
    """The maker's name of it."""
    memory_bytes: int
    """For the processor, the memory that replicas may use."""
    handle: str = ""
    """What CUDA knows the device by (its UUID); empty for the processor."""
    parent: str = ""
    """UUID of the whole GPU that it is a slice of (MIG)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """What replicas and jobs may use of a node."""

    cpu_millis: int
    """Thousandths of a core."""
    memory_bytes: int
    devices: tuple[Device, ...]
    disk_bytes: int = 0
    """Disk that bundles may use."""
    disk_bytes_free: int = 0
    """Disk that was free when the agent started; it changes too often to be told anew."""


@dataclasses.dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What a node is called and how it is reached."""

    name: str
    """Id, without `nodes/`."""
    address: str
    """Where its agent's WorkerService listens."""
    labels: Mapping[str, str]
    agent_version: str
    instance: str = ""
    """Which installation of a worker this is, so that two that bear one name are told apart."""


@dataclasses.dataclass(frozen=True, slots=True)
class CachedBundle:
    """A complete bundle in the cache."""

    digest: str
    """Tree digest, `sha256:…`."""
    size_bytes: int
    users: int
    """Replicas that use it now."""
