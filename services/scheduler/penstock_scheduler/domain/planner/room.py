"""Room that will be free in a moment: who gets it, and which jobs give theirs up to serving.

A replica that finds no room takes what is about to be free (replicas that drain, tasks that end). If that is
not enough, jobs of one node make room: those of the lowest priority first, of these the youngest, and no more
than it takes. What is promised is kept from jobs that wait: none is placed where a replica is about to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from penstock_scheduler.domain.job import Job, JobState, Task
from penstock_scheduler.domain.planner.feasible import Holder, Need, Placement, Usage, check
from penstock_scheduler.domain.planner.fleet import Fleet

MOST_CLAIMS = 32
"""Replicas for which room is looked for in one pass; a pass is a second, and stopped jobs are not free."""
NODES_LOOKED_AT = 64
"""Nodes of which the cheapest is chosen."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Room that a replica is promised.

    Attributes:
        node: where.
        devices: the devices of it.
        jobs: those that must end for it; none if enough is about to be free anyway.
    """

    node: str
    devices: tuple[str, ...]
    jobs: tuple[str, ...] = ()


class Future:
    """The nodes as they will be when what is ending has ended and everybody has what was promised.

    Args:
        actual: what is given out of a node now; changes while things are placed.
        ending: by node, what holds a part of it and ends by itself.
        working: by node, tasks of jobs that go on.
        jobs: by id.
    """

    def __init__(
        self,
        actual: Callable[[str], Usage],
        ending: Mapping[str, Sequence[Holder]],
        working: Mapping[str, Sequence[Task]],
        jobs: Mapping[str, Job],
    ) -> None:
        self._actual = actual
        self._working = {node: list(tasks) for node, tasks in working.items() if tasks}
        self._jobs = jobs
        self._nodes_of: dict[str, list[str]] = {}
        self._usages: dict[str, Usage] = {}
        self._hopeless: set[tuple[Need, str]] = set()
        self.claims = 0
        for node, holders in ending.items():
            if holders:
                usage = self._changing(node)
                for holder in holders:
                    usage.give_back(holder.resources, holder.devices, holder.digest)
        for node, tasks in self._working.items():
            for job in {task.job for task in tasks}:
                self._nodes_of.setdefault(job, []).append(node)

    def usages(self) -> Mapping[str, Usage]:
        """The nodes that will be other than they are."""
        return self._usages

    def nodes_with_jobs(self) -> Iterable[str]:
        """The nodes where jobs go on."""
        return self._working

    def without_jobs(self, node: str) -> Usage:
        """A node if no job were on it."""
        usage = (self._usages.get(node) or self._actual(node)).copy()
        for task in self._working.get(node, ()):
            usage.give_back(task.resources, task.devices, task.digest)
        return usage

    def claim(self, need: Need, owner: str, allowed: Callable[[Placement], bool]) -> Claim | None:
        """Promises room to a replica that has none; None if nobody's leaving would make any.

        Args:
            need: what it needs.
            owner: its deployment.
            allowed: whether its quota has room for it at a place: none is made where it has not.
        """
        if (need, owner) in self._hopeless or self.claims >= MOST_CLAIMS:
            return None
        for node, usage in sorted(self._usages.items()):
            devices = self._take(usage, need, allowed)
            if devices:
                return Claim(node, devices)
        found = min(self._offers(need, allowed), default=None, key=lambda each: each[0])
        if found is None:
            self._hopeless.add((need, owner))
            return None
        _, node, jobs = found
        for job in jobs:
            self._end(job.id)
        devices = self._take(self._changing(node), need, allowed)
        return Claim(node, devices, tuple(job.id for job in jobs)) if devices else None

    def take(self, seat: Placement, need: Need, digest: str) -> None:
        """Counts a task that was placed where something else is promised."""
        usage = self._usages.get(seat.usage.node.name)
        if usage is not None:
            usage.take(need.resources, seat.devices, digest)

    # -- helpers ----------------------------------------------------------------------------------

    def _take(self, usage: Usage, need: Need, allowed: Callable[[Placement], bool]) -> tuple[str, ...]:
        """The devices of a replica that gets its place in the future; none if it gets none."""
        place = check(usage, need)
        if not isinstance(place, Placement) or not allowed(place):
            return ()
        usage.take(need.resources, place.devices, need.digest)
        self.claims += 1
        return place.devices

    def _offers(
        self, need: Need, allowed: Callable[[Placement], bool]
    ) -> Iterable[tuple[tuple[object, ...], str, Sequence[Job]]]:
        """Nodes where jobs could make room, each with what that costs."""
        looked_at = 0
        empty = Fleet(self.without_jobs(node) for node in self._working)
        for row in empty.rows(need):
            node = empty.usages[row].node.name
            place = check(empty.usages[row], need)
            if not isinstance(place, Placement) or not allowed(place):
                continue
            jobs = cheapest(
                self._usages.get(node) or self._actual(node), need, self._stoppable(node), self._working[node]
            )
            if jobs:
                looked_at += 1
                gangs = sum(len(self._nodes_of[job.id]) for job in jobs)
                yield (max(job.priority for job in jobs), len(jobs), gangs, _age(jobs), node), node, jobs
            if looked_at >= NODES_LOOKED_AT:
                return

    def _stoppable(self, node: str) -> list[Job]:
        found = {task.job: self._jobs[task.job] for task in self._working[node]}
        return [job for job in found.values() if job.state in (JobState.STARTING, JobState.RUNNING)]

    def _end(self, job: str) -> None:
        """Counts all tasks of a job as gone, on whichever nodes."""
        for node in self._nodes_of.pop(job):
            usage = self._changing(node)
            staying = []
            for task in self._working[node]:
                if task.job == job:
                    usage.give_back(task.resources, task.devices, task.digest)
                else:
                    staying.append(task)
            self._working[node] = staying

    def _changing(self, node: str) -> Usage:
        if node not in self._usages:
            self._usages[node] = self._actual(node).copy()
        return self._usages[node]


def cheapest(usage: Usage, need: Need, jobs: Sequence[Job], tasks: Sequence[Task]) -> Sequence[Job]:
    """The jobs of one node that make room for a need: of low priority, young, and no more than it takes.

    Args:
        usage: what is given out of the node.
        need: what needs room.
        jobs: those that may be ended.
        tasks: all tasks on the node.

    Returns:
        None of them if the end of all would not be enough.
    """
    room = usage.copy()
    order = sorted(jobs, key=_worth)
    chosen: list[Job] = []
    for job in order:
        _without(room, job, tasks)
        chosen.append(job)
        if isinstance(check(room, need), Placement):
            break
    else:
        return ()
    # What was taken on the way may not be needed any more; the dearest of it stays first.
    for job in reversed(list(chosen)):
        if len(chosen) > 1:
            _with(room, job, tasks)
            if isinstance(check(room, need), Placement):
                chosen.remove(job)
            else:
                _without(room, job, tasks)
    return chosen


def _worth(job: Job) -> tuple[object, ...]:
    """Those of least priority first, of these the youngest."""
    return (job.priority, -_placed(job).timestamp(), -job.create_time.timestamp(), job.id)


def _without(usage: Usage, job: Job, tasks: Iterable[Task]) -> None:
    for task in tasks:
        if task.job == job.id:
            usage.give_back(task.resources, task.devices, task.digest)


def _with(usage: Usage, job: Job, tasks: Iterable[Task]) -> None:
    for task in tasks:
        if task.job == job.id:
            usage.take(task.resources, task.devices, task.digest)


def _placed(job: Job) -> datetime:
    return job.placed_time or job.create_time


def _age(jobs: Sequence[Job]) -> float:
    """The later the oldest of them was placed, the less is lost."""
    return -min(_placed(job).timestamp() for job in jobs)
