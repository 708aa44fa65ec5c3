"""Pauses, silences and changes under load: slower than a kill, and nastier.

A process that is stopped (SIGSTOP) keeps its connections and says nothing; a Redis that pauses keeps its
data; a gateway that ends in order still has callers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import redis

import penstock
from penstock.oip.v2 import inference_pb2 as oip
from support.chaos.deploy import deploy_echo, wait_replicas
from support.chaos.faults import (
    Again,
    Fault,
    ForgetAll,
    KillUnit,
    PauseRedis,
    pause_replica,
    pause_unit,
    ready_replicas,
    strike,
)
from support.chaos.history import OK, History, calls
from support.chaos.storm import Report, Storm
from support.chaos.traffic import Caller, GrpcCaller, HttpCaller, SdkCaller, StreamCaller
from support.mesh_process import Mesh

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

PAUSE_SECONDS = 5.0  # longer than the leases of replicas and nodes


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with Mesh(folder / "data", gateways=2) as mesh:
        deploy_echo(mesh, folder, replicas=2)
        yield mesh


@pytest.fixture
def server(mesh: Mesh) -> Iterator[redis.Redis]:
    (path,) = mesh.data_dir.glob("redis/**/redis.sock")
    with redis.Redis(unix_socket_path=str(path)) as client:
        yield client


def callers(*, retry: bool = False) -> list[Caller]:
    found: list[Caller] = [GrpcCaller("echo", rows=(1, 4), retry=retry) for _ in range(10)]
    found += [StreamCaller("echo"), SdkCaller("echo"), SdkCaller("echo")]
    # What speaks HTTP has no retry policy of its own.
    return found if retry else [*found, HttpCaller("echo"), HttpCaller("echo", binary=True)]


async def survive(mesh: Mesh, storm: Storm, fault: Fault, seconds: float) -> Report:
    """No call fails, hangs, or is answered wrongly or twice."""
    report = await storm.run(mesh.address, callers(), lambda history: strike(fault, history, seconds))
    report.must_be_good()
    assert report.verdict.failures() == 0
    return report


async def test_gateways_are_restarted_one_after_another_unseen_by_callers_who_retry(
    mesh: Mesh, storm: Storm
) -> None:
    def restart() -> None:
        for name in ("gateway-1", "gateway-2"):
            # Its log, because on a shared port the other one may answer for it.
            begun = mesh.log(name).count("listening")
            mesh.wait_restarted(name, mesh.kill(name, signal.SIGTERM))
            mesh.wait(lambda name=name, begun=begun: mesh.log(name).count("listening") > begun, name)

    async def ordeal(_: History) -> None:
        await asyncio.to_thread(restart)

    retrying = [caller for caller in callers(retry=True) if caller.carrier != "stream"]
    report = await storm.run(mesh.address, retrying, ordeal)
    report.must_be_good()
    assert report.verdict.failures() == 0


@pytest.mark.parametrize("unit", ["scheduler", "registry", "worker-1"])
async def test_a_service_that_is_stopped_for_seconds_fails_no_call(
    mesh: Mesh, storm: Storm, unit: str
) -> None:
    report = await survive(mesh, storm, pause_unit(mesh, unit), PAUSE_SECONDS)
    assert report.back_after(0.7) < PAUSE_SECONDS, "none of them is on the way of a request"


async def test_a_redis_that_pauses_for_seconds_loses_nothing(
    mesh: Mesh, storm: Storm, server: redis.Redis
) -> None:
    await survive(mesh, storm, PauseRedis(server, PAUSE_SECONDS), PAUSE_SECONDS)


async def test_a_redis_that_is_stopped_for_seconds_loses_nothing(mesh: Mesh, storm: Storm) -> None:
    # Longer: the wire falls silent, clients give up and come back.
    await survive(mesh, storm, pause_unit(mesh, "redis"), PAUSE_SECONDS + 2)


async def test_a_postgres_that_is_stopped_for_seconds_fails_no_call(mesh: Mesh, storm: Storm) -> None:
    await survive(mesh, storm, pause_unit(mesh, "postgres"), PAUSE_SECONDS)


async def test_a_redis_that_forgets_everything_again_and_again_loses_nothing(
    mesh: Mesh, storm: Storm, server: redis.Redis
) -> None:
    await survive(mesh, storm, Again(ForgetAll(server), times=5, every=1.0), 0)


@pytest.mark.parametrize("replicas", [2, 1])
async def test_a_stopped_replica_is_survived(mesh: Mesh, storm: Storm, replicas: int) -> None:
    """With a peer its requests are taken over; alone it goes on with them."""

    def scale() -> None:
        with penstock.Client(mesh.address) as client:
            client.deploy("echo", replicas=replicas)
            wait_replicas(mesh, client, "echo", replicas)

    await asyncio.to_thread(scale)
    await survive(mesh, storm, pause_replica(mesh, "echo"), PAUSE_SECONDS)


async def test_a_stopped_gateway_delays_its_callers_and_fails_none(mesh: Mesh, storm: Storm) -> None:
    await survive(mesh, storm, pause_unit(mesh, "gateway-1"), PAUSE_SECONDS)


async def test_a_gateway_killed_beside_another_fails_only_the_calls_that_it_had_open(
    mesh: Mesh, storm: Storm
) -> None:
    plain: list[Caller] = [GrpcCaller("echo") for _ in range(16)]
    report = await storm.run(
        mesh.address, plain, lambda history: strike(KillUnit(mesh, "gateway-1"), history, 1.0)
    )
    report.must_be_good()
    failed = [call for call in calls(storm.path) if call.code != OK]
    (killed,) = report.strikes
    assert len({call.id.split("-")[1] for call in failed}) == len(failed), "one for each caller at most"
    # Open at the kill, or sent before the caller's side could learn of it.
    assert all(call.began <= killed.done + 0.5 and call.ended >= killed.began for call in failed)
    sdk = [SdkCaller("echo") for _ in range(16)]
    report = await storm.run(
        mesh.address, sdk, lambda history: strike(KillUnit(mesh, "gateway-2"), history, 1.0)
    )
    report.must_be_good()
    assert report.verdict.failures() == 0, "our own client retries them"


async def test_calls_that_wait_for_a_deployment_that_is_deleted_are_answered_at_once(
    mesh: Mesh, tmp_path: Path
) -> None:
    def deploy() -> list[int]:
        deploy_echo(mesh, tmp_path, "brief")
        with penstock.Client(mesh.address) as client:
            return ready_replicas(client, "brief")

    def delete() -> None:
        with penstock.Client(mesh.address) as client:
            client.undeploy("brief")

    (pid,) = await asyncio.to_thread(deploy)
    request = oip.ModelInferRequest(model_name="brief")
    request.inputs.add(name="input", datatype="FP32", shape=[1, 16])
    request.raw_input_contents.append(bytes(64))
    os.kill(pid, signal.SIGSTOP)  # so that the calls wait
    try:
        async with grpc.aio.insecure_channel(mesh.address) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            waiting = [infer(request.SerializeToString(), timeout=60) for _ in range(8)]
            await asyncio.wait([asyncio.ensure_future(call.code()) for call in waiting], timeout=1)
            assert not any(call.done() for call in waiting)
            await asyncio.to_thread(delete)
            os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            codes = await asyncio.gather(*(call.code() for call in waiting))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert {code.name for code in codes} <= {"NOT_FOUND", "UNAVAILABLE"}, codes
    assert time.monotonic() - began < 15
