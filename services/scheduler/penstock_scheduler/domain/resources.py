"""What a replica needs of a node, and how requests are joined for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Resources:
    """Needs of one replica.

    Attributes:
        cpu_millis: thousandths of a core.
        memory_bytes: main memory.
        gpus: whole GPUs; 0 means that the CPU computes.
        gpu_memory_bytes: memory on each GPU.
        gpu_memory_millis: thousandths of the memory of each GPU, whichever it is, instead of bytes. Where
            neither is given and `gpus` > 0, each GPU is held alone.
        disk_bytes: disk for the bundle, which replicas of one bundle on one node share.
    """

    cpu_millis: int = 0
    memory_bytes: int = 0
    gpus: int = 0
    gpu_memory_bytes: int = 0
    gpu_memory_millis: int = 0
    disk_bytes: int = 0

    @property
    def exclusive(self) -> bool:
        """Whether it holds its GPUs alone."""
        return self.gpus > 0 and not self.gpu_memory_bytes and not self.gpu_memory_millis

    def gpu_bytes(self, size: int) -> int:
        """Memory that it holds of a GPU of `size` bytes; 0 if it holds the whole of it alone."""
        if self.gpu_memory_millis:
            return max(1, -(-size * self.gpu_memory_millis // 1000))
        return self.gpu_memory_bytes

    def or_else(self, other: Resources) -> Resources:
        """Fills the fields that are 0 from `other`; memory of GPUs is one field, in bytes or as a part."""
        shared = self.gpu_memory_bytes or self.gpu_memory_millis
        return Resources(
            cpu_millis=self.cpu_millis or other.cpu_millis,
            memory_bytes=self.memory_bytes or other.memory_bytes,
            gpus=self.gpus or other.gpus,
            gpu_memory_bytes=self.gpu_memory_bytes if shared else other.gpu_memory_bytes,
            gpu_memory_millis=self.gpu_memory_millis if shared else other.gpu_memory_millis,
            disk_bytes=self.disk_bytes or other.disk_bytes,
        )


NO_RESOURCES = Resources()
"""Nothing stated."""


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests are put together into one call of the model; see common/v1/resources.proto."""

    max_batch_size: int = 0
    max_delay_microseconds: int = 0
    pad_variable_dimensions: bool = False
    latency_objective_microseconds: int = 0


NO_BATCHING = Batching()
"""Nothing stated: requests are never joined."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Needs assumed where neither the deployment nor the manifest states them.

    The memory of a replica is guessed as `memory_base_bytes + memory_per_bundle_byte * size`:
    weights are held once by the runtime and once more while they load. The base is what a small
    runtime process adds to the fork server whose libraries it shares.
    """

    cpu_millis: int = 50
    memory_base_bytes: int = 64 * MIB
    memory_per_bundle_byte: int = 2

    def resources(self, size_bytes: int) -> Resources:
        """Needs of a replica of a bundle of `size_bytes`."""
        memory = self.memory_base_bytes + self.memory_per_bundle_byte * size_bytes
        return Resources(cpu_millis=self.cpu_millis, memory_bytes=memory)

    def corrected_memory(self, measured_bytes: int, size_bytes: int) -> int:
        """Memory of the next replica of a version whose replicas were seen to use `measured_bytes` each.

        A quarter more, for what a larger batch takes; the base and the bundle's size at least, as
        neighbours may have shared the pages of its weights, and one that was just started has not met its
        largest request yet.
        """
        return max(self.memory_base_bytes + size_bytes, measured_bytes + measured_bytes // 4)


DEFAULTS = Defaults()
"""What is assumed unless an operator says otherwise."""


# Every pass asks for those of all deployments in turn: a cache that holds fewer holds none.
@lru_cache(maxsize=65536)
def spec_digest(
    digest: str, resources: Resources, batching: Batching, constraints: Constraints = NO_CONSTRAINTS
) -> str:
    """A short digest of all that a running replica cannot change; another one means a new replica."""
    fields: tuple[str | int, ...] = (
        digest,
        resources.cpu_millis,
        resources.memory_bytes,
        resources.gpus,
        resources.gpu_memory_bytes,
        batching.max_batch_size,
        batching.max_delay_microseconds,
        int(batching.pad_variable_dimensions),
    )
    if batching.latency_objective_microseconds:  # else digests stay what they were before there was one
        fields += (batching.latency_objective_microseconds,)
    # Likewise; the words tell what each of them is, as any may be missing.
    if resources.gpu_memory_millis:
        fields += ("gpu_memory_millis", resources.gpu_memory_millis)
    if resources.disk_bytes:
        fields += ("disk", resources.disk_bytes)
    if constraints:
        fields += ("constraints", repr(constraints))
    return hashlib.blake2b("|".join(map(str, fields)).encode(), digest_size=8).hexdigest()


def human_bytes(count: int) -> str:
    """Writes a count of bytes for people: `1536 MiB`, `2.5 GiB`."""
    if count < MIB:
        return f"{count / KIB:.3g} KiB"
    if count < 10 * KIB * MIB:
        return f"{count / MIB:.4g} MiB"
    return f"{count / (KIB * MIB):.4g} GiB"
