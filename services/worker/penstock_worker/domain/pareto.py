"""Which of several compressed versions are worth having: those that no other one beats in everything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured of a version beside its source.

    Attributes:
        size_bytes: Of the files that a replica loads.
        size_ratio: The same over the source's.
        latency_seconds: Median of a call with one row.
        throughput: Rows a second at the batch size that it likes best.
        speed_up: The same over the source's, in neighbouring turns.
        metric_loss: How much worse its metric is, in the metric's unit; below 0 if it is better.
        metrics: Its metrics by name.
        rows: Held-out rows that they were measured on.
    """

    size_bytes: int
    size_ratio: float
    latency_seconds: float
    throughput: float
    speed_up: float
    metric_loss: float
    metrics: dict[str, float]
    rows: int


def front(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the places of those that no other one dominates, in their order.

    One dominates another if it is as good in size, latency, throughput and metric, and better in one of
    them. Of equal ones the first stays. Outcomes with something that is no number are never on the front.
    """
    points = [_costs(outcome) for outcome in outcomes]
    usable = [place for place, point in enumerate(points) if all(math.isfinite(cost) for cost in point)]
    return [
        place
        for place in usable
        if not any(
            _dominates(points[other], points[place]) or (other < place and points[other] == points[place])
            for other in usable
            if other != place
        )
    ]


def gain(outcome: Outcome) -> float:
    """Return what a version gains over its source, in powers of e: ln(speed-up) - ln(size ratio).

    Twice as fast counts as much as half as large; the source itself has 0.
    """
    return math.log(max(outcome.speed_up, 1e-9)) - math.log(max(outcome.size_ratio, 1e-9))


def recommend(outcomes: Sequence[Outcome], passed: Sequence[bool], max_loss: float) -> int | None:
    """Return the place of the one to take, or None if there are none.

    Among those that passed the gate, the one of the front that gains most. If none passed: among those that
    lose `max_loss` at most, and if there are none either, the one that loses least.

    Args:
        outcomes: Of all candidates.
        passed: Whether each passed the gate.
        max_loss: Of the metric, in its own unit.
    """
    usable = [place for place, outcome in enumerate(outcomes) if all(map(math.isfinite, _costs(outcome)))]
    for chosen in (
        [place for place in usable if passed[place]],
        [place for place in usable if outcomes[place].metric_loss <= max_loss],
    ):
        if chosen:
            best = front([outcomes[place] for place in chosen])
            return max((chosen[place] for place in best), key=lambda place: gain(outcomes[place]))
    if not usable:
        return None
    return min(usable, key=lambda place: (outcomes[place].metric_loss, -gain(outcomes[place])))


def _costs(outcome: Outcome) -> tuple[float, float, float, float]:
    """Return what is to be small; throughput beside the source's, as the machine's own pace changes."""
    return (outcome.size_ratio, outcome.latency_seconds, -outcome.speed_up, outcome.metric_loss)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
