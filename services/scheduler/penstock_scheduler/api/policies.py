"""Rollout policies, from protos and back."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from penstock.scheduler.v1 import deployment_pb2
from penstock_scheduler.domain.rollout import MetricGuard, RolloutPolicy, Strategy, check_policy


def policy_from_message(message: deployment_pb2.RolloutPolicy) -> RolloutPolicy:
    """How a caller wants targets to change, with the defaults filled in.

    Raises:
        InvalidArgument: a field is wrong; the message names it.
    """
    return check_policy(
        RolloutPolicy(
            strategy=Strategy(int(message.strategy) or Strategy.ALL_AT_ONCE.value),
            steps=tuple(message.steps),
            step_seconds=_seconds(message.step_duration),
            min_answers=message.min_answers,
            max_error_increase=message.max_error_increase,
            max_latency_ratio=message.max_latency_ratio,
            max_disagreement=message.max_disagreement,
            tolerance=message.tolerance,
            metrics=tuple(
                MetricGuard(metric.name, metric.lower_is_better, metric.max_loss)
                for metric in message.metrics
            ),
            false_alarm_rate=message.false_alarm_rate,
            patience_seconds=_seconds(message.patience),
        )
    )


def policy_to_message(policy: RolloutPolicy | None) -> deployment_pb2.RolloutPolicy | None:
    """A policy for callers; None where nobody gave one."""
    if policy is None:
        return None
    return deployment_pb2.RolloutPolicy(
        strategy=deployment_pb2.RolloutStrategy.Value(f"ROLLOUT_STRATEGY_{policy.strategy.name}"),
        steps=policy.steps,
        step_duration=duration(policy.step_seconds),
        min_answers=policy.min_answers,
        max_error_increase=policy.max_error_increase,
        max_latency_ratio=policy.max_latency_ratio,
        max_disagreement=policy.max_disagreement,
        tolerance=policy.tolerance,
        metrics=[
            deployment_pb2.MetricGuard(
                name=metric.name, lower_is_better=metric.lower_is_better, max_loss=metric.max_loss
            )
            for metric in policy.metrics
        ],
        false_alarm_rate=policy.false_alarm_rate,
        patience=duration(policy.patience_seconds) if policy.patience_seconds else None,
    )


def duration(seconds: float) -> Duration:
    """Seconds as protos have them."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _seconds(message: Duration) -> float:
    return message.seconds + message.nanos / 1e9
