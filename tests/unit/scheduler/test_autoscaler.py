"""The loop's part of autoscaling, over snapshots: who is scaled, who makes room, who keeps a replica."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from penstock_kit.ensembles import Step
from penstock_scheduler.domain.autoscaling.evict import evicted
from penstock_scheduler.domain.autoscaling.settings import Autoscaling
from penstock_scheduler.domain.deployment import Deployment, DeploymentState, Spec, Target
from penstock_scheduler.domain.node import Node, NodeState
from penstock_scheduler.domain.planner import Snapshot, plan
from penstock_scheduler.domain.replica import Replica, ReplicaState
from penstock_scheduler.domain.resources import MIB, Resources
from penstock_scheduler.domain.traffic import Counts, Seen, TrafficKey
from penstock_scheduler.domain.version import Version, VersionKey
from penstock_scheduler.usecases.autoscaling import Autoscaler
from penstock_scheduler.usecases.traffic import Traffic

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FROM_ZERO = Autoscaling(0, 4, 0.05, 60.0, 30.0)


def model(name: str, *calls: str) -> Version:
    steps = tuple(Step(f"s{index}", call, {"x": "a"}, {"y": f"t{index}"}) for index, call in enumerate(calls))
    return Version(VersionKey(name, 1), "d" * 64, "torch", size_bytes=MIB, steps=steps)


def deployed(
    name: str, uid: int, scaling: Autoscaling | None = FROM_ZERO, memory_mib: int = 100
) -> Deployment:
    spec = Spec((Target(name, 100, 1),), 1, Resources(memory_bytes=memory_mib * MIB))
    ready = DeploymentState.READY
    return Deployment(name, spec, NOW, NOW, serving=spec, autoscaling=scaling, state=ready, uid=uid)


class World:
    """A scheduler's loop over one node, its clock, and one gateway."""

    def __init__(self, *deployments: Deployment, calls: dict[str, tuple[str, ...]] | None = None) -> None:
        self.now = 0.0
        self.traffic = Traffic(self, clock=lambda: self.now)
        self.traffic.follow(True)
        self.autoscaler = Autoscaler(self.traffic, clock=lambda: self.now)
        versions = [model(d.name, *(calls or {}).get(d.name, ())) for d in deployments]
        node = Node("a", cpu_millis=64000, memory_bytes=300 * MIB, runtimes=("torch",), last_seen_time=NOW)
        self.snapshot = Snapshot(
            NOW,
            "seed",
            {"a": replace(node, state=NodeState.READY)},
            {d.name: d for d in deployments},
            {},
            {v.key: v for v in versions},
        )

    def wake(self) -> None:
        """Implements `Wakeup`."""

    def look(self, seconds: float, **arrived: int) -> None:
        """Lets time pass, has the gateway report, and makes one pass; replicas are ready at once."""
        self.now += seconds
        self.traffic.report(
            "gateway",
            None,
            [
                Seen(TrafficKey(name, VersionKey(name, 1)), Counts(arrived=count, succeeded=count))
                for name, count in arrived.items()
            ],
        )
        snapshot, changed = self.autoscaler.scale(replace(self.snapshot, seed=str(self.now)), 1)
        self.snapshot = plan(snapshot).with_deployments(changed).after(snapshot)
        ready = {
            id_: replace(r, state=ReplicaState.READY) if r.state is ReplicaState.STARTING else r
            for id_, r in self.snapshot.replicas.items()
            if r.state is not ReplicaState.DRAINING
        }
        self.snapshot = replace(self.snapshot, replicas=ready)

    def replicas(self, name: str) -> list[Replica]:
        return [r for r in self.snapshot.replicas.values() if r.deployment == name]


def test_a_deployment_rests_when_nothing_came_and_one_without_autoscaling_never_does() -> None:
    world = World(deployed("a", 1), deployed("b", 2, None))
    world.look(0, a=0)
    assert len(world.replicas("a")) == len(world.replicas("b")) == 1
    world.look(59, a=1)
    world.look(59, a=1)
    assert len(world.replicas("a")) == 1
    world.look(2, a=1)
    assert not world.replicas("a")
    assert len(world.replicas("b")) == 1
    assert world.snapshot.deployments["a"].state is DeploymentState.READY
    world.look(1, a=2)
    assert len(world.replicas("a")) == 1


def test_what_an_ensemble_calls_keeps_a_replica_and_gets_one_back() -> None:
    world = World(deployed("step", 1), deployed("whole", 2), calls={"whole": ("step",)})
    world.look(0, step=0, whole=0)
    world.look(100, step=0, whole=0)
    assert len(world.replicas("step")) == 1
    assert not world.replicas("whole")
    alone = World(deployed("step", 1))
    alone.look(0, step=0)
    alone.look(100, step=0)
    assert not alone.replicas("step")
    alone.snapshot = replace(
        alone.snapshot,
        deployments={**alone.snapshot.deployments, "whole": deployed("whole", 2)},
        versions={**alone.snapshot.versions, VersionKey("whole", 1): model("whole", "step")},
    )
    alone.look(1, step=0)
    assert len(alone.replicas("step")) == 1


def test_a_settled_load_changes_nothing() -> None:
    world = World(deployed("a", 1))
    world.look(0, a=0)
    for second in range(1, 200):
        before = world.snapshot.deployments["a"]
        world.look(1, a=20 * second)
        assert second < 3 or world.snapshot.deployments["a"] == before


def test_another_leader_forgets_what_only_memory_had() -> None:
    world = World(deployed("a", 1))
    world.look(0, a=0)
    world.look(50, a=0)
    world.autoscaler.scale(world.snapshot, 2)
    world.look(30, a=0)
    assert len(world.replicas("a")) == 1


@pytest.mark.parametrize(("memory_mib", "gone"), [(150, ["a"]), (250, ["a", "b"]), (299, [])])
def test_the_longest_idle_make_room_and_no_more_of_them_than_it_takes(
    memory_mib: int, gone: list[str]
) -> None:
    # Of 300 MiB, a and b hold 100 each, and c, which works, 1 or 50.
    busy = 1 if memory_mib == 250 else 50
    world = World(deployed("a", 1), deployed("b", 2), deployed("c", 3, None, busy))
    world.look(0)
    late = deployed("late", 4, None, memory_mib)
    world.snapshot = replace(
        world.snapshot,
        deployments={**world.snapshot.deployments, "late": replace(late, serving=None)},
        versions={**world.snapshot.versions, VersionKey("late", 1): model("late")},
    )
    world.snapshot = plan(world.snapshot).after(world.snapshot)
    assert [r.state for r in world.replicas("late")] == [ReplicaState.PENDING]
    assert list(evicted(world.snapshot, ["a", "b"])) == gone
