"""A cluster in which jobs live, as the planner sees it: no database, no clock, agents as a test has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from penstock_scheduler.domain.constraints import NO_CONSTRAINTS
from penstock_scheduler.domain.job import (
    Gang,
    Job,
    JobState,
    ObservedTask,
    Order,
    RegistryWord,
    Task,
    TaskState,
)
from penstock_scheduler.domain.node import Device, DeviceKind, Node, Report
from penstock_scheduler.domain.planner import Plan, Policy, Snapshot, plan
from penstock_scheduler.domain.resources import MIB, Resources

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
RANK = Resources(cpu_millis=500, memory_bytes=512 * MIB)
POLICY = Policy(node_lease_seconds=3.0, node_silence_seconds=7.0)


def node(name: str, cores: float = 2.0) -> Node:
    """A node without GPUs."""
    return Node(
        name,
        cpu_millis=int(cores * 1000),
        memory_bytes=8192 * MIB,
        devices=(Device("cpu", DeviceKind.CPU),),
    )


class JobWorld:
    """Lives in virtual time; `step` is one pass of the scheduler, which every agent hears of at once.

    Attributes:
        now: the moment.
        snapshot: what the database would have.
        nodes: what agents say of their machines.
        processes: what agents see of their tasks, by node and task.
        silent: since when a node was not heard of.
        registry: what the registry says, by job; None while it is away.
        ends: terminal states as they were reached, by job.
    """

    def __init__(self, *nodes: Node) -> None:
        self.now = BEGIN
        self.nodes = {each.name: each for each in nodes or (node("n1"), node("n2"))}
        self.processes: dict[str, dict[str, ObservedTask]] = {name: {} for name in self.nodes}
        self.silent: dict[str, datetime] = {}
        self.last_words: dict[str, dict[str, ObservedTask]] = {}
        self.registry: dict[str, RegistryWord] = {}
        self.ends: dict[str, list[JobState]] = {}
        self.snapshot = Snapshot(now=self.now, seed="0")
        self.ended: dict[str, Job] = {}

    def submit(
        self, name: str = "fit", *, tasks: int = 1, least: int = 0, keeps: bool = False, **fields: Any
    ) -> None:
        """Queues a job."""
        where = fields.pop("constraints", NO_CONSTRAINTS)
        gang = Gang(tasks, least or tasks, fields.pop("resources", RANK), where, keeps=keeps)
        job = Job(name, create_time=self.now, update_time=self.now, gang=gang, **fields)
        self.snapshot = replace(self.snapshot, jobs={**self.snapshot.jobs, name: job})

    def cancel(self, name: str = "fit") -> None:
        """Cancels a job that has not ended."""
        job = replace(self.snapshot.jobs[name], cancelling=True, message="ann cancelled it.")
        self.snapshot = replace(self.snapshot, jobs={**self.snapshot.jobs, name: job})

    def reports(self) -> dict[str, Report]:
        """The last word of every agent."""
        return {
            name: Report(
                described,
                silent_seconds=(self.now - self.silent[name]).total_seconds() if name in self.silent else 0.0,
                tasks=self.last_words.get(name) or dict(self.processes[name]),
            )
            for name, described in self.nodes.items()
        }

    def step(
        self, seconds: float = 1.0, *, obey: bool = True, unheard: Mapping[str, float] | None = None
    ) -> Plan:
        """One pass; then agents do as they are told, unless they are cut off.

        Args:
            seconds: Since the last one.
            obey: Whether agents do anything.
            unheard: Nodes that said nothing since the scheduler began to lead, so many seconds ago.
        """
        self.now += timedelta(seconds=seconds)
        nothing = {name: Report(None, silent_seconds=since) for name, since in (unheard or {}).items()}
        self.snapshot = replace(
            self.snapshot,
            now=self.now,
            reports={**self.reports(), **nothing},
            registry=dict(self.registry),
        )
        changes = plan(self.snapshot, POLICY)
        for job in changes.jobs:
            before = self.snapshot.jobs[job.id]
            if job.ended and not before.ended:
                self.ends.setdefault(job.id, []).append(job.state)
            if job.ended:
                self.ended[job.id] = job
        self.snapshot = changes.after(self.snapshot)
        if obey:
            self.obey()
        return changes

    def desired(self, name: str) -> dict[str, Task]:
        """The tasks that an agent is told of."""
        return {
            id_: task
            for id_, task in self.snapshot.tasks.items()
            if task.node == name and task.placed and task.order is not Order.END
        }

    def obey(self) -> None:
        """Agents start what they are to run, and end what they are not."""
        for name, own in self.processes.items():
            if name in self.silent:
                continue
            desired = self.desired(name)
            for id_ in [id_ for id_ in own if id_ not in desired]:
                del own[id_]
            for id_, task in desired.items():
                seen = own.setdefault(id_, ObservedTask(TaskState.RUNNING, pid=1))
                if task.order is Order.STOP and seen.state is TaskState.RUNNING:
                    own[id_] = ObservedTask(TaskState.STOPPED)

    def say(self, task: str, state: TaskState, **fields: Any) -> None:
        """An agent reports a task."""
        for own in self.processes.values():
            if task in own:
                own[task] = ObservedTask(state, **fields)

    def lose(self, name: str) -> None:
        """Cuts a node off; its processes die."""
        self.silent[name] = self.now
        self.last_words[name] = dict(self.processes[name])
        self.processes[name].clear()

    def find(self, name: str) -> None:
        """Lets a node be heard again."""
        self.silent.pop(name, None)
        self.last_words.pop(name, None)

    def until(self, state: JobState, name: str = "fit", passes: int = 40) -> Job:
        """Steps until a job is in a state."""
        for _ in range(passes):
            if self.job(name).state is state:
                return self.job(name)
            self.step()
        raise AssertionError(f"it is {self.job(name)}")

    def job(self, name: str = "fit") -> Job:
        """A job, also one that has ended."""
        return self.snapshot.jobs.get(name) or self.ended[name]

    def tasks(self, name: str = "fit") -> list[Task]:
        """The tasks of a job that hold something, in their order."""
        return sorted((t for t in self.snapshot.tasks.values() if t.job == name), key=lambda t: t.index)
