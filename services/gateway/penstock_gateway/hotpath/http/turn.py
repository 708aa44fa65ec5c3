"""One call on an HTTP/1 connection."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from penstock_gateway.hotpath.http.exchange import Exchange
from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.ports import ClientGone, Headers
from penstock_kit.errors import Reason, Unimplemented

if TYPE_CHECKING:
    from penstock_gateway.hotpath.http.http1 import Http1Connection

PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


class Turn:
    """One call: `Responder` of a plan, or `Wire` of an exchange.

    Attributes:
        head: Of the request.
        exchange: Set if it is served as ASGI; None again when it is answered.
        work: What the plan's `run` returned; None before that, and when it is answered.
        answered: Whether the whole answer was given.
        ended: Whether the whole request has come.
        started: Whether the head of the answer was written.
        unread: Bytes of the body that the application has not read.
        close_after: Whether the connection ends with this call.
    """

    __slots__ = (
        "_bodiless",
        "_chunked",
        "_connection",
        "_due",
        "_room",
        "answered",
        "close_after",
        "ended",
        "exchange",
        "head",
        "started",
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
        self.started = self._chunked = self._bodiless = False
        # Bytes of the answer that its announced length still asks for.
        self._due: int | None = None
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
        self.answered = self.started = True
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
        self.started = True
        known = [*headers]
        length = next((value for name, value in known if name == b"content-length"), None)
        self._bodiless = self.head.method == "HEAD" or status in (204, 304) or status < 200
        if self._bodiless:
            pass
        elif length is not None:
            self._due = int(length)
        elif end:
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
        if data and not self._bodiless:
            if self._due is not None:
                self._due -= len(data)
            if self._chunked:
                self._connection.write_parts([b"%x\r\n" % len(data), data, b"\r\n"], len(data))
            else:
                self._connection.write_parts([data], len(data))
        if end:
            if self._chunked:
                self._connection.write_parts([b"0\r\n\r\n"], 0)
            if self._due:
                self.close_after = True  # not as long as announced: what follows would be taken for it
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
        """End in the middle of the answer; if it has not begun, say that there is none."""
        if self._connection.turn is not self:
            return
        if self.started:
            self._connection.abort()
        else:
            self._connection.refuse(500, "Internal error. Look into the gateway's log.", Reason.INTERNAL)

    # The connection's side

    def _status_line(self, status: int) -> bytes:
        if not self.ended:
            self.close_after = True
        line = b"HTTP/1.1 %d %b\r\n%b" % (
            status,
            PHRASES.get(status, b"Unknown"),
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
