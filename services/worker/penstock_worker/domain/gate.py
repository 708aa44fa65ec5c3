"""The gate: what a compressed or converted version must keep of its source, and whether it did.

A loss of a metric is in its own unit and positive when the new version is worse: `source - result` where
more is better (accuracy, f1, r2), `result - source` where less is (loss, mse, mae, perplexity).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

MORE_IS_BETTER = frozenset({"accuracy", "f1", "r2"})
LESS_IS_BETTER = frozenset({"loss", "mse", "mae", "perplexity"})
# Which metric speaks for a version, the first that was measured.
_MAIN = ("accuracy", "r2", "perplexity", "loss", "f1", "mse", "mae")
# 0.97 - 0.96 is 0.010000000000000009: what the caller wrote in decimals must not fail by its last bit.
_SLACK = 1e-9


@dataclasses.dataclass(frozen=True, slots=True)
class Gate:
    """What must hold; a limit that is None is not looked at."""

    metric: str = ""
    """Which metric; empty means the main one of those measured."""
    max_metric_loss: float | None = None
    """How much of it may be lost, in its own unit."""
    min_speed_up: float | None = None
    """Throughput over the source's at least."""
    max_size_ratio: float | None = None
    """Size over the source's at most."""

    @property
    def empty(self) -> bool:
        """Whether everything passes."""
        return self.max_metric_loss is None and self.min_speed_up is None and self.max_size_ratio is None


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a version beside its source; None for what was not."""

    metric_loss: float | None = None
    """How much worse its metric is, in the metric's unit."""
    speed_up: float | None = None
    """Its throughput over the source's."""
    size_ratio: float | None = None
    """Its size over the source's."""

    def values(self) -> dict[str, float]:
        """Return what was measured, by name."""
        found = dataclasses.asdict(self)
        return {name: value for name, value in found.items() if value is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """How a version did at its gate."""

    gate: Gate
    passed: bool
    failures: tuple[str, ...]
    """What it failed, for people; empty if it passed."""
    measured: Measured


def judge(gate: Gate, measured: Measured) -> Verdict:
    """Return the verdict. What the gate limits and nobody measured, or what is no number, fails."""
    metric = gate.metric or "metric"
    failures = [
        *_over(f"loss of {metric}", measured.metric_loss, gate.max_metric_loss),
        *_under("speed-up", measured.speed_up, gate.min_speed_up),
        *_over("size over the source's", measured.size_ratio, gate.max_size_ratio),
    ]
    return Verdict(gate, not failures, tuple(failures), measured)


def metric_loss(metric: str, source: float, result: float) -> float:
    """Return how much worse `result` is than `source`, in the metric's own unit.

    Raises:
        ValueError: Nobody knows whether more or less of this metric is better.
    """
    if metric in MORE_IS_BETTER:
        return source - result
    if metric in LESS_IS_BETTER:
        return result - source
    raise ValueError(
        f"There is no metric {metric!r} for a gate; there are "
        f"{', '.join(sorted(MORE_IS_BETTER | LESS_IS_BETTER))}."
    )


def main_metric(measured: Collection[str]) -> str:
    """Return which of the measured metrics speaks for a version.

    Raises:
        ValueError: None of them can.
    """
    for name in _MAIN:
        if name in measured:
            return name
    raise ValueError(f"None of {', '.join(sorted(measured)) or 'no metrics'} can stand at a gate.")


def judge_metrics(
    gate: Gate,
    source: Mapping[str, float],
    result: Mapping[str, float],
    *,
    speed_up: float | None = None,
    size_ratio: float | None = None,
) -> Verdict:
    """Return the verdict over the metrics of source and result; the gate in it names the metric that counted.

    Args:
        gate: What must hold.
        source: Metrics of the source.
        result: Metrics of the new version, of the same rows.
        speed_up: Throughput over the source's; None if it was not measured.
        size_ratio: Size over the source's; None if it was not measured.

    Raises:
        ValueError: The gate names a metric that has no better and worse.
    """
    both = source.keys() & result.keys()
    loss = None
    if both:
        metric = gate.metric or main_metric(both)
        gate = dataclasses.replace(gate, metric=metric)
        if metric in both:
            loss = metric_loss(metric, source[metric], result[metric])
    return judge(gate, Measured(loss, speed_up, size_ratio))


def _over(what: str, value: float | None, limit: float | None) -> list[str]:
    if limit is None:
        return []
    if value is None:
        return [f"the {what} was not measured"]
    if math.isnan(value) or value > limit + _SLACK:
        return [f"the {what} is {value:.4g}, more than {limit:.4g}"]
    return []


def _under(what: str, value: float | None, limit: float | None) -> list[str]:
    if limit is None:
        return []
    if value is None:
        return [f"the {what} was not measured"]
    if math.isnan(value) or value < limit - _SLACK:
        return [f"the {what} is {value:.4g}, less than {limit:.4g}"]
    return []
