"""One HTTP/1 connection (RFC 9112): one call at a time, kept open between them."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import h11

from penstock_gateway.hotpath.http.exchange import Exchange
from penstock_gateway.hotpath.http.head import Head, MalformedHead
from penstock_gateway.hotpath.http.hpack import MAX_HEAD_BYTES
from penstock_gateway.hotpath.http.ports import ClientGone, Headers
from penstock_kit.errors import DeadlineExceeded, Reason, ResourceExhausted, Unimplemented

if TYPE_CHECKING:
    from penstock_gateway.hotpath.http.server import HttpServer

HEAD_SECONDS = 10.0
IDLE_SECONDS = 300.0
LINGER_SECONDS = 2.0
HIGH_WATER_BYTES = 256 * 1024
# Of calls that follow the open one, so much is read ahead.
_AHEAD_BYTES = 64 * 1024
_MAX_CACHED_HEAD = 2048
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


class Turn:
    """One call: `Responder` of a plan, or `Wire` of an exchange.

    Attributes:
        head: Of the request.
        exchange: Set if it is served as ASGI.
        work: What the plan's `run` returned; None before that.
        answered: Whether the whole answer was given.
        ended: Whether the whole request has come.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_room",
        "_started",
        "answered",
        "close_after",
        "ended",
        "exchange",
        "head",
        "unread",
        "work",
    )

    def __init__(self, connection: Http1Connection, head: Head, *, close_after: bool) -> None:
        self._connection = connection
        self.head = head
        self.close_after = close_after
        self.exchange: Exchange | None = None
        self.work: Any = None
        self.answered = self.ended = False
        self.unread = 0
        self._started = self._chunked = False
        self._room: asyncio.Future[None] | None = None

    # Responder

    def answer_message(self, payload: bytes) -> None:
        """Refuse: gRPC needs HTTP/2, and its calls are not given to plans here."""
        self.answer_grpc(())

    def answer_grpc(self, trailers: Headers, body: bytes = b"", headers: Headers = ()) -> None:
        """Refuse; see `answer_message`."""
        words = Unimplemented("gRPC needs HTTP/2.").message.encode()
        self.answer_http(426, [(b"content-type", b"text/plain"), (b"upgrade", b"h2c")], words)

    def answer_http(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer, with the length of the body."""
        if self.answered:
            return
        self.answered = True
        lines = [self._status_line(status)]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        lines.append(b"content-length: %d\r\n\r\n" % len(body))
        if self.head.method != "HEAD":
            lines.append(body)
        self._connection.write_parts(lines, len(body))
        self._connection.finish(self)

    # Wire

    def send_head(self, status: int, headers: Headers, *, end: bool) -> None:
        """Send the head of the answer."""
        if self.answered:
            return
        self._started = True
        known = [*headers]
        sized = any(name == b"content-length" for name, _ in known)
        empty = self.head.method == "HEAD" or status in (204, 304) or status < 200
        if not sized and not empty:
            if end:
                known.append((b"content-length", b"0"))
            elif self.head.version == "1.1":
                self._chunked = True
                known.append((b"transfer-encoding", b"chunked"))
            else:
                self.close_after = True
        lines = [self._status_line(status)]
        for name, value in known:
            lines += (name, b": ", value, b"\r\n")
        lines.append(b"\r\n")
        self._connection.write_parts(lines, 0)
        if end:
            self._end()

    def send_data(self, data: bytes, *, end: bool) -> None:
        """Send a part of the body."""
        if self.answered:
            return
        if data and self.head.method != "HEAD":
            if self._chunked:
                self._connection.write_parts([b"%x\r\n" % len(data), data, b"\r\n"], len(data))
            else:
                self._connection.write_parts([data], len(data))
        if end:
            if self._chunked:
                self._connection.write_parts([b"0\r\n\r\n"], 0)
            self._end()

    def send_trailers(self, headers: Headers) -> None:
        """End; HTTP/1's callers do not look for trailers."""
        self.send_data(b"", end=True)

    async def room(self) -> None:
        """Return when the caller reads.

        Raises:
            ClientGone: It never will.
        """
        while self._connection.paused:
            if self.exchange is None:
                raise ClientGone
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def taken(self, size: int) -> None:
        """Let the caller send more."""
        self.unread -= size
        self._connection.server.release(size)
        self._connection.listen()

    def abort(self) -> None:
        """End in the middle of the answer."""
        self._connection.abort()

    # The connection's side

    def _status_line(self, status: int) -> bytes:
        if not self.ended:
            self.close_after = True
        line = b"HTTP/1.1 %d %b\r\n%b" % (
            status,
            _PHRASES.get(status, b"Unknown"),
            self._connection.server.date,
        )
        if self.close_after:
            return line + b"connection: close\r\n"
        return line + b"connection: keep-alive\r\n" if self.head.version == "1.0" else line

    def _end(self) -> None:
        self.answered = True
        self._connection.finish(self)

    def wake(self) -> None:
        """Let the application look again whether there is room."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def close(self) -> None:
        """Let go of what is held for a call that is over."""
        if self.unread:
            self._connection.server.release(self.unread)
            self.unread = 0

    def gone(self) -> None:
        """Take notice that the caller went away."""
        self.answered = True
        self.close()
        exchange, self.exchange = self.exchange, None
        work, self.work = self.work, None
        if exchange is not None:
            exchange.leave()
        elif work is not None and self.head.plan is not None:
            self.head.plan.cancel(work)
        self.wake()


class Http1Connection(asyncio.Protocol):
    """The server's side of one connection.

    Args:
        server: It belongs to.

    Attributes:
        server: It belongs to.
        paused: Whether the peer does not read.
    """

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._turn: Turn | None = None
        # Of the body that comes: bytes that are missing, or the parser of chunks.
        self._missing = 0
        self._chunks: h11.Connection | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._out: list[bytes] = []
        self._out_large = False
        self.paused = False
        self._deaf = False
        self._eof = False
        self._closing = False
        self._linger_until = 0.0
        self._farewell = False
        self._since = self._loop.time()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self.server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the open call: nobody waits any more."""
        self._transport = None
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.gone()
        self._drop_parts()
        self.server.closed(self)

    def eof_received(self) -> bool:
        """The peer will send no more. An open call is one whose caller went away: nobody half-closes."""
        return False

    def pause_writing(self) -> None:
        """The peer does not read."""
        self.paused = True

    def resume_writing(self) -> None:
        """The peer reads again."""
        self.paused = False
        if self._turn is not None:
            self._turn.wake()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._closing:
            return
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        self._take(data)

    # Reading

    def _take(self, data: bytes) -> None:
        """Read heads and bodies; what follows the call that is being answered is kept."""
        while data:
            turn = self._turn
            if turn is None:
                before = len(data)
                data = self._begin(data)
                if len(data) == before:
                    break
            elif turn.ended:
                break
            else:
                data = self._body(turn, data)
            if self._closing:
                return
        self._buffer = data
        if len(data) > _AHEAD_BYTES and self._turn is not None and self._turn.ended:
            self._hush()

    def _begin(self, data: bytes) -> bytes:
        """Read a head; return what follows it, or all if it is not whole."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if data.startswith((b"\r", b"\n")):
                return self._begin(data.lstrip(b"\r\n")) if data.strip(b"\r\n") else b""
            if len(data) > MAX_HEAD_BYTES:
                self._refuse(431, f"The head has over {MAX_HEAD_BYTES} bytes.")
            return data
        end += 4
        raw = data[:end]
        known = self.server.heads.get(raw)
        if known is None:
            if end > MAX_HEAD_BYTES:
                self._refuse(431, f"The head has over {MAX_HEAD_BYTES} bytes.")
                return b""
            try:
                known = self._parse(raw)
            except (h11.RemoteProtocolError, MalformedHead) as error:
                self._refuse(getattr(error, "error_status_hint", 400), f"The request is malformed: {error}.")
                return b""
            if end <= _MAX_CACHED_HEAD:
                self.server.remember(raw, known)
        head, keep, chunked = known
        rest = data[end:]
        self._since = self._loop.time()
        turn = self._turn = Turn(self, head, close_after=not keep or self._farewell)
        if chunked:
            # h11 reads the head once more, to know how the body is framed.
            self._chunks = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
            self._chunks.receive_data(raw)
            self._chunks.next_event()
        self._missing = length = head.content_length or 0
        plan = head.plan
        if plan is None or chunked:
            exchange = turn.exchange = Exchange(turn, head)
            self.server.run(exchange)
            if not length and not chunked:
                turn.ended = True
                exchange.feed(b"", end=True)
        elif len(rest) >= length:
            turn.ended = True
            work = plan.run(turn, rest[:length])
            if not turn.answered:
                turn.work = work
            return rest[length:]
        if not rest and head.fields.get(b"expect", b"").lower() == b"100-continue":
            self.write_parts([_CONTINUE], 0)
        return rest

    def _parse(self, raw: bytes) -> tuple[Head, bool, bool]:
        """Return a head, whether the connection is kept after it, and whether its body comes in chunks."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        parser.receive_data(raw)
        request = parser.next_event()
        if not isinstance(request, h11.Request):
            raise MalformedHead("it is no request")
        headers = [(bytes(name), bytes(value)) for name, value in request.headers]
        target = bytes(request.target)
        if target.startswith((b"http://", b"https://")):
            target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
        version = request.http_version.decode()
        head = Head(bytes(request.method), target, headers, version)
        tokens = {
            token.strip().lower()
            for name, value in headers
            if name == b"connection"
            for token in value.split(b",")
        }
        keep = b"close" not in tokens and (version == "1.1" or b"keep-alive" in tokens)
        self.server.plan(head)
        return head, keep, b"transfer-encoding" in head.fields

    def _body(self, turn: Turn, data: bytes) -> bytes:
        """Take a part of a body; return what follows it."""
        rest = b""
        if self._chunks is not None:
            chunk, rest, done = self._unchunk(self._chunks, data)
            if chunk is None:
                return b""
        else:
            chunk = data[: self._missing] if len(data) > self._missing else data
            rest = data[len(chunk) :]
            self._missing -= len(chunk)
            done = not self._missing
        turn.ended = done
        if done:
            self._chunks = None
        if turn.exchange is not None:
            self._feed(turn, turn.exchange, chunk, done=done)
        elif not turn.answered and turn.head.plan is not None:
            self._collect(turn, chunk, done=done)
        return rest

    def _feed(self, turn: Turn, exchange: Exchange, chunk: bytes, *, done: bool) -> None:
        turn.unread += len(chunk)
        if not self.server.hold(len(chunk)):
            self._refuse(503, "The gateway holds as many bytes of unfinished requests as it may. Retry.")
            return
        exchange.feed(chunk, end=done)
        if turn.unread > HIGH_WATER_BYTES:
            self._hush()

    def _collect(self, turn: Turn, chunk: bytes, *, done: bool) -> None:
        """Put the body of a planned call together."""
        plan = turn.head.plan
        if plan is None:
            return
        self._parts.append(chunk)
        self._size += len(chunk)
        if not self.server.hold(len(chunk)):
            error = ResourceExhausted(
                "The gateway holds as many bytes of unfinished requests as it may. Retry.",
                reason=Reason.OVERLOADED,
                retry_after_seconds=1.0,
            )
            self._drop_parts()
            plan.refuse(turn, error)
        elif done:
            body = b"".join(self._parts)
            self._drop_parts()
            work = plan.run(turn, body)
            if not turn.answered:
                turn.work = work

    def _unchunk(self, parser: h11.Connection, data: bytes) -> tuple[bytes | None, bytes, bool]:
        """Return the data of chunks, what follows the last of them, and whether that has come."""
        parts: list[bytes] = []
        try:
            parser.receive_data(data)
            while True:
                event = parser.next_event()
                if isinstance(event, h11.Data):
                    parts.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    return b"".join(parts), parser.trailing_data[0], True
                else:
                    return b"".join(parts), b"", False
        except h11.RemoteProtocolError as error:
            self._refuse(400, f"The body is malformed: {error}.")
            return None, b"", False

    def _drop_parts(self) -> None:
        if self._size:
            self.server.release(self._size)
        self._parts = []
        self._size = 0

    def _hush(self) -> None:
        if not self._deaf and self._transport is not None:
            self._deaf = True
            self._transport.pause_reading()

    def listen(self) -> None:
        """Read again, if what was read has been taken."""
        turn = self._turn
        if self._deaf and self._transport is not None and (turn is None or turn.unread <= HIGH_WATER_BYTES):
            self._deaf = False
            self._transport.resume_reading()

    # Writing

    def write_parts(self, parts: list[bytes], size: int) -> None:
        """Write at the end of this tick; `size` is that of the largest part, if it may be large."""
        out = self._out
        if not out:
            self._loop.call_soon(self._flush)
        out += parts
        if size > HIGH_WATER_BYTES // 2:
            self._out_large = True

    def _flush(self) -> None:
        out, self._out = self._out, []
        transport = self._transport
        if transport is None or not out:
            return
        if self._out_large:
            self._out_large = False
            transport.writelines(out)
        else:
            transport.write(b"".join(out))
        if self._closing:
            self._end()

    def _end(self) -> None:
        """Close; where the peer may still be sending, first let it read why."""
        transport = self._transport
        if transport is None:
            return
        if self._linger_until and transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()

    # Ends

    def finish(self, turn: Turn) -> None:
        """Go on to the next call, or close."""
        if turn is not self._turn:
            return
        turn.close()
        self._since = self._loop.time()
        if turn.close_after or not turn.ended:
            self._closing = True
            self._turn = None
            if not turn.ended:
                self._linger()
            if not self._out:
                self._end()
            return
        self._turn = None
        self.listen()
        if self._buffer:
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._turn is None and not self._closing and self._buffer:
            data, self._buffer = self._buffer, b""
            self._take(data)

    def _refuse(self, status: int, words: str) -> None:
        """Answer what is no proper request, and close."""
        turn, self._turn = self._turn, None
        if turn is not None and not turn.answered:
            turn.gone()
        body = self.server.error_body(words)
        self.write_parts(
            [
                b"HTTP/1.1 %d %b\r\n%b" % (status, _PHRASES.get(status, b"Unknown"), self.server.date),
                b"connection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(body),
                body,
            ],
            0,
        )
        self._closing = True
        self._linger()

    def _linger(self) -> None:
        """Read on for a moment after the last answer: closed now, the socket would take it back."""
        self._linger_until = self._loop.time() + LINGER_SECONDS
        self.listen()

    def farewell(self) -> None:
        """Let each answer from now on be the connection's last."""
        self._farewell = True
        if self._turn is not None:
            self._turn.close_after = True

    def close(self) -> None:
        """End when the open call is answered."""
        self.farewell()
        if self._turn is None and self._transport is not None and not self._out:
            self._transport.close()

    def abort(self) -> None:
        """End now."""
        if self._transport is not None:
            self._transport.abort()

    def tick(self, now: float) -> None:
        """Look after time; called each quarter of a second."""
        turn = self._turn
        if self._linger_until:
            if now > self._linger_until:
                self.abort()
        elif turn is None:
            if not self._closing and now - self._since > (HEAD_SECONDS if self._buffer else IDLE_SECONDS):
                if self._buffer:
                    self._refuse(408, "The head of the request did not come in time.")
                elif self._transport is not None:
                    self._transport.close()
        elif turn.exchange is None and not turn.ended and not turn.answered:
            plan = turn.head.plan
            if plan is not None and now - self._since > plan.timeout:
                self._drop_parts()
                plan.refuse(turn, DeadlineExceeded("The deadline passed before the request had come whole."))
