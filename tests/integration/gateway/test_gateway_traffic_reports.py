"""What a gateway process tells the scheduler, and requests that wait for the first replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from penstock.oip.v2 import inference_pb2 as oip
from penstock.scheduler.v1 import deployment_pb2
from penstock_kit.errors import Code, Reason
from penstock_kit.queue.keys import queue_name
from penstock_local.embedded import EmbeddedRedis
from support import gateway_world
from support.gateway_world import GatewayProcess, Replica, World, hold, refuse, wait_until

INFER = "/inference.GRPCInferenceService/ModelInfer"
BODY: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
ASLEEP = deployment_pb2.DEPLOYMENT_STATE_PENDING


def request_for(model: str) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name=model)
    made.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    made.raw_input_contents.append(bytes(16))
    return made


def infer(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        INFER,
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelInferResponse.FromString,
    )


def queue(name: str) -> str:
    return queue_name(name, 1, gateway_world.DIGEST)


async def test_what_callers_got_is_told_to_the_scheduler(
    world: World, gateway: GatewayProcess, replica: Replica, channel: grpc.aio.Channel
) -> None:
    before = world.counted("echo")
    for _ in range(3):
        await infer(channel)(request_for("echo"), timeout=10)
    replica.behave = refuse(int(Code.INTERNAL), Reason.MODEL_ERROR, "it broke")
    with pytest.raises(grpc.aio.AioRpcError):
        await infer(channel)(request_for("echo"), timeout=10)
    replica.behave = refuse(int(Code.INVALID_ARGUMENT), Reason.INVALID_TENSOR, "no such input")
    with pytest.raises(grpc.aio.AioRpcError):
        await infer(channel)(request_for("echo"), timeout=10)

    def told() -> bool:
        now = world.counted("echo")
        return (
            now.arrived - before.arrived,
            now.succeeded - before.succeeded,
            now.failed - before.failed,
        ) == (5, 3, 1)

    await asyncio.to_thread(wait_until, told, "the counts of five requests")
    (one,) = [t for targets in world.traffic.values() for (name, _), t in targets.items() if name == "echo"]
    assert sum(one.latencies) == one.succeeded + one.failed
    assert one.latency_microseconds > 0


async def test_what_waits_is_told_while_it_waits(
    world: World, gateway: GatewayProcess, replica: Replica, channel: grpc.aio.Channel
) -> None:
    replica.behave = hold
    calls = [asyncio.ensure_future(infer(channel)(request_for("echo"), timeout=20)) for _ in range(2)]
    await asyncio.to_thread(wait_until, lambda: world.counted("echo").waiting == 2, "two that wait")
    assert world.counted("echo").waiting_for_replica == 0
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: world.counted("echo").waiting == 0, "nobody to wait")


@pytest.mark.parametrize("door", ["grpc", "v2", "v1", "predict"])
async def test_the_first_request_brings_a_replica_and_is_answered(
    door: str,
    world: World,
    gateway: GatewayProcess,
    redis_server: EmbeddedRedis,
    channel: grpc.aio.Channel,
    http: httpx.AsyncClient,
) -> None:
    name = f"sleeper-{door}"
    world.offer(name, ready=0, state=ASLEEP, scales_from_zero=True)
    ready = f"/v2/models/{name}/ready"
    await asyncio.to_thread(
        wait_until, lambda: httpx.get(gateway.url + ready, trust_env=False).status_code != 404
    )
    assert (await http.get(ready)).status_code >= 400, "no replica would answer now"
    if door == "grpc":
        asked = asyncio.ensure_future(infer(channel)(request_for(name), timeout=20))
    elif door == "v2":
        asked = asyncio.ensure_future(http.post(f"/v2/models/{name}/infer", json=BODY))
    elif door == "v1":
        asked = asyncio.ensure_future(http.post(f"/v1/models/{name}:predict", json={"instances": [[1]]}))
    else:
        asked = asyncio.ensure_future(http.post("/predict", json={"model_name": name, "input_data": [[1]]}))
    await asyncio.to_thread(
        wait_until, lambda: world.counted(name).waiting_for_replica == 1, "one that asks for a replica"
    )
    assert not asked.done()
    awake = Replica(redis_server.url, queue(name))
    try:
        world.offer(name, scales_from_zero=True)
        answer = await asked
    finally:
        await asyncio.to_thread(awake.stop)
    if door != "grpc":
        assert answer.status_code == 200
    await asyncio.to_thread(wait_until, lambda: counts(world, name) == (1, 1, 0, 0), "the request counted")


def counts(world: World, name: str) -> tuple[int, int, int, int]:
    told = world.counted(name)
    return told.arrived, told.succeeded, told.failed, told.waiting_for_replica


async def test_who_waits_for_the_first_replica_is_bounded_by_deadline_and_depth(
    world: World, gateway: GatewayProcess, channel: grpc.aio.Channel, http: httpx.AsyncClient
) -> None:
    world.offer("bound", ready=0, state=ASLEEP, scales_from_zero=True, depth=1)
    await asyncio.to_thread(
        wait_until,
        lambda: httpx.get(f"{gateway.url}/v2/models/bound", trust_env=False).status_code == 200,
    )
    waiting = asyncio.ensure_future(infer(channel)(request_for("bound"), timeout=1.0))
    await asyncio.to_thread(wait_until, lambda: world.counted("bound").waiting == 1)
    refused = await http.post("/v2/models/bound/infer", json=BODY)
    assert (refused.status_code, refused.json()["reason"]) == (429, "OVERLOADED")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await waiting
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.to_thread(wait_until, lambda: world.counted("bound").overloaded == 2)
    assert world.counted("bound").failed == 0


async def test_a_deployment_that_failed_is_refused_also_from_zero(
    world: World, gateway: GatewayProcess, http: httpx.AsyncClient
) -> None:
    world.offer(
        "broken",
        ready=0,
        state=deployment_pb2.DEPLOYMENT_STATE_FAILED,
        scales_from_zero=True,
        message="it does not load",
    )
    await asyncio.to_thread(
        wait_until,
        lambda: httpx.get(f"{gateway.url}/v2/models/broken", trust_env=False).status_code == 200,
    )
    refused = await http.post("/v2/models/broken/infer", json=BODY)
    assert (refused.status_code, refused.json()["reason"]) == (503, "NOT_READY")
    assert "it does not load" in refused.text


@pytest.fixture
def two_schedulers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, World]]:
    made = World(tmp_path_factory.mktemp("a")).start(), World(tmp_path_factory.mktemp("b")).start()
    yield made
    for world in made:
        world.stop()


def test_reports_go_to_the_scheduler_that_leads_and_follow_it(
    two_schedulers: tuple[World, World], redis_server: EmbeddedRedis, log_folder: Path
) -> None:
    first, second = two_schedulers
    first.leads = False
    for world in two_schedulers:
        world.offer("sleeper", ready=0, state=ASLEEP, scales_from_zero=True)
    gateway = GatewayProcess(
        first,
        redis_server.url,
        log_folder,
        PENSTOCK_SCHEDULER_ADDRESS=f"{first.address},{second.address}",
    ).start()
    try:
        wait_until(lambda: second.traffic, "a report to the one that leads")
        assert not first.traffic
        # Now the other one leads, and a request comes at that moment.
        first.leads, second.leads = True, False
        with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
            answer = client.post(
                "/v2/models/sleeper/infer", json=BODY, headers={"x-request-timeout-ms": "700"}
            )
        assert answer.status_code == 504
        wait_until(lambda: first.counted("sleeper").arrived == 1, "a report to the one that leads now")
        # What only the one that leads knows, it is asked for; the other one is connected and says nothing.
        first.offer("news")
        wait_until(
            lambda: httpx.get(f"{gateway.url}/v2/models/news", trust_env=False).status_code == 200,
            "the routes of the one that leads",
        )
    finally:
        gateway.stop()


def test_a_request_that_needs_a_replica_is_told_of_at_once(
    world: World, gateway: GatewayProcess, http: httpx.AsyncClient
) -> None:
    heard: list[float] = []

    def hear(request: Any) -> None:
        if any(one.waiting_for_replica for one in request.targets):
            heard.append(time.monotonic())

    world.offer("sleeper-at-once", ready=0, state=ASLEEP, scales_from_zero=True)
    address = f"{gateway.url}/v2/models/sleeper-at-once"
    wait_until(lambda: httpx.get(address, trust_env=False).status_code == 200)
    world.heard = hear
    try:
        delays = []
        for _ in range(5):
            heard.clear()
            began = time.monotonic()
            asked = httpx.post(
                f"{address}/infer",
                json=BODY,
                headers={"x-request-timeout-ms": "300"},
                trust_env=False,
                timeout=30,
            )
            assert asked.status_code == 504
            delays.append(min(heard, default=began + 60) - began)
    finally:
        world.heard = lambda _: None
    # Were it told once a second only, each would have less than a third of a chance to be heard of in time.
    assert sorted(delays)[2] < 0.3
