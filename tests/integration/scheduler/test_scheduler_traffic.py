"""Gateways report what came; a scheduler takes it while it leads."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from penstock.scheduler.v1 import routing_service_pb2 as pb
from penstock_kit.errors import InvalidArgument, Unavailable
from penstock_scheduler.domain.version import VersionKey


def target(**fields: Any) -> pb.TargetTraffic:
    return pb.TargetTraffic(**{"deployment": "digits", "model": "models/digits", "version": 1, **fields})


def report(*targets: pb.TargetTraffic, gateway: str = "gateway-1", **fields: Any) -> pb.ReportTrafficRequest:
    return pb.ReportTrafficRequest(gateway=gateway, targets=targets, **fields)


async def test_reports_of_the_gateways_are_added_up(bench: Any, client: Any) -> None:
    await client.create()
    await client.routes(lambda table: "digits" in table)
    latencies = [0] * 63 + [7]
    await client.routing.ReportTraffic(report(target(arrived=9, succeeded=7, latencies=latencies)))
    await client.routing.ReportTraffic(report(target(arrived=3, failed=3), gateway="gateway-2"))
    await client.routing.ReportTraffic(report(target(deployment="unknown", arrived=5), gateway="gateway-2"))
    counts = bench.scheduler.traffic.totals("digits", VersionKey("digits", 1))
    assert (counts.arrived, counts.succeeded, counts.failed) == (12, 7, 3)
    assert counts.latencies[63] == 7
    assert not bench.scheduler.traffic.versions("unknown")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (report(gateway=""), "name of 1 to 256"),
        (report(gateway="g" * 257), "name of 1 to 256"),
        (report(*(target(version=n) for n in range(1, 4098))), "4096 versions at most, not 4097"),
        (report(target(), target()), "is reported twice"),
        (report(target(arrived=-1)), "arrived of deployment digits is -1"),
        (report(target(waiting=-3)), "waiting of deployment digits is -3"),
        (report(target(latencies=[1, 2])), "must be 64 counts"),
        (report(target(latencies=[-1] + [0] * 63)), "must be 64 counts"),
        (report(target(version=0)), "numbered from 1"),
        (report(target(model="digits")), "models/"),
        (report(uptime=Duration(seconds=-1)), "uptime is -1 s"),
    ],
)
async def test_a_nonsensical_report_is_refused_with_what_is_wrong(
    client: Any, request_: pb.ReportTrafficRequest, words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        await client.routing.ReportTraffic(request_)


async def test_a_scheduler_that_does_not_lead_refuses_reports(bench: Any, client: Any) -> None:
    await client.create()
    await client.routes(lambda table: "digits" in table)
    other = bench.scheduler
    second = await bench.start(scheduler_listen=f"unix:{bench.folder}/s2")
    try:
        follower = bench.client(f"unix:{bench.folder}/s2")
        await follower.routes(lambda table: "digits" in table)
        with pytest.raises(Unavailable, match="Another scheduler leads"):
            await follower.routing.ReportTraffic(report(target(arrived=1)))
    finally:
        await second.stop()
        bench.scheduler = other
