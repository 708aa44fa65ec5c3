"""Gives places to replicas and jobs that wait, or says why there are none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from penstock_scheduler.domain.deployment import Deployment
from penstock_scheduler.domain.job import Job, JobState
from penstock_scheduler.domain.node import Node, Report
from penstock_scheduler.domain.planner import gangs, rank
from penstock_scheduler.domain.planner.accounts import Accounts
from penstock_scheduler.domain.planner.feasible import Holder, Need, Placement, Rejection, Usage
from penstock_scheduler.domain.planner.fleet import Fleet
from penstock_scheduler.domain.planner.jobs import JobDraft
from penstock_scheduler.domain.planner.room import Future
from penstock_scheduler.domain.planner.turns import in_turn
from penstock_scheduler.domain.project import NOTHING, Holding, Project
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState


@dataclass(frozen=True, slots=True)
class Scene:
    """All that places depend on, as the plan has it so far.

    Attributes:
        nodes: by name.
        reports: the last word of each node's agent.
        deployments: by name.
        replicas: by id, those that are not STOPPED.
        before: the replicas of the snapshot.
        asked: by deployment, the groups that it asks for.
        jobs: jobs and their tasks.
        projects: by name.
        need_of: what a replica needs.
    """

    nodes: Mapping[str, Node]
    reports: Mapping[str, Report]
    deployments: Mapping[str, Deployment]
    replicas: Mapping[str, Replica]
    before: Mapping[str, Replica]
    asked: Mapping[str, Collection[GroupKey]]
    jobs: JobDraft
    projects: Mapping[str, Project]
    need_of: Callable[[Replica], Need]


@dataclass(slots=True)
class Places:
    """What was found for replicas.

    Attributes:
        found: the place of each, by id, and whether it is beyond the quota for now.
        settled: those that were beyond the quota and no longer are.
        reasons: why each of the others waits.
    """

    found: dict[str, tuple[Placement, bool]] = field(default_factory=dict)
    settled: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


class Placer:
    """Finds places: first for replicas, then jobs make room for those that found none, then for jobs.

    Args:
        scene: the cluster.
        fleet: its nodes, with what is given out of them.
    """

    def __init__(self, scene: Scene, fleet: Fleet) -> None:
        self._scene = scene
        self._fleet = fleet
        self._accounts = Accounts(scene.projects, scene.nodes.values())
        self._roomless: list[Replica] = []
        if len(_concerned(scene)) > 1 or any(each.quota != NOTHING for each in scene.projects.values()):
            self._count()

    def replicas(self, waiting: Sequence[Replica]) -> Places:
        """Gives a place to every replica that finds one."""
        places = Places()
        self._settle(places)
        self._fleet.cache(replica.digest for replica in waiting)
        neighbours = self._neighbours({replica.deployment for replica in waiting})
        left_over: list[Replica] = []
        for replica in in_turn(waiting, self._project, rank.turn, self._accounts.share):
            need = self._scene.need_of(replica)
            found = self._find(replica, need, neighbours[replica.deployment])
            if found is None:
                left_over.append(replica)
                continue
            self._fleet.take(found[0], need)
            places.found[replica.id] = found
            neighbours[replica.deployment][found[0].usage.node.name] += 1
        # Once all have their places, so that the next plan finds the same words.
        known: dict[tuple[Need, str], tuple[str, bool]] = {}
        for replica in left_over:
            need = self._scene.need_of(replica)
            key = (need, replica.deployment)
            if key not in known:
                known[key] = self._why(replica, need, neighbours[replica.deployment])
            places.reasons[replica.id], roomless = known[key]
            if roomless:
                self._roomless.append(replica)
        return places

    def future(self) -> Future:
        """Who gets what is about to be free; has jobs make room for replicas that find none otherwise."""
        jobs = self._scene.jobs
        working = {}
        ending: dict[str, list[Holder]] = defaultdict(list)
        for node in self._scene.nodes:
            here = jobs.holding(node)
            if here:
                working[node] = [task for task in here if self._goes_on(task.job) and task.working]
                ending[node] += [task for task in here if not (self._goes_on(task.job) and task.working)]
        if self._roomless:
            for replica in self._scene.replicas.values():
                if replica.state is ReplicaState.DRAINING:
                    ending[replica.node].append(replica)
        future = Future(self._usage, ending, working, jobs.jobs)
        for replica in self._roomless:
            claim = future.claim(
                self._scene.need_of(replica), replica.deployment, partial(self._allowed, replica)
            )
            if claim is None:
                continue
            charge = self._accounts.charge(replica.resources, claim.node, claim.devices)
            self._accounts.reserve(self._project(replica), charge)
            old = self._scene.before.get(replica.id)
            # One that has just been asked for waits a pass: what is idle makes room before jobs do.
            if claim.jobs and old is not None and old.message:
                who = f"replicas/{replica.id} of deployments/{replica.deployment}"
                for job in claim.jobs:
                    jobs.make_room(job, f"{who} has no other place than nodes/{claim.node}.")
        return future

    def jobs(self) -> gangs.Seating:
        """Gives places to jobs; whether or not any waits, jobs make room for replicas."""
        waiting = self._scene.jobs.waiting()
        future = self.future()
        jobs, nodes, reports = self._scene.jobs, self._scene.nodes, self._scene.reports
        awaited = {job.id: why for job in waiting if (why := jobs.awaited(job, nodes, reports))}
        returns = gangs.Returns(
            {job.id: jobs.homes(job) for job in waiting},
            {job.id: jobs.shunned(job) for job in waiting},
            awaited,
        )
        return gangs.place(self._fleet, waiting, self._accounts, future, returns)

    def has_room_for_more(self, job: Job) -> bool:
        """Whether another task of a job that runs would find a place."""
        need = gangs.need_of(job.gang)
        least = self._accounts.least_charge(job.gang.resources)
        usages = (self._fleet.usages[row] for row in self._fleet.rows(need))
        return gangs.room_for(usages, need, 1) > 0 and self._accounts.may_hold(job.project, least)

    # -- helpers ----------------------------------------------------------------------------------

    def _project(self, replica: Replica) -> str:
        return self._scene.deployments[replica.deployment].project

    def _goes_on(self, job: str) -> bool:
        return self._scene.jobs.jobs[job].state in (JobState.STARTING, JobState.RUNNING)

    def _usage(self, node: str) -> Usage:
        return self._fleet.usages[self._fleet.row_of[node]]

    def _count(self) -> None:
        """Adds up what every project holds."""
        scene, accounts = self._scene, self._accounts
        for replica in scene.replicas.values():
            if not replica.placed:
                continue
            name = replica.deployment
            project = scene.deployments[name].project
            charge = accounts.charge(replica.resources, replica.node, replica.devices)
            if replica.surge:
                accounts.surge(project, name, charge)
                continue
            accounts.hold(project, charge)
            if self._leaves(replica):
                accounts.leaves(project, name, charge)
        for node in scene.nodes:
            for task in scene.jobs.holding(node):
                charge = accounts.charge(task.resources, task.node, task.devices)
                accounts.hold(scene.jobs.jobs[task.job].project, charge, of_job=True)

    def _leaves(self, replica: Replica) -> bool:
        """Whether it ends as soon as its successors answer."""
        return (
            not replica.wanted
            or replica.group not in self._scene.asked.get(replica.deployment, ())
            or self._scene.nodes[replica.node].draining
        )

    def _settle(self, places: Places) -> None:
        """Counts successors within the quota for which there is room now, the oldest first."""
        surging = [r for r in self._scene.replicas.values() if r.surge and r.placed]
        for replica in sorted(surging, key=lambda r: (r.create_time, r.id)):
            project = self._project(replica)
            charge = self._accounts.charge(replica.resources, replica.node, replica.devices)
            if self._accounts.may_settle(project, charge):
                self._accounts.settle(project, replica.deployment, charge)
                places.settled.append(replica.id)

    def _find(
        self, replica: Replica, need: Need, neighbours: Mapping[str, int]
    ) -> tuple[Placement, bool] | None:
        """A place, and whether it is beyond the quota for now; None if there is none."""
        accounts, project = self._accounts, self._project(replica)
        least = accounts.least_charge(need.resources)
        within = accounts.may_hold(project, least)
        if not within and not accounts.may_surge(project, replica.deployment, least):
            return None
        place = rank.select(self._fleet, need, neighbours)
        if place is None:
            return None
        charge = accounts.charge_at(need.resources, place)
        if accounts.may_hold(project, charge):
            accounts.hold(project, charge)
            return place, False
        if accounts.may_surge(project, replica.deployment, charge):
            accounts.surge(project, replica.deployment, charge)
            return place, True
        return None

    def _allowed(self, replica: Replica, place: Placement) -> bool:
        """Whether its quota would have room for a replica at a place."""
        project = self._project(replica)
        charge = self._accounts.charge_at(replica.resources, place)
        return self._accounts.may_hold(project, charge) or self._accounts.may_surge(
            project, replica.deployment, charge
        )

    def _why(self, replica: Replica, need: Need, neighbours: Mapping[str, int]) -> tuple[str, bool]:
        """Why it waits, and whether it lacks room on nodes, not in its quota."""
        accounts, project = self._accounts, self._project(replica)

        def barred(charge: Holding) -> bool:
            return not accounts.may_hold(project, charge) and not accounts.may_surge(
                project, replica.deployment, charge
            )

        least = accounts.least_charge(need.resources)
        if barred(least):
            return accounts.why_not(project, least), False
        place = rank.select(self._fleet, need, neighbours)
        if place is None:
            return why_pending(self._fleet.closest(need)), True
        return accounts.why_not(project, accounts.charge_at(need.resources, place)), False

    def _neighbours(self, deployments: Collection[str]) -> Mapping[str, Counter[str]]:
        found: dict[str, Counter[str]] = {name: Counter() for name in deployments}
        for replica in self._scene.replicas.values():
            if replica.deployment in found and replica.placed and replica.wanted:
                found[replica.deployment][replica.node] += 1
        return found


def _concerned(scene: Scene) -> set[str]:
    """The projects that have something."""
    return {d.project for d in scene.deployments.values()} | {j.project for j in scene.jobs.jobs.values()}


def why_pending(nearest: Rejection | None) -> str:
    """Says why a replica waits, for people."""
    if nearest is None:
        return "No node is attached; start a worker."
    return f"No node has room for it. The closest, nodes/{nearest.node}, lacks {nearest.lacks}."
