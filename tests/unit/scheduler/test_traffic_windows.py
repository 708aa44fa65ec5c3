"""Counts of many gateways become windows and totals."""

from __future__ import annotations

import pytest

from penstock_kit.errors import Unavailable
from penstock_scheduler.domain.traffic import LATENCY_BUCKETS, Counts, Seen, TrafficKey
from penstock_scheduler.domain.version import VersionKey
from penstock_scheduler.usecases.traffic import (
    GONE_SECONDS,
    HISTORY_SECONDS,
    MAX_GATEWAYS,
    MAX_VERSIONS,
    Traffic,
)

V1, V2 = VersionKey("digits", 1), VersionKey("digits", 2)


class World:
    """A scheduler that leads, its clock, and what its gateways say."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wakes = 0
        self.traffic = Traffic(self, clock=lambda: self.now)
        self.traffic.follow(True)

    def wake(self) -> None:
        self.wakes += 1

    def say(
        self,
        gateway: str,
        arrived: int,
        *,
        version: VersionKey = V1,
        waiting: int = 0,
        asking: int = 0,
        uptime: float | None = None,
        deployment: str = "digits",
    ) -> None:
        counts = Counts(arrived=arrived, succeeded=arrived)
        self.traffic.report(gateway, uptime, [Seen(TrafficKey(deployment, version), counts, waiting, asking)])


def test_a_steady_stream_of_two_gateways_has_the_sum_of_their_rates() -> None:
    world = World()
    for second in range(20):
        world.now = 1000.0 + second
        world.say("a", 100 * second)
        world.now += 0.4
        world.say("b", 50 * second)
    for seconds in (2.0, 5.0, 10.0):
        window = world.traffic.window("digits", V1, seconds)
        assert window.seconds == seconds
        assert window.arrivals_per_second == pytest.approx(150, rel=0.15)


def test_a_burst_after_silence_is_not_spread_over_the_silence() -> None:
    world = World()
    world.say("a", 0)
    for _ in range(15):
        world.now += 1
        world.say("a", 0)
    world.now += 1
    world.say("a", 300)
    assert world.traffic.window("digits", V1, 1.0).counts.arrived == 300
    assert world.traffic.window("digits", V1, 10.0).counts.arrived == 300
    world.now += 1
    world.say("a", 300)
    assert world.traffic.window("digits", V1, 1.0).counts.arrived == 0


def test_totals_keep_what_a_gateway_counted_that_is_gone_but_not_who_waits_there() -> None:
    world = World()
    world.say("a", 10, waiting=3, asking=2)
    world.say("b", 5, waiting=1)
    assert world.traffic.window("digits", V1, 5).waiting == 4
    assert world.traffic.window("digits", V1, 5).waiting_for_replica == 2
    world.now += GONE_SECONDS + 1
    world.say("b", 6, waiting=1)
    assert world.traffic.totals("digits", V1).arrived == 16
    assert world.traffic.window("digits", V1, 5).waiting == 1
    assert world.traffic.window("digits", V1, 5).waiting_for_replica == 0


def test_a_report_that_comes_twice_or_late_takes_nothing_back_and_adds_nothing() -> None:
    world = World()
    for arrived in (10, 10, 7, 12):
        world.say("a", arrived)
    assert world.traffic.totals("digits", V1).arrived == 12


def test_what_an_old_process_counted_before_the_lead_is_where_counting_begins() -> None:
    world = World()
    world.now += 5
    world.say("old", 1_000_000, uptime=3600)
    world.say("new", 7, uptime=1)
    assert world.traffic.totals("digits", V1).arrived == 7
    world.say("old", 1_000_003, uptime=3601)
    assert world.traffic.totals("digits", V1).arrived == 10


def test_without_gateways_nobody_knows() -> None:
    world = World()
    assert not world.traffic.window("digits", V1, 5).known
    world.say("a", 5)
    assert world.traffic.window("digits", V1, 5).known
    assert not world.traffic.window("digits", V1, 5).counts.disagreed
    world.now += GONE_SECONDS + 1
    assert not world.traffic.window("digits", V1, 5).known


def test_a_request_that_waits_for_a_replica_wakes_the_loop_at_once() -> None:
    world = World()
    world.say("a", 1, waiting=1)
    assert world.wakes == 0
    world.say("a", 1, waiting=1, asking=1)
    assert world.wakes == 1


def test_deployments_that_nobody_knows_are_ignored_also_when_they_are_made_later() -> None:
    world = World()
    world.traffic.keep({"other"})
    world.say("a", 50, asking=1)
    assert world.traffic.totals("digits", V1).arrived == 0
    assert world.wakes == 0
    world.traffic.keep({"digits"})
    world.say("a", 53)
    assert world.traffic.totals("digits", V1).arrived == 3


def test_versions_of_a_deployment_are_told_apart() -> None:
    world = World()
    world.say("a", 90)
    world.say("b", 10, version=V2)
    assert world.traffic.totals("digits", V2).arrived == 10
    assert world.traffic.window("digits", V2, 5).counts.arrived == 10
    assert set(world.traffic.versions("digits")) == {V1, V2}


def test_a_scheduler_that_does_not_lead_refuses_reports_and_forgets() -> None:
    world = World()
    world.say("a", 5)
    world.traffic.follow(False)
    with pytest.raises(Unavailable):
        world.say("a", 6)
    assert not world.traffic.window("digits", V1, 5).known
    world.traffic.follow(True)
    world.say("a", 7, uptime=60)
    assert world.traffic.totals("digits", V1).arrived == 0


def test_memory_is_bounded() -> None:
    world = World()
    for number in range(1, 3 * MAX_VERSIONS):
        world.now += 0.01
        world.say("a", 1, version=VersionKey("digits", number))
    assert len(world.traffic.versions("digits")) == MAX_VERSIONS
    for number in range(MAX_GATEWAYS + 10):
        world.say(f"g{number}", 1)
    assert world.traffic.window("digits", V1, 5).known
    for step in range(1000):
        world.now += 0.1
        world.say("a", step, version=V2)
    entries = world.traffic._sums["digits"][V2]._history
    assert len(entries) <= 3 * HISTORY_SECONDS


def test_latencies_are_kept_as_a_histogram() -> None:
    slow = Counts(succeeded=10, latencies=(10, *([0] * (LATENCY_BUCKETS - 1))), latency_microseconds=900)
    both = slow + Counts(failed=10, latencies=(*([0] * 8), 10, *([0] * (LATENCY_BUCKETS - 9))))
    assert both.answered == 20
    assert both.latency_quantile_seconds(0.5) == pytest.approx(100e-6 * 2**0.25)
    assert both.latency_quantile_seconds(0.99) == pytest.approx(100e-6 * 2 ** (9 / 4))
    assert (both - slow).latency_quantile_seconds(0.1) == pytest.approx(100e-6 * 2 ** (9 / 4))
    assert Counts().latency_quantile_seconds(0.5) is None
    assert slow.mean_latency_seconds() == pytest.approx(90e-6)
    assert both.part(0.5).latencies[8] == 5
    assert slow - both == Counts()
