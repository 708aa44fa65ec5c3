"""Equal requests through a gateway process: what reaches the replica, and who gets which answer."""

import asyncio
import json
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration

from penstock.oip.v2 import inference_pb2 as oip
from penstock.scheduler.v1.deployment_pb2 import ResponseCache
from penstock_kit.errors import Code, Reason
from penstock_kit.queue.keys import queue_name
from penstock_kit.queue.messages import Request
from penstock_local.embedded import EmbeddedRedis
from support.gateway_world import DIGEST, Answer, GatewayProcess, Replica, World, echo, refuse, wait_until
from support.waiting import eventually

INFER = "/inference.GRPCInferenceService/ModelInfer"
MINUTE = Duration(seconds=60)
KEEP = ResponseCache(enabled=True, ttl=MINUTE, max_bytes=1 << 20)
COALESCE = ResponseCache(coalesce=True, ttl=MINUTE, max_bytes=1 << 20)

numbers = iter(range(1, 1_000_000))


def request(*values: float, model: str = "kept", **fields: Any) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name=model, **fields)
    made.inputs.add(name="x", datatype="FP32", shape=[1, len(values)])
    made.raw_input_contents.append(struct.pack(f"<{len(values)}f", *values))
    return made


def fresh() -> oip.ModelInferRequest:
    """A request that no test has made before."""
    return request(float(next(numbers)))


def infer(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        INFER,
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelInferResponse.FromString,
    )


def named(message: oip.ModelInferRequest, request_id: str) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest()
    made.CopyFrom(message)
    made.id = request_id
    return made


@pytest.fixture
def offer(world: World, gateway: GatewayProcess) -> Callable[..., None]:
    """Offer "kept" under a policy, and wait until the gateway knows it."""

    def offer(
        cache: ResponseCache | None, *, digest: str = DIGEST, depth: int = 100, name: str = "kept"
    ) -> None:
        world.offer(name, cache=cache, digest=digest, depth=depth)
        mark = f"mark-{next(numbers)}"
        world.offer(mark)
        wait_until(lambda: httpx.get(f"{gateway.url}/v2/models/{mark}", trust_env=False).status_code == 200)

    return offer


@pytest.fixture(scope="module")
def kept(redis_server: EmbeddedRedis, replica: Replica) -> Iterator[Replica]:
    """Serves version 1 of the deployment "kept"."""
    made = Replica(redis_server.url, queue_name("kept", 1, DIGEST), number=2)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _unchanged(kept: Replica) -> Iterator[None]:
    kept.seen.clear()
    yield
    kept.behave = echo


class Gate:
    """Holds a replica back until it is opened."""

    def __init__(self, replica: Replica) -> None:
        self._open = threading.Event()
        self._replica = replica
        replica.behave = self._behave

    def _behave(self, request: Request) -> Answer:
        assert self._open.wait(30)
        return echo(request)

    async def reached(self, count: int = 1) -> None:
        """Wait until so many requests have reached the replica."""

        async def there() -> bool:
            return len(self._replica.seen) >= count

        await eventually(there)

    def open(self) -> None:
        self._open.set()


async def in_flight(http: httpx.AsyncClient, count: int) -> None:
    """Wait until so many callers of "kept" wait."""

    async def there() -> bool:
        text = (await http.get("/metrics")).text
        return f'penstock_gateway_inferences_in_flight{{deployment="kept"}} {count}.0' in text

    await eventually(there)


async def test_without_a_policy_each_request_is_computed(
    offer: Callable[..., None], channel: grpc.aio.Channel, kept: Replica
) -> None:
    offer(None)
    message = fresh()
    for _ in range(3):
        await infer(channel)(message, timeout=10)
    assert len(kept.seen) == 3


async def test_a_kept_answer_goes_to_who_asks_the_same_with_their_own_id(
    offer: Callable[..., None], channel: grpc.aio.Channel, kept: Replica
) -> None:
    offer(KEEP)
    message = fresh()
    for name in ("one", "", "three"):
        answer = await infer(channel)(named(message, name), timeout=10)
        assert answer.id == name
        assert answer.raw_output_contents == message.raw_input_contents
    message.parameters["timeout"].int64_param = 9_000_000
    message.parameters["priority"].int64_param = 1
    await infer(channel)(message, timeout=10)
    message.model_version = "1"
    await infer(channel)(message, timeout=10)
    assert len(kept.seen) == 1
    message.parameters["flavour"].int64_param = 1
    await infer(channel)(message, timeout=10)
    await infer(channel)(fresh(), timeout=10)
    assert len(kept.seen) == 3


