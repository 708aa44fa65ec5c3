"""What the planner does with a snapshot; no I/O anywhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from penstock_scheduler.domain.deployment import Deployment, DeploymentState, Spec, Target
from penstock_scheduler.domain.node import Device, DeviceKind, Node, NodeState, Report
from penstock_scheduler.domain.planner import Snapshot, plan
from penstock_scheduler.domain.replica import Observed, Replica, ReplicaState
from penstock_scheduler.domain.resources import MIB, Batching, Resources
from penstock_scheduler.domain.version import Version, VersionKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GIB = 1024 * MIB


def version(number: int = 1, model: str = "digits", *, runtime: str = "torch", **traits: object) -> Version:
    return Version(VersionKey(model, number), f"{number:064x}", runtime, size_bytes=MIB, **traits)  # type: ignore[arg-type]


def node(name: str = "a", *, gpus: int = 0, gpu_memory: int = 16 * GIB, **traits: object) -> Node:
    traits = {
        "cpu_millis": 4000,
        "memory_bytes": 8 * GIB,
        "runtimes": ("torch",),
        "last_seen_time": NOW,
    } | traits
    devices = tuple(Device(f"gpu{i}", DeviceKind.GPU, memory_bytes=gpu_memory) for i in range(gpus))
    return Node(name, devices=devices, **traits)  # type: ignore[arg-type]


def deployment(name: str = "d", *targets: Target, replicas: int = 1, **traits: object) -> Deployment:
    spec = Spec(targets or (Target("digits", 100, 1),), replicas, **traits)  # type: ignore[arg-type]
    return Deployment(name, spec, NOW, NOW, uid=1)


class World:
    """A cluster in memory that carries plans out and, when told so, starts what is placed."""

    def __init__(self, nodes: list[Node], deployments: list[Deployment], versions: list[Version]) -> None:
        self.snapshot = Snapshot(
            NOW,
            "seed0",
            {n.name: n for n in nodes},
            {d.name: d for d in deployments},
            {},
            {v.key: v for v in versions},
            {n.name: Report(n) for n in nodes},
        )
        self.plans = 0

    def step(self, seconds: float = 0.0) -> bool:
        """Plans once and carries it out; whether anything changed."""
        self.plans += 1
        self.snapshot = replace(
            self.snapshot, now=self.snapshot.now + timedelta(seconds=seconds), seed=f"seed{self.plans}"
        )
        changes = plan(self.snapshot)
        self.snapshot = changes.after(self.snapshot)
        return bool(changes)

    def see(self, **states: ReplicaState) -> None:
        """Lets every agent report its replicas: READY (STOPPED when draining) unless told otherwise by id."""
        for name in self.snapshot.nodes:
            seen = {}
            for replica in self.on(name):
                draining = replica.state is ReplicaState.DRAINING
                state = ReplicaState.STOPPED if draining else ReplicaState.READY
                seen[replica.id] = Observed(states.get(replica.id, state), "boom", pid=7)
            self.report(name, replicas=seen)

    def report(self, name: str, **fields: object) -> None:
        report = replace(self.snapshot.reports[name], **fields)  # type: ignore[arg-type]
        self.snapshot = replace(self.snapshot, reports={**self.snapshot.reports, name: report})

    def change(self, name: str = "d", **fields: object) -> None:
        """Asks for something else."""
        old = self.snapshot.deployments[name]
        new = old.ask(replace(old.asked, **fields), self.snapshot.now, "ann")  # type: ignore[arg-type]
        self.snapshot = replace(self.snapshot, deployments={**self.snapshot.deployments, name: new})

    def run(self) -> None:
        """Lets everything happen that happens by itself."""
        for _ in range(10):
            changed = self.step()
            self.see()
            if not changed and not self.step():
                return
        raise AssertionError("it never settles")

    def on(self, name: str) -> list[Replica]:
        return [r for r in self.snapshot.replicas.values() if r.node == name and r.placed]

    @property
    def replicas(self) -> list[Replica]:
        return list(self.snapshot.replicas.values())

    def deployment(self, name: str = "d") -> Deployment:
        return self.snapshot.deployments[name]


def states(world: World) -> Counter[tuple[int, ReplicaState]]:
    return Counter((r.version.number, r.state) for r in world.replicas)


def test_a_deployment_becomes_ready_and_the_next_plan_is_empty() -> None:
    world = World([node()], [deployment(replicas=2)], [version()])
    world.step()
    assert states(world) == {(1, ReplicaState.STARTING): 2}
    assert world.deployment().state is DeploymentState.PENDING
    world.see()
    world.step()
    assert states(world) == {(1, ReplicaState.READY): 2}
    assert world.deployment().state is DeploymentState.READY
    assert world.deployment().serving == world.deployment().asked
    assert not world.step()


def test_replicas_spread_over_nodes() -> None:
    world = World([node("a"), node("b"), node("c")], [deployment(replicas=6)], [version()])
    world.run()
    assert {name: len(world.on(name)) for name in "abc"} == {"a": 2, "b": 2, "c": 2}


def test_a_node_that_caches_the_bundle_is_preferred() -> None:
    caching = node("z", cached_digests=frozenset({version().digest}))
    world = World([node("a"), caching], [deployment()], [version()])
    world.run()
    assert len(world.on("z")) == 1


def test_gpus_are_packed_and_cpu_work_stays_away_from_them() -> None:
    gpu = Resources(gpus=1, gpu_memory_bytes=4 * GIB)
    world = World(
        [node("a", gpus=2), node("b", gpus=2), node("c")],
        [deployment("d1", resources=gpu), deployment("d2", resources=gpu), deployment("cpu")],
        [version()],
    )
    world.run()
    first, second = (r for r in world.replicas if r.resources.gpus)
    assert (first.node, first.devices) == (second.node, second.devices)
    (third,) = (r for r in world.replicas if not r.resources.gpus)
    assert (third.node, third.devices) == ("c", ("cpu",))


def test_a_gpu_asked_for_without_memory_is_held_alone() -> None:
    alone = Resources(gpus=1)
    shared = Resources(gpus=1, gpu_memory_bytes=GIB)
    world = World(
        [node("a", gpus=2)],
        [
            deployment("d1", resources=alone),
            deployment("d2", resources=shared),
            deployment("d3", resources=alone),
        ],
        [version()],
    )
    world.run()
    held = {r.deployment: r.devices for r in world.replicas if r.placed}
    assert len(held) == 2
    # The largest come first of those that come together.
    assert held["d1"] != held["d3"]
    (waiting,) = (r for r in world.replicas if r.state is ReplicaState.PENDING)
    assert waiting.message == (
        "No node has room for it. The closest, nodes/a, lacks GPUs with 1024 MiB free "
        "(needs 1, has 0 such of 2)."
    )


def test_who_waits_longer_goes_first_however_large_others_are() -> None:
    whole, part = Resources(gpus=1), Resources(gpus=1, gpu_memory_bytes=GIB)
    world = World([], [deployment("small", resources=part)], [version()])
    world.step()
    late = deployment("large", resources=whole)
    world.snapshot = replace(
        world.snapshot,
        now=NOW + timedelta(seconds=1),
        deployments={**world.snapshot.deployments, "large": late},
        nodes={"a": node("a", gpus=1)},
        reports={"a": Report(node("a", gpus=1))},
    )
    world.run()
    assert [r.deployment for r in world.on("a")] == ["small"]


def test_a_waiting_replica_names_the_closest_node_and_what_lacks() -> None:
    small, smaller = node("small", memory_bytes=2 * GIB), node("smaller", memory_bytes=GIB)
    wants = deployment(resources=Resources(memory_bytes=3 * GIB))
    world = World([small, smaller, node("lost", state=NodeState.LOST, runtimes=())], [wants], [version()])
    world.report("lost", attached=False, silent_seconds=99.0)
    world.run()
    (replica,) = world.replicas
    assert replica.state is ReplicaState.PENDING
    assert replica.message == (
        "No node has room for it. The closest, nodes/small, lacks 1024 MiB of memory "
        "(needs 3072 MiB, 2048 MiB free of 2048 MiB)."
    )
    assert replica.message in world.deployment().message


def test_a_runtime_that_no_node_has_is_said() -> None:
    for runtime, setting in (("python", "ALLOW_PYTHON_RUNTIME"), ("script", "ALLOW_USER_CODE")):
        world = World([node()], [deployment()], [version(runtime=runtime)])
        world.run()
        (replica,) = world.replicas
        words = f"lacks the runtime {runtime} (it runs torch; an operator may set PENSTOCK_{setting}=true)"
        assert words in replica.message


def test_without_any_node_it_waits_for_a_worker() -> None:
    world = World([], [deployment()], [version()])
    world.run()
    (replica,) = world.replicas
    assert replica.message == "No node is attached; start a worker."
    assert world.deployment().state is DeploymentState.PENDING


def test_room_that_appears_is_used() -> None:
    wants = deployment(replicas=2, resources=Resources(cpu_millis=100))
    world = World([node("a", cpu_millis=100)], [wants], [version()])
    world.run()
    assert states(world) == {(1, ReplicaState.READY): 1, (1, ReplicaState.PENDING): 1}
    assert world.deployment().state is DeploymentState.DEGRADED
    world.report("a", node=node("a", cpu_millis=200))
    world.run()
    assert states(world) == {(1, ReplicaState.READY): 2}
    assert world.deployment().state is DeploymentState.READY


def test_earlier_targets_answer_until_every_new_one_does() -> None:
    world = World([node()], [deployment()], [version(1), version(2), version(3)])
    world.run()
    old = world.deployment().serving
    world.change(targets=(Target("digits", 50, 2), Target("digits", 50, 3)))
    world.step()
    (second,) = (r for r in world.replicas if r.version.number == 2)
    (third,) = (r for r in world.replicas if r.version.number == 3)
    world.see(**{third.id: ReplicaState.STARTING})
    world.step()
    assert world.snapshot.replicas[second.id].state is ReplicaState.READY
    assert world.deployment().serving == old
    assert world.deployment().state is DeploymentState.UPDATING
    assert states(world)[1, ReplicaState.READY] == 1
    world.see()
    world.step()
    assert world.deployment().serving == world.deployment().asked
    assert states(world)[1, ReplicaState.DRAINING] == 1
    world.run()
    assert states(world) == {(2, ReplicaState.READY): 1, (3, ReplicaState.READY): 1}


def test_a_new_target_that_cannot_load_leaves_the_old_one_serving() -> None:
    world = World([node()], [deployment()], [version(1), version(2)])
    world.run()
    old = world.deployment().serving
    world.change(targets=(Target("digits", 100, 2),))
    world.step()
    (bad,) = (r for r in world.replicas if r.version.number == 2)
    for _ in range(3):
        world.see(**{bad.id: ReplicaState.BACKOFF})
        world.step(seconds=30)
    now = world.deployment()
    assert now.serving == old
    assert now.state is DeploymentState.UPDATING
    assert "boom" in now.message
    world.change(targets=(Target("digits", 100, 1),))
    world.run()
    assert world.deployment().state is DeploymentState.READY
    assert states(world) == {(1, ReplicaState.READY): 1}


def test_a_change_of_weights_switches_at_once_and_starts_nothing() -> None:
    both = (Target("digits", 90, 1), Target("digits", 10, 2))
    world = World([node()], [deployment("d", *both)], [version(1), version(2)])
    world.run()
    before = {r.id for r in world.replicas}
    world.change(targets=(Target("digits", 10, 1), Target("digits", 90, 2)))
    world.step()
    assert world.deployment().serving == world.deployment().asked
    assert world.deployment().state is DeploymentState.READY
    assert {r.id for r in world.replicas} == before


def test_a_change_of_resources_or_batching_replaces_replicas_new_before_old() -> None:
    for change in ({"resources": Resources(cpu_millis=500)}, {"batching": Batching(8, 100)}):
        world = World([node()], [deployment()], [version()])
        world.run()
        (old,) = world.replicas
        world.change(**change)
        world.step()
        assert states(world) == {(1, ReplicaState.READY): 1, (1, ReplicaState.STARTING): 1}
        world.run()
        (new,) = world.replicas
        assert new.id != old.id
        assert new.group != old.group


def test_fewer_replicas_drain_where_they_crowd_and_not_those_that_answer() -> None:
    world = World([node("a"), node("b")], [deployment(replicas=4)], [version()])
    world.run()
    broken = world.on("a")[0]
    world.see(**{broken.id: ReplicaState.BACKOFF})
    world.step()
    world.change(replicas=2)
    world.run()
    assert len(world.on("a")) == len(world.on("b")) == 1
    assert broken.id not in world.snapshot.replicas


def test_replicas_of_a_lost_node_are_placed_elsewhere() -> None:
    world = World([node("a"), node("b")], [deployment(replicas=2)], [version()])
    world.run()
    world.report("a", attached=False, silent_seconds=2.9)
    assert not world.step()
    world.report("a", attached=False, silent_seconds=3.1)
    world.step()
    assert world.snapshot.nodes["a"].state is NodeState.LOST
    assert len(world.on("b")) == 2
    world.report("a", attached=True, silent_seconds=0.0)
    world.run()
    assert world.snapshot.nodes["a"].state is NodeState.READY
    assert len(world.on("b")) == 2


def test_of_a_lost_node_the_last_word_is_written_down() -> None:
    world = World([node("a")], [], [])
    world.step(seconds=30)
    world.report("a", attached=False, silent_seconds=10.0)
    world.step()
    lost = world.snapshot.nodes["a"]
    assert lost.state is NodeState.LOST
    assert lost.last_seen_time == world.snapshot.now - timedelta(seconds=10)


def test_a_silent_agent_with_an_open_stream_gets_more_time() -> None:
    world = World([node()], [deployment()], [version()])
    world.run()
    world.report("a", silent_seconds=8.0)
    assert not world.step()
    world.report("a", silent_seconds=9.1)
    world.step()
    assert world.snapshot.nodes["a"].state is NodeState.LOST


def test_a_node_without_a_word_since_the_scheduler_began_keeps_its_replicas_for_its_lease() -> None:
    world = World([node()], [deployment()], [version()])
    world.run()
    silent = Report(None, attached=False, silent_seconds=1.0)
    world.snapshot = replace(world.snapshot, reports={"a": silent})
    assert not world.step()
    assert states(world) == {(1, ReplicaState.READY): 1}


def test_an_agent_that_was_restarted_starts_its_replicas_again() -> None:
    world = World([node()], [deployment()], [version()])
    world.run()
    (before,) = world.replicas
    world.report("a", replicas={})
    world.step()
    (after,) = world.replicas
    assert (after.id, after.state) == (before.id, ReplicaState.BACKOFF)
    world.run()
    assert states(world) == {(1, ReplicaState.READY): 1}


def test_a_node_that_came_back_smaller_gives_its_replicas_up() -> None:
    gpu = Resources(gpus=1, gpu_memory_bytes=4 * GIB)
    world = World([node("a", gpus=1), node("b", gpus=1)], [deployment(resources=gpu)], [version()])
    world.run()
    assert len(world.on("a")) == 1
    world.report("a", node=node("a", gpus=0))
    world.step()
    assert not world.on("a")
    assert len(world.on("b")) == 1


def test_a_version_that_never_loads_makes_the_deployment_failed_until_it_does() -> None:
    world = World([node()], [deployment()], [version()])
    world.step()
    (replica,) = world.replicas
    world.see(**{replica.id: ReplicaState.BACKOFF})
    world.step()
    assert world.deployment().state is DeploymentState.FAILED
    assert "boom" in world.deployment().message
    world.see(**{replica.id: ReplicaState.STARTING})
    world.step()
    assert world.deployment().state is DeploymentState.FAILED
    world.run()
    assert world.deployment().state is DeploymentState.READY
    assert world.deployment().message == ""


def test_a_crash_degrades_and_only_a_lasting_one_fails() -> None:
    world = World([node()], [deployment()], [version()])
    world.run()
    (replica,) = world.replicas
    world.see(**{replica.id: ReplicaState.BACKOFF})
    world.step(seconds=1)
    assert world.deployment().state is DeploymentState.DEGRADED
    world.step(seconds=6)
    assert world.deployment().state is DeploymentState.FAILED
    world.run()
    assert world.deployment().state is DeploymentState.READY


def test_a_deleted_deployment_drains_and_is_removed() -> None:
    world = World([node()], [deployment(replicas=2)], [version()])
    world.run()
    doomed = world.deployment().advance(DeploymentState.DELETING, NOW)
    world.snapshot = replace(world.snapshot, deployments={"d": doomed})
    world.step()
    assert states(world) == {(1, ReplicaState.DRAINING): 2}
    world.run()
    assert not world.snapshot.replicas
    assert not world.snapshot.deployments


def test_new_defaults_replace_replicas_new_before_old() -> None:
    world = World([node()], [deployment()], [version()])
    world.run()
    (old,) = world.replicas
    fat = version(resources=Resources(memory_bytes=GIB))
    world.snapshot = replace(world.snapshot, versions={fat.key: fat})
    world.step()
    assert world.snapshot.replicas[old.id].state is ReplicaState.READY
    world.run()
    (new,) = world.replicas
    assert new.id != old.id


def test_a_heartbeat_alone_changes_nothing_until_it_is_a_minute_old() -> None:
    world = World([node()], [], [])
    world.run()
    assert not world.step(seconds=30)
    assert world.step(seconds=31)
    assert not world.step()


def test_ids_of_replicas_are_short_enough_for_the_longest_deployment() -> None:
    world = World([node()], [deployment("d" * 63, replicas=20)], [version(2**31 - 1)])
    longest = Target("digits", 100, 2**31 - 1)
    world.change("d" * 63, targets=(longest,))
    world.step()
    assert len(world.replicas) == 20
    assert max(len(r.id) for r in world.replicas) <= 63
