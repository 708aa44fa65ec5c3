"""What must hold of every plan, counted in another way than the planner does."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from penstock_scheduler.domain.deployment import DeploymentState
from penstock_scheduler.domain.job import Job, JobState, Task, TaskState
from penstock_scheduler.domain.node import CPU_DEVICE, Node, NodeState
from penstock_scheduler.domain.planner import Plan, Snapshot
from penstock_scheduler.domain.planner.feasible import (
    Need,
    Placement,
    Rejection,
    Usage,
    check,
    closest,
    usage_of,
)
from penstock_scheduler.domain.planner.gangs import need_of, room_for
from penstock_scheduler.domain.planner.snapshot import groups_of
from penstock_scheduler.domain.project import Holding, Project, charge
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import DEFAULTS, Resources


class Breach(AssertionError):
    """A rule was broken; the words say which, and where."""


def never(before: Snapshot, changes: Plan) -> Snapshot:
    """Check one plan; return the snapshot after it.

    Raises:
        Breach: a rule does not hold.
    """
    after = changes.after(before)
    _changed_replicas(before, changes)
    on: dict[str, list[Replica | Task]] = defaultdict(list)
    for task in after.tasks.values():
        if task.placed:
            on[task.node].append(task)
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
    _gangs(before, changes, after)
    _no_job_where_a_replica_waits(before, changes, after)
    return after


def in_the_end(snapshot: Snapshot) -> None:
    """Check a cluster in which nothing new happens and every agent works: whatever fits runs.

    Raises:
        Breach: something does not run that could, or nobody says why it does not.
    """
    usages = _usages(snapshot)
    held = _held(snapshot)
    reasons: dict[Need, str] = {}
    for replica in snapshot.replicas.values():
        if replica.state is ReplicaState.READY:
            continue
        if replica.state is not ReplicaState.PENDING:
            raise Breach(f"{replica.id} is still {replica.state.name}")
        runtime = snapshot.versions[replica.version].runtime
        need = Need(runtime, replica.resources, replica.constraints, replica.digest)
        project = snapshot.projects[snapshot.deployments[replica.deployment].project]
        if "quota" in replica.message:
            asks = [_least(replica.resources, snapshot), *_asks(usages, need, snapshot)]
            if not any(_barred(project, held[project.name], ask) for ask in asks):
                raise Breach(f"{replica.id} waits for {replica.message!r}, though the quota has room")
            continue
        if need not in reasons:
            verdicts = [check(usage, need) for usage in usages]
            for verdict in verdicts:
                if isinstance(verdict, Placement):
                    raise Breach(f"{replica.id} waits, though {verdict.usage.node.name} has room for it")
            nearest = closest(v for v in verdicts if isinstance(v, Rejection))
            reasons[need] = "" if nearest is None else f"nodes/{nearest.node}, lacks {nearest.lacks}"
        if reasons[need] not in replica.message or not replica.message:
            raise Breach(f"{replica.id} waits for {replica.message!r}, not for {reasons[need]!r}")
    for job in snapshot.jobs.values():
        if job.state is not JobState.QUEUED:
            raise Breach(f"{job.id} is still {job.state.name}")
        _waits_for_a_reason(job, snapshot, usages, held)
    for deployment in snapshot.deployments.values():
        if deployment.state is DeploymentState.DELETING:
            raise Breach(f"{deployment.name} is not gone")
        if deployment.state is DeploymentState.READY and deployment.serving != deployment.asked:
            raise Breach(f"{deployment.name} is READY, but serves something else than it should")


def _waits_for_a_reason(
    job: Job, snapshot: Snapshot, usages: Sequence[Usage], held: Mapping[str, Holding]
) -> None:
    """No job holds anything any more: one that waits has no room, or no quota."""
    project = snapshot.projects[job.project]
    count = job.fewest
    if not job.message:
        raise Breach(f"{job.id} waits, and nobody says why")
    if "quota" in job.message:
        need = need_of(job.gang)
        asks = [_least(need.resources, snapshot), *_asks(usages, need, snapshot)]
        barred = any(_barred(project, held[project.name], ask.times(count)) for ask in asks)
        # What is kept for the first of its project counts, too.
        if not barred and "come first" not in job.message:
            raise Breach(f"{job.id} waits for {job.message!r}, though the quota has room")
    elif room_for(usages, need_of(job.gang), count) >= count and "whose turn is first" not in job.message:
        raise Breach(f"{job.id} waits for {job.message!r}, though there is room for it")


def _least(resources: Resources, snapshot: Snapshot) -> Holding:
    """What it counts on the largest GPU that there is."""
    largest = max((gpu.memory_bytes for node in snapshot.nodes.values() for gpu in node.gpus), default=0)
    return charge(resources, [largest] * resources.gpus)


def _asks(usages: Sequence[Usage], need: Need, snapshot: Snapshot) -> list[Holding]:
    """What it counts at each place that there is for it."""
    places = (check(usage, need) for usage in usages)
    return [
        charge(need.resources, [each.usage.sizes[name] for name in each.devices if need.resources.gpus])
        for each in places
        if isinstance(each, Placement)
    ]


def _barred(project: Project, held: Holding, asks: Holding) -> bool:
    """Whether a quota has no room."""
    return any(
        bound and ask and have + ask > bound
        for bound, have, ask in zip(project.quota, held, asks, strict=True)
    )


def _usages(snapshot: Snapshot) -> list[Usage]:
    things = (*snapshot.replicas.values(), *snapshot.tasks.values())
    return [
        usage_of(node, (thing for thing in things if thing.node == node.name))
        for node in snapshot.nodes.values()
    ]


def _held(snapshot: Snapshot) -> Mapping[str, Holding]:
    """What each project holds, successors that surge included."""
    sizes = {(n.name, gpu.id): gpu.memory_bytes for n in snapshot.nodes.values() for gpu in n.gpus}
    held = dict.fromkeys(snapshot.projects, Holding())
    for thing in (*snapshot.replicas.values(), *snapshot.tasks.values()):
        if thing.placed:
            owner = (
                snapshot.jobs[thing.job]
                if isinstance(thing, Task)
                else snapshot.deployments[thing.deployment]
            )
            own = (sizes.get((thing.node, device), 0) for device in thing.devices if thing.resources.gpus)
            held[owner.project] = held[owner.project].plus(charge(thing.resources, own))
    return held


def _gangs(before: Snapshot, changes: Plan, after: Snapshot) -> None:
    """All tasks of a job are placed, or none."""
    working: dict[str, list[Task]] = defaultdict(list)
    for task in after.tasks.values():
        if task.placed:
            working[task.job].append(task)
        if task.placed != bool(task.node) and task.state is not TaskState.STOPPED:
            raise Breach(f"{task.id} is {task.state.name} on node {task.node!r}")
    for job in changes.jobs:
        if job.state is JobState.STARTING and before.jobs[job.id].state is JobState.QUEUED:
            old = before.jobs[job.id]
            count = len(working[job.id])
            if not old.fewest <= count <= job.gang.tasks:
                raise Breach(f"{job.id} was started with {count} of its {job.gang.tasks} tasks")
            if {task.index for task in working[job.id]} != set(range(count)):
                raise Breach(f"the tasks of {job.id} are not numbered from 0")
            nodes = {**before.nodes, **{node.name: node for node in changes.nodes}}
            for task in working[job.id]:
                node = nodes[task.node]
                if node.state is not NodeState.READY or node.cordoned or node.draining:
                    raise Breach(f"{task.id} was placed on {node.name}, which takes nothing")
    for job_id, tasks in working.items():
        if job_id not in after.jobs:
            raise Breach(f"{tasks[0].id} is left of a job that has ended")
        job = after.jobs[job_id]
        if job.state is JobState.QUEUED or job.ended:
            raise Breach(f"{job_id} is {job.state.name}, but {tasks[0].id} holds something")
        if len({task.attempt for task in tasks}) > 1:
            raise Breach(f"{job_id} has tasks of two attempts")
    for job in after.jobs.values():
        if job.state in (JobState.STARTING, JobState.RUNNING) and not working[job.id]:
            raise Breach(f"{job.id} is {job.state.name}, but holds nothing")


def _no_job_where_a_replica_waits(before: Snapshot, changes: Plan, after: Snapshot) -> None:
    """A job never takes room that a replica would have got in a moment; and none makes room in vain."""
    started = {
        job.id
        for job in changes.jobs
        if job.state is JobState.STARTING and before.jobs[job.id].state is JobState.QUEUED
    }
    waiting = [
        replica
        for replica in after.replicas.values()
        if replica.state is ReplicaState.PENDING and replica.message.startswith("No node has room")
    ]
    # Of several that wait one may have been promised what another would need.
    if len(waiting) > 1:
        return
    if not waiting:
        if any("has no other place" in job.message and _yields(before, job) for job in changes.jobs):
            raise Breach("a job makes room, and no replica waits")
        return
    for name in {task.node for task in after.tasks.values() if task.job in started and task.placed}:
        staying = [replica for replica in after.replicas.values() if replica.node == name and replica.wanted]
        there = [
            task
            for task in after.tasks.values()
            if task.node == name
            and task.placed
            and after.jobs[task.job].state in (JobState.STARTING, JobState.RUNNING)
        ]
        with_new = usage_of(after.nodes[name], [*staying, *there])
        without = usage_of(after.nodes[name], [*staying, *(t for t in there if t.job not in started)])
        for replica in waiting:
            need = Need(
                before.versions[replica.version].runtime,
                replica.resources,
                replica.constraints,
                replica.digest,
            )
            had = isinstance(check(without, need), Placement)
            if had and not isinstance(check(with_new, need), Placement) and not _elsewhere(after, need):
                raise Breach(f"a job took the place on {name} that {replica.id} waits for")


def _elsewhere(after: Snapshot, need: Need) -> bool:
    """Whether a node has room once all that ends has ended."""
    for node in after.nodes.values():
        staying = [r for r in after.replicas.values() if r.node == node.name and r.wanted]
        going = [
            task
            for task in after.tasks.values()
            if task.node == node.name
            and task.placed
            and after.jobs[task.job].state in (JobState.STARTING, JobState.RUNNING)
        ]
        if isinstance(check(usage_of(node, [*staying, *going]), need), Placement):
            return True
    return False


def _yields(before: Snapshot, job: Job) -> bool:
    return job.state is JobState.STOPPING and before.jobs[job.id].state is not JobState.STOPPING


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


def _within(node: Node, held: Sequence[Replica | Task]) -> None:
    if sum(r.resources.cpu_millis for r in held) > node.cpu_millis:
        raise Breach(f"{node.name} gives out more processor than it has")
    if sum(r.resources.memory_bytes for r in held) > node.memory_bytes:
        raise Breach(f"{node.name} gives out more memory than it has")
    bundles = {(r.digest, r.resources.disk_bytes) for r in held}
    if node.disk_bytes and sum(disk for _, disk in bundles) > node.disk_bytes:
        raise Breach(f"{node.name} gives out more disk than it has")
    sizes = {gpu.id: gpu.memory_bytes for gpu in node.gpus}
    used: Counter[str] = Counter()
    holders: dict[str, list[Replica | Task]] = defaultdict(list)
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
