"""Which of the feasible places is best."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from penstock_scheduler.domain.planner.feasible import Need, Placement
from penstock_scheduler.domain.planner.fleet import Fleet, Numbers
from penstock_scheduler.domain.replica import Replica


def turn(replica: Replica) -> tuple[object, ...]:
    """Sorts replicas that wait: who waits longest first; of those that came together, the largest first.

    What is small finds room between what is large, seldom the other way round ("best fit decreasing").
    """
    needs = replica.resources
    return (
        replica.create_time,
        -needs.gpus,
        not needs.exclusive,
        -needs.gpu_memory_millis,
        -needs.gpu_memory_bytes,
        -needs.memory_bytes,
        -needs.cpu_millis,
        replica.id,
    )


def select(fleet: Fleet, need: Need, neighbours: Mapping[str, int]) -> Placement | None:
    """Picks a place, None if there is none; the earlier a criterion stands here, the more it weighs.

    1. few replicas of the same deployment on the node, so that the loss of a node costs little;
    2. the node has the bundle in its cache, so that it starts sooner;
    3. GPUs are packed: a replica that needs a part of one goes where a GPU in use is left the fullest, and
       if it needs unused ones, where the fewest of those are; one that needs none stays away from nodes
       that have them;
    4. much free memory;
    5. the name, so that the choice is repeatable.

    Args:
        fleet: the nodes, and what is given out.
        need: what the replica needs.
        neighbours: replicas of the same deployment, by node.
    """
    while len(rows := fleet.rows(need)):
        row = _best(fleet, need, neighbours, rows)
        place = fleet.settle(need, row)
        if place is not None:
            return place
    return None


def _best(fleet: Fleet, need: Need, neighbours: Mapping[str, int], rows: Numbers) -> int:
    if neighbours:
        crowd = np.zeros(len(fleet.usages), np.int64)
        for node, count in neighbours.items():
            crowd[fleet.row_of[node]] = count
        rows = _least(rows, crowd[rows])
    caching = fleet.caching(need.digest)
    if caching is not None and caching[rows].any():
        rows = rows[caching[rows]]
    if need.resources.gpus:
        rows = _least(rows, fleet.tightest(need)[rows])
        rows = _least(rows, fleet.untouched[rows])
        rows = _least(rows, fleet.free_gpu_memory[rows])
    else:
        rows = _least(rows, fleet.gpu_count[rows])
    return int(_least(rows, -fleet.free_memory[rows])[0])


def _least(rows: Numbers, values: Numbers) -> Numbers:
    """Those of the rows that have the least value."""
    if len(rows) == 1:
        return rows
    least: Numbers = rows[values == values.min()]
    return least
