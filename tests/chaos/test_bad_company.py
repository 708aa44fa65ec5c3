"""Requests that kill, replicas that dawdle, callers that are too many: what becomes of those beside them?"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock
from support.chaos.deploy import deploy_python_echo, wait_replicas
from support.chaos.history import History, calls
from support.chaos.storm import Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller, PoisonCaller, StreamCaller
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    data = tmp_path_factory.mktemp("mesh") / "data"
    with Mesh(data, env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"}) as mesh:
        yield mesh


async def calm(_: History) -> None:
    """No fault but what the callers bring along."""
    await asyncio.sleep(1)


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_poisonous_request_dies_alone(
    mesh: Mesh, storm: Storm, tmp_path: Path, replicas: int
) -> None:
    name = f"mortal-{replicas}"

    def restarts() -> int:
        with penstock.Client(mesh.address) as client:
            wait_replicas(mesh, client, name, replicas)
            return sum(replica.restarts for replica in client.list_replicas(deployment=name))

    await asyncio.to_thread(
        lambda: deploy_python_echo(mesh, tmp_path, name, replicas=replicas, seconds=0.005)
    )
    callers: list[Caller] = [GrpcCaller(name, rows=(1, 2)) for _ in range(14)]
    # One after the other: each is dead and buried before the next one comes.
    callers += [StreamCaller(name), HttpCaller(name), PoisonCaller(name, pause=4.0)]
    report = await storm.run(mesh.address, callers, calm, before=3.0, after=3.0)
    report.must_be_good()
    assert report.verdict.failures() == 0, "nobody beside it fails"
    buried = report.verdict.failed["poison", "INTERNAL"]
    assert buried >= 1
    assert await asyncio.to_thread(restarts) == 2 * buried, "a replica dies of it twice, and never again"


async def test_a_slow_replica_beside_a_fast_one_holds_only_what_it_computes(
    mesh: Mesh, storm: Storm, tmp_path: Path
) -> None:
    slow_seconds = 0.4
    await asyncio.to_thread(
        lambda: deploy_python_echo(
            mesh, tmp_path, "uneven", replicas=2, first_seconds=slow_seconds, max_batch_size=2
        )
    )
    callers: list[Caller] = [GrpcCaller("uneven") for _ in range(14)]
    callers += [StreamCaller("uneven"), HttpCaller("uneven")]
    report = await storm.run(mesh.address, callers, calm, before=3.0, after=3.0)
    report.must_be_good()
    assert report.verdict.failures() == 0
    seconds = sorted(report.verdict.seconds["small", "OK"])
    print(f"  half within {statistics.median(seconds) * 1e3:.1f} ms, all within {seconds[-1] * 1e3:.0f} ms")
    assert seconds[-1] > slow_seconds, "the slow one took part"
    assert statistics.median(seconds) < slow_seconds / 4, "and most never met it"


async def test_a_full_queue_refuses_at_once_and_loses_nothing_that_it_took(
    mesh: Mesh, storm: Storm, tmp_path: Path
) -> None:
    await asyncio.to_thread(
        lambda: deploy_python_echo(
            mesh, tmp_path, "narrow", seconds=0.05, max_batch_size=4, max_queue_depth=16
        )
    )
    flood: list[Caller] = [GrpcCaller("narrow", kind="flood") for _ in range(48)]
    flood += [HttpCaller("narrow", kind="flood") for _ in range(16)]
    report = await storm.run(mesh.address, flood, calm, before=3.0, after=2.0)
    report.must_be_good()
    refused = report.verdict.seconds["flood", "RESOURCE_EXHAUSTED"]
    assert len(refused) > 100
    print(f"  {len(refused)} refused, half within {statistics.median(refused) * 1e3:.1f} ms")
    assert statistics.median(refused) < 0.05
    assert all(call.reason == "OVERLOADED" for call in calls(storm.path) if call.code == "RESOURCE_EXHAUSTED")

    # It recovers at once: no more calls than it takes, and none is refused.
    few = [GrpcCaller("narrow") for _ in range(8)]
    report = await storm.run(mesh.address, few, calm, before=1.0, after=2.0)
    report.must_be_good()
    assert report.verdict.failures() == 0
