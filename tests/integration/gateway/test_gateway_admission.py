"""Deadlines, priorities and admission through a gateway process, as callers and replicas see them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from penstock.gateway.v1 import gateway_service_pb2
from penstock.oip.v2 import inference_pb2 as oip
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import Connection
from penstock_kit.queue.keys import queue_name
from penstock_kit.queue.messages import Request
from penstock_kit.queue.statistics import read_depths
from penstock_local.embedded import EmbeddedRedis
from support import gateway_world
from support.gateway_world import Answer, GatewayProcess, Replica, World, echo, hold

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
REST = "/v2/models/echo/infer"
V1 = "/v1/models/echo:predict"
BODY: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
Metadata = tuple[tuple[str, str], ...]


def request_for(model: str = "echo", **parameters: int | str) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name=model)
    made.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    made.raw_input_contents.append(bytes(16))
    for name, value in parameters.items():
        if isinstance(value, str):
            made.parameters[name].string_param = value
        else:
            made.parameters[name].int64_param = value
    return made


def infer(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        INFER,
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelInferResponse.FromString,
    )


async def state(channel: grpc.aio.Channel) -> gateway_service_pb2.Gateway:
    ask = channel.unary_unary(
        "/penstock.gateway.v1.GatewayService/GetGateway",
        request_serializer=gateway_service_pb2.GetGatewayRequest.SerializeToString,
        response_deserializer=gateway_service_pb2.Gateway.FromString,
    )
    answer: gateway_service_pb2.Gateway = await ask(gateway_service_pb2.GetGatewayRequest(), timeout=10)
    return answer


def with_parameters(**parameters: Any) -> dict[str, Any]:
    return {**BODY, "parameters": parameters}


@pytest.fixture
async def redis(redis_server: EmbeddedRedis) -> AsyncIterator[Connection]:
    made = await Connection.connect(Address.parse(redis_server.url), "test")
    yield made
    made.close()


class Seen:
    """What the replica was told of the last request."""

    def __init__(self, request: Request) -> None:
        self.priority = int(request.stream[-1:])
        header = request.header
        self.seconds = (header.deadline_unix_micros - header.enqueue_unix_micros) / 1e6


@pytest.fixture
def last(replica: Replica) -> Callable[[], Seen]:
    return lambda: Seen(replica.seen[-1])


# Deadlines and priorities, door by door


@pytest.mark.parametrize(
    ("metadata", "parameters", "priority", "seconds"),
    [
        ((), {}, 1, 20),
        ((("x-penstock-priority", "high"),), {}, 0, 20),
        ((("x-penstock-priority", "Low"),), {"timeout": 5_000_000}, 2, 5),
        ((("x-penstock-priority", "low"),), {"priority": 1}, 0, 20),
        ((), {"priority": "low", "timeout": 60_000_000}, 2, 20),
    ],
)
async def test_a_grpc_calls_words_reach_the_replica(
    channel: grpc.aio.Channel,
    last: Callable[[], Seen],
    metadata: Metadata,
    parameters: dict[str, int | str],
    priority: int,
    seconds: float,
) -> None:
    await infer(channel)(request_for(**parameters), timeout=20, metadata=metadata)
    assert last().priority == priority
    # gRPC's library rounds its timeouts up.
    assert seconds - 1 < last().seconds < seconds + 0.5


async def test_a_streams_metadata_hold_for_all_its_requests(
    channel: grpc.aio.Channel, last: Callable[[], Seen]
) -> None:
    call = channel.stream_stream(
        STREAM,
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelStreamInferResponse.FromString,
    )(timeout=20, metadata=(("x-penstock-priority", "low"),))
    for parameters, priority in (({}, 2), ({"priority": 1}, 0)):
        await call.write(request_for(**parameters))
        await call.read()
        assert last().priority == priority
    await call.done_writing()


@pytest.mark.parametrize(
    ("path", "headers", "body", "priority", "seconds"),
    [
        (REST, {}, BODY, 1, 60),
        (REST, {"x-request-timeout-ms": "4000"}, BODY, 1, 4),
        (REST, {"x-envoy-expected-rq-timeout-ms": "15000"}, BODY, 1, 15),
        (REST, {"x-envoy-expected-rq-timeout-ms": "0"}, BODY, 1, 60),
        (REST, {"x-envoy-expected-rq-timeout-ms": "9000", "x-request-timeout-ms": "4000"}, BODY, 1, 4),
        (REST, {"x-envoy-expected-rq-timeout-ms": "3000", "x-request-timeout-ms": "4000"}, BODY, 1, 3),
        (REST, {"x-penstock-priority": "high"}, BODY, 0, 60),
        (REST, {"x-penstock-priority": "high"}, with_parameters(priority=3), 2, 60),
        (REST, {"x-request-timeout-ms": "9000"}, with_parameters(timeout=2_000_000), 1, 2),
        (REST, {}, with_parameters(timeout=90_000_000, priority="low"), 2, 60),
        (REST, {"accept-encoding": "identity"}, with_parameters(binary_data_output=False), 1, 60),
        (V1, {"x-penstock-priority": "low", "x-request-timeout-ms": "7000"}, {"instances": [[1]]}, 2, 7),
        ("/predict", {"x-penstock-priority": "high"}, {"model_name": "echo", "input_data": [1]}, 0, 60),
    ],
)
async def test_an_http_requests_words_reach_the_replica(
    http: httpx.AsyncClient,
    last: Callable[[], Seen],
    path: str,
    headers: dict[str, str],
    body: dict[str, Any],
    priority: int,
    seconds: float,
) -> None:
    answer = await http.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert last().priority == priority
    assert seconds - 1 < last().seconds <= seconds


async def test_long_json_is_not_read_for_its_words_and_headers_hold(
    http: httpx.AsyncClient, last: Callable[[], Seen]
) -> None:
    body = with_parameters(priority=1, timeout=1_000_000)
    body["inputs"] = [{"name": "x", "datatype": "FP32", "shape": [1, 40_000], "data": [0.5] * 40_000}]
    headers = {"x-penstock-priority": "low", "x-request-timeout-ms": "9000"}
    assert (await http.post(REST, json=body, headers=headers)).status_code == 200
    assert last().priority == 2
    assert 8 < last().seconds <= 9


async def test_the_json_before_binary_tensors_is_read_for_its_words(
    http: httpx.AsyncClient, last: Callable[[], Seen]
) -> None:
    head = json.dumps(with_parameters(priority=1)).encode()
    headers = {"inference-header-content-length": str(len(head))}
    answer = await http.post(REST, content=head + bytes(200_000), headers=headers)
    assert answer.status_code == 200
    assert last().priority == 0


@pytest.mark.parametrize(
    ("headers", "body", "words"),
    [
        ({"x-penstock-priority": "urgent"}, BODY, "high, normal or low"),
        ({"x-penstock-priority": ""}, BODY, "high, normal or low"),
        ({"x-request-timeout-ms": "0"}, BODY, "from 1 to"),
        ({"x-request-timeout-ms": "1.5"}, BODY, "whole number of milliseconds"),
        ({"x-envoy-expected-rq-timeout-ms": "-1"}, BODY, "x-envoy-expected-rq-timeout-ms"),
        ({}, with_parameters(priority="urgent"), "'priority' must be"),
        ({}, with_parameters(timeout=-1), "'timeout' must be"),
        ({}, with_parameters(timeout=[1]), "'timeout' must be"),
    ],
)
async def test_http_words_that_are_wrong_are_told(
    http: httpx.AsyncClient, headers: dict[str, str], body: dict[str, Any], words: str
) -> None:
    answer = await http.post(REST, json=body, headers=headers)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


async def test_metadata_that_are_no_priority_are_told(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(channel)(request_for(), timeout=20, metadata=(("x-penstock-priority", "1st"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "high, normal or low" in (caught.value.details() or "")


# Those who leave


async def until_depth(redis: Connection, queue: str, depth: tuple[int, ...]) -> None:
    async with asyncio.timeout(20):
        while (await read_depths(redis, [queue]))[0] != depth:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def until_routed(http: httpx.AsyncClient, name: str) -> None:
    async with asyncio.timeout(20):
        while (await http.get(f"/v2/models/{name}/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def metric(http: httpx.AsyncClient, line: str) -> float:
    text = (await http.get("/metrics")).text
    return sum(float(found.rsplit(" ", 1)[1]) for found in text.splitlines() if found.startswith(line))


async def test_a_grpc_caller_who_leaves_is_gone_from_redis_too(
    channel: grpc.aio.Channel, http: httpx.AsyncClient, world: World, redis: Connection
) -> None:
    world.offer("nobody", depth=2)  # no replica reads there
    await until_routed(http, "nobody")
    queue = queue_name("nobody", 1, gateway_world.DIGEST)
    calls = [infer(channel)(request_for("nobody", priority=rank), timeout=60) for rank in (1, 2)]
    await until_depth(redis, queue, (1, 1, 0))
    for call in calls:
        call.cancel()
    await until_depth(redis, queue, (0, 0, 0))
    # Their places are free again.
    calls = [infer(channel)(request_for("nobody"), timeout=60) for _ in range(2)]
    await until_depth(redis, queue, (0, 2, 0))
    for call in calls:
        call.cancel()
    await until_depth(redis, queue, (0, 0, 0))
    assert await metric(http, 'penstock_gateway_inferences_in_flight{deployment="nobody"}') == 0


@pytest.mark.parametrize("path", ["/v2/models/nobody/infer", "/v1/models/nobody:predict"])
async def test_an_http_caller_who_leaves_is_gone_from_redis_too(
    gateway: GatewayProcess, http: httpx.AsyncClient, world: World, redis: Connection, path: str
) -> None:
    world.offer("nobody", depth=2)
    await until_routed(http, "nobody")
    queue = queue_name("nobody", 1, gateway_world.DIGEST)
    body = json.dumps({**BODY, "instances": [[1]]}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    await until_depth(redis, queue, (0, 1, 0))
    writer.close()
    await until_depth(redis, queue, (0, 0, 0))


async def test_what_is_past_its_deadline_is_gone_from_redis_too(
    http: httpx.AsyncClient, world: World, redis: Connection
) -> None:
    world.offer("nobody", depth=2)
    await until_routed(http, "nobody")
    answer = await http.post("/v2/models/nobody/infer", json=BODY, headers={"x-request-timeout-ms": "100"})
    assert (answer.status_code, answer.json()["reason"]) == (504, "DEADLINE_EXCEEDED")
    await until_depth(redis, queue_name("nobody", 1, gateway_world.DIGEST), (0, 0, 0))


# Admission


def slowly(seconds: float) -> Callable[[Request], Answer]:
    def answer(request: Request) -> Answer:
        time.sleep(seconds)
        return echo(request)

    return answer


async def overloaded(channel: grpc.aio.Channel, http: httpx.AsyncClient) -> list[Any]:
    """Queue a second's work, and return the calls once the gateway knows the pace at which it is done."""
    calls = [infer(channel)(request_for(), timeout=60) for _ in range(90)]
    line = 'penstock_gateway_queue_expected_wait_seconds{deployment="echo",priority="normal",version="1"}'
    async with asyncio.timeout(20):
        while await metric(http, line) < 0.3:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)
    return calls


