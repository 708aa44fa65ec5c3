"""Callers of many shapes. Each call carries rows that no other has, and is taken down with its outcome.

A caller knows nothing of faults and judges nothing: it sends, waits, and writes down what came. Each has a
connection of its own, so that one whose gateway dies does not take the others along.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import numpy as np

import penstock
from penstock.errors import PenstockError
from penstock.oip.v2 import inference_pb2 as oip
from penstock.rpc_errors import from_rpc_error
from support.chaos.history import OK, Call, History
from support.chaos.model import POISON, Payload, digest

_SERVICE = "/inference.GRPCInferenceService"
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)
# gRPC's own retry policy: what any client of any language can be told to do.
_RETRIES = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
# A caller that was refused does not come back at once.
_AFTER_ERROR_SECONDS = 0.02
# How long past its deadline a call may stay open before it counts as lost.
_LATE_SECONDS = 10.0
# HTTP's statuses, back to the codes that they stand for.
_CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_BINARY_TYPE = "application/octet-stream"
_HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass
class Caller(ABC):
    """One caller with one call, or one stream of them, open at a time.

    Attributes:
        deployment: Whom it asks.
        kind: See `validator.KINDS`.
        version: Which version it asks for; empty for any.
        rows: Rows of a request, at least and at most.
        width: Numbers in a row, at least and at most.
        timeout: Seconds that a call may take.
        pause: Seconds between two calls.
        calls_per_connection: After so many calls it connects anew; 0 for never.
        retry: Whether gRPC's own retry policy tries UNAVAILABLE again.
    """

    deployment: str
    kind: str = "small"
    version: str = ""
    rows: tuple[int, int] = (1, 1)
    width: tuple[int, int] = (16, 16)
    timeout: float = 30.0
    pause: float = 0.0
    calls_per_connection: int = 0
    retry: bool = False
    carrier: str = field(default="grpc", init=False)
    _random: random.Random = field(default_factory=random.Random, init=False)
    _name: str = field(default="", init=False)
    _count: int = field(default=0, init=False)

    def prepare(self, number: int, seed: int) -> None:
        """Get a name and a generator of its own."""
        self._random = random.Random(f"{seed}/{number}")
        self._name = f"{number}"
        self._count = number * 7919

    async def run(self, address: str, history: History, stopping: asyncio.Event) -> None:
        """Call until told to stop."""
        while not stopping.is_set():
            async with self._connected(address) as connection:
                count = 0
                while not stopping.is_set() and (not count or count != self.calls_per_connection):
                    if not await self._once(connection, history):
                        await asyncio.sleep(_AFTER_ERROR_SECONDS)
                    if self.pause:
                        await asyncio.sleep(self.pause * self._random.uniform(0.5, 1.5))
                    count += 1

    @abstractmethod
    def _connected(self, address: str) -> AbstractAsyncContextManager[Any]:
        """A connection, as an asynchronous context."""

    @abstractmethod
    async def _once(self, connection: Any, history: History) -> bool:
        """Make one call; say whether it was answered."""

    def _call(self) -> tuple[Call, Payload]:
        """The next request."""
        rows, width = self._random.randint(*self.rows), self._random.randint(*self.width)
        payload = Payload(self._count * 64 % (1 << 22), rows, width)
        self._count += 1
        call = Call(
            id=f"{self.carrier}-{self._name}-{self._count}",
            kind=self.kind,
            carrier=self.carrier,
            deployment=self.deployment,
            version=self.version,
            first=payload.first,
            rows=rows,
            width=width,
        )
        return call, payload


@dataclass
class GrpcCaller(Caller):
    """Unary gRPC."""

    def _connected(self, address: str) -> grpc.aio.Channel:
        options = list(_OPTIONS)
        if self.retry:
            config = {"methodConfig": [{"name": [{}], "retryPolicy": _RETRIES}]}
            options.append(("grpc.service_config", json.dumps(config)))
        return grpc.aio.insecure_channel(address, options=options)

    async def _once(self, connection: Any, history: History) -> bool:
        call, payload = self._call()
        return await self._ask(connection, history, call, self._message(call, payload))

    def _message(self, call: Call, payload: Payload) -> bytes:
        return infer_request(call, payload.array()).SerializeToString()

    def _open(self, connection: Any, message: bytes) -> grpc.aio.UnaryUnaryCall[bytes, bytes]:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = connection.unary_unary(
            f"{_SERVICE}/ModelInfer"
        )
        return method(message, timeout=self.timeout)

    async def _ask(self, connection: Any, history: History, call: Call, message: bytes) -> bool:
        history.begin(call)
        open_call = self._open(connection, message)
        try:
            response = oip.ModelInferResponse.FromString(await open_call)
        except grpc.aio.AioRpcError as error:
            history.end(call, error.code().name, from_rpc_error(error).reason.name, error.details() or "")
            return False
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():  # it is not the call that was cancelled: it was lost
                raise
            history.end(call, "CANCELLED")
            return False
        take(call, response)
        history.end(call, OK)
        return True


@dataclass
class CancellingCaller(GrpcCaller):
    """Leaves some time after it has asked.

    Attributes:
        patience: Seconds that it waits at most.
    """

    kind: str = "cancelled"
    patience: float = 0.02

    def _open(self, connection: Any, message: bytes) -> grpc.aio.UnaryUnaryCall[bytes, bytes]:
        open_call = super()._open(connection, message)
        asyncio.get_running_loop().call_later(self._random.uniform(0, self.patience), open_call.cancel)
        return open_call


@dataclass
class BadCaller(GrpcCaller):
    """Sends what nothing can be made of."""

    kind: str = "bad"

    def _message(self, call: Call, payload: Payload) -> bytes:
        request = infer_request(call, payload.array())
        match self._random.randrange(4):
            case 0:
                request.raw_input_contents[0] = request.raw_input_contents[0][:-3]
            case 1:
                request.inputs[0].name = "nothing"
            case 2:
                request.inputs[0].datatype = "INT64"
            case _:
                return b"\x0a" + request.SerializeToString()[1:-1]
        return request.SerializeToString()


@dataclass
class PoisonCaller(GrpcCaller):
    """Sends rows that kill the replica that computes them."""

    kind: str = "poison"

    def _message(self, call: Call, payload: Payload) -> bytes:
        rows = payload.array().copy()
        rows[0, 0] = POISON
        return infer_request(call, rows).SerializeToString()


@dataclass
class StreamCaller(GrpcCaller):
    """Many inferences over one stream, whose answers it counts.

    Attributes:
        length: Requests in one stream.
    """

    length: int = 8

    def __post_init__(self) -> None:
        self.carrier = "stream"

    async def _once(self, connection: Any, history: History) -> bool:
        made = [self._call() for _ in range(self.length)]
        left = {call.id: history.begin(call) for call, _ in made}
        answered: dict[str, Call] = {}
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = connection.stream_stream(
            f"{_SERVICE}/ModelStreamInfer"
        )
        messages = iter([infer_request(call, payload.array()).SerializeToString() for call, payload in made])
        code, reason, detail = "UNKNOWN", "", "the stream ended early"
        try:
            async for data in method(messages, timeout=self.timeout):
                answer = oip.ModelStreamInferResponse.FromString(data)
                call_id = answer.infer_response.id
                if call_id in answered:
                    answered[call_id].answers += 1
                    continue
                call = answered[call_id] = left.pop(call_id)
                call.ended = time.monotonic()
                if answer.error_message:
                    call.detail = answer.error_message
                else:
                    take(call, answer.infer_response)
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error)
            code, reason, detail = known.code.name, known.reason.name, error.details() or ""
        for call in answered.values():  # only now: a second answer may come up to the end of the stream
            ended = call.ended
            history.end(call, _code_of_words(call.detail) if call.detail else OK, "", call.detail, ended)
        for call in left.values():
            history.end(call, code, reason, detail)
        return not left


@dataclass
class SdkCaller(Caller):
    """Our own client, with the retries that it makes by itself."""

    def __post_init__(self) -> None:
        self.carrier = "sdk"

    def _connected(self, address: str) -> penstock.AsyncClient:
        return penstock.AsyncClient(address)

    async def _once(self, connection: Any, history: History) -> bool:
        call, payload = self._call()
        history.begin(call)
        try:
            prediction = await connection.predict(
                call.deployment,
                {"input": payload.array()},
                version=call.version,
                timeout=self.timeout,
                request_id=call.id,
            )
        except PenstockError as error:
            history.end(call, error.code.name, error.reason.name, error.message)
            return False
        call.answers += prediction.id == call.id
        call.said = prediction.model_version
        output, version = prediction["output"], prediction["version"]
        _take_tensors(call, list(output.shape), [output.tobytes(), version.tobytes()])
        history.end(call, OK)
        return True


@dataclass
class HttpCaller(Caller):
    """OIP over HTTP, as JSON or with binary tensors.

    Attributes:
        binary: Whether tensors are binary.
    """

    binary: bool = False

    def __post_init__(self) -> None:
        self.carrier = "http"

    def _connected(self, address: str) -> httpx.AsyncClient:
        # Not after its deadline, but a little later: the answer that says so is on its way then.
        limit = httpx.Timeout(self.timeout + _LATE_SECONDS / 2)
        return httpx.AsyncClient(base_url=f"http://{address}", timeout=limit, trust_env=False)

    async def _once(self, connection: Any, history: History) -> bool:
        call, payload = self._call()
        body, headers = self._body(call, payload)
        history.begin(call)
        path = f"/v2/models/{call.deployment}" + (f"/versions/{call.version}" if call.version else "")
        try:
            response = await connection.post(f"{path}/infer", content=body, headers=headers)
        except httpx.TimeoutException as error:
            history.end(call, "DEADLINE_EXCEEDED", "", f"no answer at all: {error!r}")
            return False
        except httpx.TransportError as error:
            history.end(call, "UNAVAILABLE", "", repr(error))
            return False
        if response.status_code != httpx.codes.OK:
            code = _CODES.get(response.status_code, f"HTTP {response.status_code}")
            history.end(call, code, _reason(response), response.text)
            return False
        self._take(call, response)
        history.end(call, OK)
        return True

    def _body(self, call: Call, payload: Payload) -> tuple[bytes, dict[str, str]]:
        rows = payload.array()
        tensor: dict[str, object] = {"name": "input", "datatype": "FP32", "shape": [call.rows, call.width]}
        document: dict[str, object] = {
            "id": call.id,
            "inputs": [tensor],
            "parameters": {"timeout": int(self.timeout * 1e6)},
        }
        if not self.binary:
            tensor["data"] = rows.ravel().tolist()
            return json.dumps(document).encode(), {"Content-Type": "application/json"}
        tensor["parameters"] = {"binary_data_size": rows.nbytes}
        document["outputs"] = [
            {"name": name, "parameters": {"binary_data": True}} for name in ("output", "version")
        ]
        head = json.dumps(document).encode()
        return head + rows.tobytes(), {"Content-Type": _BINARY_TYPE, _HEADER_LENGTH: str(len(head))}

    def _take(self, call: Call, response: httpx.Response) -> None:
        size = int(response.headers.get(_HEADER_LENGTH, len(response.content)))
        document = json.loads(response.content[:size])
        tail = memoryview(response.content)[size:]
        raw = []
        for tensor in document["outputs"]:
            length = tensor.get("parameters", {}).get("binary_data_size")
            if length is None:
                raw.append(memoryview(np.asarray(tensor["data"], np.float32).tobytes()))
            else:
                raw.append(tail[:length])
                tail = tail[length:]
        call.answers += document.get("id") == call.id
        call.said = document.get("model_version", "")
        _take_tensors(call, document["outputs"][0]["shape"], raw)


@dataclass
class BadHttpCaller(HttpCaller):
    """Sends HTTP bodies that nothing can be made of."""

    kind: str = "bad"

    def _body(self, call: Call, payload: Payload) -> tuple[bytes, dict[str, str]]:
        body, headers = super()._body(call, payload)
        match self._random.randrange(3):
            case 0:
                return body[:-2], headers
            case 1:
                return body.replace(b'"input"', b'"nothing"'), headers
            case _:
                return b"\xff" + body, headers


def infer_request(
    call: Call, rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> oip.ModelInferRequest:
    """The request of a call."""
    request = oip.ModelInferRequest(model_name=call.deployment, model_version=call.version, id=call.id)
    request.inputs.add(name="input", datatype="FP32", shape=[call.rows, call.width])
    request.raw_input_contents.append(rows.tobytes())
    return request


def take(call: Call, response: oip.ModelInferResponse) -> None:
    """Take an answer down. One with another request's id is none of ours."""
    call.answers += response.id == call.id
    call.said = response.model_version
    _take_tensors(call, list(response.outputs[0].shape), response.raw_output_contents)


