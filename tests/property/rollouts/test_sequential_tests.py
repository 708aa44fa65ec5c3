"""The sequential tests: false alarms however long one looks, and how soon a bad version is caught."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_scheduler.domain.rollout.sequential import (
    Share,
    log_above,
    log_against,
    log_below,
    log_in_favour,
)

ALPHA = 0.05
RUNS = 600
MOST_ANSWERS = 100_000
SEED = 20261122


def binomial(rng: random.Random, n: int, p: float) -> int:
    """Draws a binomial; by its normal limit where that is exact enough, so that long looks are cheap."""
    if n * p * (1 - p) > 200:
        return min(n, max(0, round(rng.gauss(n * p, math.sqrt(n * p * (1 - p))))))
    if p > 0.5:  # of the rarer kind there are fewer to find
        return n - binomial(rng, n, 1 - p)
    return sum(rng.random() < p for _ in range(n)) if n < 400 else poisson(rng, n, p)


def poisson(rng: random.Random, n: int, p: float) -> int:
    """Draws the number of successes by their distances."""
    if p <= 0:
        return 0
    hits, at = -1, 0
    while at <= n:
        at += 1 + int(math.log(1 - rng.random()) / math.log1p(-p)) if p < 1 else 1
        hits += 1
    return hits


def looks(rng: random.Random, p: float, q: float, share: float) -> Iterator[tuple[Share, Share]]:
    """A stream of answers, looked at often in the beginning and ever more rarely, up to `MOST_ANSWERS`."""
    new = old = Share(0, 0)
    while new.total < MOST_ANSWERS:
        more = max(1, new.total // 12)
        beside = max(1, round(more * (1 - share) / share))
        new = Share(new.hits + binomial(rng, more, p), new.total + more)
        old = Share(old.hits + binomial(rng, beside, q), old.total + beside)
        yield new, old


@pytest.mark.parametrize(
    ("p", "q", "margin", "share"),
    [
        (0.0, 0.0, 0.01, 0.05),
        (0.01, 0.0, 0.01, 0.05),
        (0.06, 0.05, 0.01, 0.5),
        (0.10, 0.05, 0.05, 0.05),
        (0.5, 0.45, 0.05, 0.9),
        (0.96, 0.95, 0.01, 0.5),
    ],
)
def test_a_version_at_the_limit_is_accused_no_more_often_than_alpha_over_endless_looks(
    p: float, q: float, margin: float, share: float
) -> None:
    rng = random.Random(SEED)
    alarm = math.log(1 / ALPHA)
    alarms = sum(
        any(log_against(new, old, margin) >= alarm for new, old in looks(rng, p, q, share))
        for _ in range(RUNS // 3)
    )
    assert alarms <= ALPHA * RUNS // 3


@pytest.mark.parametrize(("p", "limit"), [(0.01, 0.01), (0.2, 0.2), (0.0, 0.01)])
def test_a_share_at_a_known_limit_is_accused_no_more_often_than_alpha(p: float, limit: float) -> None:
    rng = random.Random(SEED)
    alarm = math.log(1 / ALPHA)
    alarms = sum(
        any(log_above(new, limit) >= alarm for new, _ in looks(rng, p, p, 0.5)) for _ in range(RUNS // 3)
    )
    assert alarms <= ALPHA * RUNS // 3


def answers_until_caught(p: float, q: float, margin: float, share: float, alpha: float) -> list[int]:
    rng = random.Random(SEED)
    caught = []
    for _ in range(60):
        stream = looks(rng, p, q, share)
        caught.append(
            next(new.total for new, old in stream if log_against(new, old, margin) >= math.log(1 / alpha))
        )
    return sorted(caught)


def test_five_percent_of_errors_beside_none_are_caught_within_a_few_hundred_answers() -> None:
    caught = answers_until_caught(0.05, 0.0, 0.01, 0.05, 0.001)
    assert caught[30] <= 350
    assert caught[-3] <= 900


def test_a_version_that_is_late_most_of_the_time_is_caught_within_dozens_of_answers() -> None:
    assert answers_until_caught(0.9, 0.05, 0.05, 0.05, 0.001)[-3] <= 30


def test_ten_percent_of_disagreement_are_caught_within_two_hundred_answers() -> None:
    rng = random.Random(SEED)
    caught = []
    for _ in range(60):
        stream = looks(rng, 0.1, 0.1, 0.5)
        caught.append(next(new.total for new, _ in stream if log_above(new, 0.01) >= math.log(100)))
    caught.sort()
    assert caught[30] <= 100
    assert caught[-3] <= 250


counts = st.tuples(st.integers(0, 5000), st.integers(0, 5000)).map(lambda two: Share(two[0], sum(two)))


@settings(max_examples=300, deadline=None)
@given(new=counts, old=counts, margin=st.floats(0.0001, 0.9))
def test_nothing_speaks_for_and_against_a_version_at_once(new: Share, old: Share, margin: float) -> None:
    against, favour = log_against(new, old, margin), log_in_favour(new, old, margin)
    assert not math.isnan(against)
    assert not math.isnan(favour)
    # Whichever side the data lie on, its likelihood is the largest there is, and no mixture exceeds it.
    assert min(against, favour) <= 1e-6


@settings(max_examples=200, deadline=None)
@given(share=counts, limit=st.floats(0.0001, 0.99))
def test_one_share_beside_a_limit_gives_evidence_for_one_side_only(share: Share, limit: float) -> None:
    assert min(log_above(share, limit), log_below(share, limit)) <= 1e-6


def test_more_errors_are_more_evidence_and_more_of_the_old_ones_less() -> None:
    old = Share(2, 1000)
    evidence = [log_against(Share(hits, 200), old, 0.01) for hits in range(5, 100, 5)]
    assert evidence == sorted(evidence)
    excused = [log_against(Share(30, 200), Share(hits, 1000), 0.01) for hits in range(0, 100, 5)]
    assert excused == sorted(excused, reverse=True)


def test_the_fewer_answers_of_the_running_version_there_are_the_less_the_evidence_weighs() -> None:
    evidence = [log_against(Share(10, 100), Share(0, total), 0.01) for total in (3, 10, 100, 1000)]
    assert evidence == sorted(evidence)
