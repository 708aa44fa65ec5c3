"""Projects and jobs of a simulated cluster: what owners ask for, and what agents do with tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from penstock_scheduler.domain.job import Gang, Job, ObservedTask, Order, TaskState
from penstock_scheduler.domain.planner import Snapshot
from penstock_scheduler.domain.project import Holding, Project
from performance.simulation import machines

UNBOUNDED, BOUNDED, WEIGHTY = "default", "bounded", "weighty"
NAMES = (UNBOUNDED, BOUNDED, WEIGHTY)


def projects(random_: random.Random) -> Mapping[str, Project]:
    """One without bounds, one with a quota, one with a quota and twice the weight."""
    bounded = Project(BOUNDED, quota(random_))
    return {
        UNBOUNDED: Project(UNBOUNDED),
        BOUNDED: bounded,
        WEIGHTY: Project(WEIGHTY, quota(random_), weight=2.0),
    }


def quota(random_: random.Random) -> Holding:
    """Bounds on any of cores, memory and GPUs."""
    return Holding(
        random_.choice([0, random_.randrange(8_000, 60_000, 500)]),
        random_.choice([0, random_.randrange(32, 256) * machines.GIB]),
        random_.choice([0, random_.randrange(500, 8_000, 250)]),
    )


def job(random_: random.Random, name: str, project: str, now: datetime) -> Job:
    """A gang of one to four tasks, some with GPUs, some that go on smaller."""
    tasks = random_.choice([1, 1, 1, 2, 3, 4])
    resources = machines.needs(random_)
    if random_.random() < 0.2:
        resources = replace(resources, disk_bytes=random_.randint(1, 3) * machines.GIB)
    gang = Gang(tasks, random_.randint(1, tasks), resources)
    return Job(name, now, now, project, random_.randint(-2, 2), gang, max_restarts=2)


def told(snapshot: Snapshot) -> dict[str, dict[str, Order]]:
    """What each agent is to be told of its tasks; those that are to end at once are not named."""
    desired: dict[str, dict[str, Order]] = {}
    for task in snapshot.tasks.values():
        if task.placed and task.order is not Order.END:
            desired.setdefault(task.node, {})[task.id] = task.order
    return desired


def work(
    random_: random.Random, running: Mapping[str, ObservedTask], wanted: Mapping[str, Order], *, peace: bool
) -> dict[str, ObservedTask]:
    """What an agent has after it did what it was told, for a second."""
    tasks: dict[str, ObservedTask] = {}
    for id_, order in wanted.items():
        seen = running.get(id_)
        chance = random_.random()
        if order is Order.STOP:
            # It writes a checkpoint first.
            gone = peace or chance < 0.6
            if seen is not None:
                tasks[id_] = replace(seen, state=TaskState.STOPPED) if gone else seen
        elif seen is None or seen.state is TaskState.STOPPED:
            tasks[id_] = ObservedTask(TaskState.STARTING, pid=1)
        elif seen.state is TaskState.STARTING and (peace or chance < 0.5):
            tasks[id_] = replace(seen, state=TaskState.RUNNING)
        elif seen.state is TaskState.RUNNING and (peace or chance < 0.06):
            tasks[id_] = replace(seen, state=TaskState.SUCCEEDED)
        elif seen.state is TaskState.RUNNING and not peace and chance > 0.98:
            permanent = random_.random() < 0.2
            tasks[id_] = replace(seen, state=TaskState.FAILED, message="boom", permanent=permanent)
        else:
            tasks[id_] = seen
    return tasks
