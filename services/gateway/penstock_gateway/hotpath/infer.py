"""ModelInfer over gRPC: the shortest way from the wire to the queue and back.

What `grpc_framing` does for any call is done here for one message each way, in one coroutine, with one
future to wait for. The request's tensors are never looked at.
"""

from __future__ import annotations

import asyncio
import time

from penstock.queue.v1.envelope_pb2 import PAYLOAD_FORMAT_OIP_GRPC
from penstock_gateway.hotpath.dispatch import PRIORITY_NORMAL, Dispatcher, bounds
from penstock_gateway.hotpath.grpc_framing import (
    OK_TRAILERS,
    START,
    Call,
    Receive,
    Scope,
    Send,
    error_headers,
    hide,
    parse_timeout,
    refuse,
)
from penstock_gateway.hotpath.messages import frame, too_large
from penstock_gateway.hotpath.scan import read_parameters, scan
from penstock_kit.errors import DeadlineExceeded, PenstockError


class InferHandler:
    """Serves /inference.GRPCInferenceService/ModelInfer.

    Args:
        dispatcher: Queues requests.
        limit: Bytes of one message at most.
        default_timeout: Seconds for a call that gives no deadline.
    """

    def __init__(self, dispatcher: Dispatcher, *, limit: int, default_timeout: float) -> None:
        self._dispatcher = dispatcher
        self._limit = limit
        self._default_timeout = default_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        encoding = ""
        try:
            headers: dict[bytes, bytes] = dict(scope["headers"])
            timeout = headers.get(b"grpc-timeout")
            seconds = self._default_timeout if timeout is None else parse_timeout(timeout)
            deadline = time.time() + seconds
            event = await receive()
            body: bytes = event.get("body", b"")
            if (
                event.get("more_body")
                or body[:1] != b"\x00"
                or len(body) != 5 + int.from_bytes(body[1:5], "big")
                or len(body) - 5 > self._limit
                or headers.get(b"grpc-encoding", b"identity") != b"identity"
            ):
                message, encoding = await self._unusual(scope, event, receive, send)
            else:
                message = body[5:]
            name, version, _, parameters = scan(message)
            priority = PRIORITY_NORMAL
            if parameters and (b"priority" in parameters or b"timeout" in parameters):
                deadline, priority = bounds(read_parameters(parameters), deadline)
            reply = await self._dispatcher.submit(
                name,
                version,
                message,
                deadline=deadline,
                format=PAYLOAD_FORMAT_OIP_GRPC,
                traceparent=headers.get(b"traceparent", b"").decode("latin-1"),
                priority=priority,
            )
            payload = reply.payload
            if encoding:
                await _answer_compressed(send, payload, encoding)
                return
            await send(START)
            await send(
                {
                    "type": "http.response.body",
                    "body": b"\x00" + len(payload).to_bytes(4, "big") + payload,
                    "more_body": False,
                }
            )
            await send(OK_TRAILERS)
        except PenstockError as error:
            await refuse(send, error_headers(error))
        except Exception as error:  # noqa: BLE001 - the edge: nothing unknown may leak
            if type(error).__name__ == "ClientDisconnectedError":  # Envoy's way of saying that nobody reads
                return
            await refuse(send, error_headers(hide(error, "ModelInfer")))

    async def _unusual(
        self, scope: Scope, first: dict[str, object], receive: Receive, send: Send
    ) -> tuple[bytes, str]:
        """Return message and answer's encoding of a call that came in pieces, compressed or broken."""
        queued = [first]

        async def again() -> dict[str, object]:
            return queued.pop() if queued else await receive()

        call = Call(scope, again, send, self._limit, self._default_timeout)
        try:
            async with asyncio.timeout(max(call.deadline - time.time(), 0)):
                message = await call.read_only()
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed before the request had come whole.") from None
        if len(message) > self._limit:
            raise too_large(len(message), self._limit)
        return message, call.response_encoding


async def _answer_compressed(send: Send, payload: bytes, encoding: str) -> None:
    headers = [*START["headers"], (b"grpc-encoding", encoding.encode())]  # type: ignore[misc]
    await send({**START, "headers": headers})
    await send({"type": "http.response.body", "body": frame(payload, encoding), "more_body": False})
    await send(OK_TRAILERS)
