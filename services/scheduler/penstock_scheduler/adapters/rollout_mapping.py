"""Rollouts and their policies as JSON, and back."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from penstock_scheduler.domain.deployment import Target
from penstock_scheduler.domain.rollout import (
    Evidence,
    GuardKind,
    MetricGuard,
    Rollout,
    RolloutPolicy,
    RolloutState,
    Strategy,
    Tally,
)
from penstock_scheduler.domain.traffic import NO_COUNTS, Counts

Values = dict[str, Any]


def policy_to_json(policy: RolloutPolicy | None) -> Values | None:
    """What the column `rollout_policy` holds."""
    return None if policy is None else {**asdict(policy), "strategy": policy.strategy.name}


def policy_from_json(value: Values | None) -> RolloutPolicy | None:
    """The inverse of `policy_to_json`."""
    return None if value is None else _policy(value)


def _policy(value: Values) -> RolloutPolicy:
    return RolloutPolicy(
        **{
            **value,
            "strategy": Strategy[value["strategy"]],
            "steps": tuple(value["steps"]),
            "metrics": tuple(MetricGuard(**metric) for metric in value["metrics"]),
        }
    )


def targets_to_json(targets: tuple[Target, ...]) -> list[Values]:
    """Targets as JSON."""
    return [asdict(target) for target in targets]


def targets_from_json(value: list[Values]) -> tuple[Target, ...]:
    """The inverse of `targets_to_json`."""
    return tuple(Target(**target) for target in value)


def rollout_to_json(rollout: Rollout) -> Values:
    """What the column `rollout` and the table `rollouts` hold; the counts only until the end."""
    tally = Tally() if rollout.ended else rollout.tally
    return {
        "number": rollout.number,
        "policy": policy_to_json(rollout.policy),
        "before": targets_to_json(rollout.before),
        "after": targets_to_json(rollout.after),
        "create_time": rollout.create_time.isoformat(),
        "step_time": rollout.step_time.isoformat(),
        "actor": rollout.actor,
        "state": rollout.state.name,
        "message": rollout.message,
        "step": rollout.step,
        "absent": rollout.absent,
        "tally": {"old": _counts_to_json(tally.old), "new": _counts_to_json(tally.new)},
        "full": None if rollout.ended else _counts_to_json(rollout.full),
        "full_bucket": rollout.full_bucket,
        "bucket": rollout.bucket,
        "evidence": [
            {**asdict(each), "kind": each.kind.name, "time": each.time.isoformat()}
            for each in rollout.evidence
        ],
        "end_time": None if rollout.end_time is None else rollout.end_time.isoformat(),
        "hands": rollout.hands,
    }


def rollout_from_json(value: Values) -> Rollout:
    """The inverse of `rollout_to_json`."""
    return Rollout(
        **{
            **value,
            "policy": _policy(value["policy"]),
            "before": targets_from_json(value["before"]),
            "after": targets_from_json(value["after"]),
            "create_time": datetime.fromisoformat(value["create_time"]),
            "step_time": datetime.fromisoformat(value["step_time"]),
            "state": RolloutState[value["state"]],
            "full": _counts_from_json(value["full"]),
            "tally": Tally(*(_counts_from_json(value["tally"][side]) for side in ("old", "new"))),
            "evidence": tuple(
                Evidence(
                    **{
                        **each,
                        "kind": GuardKind[each["kind"]],
                        "time": datetime.fromisoformat(each["time"]),
                    }
                )
                for each in value["evidence"]
            ),
            "end_time": None if value["end_time"] is None else datetime.fromisoformat(value["end_time"]),
        }
    )


def _counts_to_json(counts: Counts) -> Values | None:
    return None if counts == NO_COUNTS else asdict(counts)


def _counts_from_json(value: Values | None) -> Counts:
    return NO_COUNTS if value is None else Counts(**{**value, "latencies": tuple(value["latencies"])})
