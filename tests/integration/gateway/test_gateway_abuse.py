"""Callers who do what a caller should not, and what becomes of everybody else."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import httpx
import pytest

from penstock.gateway.v1 import gateway_service_pb2
from penstock.oip.v2 import inference_pb2 as oip
from penstock.registry.v1 import registry_service_pb2
from penstock.scheduler.v1 import scheduler_service_pb2
from penstock_kit.errors import Code, Reason
from support.gateway_world import GatewayProcess, Replica, World, hold, refuse, wait_until

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
GET = "/penstock.scheduler.v1.SchedulerService/GetDeployment"
UPLOAD = "/penstock.registry.v1.RegistryService/UploadArtifact"
REST = "/v2/models/echo/infer"


def request_for(model: str = "echo", size: int = 16) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name=model)
    made.inputs.add(name="x", datatype="FP32", shape=[1, size // 4])
    made.raw_input_contents.append(bytes(size))
    return made


def framed(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


def infer(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        INFER,
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelInferResponse.FromString,
    )


async def in_flight(channel: grpc.aio.Channel) -> int:
    ask = channel.unary_unary(
        "/penstock.gateway.v1.GatewayService/GetGateway",
        request_serializer=gateway_service_pb2.GetGatewayRequest.SerializeToString,
        response_deserializer=gateway_service_pb2.Gateway.FromString,
    )
    answer: gateway_service_pb2.Gateway = await ask(gateway_service_pb2.GetGatewayRequest(), timeout=10)
    return answer.calls_in_flight


async def until_in_flight(channel: grpc.aio.Channel, count: int) -> None:
    async with asyncio.timeout(20):
        while await in_flight(channel) != count:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.02)


class Raw:
    """An HTTP/2 connection that does as it is told, gRPC or not."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._http.initiate_connection()
        self._http.increment_flow_control_window(16 << 20)

    @classmethod
    async def open(cls, port: int) -> "Raw":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def call(
        self, path: str, *parts: bytes, end: bool = True, **headers: str
    ) -> tuple[dict[str, str], bytes]:
        """Send headers and parts of the body; return all headers and trailers, and the body."""
        number = self._http.get_next_available_stream_id()
        given = {"content-type": "application/grpc", "te": "trailers"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        pseudo = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", path)]
        self._http.send_headers(number, [*pseudo, *given.items()], end_stream=end and not parts)
        for at, part in enumerate(parts):
            self._http.send_data(number, part, end_stream=end and at == len(parts) - 1)
        self._writer.write(self._http.data_to_send())
        found: dict[str, str] = {}
        body = b""
        async with asyncio.timeout(10):
            while True:
                data = await self._reader.read(65536)
                assert data, "the connection was closed"
                for event in self._http.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                        found |= dict(event.headers)
                    elif isinstance(event, h2.events.DataReceived):
                        body += event.data
                    elif isinstance(event, h2.events.StreamReset):
                        return {**found, "reset": str(event.error_code)}, body
                    elif isinstance(event, h2.events.StreamEnded):
                        return found, body
                self._writer.write(self._http.data_to_send())

    def close(self) -> None:
        self._writer.close()


@pytest.fixture
async def raw(gateway: GatewayProcess) -> AsyncIterator[Raw]:
    made = await Raw.open(gateway.port)
    yield made
    made.close()


async def test_a_stream_left_with_its_window_full_leaves_nothing_behind(
    channel: grpc.aio.Channel, replica: Replica, world: World
) -> None:
    world.offer("echo", depth=1000)
    replica.behave = hold
    stream = channel.stream_stream(STREAM, request_serializer=oip.ModelInferRequest.SerializeToString)()
    for _ in range(400):
        await stream.write(request_for())
    await until_in_flight(channel, 256)
    stream.cancel()
    await until_in_flight(channel, 0)


async def test_calls_of_a_deployment_that_is_deleted_are_told_at_once(
    channel: grpc.aio.Channel, world: World
) -> None:
    world.offer("short-lived")  # nobody reads its queue
    method = infer(channel)
    async with asyncio.timeout(10):
        while True:
            call = method(request_for("short-lived"), timeout=30)
            await asyncio.wait((asyncio.ensure_future(call.code()),), timeout=0.3)
            if not call.done():  # else: the gateway does not know it yet
                break
    began = time.monotonic()
    world.withdraw("short-lived")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert (caught.value.code(), time.monotonic() - began < 5) == (grpc.StatusCode.NOT_FOUND, True)
    assert "deleted" in (caught.value.details() or "")


async def test_an_error_with_many_words_keeps_its_code_and_reason(
    channel: grpc.aio.Channel, replica: Replica
) -> None:
    replica.behave = refuse(Code.INVALID_ARGUMENT, Reason.INVALID_TENSOR, "ä\n" * 50_000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(channel)(request_for(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("ä\nä")
    assert b"INVALID_TENSOR" in dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]


@pytest.mark.parametrize(
    ("path", "begun"),
    [
        *((path, framed(b"x" * 100)[:50]) for path in (INFER, GET, STREAM, UPLOAD)),
        *((path, b"") for path in (GET, STREAM, UPLOAD)),
    ],
)
async def test_a_caller_who_never_ends_is_told_at_its_deadline(raw: Raw, path: str, begun: bytes) -> None:
    began = time.monotonic()
    parts = (begun,) if begun else ()
    found, _ = await raw.call(path, *parts, end=False, grpc_timeout="400m")
    assert found.get("grpc-status") == "4", found
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("timeout", ["99999999H", "0n", "1n", "00000001S"])
async def test_every_well_formed_deadline_is_kept(raw: Raw, world: World, timeout: str) -> None:
    allowed = ("0",) if timeout in ("99999999H", "00000001S") else ("4",)
    found, _ = await raw.call(INFER, framed(request_for().SerializeToString()), grpc_timeout=timeout)
    assert found["grpc-status"] in allowed, found
    ask = scheduler_service_pb2.GetDeploymentRequest(name="deployments/none").SerializeToString()
    found, _ = await raw.call(GET, framed(ask), grpc_timeout=timeout)
    assert found["grpc-status"] in (("5",) if allowed == ("0",) else ("4", "5")), found
    found, _ = await raw.call(STREAM, framed(request_for().SerializeToString()), grpc_timeout=timeout)
    assert found["grpc-status"] in (("0",) if allowed == ("0",) else ("0", "4")), found


@pytest.mark.parametrize("timeout", ["", "S", "-1S", "1", "1.5S", "123456789S", "1s", "\u0661S"])
async def test_a_deadline_that_is_none_is_told(raw: Raw, timeout: str) -> None:
    found, _ = await raw.call(INFER, framed(request_for().SerializeToString()), grpc_timeout=timeout)
    assert found.get("grpc-status") == "3", found


async def test_a_message_that_claims_to_be_compressed_in_a_plain_call_is_internal(raw: Raw) -> None:
    packed = framed(gzip.compress(request_for().SerializeToString()), flag=1)
    assert (await raw.call(INFER, packed))[0]["grpc-status"] == "13"
    assert (await raw.call(INFER, packed, grpc_encoding="gzip"))[0]["grpc-status"] == "0"
    found, _ = await raw.call(INFER, packed, grpc_encoding="zstd")
    assert (found["grpc-status"], found["grpc-accept-encoding"]) == ("12", "identity,gzip,deflate")


@pytest.mark.parametrize(
    "body",
    [b"", b"\x00", framed(b"abc")[:-1], framed(b"abc") + b"\x00", framed(b"\x0a\x05ab"), framed(b"", 7)],
)
async def test_broken_frames_are_told(raw: Raw, body: bytes) -> None:
    found, _ = await raw.call(INFER, body)
    assert found["grpc-status"] in ("3", "13"), found
    assert (await raw.call(INFER, framed(request_for().SerializeToString())))[0]["grpc-status"] == "0"


async def test_metadata_in_any_bytes_reaches_nobody_as_a_fault_of_ours(raw: Raw) -> None:
    ask = scheduler_service_pb2.GetDeploymentRequest(name="deployments/none").SerializeToString()
    for value in ("grüße", "a" * 6000, "tab\there"):
        found, _ = await raw.call(GET, framed(ask), x_note=value, x_note_bin="AAEC")
        assert found["grpc-status"] == "5", (value, found)


async def test_a_message_of_countless_fields_stops_nobody(channel: grpc.aio.Channel) -> None:
    bad = channel.unary_unary(INFER)(b"\x22\x00" * 1_000_000, timeout=30)
    began = time.monotonic()
    await infer(channel)(request_for(), timeout=30)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bad
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert time.monotonic() - began < 5


def test_a_service_that_refuses_an_upload_early_is_heard(gateway: GatewayProcess, world: World) -> None:
    world.uploading_fails = "There is no such version."

    def parts() -> Iterator[registry_service_pb2.UploadArtifactRequest]:
        for _ in range(200):
            yield registry_service_pb2.UploadArtifactRequest(chunk=bytes(1 << 20))

    # grpc's client sometimes says "Internal error from Core" of a server that answers a stream before its end
    # (10 of 40 calls of a bare grpc.aio server by grpc.aio, grpcio 1.85.1, few by this one): then once more.
    codes: list[grpc.StatusCode] = []
    with grpc.insecure_channel(gateway.target) as channel:
        upload = channel.stream_unary(
            UPLOAD,
            request_serializer=registry_service_pb2.UploadArtifactRequest.SerializeToString,
            response_deserializer=registry_service_pb2.UploadArtifactResponse.FromString,
        )
        try:
            while len(codes) < 5 and codes[-1:] != [grpc.StatusCode.NOT_FOUND]:
                with pytest.raises(grpc.RpcError) as caught:
                    upload(parts(), timeout=20)
                codes.append(caught.value.code())
                if codes[-1] is not grpc.StatusCode.NOT_FOUND:
                    assert caught.value.details() == "Internal error from Core"
        finally:
            world.uploading_fails = ""
    assert codes[-1] is grpc.StatusCode.NOT_FOUND, codes
    assert caught.value.details() == "There is no such version."


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({"x-request-timeout-ms": "0000000000000001" + "9" * 400}, 400),
        ({"x-request-timeout-ms": "9" * 5000}, 400),
        ({"inference-header-content-length": "0000000000000005" + "9" * 30}, 400),
        ({"inference-header-content-length": "9" * 5000}, 400),
        ({"content-encoding": "gzip, gzip"}, 415),
    ],
)
async def test_absurd_headers_are_told(http: httpx.AsyncClient, headers: dict[str, str], wanted: int) -> None:
    assert (await http.post(REST, content=b'{"inputs": []}', headers=headers)).status_code == wanted


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        ("/predict", '{"model_name": "\\ud800", "input_data": [1]}', 404),
        ("/predict?model_name=echo", '{"input_data": ["\\ud800"]}', 200),
        ("/predict", '{"model_name": "echo\\ud800@champion", "input_data": [1]}', 404),
        ("/predict", '{"model_name": "echo", "model_version": "\\udc00", "input_data": [1]}', 404),
        ("/predict", '{"model_name": "echo", "model_version": 1e999, "input_data": [1]}', 400),
        ("/predict", "[" * 100_000, 400),
        ("/v2/repository/models/%00/load", "{}", 404),
        ("/v2/repository/index", '{"ready": "\\ud800"}', 400),
    ],
)
async def test_text_that_is_no_text_is_told(
    http: httpx.AsyncClient, path: str, body: str, wanted: int
) -> None:
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == wanted, answer.text
    answer.json()


