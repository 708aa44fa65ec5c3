"""The decider in virtual time: steps, waves, chance, callers who wait, nothing at all."""

from __future__ import annotations

import math

import pytest

from penstock_scheduler.domain.autoscaling.decide import Facts, Memory, Target, decide
from penstock_scheduler.domain.autoscaling.queueing import erlang_c, late_share, replicas_needed
from penstock_scheduler.domain.autoscaling.settings import Autoscaling, Scale
from penstock_scheduler.domain.traffic import Counts, Window
from support.autoscaling_simulation import VERSION, Simulation, changes

SETTINGS = Autoscaling(
    min_replicas=1, max_replicas=40, queue_wait_seconds=0.05, idle_seconds=300, cool_down_seconds=60
)
FROM_ZERO = Autoscaling(
    min_replicas=0, max_replicas=8, queue_wait_seconds=0.05, idle_seconds=30, cool_down_seconds=10
)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("capacity", "rate"), [(100, 50), (20, 16), (500, 60)])
def test_ten_times_the_load_at_once_is_served_as_it_should_within_ten_seconds(
    capacity: float, rate: float, seed: int
) -> None:
    simulation = Simulation(
        SETTINGS,
        rate=lambda at: rate if at < 60 else 10 * rate,
        capacity=capacity,
        random_service=True,
        seed=seed,
    ).run(110)
    late = [second for second in simulation.late_seconds() if second >= 60]
    assert all(second < 70 for second in late), late


def first_step(profiled: float | None, seed: int) -> Simulation:
    """One replica of 100 a second that never was measured, and 450 a second come from second 15 on."""
    return Simulation(
        SETTINGS,
        rate=lambda at: 20.0 if at < 15 else 450.0,
        capacity=100.0,
        random_service=True,
        seed=seed,
        profiled=profiled,
    ).run(40)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_profile_is_what_a_replica_is_believed_to_do_until_that_is_measured(seed: int) -> None:
    known, unknown = first_step(200.0, seed), first_step(None, seed)
    assert unknown.history[15] == 1
    assert known.history[15] >= 3
    assert known.history[-1] <= unknown.history[-1]


@pytest.mark.parametrize("profiled", [10.0, 10_000.0])
def test_a_profile_that_is_wrong_by_far_is_forgotten_once_a_replica_was_measured(profiled: float) -> None:
    known, unknown = first_step(profiled, 1), first_step(None, 1)
    assert known.history[14] <= 2
    assert abs(known.history[-1] - unknown.history[-1]) <= 2
    assert all(second < 25 for second in known.late_seconds() if second >= 15)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("capacity", "mean"), [(20, 60), (5, 20)])
def test_a_wave_moves_hardly_more_replicas_than_it_must(capacity: float, mean: float, seed: int) -> None:
    def rate(at: float) -> float:
        return mean * (1 + 0.8 * math.sin(2 * math.pi * at / 600))

    first = replicas_needed(mean, capacity, 0.05, 40)
    simulation = Simulation(
        SETTINGS, rate=rate, capacity=capacity, random_service=True, seed=seed, replicas=first
    ).run(1500)
    least = changes([replicas_needed(rate(at + 0.5), capacity, 0.05, 40) for at in range(300, 1500)])
    assert 0 < simulation.changes(300) <= 2 * least


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("capacity", "rate"), [(20, 60), (100, 290), (5, 4)])
def test_what_comes_at_random_moves_nothing_once_it_is_known_what_a_replica_can_do(
    capacity: float, rate: float, seed: int
) -> None:
    first = replicas_needed(rate, capacity, 0.05, 40)
    simulation = Simulation(
        SETTINGS, rate=lambda at: rate, capacity=capacity, random_service=True, seed=seed, replicas=first
    ).run(900)
    # Ten minutes; a decider that followed chance would move dozens.
    assert simulation.changes(300) <= 4


@pytest.mark.parametrize("callers", [8, 32])
def test_callers_who_wait_for_each_answer_get_it_in_time_and_no_more_replicas_than_that_takes(
    callers: int,
) -> None:
    simulation = Simulation(SETTINGS, callers=callers, capacity=100).run(60)
    needed = math.ceil(callers / (0.05 + 1 / 100) / 100)
    assert needed <= simulation.history[-1] <= needed + 2
    assert all(second < 20 for second in simulation.late_seconds())


