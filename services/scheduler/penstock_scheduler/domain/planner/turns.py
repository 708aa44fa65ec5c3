"""Whose turn it is: among projects the one with the least of its share, within a project its own order."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def in_turn(
    waiting: Iterable[T],
    project: Callable[[T], str],
    order: Callable[[T], Any],
    share: Callable[[str], float],
) -> Iterator[T]:
    """Yields what waits, each at its turn: weighted dominant resource fairness, by progressive filling.

    The next thing is the first of the project whose dominant share over its weight is least; of equal ones,
    that of the project whose first comes first. Shares may grow between two things, as one gets its place.

    Args:
        waiting: what waits.
        project: whose it is.
        order: its place among those of its project; the least comes first.
        share: the dominant share of a project over its weight.
    """
    queues: dict[str, list[T]] = defaultdict(list)
    for each in waiting:
        queues[project(each)].append(each)
    for queue in queues.values():
        queue.sort(key=order)
    if len(queues) == 1:
        yield from next(iter(queues.values()))
        return
    heads = dict.fromkeys(queues, 0)
    heap = [(share(name), order(queue[0]), name) for name, queue in queues.items()]
    heapq.heapify(heap)
    while heap:
        _, _, name = heapq.heappop(heap)
        queue = queues[name]
        yield queue[heads[name]]
        heads[name] += 1
        if heads[name] < len(queue):
            heapq.heappush(heap, (share(name), order(queue[heads[name]]), name))
