"""HTTP over ASGI, as little of it as the gateway needs: bodies, compression, errors as JSON."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from penstock_gateway.hotpath.bounds import header_priority
from penstock_gateway.hotpath.http.exchange import KEEP
from penstock_gateway.hotpath.http.ports import Receive, Scope, Send
from penstock_gateway.hotpath.messages import MIN_COMPRESSED_BYTES, deflate, inflate, overfull, too_large
from penstock_kit.errors import (
    Cancelled,
    InvalidArgument,
    PenstockError,
    Reason,
    ResourceExhausted,
    http_status,
)

JSON = "application/json"
BINARY = "application/octet-stream"
# The gateway reads JSON and forms up to this length: half a millisecond, in which nobody else is served.
READ_BYTES = 64 << 10
# Decompressing more than this is worth a thread, which does not hold the interpreter.
_INFLATE_BYTES = 4 << 10
# Ours, and the one by which Envoy (Istio, Contour …) tells how long it waits; 0 is "for ever".
TIMEOUT_HEADER = b"x-request-timeout-ms"
PROXY_TIMEOUT_HEADER = b"x-envoy-expected-rq-timeout-ms"
# A caller that still sends does not read: a body over the limit is read on, and thrown away, so that the
# caller gets to know why it was refused, unless it is this many times over or pauses this long.
_READ_ON = 8
_QUIET_SECONDS = 0.5
# What a header of ours may say at most, and still a week.
_MAX_TIMEOUT_MS = 7 * 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Response:
    """One answer.

    Attributes:
        status: HTTP's.
        body: Its bytes.
        content_type: Of the body.
        headers: Further headers.
    """

    status: int = 200
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())


class HttpError(Exception):
    """An error that only HTTP knows, such as 405."""

    def __init__(
        self, status: int, message: str, *, reason: Reason, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.headers = headers


class RequestHead:
    """What the head of an HTTP request says.

    Args:
        method: In capitals.
        path: Decoded.
        headers: By name in lower case; of repeated ones the last.
        query: Behind the question mark.
        default_timeout: Seconds for a request that gives no deadline.

    Attributes:
        timeout: Seconds that the caller waits.
    """

    __slots__ = ("_query", "headers", "method", "path", "timeout")

    def __init__(
        self, method: str, path: str, headers: dict[bytes, bytes], query: bytes, default_timeout: float
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self._query = query
        self.timeout = self._timeout(default_timeout)

    def _timeout(self, default: float) -> float:
        given = self._milliseconds(TIMEOUT_HEADER, 1)
        proxys = self._milliseconds(PROXY_TIMEOUT_HEADER, 0)
        if not given:
            # A proxy waits as it was set up to, which says no more than that nobody waits longer.
            return min(default, proxys / 1000) if proxys else default
        return min(given, proxys or given) / 1000

    def _milliseconds(self, header: bytes, least: int) -> int:
        given = self.headers.get(header)
        if given is None:
            return 0
        milliseconds = whole_number(given)
        if not least <= milliseconds <= _MAX_TIMEOUT_MS:
            raise InvalidArgument(
                f"The header {header.decode()} must be a whole number of milliseconds "
                f"from {least} to {_MAX_TIMEOUT_MS}."
            )
        return milliseconds

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters; of repeated ones the last."""
        return _form(self._query, "query")

    @property
    def priority(self) -> int:
        """What the header x-penstock-priority asks for; raises InvalidArgument if it is no priority."""
        return header_priority(self.headers)

    @property
    def traceparent(self) -> str:
        """W3C traceparent; empty if there is none."""
        return self.headers.get(b"traceparent", b"").decode("latin-1")

    @property
    def content_type(self) -> str:
        """Media type of the body without parameters, in lower case; empty if there is none."""
        return self.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()

    def require(self, *types: str) -> str:
        """Return the content type, which must be one of these (or absent, which counts as the first).

        Raises:
            HttpError: It is another one.
        """
        given = self.content_type or types[0]
        if given not in types and not (given.endswith("+json") and JSON in types):
            raise HttpError(
                415,
                f"content-type {given[:64]!r} is not taken here; use {' or '.join(types)}.",
                reason=Reason.UNSUPPORTED,
                headers=((b"accept", ", ".join(types).encode()),),
            )
        return given


