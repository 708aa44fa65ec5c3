"""How many replicas keep the wait in a queue short: the formula of Erlang."""

from __future__ import annotations

import math

LATE_SHARE = 0.05
"""So many requests may wait longer than the objective: it is kept most of the time."""
MAX_UTILIZATION = 0.85
"""Above this a small error of what was measured makes a long queue, however many replicas there are."""


def erlang_c(replicas: int, load: float) -> float:
    """The chance that a request finds every replica busy, when requests come at random.

    A. K. Erlang, 1917; by the recursion of the loss formula, B(0) = 1, B(n) = aB(n-1) / (n + aB(n-1)).

    Args:
        replicas: how many there are, at least 1.
        load: requests that come while one replica answers one, on average; below `replicas`.
    """
    lost = 1.0
    for busy in range(1, replicas + 1):
        lost = load * lost / (busy + load * lost)
    return lost / (1 - load / replicas * (1 - lost))


def late_share(replicas: int, arrivals_per_second: float, capacity: float, wait_seconds: float) -> float:
    """The part of the requests that wait longer than `wait_seconds`; 1 if the replicas cannot keep up.

    Args:
        replicas: how many there are.
        arrivals_per_second: requests that come.
        capacity: answers per second of one replica.
        wait_seconds: how long is too long.
    """
    spare = replicas * capacity - arrivals_per_second
    if spare <= 0:
        return 1.0
    return erlang_c(replicas, arrivals_per_second / capacity) * math.exp(-spare * wait_seconds)


def replicas_needed(arrivals_per_second: float, capacity: float, wait_seconds: float, most: int) -> int:
    """The fewest replicas with which most requests wait no longer than `wait_seconds`.

    Args:
        arrivals_per_second: requests that come.
        capacity: answers per second of one replica, above 0.
        wait_seconds: how long is too long.
        most: no more are of interest.
    """
    if arrivals_per_second <= 0:
        return 0
    low = max(1, math.ceil(arrivals_per_second / (capacity * MAX_UTILIZATION)))
    high = max(low, most)
    if low >= most:
        return most
    # More replicas are never worse: find the first that will do.
    while low < high:
        middle = (low + high) // 2
        if late_share(middle, arrivals_per_second, capacity, wait_seconds) <= LATE_SHARE:
            high = middle
        else:
            low = middle + 1
    return low
