"""How a change of targets goes, and what ends it early."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from penstock_kit.errors import InvalidArgument

ALL = 100
CANARY_STEPS = (1, 5, 25, 50, ALL)
MAX_STEPS = 100
MAX_STEP_SECONDS = 30 * 24 * 3600.0
MAX_MIN_ANSWERS = 10_000_000
MAX_LATENCY_RATIO = 1000.0
MAX_METRICS = 32
DEFAULT_STEP_SECONDS = 10.0
DEFAULT_MIN_ANSWERS = 50
DEFAULT_MAX_ERROR_INCREASE = 0.01
DEFAULT_MAX_LATENCY_RATIO = 1.5
DEFAULT_MAX_DISAGREEMENT = 0.01
DEFAULT_TOLERANCE = 0.001
DEFAULT_FALSE_ALARM_RATE = 0.01


class Strategy(Enum):
    """How the traffic moves; values are those of scheduler/v1/deployment.proto."""

    ALL_AT_ONCE = 1
    CANARY = 2
    BLUE_GREEN = 3
    SHADOW = 4


@dataclass(frozen=True, slots=True)
class MetricGuard:
    """A metric of the manifests that must not get worse by more than `max_loss`."""

    name: str
    lower_is_better: bool = False
    max_loss: float = 0.0


@dataclass(frozen=True, slots=True)
class RolloutPolicy:
    """How a change of targets goes; see scheduler/v1/deployment.proto.

    Attributes:
        strategy: how the traffic moves.
        steps: percent of the traffic at each step, rising to 100; for SHADOW the one part that is mirrored.
        step_seconds: how long each step holds at least.
        min_answers: answers of the new targets at each step at least.
        max_error_increase: how much more of the answers may be errors.
        max_latency_ratio: how often the 95th percentile of the latency may be the running version's.
        max_disagreement: part of the mirrored answers that may differ.
        tolerance: how far numbers may differ and still agree, relative to the larger.
        metrics: metrics of the manifests that must not get worse.
        false_alarm_rate: chance that a version as good as the running one is rolled back.
        patience_seconds: how long a step waits for enough answers; 0 is for ever.
    """

    strategy: Strategy = Strategy.ALL_AT_ONCE
    steps: tuple[int, ...] = ()
    step_seconds: float = DEFAULT_STEP_SECONDS
    min_answers: int = DEFAULT_MIN_ANSWERS
    max_error_increase: float = DEFAULT_MAX_ERROR_INCREASE
    max_latency_ratio: float = DEFAULT_MAX_LATENCY_RATIO
    max_disagreement: float = DEFAULT_MAX_DISAGREEMENT
    tolerance: float = DEFAULT_TOLERANCE
    metrics: tuple[MetricGuard, ...] = ()
    false_alarm_rate: float = DEFAULT_FALSE_ALARM_RATE
    patience_seconds: float = 0.0


def check_policy(policy: RolloutPolicy) -> RolloutPolicy:
    """Returns the policy with its defaults filled in for 0.

    Raises:
        InvalidArgument: steps do not rise to 100, or a number is out of range; the message names the field.
    """
    for name, value, most in (
        ("step_duration", policy.step_seconds, MAX_STEP_SECONDS),
        ("patience", policy.patience_seconds, MAX_STEP_SECONDS),
        ("min_answers", policy.min_answers, MAX_MIN_ANSWERS),
        ("max_error_increase", policy.max_error_increase, 0.99),
        ("max_disagreement", policy.max_disagreement, 0.99),
        ("max_latency_ratio", policy.max_latency_ratio, MAX_LATENCY_RATIO),
        ("tolerance", policy.tolerance, 1.0),
        ("false_alarm_rate", policy.false_alarm_rate, 0.5),
    ):
        # Written so that NaN is refused too.
        if not 0 <= value <= most:
            raise _wrong(name, f"is {value:g}; use 0 to {most:g}, 0 for the default.")
    ratio = policy.max_latency_ratio
    if 0 < ratio < 1:
        raise _wrong("max_latency_ratio", f"is {ratio:g}; use 1 or more, or 0 for the default.")
    return replace(
        policy,
        steps=_steps(policy),
        step_seconds=policy.step_seconds or DEFAULT_STEP_SECONDS,
        min_answers=policy.min_answers or DEFAULT_MIN_ANSWERS,
        max_error_increase=policy.max_error_increase or DEFAULT_MAX_ERROR_INCREASE,
        max_latency_ratio=ratio or DEFAULT_MAX_LATENCY_RATIO,
        max_disagreement=policy.max_disagreement or DEFAULT_MAX_DISAGREEMENT,
        tolerance=policy.tolerance or DEFAULT_TOLERANCE,
        metrics=_metrics(policy.metrics),
        false_alarm_rate=policy.false_alarm_rate or DEFAULT_FALSE_ALARM_RATE,
    )


def _steps(policy: RolloutPolicy) -> tuple[int, ...]:
    steps = policy.steps
    shown = ", ".join(map(str, steps[:20]))
    if policy.strategy is Strategy.CANARY:
        if not steps:
            return CANARY_STEPS
        rising = all(a < b for a, b in zip((0, *steps), steps, strict=False))
        if not rising or steps[-1] != ALL or len(steps) > MAX_STEPS:
            raise _wrong(
                "steps", f"are {shown}; use rising percents from 1, the last 100, such as 5, 25, 100."
            )
        return steps
    if policy.strategy is Strategy.SHADOW:
        if len(steps) > 1 or not all(1 <= step <= ALL for step in steps):
            raise _wrong("steps", f"are {shown}; SHADOW has one, the percent that is mirrored: 1 to 100.")
        return steps or (ALL,)
    if steps and steps != (ALL,):
        raise _wrong("steps", f"are {shown}; {policy.strategy.name} has none. Use CANARY for steps.")
    return (ALL,)


def _metrics(metrics: tuple[MetricGuard, ...]) -> tuple[MetricGuard, ...]:
    names = [metric.name for metric in metrics]
    if len(names) > MAX_METRICS or len(set(names)) != len(names):
        raise _wrong("metrics", f"are {len(names)}; name each once, {MAX_METRICS} at most.")
    for metric in metrics:
        if not 1 <= len(metric.name) <= 256 or "\0" in metric.name:
            raise _wrong(
                "metrics.name", f"is {metric.name[:80]!r}; use the name of a metric in the manifest."
            )
        if not 0 <= metric.max_loss < float("inf"):
            raise _wrong("metrics.max_loss", f"is {metric.max_loss:g} for {metric.name}; use 0 or more.")
    return metrics


def _wrong(field: str, words: str) -> InvalidArgument:
    return InvalidArgument(f"rollout_policy.{field} {words}", metadata={"field": f"rollout_policy.{field}"})
