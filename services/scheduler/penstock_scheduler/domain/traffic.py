"""What gateways count of the requests for one version behind a deployment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from penstock_scheduler.domain.version import VersionKey

LATENCY_BUCKETS = 64
"""Buckets of the latencies, see scheduler/v1/routing_service.proto: four for each doubling, from 100 µs."""
_NO_LATENCIES = (0,) * LATENCY_BUCKETS
_FIRST_BOUND_SECONDS = 100e-6
_BUCKETS_PER_DOUBLING = 4


def latency_bucket(seconds: float) -> int:
    """The bucket in which an answer that took so long is counted."""
    if seconds <= _FIRST_BOUND_SECONDS:
        return 0
    bucket = int(_BUCKETS_PER_DOUBLING * math.log2(seconds / _FIRST_BOUND_SECONDS))
    return min(bucket, LATENCY_BUCKETS - 1)


class TrafficKey(NamedTuple):
    """One version behind a deployment."""

    deployment: str
    version: VersionKey


@dataclass(frozen=True, slots=True)
class Counts:
    """How often what happened; they only grow.

    Attributes:
        arrived: requests that came, refused ones included, mirrored ones not.
        succeeded: requests answered with a result.
        failed: requests answered with an error of the model or its replica.
        overloaded: requests refused for want of capacity.
        agreed: mirrored answers that agree with those returned.
        disagreed: mirrored answers that differ, errors included.
        latency_microseconds: sum over the answers, from the gateway to the end.
        latencies: answers by how long they took, in `LATENCY_BUCKETS` buckets.
    """

    arrived: int = 0
    succeeded: int = 0
    failed: int = 0
    overloaded: int = 0
    agreed: int = 0
    disagreed: int = 0
    latency_microseconds: int = 0
    latencies: tuple[int, ...] = _NO_LATENCIES

    @property
    def answered(self) -> int:
        """Requests that a replica answered, with a result or an error."""
        return self.succeeded + self.failed

    def __add__(self, other: Counts) -> Counts:
        return self._combine(other, int.__add__)

    def __sub__(self, other: Counts) -> Counts:
        """What came since `other`, an earlier count of the same; nothing is negative."""
        return self._combine(other, lambda mine, others: max(0, mine - others))

    def most(self, other: Counts) -> Counts:
        """The larger of each: of two reports of one process, what the later one says."""
        return self._combine(other, max)

    def without_latencies(self) -> Counts:
        """The same, but for the histogram."""
        return replace(self, latencies=_NO_LATENCIES)

    def part(self, fraction: float) -> Counts:
        """A part of each, rounded."""
        return self._combine(self, lambda mine, _: round(mine * fraction))

    def mean_latency_seconds(self) -> float | None:
        """Mean time that answers took; None without answers."""
        return self.latency_microseconds / 1e6 / self.answered if self.answered else None

    def latency_quantile_seconds(self, quantile: float) -> float | None:
        """The upper bound of the bucket in which the quantile lies; None without answers."""
        rank = quantile * sum(self.latencies)
        seen = 0
        for bucket, count in enumerate(self.latencies):
            seen += count
            if count and seen >= rank:
                return _FIRST_BOUND_SECONDS * 2 ** ((bucket + 1) / _BUCKETS_PER_DOUBLING)
        return None

    def _combine(self, other: Counts, combine: Callable[[int, int], int]) -> Counts:
        plain = self.latencies is other.latencies is _NO_LATENCIES
        return Counts(
            arrived=combine(self.arrived, other.arrived),
            succeeded=combine(self.succeeded, other.succeeded),
            failed=combine(self.failed, other.failed),
            overloaded=combine(self.overloaded, other.overloaded),
            agreed=combine(self.agreed, other.agreed),
            disagreed=combine(self.disagreed, other.disagreed),
            latency_microseconds=combine(self.latency_microseconds, other.latency_microseconds),
            latencies=_NO_LATENCIES if plain else tuple(map(combine, self.latencies, other.latencies)),
        )


NO_COUNTS = Counts()
"""Nothing happened yet."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one gateway process says of one version.

    Attributes:
        key: what it speaks of.
        counts: since the process began.
        waiting: requests that wait for an answer now.
        waiting_for_replica: those among them that wait because there is no replica.
    """

    key: TrafficKey
    counts: Counts
    waiting: int = 0
    waiting_for_replica: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """What happened to a version over the last while.

    Attributes:
        seconds: how long the window is; 0 when no gateway reports, and so nobody knows.
        counts: what happened within it; without latencies.
        waiting: requests that wait for an answer now, those being computed included.
        waiting_for_replica: those among them that wait because there is no replica.
    """

    seconds: float = 0.0
    counts: Counts = NO_COUNTS
    waiting: int = 0
    waiting_for_replica: int = 0

    @property
    def known(self) -> bool:
        """Whether any gateway reports; without one, silence does not mean that nothing comes."""
        return self.seconds > 0

    @property
    def arrivals_per_second(self) -> float:
        """Requests that came per second; 0 when nobody knows."""
        return self.counts.arrived / self.seconds if self.known else 0.0

    @property
    def answers_per_second(self) -> float:
        """Requests that a replica answered per second; 0 when nobody knows."""
        return self.counts.answered / self.seconds if self.known else 0.0
