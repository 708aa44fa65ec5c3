"""`plan(snapshot) → Plan`: what should change, without changing it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from penstock_scheduler.domain.deployment import Deployment, DeploymentState
from penstock_scheduler.domain.job import Job, Task, TaskState
from penstock_scheduler.domain.node import Node, NodeState
from penstock_scheduler.domain.planner import drains, judge
from penstock_scheduler.domain.planner.ensembles import Obstacles, obstacles
from penstock_scheduler.domain.planner.feasible import Need, Placement, Usage, usage_of
from penstock_scheduler.domain.planner.fleet import Fleet
from penstock_scheduler.domain.planner.jobs import DEFAULT_JOB_POLICY, GROWS, JobDraft, JobPolicy
from penstock_scheduler.domain.planner.measure import measured
from penstock_scheduler.domain.planner.placing import Placer, Scene
from penstock_scheduler.domain.planner.snapshot import Group, Snapshot, groups_of
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import DEFAULTS, Defaults
from penstock_scheduler.domain.version import VersionKey


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator decided.

    Attributes:
        node_lease_seconds: a node whose stream ended is LOST after this long.
        node_silence_seconds: a node whose stream is open but silent is LOST after this long. More
            than the lease: a starved machine is late, not gone, and moving its replicas would not help it.
        last_seen_seconds: how old the stored `last_seen_time` of a node may grow.
        failing_seconds: a deployment that answered before is FAILED after so long without an answer.
        defaults: needs of replicas where nobody stated them.
        jobs: how long agents of jobs are waited for.
    """

    node_lease_seconds: float = 3.0
    node_silence_seconds: float = 9.0
    last_seen_seconds: float = 60.0
    failing_seconds: float = 5.0
    defaults: Defaults = DEFAULTS
    jobs: JobPolicy = DEFAULT_JOB_POLICY


DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Plan:
    """Objects as they should become; what is not named stays as it is.

    Attributes:
        nodes: new and changed nodes.
        replicas: new and changed replicas; those that became STOPPED hold nothing any more.
        deployments: changed deployments.
        removed: names of deployments whose last replica is gone.
        measured: the most memory that a READY replica of a version was seen to use, where that is news.
        jobs: changed jobs.
        tasks: new and changed tasks; those that became STOPPED hold nothing any more.
    """

    nodes: tuple[Node, ...] = ()
    replicas: tuple[Replica, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    removed: tuple[str, ...] = ()
    measured: tuple[tuple[VersionKey, int], ...] = ()
    jobs: tuple[Job, ...] = ()
    tasks: tuple[Task, ...] = ()

    def __bool__(self) -> bool:
        serving = self.replicas or self.deployments or self.removed or self.measured
        return bool(self.nodes or serving or self.jobs or self.tasks)

    def with_deployments(self, deployments: Iterable[Deployment]) -> Plan:
        """This plan with deployments that others changed before it was made; its own word counts."""
        own = {d.name for d in self.deployments}
        also = tuple(d for d in deployments if d.name not in own and d.name not in self.removed)
        return replace(self, deployments=self.deployments + also) if also else self

    def after(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot as it is once the plan has been carried out."""
        replicas = {**snapshot.replicas, **{r.id: r for r in self.replicas}}
        deployments = {**snapshot.deployments, **{d.name: d for d in self.deployments}}
        jobs = {**snapshot.jobs, **{j.id: replace(j, revision=j.revision + 1) for j in self.jobs}}
        tasks = {**snapshot.tasks, **{t.id: t for t in self.tasks}}
        return replace(
            snapshot,
            nodes={**snapshot.nodes, **{n.name: n for n in self.nodes}},
            replicas={k: r for k, r in replicas.items() if r.state is not ReplicaState.STOPPED},
            deployments={k: d for k, d in deployments.items() if k not in self.removed},
            versions={
                **snapshot.versions,
                **{k: replace(snapshot.versions[k], measured_memory_bytes=m) for k, m in self.measured},
            },
            jobs={k: j for k, j in jobs.items() if not j.ended or j.leftovers},
            tasks={k: t for k, t in tasks.items() if t.state is not TaskState.STOPPED},
        )


def plan(snapshot: Snapshot, policy: Policy = DEFAULT_POLICY) -> Plan:
    """Works out the changes that bring the cluster closer to what is asked for.

    Deterministic, does no I/O. Once its changes are carried out and nothing new happens, the next
    plan is empty.
    """
    draft = _Draft(snapshot, policy)
    draft.follow_nodes()
    draft.follow_replicas()
    draft.follow_jobs()
    draft.survey()
    while draft.switch():
        draft.survey()
    draft.scale()
    draft.place()
    draft.follow_drains()
    draft.judge()
    return draft.plan()


class _Draft:
    """The cluster as it would be, while the plan is made."""

    def __init__(self, snapshot: Snapshot, policy: Policy) -> None:
        self._snapshot = snapshot
        self._policy = policy
        self._now = snapshot.now
        self._nodes = dict(snapshot.nodes)
        self._deployments = dict(snapshot.deployments)
        self._removed: list[str] = []
        self._draining = False
        self._obstacles: Obstacles = {}
        self._asked: dict[str, dict[GroupKey, Group]] = {}
        self._serving: dict[str, dict[GroupKey, Group]] = {}
        for name, deployment in snapshot.deployments.items():
            if deployment.state is not DeploymentState.DELETING:
                asked, serving = deployment.sized(deployment.asked), deployment.sized(deployment.serving)
                groups = groups_of(asked, snapshot.versions, policy.defaults)
                self._asked[name] = self._serving[name] = groups
                if serving != asked:
                    self._serving[name] = groups_of(serving, snapshot.versions, policy.defaults)
        self._jobs = JobDraft(snapshot.jobs, snapshot.tasks, snapshot.now, policy.jobs)
        # The same replicas in three orders, and those that changed: `_write` alone changes any of them.
        self._replicas: dict[str, Replica] = {}
        self._of: dict[str, dict[str, Replica]] = defaultdict(dict)
        self._on: dict[str, dict[str, Replica]] = defaultdict(dict)
        self._changed: dict[str, None] = {}
        self._made: Counter[str] = Counter()
        self._unsettled: set[str] = set()
        self._whole: set[str] = set()
        pending, stopped = ReplicaState.PENDING, ReplicaState.STOPPED
        replicas, of, on = self._replicas, self._of, self._on
        for id_, replica in snapshot.replicas.items():
            state = replica.state
            if state is stopped:
                continue
            replicas[id_] = of[replica.deployment][id_] = on[replica.node][id_] = replica
            if state is pending or replica.surge:
                self._unsettled.add(id_)

    # -- stages, in order -------------------------------------------------------------------------

    def follow_nodes(self) -> None:
        """Takes up what agents say of their nodes; gives up nodes that are gone or became too small."""
        for name, report in self._snapshot.reports.items():
            known = self._nodes.get(name)
            lease = self._policy.node_silence_seconds if report.attached else self._policy.node_lease_seconds
            heard_at = self._now - timedelta(seconds=report.silent_seconds)
            if report.silent_seconds > lease:
                if known is not None and known.state is NodeState.READY:
                    seen_at = max(filter(None, (known.last_seen_time, heard_at)))
                    self._nodes[name] = replace(known, state=NodeState.LOST, last_seen_time=seen_at)
                    self._evict(name, f"nodes/{name} was not heard of for {lease:g} s.")
            elif report.node is not None:
                node = self._nodes[name] = self._refresh(known, report.node, heard_at)
                if node is known:
                    continue  # what it holds fitted when it was placed
                usage = self._usage(node)
                if not usage.fits_in_node() or (known is not None and usage.other_gpus(known)):
                    self._evict(name, f"nodes/{name} has less than it had; its work was placed anew.")

    def follow_replicas(self) -> None:
        """Takes up what agents say of their replicas."""
        for name, report in self._snapshot.reports.items():
            node = self._nodes.get(name)
            if report.node is None or node is None or node.state is not NodeState.READY:
                continue
            seen_there = report.replicas
            news = [
                replica
                for id_, replica in self._on[name].items()
                if (seen := seen_there.get(id_)) is None or not replica.is_known_as(seen)
            ]
            for replica in news:
                if replica.placed:
                    self._write(replica.observe(seen_there.get(replica.id), self._now))

    def follow_jobs(self) -> None:
        """Takes up what agents say of their tasks and the registry of results; moves jobs."""
        self._jobs.follow(self._snapshot.reports, self._nodes)
        self._jobs.move(self._snapshot.registry, self._nodes)

    def survey(self) -> None:
        """Looks which ensembles would not answer, because a step of theirs would not."""
        self._obstacles = obstacles(
            replace(self._snapshot, replicas=self._replicas, deployments=self._deployments)
        )

    def switch(self) -> bool:
        """Lets new targets answer, all at once, as soon as every one of them can; whether any began to."""
        switched = False
        for name, deployment in self._deployments.items():
            if deployment.state is DeploymentState.DELETING or deployment.serving == deployment.asked:
                continue
            if deployment.rollout is not None and not deployment.rollout.ended:
                continue  # its rollout says when
            serving = self._serving[name]
            if all(key in serving or self._answers(name, key) for key in self._asked[name]):
                self._deployments[name] = replace(deployment, serving=deployment.asked)
                self._serving[name] = self._asked[name]
                switched = True
        return switched

    def scale(self) -> None:
        """Makes replicas that are missing, and drains those that are not needed any more."""
        self._draining = any(node.draining for node in self._nodes.values())
        for name, deployment in self._deployments.items():
            if deployment.state is DeploymentState.DELETING:
                for replica in self._replicas_of(name):
                    self._drain(replica, "The deployment is being deleted.")
                if not self._replicas_of(name):
                    self._removed.append(name)
                continue
            if not self._draining and self._is_whole(name):
                self._whole.add(name)
                continue
            needed = dict(self._serving[name])
            for key, group in self._asked[name].items():
                other = needed.get(key)
                needed[key] = group if other is None or other.count < group.count else other
            by_group: dict[GroupKey, list[Replica]] = defaultdict(list)
            for replica in self._replicas_of(name):
                if replica.wanted:
                    by_group[replica.group].append(replica)
            for key, group in needed.items():
                self._scale_group(name, group, by_group.pop(key, []))
            for key, leftovers in by_group.items():
                # A spec may also change under a deployment that asks for the same (the operator's
                # defaults): its replicas too are replaced new before old.
                if not any(k.version == key.version and not self._answers(name, k) for k in needed):
                    for replica in leftovers:
                        self._drain(replica, "Its deployment asks for something else now.")

    def place(self) -> None:
        """Finds nodes for replicas that have none, then for jobs, or says why there are none."""
        unsettled = [self._replicas[id_] for id_ in sorted(self._unsettled)]
        waiting = [r for r in unsettled if r.state is ReplicaState.PENDING]
        if not waiting and not any(r.surge for r in unsettled) and not self._jobs.waiting():
            self._grow()
            return
        placer = self._placer()
        places = placer.replicas(waiting)
        for id_ in places.settled:
            self._write(replace(self._replicas[id_], surge=False))
        for id_, (place, surge) in places.found.items():
            self._put(self._replicas[id_], place, surge)
        for id_, why in places.reasons.items():
            if self._replicas[id_].message != why:
                self._write(replace(self._replicas[id_], message=why))
        if self._jobs.jobs:
            seating = placer.jobs()
            for job, seats in seating.places.items():
                self._jobs.seat(job, seats)
            self._jobs.explain(seating.reasons)

    def _grow(self) -> None:
        """Where nothing waits: has a job that goes on with fewer tasks than it asked for start with more."""
        smaller = self._jobs.smaller()
        if not smaller or self._draining:
            return
        placer = self._placer()
        growing = next((job for job in smaller if placer.has_room_for_more(job)), None)
        if growing is not None:  # One at a time: it may take the room of others.
            self._jobs.make_room(growing.id, GROWS)

    def _placer(self) -> Placer:
        scene = Scene(
            self._nodes,
            self._snapshot.reports,
            self._deployments,
            self._replicas,
            self._snapshot.replicas,
            self._asked,
            self._jobs,
            self._snapshot.projects,
            self._need,
        )
        return Placer(scene, Fleet(self._usage(node) for node in self._nodes.values()))

    def follow_drains(self) -> None:
        """Says of every node that is being drained what still keeps replicas there."""
        for name, node in self._nodes.items():
            message = ""
            if node.draining:
                here = [r for r in self._replicas_on(name) if r.wanted]
                groups = {(r.deployment, r.group) for r in here}
                heirs = [
                    r
                    for r in self._replicas.values()
                    if r.wanted and r.state is not ReplicaState.READY and (r.deployment, r.group) in groups
                ]
                message = drains.waits_for(here, [r for r in heirs if r.node != name])
                message = message or drains.waits_for_jobs(t.job for t in self._jobs.holding(name))
            if message != node.message:
                self._nodes[name] = replace(node, message=message)

    def judge(self) -> None:
        """Says where every deployment stands, and why."""
        obstacles: dict[str, dict[VersionKey, str]] = defaultdict(dict)
        for (owner, key), why in self._obstacles.items():
            obstacles[owner][key] = why
        for name, deployment in self._deployments.items():
            if name in self._whole and name not in obstacles and judge.is_settled(deployment):
                continue
            if deployment.state is not DeploymentState.DELETING:
                standing = judge.Standing(
                    deployment,
                    tuple(self._replicas_of(name)),
                    frozenset(self._asked[name]),
                    frozenset(self._serving[name]),
                    obstacles.get(name, {}),
                )
                self._deployments[name] = judge.judge(standing, self._now, self._policy.failing_seconds)

    def plan(self) -> Plan:
        """What differs from the snapshot."""
        old = self._snapshot
        return Plan(
            nodes=tuple(n for n in self._nodes.values() if _differs(old.nodes.get(n.name), n)),
            replicas=tuple(
                r for id_ in self._changed if _differs(old.replicas.get(id_), r := self._replicas[id_])
            ),
            deployments=tuple(
                d
                for d in self._deployments.values()
                if _differs(old.deployments[d.name], d) and d.name not in self._removed
            ),
            removed=tuple(self._removed),
            measured=measured(old, self._replicas.values()),
            jobs=self._jobs.changed_jobs(),
            tasks=self._jobs.changed_tasks(),
        )

    # -- helpers ----------------------------------------------------------------------------------

    def _refresh(self, known: Node | None, seen: Node, heard_at: datetime) -> Node:
        """The node as seen; as stored while only its `last_seen_time` differs, and that is young."""
        if known is None:
            return replace(seen, last_seen_time=heard_at)
        if known.last_seen_time is not None and known.looks_like(seen):
            age = (heard_at - known.last_seen_time).total_seconds()
            if age < self._policy.last_seen_seconds:
                return known
        return replace(known.described_by(seen), last_seen_time=heard_at)

    def _evict(self, node: str, why: str) -> None:
        for replica in self._replicas_on(node):
            self._write(replica.advance(ReplicaState.STOPPED, self._now, why))
        self._jobs.lose(node, why)

    def _usage(self, node: Node) -> Usage:
        return usage_of(node, [*self._replicas_on(node.name), *self._jobs.holding(node.name)])

    def _drain(self, replica: Replica, why: str) -> None:
        if replica.state is ReplicaState.PENDING:
            self._write(replica.advance(ReplicaState.STOPPED, self._now, why))
        elif replica.state is not ReplicaState.DRAINING:
            self._write(replica.advance(ReplicaState.DRAINING, self._now, why))

    def _scale_group(self, name: str, group: Group, have: list[Replica]) -> None:
        have = self._leave(group, have)
        if len(have) > group.count:
            crowd = Counter(replica.node for replica in have if replica.node)
            for _ in range(len(have) - group.count):
                victim = max(have, key=lambda r: (_EXPENDABLE[r.state], crowd[r.node], r.create_time, r.id))
                crowd[victim.node] -= 1
                have.remove(victim)
                self._drain(victim, "Fewer replicas are asked for.")
        for replica in have:
            if replica.state is ReplicaState.PENDING and replica.resources != group.resources:
                # What was measured meanwhile, of others of its version, holds for it too.
                self._write(replace(replica, resources=group.resources))
        for _ in range(group.count - len(have)):
            self._made[name] += 1
            replica = Replica(
                id=self._new_id(name, group, self._made[name]),
                deployment=name,
                group=group.key,
                digest=group.version.digest,
                resources=group.resources,
                batching=group.batching,
                constraints=group.constraints,
                create_time=self._now,
                update_time=self._now,
            )
            self._write(replica)

    def _leave(self, group: Group, have: list[Replica]) -> list[Replica]:
        """Drains what is not needed any more on nodes that are being drained; returns those elsewhere."""
        if not self._draining:
            return have
        leaving = [r for r in have if r.node and self._nodes[r.node].draining]
        if not leaving:
            return have
        staying = [r for r in have if not r.node or not self._nodes[r.node].draining]
        for replica in drains.dispensable(group.count, staying, leaving):
            self._drain(replica, f"nodes/{replica.node} is being drained.")
        return staying

    def _new_id(self, deployment: str, group: Group, ordinal: int) -> str:
        text = f"{self._snapshot.seed}/{deployment}/{ordinal}"
        token = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
        # An id has at most 63 characters, as its deployment's may have already.
        return f"{deployment[:40]}-{group.key.version.number}-{token}"

    def _need(self, replica: Replica) -> Need:
        runtime = self._snapshot.versions[replica.version].runtime
        return Need(runtime, replica.resources, replica.constraints, replica.digest)

    def _write(self, replica: Replica) -> None:
        """Takes a new or changed replica up."""
        id_ = replica.id
        self._replicas[id_] = replica
        self._changed[id_] = None
        if replica.state is ReplicaState.STOPPED:
            self._of[replica.deployment].pop(id_, None)
            self._on[replica.node].pop(id_, None)
            self._unsettled.discard(id_)
            return
        self._of[replica.deployment][id_] = self._on[replica.node][id_] = replica
        if replica.state is ReplicaState.PENDING or replica.surge:
            self._unsettled.add(id_)
        else:
            self._unsettled.discard(id_)

    def _put(self, replica: Replica, place: Placement, surge: bool) -> None:
        node = place.usage.node.name
        placed = replace(replica, node=node, devices=place.devices, surge=surge)
        self._write(placed.advance(ReplicaState.STARTING, self._now))

    def _is_whole(self, name: str) -> bool:
        """Whether a deployment has all that it asks for and nothing else, as most have at most times."""
        groups = self._asked[name]
        replicas = self._of[name]
        if self._serving[name] is not groups or len(groups) != 1:
            return False
        ((key, group),) = groups.items()
        ready = ReplicaState.READY
        return len(replicas) == group.count > 0 and all(
            replica.state is ready and replica.group == key for replica in replicas.values()
        )

    def _answers(self, name: str, key: GroupKey) -> bool:
        """Whether a group answers as well as it will for now: one is ready and none is about to be."""
        states = {r.state for r in self._replicas_of(name) if r.group == key}
        if (name, key.version) in self._obstacles:
            return False
        return ReplicaState.READY in states and ReplicaState.STARTING not in states

    def _replicas_on(self, node: str) -> list[Replica]:
        return [replica for replica in self._on[node].values() if replica.placed]

    def _replicas_of(self, deployment: str) -> list[Replica]:
        return list(self._of[deployment].values())


def _differs(old: object, new: object) -> bool:
    """Whether it changed; most objects of a plan are the snapshot's own."""
    return old is not new and old != new


_EXPENDABLE = {
    ReplicaState.PENDING: 3,
    ReplicaState.BACKOFF: 2,
    ReplicaState.STARTING: 1,
    ReplicaState.READY: 0,
}
"""Which replicas go first when there are too many."""
