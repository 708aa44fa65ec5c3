"""kill -9 of anything, in turn, under load: nothing accepted is lost, nothing hangs, serving goes on.

tests/chaos/README.md says how the parts of these tests hang together, and lists the bugs that they found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock
from support.chaos.deploy import deploy_echo
from support.chaos.faults import KillReplica, KillUnit, strike
from support.chaos.storm import Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller, SdkCaller, StreamCaller
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

CONCURRENCY = 16


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder / "data") as mesh:
        deploy_echo(mesh, folder)
        yield mesh


def of_all_kinds() -> list[Caller]:
    """Sixteen callers in every shape."""
    callers: list[Caller] = [GrpcCaller("echo", rows=(1, 4)) for _ in range(8)]
    callers += [HttpCaller("echo"), HttpCaller("echo", binary=True), HttpCaller("echo", version="1")]
    callers += [StreamCaller("echo"), StreamCaller("echo", rows=(1, 4))]
    callers += [SdkCaller("echo") for _ in range(3)]
    return callers


async def test_a_killed_replica_fails_no_call_and_the_rate_is_back_within_two_seconds(
    mesh: Mesh, storm: Storm
) -> None:
    report = await storm.run(
        mesh.address,
        [GrpcCaller("echo") for _ in range(CONCURRENCY)],
        lambda history: strike(KillReplica(mesh, "echo"), history),
    )
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert report.back_after(0.9) <= 2.0


@pytest.mark.parametrize("unit", ["scheduler", "registry", "worker-1", "postgres", "redis"])
async def test_what_is_killed_behind_the_gateway_fails_no_call(mesh: Mesh, storm: Storm, unit: str) -> None:
    report = await storm.run(
        mesh.address, of_all_kinds(), lambda history: strike(KillUnit(mesh, unit), history)
    )
    report.must_be_good()
    assert report.verdict.failures() == 0
    assert report.back_after(0.8) <= 6.0


async def test_a_redis_that_comes_back_empty_fails_no_caller_with_a_deadline_of_ten_seconds(
    mesh: Mesh, storm: Storm
) -> None:
    callers = [GrpcCaller("echo", timeout=10.0) for _ in range(CONCURRENCY)]
    report = await storm.run(mesh.address, callers, lambda history: strike(KillUnit(mesh, "redis"), history))
    report.must_be_good()
    assert report.verdict.failures() == 0


async def test_a_killed_gateway_fails_only_the_calls_that_it_had_open(mesh: Mesh, storm: Storm) -> None:
    report = await storm.run(
        mesh.address, of_all_kinds(), lambda history: strike(KillUnit(mesh, "gateway-1"), history)
    )
    report.must_be_good()  # which explains UNAVAILABLE while it was away, and nothing else


async def test_our_client_retries_what_a_killed_gateway_had_open(mesh: Mesh, storm: Storm) -> None:
    report = await storm.run(
        mesh.address,
        [SdkCaller("echo") for _ in range(CONCURRENCY)],
        lambda history: strike(KillUnit(mesh, "gateway-1"), history),
    )
    report.must_be_good()
    assert report.verdict.failures() == 0


async def test_nothing_is_left_over_after_the_storm(mesh: Mesh, tmp_path: Path) -> None:
    def manage() -> None:
        deploy_echo(mesh, tmp_path, "late")
        with penstock.Client(mesh.address) as client:
            assert len(client.list_replicas(deployment="echo")) == 1

    await asyncio.to_thread(manage)
