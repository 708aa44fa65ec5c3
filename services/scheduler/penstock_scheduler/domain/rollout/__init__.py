"""Rollouts: how traffic moves to new targets, and what brings it back. Pure."""

from penstock_scheduler.domain.rollout.policy import MetricGuard, RolloutPolicy, Strategy, check_policy
from penstock_scheduler.domain.rollout.state import Evidence, GuardKind, Rollout, RolloutState, Tally

__all__ = [
    "Evidence",
    "GuardKind",
    "MetricGuard",
    "Rollout",
    "RolloutPolicy",
    "RolloutState",
    "Strategy",
    "Tally",
    "check_policy",
]
