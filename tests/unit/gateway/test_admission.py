"""What admission promises, held against a simulated queue: who is refused, when, and what it costs."""

import pytest

from penstock_gateway.domain.admission import Backlog, Waitlist
from support.queue_simulation import Call, Load, Model, Simulation

HIGH, NORMAL, LOW = 0, 1, 2
SEEDS = (1, 2, 3)
# The batching model of the benchmarks: 1,270 requests a second, in calls of 25 ms.
MLP = Model()
STEADY = Model(batch=1, seconds=lambda n: 0.005, noise=0.3)
SLOW = Model(batch=16, seconds=lambda n: 0.06)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("times", [1.2, 2.0, 4.0])
@pytest.mark.parametrize(("model", "replicas"), [(MLP, 1), (STEADY, 4), (SLOW, 2)])
def test_under_overload_nearly_all_of_the_capacity_is_answered_in_time(
    model: Model, replicas: int, times: float, seed: int
) -> None:
    capacity = model.capacity * replicas
    world = Simulation(model, replicas=replicas, seed=seed)
    world.offer(Load(times * capacity, end=5))
    world.run(6)
    seen = world.sum(1, 5)
    assert seen.good >= 0.95 * 4 * capacity
    assert seen.late <= 0.02 * seen.good
    # The first second, too, in which the pace must be learned.
    assert world.sum(0, 1).good >= 0.9 * capacity


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("model", [MLP, STEADY, Model(batch=16, seconds=lambda n: 0.03 + 0.001 * n)])
def test_below_four_fifths_of_the_capacity_nobody_is_refused(model: Model, part: float, seed: int) -> None:
    world = Simulation(model, seed=seed)
    world.offer(Load(part * model.capacity, end=8))
    world.run(9)
    seen = world.sum(0, 8)
    assert seen.refused == 0
    assert seen.good >= 0.999 * seen.came


