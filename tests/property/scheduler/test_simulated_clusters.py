"""Small clusters live through faults, and no rule is broken; `make bench-scheduler` has more of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from penstock_scheduler.domain.job import JobState
from penstock_scheduler.domain.planner import Plan, Snapshot, plan
from penstock_scheduler.domain.project import NOTHING
from penstock_scheduler.domain.replica import ReplicaState
from performance.simulation import many
from performance.simulation.cluster import Cluster, Size
from performance.simulation.rules import Breach

SEEDS = 16


@pytest.mark.parametrize("first", range(0, SEEDS, 8))
def test_clusters_keep_every_rule_through_faults_and_settle_after_them(first: int, seed: int) -> None:
    lives = many.run(range(seed + first, seed + first + 8), Size(), 1, print)
    assert not lives.breaches
    # They lived: places were given, and things went wrong.
    assert lives.tally.placed > 100
    assert lives.tally.faults > 100
    assert lives.tally.started > 50
    assert lives.tally.yielded > 5
    assert lives.tally.surged > 20


def on_one_node(snapshot: Snapshot) -> Plan:
    """Put everything that is new where the first of it went."""
    changes = plan(snapshot)
    new = [r for r in changes.replicas if r.state is ReplicaState.STARTING and not r.pid]
    moved = {r.id: replace(r, node=new[0].node) for r in new}
    return replace(changes, replicas=tuple(moved.get(r.id, r) for r in changes.replicas))


def without_devices(snapshot: Snapshot) -> Plan:
    """Place without saying where on the node."""
    changes = plan(snapshot)
    return replace(changes, replicas=tuple(replace(r, devices=()) for r in changes.replicas))


def lazy(snapshot: Snapshot) -> Plan:
    """Place at most one replica of a deployment on a node."""
    changes = plan(snapshot)
    taken = {(r.deployment, r.node) for r in snapshot.replicas.values() if r.placed}
    replicas = []
    for replica in changes.replicas:
        old = snapshot.replicas.get(replica.id)
        if replica.placed and (old is None or not old.placed):
            if (replica.deployment, replica.node) in taken:
                waits = replace(replica, node="", devices=(), message="Later.")
                replica = replace(waits, state=ReplicaState.PENDING)
            taken.add((replica.deployment, replica.node))
        replicas.append(replica)
    return replace(changes, replicas=tuple(replicas))


def half_a_gang(snapshot: Snapshot) -> Plan:
    """Start jobs with the first of their tasks only."""
    changes = plan(snapshot)
    new = {job.id for job in changes.jobs if job.state is JobState.STARTING and job.gang.least > 1}
    return replace(changes, tasks=tuple(t for t in changes.tasks if t.job not in new or t.index == 0))


def without_quotas(snapshot: Snapshot) -> Plan:
    """Let every project hold what it wants."""
    free = {name: replace(project, quota=NOTHING) for name, project in snapshot.projects.items()}
    return plan(replace(snapshot, projects=free))


@pytest.mark.parametrize("planner", [on_one_node, without_devices, lazy, half_a_gang, without_quotas])
def test_a_planner_that_errs_is_found_out(planner: Callable[[Snapshot], Plan]) -> None:
    with pytest.raises(Breach):
        for number in range(5):
            Cluster(number, Size(), planner).live()
