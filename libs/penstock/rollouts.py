"""Words and settings of rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.errors import InvalidArgument
from penstock.scheduler.v1 import deployment_pb2, rollout_pb2

STRATEGIES = ("all-at-once", "canary", "blue-green", "shadow")
"""How traffic moves to new targets, as people write it."""
# google.protobuf.Duration ends at some 10,000 years.
_MAX_DURATION_SECONDS = 3e11
_ENDED = (
    rollout_pb2.ROLLOUT_STATE_SUCCEEDED,
    rollout_pb2.ROLLOUT_STATE_ROLLED_BACK,
    rollout_pb2.ROLLOUT_STATE_ABORTED,
)


def rollout_policy(
    strategy: str = "canary",
    *,
    steps: Sequence[int] = (),
    step_seconds: float = 0.0,
    min_answers: int = 0,
    max_error_increase: float = 0.0,
    max_latency_ratio: float = 0.0,
    max_disagreement: float = 0.0,
    tolerance: float = 0.0,
    metrics: Sequence[deployment_pb2.MetricGuard] = (),
    false_alarm_rate: float = 0.0,
    patience_seconds: float = 0.0,
) -> deployment_pb2.RolloutPolicy:
    """Return how the targets of a deployment change; 0 means the default of scheduler/v1/deployment.proto.

    Args:
        strategy: One of `STRATEGIES`.
        steps: Percent of the traffic at each step of a canary, rising, the last 100; for a shadow the one
            percent that is mirrored.
        step_seconds: How long each step holds at least.
        min_answers: Answers of the new version at each step at least.
        max_error_increase: How much more of the answers may be errors, as a part of 1.
        max_latency_ratio: How often the 95th percentile of the latency may be the running version's.
        max_disagreement: Part of the mirrored answers that may differ.
        tolerance: How far numbers may differ and still agree, relative to the larger.
        metrics: Metrics of the versions in the registry that must not get worse.
        false_alarm_rate: Chance that a version as good as the running one is rolled back.
        patience_seconds: How long a step waits for enough answers; 0 is for ever.

    Raises:
        InvalidArgument: There is no such strategy, or a time is absurd.
    """
    if strategy not in STRATEGIES:
        raise InvalidArgument(f"There is no strategy {strategy!r}; use {', '.join(STRATEGIES)}.")
    name = strategy.upper().replace("-", "_")
    policy = deployment_pb2.RolloutPolicy(
        strategy=deployment_pb2.RolloutStrategy.Value(f"ROLLOUT_STRATEGY_{name}"),
        steps=steps,
        min_answers=min_answers,
        max_error_increase=max_error_increase,
        max_latency_ratio=max_latency_ratio,
        max_disagreement=max_disagreement,
        tolerance=tolerance,
        metrics=metrics,
        false_alarm_rate=false_alarm_rate,
    )
    for duration, seconds in ((policy.step_duration, step_seconds), (policy.patience, patience_seconds)):
        if not abs(seconds) < _MAX_DURATION_SECONDS:
            raise InvalidArgument(f"A rollout cannot wait for {seconds:g} s.")
        if seconds:
            duration.FromNanoseconds(round(seconds * 1e9))
    return policy


def ended(rollout: rollout_pb2.Rollout) -> bool:
    """Whether nothing more happens to a rollout."""
    return rollout.state in _ENDED


def rollout_state(rollout: rollout_pb2.Rollout) -> str:
    """Return the state in one word: RUNNING."""
    return rollout_pb2.RolloutState.Name(rollout.state).removeprefix("ROLLOUT_STATE_")


def describe_rollout(rollout: rollout_pb2.Rollout | None) -> str:
    """Return where a rollout stands, in words."""
    if rollout is None:
        return "nothing was heard of it"
    return f"{rollout_state(rollout)}. {rollout.message}".strip()
