"""The gateway's HTTP server with toys behind it, and callers who speak HTTP byte by byte.

Paths below /plan are served by plans, all others by an ASGI application; /toy.Toy/… is gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs

import hpack

from penstock_gateway.hotpath.http import frames
from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.ports import Receive, Responder, Scope, Send
from penstock_gateway.hotpath.http.server import HttpServer
from penstock_kit.errors import PenstockError, http_status

PATIENCE_SECONDS = 20.0
GRPC = (b"content-type", b"application/grpc")
LIMIT = 1 << 26


async def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait for a condition; return what it gave."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (result := condition()):  # noqa: ASYNC110 - anything may make it true
            await asyncio.sleep(0.005)
    return result


class ToyPlan:
    """Serves calls with one head.

    Args:
        world: Keeps what is held.
        head: Of the calls.
        what: "echo" answers at once, "later" in a later round of the loop, "hold" when the test says so,
            "big" with as many bytes as the query says.
    """

    def __init__(self, world: ToyWorld, head: Head, what: str) -> None:
        self.world = world
        self.what = what
        self.timeout = float(head.fields.get(b"x-timeout", b"30"))
        self.limit = int(head.fields.get(b"x-limit", b"%d" % LIMIT))
        self.grpc = head.fields.get(b"content-type") == b"application/grpc"
        self.bytes = int(parse_qs(head.query.decode()).get("bytes", ["0"])[0])

    def run(self, responder: Responder, body: bytes) -> Any:
        self.world.ran += 1
        if self.what == "big":
            body = b"b" * self.bytes
        elif self.grpc:
            body = body[5:]
        if self.what == "later":
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self.answer, responder, body)
        elif self.what == "hold":
            self.world.held.append((self, responder, body))
        else:
            self.answer(responder, body)
        return responder

    def answer(self, responder: Responder, body: bytes) -> None:
        if self.grpc:
            responder.answer_message(body)
        else:
            responder.answer_http(200, [(b"content-type", b"text/plain")], body)

    def cancel(self, work: Any) -> None:
        self.world.cancelled += 1

    def refuse(self, responder: Responder, error: PenstockError) -> None:
        self.world.refused += 1
        if self.grpc:
            responder.answer_grpc([(b"grpc-status", b"%d" % error.code)])
        else:
            responder.answer_http(http_status(error.code), [], error.message.encode())


class ToyWorld:
    """A server on a real socket.

    Attributes:
        server: The gateway's.
        address: Host and port.
        held: What plans hold: plan, responder, body.
        ran: Calls that plans ran.
        cancelled: Of them, those whose callers left.
        refused: Bodies that plans refused.
        left: ASGI calls that saw their caller leave.
        scopes: Of ASGI calls.
    """

    def __init__(self, max_body_bytes: int = 1 << 30) -> None:
        self.server = HttpServer(self.serve, self.plan, max_body_bytes=max_body_bytes)
        self.address = ("127.0.0.1", 0)
        self.held: list[tuple[ToyPlan, Responder, bytes]] = []
        self.ran = self.cancelled = self.refused = self.left = 0
        self.scopes: list[Scope] = []
        self.go_on = asyncio.Event()
        self._callers: list[asyncio.StreamWriter] = []

    async def connect(self, limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; what a test leaves open is closed with the world."""
        reader, writer = await asyncio.open_connection(*self.address, limit=limit)
        self._callers.append(writer)
        return reader, writer

    def pass_time(self, seconds: float) -> None:
        """Let the server believe that time has passed."""
        self.server.look(asyncio.get_running_loop().time() + seconds)

    async def hang_up(self) -> None:
        """Close all connections of callers."""
        for writer in self._callers:
            writer.transport.abort()
        for writer in self._callers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._callers.clear()

    def plan(self, head: Head) -> ToyPlan | None:
        if head.path == "/plan/broken":
            raise RuntimeError("no plan")
        if head.path.startswith("/plan/") and (head.version == "2" or head.content_length is not None):
            return ToyPlan(self, head, head.path.removeprefix("/plan/"))
        return None

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        what = scope["path"].rpartition("/")[2]
        await getattr(self, f"_{what}", self._echo)(scope, receive, send)

    async def _answer(self, send: Send, body: bytes, status: int = 200) -> None:
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                self.left += 1
                return b"".join(parts)
            parts.append(event["body"])
            if not event["more_body"]:
                return b"".join(parts)

    async def _echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(send, await self._read(receive))

    async def _early(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(send, b"no need", 413)

    async def _longhead(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"x-long", b"v" * 40_000)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def _crash(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a toy that breaks")

    async def _crashlate(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("a toy that breaks")

    async def _hang(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left += 1

    async def _unread(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read nothing until the test says so."""
        await self.go_on.wait()
        await self._answer(send, await self._read(receive))

    async def _big(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = int(parse_qs(scope["query_string"].decode())["bytes"][0])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while left:
            size = min(left, 65_536)
            left -= size
            await send({"type": "http.response.body", "body": b"b" * size, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give each part back as it comes, then trailers."""
        start = {"type": "http.response.start", "status": 200, "headers": [GRPC], "trailers": True}
        await send(start)
        more = True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                self.left += 1
                return
            more = event["more_body"]
            await send({"type": "http.response.body", "body": event["body"], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        trailers = [(b"grpc-status", b"0")]
        await send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})

    def is_empty(self) -> bool:
        """Return whether the server holds nothing of anybody."""
        server = self.server
        return not (server.connections or server.open_calls or server.held_bytes)

    async def empty(self) -> None:
        """Wait until the server holds nothing of anybody."""
        await until(self.is_empty)


@contextlib.asynccontextmanager
async def toy_world(
    max_body_bytes: int = 1 << 30, kind: type[ToyWorld] = ToyWorld
) -> AsyncIterator[ToyWorld]:
    """Serve while the block lasts; afterwards nothing may be left."""
    world = kind(max_body_bytes)
    listener = socket.create_server(("127.0.0.1", 0))
    world.address = listener.getsockname()[:2]
    await world.server.start(listener)
    try:
        yield world
    finally:
        world.go_on.set()
        await world.hang_up()
        await world.server.stop(0)
        await until(world.is_empty)


class Reset(Exception):
    """The server reset a stream."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Answer:
    """What came for one stream."""

    fields: dict[bytes, bytes] = field(default_factory=dict)
    informal: list[bytes] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    ended: bool = False
    code: int | None = None

    @property
    def status(self) -> int:
        """The status of HTTP."""
        return int(self.fields[b":status"])


class Peer:
    """A caller of HTTP/2 who can break every rule.

    Attributes:
        answers: By stream.
        settings: Of the server.
        goaway: Code of the last GOAWAY; None before.
        pongs: Payloads of answered pings.
        acks: Of settings.
        credit: What the server allows, by stream.
        biggest: The longest frame of data that came.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.answers: dict[int, Answer] = {}
        self.settings: dict[int, int] = {}
        self.goaway: int | None = None
        self.last_stream: int | None = None
        self.pongs: list[bytes] = []
        self.pings: list[bytes] = []
        self.acks = 0
        self.credit: dict[int, int] = {}
        self.biggest = 0
        self.closed = False
        self.order: list[int] = []
        # Whether data that came is allowed anew at once.
        self.generous = False

    @classmethod
    async def connect(
        cls, world: ToyWorld, *settings: tuple[int, int], greet: bool = True, limit: int = 1 << 16
    ) -> Self:
        """Connect and, if wanted, greet."""
        reader, writer = await world.connect(limit)
        made = cls(reader, writer)
        if greet:
            made.send(frames.PREFACE, frames.settings(*settings))
        return made

    def send(self, *parts: bytes) -> None:
        """Write bytes."""
        self.writer.write(b"".join(parts))

    def block(self, path: str, *extra: tuple[bytes, bytes], method: str = "POST") -> bytes:
        """Return a compressed head; with the table, as clients do."""
        fields = [
            (b":method", method.encode()),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", b"toy"),
            *extra,
        ]
        return bytes(self.encoder.encode(fields))

    def head(
        self, stream: int, path: str, *extra: tuple[bytes, bytes], method: str = "POST", end: bool = False
    ) -> bytes:
        """Return HEADERS of a request."""
        flags = frames.END_HEADERS | (frames.END_STREAM if end else 0)
        return frames.frame(frames.HEADERS, flags, stream, self.block(path, *extra, method=method))

    def call(self, stream: int, path: str, body: bytes, *extra: tuple[bytes, bytes]) -> None:
        """Send a whole request in frames of at most 16 KiB."""
        parts = [self.head(stream, path, *extra)]
        for at in range(0, max(len(body), 1), 16_384):
            last = at + 16_384 >= len(body)
            parts.append(data(stream, body[at : at + 16_384], end=last))
        self.send(*parts)

    async def read(self) -> bool:
        """Take the next frame; False at the end of the connection."""
        try:
            header = await self.reader.readexactly(9)
            high, low, kind, flags, stream = frames.HEADER.unpack(header)
            payload = await self.reader.readexactly(high << 8 | low)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed = True
            return False
        answer = self.answers.setdefault(stream, Answer()) if stream else Answer()
        if kind == frames.DATA:
            self._data(stream, answer, payload)
        elif kind == frames.HEADERS:
            while not flags & frames.END_HEADERS:
                header = await self.reader.readexactly(9)
                high, low, _, more, _ = frames.HEADER.unpack(header)
                payload += await self.reader.readexactly(high << 8 | low)
                flags |= more & frames.END_HEADERS
            self._head(answer, payload)
        elif kind == frames.RST_STREAM:
            answer.code = int.from_bytes(payload, "big")
            answer.ended = True
        elif kind == frames.SETTINGS and flags & frames.ACK:
            self.acks += 1
        elif kind == frames.SETTINGS:
            self.settings.update(struct.iter_unpack(">HI", payload))
        elif kind == frames.PING:
            (self.pongs if flags & frames.ACK else self.pings).append(payload)
        elif kind == frames.GOAWAY:
            self.last_stream, self.goaway = struct.unpack(">II", payload[:8])
        elif kind == frames.WINDOW_UPDATE:
            self.credit[stream] = self.credit.get(stream, 0) + int.from_bytes(payload, "big")
        if kind in (frames.DATA, frames.HEADERS) and flags & frames.END_STREAM:
            answer.ended = True
            self.order.append(stream)
        return True

    def _data(self, stream: int, answer: Answer, payload: bytes) -> None:
        self.biggest = max(self.biggest, len(payload))
        answer.body += payload
        if self.generous and payload:
            self.send(frames.window_update(0, len(payload)), frames.window_update(stream, len(payload)))

    def _head(self, answer: Answer, payload: bytes) -> None:
        fields = {bytes(n): bytes(v) for n, v in self.decoder.decode(payload, raw=True)}
        if fields.get(b":status", b"").startswith(b"1"):
            answer.informal.append(fields[b":status"])
        elif not answer.fields:
            answer.fields = fields
        else:
            answer.trailers = fields

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Read until a condition holds."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (result := condition()):
                if not await self.read():
                    raise ConnectionResetError(f"the server closed the connection; code {self.goaway}")
        return result

    async def answer(self, stream: int) -> Answer:
        """Return the answer to a call.

        Raises:
            Reset: There is none.
        """
        await self.until(lambda: stream in self.answers and self.answers[stream].ended)
        answer = self.answers[stream]
        if answer.code:
            raise Reset(answer.code)
        return answer

    async def reset_code(self, stream: int) -> int:
        """Return the code with which the server resets a stream; the connection must go on."""
        await self.until(lambda: self.answers.get(stream, Answer()).code is not None)
        await self.is_alive()
        return self.answers[stream].code or 0

    async def is_alive(self) -> None:
        """See that the connection still serves."""
        count = len(self.pongs)
        self.send(frames.frame(frames.PING, 0, 0, b"are you?"))
        await self.until(lambda: len(self.pongs) > count)

    async def end_code(self) -> int:
        """Return the code with which the server ends the connection, which it then closes."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self.read():
                pass
        assert self.goaway is not None, "closed without GOAWAY"
        return self.goaway

    async def close(self) -> None:
        """Close."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


def data(stream: int, payload: bytes, *, end: bool = False) -> bytes:
    """Return a frame of data."""
    return frames.frame(frames.DATA, frames.END_STREAM if end else 0, stream, payload)


def grpc(payload: bytes) -> bytes:
    """Return a message of gRPC."""
    return b"\x00" + len(payload).to_bytes(4, "big") + payload


async def exchange(world: ToyWorld, request: bytes, *, shut: bool = False) -> bytes:
    """Send bytes, return all that comes until the server closes."""
    reader, writer = await world.connect()
    writer.write(request)
    if shut:
        writer.write_eof()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await reader.read()
    finally:
        writer.close()


@dataclass
class Plain:
    """An answer of HTTP/1."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class Line:
    """A caller of HTTP/1 who writes bytes and reads answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, world: ToyWorld, limit: int = 1 << 16) -> Self:
        """Connect."""
        return cls(*await world.connect(limit))

    def send(self, *parts: bytes) -> None:
        """Write bytes."""
        self.writer.write(b"".join(parts))

    async def answer(self, *, bodiless: bool = False) -> Plain:
        """Read one answer."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            status = int(lines[0].split()[1])
            headers = {n.strip(): v.strip() for n, _, v in (li.partition(b":") for li in lines[1:] if li)}
            body = b""
            if status < 200 or bodiless:
                pass
            elif headers.get(b"transfer-encoding") == b"chunked":
                while size := int((await self.reader.readuntil(b"\r\n")), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            elif b"content-length" in headers:
                body = await self.reader.readexactly(int(headers[b"content-length"]))
            else:
                body = await self.reader.read()
            return Plain(status, headers, body)

    async def ends(self) -> bool:
        """Wait for the end of the connection; whether nothing came before."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            try:
                return not await self.reader.read()
            except ConnectionError:
                return True

    async def close(self) -> None:
        """Close."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
