"""One HTTP/1 connection (RFC 9112): one call at a time, kept open between them."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, cast

import h11

from penstock_gateway.hotpath.http.carrier import Carrier
from penstock_gateway.hotpath.http.chunks import ChunkReader, MalformedChunks
from penstock_gateway.hotpath.http.exchange import Exchange
from penstock_gateway.hotpath.http.head import MAX_HEADERS, Head, MalformedHead, from_line
from penstock_gateway.hotpath.http.hpack import MAX_HEAD_BYTES
from penstock_gateway.hotpath.http.parts import Parts
from penstock_gateway.hotpath.http.turn import PHRASES, Turn
from penstock_gateway.hotpath.messages import overfull
from penstock_kit.errors import DeadlineExceeded, Reason

if TYPE_CHECKING:
    from penstock_gateway.hotpath.http.server import HttpServer

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
IDLE_SECONDS = 300.0
# Between two parts of a body, where it is not the application that does not read.
BODY_SECONDS = 60.0
HIGH_WATER_BYTES = 256 * 1024
# Of calls that follow the open one, so much is read ahead.
_AHEAD_BYTES = 64 * 1024
_MAX_CACHED_HEAD = 2048
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# CR or LF alone, a line that goes on in the next (RFC 9112, sections 2.2 and 5.2): where programs differ
# about what they mean, requests are smuggled.
_CROOKED = re.compile(rb"\r(?!\n)|(?<!\r)\n|\n[ \t]")
_TOO_LARGE = f"The head has over {MAX_HEAD_BYTES} bytes, or over {MAX_HEADERS} headers."


class Http1Connection(Carrier):
    """The server's side of one connection.

    Args:
        server: It belongs to.

    Attributes:
        server: It belongs to.
        turn: The call that is open.
    """

    def __init__(self, server: HttpServer) -> None:
        super().__init__()
        self.server = server
        self._buffer = b""
        self.turn: Turn | None = None
        # Of the body that comes: bytes that are missing, or the parser of chunks.
        self._missing = 0
        self._chunks: ChunkReader | None = None
        self._parts = Parts()
        self._size = 0
        # Whether the caller said that the open call is its last.
        self._last = False
        self._farewell = False
        # Of the head or body that comes, or of the last answer: when it began, when its last bytes came.
        self._since = self._heard = self._loop.time()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self.server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the open call: nobody waits any more."""
        self._transport = None
        self._drop_turn()
        self._buffer = b""
        self.server.closed(self)

    def eof_received(self) -> bool:
        """The peer will send no more; return whether it is still answered.

        Whether it only shut down its sending side, or closed the whole, cannot be seen. It is taken to
        have gone away, so that its call is stopped, unless it said before that it sends no more.
        """
        turn = self.turn
        return turn is not None and turn.ended and self._last and not self._closing

    def pause_writing(self) -> None:
        """The peer does not read."""
        self.paused = True

    def resume_writing(self) -> None:
        """The peer reads again."""
        self.paused = False
        if self.turn is not None:
            self.turn.wake()
        self.listen()
        self._go_on()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._closing:
            return
        self._heard = self._loop.time()
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        elif self.turn is None:
            self._since = self._heard
        try:
            self._take(data)
        except Exception:
            log.exception("an HTTP/1 connection failed")
            self.abort()

    # Reading

    def _take(self, data: bytes) -> None:
        """Read heads and bodies; what follows the call that is being answered is kept."""
        while data:
            turn = self.turn
            if turn is None:
                if self.paused:
                    break  # the answers before are not read yet
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
        if len(data) > _AHEAD_BYTES and (self.paused or self.turn is not None):
            self._hush()

    def _go_on(self) -> None:
        """Read what was kept."""
        if self.turn is None and not self._closing and not self.paused and self._buffer:
            data, self._buffer = self._buffer, b""
            self._since = self._loop.time()
            self._take(data)

    def _begin(self, data: bytes) -> bytes:
        """Read a head; return what follows it, or all if it is not whole."""
        if data[0] < 14:  # CR or LF, which some callers send behind a body
            data = data.lstrip(b"\r\n")
            if not data:
                return b""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD_BYTES:
                self.refuse(431, _TOO_LARGE)
            return data
        end += 4
        raw = data[:end]
        known = self.server.heads.get(raw)
        if known is None:
            known = self._read(raw)
            if known is None:
                return b""
        head, keep, chunked = known
        rest = data[end:]
        self._since = self._heard
        self._last = not keep
        turn = self.turn = Turn(self, head, close_after=not keep or self._farewell)
        if chunked:
            self._chunks = ChunkReader()
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
        if head.expects and not rest and not turn.ended:
            self.write(_CONTINUE)
        return rest

    def _read(self, raw: bytes) -> tuple[Head, bool, bool] | None:
        """Read a head that did not come before; None if it is refused."""
        if len(raw) > MAX_HEAD_BYTES or raw.count(b"\n") > MAX_HEADERS + 2:
            self.refuse(431, _TOO_LARGE)
            return None
        try:
            known = self._parse(raw)
        except (h11.RemoteProtocolError, MalformedHead) as error:
            status = getattr(error, "error_status_hint", 400)
            self.refuse(status, f"The request is malformed: {error}.")
            return None
        if not known[0].version.startswith("1."):
            self.refuse(505, "Only HTTP/1.0, HTTP/1.1 and HTTP/2 are known here.", Reason.UNSUPPORTED)
            return None
        if len(raw) <= _MAX_CACHED_HEAD:
            self.server.remember(raw, known)
        return known

    def _parse(self, raw: bytes) -> tuple[Head, bool, bool]:
        """Return a head, whether the connection is kept after it, and whether its body comes in chunks."""
        if _CROOKED.search(raw):
            raise MalformedHead("a line does not end with CR LF, or goes on in the next")
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        parser.receive_data(raw)
        request = parser.next_event()
        if not isinstance(request, h11.Request):
            raise MalformedHead("it is no request")
        headers = [(bytes(name), bytes(value)) for name, value in request.headers]
        version = request.http_version.decode()
        if version > "1.1" and version.startswith("1."):
            version = "1.1"
        head = from_line(bytes(request.method), bytes(request.target), headers, version)
        chunked = b"transfer-encoding" in head.fields
        if chunked and (head.content_length is not None or version == "1.0"):
            raise MalformedHead("how long the body is, is said twice, or in words of another version")
        tokens = {
            token.strip().lower()
            for name, value in headers
            if name == b"connection"
            for token in value.split(b",")
        }
        keep = b"close" not in tokens and (version == "1.1" or b"keep-alive" in tokens)
        self.server.plan(head)
        return head, keep, chunked

    def _body(self, turn: Turn, data: bytes) -> bytes:
        """Take a part of a body; return what follows it."""
        if self._chunks is not None:
            try:
                chunk, rest = self._chunks.read(data)
            except MalformedChunks as error:
                self.refuse(400, f"The body is malformed: {error}.")
                return b""
            done = self._chunks.done
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
            self.refuse(503, overfull().message, Reason.OVERLOADED)
            return
        exchange.feed(chunk, end=done)
        if turn.unread > HIGH_WATER_BYTES:
            self._hush()

    def _collect(self, turn: Turn, chunk: bytes, *, done: bool) -> None:
        """Put the body of a planned call together."""
        plan = turn.head.plan
        if plan is None:
            return
        self._parts.add(chunk)
        self._size += len(chunk)
        if not self.server.hold(len(chunk)):
            self._drop_parts()
            plan.refuse(turn, overfull())
        elif done:
            body = self._parts.join()
            self._drop_parts()
            work = plan.run(turn, body)
            if not turn.answered:
                turn.work = work

    def _drop_parts(self) -> None:
        if self._size:
            self.server.release(self._size)
            self._size = 0
            self._parts = Parts()

    def _drop_turn(self) -> None:
        turn, self.turn = self.turn, None
        self._chunks = None
        self._drop_parts()
        if turn is not None:
            turn.gone()

    def listen(self) -> None:
        """Read again, if what was read has been taken."""
        turn = self.turn
        if self._deaf and (turn is None or turn.unread <= HIGH_WATER_BYTES):
            self._hear()

    # Ends

    def finish(self, turn: Turn) -> None:
        """Go on to the next call, or close."""
        if turn is not self.turn:
            return
        turn.close()
        # They know the turn as well: a ring would wait for the collector.
        turn.exchange = turn.work = None
        self.turn = None
        self._since = self._loop.time()
        if turn.close_after or not turn.ended:
            self._drop_parts()
            self._finish_writing()
            return
        if not self.paused:
            self.listen()
            if self._buffer:
                self._loop.call_soon(self._go_on)

    def refuse(self, status: int, words: str, reason: Reason = Reason.MALFORMED_BODY) -> None:
        """Answer what is no proper request, or cannot be served, and close."""
        if self._closing:
            return
        started = self.turn is not None and self.turn.started
        self._drop_turn()
        if started:
            self.abort()  # another answer would be taken for a part of the first
            return
        body = self.server.error_body(words, reason)
        self.write_parts(
            [
                b"HTTP/1.1 %d %b\r\n%b" % (status, PHRASES.get(status, b"Unknown"), self.server.date),
                b"connection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(body),
                body,
            ],
            0,
        )
        self._finish_writing()

    def farewell(self) -> None:
        """Let each answer from now on be the connection's last."""
        self._farewell = True
        if self.turn is not None:
            self.turn.close_after = True

    def close(self) -> None:
        """End when the open call is answered."""
        self.farewell()
        if self.turn is None and self._transport is not None and not self._closing:
            self._closing = True
            self._linger_until = self._loop.time()
            self._transport.close()

    @property
    def idle_since(self) -> float | None:
        """Time of the loop when the last answer ended; None if a call is open, or begins."""
        return None if self.turn is not None or self._buffer or self._closing else self._since

    def tick(self, now: float) -> None:
        """Look after time; called each quarter of a second."""
        self._look_at_socket(now)
        turn = self.turn
        if self._closing:
            return
        if turn is None:
            if self._buffer and not self.paused:
                if now - self._since > HEAD_SECONDS:
                    self.refuse(
                        408, "The head of the request did not come in time.", Reason.DEADLINE_EXCEEDED
                    )
            elif now - self._since > IDLE_SECONDS:
                self.close()
        elif turn.ended or turn.answered:
            return
        elif turn.exchange is None:
            plan = turn.head.plan
            if plan is not None and now - self._since > plan.timeout:
                self._drop_parts()
                plan.refuse(turn, DeadlineExceeded("The deadline passed before the request had come whole."))
        elif not self._deaf and now - self._heard > BODY_SECONDS:
            self.refuse(408, "The rest of the request's body did not come.", Reason.DEADLINE_EXCEEDED)