def _take_tensors(call: Call, shape: list[int], raw: Sequence[bytes | memoryview]) -> None:
    call.digest = digest([int(size) for size in shape], raw[0])
    call.versions = [f"{number:g}" for number in np.unique(np.frombuffer(raw[1], np.float32))]


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json().get("reason", ""))
    except ValueError:
        return ""


def _code_of_words(words: str) -> str:
    """The code of an error that came in a stream, where only words have a place."""
    if "deadline passed" in words:
        return "DEADLINE_EXCEEDED"
    if "shutting down" in words or "Retry the call" in words:
        return "UNAVAILABLE"
    return "UNKNOWN"


class Traffic:
    """Callers on one mesh.

    Args:
        address: host:port of its gateways.
        callers: Who calls.
        history: Where it is taken down.
        seed: Of what the callers draw.
    """

    def __init__(self, address: str, callers: Sequence[Caller], history: History, seed: int) -> None:
        self._address = address
        self._callers = callers
        self._history = history
        self._seed = seed

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Call while the body runs; then wait for what is open. What stays open is lost."""
        stopping = asyncio.Event()
        tasks = []
        for number, caller in enumerate(self._callers):
            caller.prepare(number, self._seed)
            tasks.append(asyncio.ensure_future(caller.run(self._address, self._history, stopping)))
        try:
            yield
        finally:
            stopping.set()
            longest = max(caller.timeout for caller in self._callers) + _LATE_SECONDS
            done, pending = await asyncio.wait(tasks, timeout=longest)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            await asyncio.gather(*done)
