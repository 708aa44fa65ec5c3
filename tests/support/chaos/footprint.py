"""What a mesh takes: memory, descriptors and threads of each process, tasks, and what is kept in Redis."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
import psutil
import redis

from support.mesh_process import Mesh

_MIB = 1 << 20


@dataclass(frozen=True)
class Footprint:
    """One look at a mesh.

    Attributes:
        memory: MiB of each process (PSS: its share of what it shares).
        descriptors: Open file descriptors of each process.
        threads: Of each process.
        tasks: Of the gateways' event loops.
        in_flight: Inferences that the gateways have not answered.
        keys: In Redis.
        queued: Entries of streams and lists in Redis.
        redis_bytes: What Redis keeps data in.
    """

    memory: Mapping[str, float]
    descriptors: Mapping[str, int]
    threads: Mapping[str, int]
    tasks: int
    in_flight: int
    keys: int
    queued: int
    redis_bytes: int

    def __str__(self) -> str:
        processes = ", ".join(
            f"{name} {self.memory[name]:.0f} MiB {self.descriptors[name]} fds {self.threads[name]} threads"
            for name in self.memory
        )
        return (
            f"{processes}; {self.tasks} tasks, {self.in_flight} in flight; Redis: {self.keys} keys, "
            f"{self.queued} entries, {self.redis_bytes / _MIB:.2f} MiB"
        )


def look(mesh: Mesh, client: redis.Redis) -> Footprint:
    """Look at a mesh."""
    processes = dict(_processes(mesh))
    memory, descriptors, threads = {}, {}, {}
    for name, process in processes.items():
        with contextlib.suppress(psutil.NoSuchProcess):  # a process that comes and goes is no part of it
            memory[name] = process.memory_full_info().pss / _MIB
            descriptors[name] = process.num_fds()
            threads[name] = process.num_threads()
    metrics = _metrics(mesh)
    keys = list(client.scan_iter(count=1000))
    return Footprint(
        memory,
        descriptors,
        threads,
        int(sum(value for name, value in metrics if name == "penstock_gateway_tasks")),
        int(sum(v for name, v in metrics if name.startswith("penstock_gateway_inferences_in_flight"))),
        len(keys),
        sum(_entries(client, key) for key in keys),
        int(client.info("memory")["used_memory_dataset"]),
    )


def growth(looks: Sequence[Footprint]) -> list[str]:
    """What grew from the first half of the looks to the second half, in words.

    The least of each half counts: a process may hold on to memory for a while. An allocator's own ups and
    downs are no growth: a twentieth and 12 MiB.
    """
    half = (len(looks) + 1) // 2
    early, late = looks[:half], looks[half:]
    found = []
    for name in looks[-1].memory:
        for what, allowed in (("memory", 12.0), ("descriptors", 2), ("threads", 1)):
            first, last = (min(getattr(each, what).get(name, 0) for each in part) for part in (early, late))
            if last > first * (1.05 if what == "memory" else 1.0) + allowed:
                found.append(f"{what} of {name}: {first:g}, then {last:g}")
    for what, allowed in (("tasks", 2), ("in_flight", 0), ("keys", 2), ("queued", 0), ("redis_bytes", _MIB)):
        first, last = (min(getattr(each, what) for each in part) for part in (early, late))
        if last > first + allowed:
            found.append(f"{what}: {first}, then {last}")
    return found


def _processes(mesh: Mesh) -> list[tuple[str, psutil.Process]]:
    found = []
    for unit in mesh.record.units:
        if unit.pid is None:
            continue
        process = psutil.Process(unit.pid)
        found.append((unit.name, process))
        if unit.name == "postgres":  # its backends come and go
            continue
        for number, child in enumerate(process.children(recursive=True), 1):
            found.append((f"{unit.name}/{number}", child))
    return found


def _metrics(mesh: Mesh) -> list[tuple[str, float]]:
    found = []
    for url in {unit.metrics for unit in mesh.record.units if unit.name.startswith("gateway")}:
        text = httpx.get(url, timeout=10, trust_env=False).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        found += [(name, float(value)) for name, _, value in lines]
    return found


def _entries(client: redis.Redis, key: bytes) -> int:
    kind = client.type(key)
    if kind == b"stream":
        return int(client.xlen(key))
    return int(client.llen(key)) if kind == b"list" else 0