async def refusal(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    """Ask with little time until that is refused."""
    async with asyncio.timeout(20):
        while True:
            try:
                await infer(channel)(request_for(), timeout=0.2)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    return error


def delay_of(error: grpc.aio.AioRpcError) -> float:
    """The seconds after which to retry, as an error tells them."""
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    retry = error_details_pb2.RetryInfo()
    assert status_pb2.Status.FromString(details).details[1].Unpack(retry)
    return retry.retry_delay.ToNanoseconds() / 1e9


async def test_what_would_be_late_is_refused_at_once_with_a_delay_that_is_true(
    channel: grpc.aio.Channel, http: httpx.AsyncClient, replica: Replica
) -> None:
    replica.behave = slowly(0.02)
    calls = await overloaded(channel, http)
    error = await refusal(channel)
    assert "would answer in" in (error.details() or "")
    assert 0.2 < delay_of(error) < 5

    line = 'penstock_gateway_inferences_refused_total{deployment="echo",reason="expected_wait"}'
    refused_before = await metric(http, line)
    over_http = await http.post(REST, json=BODY, headers={"x-request-timeout-ms": "150"})
    assert (over_http.status_code, over_http.json()["reason"]) == (429, "OVERLOADED")
    assert 150 < int(over_http.headers["retry-after-ms"]) < 5000
    assert int(over_http.headers["retry-after"]) >= 1
    assert await metric(http, line) == refused_before + 1

    # More time, or more urgency, is another matter.
    assert (await http.post(REST, json=BODY, headers={"x-request-timeout-ms": "30000"})).status_code == 200
    await asyncio.gather(*calls)
    calls = await overloaded(channel, http)
    (route,) = [route for route in (await state(channel)).routes if route.deployment == "echo"]
    assert route.calls_refused >= 2
    assert [queue.priority for queue in route.queues] == ["high", "normal", "low"]
    assert route.queues[1].ahead > 10
    assert 10 < route.queues[1].answers_per_second < 60
    assert 0.2 < route.queues[1].expected_wait.ToNanoseconds() / 1e9 < 5
    urgent = await infer(channel)(request_for(), timeout=5, metadata=(("x-penstock-priority", "high"),))
    assert urgent.model_name == "echo"
    # After the delay that was told, whoever was refused is admitted.
    await asyncio.sleep(delay_of(await refusal(channel)))
    assert (await infer(channel)(request_for(), timeout=0.5)).model_name == "echo"
    await asyncio.gather(*calls)


async def test_low_priority_is_refused_first_when_a_deployment_is_full(
    channel: grpc.aio.Channel, http: httpx.AsyncClient, world: World, redis: Connection, replica: Replica
) -> None:
    world.offer("nobody", depth=16)
    await until_routed(http, "nobody")
    queue = queue_name("nobody", 1, gateway_world.DIGEST)

    async def code(priority: str) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(channel)(
                request_for("nobody"), timeout=0.1, metadata=(("x-penstock-priority", priority),)
            )
        return caught.value.code()

    calls = [infer(channel)(request_for("nobody"), timeout=60) for _ in range(14)]
    await until_depth(redis, queue, (0, 14, 0))
    assert await code("low") is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await code("normal") is grpc.StatusCode.DEADLINE_EXCEEDED
    calls.append(infer(channel)(request_for("nobody"), timeout=60))
    await until_depth(redis, queue, (0, 15, 0))
    assert await code("normal") is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await code("high") is grpc.StatusCode.DEADLINE_EXCEEDED
    for call in calls:
        call.cancel()
    await until_depth(redis, queue, (0, 0, 0))


async def test_other_gateways_requests_are_counted(
    channel: grpc.aio.Channel, http: httpx.AsyncClient, world: World, redis: Connection
) -> None:
    world.offer("nobody", depth=16)
    await until_routed(http, "nobody")
    stream = b"pk1:{" + queue_name("nobody", 1, gateway_world.DIGEST).encode() + b"}:p1"
    for _ in range(7):
        await redis.command("XADD", stream, "*", "h", b"", "a", 0, "b", b"")
    call = infer(channel)(request_for("nobody"), timeout=60)
    line = 'penstock_gateway_queue_ahead{deployment="nobody",priority="normal",version="1"}'
    async with asyncio.timeout(20):
        while await metric(http, line) != 8:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)
    call.cancel()
    await redis.command("DEL", stream)
    async with asyncio.timeout(20):
        while await metric(http, line) != 0:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def test_nobody_is_left_behind(http: httpx.AsyncClient, replica: Replica) -> None:
    replica.behave = hold
    assert await metric(http, "penstock_gateway_inferences_in_flight") == 0
