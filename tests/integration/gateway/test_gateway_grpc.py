"""gRPC to a gateway process: inferences, errors, deadlines, cancellation, streams."""

import asyncio
import struct
import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from penstock.gateway.v1 import gateway_service_pb2
from penstock.oip.v2 import inference_pb2 as oip
from penstock.queue.v1 import envelope_pb2 as envelope
from penstock.scheduler.v1 import deployment_pb2
from penstock_kit.errors import Code, Reason
from support.gateway_world import GatewayProcess, Replica, World, hold, refuse, wait_until

INFER = "/inference.GRPCInferenceService/ModelInfer"


def request_for(model: str = "echo", *values: float, **fields: Any) -> oip.ModelInferRequest:
    data = values or (1.0, 2.0, 3.0, 4.0)
    made = oip.ModelInferRequest(model_name=model, **fields)
    made.inputs.add(name="x", datatype="FP32", shape=[1, len(data)])
    made.raw_input_contents.append(struct.pack(f"<{len(data)}f", *data))
    return made


def method(channel: grpc.aio.Channel, name: str, answer: Any = oip.ModelInferResponse) -> Any:
    path = name if name.startswith("/") else f"/inference.GRPCInferenceService/{name}"
    return channel.unary_unary(
        path, request_serializer=lambda m: m.SerializeToString(), response_deserializer=answer.FromString
    )


