"""Which waiting jobs start now, and where: all tasks of a job find a place, or none does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from penstock_scheduler.domain.job import Gang, Job
from penstock_scheduler.domain.planner import rank
from penstock_scheduler.domain.planner.feasible import Need, Placement, Usage, check
from penstock_scheduler.domain.planner.fleet import Fleet


@dataclass(slots=True)
class Seating:
    """What became of the jobs that wait.

    Attributes:
        places: by job, a place for each task; they are taken in the fleet already.
        reasons: by job that goes on waiting, why, for people.
    """

    places: dict[str, tuple[Placement, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def need_of(gang: Gang) -> Need:
    """All that decides where a task of a gang could run."""
    # Each task has files of its own: a digest that no bundle has.
    return Need(gang.runtime, gang.resources, gang.constraints)


def room_for(usages: Sequence[Usage], need: Need, most: int) -> int:
    """How many of `most` tasks would fit together, if nothing else came."""
    found = 0
    for usage in usages:
        room = _copy(usage)
        while found < most:
            place = check(room, need)
            if not isinstance(place, Placement):
                break
            room.take(need.resources, place.devices, f"task {found}")
            found += 1
    return found


def place(fleet: Fleet, waiting: Sequence[Job]) -> Seating:
    """Finds places for jobs that wait, each gang whole or not at all.

    Args:
        fleet: the nodes, once all replicas that fit have their places.
        waiting: jobs that are QUEUED and whose turn has come.
    """
    seating = Seating()
    for job in sorted(waiting, key=lambda job: (-job.priority, job.create_time, job.id)):
        need = need_of(job.gang)
        usages = [fleet.usages[row] for row in fleet.rows(need)]
        count = room_for(usages, need, job.gang.tasks)
        if count < job.fewest:
            nearest = fleet.closest(need)
            lacks = "" if nearest is None else f" The closest, nodes/{nearest.node}, lacks {nearest.lacks}."
            seating.reasons[job.id] = (
                f"There is room for {count} of its {job.gang.tasks} tasks.{lacks}"
                if fleet.usages
                else "No node is attached; start a worker."
            )
            continue
        places = []
        for index in range(count):
            own = replace(need, digest=job.digest_of(index)) if need.resources.disk_bytes else need
            found = rank.select(fleet, own, {})
            if found is None:
                break
            fleet.take(found, own)
            places.append(found)
        seating.places[job.id] = tuple(places)
    return seating


def _copy(usage: Usage) -> Usage:
    return replace(usage, gpus=copy.deepcopy(usage.gpus), bundles=dict(usage.bundles))
