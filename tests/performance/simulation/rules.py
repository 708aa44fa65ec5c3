"""What must hold of every plan, counted in another way than the planner does."""

from __future__ import annotations

from collections import Counter, defaultdict

from penstock_scheduler.domain.deployment import DeploymentState
from penstock_scheduler.domain.node import CPU_DEVICE, Node, NodeState
from penstock_scheduler.domain.planner import Plan, Snapshot
from penstock_scheduler.domain.planner.feasible import Need, Placement, Rejection, check, closest, usage_of
from penstock_scheduler.domain.planner.snapshot import groups_of
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import DEFAULTS


class Breach(AssertionError):
    """A rule was broken; the words say which, and where."""


def never(before: Snapshot, changes: Plan) -> Snapshot:
    """Check one plan; return the snapshot after it.

    Raises:
        Breach: a rule does not hold.
    """
    after = changes.after(before)
    _changed_replicas(before, changes)
    on: dict[str, list[Replica]] = defaultdict(list)
    for replica in after.replicas.values():
        _allocated_if_placed(replica)
        if replica.placed:
            on[replica.node].append(replica)
        if replica.deployment not in after.deployments:
            raise Breach(f"{replica.id} is left of a deployment that is gone")
    for name, held in on.items():
        node = after.nodes.get(name)
        if node is None:
            raise Breach(f"{held[0].id} is on {name}, which there is not")
        if node.state is NodeState.LOST:
            raise Breach(f"{held[0].id} holds a part of {name}, which is lost")
        _within(node, held)
    _not_too_many(after)
    return after


def in_the_end(snapshot: Snapshot) -> None:
    """Check a cluster in which nothing new happens and every agent works: whatever fits runs.

    Raises:
        Breach: something does not run that could, or nobody says why it does not.
    """
    usages = [
        usage_of(node, (r for r in snapshot.replicas.values() if r.node == node.name))
        for node in snapshot.nodes.values()
    ]
    reasons: dict[Need, str] = {}
    for replica in snapshot.replicas.values():
        if replica.state is ReplicaState.READY:
            continue
        if replica.state is not ReplicaState.PENDING:
            raise Breach(f"{replica.id} is still {replica.state.name}")
        runtime = snapshot.versions[replica.version].runtime
        need = Need(runtime, replica.resources, replica.constraints, replica.digest)
        if need not in reasons:
            verdicts = [check(usage, need) for usage in usages]
            for verdict in verdicts:
                if isinstance(verdict, Placement):
                    raise Breach(f"{replica.id} waits, though {verdict.usage.node.name} has room for it")
            nearest = closest(v for v in verdicts if isinstance(v, Rejection))
            reasons[need] = "" if nearest is None else f"nodes/{nearest.node}, lacks {nearest.lacks}"
        if reasons[need] not in replica.message or not replica.message:
            raise Breach(f"{replica.id} waits for {replica.message!r}, not for {reasons[need]!r}")
    for deployment in snapshot.deployments.values():
        if deployment.state is DeploymentState.DELETING:
            raise Breach(f"{deployment.name} is not gone")
        if deployment.state is DeploymentState.READY and deployment.serving != deployment.asked:
            raise Breach(f"{deployment.name} is READY, but serves something else than it should")


def _changed_replicas(before: Snapshot, changes: Plan) -> None:
    seen: set[str] = set()
    nodes = {**before.nodes, **{node.name: node for node in changes.nodes}}
    for replica in changes.replicas:
        if replica.id in seen:
            raise Breach(f"{replica.id} is changed twice in one plan")
        seen.add(replica.id)
        old = before.replicas.get(replica.id)
        if old is None:
            if before.deployments[replica.deployment].state is DeploymentState.DELETING:
                raise Breach(f"{replica.id} is new, though its deployment is being deleted")
            if replica.state is ReplicaState.STOPPED:
                raise Breach(f"{replica.id} was made to be stopped")
        if (old is None or old.state is ReplicaState.PENDING) and replica.placed:
            node = nodes[replica.node]
            if node.state is not NodeState.READY or node.cordoned or node.draining:
                raise Breach(f"{replica.id} was placed on {node.name}, which takes nothing")
            if before.versions[replica.version].runtime not in node.runtimes:
                raise Breach(f"{replica.id} was placed on {node.name}, which cannot run it")
        if (
            old is not None
            and old.placed
            and replica.placed
            and (old.node, old.devices)
            != (
                replica.node,
                replica.devices,
            )
        ):
            raise Breach(f"{replica.id} was moved while it runs")


def _allocated_if_placed(replica: Replica) -> None:
    if replica.placed != bool(replica.node):
        raise Breach(f"{replica.id} is {replica.state.name} on node {replica.node!r}")
    if not replica.placed:
        return
    gpus = [device for device in replica.devices if device != CPU_DEVICE]
    if len(set(gpus)) != replica.resources.gpus:
        raise Breach(f"{replica.id} needs {replica.resources.gpus} GPUs and has {replica.devices}")


def _within(node: Node, held: list[Replica]) -> None:
    if sum(r.resources.cpu_millis for r in held) > node.cpu_millis:
        raise Breach(f"{node.name} gives out more processor than it has")
    if sum(r.resources.memory_bytes for r in held) > node.memory_bytes:
        raise Breach(f"{node.name} gives out more memory than it has")
    bundles = {(r.digest, r.resources.disk_bytes) for r in held}
    if node.disk_bytes and sum(disk for _, disk in bundles) > node.disk_bytes:
        raise Breach(f"{node.name} gives out more disk than it has")
    sizes = {gpu.id: gpu.memory_bytes for gpu in node.gpus}
    used: Counter[str] = Counter()
    holders: dict[str, list[Replica]] = defaultdict(list)
    for replica in held:
        if replica.resources.gpus:
            for device in replica.devices:
                holders[device].append(replica)
                used[device] += replica.resources.gpu_bytes(sizes.get(device, 0))
    for device, users in holders.items():
        if device not in sizes:
            raise Breach(f"{users[0].id} holds {device} of {node.name}, which has none such")
        if used[device] > sizes[device]:
            raise Breach(f"{device} of {node.name} gives out more memory than it has")
        if len(users) > 1 and any(user.resources.exclusive for user in users):
            raise Breach(f"{device} of {node.name} is held alone by several")


def _not_too_many(after: Snapshot) -> None:
    """Of each group at most as many are wanted as are asked for, those on nodes that empty not counted."""
    counts: Counter[tuple[str, GroupKey]] = Counter()
    for replica in after.replicas.values():
        leaving = replica.node and after.nodes[replica.node].draining
        if replica.wanted and not leaving:
            counts[replica.deployment, replica.group] += 1
    most: Counter[tuple[str, GroupKey]] = Counter()
    for name, deployment in after.deployments.items():
        if deployment.state is not DeploymentState.DELETING:
            for spec in (deployment.asked, deployment.serving):
                for key, group in groups_of(spec, after.versions, DEFAULTS).items():
                    most[name, key] = max(most[name, key], group.count)
    for (name, key), count in counts.items():
        if after.deployments[name].state is DeploymentState.DELETING:
            raise Breach(f"{name} is being deleted, but wants replicas")
        # Groups that nobody asks for any more keep what they had until others answer.
        if count > most.get((name, key), count):
            raise Breach(f"{name} has {count} replicas of {key} and asks for {most[name, key]}")