async def refused(call: Any) -> tuple[grpc.StatusCode, str, status_pb2.Status]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details = dict(caught.value.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(details)
    assert status.code == caught.value.code().value[0]
    return caught.value.code(), caught.value.details() or "", status


def reason_of(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


async def test_an_inference_goes_there_and_back(channel: grpc.aio.Channel) -> None:
    answer = await method(channel, "ModelInfer")(request_for(id="seven"), timeout=10)
    assert answer.id == "seven"
    assert answer.raw_output_contents[0] == struct.pack("<4f", 1, 2, 3, 4)


async def test_the_payload_reaches_the_replica_untouched(channel: grpc.aio.Channel, replica: Replica) -> None:
    asked = request_for(id="as it is")
    asked.parameters["anything"].double_param = 0.5
    await method(channel, "ModelInfer")(asked, timeout=10)
    seen = replica.seen[-1]
    assert seen.payload == asked.SerializeToString()
    assert seen.header.format == envelope.PAYLOAD_FORMAT_OIP_GRPC
    # gRPC rounds what it tells of a deadline up by a little.
    assert 5 < seen.header.deadline_unix_micros / 1e6 - time.time() < 11


async def test_an_alias_and_a_version_select(channel: grpc.aio.Channel, replica: Replica) -> None:
    call = method(channel, "ModelInfer")
    for fields in ({"model_version": "1"}, {"model_version": "champion"}, {"model_version": "@champion"}):
        await call(request_for(**fields), timeout=10)
    await call(request_for("echo@champion"), timeout=10)
    assert replica.seen[-1].header.model_name == "echo@champion"


@pytest.mark.parametrize(
    ("asked", "code", "reason"),
    [
        (request_for("nobody"), grpc.StatusCode.NOT_FOUND, "DEPLOYMENT_NOT_FOUND"),
        (request_for(model_version="9"), grpc.StatusCode.NOT_FOUND, "VERSION_NOT_FOUND"),
        (request_for("echo@loser"), grpc.StatusCode.NOT_FOUND, "ALIAS_NOT_FOUND"),
        (request_for(""), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (
            request_for("echo@champion", model_version="1"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
        ),
    ],
)
async def test_a_name_that_leads_nowhere_is_told(
    channel: grpc.aio.Channel, asked: oip.ModelInferRequest, code: grpc.StatusCode, reason: str
) -> None:
    got, words, status = await refused(method(channel, "ModelInfer")(asked, timeout=10))
    assert (got, reason_of(status)) == (code, reason)
    assert words == status.message


async def test_bytes_that_are_no_request_are_told(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary(INFER)
    for wrong in (b"\xff\xff\xff", b"\x0a\x05ab", b"\x08\x01", b"\x0a\x02\xff\xfe"):
        code, _, status = await refused(call(wrong, timeout=10))
        assert (code, reason_of(status)) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_BODY")


async def test_a_replicas_error_arrives_with_all_its_details(
    channel: grpc.aio.Channel, replica: Replica
) -> None:
    words = "input x has shape [1, 3] — expected [-1, 4] (100 %)\nsecond line"
    replica.behave = refuse(Code.INVALID_ARGUMENT, Reason.INVALID_TENSOR, words)
    code, told, status = await refused(method(channel, "ModelInfer")(request_for(), timeout=10))
    assert (code, told, reason_of(status)) == (grpc.StatusCode.INVALID_ARGUMENT, words, "INVALID_TENSOR")


async def test_no_answer_by_the_deadline_is_told_and_the_queue_is_empty_again(
    channel: grpc.aio.Channel, replica: Replica
) -> None:
    replica.behave = hold
    began = time.monotonic()
    asked = request_for()
    asked.parameters["timeout"].int64_param = 200_000
    code, _, status = await refused(method(channel, "ModelInfer")(asked, timeout=20))
    assert (code, reason_of(status)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert time.monotonic() - began < 5


async def in_flight(channel: grpc.aio.Channel) -> int:
    state = await method(
        channel, "/penstock.gateway.v1.GatewayService/GetGateway", gateway_service_pb2.Gateway
    )(gateway_service_pb2.GetGatewayRequest(), timeout=10)
    return int(state.calls_in_flight)


async def until_in_flight(channel: grpc.aio.Channel, number: int) -> None:
    async with asyncio.timeout(20):
        while await in_flight(channel) != number:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def test_a_caller_who_leaves_is_noticed(channel: grpc.aio.Channel, replica: Replica) -> None:
    replica.behave = hold
    call = method(channel, "ModelInfer")(request_for(), timeout=60)
    await until_in_flight(channel, 1)
    call.cancel()
    await until_in_flight(channel, 0)


async def test_a_full_queue_refuses_at_once_and_says_when_to_retry(
    channel: grpc.aio.Channel, world: World, replica: Replica
) -> None:
    world.offer("narrow", depth=1)
    await until_routed(channel, "narrow")
    call = method(channel, "ModelInfer")
    first = call(request_for("narrow"), timeout=60)
    await until_in_flight(channel, 1)
    code, _, status = await refused(call(request_for("narrow"), timeout=60))
    assert (code, reason_of(status)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToSeconds() >= 1
    first.cancel()
    await until_in_flight(channel, 0)


async def until_routed(channel: grpc.aio.Channel, name: str, ready: bool = True) -> None:
    call = method(channel, "/penstock.gateway.v1.GatewayService/GetGateway", gateway_service_pb2.Gateway)
    async with asyncio.timeout(20):
        while True:
            state = await call(gateway_service_pb2.GetGatewayRequest(), timeout=10)
            if any(route.deployment == name and route.ready == ready for route in state.routes):
                return
            await asyncio.sleep(0.02)


async def test_a_request_waits_for_a_replica_that_comes_back(
    channel: grpc.aio.Channel, world: World, replica: Replica
) -> None:
    world.offer("echo", ready=0, state=deployment_pb2.DEPLOYMENT_STATE_DEGRADED, message="restarting")
    await until_routed(channel, "echo", ready=False)
    answer = await method(channel, "ModelInfer")(request_for(id="patient"), timeout=20)
    assert answer.id == "patient"


@pytest.mark.parametrize(
    "state", [deployment_pb2.DEPLOYMENT_STATE_PENDING, deployment_pb2.DEPLOYMENT_STATE_FAILED]
)
async def test_a_deployment_that_cannot_answer_refuses_at_once(
    channel: grpc.aio.Channel, world: World, state: int
) -> None:
    name = f"broken-{state}"  # its own: the route of an earlier test may still be in the table
    world.offer(name, ready=0, state=state, message="the bundle does not load")
    await until_routed(channel, name, ready=False)
    code, words, status = await refused(method(channel, "ModelInfer")(request_for(name), timeout=20))
    assert (code, reason_of(status)) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
    assert "the bundle does not load" in words


async def test_requests_in_a_queue_that_vanishes_are_answered_by_its_successor(
    channel: grpc.aio.Channel, world: World, gateway: GatewayProcess
) -> None:
    world.offer("moving")
    await until_routed(channel, "moving")
    waiting = method(channel, "ModelInfer")(request_for("moving", id="moved"), timeout=30)
    await until_in_flight(channel, 1)
    queue = world.routes["moving"].targets[0].queue
    world.offer("moving", versions={2: 100})
    successor = world.routes["moving"].targets[0].queue
    assert successor != queue
    second = Replica(gateway.environment["PENSTOCK_REDIS_URL"], successor, number=2)
    try:
        assert (await waiting).id == "moved"
    finally:
        second.stop()


async def test_a_message_over_the_limit_is_refused(channel: grpc.aio.Channel) -> None:
    asked = request_for()
    asked.raw_input_contents[0] = bytes(5 << 20)
    code, _, status = await refused(method(channel, "ModelInfer")(asked, timeout=20))
    assert (code, reason_of(status)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE")


async def test_a_large_message_below_the_limit_passes(channel: grpc.aio.Channel) -> None:
    asked = request_for()
    asked.raw_input_contents[0] = bytes(3 << 20)
    answer = await method(channel, "ModelInfer")(asked, timeout=20)
    assert len(answer.raw_output_contents[0]) == 3 << 20


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_read_and_answered(
    channel: grpc.aio.Channel, compression: grpc.Compression
) -> None:
    asked = request_for()
    asked.raw_input_contents[0] = bytes(100_000)
    answer = await method(channel, "ModelInfer")(asked, timeout=20, compression=compression)
    assert answer.raw_output_contents[0] == bytes(100_000)


async def test_a_small_message_that_unpacks_to_too_much_is_refused(channel: grpc.aio.Channel) -> None:
    asked = request_for()
    asked.raw_input_contents[0] = bytes(40 << 20)
    code, _, status = await refused(
        method(channel, "ModelInfer")(asked, timeout=20, compression=grpc.Compression.Gzip)
    )
    assert (code, reason_of(status)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE")


async def test_priority_one_overtakes(channel: grpc.aio.Channel, replica: Replica) -> None:
    asked = request_for()
    asked.parameters["priority"].uint64_param = 1
    await method(channel, "ModelInfer")(asked, timeout=20)
    assert replica.seen[-1].stream.endswith(b":p0")
    asked.parameters["priority"].int64_param = -1
    code, _, _ = await refused(method(channel, "ModelInfer")(asked, timeout=20))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def streaming(channel: grpc.aio.Channel, answer: Any, metadata: Any = None) -> Any:
    return channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=answer.FromString,
    )(timeout=30, metadata=metadata)


async def test_a_stream_answers_in_the_order_of_its_requests_and_outlives_errors(
    channel: grpc.aio.Channel,
) -> None:
    stream = streaming(channel, oip.ModelStreamInferResponse)
    names = ["echo", "nobody", "echo", "echo"]
    for number, name in enumerate(names):
        await stream.write(request_for(name, id=str(number)))
    await stream.done_writing()
    answers = [answer async for answer in stream]
    assert [answer.infer_response.id for answer in answers] == ["0", "1", "2", "3"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, False, False]


async def test_a_stream_answers_before_the_caller_has_finished(channel: grpc.aio.Channel) -> None:
    stream = streaming(channel, oip.ModelStreamInferResponse)
    for number in range(3):
        await stream.write(request_for(id=str(number)))
        assert (await stream.read()).infer_response.id == str(number)
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK


async def test_a_stream_gives_bare_answers_to_those_who_ask(channel: grpc.aio.Channel) -> None:
    bare = (("x-oip-stream-format", "infer-response"),)
    stream = streaming(channel, oip.ModelInferResponse, bare)
    await stream.write(request_for(id="bare"))
    assert (await stream.read()).id == "bare"
    await stream.write(request_for("nobody"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_stream_that_is_left_leaves_nothing_behind(
    channel: grpc.aio.Channel, replica: Replica
) -> None:
    replica.behave = hold
    stream = streaming(channel, oip.ModelStreamInferResponse)
    for _ in range(5):
        await stream.write(request_for())
    await until_in_flight(channel, 5)
    stream.cancel()
    await until_in_flight(channel, 0)


async def test_an_unknown_method_is_told(channel: grpc.aio.Channel) -> None:
    for path in ("/penstock.registry.v1.RegistryService/Nothing", "/no.Service/Method"):
        code, _, status = await refused(method(channel, path)(oip.ServerLiveRequest(), timeout=10))
        assert (code, reason_of(status)) == (grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD")


@pytest.mark.parametrize(
    "name",
    ["SystemSharedMemoryStatus", "CudaSharedMemoryRegister", "TraceSetting", "LogSettings"],
)
async def test_what_is_not_offered_says_why(channel: grpc.aio.Channel, name: str) -> None:
    code, words, status = await refused(method(channel, name)(oip.ServerLiveRequest(), timeout=10))
    assert (code, reason_of(status)) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED")
    assert words.startswith(name)


def test_the_log_has_no_traceback(gateway: GatewayProcess) -> None:
    """Last in this module: whatever the tests above did was expected."""
    wait_until(lambda: gateway.log.exists())
    assert "Traceback" not in gateway.text()