async def test_answers_over_http_are_kept_in_each_form(
    offer: Callable[..., None], http: httpx.AsyncClient, kept: Replica
) -> None:
    offer(KEEP)
    number = next(numbers)
    inputs = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [number]}]}
    binary = json.dumps({**inputs, "id": "b"}).encode()
    header = {"inference-header-content-length": str(len(binary)), "content-type": "application/octet-stream"}
    calls: list[dict[str, Any]] = [
        {"url": "/v2/models/kept/infer", "json": inputs},
        {"url": "/v2/models/kept/infer", "json": {**inputs, "id": "mine"}},
        {"url": "/v2/models/kept/infer", "content": binary + b"\0\1\2\3", "headers": header},
        {"url": "/predict", "json": {"model_name": "kept", "input_data": [number]}},
        {"url": "/v1/models/kept:predict", "json": {"instances": [number]}},
    ]
    for call in calls:
        answers = [await http.post(**call) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len({answer.headers.get("inference-header-content-length") for answer in answers}) == 1
    assert answers[0].headers.get("inference-header-content-length") is None
    assert len(kept.seen) == len(calls)


async def test_answers_within_a_stream_are_kept_too(
    offer: Callable[..., None], channel: grpc.aio.Channel, kept: Replica
) -> None:
    offer(KEEP)
    message = fresh()
    await infer(channel)(message, timeout=10)

    async def several() -> AsyncIterator[oip.ModelInferRequest]:
        for name in "abc":
            yield named(message, name)

    stream = channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelStreamInferResponse.FromString,
    )
    answers = [answer.infer_response.id async for answer in stream(several(), timeout=10)]
    assert answers == ["a", "b", "c"]
    assert len(kept.seen) == 1


async def test_an_answer_is_kept_for_its_time_and_no_longer(
    offer: Callable[..., None], channel: grpc.aio.Channel, kept: Replica
) -> None:
    offer(ResponseCache(enabled=True, ttl=Duration(nanos=300_000_000), max_bytes=1 << 20))
    message = fresh()
    started = time.monotonic()
    await infer(channel)(message, timeout=10)

    async def again() -> bool:
        await infer(channel)(message, timeout=10)
        return len(kept.seen) > 1

    await eventually(again)
    assert time.monotonic() - started >= 0.3