def test_the_last_replica_ends_when_nothing_came_for_long_enough_and_the_next_request_brings_one_back() -> (
    None
):
    simulation = Simulation(FROM_ZERO, rate=lambda at: 20 if at < 20 or at > 100 else 0.0, capacity=100).run(
        120
    )
    zero = [second for second, count in enumerate(simulation.history) if count == 0]
    assert zero[0] in range(45, 56)
    assert zero[-1] in range(99, 103)
    woken = [wait for at, wait in simulation.waits if at > 99]
    # The gateway's report a second after it, and a second of starting: in a mesh it reports at once.
    assert max(woken) <= 2.5
    assert not [at for at, wait in simulation.waits if at > 105 and wait > 0.05]


def facts(*, desired: int, waiting: int = 0, arrived: int = 0, known: bool = True, **fields: object) -> Facts:
    window = Window(2.0 if known else 0.0, Counts(), waiting)
    target = Target(VERSION, window, window, ready=desired)
    return Facts(FROM_ZERO, Scale(desired), (target,), arrived=arrived, **fields)  # type: ignore[arg-type]


def test_while_no_gateway_reports_nothing_changes_and_idleness_does_not_begin() -> None:
    scale, memory = decide(facts(desired=3), None, 0.0)
    for now in (20.0, 40.0, 60.0):
        scale, memory = decide(facts(desired=3, known=False), memory, now)
        assert scale.desired == 3
    assert decide(facts(desired=3), memory, 80.0)[0].desired > 0
    assert decide(facts(desired=3), memory, 91.0)[0].desired == 0


def test_a_request_brings_the_first_replica_whatever_else_is_known() -> None:
    scale, memory = decide(facts(desired=0), None, 0.0)
    assert scale.desired == 0
    assert decide(facts(desired=0, waiting=1), memory, 1.0)[0].desired == 1
    # It may have been refused before the report.
    assert decide(facts(desired=0, arrived=1), memory, 1.0)[0].desired == 1


def test_a_starved_cluster_takes_the_replicas_of_one_that_is_idle_not_of_one_that_works() -> None:
    memory = Memory(since=0.0, busy_at=0.0)
    assert decide(facts(desired=2, starved=True), memory, 5.0)[0].desired == 0
    assert decide(facts(desired=2, waiting=3, starved=True), memory, 5.0)[0].desired == 2


def test_a_new_leader_goes_on_from_what_is_stored() -> None:
    stored = Scale(5, ((VERSION, 100.0),))
    window = Window(10.0, Counts(arrived=4000, succeeded=4000), 5)
    target = Target(VERSION, window, window, ready=5)
    scale, memory = decide(Facts(SETTINGS, stored, (target,), 4000), None, 0.0)
    assert scale == stored
    quiet = Window(10.0, Counts(arrived=100, succeeded=100))
    idle = Target(VERSION, quiet, quiet, ready=5)
    assert decide(Facts(SETTINGS, scale, (idle,), 4100), memory, 59.0)[0].desired == 5


def test_limits_that_were_moved_count_at_once() -> None:
    narrow = Autoscaling(2, 3, 0.05, 60, 60)
    window = Window(2.0)
    for desired, allowed in ((1, 2), (9, 3)):
        target = Target(VERSION, window, window, ready=desired)
        assert decide(Facts(narrow, Scale(desired), (target,)), None, 0.0)[0].desired == allowed


def test_the_formula_of_erlang_gives_the_figures_of_the_tables() -> None:
    assert erlang_c(1, 0.5) == pytest.approx(0.5)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)
    assert late_share(2, 300, 100, 0.1) == 1.0
    for rate in (1, 10, 90, 400):
        need = replicas_needed(rate, 100, 0.05, 100)
        assert late_share(need, rate, 100, 0.05) <= 0.05
        assert need == 1 or rate / (need - 1) > 85 or late_share(need - 1, rate, 100, 0.05) > 0.05
    assert replicas_needed(0, 100, 0.05, 100) == 0
    assert replicas_needed(1e9, 1, 0.05, 7) == 7
