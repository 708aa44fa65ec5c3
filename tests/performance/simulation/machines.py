"""Nodes and needs of a simulated cluster, from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from penstock_scheduler.domain.node import CPU_DEVICE, Device, DeviceKind, Node
from penstock_scheduler.domain.resources import Resources
from penstock_scheduler.domain.version import Version, VersionKey

GIB = 1024**3
RUNTIMES = ("onnx", "python", "script", "torch")


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of machine.

    Attributes:
        gpus: GPUs.
        gpu_gib: memory of each, GiB.
        cores: processor cores.
        memory_gib: main memory, GiB.
        weight: how many there are, beside those of other shapes.
        runtimes: what it can run.
    """

    gpus: int
    gpu_gib: int
    cores: int
    memory_gib: int
    weight: int = 1
    runtimes: tuple[str, ...] = RUNTIMES


EIGHT_GPUS = (Shape(8, 80, 128, 1024),)
"""10,000 of these have 80,000 GPUs."""

MIXED = (
    Shape(8, 80, 128, 1024, 4),
    Shape(4, 40, 64, 512, 2),
    Shape(2, 24, 32, 128, 2),
    Shape(1, 16, 8, 32, 2, ("onnx", "torch")),
    Shape(0, 0, 32, 64, 3),
    Shape(0, 0, 4, 8, 1, ("onnx",)),
)
"""Large and small machines, some without GPUs, some that do not run everything."""


def node(number: int, shape: Shape, cached: frozenset[str] = frozenset()) -> Node:
    """Make one machine of a shape."""
    gpus = (
        Device(f"gpu{i}", DeviceKind.GPU, "simulated", shape.gpu_gib * GIB, parent_uuid="")
        for i in range(shape.gpus)
    )
    return Node(
        name=f"n{number:05d}",
        cpu_millis=shape.cores * 1000,
        memory_bytes=shape.memory_gib * GIB,
        devices=(Device(CPU_DEVICE, DeviceKind.CPU), *gpus),
        runtimes=shape.runtimes,
        cached_digests=cached,
    )


def choose(random_: random.Random, shapes: tuple[Shape, ...]) -> Shape:
    """Choose a shape as often as its weight says."""
    return random_.choices(shapes, [shape.weight for shape in shapes])[0]


def needs(random_: random.Random) -> Resources:
    """Choose needs: most replicas share a GPU, some hold one or several alone, some need none."""
    kind = random_.random()
    cpu = random_.randrange(100, 4000, 50)
    memory = random_.randrange(512, 16 * 1024) * 1024**2
    if kind < 0.2:
        return Resources(cpu, memory)
    if kind < 0.85:
        return Resources(cpu, memory, 1, random_.randrange(2, 41) * GIB)
    if kind < 0.95:
        return Resources(cpu, memory, 1)
    return Resources(cpu, memory, random_.choice([2, 2, 4, 8]))


def version(number: int, runtime: str = "torch") -> Version:
    """Make a version of a model of its own."""
    return Version(VersionKey(f"m{number:05d}", 1), f"{number:064x}", runtime)
