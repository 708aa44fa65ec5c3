"""Does a free model wait for more requests exactly where that pays?"""

import heapq
import math
import random
from collections.abc import Callable

import pytest

from penstock_worker.domain.curve import LatencyCurve
from penstock_worker.domain.pacing import Pacer
from penstock_worker.domain.returns import Returns

RETURN_SECONDS = 0.002
MOST = 32


def gaining(rows: int) -> float:
    """A model that gains much from batches: 5 ms and half a millisecond per row."""
    return 0.005 + 0.0005 * rows


def steady(rows: int) -> float:
    """One that gains everything: a call takes 10 ms, whatever is in it."""
    return 0.010


def linear(rows: int) -> float:
    """One that gains nothing: 2 ms a row."""
    return 0.002 * rows


class World:
    """One model and its callers, on a clock of its own.

    Args:
        seconds_of: Seconds of a call by its rows.
        objective: See `Pacer`.
        waits: Whether the model does what its pacer says, or always takes what is there.
    """

    def __init__(
        self, seconds_of: Callable[[int], float], *, objective: float = 0.0, waits: bool = True
    ) -> None:
        curve = LatencyCurve(MOST, seconds_of(1), seconds_of(MOST))
        self.pacer = Pacer(curve, MOST, objective)
        self.seconds_of = seconds_of
        self.waits = waits
        self.now = 0.0
        self.waiting: list[float] = []
        self.coming: list[float] = []
        self.sizes: list[int] = []
        self.latencies: list[float] = []
        self.paused = 0.0

    def arrive(self) -> None:
        """Take in what has come by now."""
        while self.coming and self.coming[0] <= self.now:
            at = heapq.heappop(self.coming)
            self.waiting.append(at)
            self.pacer.returns.arrived(at, 1)

    def call(self, returns_after: Callable[[], float] | None = None) -> None:
        """Make one call; those whose `returns_after` is given send again so long after their answer."""
        self.arrive()
        if not self.waiting:
            self.now = self.coming[0]
            self.arrive()
        began = self.now
        while self.waits:
            pause, rows = self.pacer.pause(self.now, len(self.waiting), self.waiting[0], math.inf)
            if not pause:
                break
            until = self.now + pause
            while self.coming and self.coming[0] <= until and len(self.waiting) < rows:
                self.now = self.coming[0]
                self.arrive()
            if len(self.waiting) < rows:
                self.now = until
        self.paused += self.now - began
        batch = self.waiting[: self.pacer.limit]
        del self.waiting[: self.pacer.limit]
        self.pacer.begun(len(batch), len(self.waiting), self.now - began)
        took = self.seconds_of(len(batch))
        self.now += took
        self.sizes.append(len(batch))
        self.latencies += [self.now - at for at in batch]
        self.arrive()
        self.pacer.computed(len(batch), took, self.now)
        if returns_after is not None:
            for _ in batch:
                heapq.heappush(self.coming, self.now + returns_after())


