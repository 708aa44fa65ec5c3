"""Guards: what a rollout looks at before it goes on, and when it goes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from penstock_scheduler.domain.rollout import sequential
from penstock_scheduler.domain.rollout.policy import MetricGuard, RolloutPolicy, Strategy
from penstock_scheduler.domain.rollout.sequential import Share, to_ratio
from penstock_scheduler.domain.rollout.state import Evidence, GuardKind, Rollout
from penstock_scheduler.domain.traffic import LATENCY_BUCKETS, Counts

IN_FAVOUR = 3.0
"""A step passes when what was seen is so many times likelier of a fine version than of one at the limit …"""
LONG_ENOUGH = 10
"""… or after so many times `min_answers`: nearer to the limit than that cannot be told in any fair time."""
LATE_SHARE = 0.05
"""Part of the answers above the 95th percentile."""
LATE_MARGIN = 0.05
"""How much more of the new version's answers may be late: a fresh process is not yet as warm, and answers
that wait for the same pause of a machine are late together, which a test of single answers does not know."""
ENOUGH_LATENCIES = 40
"""Answers from which the 95th percentile is read; they choose where to look, and are not counted again."""
_BUCKETS_PER_DOUBLING = 4
_FIRST_BOUND_SECONDS = 100e-6


@dataclass(frozen=True, slots=True)
class Look:
    """When a guard looks: what does not depend on the guard."""

    now: datetime
    percent: int
    held_seconds: float
    threshold: float
    min_answers: int


def sequential_guards(policy: RolloutPolicy) -> int:
    """How many guards look at the traffic of one step."""
    return {Strategy.CANARY: 2, Strategy.BLUE_GREEN: 2, Strategy.SHADOW: 1}.get(policy.strategy, 0)


def threshold(policy: RolloutPolicy) -> float:
    """Evidence at which a guard is breached: 1/α, with α shared out evenly over steps and guards."""
    return max(1, sequential_guards(policy) * len(policy.steps)) / policy.false_alarm_rate


def judge_traffic(rollout: Rollout, now: datetime) -> tuple[Evidence, ...]:
    """What the guards of the present step say of what was counted so far."""
    policy = rollout.policy
    look = Look(
        now,
        rollout.percent,
        max(0.0, (now - rollout.step_time).total_seconds()),
        threshold(policy),
        policy.min_answers,
    )
    old, new = rollout.tally.old, rollout.tally.new
    if policy.strategy is Strategy.SHADOW:
        return (_disagreement(look, new, policy.max_disagreement),)
    errors = _errors(look, old, new, policy.max_error_increase)
    return errors, _latency(look, old, new, rollout.bucket, policy.max_latency_ratio)


def bucket_of_95th(counts: Counts) -> int:
    """The bucket that holds the 95th percentile; -1 while there are too few answers."""
    total = sum(counts.latencies)
    if total < ENOUGH_LATENCIES:
        return -1
    above = total
    for bucket, count in enumerate(counts.latencies):
        above -= count
        if above <= LATE_SHARE * total:
            return bucket
    return LATENCY_BUCKETS - 1


def _errors(look: Look, old: Counts, new: Counts, margin: float) -> Evidence:
    before, after = Share(old.failed, old.answered), Share(new.failed, new.answered)
    words = (
        f"{_percent(after.value)} of {after.total:,} answers are errors, {_percent(before.value)} of "
        f"{before.total:,} before; {_percent(margin)} more is allowed."
    )
    return _two(look, GuardKind.ERROR_RATE, before, after, margin, words)


def _latency(look: Look, old: Counts, new: Counts, bucket: int, ratio: float) -> Evidence:
    if bucket < 0:
        total = sum(new.latencies)
        words = "Too few answers of the running version yet to know how long they take."
        return Evidence(
            GuardKind.LATENCY,
            look.now,
            words,
            after_count=total,
            passed=total >= look.min_answers * LONG_ENOUGH,
            percent=look.percent,
            held_seconds=look.held_seconds,
        )
    # What takes up to `ratio` times as long is fine; rounded up to the next bucket, 19 % wide.
    limit = min(bucket + math.ceil(_BUCKETS_PER_DOUBLING * math.log2(ratio) - 1e-9), LATENCY_BUCKETS - 1)
    before = Share(sum(old.latencies[bucket + 1 :]), sum(old.latencies))
    after = Share(sum(new.latencies[limit + 1 :]), sum(new.latencies))
    words = (
        f"{_percent(after.value)} of {after.total:,} answers take longer than {_seconds(limit)}; "
        f"{_percent(before.value)} of {before.total:,} before took longer than {_seconds(bucket)}."
    )
    # Nothing of the running version to compare with: a twentieth is late by the choice of the bucket.
    margin = LATE_MARGIN if before.total else LATE_SHARE + LATE_MARGIN
    return _two(look, GuardKind.LATENCY, before, after, margin, words)


def _disagreement(look: Look, new: Counts, limit: float) -> Evidence:
    share = Share(new.disagreed, new.agreed + new.disagreed)
    against = to_ratio(sequential.log_above(share, limit))
    in_favour = to_ratio(sequential.log_below(share, limit))
    words = f"{_percent(share.value)} of {share.total:,} mirrored answers differ; {_percent(limit)} may."
    return _evidence(look, GuardKind.DISAGREEMENT, Share(0, 0), share, limit, (against, in_favour), words)


def _two(look: Look, kind: GuardKind, before: Share, after: Share, margin: float, words: str) -> Evidence:
    against = to_ratio(sequential.log_against(after, before, margin))
    in_favour = to_ratio(sequential.log_in_favour(after, before, margin))
    limit = min(1.0, before.value + margin)
    return _evidence(look, kind, before, after, limit, (against, in_favour), words)


def _evidence(
    look: Look,
    kind: GuardKind,
    before: Share,
    after: Share,
    limit: float,
    ratios: tuple[float, float],
    words: str,
) -> Evidence:
    against, in_favour = ratios
    enough = after.total >= look.min_answers
    return Evidence(
        kind=kind,
        time=look.now,
        words=words,
        before_count=before.total,
        after_count=after.total,
        before=before.value,
        after=after.value,
        limit=limit,
        against=against,
        in_favour=in_favour,
        breached=against >= look.threshold,
        passed=enough and (in_favour >= IN_FAVOUR or after.total >= look.min_answers * LONG_ENOUGH),
        percent=look.percent,
        held_seconds=look.held_seconds,
    )


def judge_metric(
    guard: MetricGuard, before: Mapping[str, float], after: Mapping[str, float], now: datetime
) -> Evidence:
    """Compares a metric that the versions record; one that the new version does not record is a breach."""
    old, new = before.get(guard.name), after.get(guard.name)
    if new is None or not math.isfinite(new):
        words = f"The new version does not record {guard.name}."
        return Evidence(GuardKind.METRIC, now, words, guard.name, before=old or 0.0, breached=True)
    if old is None or not math.isfinite(old):
        words = f"{guard.name} is {new:g}; the running version does not record it."
        return Evidence(GuardKind.METRIC, now, words, guard.name, after=new, limit=new, passed=True)
    limit = old + guard.max_loss if guard.lower_is_better else old - guard.max_loss
    worse = new > limit if guard.lower_is_better else new < limit
    side = "at most" if guard.lower_is_better else "at least"
    return Evidence(
        GuardKind.METRIC,
        now,
        f"{guard.name} is {new:g}, {old:g} before; it must be {side} {limit:g}.",
        guard.name,
        before=old,
        after=new,
        limit=limit,
        breached=worse,
        passed=not worse,
    )


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _seconds(bucket: int) -> str:
    seconds = _FIRST_BOUND_SECONDS * 2 ** ((bucket + 1) / _BUCKETS_PER_DOUBLING)
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
