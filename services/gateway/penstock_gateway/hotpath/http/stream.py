"""One call on an HTTP/2 connection."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from penstock_gateway.hotpath.http import frames, hpack
from penstock_gateway.hotpath.http.exchange import Exchange
from penstock_gateway.hotpath.http.head import Head
from penstock_gateway.hotpath.http.parts import Parts
from penstock_gateway.hotpath.http.ports import ClientGone, Headers

if TYPE_CHECKING:
    from penstock_gateway.hotpath.http.http2 import Http2Connection

# What an answer may have waiting for its caller before the application is made to wait.
HIGH_WATER_BYTES = 256 * 1024
_GRPC_TYPE = (b"content-type", hpack.GRPC_TYPE)
_PACK = frames.HEADER.pack


class Stream:
    """A stream: `Responder` of a plan, or `Wire` of an exchange.

    Attributes:
        id: Its number.
        head: Of the request.
        started: Time of the loop at which the head came.
        exchange: Set if it is served as ASGI; None again when it is answered.
        work: What the plan's `run` returned; None before that, and when it is answered.
        parts: Of a body for a plan that has not all come; None before it came.
        held: Bytes of the body that are kept here.
        ended: Whether the whole request has come.
        answered: Whether the whole answer was given to us; its end may still wait for the caller's window.
        window: Bytes that the caller takes now on this stream.
        allowed: Bytes that the caller may still send on this stream.
        credit: Bytes that came since the caller was last allowed more.
        pending_bytes: Of the answer, waiting for the caller's window.
        moved: Time of the loop when the caller last took something of them.
        fed: Bytes of the body that went to the exchange.
    """

    __slots__ = (
        "_bodiless",
        "_connection",
        "_end",
        "_pending",
        "_room",
        "_tail",
        "allowed",
        "answered",
        "credit",
        "ended",
        "exchange",
        "fed",
        "head",
        "held",
        "id",
        "moved",
        "parts",
        "pending_bytes",
        "started",
        "window",
        "work",
    )

    def __init__(
        self,
        connection: Http2Connection,
        number: int,
        head: Head,
        *,
        window: int,
        allowed: int,
        started: float,
        ended: bool,
    ) -> None:
        self._connection = connection
        self.id = number
        self.head = head
        self.started = self.moved = started
        self.window = window
        self.allowed = allowed
        self.ended = ended
        self.answered = self._end = self._bodiless = False
        self.exchange: Exchange | None = None
        self.work: Any = None
        self.parts: Parts | None = None
        self.held = self.fed = self.credit = self.pending_bytes = 0
        self._pending: deque[memoryview] | None = None
        self._tail = b""
        self._room: asyncio.Future[None] | None = None

    # Responder

    def answer_message(self, payload: bytes) -> None:
        """Answer with one gRPC message and OK."""
        if self.answered:
            return
        connection = self._connection
        size = len(payload) + 5
        number = self.id
        if (
            size > connection.window
            or size > self.window
            or size > connection.frame_limit
            or connection.paused
        ):
            body = b"\x00" + (size - 5).to_bytes(4, "big") + payload
            self._answer(hpack.GRPC_HEAD, body, hpack.GRPC_OK)
            return
        self.answered = True
        connection.window -= size
        head, ok = connection.grpc_blocks()
        connection.write_parts(
            (
                _PACK(0, len(head), frames.HEADERS, frames.END_HEADERS, number),
                head,
                _PACK(size >> 8, size & 0xFF, frames.DATA, 0, number),
                b"\x00",
                (size - 5).to_bytes(4, "big"),
                payload,
                _PACK(0, len(ok), frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, number),
                ok,
            ),
            size,
        )
        connection.finish(self)

    def answer_grpc(self, trailers: Headers, body: bytes = b"", headers: Headers = ()) -> None:
        """Answer a gRPC call; without a body as trailers only."""
        head = hpack.status(200) + hpack.block([_GRPC_TYPE, *headers])
        if body:
            self._answer(head, body, hpack.block(trailers))
        else:
            self._answer(head + hpack.block(trailers), b"", b"")

    def answer_http(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer an HTTP request."""
        length = (b"content-length", b"%d" % len(body))
        block = hpack.status(status) + hpack.block([*headers, length])
        self._answer(block, b"" if self.head.method == "HEAD" else body, b"")

    def _answer(self, block: bytes, body: bytes, tail: bytes) -> None:
        if self.answered:
            return
        self.answered = self._end = True
        if self.held:
            self.close()  # of a body that was refused
        self._connection.write_block(self.id, block, end=not body and not tail)
        if body:
            self._tail = tail
            self._keep(body)
            return
        if tail:
            self._connection.write_block(self.id, tail, end=True)
        self._connection.finish(self)

    # Wire

    def send_head(self, status: int, headers: Headers, *, end: bool) -> None:
        """Send the head of the answer."""
        if self.answered:
            return
        self._connection.write_block(self.id, hpack.status(status) + hpack.block(headers), end=end)
        self._bodiless = self.head.method == "HEAD" or status in (204, 304)
        if end:
            self.answered = self._end = True
            self._connection.finish(self)

    def send_data(self, data: bytes, *, end: bool) -> None:
        """Send a part of the body, as far as the caller takes it now; keep the rest."""
        if self.answered:
            return
        self.answered = self._end = end
        if data and not self._bodiless:
            self._keep(data)
        elif end and not self._pending:
            self._connection.write(frames.frame(frames.DATA, frames.END_STREAM, self.id))
            self._connection.finish(self)

    def send_trailers(self, headers: Headers) -> None:
        """Send trailers behind what is kept."""
        if self.answered:
            return
        self.answered = self._end = True
        self._tail = hpack.block(headers)
        if not self._pending:
            self._connection.write_block(self.id, self._tail, end=True)
            self._connection.finish(self)

    async def room(self) -> None:
        """Return when the caller has taken most of what was sent.

        Raises:
            ClientGone: It never will.
        """
        while self.pending_bytes > HIGH_WATER_BYTES or self._connection.paused:
            if self.exchange is None:
                raise ClientGone
            self._room = asyncio.get_running_loop().create_future()
            if self._connection.paused:
                self._connection.wait_for_room(self)
            await self._room

    def taken(self, size: int) -> None:
        """Let the caller send as much more as was read."""
        self.held -= size
        self._connection.server.release(size)
        self.refill(size)

    def abort(self) -> None:
        """End the call in the middle of its answer."""
        self._connection.reset(self, frames.INTERNAL_ERROR)

    # The connection's side

    def refill(self, size: int) -> None:
        """Count bytes that need no more room; now and then, allow the caller as many more."""
        self.credit += size
        if not self.ended and self.credit >= self._connection.refill_bytes:
            self._connection.write(frames.window_update(self.id, self.credit))
            self.allowed += self.credit
            self.credit = 0

    def _keep(self, data: bytes) -> None:
        pending = self._pending
        if pending is None:
            pending = self._pending = deque()
        if not pending:
            self.moved = self._connection.now
        pending.append(memoryview(data))
        self.pending_bytes += len(data)
        self._connection.offer(self)

    def pump(self, limit: int) -> int:
        """Write one frame of at most `limit` bytes of what is kept; return its length, 0 if none can go."""
        pending = self._pending
        size = min(limit, self.window)
        if not pending or size <= 0:
            return 0
        first = pending[0]
        if size < len(first):
            data = [first[:size]]
            pending[0] = first[size:]
        else:
            data = [pending.popleft()]
            left = size - len(first)
            while pending and left:
                more = pending.popleft()
                if left < len(more):
                    pending.appendleft(more[left:])
                    more = more[:left]
                data.append(more)
                left -= len(more)
            size -= left
        self.pending_bytes -= size
        self.window -= size
        connection = self._connection
        self.moved = connection.now
        last = self._end and not pending
        flags = frames.END_STREAM if last and not self._tail else 0
        connection.write_parts([_PACK(size >> 8, size & 0xFF, frames.DATA, flags, self.id), *data], size)
        if last:
            if self._tail:
                connection.write_block(self.id, self._tail, end=True)
            connection.finish(self)
        elif self._room is not None and self.pending_bytes <= HIGH_WATER_BYTES:
            self.wake()
        return size

    @property
    def waiting(self) -> bool:
        """Whether a part of the answer is kept for the caller."""
        return bool(self._pending)

    def wake(self) -> None:
        """Let the application look again whether there is room."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def close(self) -> None:
        """Let go of what is held for a call that is over."""
        if self.held:
            self._connection.server.release(self.held)
            self.held = 0
        self.parts = None
        if self._pending is not None:
            self._pending.clear()
            self.pending_bytes = 0

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
