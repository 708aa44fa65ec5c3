"""Which idle deployments give up their replicas so that others find room."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from penstock_scheduler.domain.job import Task
from penstock_scheduler.domain.planner.feasible import Need, Placement, check, usage_of
from penstock_scheduler.domain.planner.snapshot import Snapshot
from penstock_scheduler.domain.project import QUOTA_FULL
from penstock_scheduler.domain.replica import Replica, ReplicaState


def evicted(snapshot: Snapshot, idle: Sequence[str]) -> Collection[str]:
    """The deployments whose replicas are to end so that one that found no room finds it.

    Args:
        snapshot: the cluster.
        idle: deployments that scale to zero and to which nothing came of late, the longest idle first; they
            go in this order, and those that would make no room keep theirs.
    """
    starved = [
        r
        for r in snapshot.replicas.values()
        if r.state is ReplicaState.PENDING
        and r.message
        and not r.message.startswith(QUOTA_FULL)
        and r.deployment not in idle
    ]
    leaving = any(r.state is ReplicaState.DRAINING for r in snapshot.replicas.values())
    # One that is leaving makes room in a moment: see then whether more is needed.
    if not starved or not idle or leaving:
        return ()
    first = min(starved, key=lambda r: (r.create_time, r.id))
    need = Need(snapshot.versions[first.version].runtime, first.resources, first.constraints, first.digest)
    on: dict[str, list[Replica]] = defaultdict(list)
    nodes_of: dict[str, set[str]] = defaultdict(set)
    for replica in snapshot.replicas.values():
        if replica.placed:
            on[replica.node].append(replica)
            nodes_of[replica.deployment].add(replica.node)
    tasks: dict[str, list[Task]] = defaultdict(list)
    for task in snapshot.tasks.values():
        tasks[task.node].append(task)
    gone: list[str] = []
    for name in idle:
        gone.append(name)
        for node in sorted(nodes_of[name]):
            left = [r for r in on[node] if r.deployment not in gone]
            if isinstance(check(usage_of(snapshot.nodes[node], [*left, *tasks[node]]), need), Placement):
                there = {r.deployment for r in on[node]}
                return [name for name in gone if name in there]
    return ()