class Request(RequestHead):
    """One HTTP request.

    Args:
        scope: ASGI's.
        receive: ASGI's.
        limit: Bytes of the body at most.
        default_timeout: Seconds if it gives no deadline.

    Attributes:
        deadline: Unix time in seconds after which nobody waits.
        receive: ASGI's.
    """

    __slots__ = ("_keep", "_limit", "deadline", "receive")

    def __init__(self, scope: Scope, receive: Receive, limit: int, default_timeout: float) -> None:
        super().__init__(
            scope["method"], scope["path"], dict(scope["headers"]), scope["query_string"], default_timeout
        )
        self.receive = receive
        self._keep: Callable[[int], bool] | None = scope.get("extensions", {}).get(KEEP)
        self._limit = limit
        self.deadline = time.time() + self.timeout

    async def body(self) -> bytes:
        """Return the whole body, decompressed.

        Raises:
            ResourceExhausted: It is over the limit, announced or streamed, or there is no memory for it.
            InvalidArgument: It does not decompress.
            HttpError: Its content-encoding is not known here.
            Cancelled: The caller went away.
        """
        announced = self.headers.get(b"content-length", b"")
        event = await self.receive()
        data: bytes = event.get("body", b"")
        size = len(data)
        if event.get("more_body"):
            parts: list[bytes] = []
            while event.get("more_body"):
                if size <= self._limit:
                    parts.append(data)
                    if self._keep is not None and not self._keep(len(data)):
                        raise overfull()
                    event = await self.receive()
                elif size <= self._limit * _READ_ON:
                    try:
                        async with asyncio.timeout(_QUIET_SECONDS):
                            event = await self.receive()
                    except TimeoutError:
                        break
                else:
                    break
                data = event.get("body", b"")
                size += len(data)
            parts.append(data)
            data = b"".join(parts)
        if event["type"] == "http.disconnect":
            raise Cancelled
        if size > self._limit:
            raise too_large(announced.decode("latin-1") or size, self._limit)
        encoding = self.headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if encoding in ("", "identity"):
            return data
        if encoding not in ("gzip", "deflate"):
            raise HttpError(
                415,
                f"content-encoding {encoding[:32]!r} is not known here; use gzip or deflate.",
                reason=Reason.UNSUPPORTED,
                headers=((b"accept-encoding", b"gzip, deflate"),),
            )
        if len(data) > _INFLATE_BYTES:
            return await asyncio.to_thread(inflate, data, encoding, self._limit)
        return inflate(data, encoding, self._limit)

    async def json(self) -> Any:
        """Return the short body of a management call as JSON; None if it is empty.

        Raises:
            ResourceExhausted: It is over `READ_BYTES`.
            InvalidArgument: It is no JSON.
        """
        data = await self.body()
        if len(data) > READ_BYTES:
            raise too_large(len(data), READ_BYTES)
        return loads(data) if data.strip() else None


def whole_number(value: bytes) -> int:
    """Return the number that a header holds; −1 if it holds none, or one of more than 15 digits."""
    return int(value) if value.isdigit() and len(value) < 16 else -1


def loads(data: bytes | str) -> Any:
    """Return JSON's value.

    Raises:
        InvalidArgument: It is no JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"The body is not JSON: {error}.", reason=Reason.MALFORMED_BODY) from None


def dumps(value: Any) -> bytes:
    """Return a value as compact JSON."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON may name (\ud800) and UTF-8 cannot hold: named again.
        return json.dumps(value, separators=(",", ":")).encode()


def as_json(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON answer."""
    return Response(status, dumps(value))


def _form(data: bytes, what: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(data.decode(), keep_blank_values=True, strict_parsing=bool(data), errors="strict")
    except (UnicodeDecodeError, ValueError):
        raise InvalidArgument(f"The {what} is not well-formed.", reason=Reason.MALFORMED_BODY) from None
    return dict(pairs)


def form(data: bytes) -> dict[str, str]:
    """Return the fields of a URL-encoded form.

    Raises:
        InvalidArgument: It is not well-formed.
    """
    return _form(data, "form")


def failure(error: PenstockError | HttpError) -> Response:
    """Return an error as OIP's clients read it, with reason and metadata for programs."""
    body: dict[str, Any] = {"error": error.message or str(error), "reason": error.reason.name}
    if isinstance(error, HttpError):
        return Response(error.status, dumps(body), headers=error.headers)
    if error.metadata:
        body["metadata"] = error.metadata
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if error.retry_after_seconds is not None:
        # Whole seconds are all that the standard header has; OpenAI's clients read the finer one.
        seconds = error.retry_after_seconds
        headers = (
            (b"retry-after", b"%d" % max(math.ceil(seconds), 1)),
            (b"retry-after-ms", b"%d" % max(math.ceil(seconds * 1000), 1)),
        )
    status = http_status(error.code)
    if isinstance(error, ResourceExhausted) and error.reason is Reason.PAYLOAD_TOO_LARGE:
        status = 413
    return Response(status, dumps(body), headers=headers)


def encode(
    response: Response, request_headers: Mapping[bytes, bytes]
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers of an answer but for its length, and its body as it goes to the caller."""
    body = response.body
    headers = [(b"content-type", response.content_type.encode()), *response.headers]
    encoding = _encoding(request_headers.get(b"accept-encoding", b""), response)
    if encoding:
        body = deflate(body, encoding)
        headers += [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]
    return headers, body


async def send_response(
    response: Response, request_headers: Mapping[bytes, bytes], method: str, send: Send
) -> None:
    """Send an answer, compressed if the caller asks for it and it pays."""
    headers, body = encode(response, request_headers)
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body, "more_body": False})


def _encoding(accepted: bytes, response: Response) -> str:
    if not accepted or len(response.body) < MIN_COMPRESSED_BYTES:
        return ""
    codings = [part.partition(b";") for part in accepted.lower().split(b",")]
    wanted = [c.strip().decode("latin-1") for c, _, q in codings if q.replace(b" ", b"") != b"q=0"]
    # Tensors hardly shrink: only a caller who names one coding, and so means it, gets them compressed.
    if response.content_type == BINARY and len(wanted) > 1:
        return ""
    return next((coding for coding in ("gzip", "deflate") if coding in wanted), "")
