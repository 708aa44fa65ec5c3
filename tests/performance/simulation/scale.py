"""The planner at full size: a settled cluster, then a burst."""

from __future__ import annotations

import gc
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from penstock_scheduler.domain.deployment import Deployment, Spec, Target
from penstock_scheduler.domain.node import Report
from penstock_scheduler.domain.planner import Snapshot, plan
from penstock_scheduler.domain.replica import Observed, ReplicaState
from performance.simulation import machines

T = TypeVar("T")
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Size:
    """How large the cluster is.

    Attributes:
        nodes: of eight GPUs each.
        settled: replicas that run already.
        burst: replicas that are asked for at once.
        per_deployment: replicas of one deployment.
    """

    nodes: int = 10_000
    settled: int = 90_000
    burst: int = 10_000
    per_deployment: int = 20


@dataclass(frozen=True, slots=True)
class Figures:
    """What the planner took; seconds of one call."""

    size: Size
    fill_seconds: float
    burst_seconds: float
    burst_placed: int
    started_seconds: float
    steady_seconds: float
    steady_processor_seconds: float
    steady_waiting_seconds: float
    waiting: int
    fragmented_share: float
    node_lost_seconds: float
    peak_gib: float


def deployments(snapshot: Snapshot, random_: random.Random, replicas: int, each: int) -> Snapshot:
    """Ask for more replicas, in deployments whose needs and versions are their own."""
    asked = dict(snapshot.deployments)
    versions = dict(snapshot.versions)
    first = len(asked)
    for number in range(first, first + -(-replicas // each)):
        made = machines.version(number)
        count = min(each, replicas - (number - first) * each)
        spec = Spec((Target(made.key.model, 100, 1),), count, machines.needs(random_))
        name = f"d{number:05d}"
        versions[made.key] = made
        asked[name] = Deployment(name, spec, snapshot.now, snapshot.now, uid=number + 1)
    return replace(snapshot, deployments=asked, versions=versions)


def answered(snapshot: Snapshot) -> Snapshot:
    """Let every agent report that what it should run is READY."""
    seen: dict[str, dict[str, Observed]] = {name: {} for name in snapshot.nodes}
    for replica in snapshot.replicas.values():
        if replica.node:
            seen[replica.node][replica.id] = Observed(ReplicaState.READY, pid=1)
    # Nodes as agents send them are objects of their own, as are those that come out of a database.
    own = {
        name: replace(node, devices=tuple(map(replace, node.devices)))
        for name, node in snapshot.nodes.items()
    }
    reports = {name: Report(own[name], seen[name]) for name in own}
    return replace(snapshot, reports=reports)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Call it; return what it gave and the seconds that it took, rubbish collected before."""
    gc.collect()
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def later(snapshot: Snapshot, seconds: float, seed: str) -> Snapshot:
    """The next moment."""
    return replace(snapshot, now=snapshot.now + timedelta(seconds=seconds), seed=seed)


def settle(snapshot: Snapshot) -> Snapshot:
    """Plan until nothing changes."""
    for _ in range(10):
        snapshot = later(answered(snapshot), 1, f"settle{snapshot.now.timestamp()}")
        changes = plan(snapshot)
        if not changes:
            return snapshot
        snapshot = changes.after(snapshot)
    raise AssertionError("it never settles")


def fragmented(snapshot: Snapshot) -> float:
    """The part of all GPU memory that nobody holds although replicas wait for some."""
    sizes = {(n.name, gpu.id): gpu.memory_bytes for n in snapshot.nodes.values() for gpu in n.gpus}
    held = sum(
        replica.resources.gpu_bytes(sizes[replica.node, device]) or sizes[replica.node, device]
        for replica in snapshot.replicas.values()
        if replica.resources.gpus
        for device in replica.devices
    )
    return 1 - held / sum(sizes.values())


def measure(size: Size, seed: int, say: Callable[[str], None]) -> Figures:
    """Fill a cluster, settle it, ask for a burst, settle again; time each step of the planner."""
    random_ = random.Random(seed)
    nodes = (machines.node(n, machines.EIGHT_GPUS[0]) for n in range(size.nodes))
    snapshot = Snapshot(BEGIN, "fill", nodes={node.name: node for node in nodes})
    snapshot = answered(snapshot)
    snapshot = deployments(snapshot, random_, size.settled, size.per_deployment)
    changes, fill_seconds = timed(lambda: plan(snapshot))
    say(f"{size.settled} replicas placed on an empty cluster in {fill_seconds:.2f} s")
    snapshot = settle(changes.after(snapshot))
    before = {r.id for r in snapshot.replicas.values() if r.node}
    snapshot = later(deployments(snapshot, random_, size.burst, size.per_deployment), 1, "burst")
    changes, burst_seconds = timed(lambda: plan(snapshot))
    snapshot = changes.after(snapshot)
    placed = sum(1 for r in snapshot.replicas.values() if r.node and r.id not in before)
    rate = placed / burst_seconds
    say(f"burst: {placed} of {size.burst} replicas placed in {burst_seconds:.2f} s ({rate:.0f} a second)")
    snapshot = later(answered(snapshot), 1, "started")
    changes, started_seconds = timed(lambda: plan(snapshot))
    say(f"{len(changes.replicas)} replicas became READY: {started_seconds:.2f} s")
    snapshot = settle(changes.after(snapshot))
    snapshot = later(snapshot, 1, "steady")
    changes, steady_seconds = timed(lambda: plan(snapshot))
    assert not changes
    # Where others work too, the clock on the wall says more of them than of the planner.
    began = time.process_time()
    plan(snapshot)
    processor = time.process_time() - began
    say(f"steady, {len(snapshot.replicas)} replicas: {steady_seconds:.3f} s, {processor:.3f} s of processor")

    full = later(deployments(snapshot, random_, 10 * size.burst, 1000), 1, "full")
    changes = plan(full)
    full = settle(changes.after(full))
    waiting = sum(1 for r in full.replicas.values() if r.state is ReplicaState.PENDING)
    _, steady_waiting_seconds = timed(lambda: plan(full))
    say(f"steady, {waiting} of {len(full.replicas)} replicas without a place: {steady_waiting_seconds:.3f} s")

    fragmented_share = fragmented(full)
    say(f"and of the GPU memory {fragmented_share:.2%} is free, but in pieces too small for what waits")

    gone = next(iter(snapshot.nodes))
    lost = replace(snapshot.reports[gone], attached=False, silent_seconds=60.0)
    hit = replace(snapshot, reports={**snapshot.reports, gone: lost})
    changes, lost_seconds = timed(lambda: plan(hit))
    say(f"a node lost: {len(changes.replicas)} changes in {lost_seconds:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    say(f"peak memory {peak:.2f} GiB")
    return Figures(
        size,
        fill_seconds,
        burst_seconds,
        placed,
        started_seconds,
        steady_seconds,
        processor,
        steady_waiting_seconds,
        waiting,
        fragmented_share,
        lost_seconds,
        peak,
    )