def closed_loop(world: World, callers: int, calls: int, spread: float = 0.0) -> float:
    """Play callers who send again 2 ms after their answer; return answers a second.

    Half of them come first, the others a little later: without waiting they would alternate for ever.
    """
    dice = random.Random(1)
    world.coming = [0.0] * (callers // 2) + [0.004] * (callers - callers // 2)
    for _ in range(calls):
        world.call(lambda: RETURN_SECONDS + dice.random() * spread)
    return sum(world.sizes) / world.now


def open_loop(world: World, rate: float, seconds: float) -> float:
    """Play callers who wait for nobody; return the mean latency."""
    dice = random.Random(2)
    at = 0.0
    while at < seconds:
        at += dice.expovariate(rate)
        heapq.heappush(world.coming, at)
    while world.coming or world.waiting:
        world.call()
    return sum(world.latencies) / len(world.latencies)


@pytest.mark.parametrize("callers", [2, 4, 16, 24, 32])
@pytest.mark.parametrize("spread", [0.0, 0.001])
def test_callers_that_come_back_together_are_computed_together(callers: int, spread: float) -> None:
    world = World(gaining)
    closed_loop(world, callers, 60, spread)
    assert sum(size == callers for size in world.sizes[20:]) >= (32 if spread else 40)


def test_waiting_serves_more_than_not_waiting() -> None:
    waiting = closed_loop(World(gaining), 16, 300, 0.001)
    hasty = closed_loop(World(gaining, waits=False), 16, 300, 0.001)
    assert waiting > 1.1 * hasty
    # Nearly all that a model can do for sixteen callers who need 2 to 3 ms to come back.
    assert waiting > 0.95 * 16 / (gaining(16) + 0.003)


def test_more_callers_than_a_batch_holds_are_served_in_full_batches() -> None:
    world = World(steady)
    rate = closed_loop(world, 40, 300, 0.001)
    assert rate > 1.1 * closed_loop(World(steady, waits=False), 40, 300, 0.001)
    assert sum(size == MOST for size in world.sizes[20:]) > 250


@pytest.mark.parametrize("callers", [1, 64, 256])
def test_neither_a_single_caller_nor_a_full_house_is_kept_waiting(callers: int) -> None:
    world = World(gaining)
    closed_loop(world, callers, 200)
    assert world.paused == 0


@pytest.mark.parametrize("seconds_of", [gaining, steady, linear])
@pytest.mark.parametrize("load", [0.05, 0.5, 0.9])
def test_callers_who_wait_for_nobody_are_answered_as_soon_as_without_waiting(
    seconds_of: Callable[[int], float], load: float
) -> None:
    rate = load * MOST / seconds_of(MOST)
    with_pauses = open_loop(World(seconds_of), rate, 20)
    without = open_loop(World(seconds_of, waits=False), rate, 20)
    assert with_pauses < 1.03 * without


def test_a_model_that_gains_nothing_from_batches_does_not_wait() -> None:
    world = World(linear)
    closed_loop(world, 16, 200, 0.001)
    assert world.paused == 0


def test_without_measurements_nothing_waits() -> None:
    pacer = Pacer(LatencyCurve(MOST), MOST)
    pacer.returns.answered(0.0, 16)
    assert pacer.pause(0.0, 1, 0.0, math.inf) == (0.0, 0)


def test_when_callers_stop_coming_back_waiting_stops() -> None:
    world = World(gaining)
    closed_loop(world, 16, 100)
    world.coming.clear()
    world.waiting.clear()
    before = world.paused
    for _ in range(100):
        world.coming = [world.now + 0.001]
        world.call()
    assert world.paused - before < 0.02


def test_no_wait_makes_a_request_late() -> None:
    world = World(gaining)
    closed_loop(world, 16, 100)
    world.pacer.returns.arrived(world.now, 1)
    pause, rows = world.pacer.pause(world.now, 1, world.now, world.now + 0.050)
    assert 0 < pause <= 0.004
    assert rows == 16
    assert world.pacer.pause(world.now, 1, world.now, world.now + gaining(16)) == (0.0, 0)


def test_batches_are_as_large_as_the_objective_allows() -> None:
    # A request that comes when a call has just begun waits for that one and its own.
    world = World(gaining, objective=0.0301)
    closed_loop(world, 64, 200)
    assert world.pacer.limit == 20
    assert set(world.sizes[20:]) == {20}
    assert Pacer(LatencyCurve(MOST, 0.1, 0.2), MOST, 0.030).limit == 1
    assert Pacer(LatencyCurve(MOST, 0.001, 0.002), MOST, 0.030).limit == MOST


def test_waiting_keeps_the_objective() -> None:
    world = World(steady, objective=0.025)
    closed_loop(world, 16, 100)
    assert max(world.latencies[200:]) <= 0.025


def test_the_model_counts_as_the_bottleneck_while_batches_are_full() -> None:
    world = World(gaining)
    closed_loop(world, 64, 50)
    assert world.pacer.saturated
    world.coming.clear()
    world.waiting.clear()
    closed_loop(world, 1, 50)
    assert not world.pacer.saturated
    policy = world.pacer.policy()
    assert (policy.max_rows, policy.objective, policy.saturated) == (MOST, 0.0, False)
    assert dict(policy.curve)[1] == pytest.approx(gaining(1))


def test_the_curve_follows_what_is_measured() -> None:
    curve = LatencyCurve(8, 0.001, 0.008)
    assert [curve.seconds(1), curve.seconds(8)] == [0.001, 0.008]
    assert curve.seconds(4) == pytest.approx(0.004)
    assert curve.seconds(0.5) == 0.0005
    assert curve.seconds(16) == pytest.approx(0.016)
    for _ in range(50):
        curve.measured(8, 0.004)
    assert curve.seconds(8) == pytest.approx(0.004, rel=0.01)
    assert curve.rows_within(0.003) == 5
    assert curve.rows_within(0.0001) == 1


def test_sizes_of_a_large_batch_share_few_points() -> None:
    curve = LatencyCurve(4096)
    for rows in range(1, 4097):
        curve.measured(rows, rows * 1e-3)
    assert len(curve.points()) < 100
    for rows in (1, 7, 100, 1000, 4096):
        assert curve.seconds(rows) == pytest.approx(rows * 1e-3, rel=0.15)


def test_what_is_read_late_counts_where_it_came() -> None:
    """Requests that came just before an answer may be read after it: they do not follow from that answer."""
    returns = Returns()
    for _ in range(30):
        start = returns.answered_at if returns.answered_rows else 0.0
        returns.answered(start + 0.020, 8)
        # All eight were back after 2 ms; four were read in time, the others only after the next answer.
        for _ in range(4):
            returns.arrived(start + 0.022, 1)
        returns.answered(start + 0.040, 8)
        for _ in range(4):
            returns.arrived(start + 0.022, 1)
        for _ in range(8):
            returns.arrived(start + 0.042, 1)
    assert returns.share(0.001) == pytest.approx(0.0, abs=0.05)
    assert returns.share(0.003) == pytest.approx(1.0, abs=0.05)
    assert returns.arrived_rows == 8


def test_a_crowd_that_is_late_as_a_whole_is_still_waited_for() -> None:
    pacer = Pacer(LatencyCurve(16, 0.008, 0.012), 16)
    now = crowd_comes_back(pacer, 16, times=60, after=0.002)
    # One is back, later than usual; the fifteen others are queued but not read, or held up with it.
    pacer.returns.arrived(now + 0.0027, 1)
    seconds, rows = pacer.pause(now + 0.0033, 1, now + 0.0027, math.inf)
    assert 0 < seconds < 0.004
    assert rows == 16


def test_a_crowd_that_stays_away_is_not_waited_for_twice_as_long_as_usual() -> None:
    pacer = Pacer(LatencyCurve(16, 0.008, 0.012), 16)
    now = crowd_comes_back(pacer, 16, times=60, after=0.002)
    pacer.returns.arrived(now + 0.002, 1)
    assert pacer.pause(now + 0.0065, 1, now + 0.002, math.inf) == (0.0, 0)


def crowd_comes_back(pacer: Pacer, rows: int, *, times: int, after: float) -> float:
    """Let a crowd come back so often, within half a millisecond; return when it was answered last."""
    now = 100.0
    for _ in range(times):
        pacer.computed(rows, 0.012, now)
        for row in range(rows):
            pacer.returns.arrived(now + after + 0.0005 * row / rows, 1)
        now += 0.015
    pacer.computed(rows, 0.012, now)
    return now
