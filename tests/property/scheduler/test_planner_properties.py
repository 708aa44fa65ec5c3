"""What must hold of the planner whatever happens: "never", and "in the end"."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock_scheduler.domain.deployment import Deployment, DeploymentState, Spec, Target
from penstock_scheduler.domain.node import Device, DeviceKind, Node, NodeState, Report
from penstock_scheduler.domain.planner import Plan, Snapshot, plan
from penstock_scheduler.domain.replica import Observed, Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.routes import routes_of
from penstock_scheduler.domain.version import Version, VersionKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)
UNIT = 1024**3
NODES = ("n1", "n2", "n3")
NAMES = ("d1", "d2", "d3", "d4")
RUNTIMES = ("torch", "onnx")

VERSIONS = {
    v.key: v
    for v in (
        Version(VersionKey("m", 1), f"{1:064x}", "torch"),
        Version(VersionKey("m", 2), f"{2:064x}", "torch"),
        Version(VersionKey("x", 1), f"{3:064x}", "onnx"),
    )
}

needs = st.builds(
    lambda cpu, memory, gpus, share, disk: Resources(
        cpu * 500,
        memory * UNIT,
        gpus,
        share * UNIT if gpus and share < 100 else 0,
        share if gpus and share >= 100 else 0,
        disk * UNIT,
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0, 0, 0, 1, 1, 2]),
    st.sampled_from([0, 2, 5, 300]),
    st.sampled_from([0, 0, 2]),
)
targets = st.lists(st.sampled_from(sorted(VERSIONS)), min_size=1, max_size=2, unique=True).map(
    lambda keys: tuple(
        Target(key.model, weight, key.number)
        for key, weight in zip(keys, [100] if len(keys) == 1 else [70, 30], strict=True)
    )
)
specs = st.builds(
    Spec, targets, st.integers(1, 4), needs, st.sampled_from([None, Batching(4), Batching(8, 100)])
)


@st.composite
def machines(draw: st.DrawFn, name: str) -> Node:
    gpus = draw(st.sampled_from([0, 0, 1, 2]))
    return Node(
        name,
        cpu_millis=draw(st.integers(0, 8)) * 500,
        memory_bytes=draw(st.integers(0, 10)) * UNIT,
        devices=tuple(Device(f"gpu{i}", DeviceKind.GPU, memory_bytes=8 * UNIT) for i in range(gpus)),
        runtimes=draw(st.sampled_from([RUNTIMES, ("torch",)])),
        cached_digests=frozenset(draw(st.lists(st.sampled_from([f"{n:064x}" for n in (1, 2, 3)])))),
        disk_bytes=draw(st.sampled_from([0, 3, 5])) * UNIT,
    )


class Cluster(RuleBasedStateMachine):
    """Agents, owners and the planner take turns in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = Snapshot(NOW, "0", versions=VERSIONS)
        self.truth: dict[str, Observed] = {}  # what really runs, by replica
        self.steps = 0
        self.gone: set[int] = set()  # uids of deployments that were deleted
        self.uids = 0
        self.served: set[str] = set()

    # -- what happens -----------------------------------------------------------------------------

    @initialize(node=machines("n1"))
    def first_node(self, node: Node) -> None:
        self._report(node)

    @rule(node=st.sampled_from(NODES).flatmap(machines))
    def attach(self, node: Node) -> None:
        self._report(node)

    @rule(name=st.sampled_from(NODES), silent=st.sampled_from([1.0, 4.0, 60.0]))
    def vanish(self, name: str, silent: float) -> None:
        report = self.snapshot.reports.get(name)
        if report is not None:
            self._reports(name, replace(report, attached=False, silent_seconds=silent))
            self.truth = {
                id_: seen for id_, seen in self.truth.items() if self.snapshot.replicas[id_].node != name
            }

    @rule(name=st.sampled_from(NAMES), spec=specs)
    def ask(self, name: str, spec: Spec) -> None:
        old = self.snapshot.deployments.get(name)
        if old is None:
            self.uids += 1
            new = Deployment(name, spec, self.snapshot.now, self.snapshot.now, uid=self.uids)
        elif old.state is DeploymentState.DELETING:
            return
        else:
            new = old.ask(spec, self.snapshot.now, "ann")
        self._deployment(new)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        old = self.snapshot.deployments.get(name)
        if old is not None and old.state is not DeploymentState.DELETING:
            self.gone.add(old.uid)
            self._deployment(old.advance(DeploymentState.DELETING, self.snapshot.now))

    @rule(name=st.sampled_from(NODES), cordoned=st.booleans(), draining=st.booleans())
    def operate(self, name: str, cordoned: bool, draining: bool) -> None:
        """An operator cordons, drains or lifts both."""
        node = self.snapshot.nodes.get(name)
        if node is not None:
            told = replace(node, cordoned=cordoned or draining, draining=draining)
            self.snapshot = replace(self.snapshot, nodes={**self.snapshot.nodes, name: told})

    @rule(data=st.data())
    def agents_work(self, data: st.DataObject) -> None:
        """Every replica comes to some state that an agent may report."""
        for replica in self.snapshot.replicas.values():
            if replica.placed and self._attached(replica.node):
                states = [ReplicaState.STARTING, ReplicaState.READY, ReplicaState.READY, ReplicaState.BACKOFF]
                if replica.state is ReplicaState.DRAINING:
                    states = [ReplicaState.DRAINING, ReplicaState.STOPPED]
                self.truth[replica.id] = Observed(data.draw(st.sampled_from(states)), pid=1)
        self._tell()

    @rule(seconds=st.sampled_from([0, 1, 10, 100]))
    def think(self, seconds: int) -> None:
        self._think(seconds)

    @rule()
    @precondition(lambda self: self.snapshot.deployments)
    def in_the_end(self) -> None:
        """Once everybody works and nothing new happens, all that fits runs and plans are empty."""
        for _ in range(12):
            for replica in self.snapshot.replicas.values():
                if replica.placed and self._attached(replica.node):
                    draining = replica.state is ReplicaState.DRAINING
                    state = ReplicaState.STOPPED if draining else ReplicaState.READY
                    self.truth[replica.id] = Observed(state, pid=1)
            self._tell()
            if not self._think(10):
                break
        else:
            raise AssertionError("it never settles")
        assert not self._think(0)
        lost = [n.name for n in self.snapshot.nodes.values() if n.state is NodeState.LOST]
        for replica in self.snapshot.replicas.values():
            assert replica.state in (ReplicaState.PENDING, ReplicaState.READY) or replica.node in [
                n for n in NODES if n not in lost and not self._attached(n)
            ], replica
            if replica.state is ReplicaState.PENDING:
                assert replica.message
                assert not self._fits_anywhere(replica), replica
        for deployment in self.snapshot.deployments.values():
            if deployment.state is DeploymentState.READY:
                assert deployment.serving == deployment.asked

    # -- what must never happen -------------------------------------------------------------------

    @invariant()
    def nothing_is_given_out_twice(self) -> None:
        for node in self.snapshot.nodes.values():
            held = [r for r in self.snapshot.replicas.values() if r.node == node.name and r.placed]
            assert sum(r.resources.cpu_millis for r in held) <= node.cpu_millis
            assert sum(r.resources.memory_bytes for r in held) <= node.memory_bytes
            bundles = {(r.digest, r.resources.disk_bytes) for r in held}
            assert not node.disk_bytes or sum(disk for _, disk in bundles) <= node.disk_bytes
            gpus = {gpu.id: gpu.memory_bytes for gpu in node.gpus}
            users: Counter[str] = Counter()
            for replica in held:
                if replica.resources.gpus:
                    assert len(set(replica.devices)) == replica.resources.gpus
                    for device in replica.devices:
                        users[device] += 1
                        size = next(gpu.memory_bytes for gpu in node.gpus if gpu.id == device)
                        gpus[device] -= replica.resources.gpu_bytes(size)
            assert all(left >= 0 for left in gpus.values())
            for replica in held:
                if replica.resources.exclusive:
                    assert all(users[device] == 1 for device in replica.devices)
            if node.state is NodeState.LOST:
                assert not held

    @invariant()
    def a_part_of_a_node_is_held_by_what_is_placed_and_by_nothing_else(self) -> None:
        for replica in self.snapshot.replicas.values():
            assert replica.placed == bool(replica.node) == bool(replica.devices)
            assert replica.deployment in self.snapshot.deployments

    @invariant()
    def the_routes_are_those_of_what_serves(self) -> None:
        for route in routes_of(self.snapshot):
            deployment = self.snapshot.deployments[route.deployment]
            weights = {(t.version.key.model, t.version.key.number): t.weight for t in route.targets}
            total = sum(weights.values())
            assert total == (0 if deployment.state is DeploymentState.DELETING else 100)
            if route.deployment in self.served and deployment.state is not DeploymentState.DELETING:
                assert deployment.serving is not None

    # -- helpers ----------------------------------------------------------------------------------

    def _think(self, seconds: float) -> bool:
        self.steps += 1
        before = self.snapshot
        snapshot = replace(
            before, now=before.now + timedelta(seconds=seconds), seed=str(self.steps), reports=before.reports
        )
        changes = plan(snapshot)
        assert changes == plan(snapshot), "the same snapshot gave two plans"
        note(f"{changes}")
        self._check(snapshot, changes)
        self.snapshot = changes.after(snapshot)
        for name in changes.removed:
            self.served.discard(name)
        self.truth = {i: seen for i, seen in self.truth.items() if i in self.snapshot.replicas}
        self.served.update(d.name for d in self.snapshot.deployments.values() if d.serving is not None)
        return bool(changes)

    def _check(self, before: Snapshot, changes: Plan) -> None:
        for replica in changes.replicas:
            deployment = before.deployments[replica.deployment]
            if replica.id not in before.replicas:
                assert deployment.uid not in self.gone, "a deleted deployment got a replica"
            old = before.replicas.get(replica.id)
            if replica.placed and (old is None or not old.placed):
                node = before.nodes.get(replica.node)
                assert node is None or not node.cordoned, "something new on a node that takes nothing"
            if replica.state is ReplicaState.DRAINING and deployment.state is not DeploymentState.DELETING:
                self._drained_for_a_reason(before, changes, replica)

    def _drained_for_a_reason(self, before: Snapshot, changes: Plan, replica: Replica) -> None:
        """A replica that answers for what serves is not drained before what replaces it answers."""
        old = before.replicas[replica.id]
        if old.state is not ReplicaState.READY:
            return
        after = changes.after(before)
        deployment = after.deployments[replica.deployment]
        if deployment.serving is None:
            return  # it never answered for all of its targets; another start was asked for
        if replica.version in {t.version for t in deployment.serving.targets}:
            rest = [
                r
                for r in after.replicas.values()
                if r.deployment == replica.deployment
                and r.version == replica.version
                and r.state is ReplicaState.READY
            ]
            assert rest, "the last replica that answered was drained"

    def _report(self, node: Node) -> None:
        self.truth = {
            id_: seen for id_, seen in self.truth.items() if self.snapshot.replicas[id_].node != node.name
        }
        self._reports(node.name, Report(node))

    def _tell(self) -> None:
        for name, report in self.snapshot.reports.items():
            if report.attached:
                mine = {
                    id_: seen for id_, seen in self.truth.items() if self.snapshot.replicas[id_].node == name
                }
                self._reports(name, replace(report, replicas=mine))

    def _reports(self, name: str, report: Report) -> None:
        self.snapshot = replace(self.snapshot, reports={**self.snapshot.reports, name: report})

    def _deployment(self, deployment: Deployment) -> None:
        self.snapshot = replace(
            self.snapshot, deployments={**self.snapshot.deployments, deployment.name: deployment}
        )

    def _attached(self, name: str) -> bool:
        report = self.snapshot.reports.get(name)
        return report is not None and report.attached

    def _fits_anywhere(self, replica: Replica) -> bool:
        """Whether a node has room, counted anew and in another way than the planner does."""
        for node in self.snapshot.nodes.values():
            if node.state is not NodeState.READY:
                continue
            if node.cordoned or node.draining:
                continue
            if self.snapshot.versions[replica.version].runtime not in node.runtimes:
                continue
            held = [r for r in self.snapshot.replicas.values() if r.node == node.name and r.placed]
            free_gpus = 0
            for gpu in node.gpus:
                users = [r for r in held if r.resources.gpus and gpu.id in r.devices]
                share = replica.resources.gpu_bytes(gpu.memory_bytes)
                if not share:
                    free_gpus += not users
                elif not any(r.resources.exclusive for r in users):
                    free = gpu.memory_bytes - sum(r.resources.gpu_bytes(gpu.memory_bytes) for r in users)
                    free_gpus += free >= share
            bundles = {(r.digest, r.resources.disk_bytes) for r in (*held, replica)}
            if (
                sum(r.resources.cpu_millis for r in held) + replica.resources.cpu_millis <= node.cpu_millis
                and sum(r.resources.memory_bytes for r in held) + replica.resources.memory_bytes
                <= node.memory_bytes
                and free_gpus >= replica.resources.gpus
                and (not node.disk_bytes or sum(disk for _, disk in bundles) <= node.disk_bytes)
            ):
                return True
        return False


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