async def test_errors_are_not_kept(
    offer: Callable[..., None], channel: grpc.aio.Channel, kept: Replica
) -> None:
    offer(ResponseCache(enabled=True, coalesce=True, ttl=MINUTE, max_bytes=1 << 20))
    kept.behave = refuse(int(Code.INVALID_ARGUMENT), Reason.INVALID_TENSOR, "wrong shape")
    message = fresh()
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(channel)(message, timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(kept.seen) == 2
    kept.behave = echo
    await infer(channel)(message, timeout=10)


async def test_another_version_never_gives_the_answers_of_the_last(
    offer: Callable[..., None], channel: grpc.aio.Channel, kept: Replica, redis_server: EmbeddedRedis
) -> None:
    offer(KEEP)
    message = fresh()
    await infer(channel)(message, timeout=10)
    other = "sha256:" + "b" * 64
    second = Replica(redis_server.url, queue_name("kept", 1, other), number=3)
    try:
        offer(KEEP, digest=other)
        await infer(channel)(message, timeout=10)
        await infer(channel)(message, timeout=10)
        assert len(second.seen) == 1
        offer(KEEP)  # back to the first: what it had answered is gone
        await infer(channel)(message, timeout=10)
        assert len(kept.seen) == 2
    finally:
        second.stop()


async def test_a_hit_needs_no_room_in_the_queue(
    offer: Callable[..., None], channel: grpc.aio.Channel, http: httpx.AsyncClient, kept: Replica
) -> None:
    offer(KEEP, depth=1)
    message = fresh()
    await infer(channel)(message, timeout=10)
    gate = Gate(kept)
    slow = asyncio.ensure_future(infer(channel)(fresh(), timeout=30))
    await gate.reached(2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(channel)(fresh(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await infer(channel)(message, timeout=10)
    gate.open()
    await slow


async def test_equal_requests_at_once_are_computed_once(
    offer: Callable[..., None], channel: grpc.aio.Channel, http: httpx.AsyncClient, kept: Replica
) -> None:
    offer(COALESCE)
    gate = Gate(kept)
    message = fresh()
    calls = [
        asyncio.ensure_future(infer(channel)(named(message, f"id-{number}"), timeout=30))
        for number in range(50)
    ]
    await in_flight(http, 50)
    gate.open()
    answers = await asyncio.gather(*calls)
    assert [answer.id for answer in answers] == [f"id-{number}" for number in range(50)]
    assert len(kept.seen) == 1
    await infer(channel)(message, timeout=10)
    assert len(kept.seen) == 2  # nothing is kept


async def test_who_began_may_hang_up_or_run_out_of_time(
    offer: Callable[..., None], channel: grpc.aio.Channel, http: httpx.AsyncClient, kept: Replica
) -> None:
    offer(COALESCE)
    gate = Gate(kept)
    message = fresh()
    leaver = infer(channel)(named(message, "leaver"), timeout=30)
    await gate.reached()
    stayer = asyncio.ensure_future(infer(channel)(named(message, "stayer"), timeout=30))
    await in_flight(http, 2)
    leaver.cancel()
    await in_flight(http, 1)
    gate.open()
    assert (await stayer).id == "stayer"
    assert len(kept.seen) == 1

    gate = Gate(kept)
    message = fresh()
    hurried = asyncio.ensure_future(infer(channel)(named(message, "hurried"), timeout=0.5))
    await gate.reached(2)
    patient = asyncio.ensure_future(infer(channel)(named(message, "patient"), timeout=30))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hurried
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gate.open()
    assert (await patient).id == "patient"


async def test_the_counters_tell_hits_joins_and_misses(
    offer: Callable[..., None], channel: grpc.aio.Channel, http: httpx.AsyncClient, kept: Replica
) -> None:
    offer(None)
    offer(ResponseCache(enabled=True, coalesce=True, ttl=MINUTE, max_bytes=1 << 20))
    gate = Gate(kept)
    message = fresh()
    calls = [asyncio.ensure_future(infer(channel)(message, timeout=30)) for _ in range(3)]
    await in_flight(http, 3)
    gate.open()
    await asyncio.gather(*calls)
    for _ in range(4):
        await infer(channel)(message, timeout=10)
    (found,) = (await http.get("/v2/models/kept/stats")).json()["model_stats"]
    stats = found["inference_stats"]
    # Two waited for the first, four came later; the scripted replica publishes nothing of its own.
    assert (stats["cache_hit"]["count"], stats["cache_miss"]["count"]) == (6, 1)
    assert stats["success"]["count"] == 6
    assert 0 < stats["cache_hit"]["ns"] < stats["cache_miss"]["ns"] * 1000
    assert abs(found["last_inference"] / 1000 - time.time()) < 60
    text = (await http.get("/metrics")).text
    for result, count in (("hit", 4), ("joined", 2), ("miss", 1), ("skipped", 0)):
        line = f'penstock_gateway_cache_requests_total{{deployment="kept",result="{result}"}} {count}.0'
        assert line in text
    assert 'penstock_gateway_cache_entries{deployment="kept"} 1.0' in text


async def test_one_gateway_tells_what_all_have_answered(
    offer: Callable[..., None],
    channel: grpc.aio.Channel,
    world: World,
    redis_server: EmbeddedRedis,
    tmp_path: Path,
    kept: Replica,
) -> None:
    offer(None)
    offer(KEEP)
    message = fresh()
    for _ in range(3):
        await infer(channel)(message, timeout=10)
    other = GatewayProcess(world, redis_server.url, tmp_path).start()
    try:
        async with httpx.AsyncClient(base_url=other.url, timeout=30, trust_env=False) as client:

            async def summed() -> bool:
                (found,) = (await client.get("/v2/models/kept/stats")).json()["model_stats"]
                stats = found["inference_stats"]
                return (stats["cache_hit"]["count"], stats["cache_miss"]["count"]) == (2, 1)

            await eventually(summed)
    finally:
        other.stop()


async def test_too_large_requests_are_computed_each(
    offer: Callable[..., None], channel: grpc.aio.Channel, kept: Replica
) -> None:
    offer(ResponseCache(enabled=True, coalesce=True, ttl=MINUTE, max_bytes=1 << 20))
    message = request(*[1.0] * 300_000)
    for _ in range(2):
        await infer(channel)(message, timeout=20)
    assert len(kept.seen) == 2