@pytest.mark.parametrize("seed", SEEDS)
def test_after_overload_all_are_admitted_again_within_half_a_second(seed: int) -> None:
    world = Simulation(MLP, seed=seed)
    world.offer(Load(4 * MLP.capacity, end=4), Load(0.7 * MLP.capacity, start=4, end=8))
    world.run(9)
    seen = world.sum(4.5, 8)
    assert (seen.refused, seen.late) == (0, 0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("drops", [True, False])
def test_it_holds_without_the_replicas_help_once_the_pace_is_known(seed: int, drops: bool) -> None:
    world = Simulation(MLP, seed=seed, drops=drops)
    world.offer(Load(2 * MLP.capacity, end=5))
    world.run(6)
    assert world.sum(1, 5).good >= 0.95 * 4 * MLP.capacity


@pytest.mark.parametrize("seed", SEEDS)
def test_gateways_that_share_a_queue_reckon_with_one_another(seed: int) -> None:
    world = Simulation(MLP, seed=seed, gateways=3)
    world.offer(*(Load(0.7 * MLP.capacity, end=5, gateway=gateway) for gateway in range(3)))
    # One of them joins when the queue is full already.
    world.offer(Load(MLP.capacity, start=2, end=5, gateway=2))
    world.run(6)
    seen = world.sum(1, 5)
    assert seen.good >= 0.93 * 4 * MLP.capacity
    assert seen.late <= 0.05 * seen.good


@pytest.mark.parametrize("seed", SEEDS)
def test_low_priority_is_shed_first(seed: int) -> None:
    capacity = MLP.capacity
    world = Simulation(MLP, seed=seed)
    world.offer(
        Load(0.6 * capacity, end=6, priority=HIGH), Load(1.5 * capacity, end=6, priority=LOW, timeout=0.5)
    )
    world.run(7)
    high, low = world.sum(1, 6, [HIGH]), world.sum(1, 6, [LOW])
    assert high.good >= 0.99 * high.came
    assert low.refused >= 0.6 * low.came
    # What high leaves is used.
    assert high.good + low.good >= 0.9 * 5 * capacity


@pytest.mark.parametrize("seed", SEEDS)
def test_high_priority_that_comes_into_a_full_queue_is_admitted(seed: int) -> None:
    world = Simulation(MLP, seed=seed)
    world.offer(Load(2 * MLP.capacity, end=6), Load(0.5 * MLP.capacity, start=3, end=6, priority=HIGH))
    world.run(7)
    high = world.sum(3, 6, [HIGH])
    assert high.good >= 0.97 * high.came


def test_a_cold_start_refuses_nobody() -> None:
    world = Simulation(MLP, first_seconds=5.0)
    world.offer(Load(300, end=8, timeout=30))
    world.run(20)
    seen = world.sum(0, 8)
    assert (seen.refused, seen.late) == (0, 0)


def test_a_burst_from_idle_refuses_nobody_who_could_be_answered() -> None:
    world = Simulation(MLP)
    world.burst(1.0, 250)
    world.run(3)
    assert world.sum(1, 2).refused == 0


def test_a_burst_after_light_load_is_not_judged_by_the_pace_of_light_load() -> None:
    world = Simulation(MLP)
    world.offer(Load(40, end=6))
    world.burst(5.0, 200)
    world.run(7)
    assert world.sum(0, 6).refused == 0


def test_a_stall_of_the_replicas_does_not_make_them_look_slow() -> None:
    world = Simulation(MLP)
    world.offer(Load(0.6 * MLP.capacity, end=8, timeout=10))
    world.at(3.0, world.pause, 2.0)
    world.run(14)
    seen = world.sum(0, 8)
    assert (seen.refused, seen.late) == (0, 0)


@pytest.mark.parametrize("part", [0.05, 0.8])
def test_what_a_stall_did_to_the_margin_is_forgotten_in_seconds(part: float) -> None:
    world = Simulation(MLP)
    rate = part * MLP.capacity
    world.offer(Load(rate / 2, end=30), Load(rate / 2, end=30, timeout=3))
    world.offer(Load(MLP.capacity, end=4))
    world.at(3.0, world.pause, 5.0)
    world.run(8.0)
    assert world.backlogs[0][NORMAL].margin > 0.1
    world.run(28)
    assert world.backlogs[0][NORMAL].margin < 0.1
    assert world.sum(15, 28).refused == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_more_replicas_are_used_and_fewer_are_respected(seed: int) -> None:
    model = STEADY
    world = Simulation(model, seed=seed, replicas=2)
    world.offer(Load(6 * model.capacity, end=12))
    world.at(4.0, world.resize, 4)
    world.at(8.0, world.resize, 1)
    world.run(13)
    for start, end, replicas in ((1, 4, 2), (4.5, 8, 4), (9, 12, 1)):
        seen = world.sum(start, end)
        assert seen.good >= 0.93 * (end - start) * replicas * model.capacity
        assert seen.late <= 0.1 * seen.good


@pytest.mark.parametrize("seed", SEEDS)
def test_a_machine_that_becomes_slow_and_fast_again_is_followed(seed: int) -> None:
    world = Simulation(MLP, seed=seed)
    world.offer(Load(2 * MLP.capacity, end=9))
    world.at(3.0, setattr, world, "model", Model(seconds=lambda n: 3 * MLP.seconds(n)))
    world.at(6.0, setattr, world, "model", MLP)
    world.run(10)
    assert world.sum(4, 6).good >= 0.9 * 2 * MLP.capacity / 3
    assert world.sum(7, 9).good >= 0.93 * 2 * MLP.capacity


def test_who_comes_back_after_the_time_told_is_admitted() -> None:
    world = Simulation(MLP)
    world.offer(Load(2 * MLP.capacity, end=3.0))
    world.run(3.0)
    backlog = world.backlogs[0][NORMAL]
    tries = 0
    while (told := backlog.expected_wait) and backlog.enter(0.25) >= 0:
        tries += 1
        assert tries < 1000
    assert 0.1 < told < 1.0
    world.backlogs[0][NORMAL].waiting -= tries  # those never went into the simulated queue
    world.run(3.0 + told)
    assert backlog.enter(0.25) >= 0


def test_callers_with_more_time_are_admitted_where_others_are_not() -> None:
    world = Simulation(MLP)
    world.offer(Load(2 * MLP.capacity, end=3.0))
    world.run(3.0)
    backlog = world.backlogs[0][NORMAL]
    while backlog.enter(0.25) >= 0:
        pass
    assert backlog.enter(1.0) >= 0


def test_without_figures_nobody_is_refused() -> None:
    backlog = Backlog()
    assert all(backlog.enter(0.001) == 0 for _ in range(10_000))
    assert (backlog.waiting, backlog.expected_wait, backlog.answers_per_second) == (10_000, 0, 0)


def test_figures_are_forgotten_after_a_while() -> None:
    world = Simulation(MLP)
    world.offer(Load(2 * MLP.capacity, end=2))
    world.run(4)
    backlog = world.backlogs[0][NORMAL]
    assert backlog.answers_per_second == pytest.approx(MLP.capacity, rel=0.2)
    backlog.age(60)
    assert backlog.answers_per_second == 0
    assert backlog.enter(0.001) == 0


def test_what_leaves_unanswered_frees_its_place_and_says_no_pace() -> None:
    backlog = Backlog()
    for _ in range(100):
        backlog.enter(1)
    for number in range(50):
        backlog.missed(1 + number / 100, 1.0, 0.0)
    for _ in range(50):
        backlog.leave()
    assert (backlog.waiting, backlog.answers_per_second) == (0, 0)


def test_a_queues_own_requests_are_not_taken_for_those_of_others() -> None:
    waitlist = Waitlist("m:1:abc")
    normal = waitlist.backlogs[NORMAL]
    for _ in range(100):
        normal.enter(1)
    waitlist.see_depths((0, 120, 0), (0, 103, 0))  # twenty were answered meanwhile
    assert normal.others == 0
    waitlist.see_depths((0, 100, 0), (0, 300, 7))
    assert [backlog.others for backlog in waitlist.backlogs] == [0, 200, 7]


def test_requests_of_many_rows_fill_a_call_sooner() -> None:
    def refused(rows: int) -> int:
        waitlist = Waitlist("m:1:abc")
        waitlist.offer(1, 32)
        waitlist.see_totals(0, 0)
        waitlist.see_totals(100, 100 * rows)
        backlog = waitlist.backlogs[NORMAL]
        # One call of 100 ms for each request.
        for number in range(40):
            for _ in range(20):
                backlog.enter(100)
            for _ in range(20):
                backlog.answered(number * 2.0 + _ / 10, 2.0, 0.0)
            backlog.enter(100)
        return sum(backlog.enter(1.0) < 0 for _ in range(20))

    assert refused(32) > 0
    assert refused(1) == 0


def test_the_simulation_loses_nobody() -> None:
    world = Simulation(MLP, seed=4)
    world.offer(Load(2 * MLP.capacity, end=2))
    world.run(4)
    seen = world.sum(0, 2)
    assert seen.came == seen.good + seen.refused + seen.late
    assert all(isinstance(call, Call) for queue in world.queues for call in queue)
    assert [backlog.waiting for backlog in world.backlogs[0]] == [0, 0, 0]
