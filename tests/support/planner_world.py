"""A cluster in memory that carries plans out, with agents that do what they are told at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from penstock_scheduler.domain.deployment import Deployment, Spec, Target
from penstock_scheduler.domain.job import Gang, Job, JobState, ObservedTask, Order, Task, TaskState
from penstock_scheduler.domain.node import Device, DeviceKind, Node, Report
from penstock_scheduler.domain.planner import Snapshot, plan
from penstock_scheduler.domain.project import Project
from penstock_scheduler.domain.replica import Observed, Replica, ReplicaState
from penstock_scheduler.domain.resources import MIB, Resources
from penstock_scheduler.domain.version import Version, VersionKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GIB = 1024 * MIB
CORE = Resources(cpu_millis=1000, memory_bytes=GIB)


def version(number: int = 1, model: str = "digits", *, runtime: str = "torch") -> Version:
    """A version with a digest of its own."""
    return Version(VersionKey(model, number), f"{number:064x}", runtime, size_bytes=MIB)


def node(name: str = "a", *, cores: int = 4, gpus: int = 0, gpu_memory: int = 16 * GIB) -> Node:
    """A machine."""
    devices = tuple(Device(f"gpu{i}", DeviceKind.GPU, memory_bytes=gpu_memory) for i in range(gpus))
    return Node(name, cores * 1000, 64 * GIB, devices, runtimes=("torch",), last_seen_time=NOW)


def deployment(
    name: str = "d",
    *,
    project: str = "default",
    number: int = 1,
    replicas: int = 1,
    resources: Resources = CORE,
    seconds: int = 0,
) -> Deployment:
    """A deployment, asked for some seconds after NOW."""
    made = NOW + timedelta(seconds=seconds)
    spec = Spec((Target("digits", 100, number),), replicas, resources)
    return Deployment(name, spec, made, made, uid=1, project=project)


def job(
    name: str,
    *,
    tasks: int = 1,
    least: int = 0,
    cores: float = 1,
    project: str = "default",
    priority: int = 0,
    seconds: float = 0,
    resources: Resources | None = None,
) -> Job:
    """A job, queued some seconds after NOW."""
    made = NOW + timedelta(seconds=seconds)
    needs = resources or Resources(cpu_millis=round(cores * 1000), memory_bytes=GIB)
    return Job(name, made, made, project, priority, Gang(tasks, least or tasks, needs))


class PlannerWorld:
    """Nodes, deployments, jobs and projects around `plan`.

    Args:
        nodes: all are attached.
        deployments: what is served.
        jobs: what waits.
        projects: those that are not named have no quota.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        deployments: Iterable[Deployment] = (),
        jobs: Iterable[Job] = (),
        projects: Iterable[Project] = (),
    ) -> None:
        machines = list(nodes)
        versions = [version(number) for number in (1, 2, 3)]
        self.snapshot = Snapshot(
            NOW,
            "seed0",
            {n.name: n for n in machines},
            {d.name: d for d in deployments},
            {},
            {v.key: v for v in versions},
            {n.name: Report(n) for n in machines},
            jobs={j.id: j for j in jobs},
            projects={p.name: p for p in projects},
        )
        self.plans = 0

    def step(self, seconds: float = 1.0) -> bool:
        """Plans once and carries it out; whether anything changed."""
        self.plans += 1
        now = self.snapshot.now + timedelta(seconds=seconds)
        self.snapshot = replace(self.snapshot, now=now, seed=f"seed{self.plans}")
        changes = plan(self.snapshot)
        self.snapshot = changes.after(self.snapshot)
        return bool(changes)

    def see(self, done: Iterable[str] = ()) -> None:
        """Agents do what they are told, and say so.

        Args:
            done: jobs whose tasks have done their work.
        """
        finished = frozenset(done)
        reports = dict(self.snapshot.reports)
        for name in self.snapshot.nodes:
            replicas = {
                r.id: Observed(
                    ReplicaState.STOPPED if r.state is ReplicaState.DRAINING else ReplicaState.READY, pid=7
                )
                for r in self.replicas
                if r.node == name and r.placed
            }
            tasks = {t.id: _seen(t, t.job in finished) for t in self.tasks if t.node == name and t.placed}
            reports[name] = replace(reports[name], replicas=replicas, tasks=tasks)
        self.snapshot = replace(self.snapshot, reports=reports)

    def run(self, done: Iterable[str] = ()) -> None:
        """Lets everything happen that happens by itself."""
        for _ in range(20):
            self.see(done)
            changed = self.step()
            if not changed and not self.step():
                return
        raise AssertionError("it never settles")

    def ask(self, name: str = "d", **fields: object) -> None:
        """Asks something else of a deployment: fields of its spec, or its project."""
        old = self.snapshot.deployments[name]
        project = str(fields.pop("project", old.project))
        new = old.ask(replace(old.asked, **fields), self.snapshot.now, "ann")  # type: ignore[arg-type]
        self.add(deployments=[replace(new, project=project)])

    def add(
        self,
        *,
        deployments: Iterable[Deployment] = (),
        jobs: Iterable[Job] = (),
        projects: Iterable[Project] = (),
        nodes: Iterable[Node] = (),
    ) -> None:
        """Adds things, or puts them in the place of those of the same name."""
        machines = {n.name: n for n in nodes}
        self.snapshot = replace(
            self.snapshot,
            nodes={**self.snapshot.nodes, **machines},
            reports={**self.snapshot.reports, **{n.name: Report(n) for n in machines.values()}},
            deployments={**self.snapshot.deployments, **{d.name: d for d in deployments}},
            jobs={**self.snapshot.jobs, **{j.id: j for j in jobs}},
            projects={**self.snapshot.projects, **{p.name: p for p in projects}},
        )

    @property
    def replicas(self) -> list[Replica]:
        """Those that are not STOPPED."""
        return list(self.snapshot.replicas.values())

    @property
    def tasks(self) -> list[Task]:
        """Those that hold something."""
        return [task for task in self.snapshot.tasks.values() if task.placed]

    def placed(self, name: str) -> int:
        """Replicas of a deployment that hold something."""
        return sum(r.placed for r in self.replicas if r.deployment == name)

    def waits(self, name: str) -> str:
        """Why a replica of a deployment waits; empty if none does."""
        return next(
            (r.message for r in self.replicas if r.deployment == name and r.state is ReplicaState.PENDING), ""
        )

    def nodes_of(self, job_id: str) -> list[str]:
        """Where the tasks of a job are, in the order of their numbers."""
        return [t.node for t in sorted(self.tasks, key=lambda t: t.number) if t.job == job_id]

    def working(self) -> set[str]:
        """The jobs that were started and are not about to stop."""
        return {j.id for j in self.snapshot.jobs.values() if j.state in (JobState.STARTING, JobState.RUNNING)}


def _seen(task: Task, done: bool) -> ObservedTask:
    if task.order is not Order.RUN:
        return ObservedTask(TaskState.STOPPED)
    return ObservedTask(TaskState.SUCCEEDED if done else TaskState.RUNNING, pid=8)
