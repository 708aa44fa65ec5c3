"""Which candidates are worth having."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from penstock_worker.domain.pareto import Outcome, front, gain, recommend


def outcome(*, size: float = 1.0, latency: float = 1.0, speed: float = 1.0, loss: float = 0.0) -> Outcome:
    return Outcome(
        size_bytes=int(size * 1000) if math.isfinite(size) else 0,
        size_ratio=size,
        latency_seconds=latency,
        throughput=100 * speed,
        speed_up=speed,
        metric_loss=loss,
        metrics={"accuracy": 0.9 - loss},
        rows=100,
    )


def test_who_is_beaten_in_everything_is_not_on_the_front() -> None:
    good, worse = outcome(size=0.3, speed=3), outcome(size=0.4, speed=2)
    assert front([worse, good]) == [1]


def test_who_is_best_in_one_thing_is_on_the_front() -> None:
    small, fast, right = outcome(size=0.1, speed=1, loss=0.02), outcome(speed=9, loss=0.01), outcome()
    assert front([small, fast, right]) == [0, 1, 2]


def test_of_equal_ones_the_first_stays() -> None:
    assert front([outcome(), outcome()]) == [0]


def test_what_is_no_number_is_never_on_the_front() -> None:
    assert front([outcome(loss=math.nan), outcome(loss=0.5)]) == [1]
    assert front([outcome(latency=math.inf)]) == []


def test_twice_as_fast_counts_as_much_as_half_as_large() -> None:
    assert gain(outcome(speed=2)) == gain(outcome(size=0.5))
    assert gain(outcome()) == 0


def test_the_one_that_gains_most_is_recommended_among_those_that_passed() -> None:
    candidates = [outcome(size=0.1, speed=9, loss=0.3), outcome(size=0.3, speed=3), outcome(size=0.5)]
    assert recommend(candidates, [False, True, True], 0.01) == 1


def test_if_none_passed_a_small_loss_comes_before_a_large_gain() -> None:
    candidates = [outcome(size=0.1, speed=9, loss=0.3), outcome(size=0.9, loss=0.005)]
    assert recommend(candidates, [False, False], 0.01) == 1


def test_if_all_lose_too_much_the_one_that_loses_least_is_recommended() -> None:
    candidates = [outcome(size=0.1, loss=0.3), outcome(size=0.9, loss=0.2)]
    assert recommend(candidates, [False, False], 0.01) == 1
    assert recommend([], [], 0.01) is None


numbers = st.floats(0.01, 10, allow_nan=False)
outcomes = st.builds(
    lambda size, latency, speed, loss: outcome(size=size, latency=latency, speed=speed, loss=loss),
    numbers,
    numbers,
    numbers,
    st.floats(-0.5, 0.5),
)


def _beats(one: Outcome, other: Outcome) -> bool:
    return (
        one.size_ratio <= other.size_ratio
        and one.latency_seconds <= other.latency_seconds
        and one.speed_up >= other.speed_up
        and one.metric_loss <= other.metric_loss
    )


@given(st.lists(outcomes, max_size=12))
def test_nobody_on_the_front_is_beaten_and_everybody_else_is(candidates: list[Outcome]) -> None:
    best = front(candidates)
    for place in best:
        assert not any(_beats(candidates[other], candidates[place]) for other in best if other != place)
    for place in set(range(len(candidates))) - set(best):
        assert any(_beats(candidates[other], candidates[place]) for other in best)


@given(st.lists(outcomes, min_size=1, max_size=8), st.data())
def test_what_is_recommended_passed_if_anything_did(candidates: list[Outcome], data: st.DataObject) -> None:
    passed = data.draw(st.lists(st.booleans(), min_size=len(candidates), max_size=len(candidates)))
    chosen = recommend(candidates, passed, 0.01)
    assert chosen is not None
    assert passed[chosen] or not any(passed)
