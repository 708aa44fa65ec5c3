"""A wire to Redis that breaks in the middle of a word, or goes silent and never says so; data kept and lost.

Between the mesh and its Redis lies a proxy of ours (`support.chaos.wire`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import penstock
from penstock_local.embedded import EmbeddedRedis
from support.chaos.deploy import deploy_echo, wait_replicas
from support.chaos.faults import Again, CutWire, Fault, KillUnit, SilenceWire, strike
from support.chaos.history import History
from support.chaos.storm import Report, Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller, StreamCaller
from support.chaos.wire import Wire
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with (
        EmbeddedRedis(tmp_path_factory.mktemp("redis"), persist=False) as server,
        Wire(server.socket_path, tmp_path_factory.mktemp("w") / "redis.sock") as wire,
    ):
        yield wire


@pytest.fixture(scope="module")
def mesh(wire: Wire, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder / "data", env={"PENSTOCK_REDIS_URL": f"unix://{wire.address}"}) as mesh:
        deploy_echo(mesh, folder, replicas=2)
        yield mesh


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("durable")
    with Mesh(folder / "data", durable=True) as mesh:
        deploy_echo(mesh, folder)
        yield mesh


def callers() -> list[Caller]:
    found: list[Caller] = [GrpcCaller("echo", rows=(1, 4)) for _ in range(10)]
    found += [StreamCaller("echo"), StreamCaller("echo"), HttpCaller("echo"), HttpCaller("echo", binary=True)]
    # Large enough that commands and replies come in pieces.
    return [*found, *(GrpcCaller("echo", rows=(8, 16), width=(16_384, 16_384)) for _ in range(2))]


async def survive(mesh: Mesh, storm: Storm, fault: Fault, seconds: float = 0.0, after: float = 4.0) -> Report:
    report = await storm.run(
        mesh.address, callers(), lambda history: strike(fault, history, seconds), after=after
    )
    report.must_be_good()
    assert report.verdict.failures() == 0
    return report


@pytest.mark.parametrize("replies", [False, True], ids=["command", "reply"])
async def test_connections_that_are_cut_in_the_middle_lose_nothing(
    mesh: Mesh, storm: Storm, wire: Wire, replies: bool
) -> None:
    await survive(mesh, storm, Again(CutWire(wire, replies=replies), times=8, every=0.7))


@pytest.mark.parametrize("seconds", [1.0, 6.0])
async def test_a_partition_that_leaves_connections_half_open_loses_nothing(
    mesh: Mesh, storm: Storm, wire: Wire, seconds: float
) -> None:
    # Redis goes on to serve what it takes for open: also pops of replies, which nobody receives.
    report = await survive(mesh, storm, SilenceWire(wire), seconds, after=16.0)
    assert report.back_after(0.8) <= seconds + 12.0


async def test_a_redis_that_restarts_with_its_data_loses_nothing(durable: Mesh, storm: Storm) -> None:
    await survive(durable, storm, KillUnit(durable, "redis"))


async def test_a_postgres_that_restarts_with_its_data_fails_no_call(durable: Mesh, storm: Storm) -> None:
    await survive(durable, storm, KillUnit(durable, "postgres"))


async def test_all_that_is_behind_a_gateway_may_restart_at_once(durable: Mesh, storm: Storm) -> None:
    """With its data: what each keeps must fit together again."""
    faults = [KillUnit(durable, unit) for unit in ("registry", "postgres", "scheduler", "redis", "worker-1")]

    def answering() -> None:
        with penstock.Client(durable.address) as client:
            wait_replicas(durable, client, "echo", 1)

    async def ordeal(history: History) -> None:
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                group.create_task(strike(fault, history))
        await asyncio.to_thread(answering)

    report = await storm.run(durable.address, callers(), ordeal)
    report.must_be_good()
    assert report.verdict.failures() == 0