async def test_a_body_of_several_gzip_members_is_read_whole(
    http: httpx.AsyncClient, replica: Replica
) -> None:
    plain = json.dumps({"inputs": [], "id": "x" * 100}).encode()
    packed = gzip.compress(plain[:20]) + gzip.compress(plain[20:])
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert (await http.post(REST, content=packed, headers=headers)).content == plain
    assert (await http.post(REST, content=packed + b"tail", headers=headers)).status_code == 400


async def test_requests_in_a_row_without_waiting_are_answered_in_order(gateway: GatewayProcess) -> None:
    """HTTP/1.1 pipelining, chunked bodies and Expect: 100-continue."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    body = b'{"inputs": [], "id": "%d"}'
    for number in range(5):
        data = body % number
        head = f"POST {REST} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        if number % 2:
            writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
        else:
            chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in data) + b"0\r\n\r\n"
            writer.write(head.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunks)
    async with asyncio.timeout(20):
        for number in range(5):
            head_ = await reader.readuntil(b"\r\n\r\n")
            assert head_.startswith(b"HTTP/1.1 200"), head_
            length = int(head_.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert await reader.readexactly(length) == body % number
        data = body % 9
        writer.write(
            f"POST {REST} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode()
        )
        assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()


def test_the_log_has_no_traceback(gateway: GatewayProcess) -> None:
    """Last in this module: whatever the tests above did was expected."""
    wait_until(lambda: gateway.log.exists())
    # Envoy's side may complete a send twice when the caller resets its stream meanwhile; asyncio says so.
    twice = "InvalidStateError: invalid state"
    assert not [line for line in gateway.text().splitlines() if "Traceback" in line and twice not in line]
