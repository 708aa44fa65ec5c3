"""One HTTP/2 connection (RFC 9113), as far as a server needs it: no pushes, no priorities."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from penstock_gateway.hotpath.http import frames, hpack
from penstock_gateway.hotpath.http.control import (
    MAX_CHEAP_FRAMES,
    MAX_SETTINGS,
    MAX_STREAMS,
    ConnectionFault,
    Control,
)
from penstock_gateway.hotpath.http.exchange import Exchange
from penstock_gateway.hotpath.http.head import Head, MalformedHead
from penstock_gateway.hotpath.http.parts import Parts
from penstock_gateway.hotpath.http.sending import FRAME_BYTES
from penstock_gateway.hotpath.http.stream import Stream
from penstock_gateway.hotpath.messages import overfull, too_large
from penstock_kit.errors import DeadlineExceeded

if TYPE_CHECKING:
    from penstock_gateway.hotpath.http.server import HttpServer

log = logging.getLogger(__name__)

# What a caller may send on a stream before it is read, and between two permissions to go on.
STREAM_WINDOW = 1 << 20
# Bodies are bounded by streams and by what the server holds in all, so that this need not be small.
CONNECTION_WINDOW = 1 << 26
HEAD_SECONDS = 10.0
# A connection without a sign of life for so long is asked for one, and then given up.
QUIET_SECONDS = 60.0
PATIENCE_SECONDS = 20.0
# A caller that takes nothing of its answer for so long is given up.
STALLED_SECONDS = 300.0
_NOBODY = -1
_PING = b"penstock"
_HEADER = frames.HEADER
_MASK = frames.STREAM_MASK


class Http2Connection(Control):
    """The server's side of one connection, after the client's preface.

    Args:
        server: It belongs to.

    Attributes:
        server: It belongs to.
        refill_bytes: After as many bytes of a stream, its caller is allowed more.
    """

    def __init__(self, server: HttpServer) -> None:
        super().__init__()
        self.server = server
        self._reader = hpack.HeadReader(server.plan)
        self._heads = self._reader.heads
        # Calls that the application works on, whether their callers still wait or not.
        self._working = 0
        # The beginning of a frame whose rest has not come.
        self._rest = b""
        # What is left of a frame that is passed on as it comes: bytes, stream, whether it ends.
        self._left = 0
        self._left_stream = _NOBODY
        self._left_ends = False
        # A head in several frames: stream, whether the request ends with it, its parts.
        self._open_head: tuple[int, bool, bytearray] | None = None
        self._head_since = 0.0
        self.refill_bytes = STREAM_WINDOW // 2
        self._received = 0
        self._began = self._heard = self._loop.time()
        self._asked = 0.0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast("asyncio.Transport", transport)
        self.server.opened(self)
        self.write(
            frames.settings(
                (frames.MAX_CONCURRENT_STREAMS, MAX_STREAMS),
                (frames.INITIAL_WINDOW_SIZE, STREAM_WINDOW),
                (frames.MAX_FRAME_SIZE, FRAME_BYTES),
                (frames.MAX_HEADER_LIST_SIZE, hpack.MAX_HEAD_BYTES),
            )
            + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """End all calls: nobody waits any more."""
        self._transport = None
        streams, self._streams = self._streams, {}
        self._ready.clear()
        self._roomless.clear()
        for stream in streams.values():
            stream.gone()
        self.server.closed(self)

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        self._heard = self._loop.time()
        if self._closing:
            return
        try:
            self._take(data)
            if self._cheap > MAX_CHEAP_FRAMES:
                raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many frames without use")
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        except hpack.BadCompression as error:
            self._fail(frames.COMPRESSION_ERROR, str(error))
        except hpack.HeadTooLarge:
            self._fail(frames.ENHANCE_YOUR_CALM, f"a head has over {hpack.MAX_HEAD_BYTES} bytes")
        except Exception:
            log.exception("an HTTP/2 connection failed")
            self._fail(frames.INTERNAL_ERROR, "an error of the server's")

    # Reading

    def _take(self, data: bytes) -> None:
        """Split bytes into frames. The two kinds that every call has are taken here, without detours."""
        at = 0
        end = len(data)
        if self._left:
            at = min(self._left, end)
            self._left -= at
            if self._left_stream != _NOBODY:
                chunk = data if at == end else data[:at]
                self._data(self._left_stream, chunk, at, ends=self._left_ends and not self._left)
        elif self._rest:
            data = self._rest + data
            self._rest = b""
            end = len(data)
        unpack = _HEADER.unpack_from
        heads = self._heads
        while end - at >= 9:
            high, low, kind, flags, number = unpack(data, at)
            number &= _MASK
            start = at + 9
            stop = start + (high << 8 | low)
            if stop > end:
                if self._open_frame(kind, flags, number, stop - start, data[start:end]):
                    return
                break
            at = stop
            if self._open_head is not None and kind != frames.CONTINUATION:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "a head is interrupted")
            if kind == 1 and flags & 0x2C == 4:  # HEADERS, whole, without padding and priority
                block = data[start:stop]
                head = heads.get(block)
                if head is None or number <= self._last:
                    self._head(number, block, ends=bool(flags & 1))
                else:
                    self._open(number, head, ends=bool(flags & 1))
            elif kind == 0 and not flags & frames.PADDED:
                self._data(number, data[start:stop], stop - start, ends=bool(flags & 1))
            else:
                self._other(kind, flags, number, data[start:stop])
        if at < end:
            self._rest = data[at:] if at else data

    def _open_frame(self, kind: int, flags: int, number: int, length: int, came: bytes) -> bool:
        """Look at a frame that has not all come; return whether what came of it is taken.

        Data is passed on as it comes, so that a large frame is not put together again and again. What is
        not known is thrown away as it comes. Of all else no more is kept than a proper frame needs.
        """
        if length > FRAME_BYTES:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, f"a frame has {length} bytes")
        if self._open_head is not None and kind != frames.CONTINUATION:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a head is interrupted")
        if kind in (frames.HEADERS, frames.CONTINUATION) and length > hpack.MAX_HEAD_BYTES:
            raise hpack.HeadTooLarge
        if kind == frames.SETTINGS and length > 6 * MAX_SETTINGS:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many settings at once")
        if kind > frames.CONTINUATION or kind == frames.GOAWAY:
            self._left = length - len(came)
            self._left_stream = _NOBODY
            self._other(kind, flags, number, bytes(min(length, 8)))
            return True
        if kind != frames.DATA or flags & frames.PADDED or not came:
            return False
        self._left = length - len(came)
        self._left_stream = number
        self._left_ends = bool(flags & frames.END_STREAM)
        self._data(number, came, len(came), ends=False)
        return True

    def _head(self, number: int, block: bytes, *, ends: bool) -> None:
        """Take a head that was not seen before, or trailers."""
        if not self._greeted or not number % 2:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a head comes before settings, or on a wrong stream")
        if number > self._last:
            try:
                head = self._heads.get(block) or self._reader.head(block)
            except MalformedHead:
                self._last = number
                self._refuse(number, frames.PROTOCOL_ERROR, ended=ends)
                return
            self._open(number, head, ends=ends)
            return
        stream = self._streams.get(number)
        if stream is None:
            self._stray(number, ends=ends)
        try:
            self._reader.trailers(block)
        except MalformedHead:
            if stream is not None:
                self._refuse(number, frames.PROTOCOL_ERROR, ended=ends)
            return
        if stream is None:
            return
        if stream.ended or not ends:
            code = frames.STREAM_CLOSED if stream.ended else frames.PROTOCOL_ERROR
            self._refuse(number, code, ended=ends)
            return
        self._body(stream, b"", ends=True)

    def _open(self, number: int, head: Head, *, ends: bool) -> None:
        """Begin a call."""
        if not self._greeted or not number % 2:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a head comes before settings, or on a wrong stream")
        self._last = number
        if len(self._streams) >= MAX_STREAMS or self._working >= MAX_STREAMS or self._farewell:
            self._refuse(number, frames.REFUSED_STREAM, ended=ends)
            return
        stream = Stream(
            self,
            number,
            head,
            window=self._stream_window,
            allowed=STREAM_WINDOW,
            started=self._heard,
            ended=ends,
        )
        self._streams[number] = stream
        if ends:
            if head.plan is not None:
                self._run(stream, b"")
                return
            if head.content_length:
                self._refuse(number, frames.PROTOCOL_ERROR, ended=True)
                return
        elif head.expects:
            self.write_block(number, hpack.status(100), end=False)
        if head.plan is None:
            exchange = stream.exchange = Exchange(stream, head)
            if ends:
                exchange.feed(b"", end=True)
            self._working += 1
            self.server.run(exchange, self._worked)

    def _worked(self, _: asyncio.Task[None]) -> None:
        self._working -= 1

    def _data(self, number: int, chunk: bytes, length: int, *, ends: bool) -> None:
        """Take data; `length` is what it counts against the windows, padding included."""
        self._received += length
        if self._received >= CONNECTION_WINDOW // 2:
            self.write(frames.window_update(0, self._received))
            self._received = 0
        stream = self._streams.get(number)
        if stream is None:
            self._stray(number, length, ends=ends)
            return
        if stream.ended:
            self._refuse(number, frames.STREAM_CLOSED, ended=True)
            return
        if not chunk and not ends:
            self._cheap += 1
        stream.allowed -= length
        if stream.allowed < 0:
            self._refuse(number, frames.FLOW_CONTROL_ERROR, ended=ends)
            return
        if length > len(chunk):
            stream.refill(length - len(chunk))
        self._body(stream, chunk, ends=ends)

    def _body(self, stream: Stream, chunk: bytes, *, ends: bool) -> None:
        """Take a part of a body."""
        stream.ended = ends
        plan = stream.head.plan
        if stream.answered:
            return  # the rest is not needed
        size = len(chunk)
        if plan is None:
            self._feed(stream, chunk, ends=ends)
            return
        if stream.parts is None:
            if ends:
                self._run(stream, chunk)
                return
            stream.parts = Parts()
        stream.parts.add(chunk)
        stream.held += size
        if not self.server.hold(size):
            self._overfull(stream)
        elif stream.held > plan.limit:
            plan.refuse(stream, too_large(stream.held, plan.limit))
        elif ends:
            body = stream.parts.join()
            stream.close()
            self._run(stream, body)
        else:
            stream.refill(size)

    def _feed(self, stream: Stream, chunk: bytes, *, ends: bool) -> None:
        """Take a part of a body for the application."""
        size = len(chunk)
        stream.fed += size
        announced = stream.head.content_length
        if announced is not None and (stream.fed > announced or (ends and stream.fed < announced)):
            self._refuse(stream.id, frames.PROTOCOL_ERROR, ended=ends)
            return
        stream.held += size
        if not self.server.hold(size):
            self._overfull(stream)
        elif stream.exchange is not None:
            stream.exchange.feed(chunk, end=ends)

    def _run(self, stream: Stream, body: bytes) -> None:
        plan = stream.head.plan
        if plan is None:
            return
        announced = stream.head.content_length
        if announced is not None and announced != len(body):
            self._refuse(stream.id, frames.PROTOCOL_ERROR, ended=True)
            return
        if len(body) > plan.limit:
            plan.refuse(stream, too_large(len(body), plan.limit))
            return
        work = plan.run(stream, body)
        if not stream.answered:
            stream.work = work

    def _overfull(self, stream: Stream) -> None:
        """Refuse a body that there is no memory for."""
        plan = stream.head.plan
        if plan is None:
            # gRPC's clients take this code for RESOURCE_EXHAUSTED.
            self._refuse(stream.id, frames.ENHANCE_YOUR_CALM, ended=stream.ended)
            return
        plan.refuse(stream, overfull())

    def _other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Take a frame that not every call has."""
        if not self._greeted and (kind != frames.SETTINGS or flags & frames.ACK):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if kind == frames.WINDOW_UPDATE:
            self._window_update(number, payload)
        elif kind == frames.DATA:
            self._padded_data(flags, number, payload)
        elif kind == frames.HEADERS:
            self._other_head(flags, number, payload)
        elif kind == frames.CONTINUATION:
            self._continuation(flags, number, payload)
        elif kind == frames.SETTINGS:
            self._settings(flags, number, payload)
        elif kind == frames.RST_STREAM:
            self._reset_by_peer(number, payload)
        elif kind == frames.PING:
            self._ping(flags, number, payload)
        elif kind == frames.PRIORITY:
            self._priority(number, payload)
        elif kind == frames.GOAWAY:
            self._goaway(number, payload)
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a client pushes")
        else:
            self._cheap += 1  # of an extension that we do not know

    def _padded_data(self, flags: int, number: int, payload: bytes) -> None:
        padding = payload[0] if payload else 0
        if not payload or padding >= len(payload):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "padding is longer than its frame")
        chunk = payload[1 : len(payload) - padding]
        if not chunk:
            self._cheap += 1
        self._data(number, chunk, len(payload), ends=bool(flags & frames.END_STREAM))

    def _other_head(self, flags: int, number: int, payload: bytes) -> None:
        start, stop = 0, len(payload)
        if flags & frames.PADDED:
            start = 1
            stop -= payload[0] if payload else 1
        if flags & frames.HAS_PRIORITY:
            start += 5
        if start > stop or not number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "HEADERS is malformed")
        ends = bool(flags & frames.END_STREAM)
        block = payload[start:stop]
        if flags & frames.END_HEADERS:
            self._head(number, block, ends=ends)
        else:
            self._open_head = (number, ends, bytearray(block))
            self._head_since = self._heard

    def _continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._open_head is None or self._open_head[0] != number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "CONTINUATION continues nothing")
        _, ends, block = self._open_head
        block += payload
        if len(block) > hpack.MAX_HEAD_BYTES:
            raise hpack.HeadTooLarge
        if not payload:
            self._cheap += 1
        if flags & frames.END_HEADERS:
            self._open_head = None
            self._head(number, bytes(block), ends=ends)

    # Ends

    def finish(self, stream: Stream) -> None:
        """Forget a call whose whole answer is written."""
        self._streams.pop(stream.id, None)
        # They know the stream as well: a ring would wait for the collector.
        stream.exchange = stream.work = None
        if not stream.ended:
            if stream.head.fields.get(b"content-type", b"").startswith(hpack.GRPC_TYPE):
                # The caller need not send the rest (RFC 9113, section 8.1), as all of gRPC's know.
                self.write(frames.reset(stream.id, frames.NO_ERROR))
                self._dismiss(stream.id)
            else:
                self._spare(stream.id)
        if stream.held:
            stream.close()
        if self._farewell:
            self._maybe_close()

    def farewell(self) -> None:
        """Ask the peer to open no more calls here; those that it opens before it knows are served."""
        if not self._closing:
            self.write(frames.goaway(_MASK, frames.NO_ERROR))

    def close(self) -> None:
        """Take no more calls; end when those that are open are answered."""
        if self._farewell or self._closing:
            return
        self._farewell = True
        self.write(frames.goaway(self._last, frames.NO_ERROR))
        self._maybe_close()

    def _fail(self, code: int, why: str) -> None:
        if self._closing:
            return
        self.server.blame(why)
        self.write(frames.goaway(self._last, code, why.encode()[:128]))
        self._finish_writing()
        self._rest = b""
        self._open_head = None
        self._ready.clear()
        self._roomless.clear()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.gone()

    @property
    def idle_since(self) -> float | None:
        """Time of the loop when it last heard of its peer; None if a call is open."""
        return None if self._streams or self._closing else self._heard

    def tick(self, now: float) -> None:
        """Look after time; called each quarter of a second."""
        self._cheap = max(0, self._cheap - MAX_CHEAP_FRAMES // 4)
        self._look_at_socket(now)
        if self._closing:
            return
        if self._spared:
            self._end_spared(now)
        if self._open_head is not None and now - self._head_since > HEAD_SECONDS:
            self._fail(frames.ENHANCE_YOUR_CALM, "a head did not end in time")
        elif not self._greeted and now - self._began > HEAD_SECONDS:
            self.abort()
        elif now - self._heard > QUIET_SECONDS:
            if not self._asked or self._asked < self._heard:
                self._asked = now
                self.write(frames.frame(frames.PING, 0, 0, _PING))
            elif now - self._asked > PATIENCE_SECONDS:
                self.abort()
        for stream in list(self._streams.values()):
            self._look_at(stream, now)

    def _look_at(self, stream: Stream, now: float) -> None:
        plan = stream.head.plan
        if stream.waiting:
            self.unsent += stream.pending_bytes
            if now - stream.moved > STALLED_SECONDS:
                self._refuse(stream.id, frames.CANCEL, ended=stream.ended)
        elif (
            plan is not None
            and not stream.ended
            and not stream.answered
            and now - stream.started > plan.timeout
        ):
            plan.refuse(stream, DeadlineExceeded("The deadline passed before the request had come whole."))
