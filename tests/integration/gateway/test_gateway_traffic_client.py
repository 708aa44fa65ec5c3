"""Reports as they go over the wire."""

from pathlib import Path

import pytest

from penstock_gateway.adapters.services import TrafficClient
from penstock_gateway.domain.traffic import LATENCY_BUCKETS, Tally
from penstock_gateway.usecases.traffic import Reported
from penstock_kit.errors import PenstockError, Unavailable
from penstock_kit.rpc import open_channel
from support.gateway_world import World


async def test_a_report_says_the_whole_of_what_was_counted_each_time(tmp_path: Path) -> None:
    world = World(tmp_path).start()
    channel = open_channel(world.address)
    try:
        client = TrafficClient(channel)
        busy, idle = Tally("m", "models/m", 1), Tally("m", "models/m", 2)
        for seconds in (0.001, 0.25):
            busy.arrived += 1
            busy.succeed(seconds)
            await client.report("g", 1.5, [Reported(busy, 2, 1), Reported(idle)])
        await client.report("g", 2.5, [Reported(busy), Reported(idle)])
        told = world.traffic["g"]["m", 1]
        assert (told.model, told.arrived, told.succeeded, told.waiting) == ("models/m", 2, 2, 0)
        assert told.latency_microseconds == 251_000
        assert (len(told.latencies), sum(told.latencies)) == (LATENCY_BUCKETS, 2)
        assert world.traffic["g"]["m", 2].arrived == 0
        # What is reported no more is forgotten.
        for version in range(3, 10):
            await client.report("g", 3.0, [Reported(Tally("m", "models/m", version))])
        assert set(world.traffic["g"]) == {("m", 9)}
    finally:
        await channel.close()
        world.stop()


async def test_a_scheduler_that_does_not_lead_refuses(tmp_path: Path) -> None:
    world = World(tmp_path).start()
    world.leads = False
    channel = open_channel(world.address)
    try:
        with pytest.raises(PenstockError) as caught:
            await TrafficClient(channel).report("g", 1.5, [])
        assert isinstance(caught.value, Unavailable)
    finally:
        await channel.close()
        world.stop()
