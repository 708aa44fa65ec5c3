"""What the gateway counts for each deployment, at the price of a few list and integer operations."""

from __future__ import annotations

from bisect import bisect_left

from penstock_gateway.hotpath.cache import Shelf
from penstock_gateway.hotpath.mirror import Shadow
from penstock_kit.routing.table import Route, Target

# Of the places of a deployment, those kept for high priority, and for high and normal.
_HIGHS_PART, _NORMALS_PART = 16, 8
# The golden ratio's fraction. Of all steps around a circle it leaves the least uneven gaps, however many are
# taken: a weight of 1 % gets its part of every few hundred requests, where dice often give none or triple.
# (V. T. Sós, "On the distribution mod 1 of the sequence nα", 1958: the three-gap theorem.)
_STEP = (5**0.5 - 1) / 2
# Why a request is refused before it is queued.
QUEUE_FULL, TOO_LATE, SHUTTING_DOWN, NOT_READY = "queue_full", "expected_wait", "shutting_down", "not_ready"

# Seconds; from a quarter of a millisecond (the mesh's own cost) to the default deadline.
BUCKETS = (
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    60.0,
)


class Lane:
    """One deployment on the hot path.

    Args:
        route: As the scheduler tells it.
        start: A fraction, where the choice by weight begins: gateways shall not choose in step.

    Attributes:
        route: As the scheduler last told it.
        only: The target of every request without a selector, where there is no choice; else None.
        limits: Unanswered requests at most for one more of high, normal, low priority.
        in_flight: Unanswered requests now.
        refused: Requests that were not queued, by reason.
        shelf: Answers for equal requests; None where each is computed.
        shadows: Versions that get copies of some requests.
        codes: Answers by canonical code.
        buckets: Answers by duration; one more than `BUCKETS`.
        seconds: Sum of the durations.
    """

    __slots__ = (
        "_at",
        "buckets",
        "codes",
        "in_flight",
        "limits",
        "only",
        "refused",
        "route",
        "seconds",
        "shadows",
        "shelf",
    )

    def __init__(self, route: Route, start: float = 0.0) -> None:
        self._at = start
        self.in_flight = 0
        self.codes: dict[int, int] = {}
        self.refused: dict[str, int] = {}
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self.route = route
        self.only: Target | None = None
        self.shelf: Shelf | None = None
        self.shadows: tuple[Shadow, ...] = ()
        self.limits = (0, 0, 0)
        self.update(route)

    def update(self, route: Route) -> None:
        """Take the route as it is now."""
        self.route = route
        limit = route.max_queue_depth
        self.limits = (limit, limit - limit // _HIGHS_PART, limit - limit // _NORMALS_PART)
        answering = [t for t in route.targets if t.weight > 0 and t.ready]
        self.only = answering[0] if len(answering) == 1 else None

    def draw(self) -> float:
        """Return the fraction by which the next request's target is chosen."""
        at = self._at
        self._at = (at + _STEP) % 1.0
        return at

    def count(self, code: int, seconds: float) -> None:
        """Count one answer."""
        self.codes[code] = self.codes.get(code, 0) + 1
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds

    def refuse(self, reason: str) -> None:
        """Count one request that was not queued."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
