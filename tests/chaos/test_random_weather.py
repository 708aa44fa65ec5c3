"""Whatever chance brings, one or two faults at a time, for a minute; the seed in the header replays it."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

import penstock
from penstock_local.embedded import EmbeddedRedis
from support.chaos.deploy import deploy_echo, wait_replicas
from support.chaos.faults import (
    CutWire,
    Fault,
    ForgetAll,
    KillReplica,
    KillUnit,
    PauseRedis,
    Redeploy,
    SilenceWire,
    pause_replica,
    pause_unit,
    schedule,
)
from support.chaos.history import History
from support.chaos.storm import Storm
from support.chaos.traffic import Caller, CancellingCaller, GrpcCaller, HttpCaller, SdkCaller, StreamCaller
from support.chaos.wire import Wire
from support.mesh_process import Mesh

SECONDS = float(os.environ.get("PENSTOCK_CHAOS_SECONDS", "60"))

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(SECONDS + 240)]

UNITS = ("scheduler", "registry", "worker-1", "postgres", "gateway-1", "gateway-2")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis", persist=False) as server:
        yield server


@pytest.fixture
def wire(server: EmbeddedRedis, short_path: Path) -> Iterator[Wire]:
    with Wire(server.socket_path, short_path / "redis.sock") as wire:
        yield wire


@pytest.fixture
def mesh(wire: Wire, tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path / "data", gateways=2, env={"PENSTOCK_REDIS_URL": f"unix://{wire.address}"}) as mesh:
        deploy_echo(mesh, tmp_path, replicas=2, versions=2)
        yield mesh


async def test_a_minute_of_random_faults_loses_nothing(
    mesh: Mesh, wire: Wire, server: EmbeddedRedis, storm: Storm
) -> None:
    client = redis.Redis.from_url(server.url)
    faults: list[Fault] = [KillReplica(mesh, "echo"), pause_replica(mesh, "echo")]
    faults += [KillUnit(mesh, unit) for unit in UNITS]
    faults += [pause_unit(mesh, unit) for unit in UNITS]
    faults += [CutWire(wire, replies=False), CutWire(wire, replies=True), SilenceWire(wire)]
    faults += [
        ForgetAll(client),
        PauseRedis(client, 2.0),
        Redeploy(mesh, "echo", 1),
        Redeploy(mesh, "echo", 2),
    ]

    def well() -> None:
        for unit in UNITS:
            mesh.wait(lambda unit=unit: mesh.unit(unit).state == "healthy", unit)
        with penstock.Client(mesh.address) as sdk:
            wait_replicas(mesh, sdk, "echo", 2)

    async def ordeal(history: History) -> None:
        await schedule(faults, history, random.Random(storm.seed), SECONDS)
        await asyncio.to_thread(well)

    # Half a minute to answer in: whatever comes is over by then.
    callers: list[Caller] = [GrpcCaller("echo", rows=(1, 4)) for _ in range(8)]
    callers += [
        StreamCaller("echo"),
        StreamCaller("echo"),
        HttpCaller("echo"),
        HttpCaller("echo", binary=True),
    ]
    callers += [SdkCaller("echo"), SdkCaller("echo"), CancellingCaller("echo")]
    callers += [GrpcCaller("echo", rows=(8, 16), width=(16_384, 16_384), pause=0.05)]
    report = await storm.run(mesh.address, callers, ordeal, after=6.0, versions={"echo": {"1", "2"}})
    client.close()
    report.must_be_good()
