"""Which waiting jobs start now, and where: all tasks of a job find a place, or none does.

Jobs come in turn: among projects the one with the least of its share, within a project the highest priority,
then the oldest. The first that finds no room has room kept for it, on the nodes where least is in the way:
those behind it may start elsewhere, or there beside it, but not where they would delay it; a large gang waits
for what runs already and for nothing else. Likewise the first of each project whose quota has none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from penstock_scheduler.domain.job import Gang, Job
from penstock_scheduler.domain.planner.accounts import Accounts
from penstock_scheduler.domain.planner.feasible import (
    Need,
    Placement,
    Rejection,
    Usage,
    check,
    fullest,
)
from penstock_scheduler.domain.planner.fleet import Fleet, Numbers
from penstock_scheduler.domain.planner.room import Future
from penstock_scheduler.domain.planner.turns import in_turn
from penstock_scheduler.domain.project import NOTHING, Holding

MADE_ROOM = "It made room: "
"""How the message of a job begins that gave its place to a replica; kept while it waits for another."""
_AND_WAITS = " It waits: "
MOST_COUNTED = 100
"""The place in the queue of so many jobs is said: each start changes what all of them say."""
_FAR_BEHIND = f"More than {MOST_COUNTED} jobs come first. "
_MANY = 2**20
"""More tasks than any job has; few enough that those of all nodes can be added up."""


@dataclass(slots=True)
class Seating:
    """What became of the jobs that wait.

    Attributes:
        places: by job, a place for each task; they are taken in the fleet already.
        reasons: by job that goes on waiting, why, for people.
    """

    places: dict[str, tuple[Placement, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Returns:
    """Where jobs go on that ran before.

    Attributes:
        homes: by job, the nodes that have its newest checkpoint.
        shunned: by job, the nodes that it takes last.
        awaited: by job, why it waits for one of them to come back; it keeps its room on the others.
    """

    homes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    shunned: Mapping[str, Sequence[str]] = field(default_factory=dict)
    awaited: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Kept:
    """Room that is kept for a job: its nodes as if it ran there already, beside all that does."""

    job: str
    usages: dict[str, Usage]

    def take(self, seat: Placement, need: Need, digest: str) -> None:
        """Counts a task of another job that was placed beside it."""
        usage = self.usages.get(seat.usage.node.name)
        if usage is not None:
            usage.take(need.resources, seat.devices, digest)


def need_of(gang: Gang) -> Need:
    """All that decides where a task of a gang could run."""
    # Each task has files of its own: a digest that no bundle has.
    return Need(gang.runtime, gang.resources, gang.constraints)


def room_for(usages: Iterable[Usage], need: Need, most: int) -> int:
    """How many of `most` tasks would fit together, if nothing else came."""
    found = 0
    for usage in usages:
        if found >= most:
            break
        found += len(_fill([usage], need, most - found))
    return found


def place(
    fleet: Fleet, waiting: Sequence[Job], accounts: Accounts, future: Future, returns: Returns
) -> Seating:
    """Finds places for jobs that wait, each gang whole or not at all.

    Args:
        fleet: the nodes, once all replicas that fit have their places.
        waiting: jobs that are QUEUED and whose turn has come.
        accounts: what projects hold; places are counted there.
        future: what is promised to replicas; places are counted there, too.
        returns: where those go on that ran before.
    """
    seats = _Seats(fleet, accounts, future, returns)
    for job in in_turn(waiting, lambda job: job.project, _order, accounts.share):
        seats.try_to_seat(job)
    return seats.seating()


def _order(job: Job) -> tuple[object, ...]:
    return (-job.priority, job.create_time, job.id)


class _Seats:
    """The work of `place`."""

    def __init__(self, fleet: Fleet, accounts: Accounts, future: Future, returns: Returns) -> None:
        self._fleet = fleet
        self._accounts = accounts
        self._future = future
        self._returns = returns
        self._kept: _Kept | None = None
        self._places: dict[str, tuple[Placement, ...]] = {}
        self._left: list[tuple[Job, bool]] = []
        self._quota_kept: set[str] = set()

    def try_to_seat(self, job: Job) -> None:
        """Gives a job its places, or keeps room for it if it is the first that finds none."""
        need = need_of(job.gang)
        least = self._accounts.least_charge(job.gang.resources)
        most = self._accounts.count(job.project, least, job.gang.tasks)
        if most < job.fewest:
            self._left.append((job, True))
            asks = least.times(job.fewest)
            if job.project not in self._quota_kept and self._accounts.may_hold_in_the_end(job.project, asks):
                self._quota_kept.add(job.project)
                self._accounts.reserve(job.project, asks)
            return
        homes = self._returns.homes.get(job.id, ())
        if job.id in self._returns.awaited:
            self._left.append((job, False))
            self._keep_at(homes, job, need)
            return
        seats = self._seats(need, most, job.fewest, homes, self._returns.shunned.get(job.id, ()))
        if len(seats) < job.fewest:
            self._left.append((job, False))
            if self._kept is None:
                self._kept = self._keep(job, need)
            return
        total = self._charge(job, seats)
        while not self._accounts.may_hold(job.project, total):
            # Of the GPUs that are free it would take a larger part than of the largest.
            seats.pop()
            if len(seats) < job.fewest:
                self._left.append((job, True))
                return
            total = self._charge(job, seats)
        self._accounts.hold(job.project, total, of_job=True)
        for number, seat in enumerate(seats, job.tasks_made):
            digest = f"jobs/{job.id}/tasks/{number}"
            self._fleet.take(seat, need, digest)
            self._future.take(seat, need, digest)
            if self._kept is not None:
                self._kept.take(seat, need, digest)
        self._places[job.id] = tuple(seats)

    def seating(self) -> Seating:
        """The result; reasons are found once all have their places, so that the next plan finds the same."""
        before = self._before()
        return Seating(
            self._places,
            {
                job.id: _told(job, before.get(job.id, _FAR_BEHIND) + self._why(job, quota))
                for job, quota in self._left
            },
        )

    def _before(self) -> dict[str, str]:
        """How many come before each of the next jobs, if each got its place in turn and none ended."""
        promised: dict[str, Holding] = defaultdict(lambda: NOTHING)
        turn = in_turn(
            (job for job, _ in self._left),
            lambda job: job.project,
            _order,
            lambda project: self._accounts.share(project, promised[project]),
        )
        before = {}
        for count, job in enumerate(islice(turn, MOST_COUNTED + 1)):
            before[job.id] = _before(count)
            asks = self._accounts.least_charge(job.gang.resources).times(job.fewest)
            promised[job.project] = promised[job.project].plus(asks)
        return before

    def _why(self, job: Job, quota: bool) -> str:
        if quota:
            asks = self._accounts.least_charge(job.gang.resources).times(job.fewest)
            if self._accounts.may_hold(job.project, asks):
                # On the places that there are it would count more than on the largest GPUs.
                asks = self._charge(job, self._seats(need_of(job.gang), job.fewest, job.fewest))
            if asks != NOTHING:
                return self._accounts.why_not(job.project, asks)
        if not self._fleet.usages:
            return "No node is attached; start a worker."
        if job.id in self._returns.awaited:
            return self._returns.awaited[job.id]
        need = need_of(job.gang)
        usages = (self._fleet.usages[row] for row in self._fleet.rows(need))
        count = room_for(usages, need, job.fewest)
        if count >= job.fewest:
            first = f"jobs/{self._kept.job}" if self._kept is not None else "replicas"
            return f"The room that is free is kept for {first}, whose turn is first."
        tasks = job.gang.tasks
        words = (
            f"There is room for {count} of its {tasks} tasks." if tasks > 1 else "No node has room for it."
        )
        nearest = None if count else self._fleet.closest(need)
        return words + (f" The closest, nodes/{nearest.node}, lacks {nearest.lacks}." if nearest else "")

    def _charge(self, job: Job, seats: Sequence[Placement]) -> Holding:
        total = NOTHING
        for seat in seats:
            total = total.plus(self._accounts.charge_at(job.gang.resources, seat))
        return total

    # -- places -----------------------------------------------------------------------------------

    def _limits(self, node: str) -> list[Usage]:
        """The node as others have a claim to it."""
        views: list[Mapping[str, Usage]] = [self._future.usages()]
        if self._kept is not None:
            views.append(self._kept.usages)
        return [view[node] for view in views if node in view]

    def _slots(self, need: Need, most: int) -> Numbers:
        slots = np.minimum(self._fleet.slots(need), _MANY)
        limited = set(self._future.usages())
        if self._kept is not None:
            limited.update(self._kept.usages)
        for node in limited:
            row = self._fleet.row_of[node]
            if slots[row]:
                slots[row] = len(_fill([self._fleet.usages[row], *self._limits(node)], need, most))
        return slots

    def _seats(
        self,
        need: Need,
        most: int,
        fewest: int,
        homes: Collection[str] = (),
        shunned: Collection[str] = (),
    ) -> list[Placement]:
        """Places for `most` tasks, or for as many as there are; fewer than `fewest` are of no use.

        Where the job ran before, as far as there is room. Else on as few nodes as can be; tasks that need no
        GPU stay away from nodes that have some, if they can.
        """
        slots = self._slots(need, most)
        if int(slots.sum()) < fewest:
            return []
        first, last = self._at(homes, slots), self._at(shunned, slots)
        found = self._pack(need, most, first)
        found += self._best(need, most - len(found), slots - first - last)
        return found + self._pack(need, most - len(found), last)

    def _at(self, nodes: Collection[str], slots: Numbers) -> Numbers:
        rows = [row for node in nodes if (row := self._fleet.row_of.get(node)) is not None]
        here = np.zeros_like(slots)
        here[rows] = slots[rows]
        return here

    def _best(self, need: Need, most: int, slots: Numbers) -> list[Placement]:
        if not need.resources.gpus:
            plain = np.where(self._fleet.gpu_count == 0, slots, 0)
            if int(plain.sum()) >= most:
                found = self._pack(need, most, plain)
                if len(found) == most:
                    return found
        return self._pack(need, most, slots)

    def _pack(self, need: Need, most: int, slots: Numbers) -> list[Placement]:
        """Fills nodes one after the other: the one that has just enough, else the one that takes most."""
        found: list[Placement] = []
        slots = slots.copy()
        while len(found) < most and slots.any():
            row = self._next_row(slots, most - len(found), need)
            usage = self._fleet.usages[row]
            devices = _fill([usage, *self._limits(usage.node.name)], need, most - len(found))
            found += [Placement(usage, each) for each in devices]
            slots[row] = 0
        return found

    def _next_row(self, slots: Numbers, wanted: int, need: Need) -> int:
        enough = np.flatnonzero(slots >= wanted)
        if not len(enough):
            enough = np.flatnonzero(slots == slots.max())
        # Of those that have enough the fullest, so that what is empty stays whole.
        free = (self._fleet.free_gpu_memory if need.resources.gpus else self._fleet.free_memory)[enough]
        keys = np.lexsort((enough, free, slots[enough]))
        return int(enough[keys[0]])

    # -- keeping room -----------------------------------------------------------------------------

    def _keep_at(self, homes: Collection[str], job: Job, need: Need) -> None:
        """Keeps room for a job where it was, beside all that is kept already."""
        kept = self._kept or _Kept(job.id, {})
        left = job.gang.tasks
        for home in homes:
            row = self._fleet.row_of.get(home)
            if row is None:
                continue
            actual, limits = self._fleet.usages[row], self._limits(home)
            view = kept.usages.get(home) or (limits or [actual])[0].copy()
            devices = _fill([actual, *limits], need, left)
            for number, each in enumerate(devices):
                view.take(need.resources, each, f"kept {job.id} {number}")
            if devices:
                kept.usages[home] = view
            left -= len(devices)
        if kept.usages:
            self._kept = kept

    def _keep(self, job: Job, need: Need) -> _Kept | None:
        """Keeps room for a job on the nodes where least is in the way; None if there will never be enough."""
        with_jobs = set(self._future.nodes_with_jobs())
        slots = self._slots(need, job.fewest)
        now = {self._fleet.usages[row].node.name: int(slots[row]) for row in np.flatnonzero(slots)}
        later: list[tuple[float, str, int]] = []
        empty: dict[str, Usage] = {}
        for node in sorted(with_jobs | set(self._future.usages())):
            empty[node] = self._future.without_jobs(node)
            count = room_for([empty[node]], need, job.fewest) - now.get(node, 0)
            if count > 0:
                verdict = check(self._fleet.usages[self._fleet.row_of[node]], need)
                later.append((verdict.missing if isinstance(verdict, Rejection) else 0.0, node, count))
        wanted = job.fewest
        if sum(now.values()) + sum(count for _, _, count in later) < wanted:
            return None
        taken: dict[str, int] = {}
        offers = [*sorted(((-count, node) for node, count in now.items()))]
        for minus, node in offers:
            taken[node] = min(-minus, wanted)
            wanted -= taken[node]
            if not wanted:
                break
        for _, node, count in sorted(later) if wanted else ():
            part = min(count, wanted)
            taken[node] = taken.get(node, 0) + part
            wanted -= part
            if not wanted:
                break
        usages = {}
        for node, count in taken.items():
            actual = self._fleet.usages[self._fleet.row_of[node]]
            views = [limit.copy() for limit in self._limits(node)] or [actual.copy()]
            # Beside what runs there, more than there is: nothing comes until it fits beside both.
            for number, devices in enumerate(_fill([empty.get(node) or actual], need, count)):
                views[0].take(need.resources, devices, f"kept {number}")
            usages[node] = views[0]
        return _Kept(job.id, usages)


def _fill(usages: Sequence[Usage], need: Need, most: int) -> list[tuple[str, ...]]:
    """The devices of up to `most` tasks that fit in all of these views of one node."""
    room = usages[0].copy() if len(usages) == 1 else fullest(usages)
    found: list[tuple[str, ...]] = []
    while len(found) < most:
        place = check(room, need)
        if not isinstance(place, Placement):
            break
        room.take(need.resources, place.devices, f"task {len(found)}")
        found.append(place.devices)
    return found


def _before(count: int) -> str:
    return "" if not count else f"{count} {'job comes' if count == 1 else 'jobs come'} first. "


def _told(job: Job, why: str) -> str:
    """Why it waits; of one that gave its place to a replica, whose, too."""
    if not job.message.startswith(MADE_ROOM):
        return why
    return f"{job.message.split(_AND_WAITS)[0]}{_AND_WAITS}{why}"
