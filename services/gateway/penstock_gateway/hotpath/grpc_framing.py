"""gRPC over ASGI: calls with any number of messages on either side.

A handler gets a `Call`: it reads messages, writes messages, returns, or raises an error of the tree. What
the protocol asks for beside that (deadline, compression, status and details in trailers, cancellation,
limits) is done here. Single inferences do not come this way: see `infer`.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

from penstock_gateway.hotpath.http.exchange import KEEP
from penstock_gateway.hotpath.http.ports import ClientGone, Headers, Receive, Scope, Send
from penstock_gateway.hotpath.messages import ACCEPTED_ENCODINGS, MessageReader, frame, overfull
from penstock_kit.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    PenstockError,
    Reason,
    Unimplemented,
    to_status,
)
from penstock_kit.telemetry import tracing

log = logging.getLogger(__name__)

Handler = Callable[["Call"], Awaitable[None]]

CONTENT_TYPE = (b"content-type", b"application/grpc")
# What a caller whose message could not be read needs to know.
ACCEPT_ENCODING = (b"grpc-accept-encoding", ",".join(ACCEPTED_ENCODINGS).encode())
# ASGI messages are read by servers and never changed, so those without a variable part exist once.
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [CONTENT_TYPE],
    "trailers": True,
}
_START_REFUSED = {**START, "headers": [CONTENT_TYPE, ACCEPT_ENCODING]}
END_BODY = {"type": "http.response.body", "body": b"", "more_body": False}
OK_TRAILERS = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}

_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# gRPC allows 11,000 years, which its own library for Python takes for a moment in the past.
_LONGEST_SECONDS = 365 * 24 * 3600.0
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")


def parse_timeout(value: bytes) -> float:
    """Return the seconds of a grpc-timeout header.

    Raises:
        InvalidArgument: It is none.
    """
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise InvalidArgument(f"grpc-timeout {value[:32]!r} is none: digits and one of H M S m u n.")
    return min(int(match[1]) * _UNITS[match[2]], _LONGEST_SECONDS)


def error_headers(error: PenstockError) -> list[tuple[bytes, bytes]]:
    """Return status, words and details of an error as trailers."""
    status = to_status(error)
    return [
        (b"grpc-status", str(int(error.code)).encode()),
        (b"grpc-message", quote(status.message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~").encode()),
        # gRPC wants base64 without padding, and takes it with.
        (b"grpc-status-details-bin", base64.b64encode(status.SerializeToString()).rstrip(b"=")),
    ]


def hide(error: BaseException, what: str) -> Internal:
    """Return what a caller may know of an unexpected error; the rest goes to the log."""
    trace_id = tracing.current_trace_id()
    log.error("%s failed unexpectedly", what, exc_info=error, extra={"trace_id": trace_id})
    return Internal(
        f"Internal error. Look for trace id {trace_id} in the gateway's logs.",
        metadata={"trace_id": trace_id},
    )


async def refuse(send: Send, trailers: Headers) -> None:
    """Answer a call that has no message with its status."""
    await send(_START_REFUSED)
    await send(END_BODY)
    await send({"type": "http.response.trailers", "headers": [*trailers], "more_trailers": False})


async def watch(receive: Receive) -> None:
    """Return when the caller has gone away. The request's body must have been read to its end."""
    while (await receive())["type"] != "http.disconnect":
        pass


def encodings(headers: Mapping[bytes, bytes]) -> tuple[str, str]:
    """Return how a caller compresses, and how it wants to be answered: as it does itself, or "".

    Raises:
        Unimplemented: Its encoding is not known here.
    """
    encoding = headers.get(b"grpc-encoding", b"identity").decode("latin-1")
    if encoding not in ACCEPTED_ENCODINGS:
        known = ", ".join(ACCEPTED_ENCODINGS)
        raise Unimplemented(f"grpc-encoding {encoding[:32]!r} is not known here; use one of {known}.")
    if encoding == "identity":
        return encoding, ""
    accepted = headers.get(b"grpc-accept-encoding", b"").decode("latin-1")
    return encoding, encoding if encoding in [e.strip() for e in accepted.split(",")] else ""


def _no_bound(_: int) -> bool:
    return True


