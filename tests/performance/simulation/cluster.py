"""A small cluster that lives through everything, driven by `plan`, from a seed."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from penstock_scheduler.domain.deployment import Deployment, DeploymentState, Spec, Target
from penstock_scheduler.domain.job import JobState, ObservedTask, Order, Stop
from penstock_scheduler.domain.node import Node, NodeState, Report
from penstock_scheduler.domain.planner import Plan, Snapshot, plan
from penstock_scheduler.domain.project import Project
from penstock_scheduler.domain.replica import Observed, Replica, ReplicaState
from penstock_scheduler.domain.resources import Batching
from penstock_scheduler.domain.version import Version, VersionKey
from performance.simulation import machines, rules, work
from performance.simulation.ledger import Ledger

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
VERSIONS = tuple(
    Version(VersionKey(model, number), f"{index:064x}", runtime, size_bytes=index * machines.GIB)
    for index, (model, number, runtime) in enumerate(
        [("big", 1, "torch"), ("big", 2, "torch"), ("small", 1, "onnx"), ("own", 1, "python")], 1
    )
)


@dataclass(frozen=True, slots=True)
class Size:
    """How large a simulated cluster is, and how long it lives.

    Attributes:
        nodes: machines.
        deployments: names that owners deploy under.
        jobs: that wait or run at once, at most.
        replicas: of one target at most.
        steps: passes of the scheduler, a second each.
    """

    nodes: int = 12
    deployments: int = 10
    jobs: int = 8
    replicas: int = 6
    steps: int = 60


@dataclass(slots=True)
class Tally:
    """What one life was.

    Attributes:
        steps: passes of the scheduler.
        decisions: nodes, replicas and deployments that plans changed.
        placed: replicas that got a place.
        started: attempts of jobs that got their places.
        yielded: jobs that made room for replicas.
        surged: replicas that were beyond a quota until their predecessors had ended.
        faults: how often something went wrong.
        seconds: what the planner took in all.
    """

    steps: int = 0
    decisions: int = 0
    placed: int = 0
    started: int = 0
    yielded: int = 0
    surged: int = 0
    faults: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Machine:
    """One node as it really is.

    Attributes:
        node: what its agent says of it.
        up: whether it is there.
        late: steps until the scheduler hears what it says.
        processes: what runs on it, by replica.
        tasks: likewise of jobs, by task.
        wanted: what it was told last of tasks.
        mail: desired states on their way to it: the step of arrival, replicas with whether they drain, tasks.
        said: its reports on their way, in the order they were sent: the step of arrival, and the report.
        heard_at: step at which it was last heard of.
    """

    node: Node
    up: bool = True
    late: int = 0
    processes: dict[str, Observed] = field(default_factory=dict)
    tasks: dict[str, ObservedTask] = field(default_factory=dict)
    wanted: dict[str, Order] = field(default_factory=dict)
    mail: deque[tuple[int, dict[str, bool], dict[str, Order]]] = field(default_factory=deque)
    said: deque[tuple[int, Report]] = field(default_factory=deque)
    heard_at: int = 0


class Cluster:
    """Owners, operators, agents and faults around the planner.

    Args:
        seed: of everything that happens.
        size: how large it is.
        planner: what is tested.
    """

    def __init__(self, seed: int, size: Size, planner: Callable[[Snapshot], Plan] = plan) -> None:
        self._plan = planner
        self._random = random.Random(seed)
        self._size = size
        self._step = 0
        self._uids = 0
        self.tally = Tally()
        shapes = [machines.choose(self._random, machines.MIXED) for _ in range(size.nodes)]
        self._machines = {
            node.name: Machine(node) for node in (self._node(n, shape) for n, shape in enumerate(shapes))
        }
        self.snapshot = Snapshot(
            BEGIN,
            "0",
            versions={version.key: version for version in VERSIONS},
            projects=work.projects(self._random),
        )
        self._ledger = Ledger(self.snapshot.projects)

    def live(self) -> Tally:
        """Live through faults, then in peace until nothing changes.

        Raises:
            Breach: a rule did not hold, at any step.
        """
        for _ in range(self._size.steps):
            self._owners()
            self._operators()
            self._jobs()
            self._faults()
            self._pass(peace=False)
        for machine in self._machines.values():
            machine.up, machine.late = True, 0
            machine.said.clear()
        for name, node in self.snapshot.nodes.items():
            self._say(name, replace(node, cordoned=False, draining=False))
        quiet = 0
        for _ in range(180):
            changed = self._pass(peace=True)
            turns = (job.not_before for job in self.snapshot.jobs.values())
            # A job that failed waits for its turn; nothing happens until then.
            patient = any(turn is not None and turn >= self.snapshot.now for turn in turns)
            quiet = 0 if changed or patient else quiet + 1
            if quiet == 3:
                rules.in_the_end(self.snapshot)
                return self.tally
        raise rules.Breach("it never settles")

    # -- what happens -----------------------------------------------------------------------------

    def _owners(self) -> None:
        """Somebody deploys, updates, scales with the load, or deletes."""
        for name in (f"d{n}" for n in range(self._size.deployments)):
            if self._random.random() > 0.12:
                continue
            old = self.snapshot.deployments.get(name)
            if old is None:
                self._uids += 1
                now = self.snapshot.now
                project = self._random.choice(work.NAMES)
                self._deploy(Deployment(name, self._spec(), now, now, uid=self._uids, project=project))
            elif old.state is DeploymentState.DELETING:
                continue
            elif self._random.random() < 0.15:
                self._deploy(old.advance(DeploymentState.DELETING, self.snapshot.now))
            elif self._random.random() < 0.1:
                self._move(old, self._random.choice(work.NAMES))
            elif self._random.random() < 0.5:
                # The load changed.
                count = self._random.randint(1, self._size.replicas)
                self._deploy(old.ask(replace(old.asked, replicas=count), self.snapshot.now, "load"))
            else:
                self._deploy(old.ask(self._spec(), self.snapshot.now, "owner"))

    def _operators(self) -> None:
        for name, node in self.snapshot.nodes.items():
            if self._random.random() < 0.02:
                cordoned = self._random.random() < 0.6
                draining = cordoned and self._random.random() < 0.5
                self._say(name, replace(node, cordoned=cordoned, draining=draining))
        for name, project in self.snapshot.projects.items():
            if name != work.UNBOUNDED and self._random.random() < 0.03:
                # Below what is held, too.
                self._put(replace(project, quota=work.quota(self._random)))

    def _jobs(self) -> None:
        """Somebody queues a job, or cancels one."""
        for _ in range(self._size.jobs - len(self.snapshot.jobs)):
            if self._random.random() < 0.1:
                self._uids += 1
                project = self._random.choice(work.NAMES)
                made = work.job(self._random, f"j{self._uids}", project, self.snapshot.now)
                self.snapshot = replace(self.snapshot, jobs={**self.snapshot.jobs, made.id: made})
        for job in self.snapshot.jobs.values():
            if self._random.random() < 0.005:
                cancelled = replace(job, cancelling=True)
                self.snapshot = replace(self.snapshot, jobs={**self.snapshot.jobs, job.id: cancelled})

    def _faults(self) -> None:
        for number, machine in enumerate(self._machines.values()):
            chance = self._random.random()
            if chance < 0.03:
                machine.up = False
                machine.processes.clear()
                machine.tasks.clear()
                machine.wanted.clear()
                machine.mail.clear()
            elif chance < 0.05:
                machine.late = self._random.randint(1, 12)
            elif chance < 0.06:
                # It comes back as another machine under its name.
                machine.processes.clear()
                machine.tasks.clear()
                machine.wanted.clear()
                machine.node = self._node(number, machines.choose(self._random, machines.MIXED))
            elif chance < 0.2:
                machine.up = True
                continue
            else:
                continue
            self.tally.faults += 1
        for machine in self._machines.values():
            for id_, process in machine.processes.items():
                if self._random.random() < 0.02:
                    self.tally.faults += 1
                    machine.processes[id_] = replace(
                        process, state=ReplicaState.BACKOFF, message="boom", restarts=process.restarts + 1
                    )

    # -- one pass ---------------------------------------------------------------------------------

    def _pass(self, *, peace: bool) -> bool:
        """Agents work, the scheduler hears them, plans, and tells them; whether it changed anything."""
        self._step += 1
        for machine in self._machines.values():
            if machine.up:
                self._work(machine, peace=peace)
        snapshot = replace(
            self.snapshot,
            now=self.snapshot.now + timedelta(seconds=1),
            seed=str(self._step),
            reports=self._heard(),
        )
        began = time.perf_counter()
        changes = self._plan(snapshot)
        self.tally.seconds += time.perf_counter() - began
        self._count(snapshot, changes)
        self.snapshot = rules.never(snapshot, changes)
        self._ledger.carry_out(snapshot, changes)
        if self._step % 16 == 0 and self._plan(snapshot) != changes:
            raise rules.Breach("the same snapshot gave two plans")
        self._tell(peace=peace)
        return bool(changes)

    def _work(self, machine: Machine, *, peace: bool) -> None:
        """An agent does what it was told last, and says what it has."""
        while machine.mail and machine.mail[0][0] <= self._step:
            _, desired, machine.wanted = machine.mail.popleft()
            processes = {id_: seen for id_, seen in machine.processes.items() if id_ in desired}
            for id_, draining in desired.items():
                seen = processes.get(id_)
                if draining:
                    if seen is not None and (peace or self._random.random() < 0.5):
                        processes[id_] = replace(seen, state=ReplicaState.STOPPED, pid=0)
                elif seen is None or seen.state is ReplicaState.STOPPED:
                    processes[id_] = Observed(ReplicaState.STARTING, pid=self._step)
            machine.processes = processes
        for id_, seen in machine.processes.items():
            if seen.state in (ReplicaState.STARTING, ReplicaState.BACKOFF) and (
                peace or self._random.random() < 0.5
            ):
                machine.processes[id_] = replace(seen, state=ReplicaState.READY, message="", pid=self._step)
        machine.tasks = work.work(self._random, machine.tasks, machine.wanted, peace=peace)
        if not peace and self._random.random() < 0.1:
            return  # the message is lost
        report = Report(machine.node, dict(machine.processes), tasks=dict(machine.tasks))
        # Those on one stream do not overtake each other.
        arrival = max([self._step + machine.late, *(at for at, _ in machine.said)])
        machine.said.append((arrival, report))
        if not peace and self._random.random() < 0.05:
            machine.said.append((arrival, report))
        machine.late = max(0, machine.late - 1)

    def _heard(self) -> dict[str, Report]:
        reports = dict(self.snapshot.reports)
        for name, machine in self._machines.items():
            while machine.said and machine.said[0][0] <= self._step:
                reports[name] = machine.said.popleft()[1]
                machine.heard_at = self._step
            if name in reports:
                silent = float(self._step - machine.heard_at)
                reports[name] = replace(reports[name], attached=machine.up, silent_seconds=silent)
        return reports

    def _tell(self, *, peace: bool) -> None:
        """Every agent is sent all that it should run; some of that is lost, late or repeated."""
        desired: dict[str, dict[str, bool]] = {name: {} for name in self._machines}
        for replica in self.snapshot.replicas.values():
            if replica.node:
                desired[replica.node][replica.id] = replica.state is ReplicaState.DRAINING
        tasks = work.told(self.snapshot)
        for name, machine in self._machines.items():
            known = self.snapshot.nodes.get(name)
            if not machine.up or known is None or known.state is NodeState.LOST:
                continue
            if peace:
                machine.mail.clear()
            elif self._random.random() < 0.1:
                continue
            late = 0 if peace else self._random.choice([0, 0, 0, 1, 3])
            arrival = max([self._step + late, *(at for at, _, _ in machine.mail)])
            machine.mail.append((arrival, desired[name], tasks.get(name, {})))
            if not peace and self._random.random() < 0.05:
                machine.mail.append((arrival, desired[name], tasks.get(name, {})))

    # -- helpers ----------------------------------------------------------------------------------

    def _node(self, number: int, shape: machines.Shape) -> Node:
        cached = frozenset(v.digest for v in VERSIONS if self._random.random() < 0.2)
        disk = self._random.choice([0, 4, 100]) * machines.GIB
        return replace(machines.node(number, shape, cached), disk_bytes=disk, disk_bytes_free=disk)

    def _spec(self) -> Spec:
        choice = self._random.sample(VERSIONS, self._random.choice([1, 1, 1, 2]))
        weights = [100] if len(choice) == 1 else [80, 20]
        targets = tuple(
            Target(version.key.model, weight, version.key.number)
            for version, weight in zip(choice, weights, strict=True)
        )
        resources = machines.needs(self._random)
        if resources.gpu_memory_bytes and self._random.random() < 0.3:
            millis = self._random.choice([100, 250, 333, 500])
            resources = replace(resources, gpu_memory_bytes=0, gpu_memory_millis=millis)
        if self._random.random() < 0.3:
            resources = replace(resources, disk_bytes=self._random.randint(1, 5) * machines.GIB)
        batching = self._random.choice([None, None, Batching(8)])
        return Spec(targets, self._random.randint(1, self._size.replicas), resources, batching)

    def _deploy(self, deployment: Deployment) -> None:
        deployments = {**self.snapshot.deployments, deployment.name: deployment}
        self.snapshot = replace(self.snapshot, deployments=deployments)

    def _move(self, deployment: Deployment, project: str) -> None:
        """Moves a deployment, if the quota of the other project has room for it, as the API sees to."""
        if self._ledger.may_move(self.snapshot, deployment, project):
            moved = replace(deployment, project=project, revision=deployment.revision + 1)
            self._ledger.move(self.snapshot, deployment, project)
            self._deploy(moved)

    def _put(self, project: Project) -> None:
        self.snapshot = replace(self.snapshot, projects={**self.snapshot.projects, project.name: project})
        self._ledger.bound(project)

    def _say(self, name: str, node: Node) -> None:
        self.snapshot = replace(self.snapshot, nodes={**self.snapshot.nodes, name: node})

    def _count(self, before: Snapshot, changes: Plan) -> None:
        self.tally.steps += 1
        self.tally.decisions += len(changes.nodes) + len(changes.replicas) + len(changes.deployments)
        new = [replica for replica in changes.replicas if _newly_placed(before, replica)]
        self.tally.placed += len(new)
        self.tally.surged += sum(replica.surge for replica in new)
        self.tally.started += sum(job.state is JobState.STARTING for job in changes.jobs)
        self.tally.yielded += sum(
            job.stop is Stop.YIELD and before.jobs[job.id].state is not JobState.STOPPING
            for job in changes.jobs
        )


def _newly_placed(before: Snapshot, replica: Replica) -> bool:
    old = before.replicas.get(replica.id)
    return replica.placed and (old is None or not old.placed)