class Call:
    """One gRPC call: its metadata, deadline and messages.

    Attributes:
        path: "/package.Service/Method".
        headers: The request's headers, names in lower case; of repeated ones the last.
        deadline: Unix time in seconds after which nobody waits.
        response_encoding: How answers are compressed: as the caller compresses, or "".
        trailers: Further trailers for the end of the call.
    """

    __slots__ = (
        "_ended",
        "_keep",
        "_kept",
        "_reader",
        "_receive",
        "_send",
        "deadline",
        "headers",
        "path",
        "response_encoding",
        "started",
        "trailers",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, limit: int, default_timeout: float
    ) -> None:
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        self._send = send
        # Messages that have not all come count as memory of unfinished requests.
        self._keep: Callable[[int], bool] = scope.get("extensions", {}).get(KEEP, _no_bound)
        self._kept = 0
        self._ended = False
        self.started = False
        self.trailers: list[tuple[bytes, bytes]] = []
        timeout = self.headers.get(b"grpc-timeout")
        self.deadline = time.time() + (default_timeout if timeout is None else parse_timeout(timeout))
        encoding, self.response_encoding = encodings(self.headers)
        self._reader = MessageReader(encoding, limit)

    @property
    def traceparent(self) -> str:
        """W3C traceparent of the caller; empty if there is none."""
        return self.headers.get(b"traceparent", b"").decode("latin-1")

    @property
    def ended(self) -> bool:
        """Whether the caller has said all it will say."""
        return self._ended

    async def read(self) -> bytes | None:
        """Return the next message, or None after the last.

        Raises:
            Cancelled: The caller went away.
            InvalidArgument: The stream ends within a message.
            ResourceExhausted: There is no memory for a message that has not all come.
        """
        while True:
            message = self._reader.next()
            self._count()
            if message is not None:
                return message
            if self._ended:
                if self._reader.pending:
                    raise InvalidArgument("The stream ends within a message.", reason=Reason.MALFORMED_BODY)
                return None
            event = await self._receive()
            if event["type"] != "http.request":
                raise Cancelled
            self._reader.feed(event.get("body", b""))
            self._ended = not event.get("more_body", False)

    def _count(self) -> None:
        change = self._reader.held - self._kept
        if change:
            self._kept += change
            if not self._keep(change) and change > 0:
                raise overfull()

    async def read_only(self) -> bytes:
        """Return the one message of a call that has one, and take the end of the stream.

        Raises:
            InvalidArgument: There is none, or more than one.
        """
        message = await self.read()
        if message is None:
            raise InvalidArgument("The call has no message.", reason=Reason.MALFORMED_BODY)
        if await self.read() is not None:
            raise InvalidArgument("The call has more than one message.", reason=Reason.MALFORMED_BODY)
        return message

    async def write(self, message: bytes) -> None:
        """Send one message; waits while the caller does not read."""
        await self.open()
        body = frame(message, self.response_encoding)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def open(self) -> None:
        """Send the response's headers, if they were not sent yet."""
        if not self.started:
            self.started = True
            start: dict[str, Any] = START
            if self.response_encoding:
                encoding = (b"grpc-encoding", self.response_encoding.encode())
                start = {**START, "headers": [*START["headers"], encoding]}  # type: ignore[misc]
            await self._send(start)

    async def close(self, trailers: list[tuple[bytes, bytes]]) -> None:
        """Send the status."""
        if not self.started:
            await refuse(self._send, [*trailers, *self.trailers])
            return
        await self._send(END_BODY)
        await self._send(
            {
                "type": "http.response.trailers",
                "headers": [*trailers, *self.trailers],
                "more_trailers": False,
            }
        )

    async def wait_disconnect(self) -> None:
        """Return when the caller has gone away; for a call whose messages were all read."""
        await watch(self._receive)


class Status(Exception):
    """Ends a call with trailers that were made elsewhere, such as by the service behind a pass-through."""

    def __init__(self, trailers: list[tuple[bytes, bytes]]) -> None:
        super().__init__()
        self.trailers = trailers


async def serve(
    handler: Handler, scope: Scope, receive: Receive, send: Send, *, limit: int, default_timeout: float
) -> int:
    """Run one call to its end, whatever happens; return its canonical code.

    Args:
        handler: Reads and writes; what it raises becomes the status.
        scope: ASGI's.
        receive: ASGI's.
        send: ASGI's.
        limit: Bytes of one message at most.
        default_timeout: Seconds for a call that gives no deadline.
    """
    call: Call | None = None
    try:
        call = Call(scope, receive, send, limit, default_timeout)
        async with asyncio.timeout(max(call.deadline - time.time(), 0)):
            await handler(call)
            await call.open()
        trailers = [(b"grpc-status", b"0")]
    except Status as status:
        trailers = status.trailers
    except TimeoutError:
        trailers = error_headers(DeadlineExceeded())
    except PenstockError as error:
        trailers = error_headers(error)
    except ClientGone:
        return int(Cancelled.code)
    except Exception as error:  # noqa: BLE001 - the edge: nothing unknown may leak
        trailers = error_headers(hide(error, scope["path"]))
    try:
        if call is None:
            await refuse(send, trailers)
        else:
            await call.close(trailers)
    except ClientGone:
        return int(Cancelled.code)
    return int(dict(trailers).get(b"grpc-status", b"0"))


def unary(method: Callable[[bytes, Call], Awaitable[bytes]]) -> Handler:
    """Return the handler of a method that takes one message and gives one; cancelled if the caller leaves."""

    async def handler(call: Call) -> None:
        message = await call.read_only()
        await call.write(await until_disconnect(call, method(message, call)))

    return handler


async def until_disconnect(call: Call, work: Awaitable[bytes]) -> bytes:
    """Return what the work gives; cancel it when the caller goes away.

    Raises:
        Cancelled: The caller went away.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(call.wait_disconnect())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
