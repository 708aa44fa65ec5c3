"""One HTTP/2 connection (RFC 9113), as far as a server needs it: no pushes, no priorities."""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import TYPE_CHECKING, cast

from penstock_gateway.hotpath.http import frames, hpack
from penstock_gateway.hotpath.http.exchange import Exchange
from penstock_gateway.hotpath.http.head import Head, MalformedHead
from penstock_gateway.hotpath.http.stream import Stream
from penstock_gateway.hotpath.messages import too_large
from penstock_kit.errors import DeadlineExceeded, Reason, ResourceExhausted

if TYPE_CHECKING:
    from penstock_gateway.hotpath.http.server import HttpServer

log = logging.getLogger(__name__)

MAX_STREAMS = 4096
# What a caller may send on a stream before it is read, and between two permissions to go on.
STREAM_WINDOW = 1 << 20
# Bodies are bounded by streams and by what the server holds in all, so that this need not be small.
CONNECTION_WINDOW = 1 << 26
# Larger frames save work; smaller ones let small calls pass between those of a large one.
FRAME_BYTES = 1 << 18
# Frames that cost the caller nothing, each second: pings, settings, resets, empty data and the like.
MAX_CHEAP_FRAMES = 4000
HEAD_SECONDS = 10.0
# A connection without a sign of life for so long is asked for one, and then given up.
QUIET_SECONDS = 60.0
PATIENCE_SECONDS = 20.0
# Above this, buffers go to the kernel one by one (writev): joining them would copy too much.
JOIN_BYTES = 1 << 17
# A peer that leaves as much unread is not read either: each of its frames may ask for an answer.
DEAF_BYTES = 1 << 22
_PING = b"penstock"
_HEADER = frames.HEADER
_MASK = frames.STREAM_MASK


class ConnectionFault(Exception):
    """The peer broke the protocol in a way that ends the connection."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Http2Connection(asyncio.Protocol):
    """The server's side of one connection, after the client's preface.

    Args:
        server: It belongs to.

    Attributes:
        server: It belongs to.
        window: Bytes that the peer takes now on the whole connection.
        frame_limit: Bytes of data in one frame at most.
        refill_bytes: After as many bytes of a stream, its caller is allowed more.
        paused: Whether the peer does not read.
    """

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = hpack.HeadReader(server.plan)
        self._heads = self._reader.heads
        self._streams: dict[int, Stream] = {}
        self._last = 0
        self._greeted = False
        # The beginning of a frame whose rest has not come.
        self._rest = b""
        # What is left of a frame of data that is passed on as it comes: bytes, stream, whether it ends.
        self._left = 0
        self._left_stream = 0
        self._left_ends = False
        # A head in several frames: stream, whether the request ends with it, its parts.
        self._open_head: tuple[int, bool, bytearray] | None = None
        self._head_since = 0.0
        self.window = frames.DEFAULT_WINDOW
        self._stream_window = frames.DEFAULT_WINDOW
        self.frame_limit = frames.DEFAULT_FRAME_BYTES
        self.refill_bytes = STREAM_WINDOW // 2
        self._received = 0
        self._out: list[bytes | memoryview] = []
        self._out_large = False
        self._blocked: dict[int, Stream] = {}
        self._roomless: list[Stream] = []
        self.paused = False
        self._deaf = False
        self._table = True
        self._table_filled = False
        self._table_notice = b""
        self._cheap = 0
        self._heard = self._loop.time()
        self._asked = 0.0
        self._farewell = False
        self._closing = False

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
        for stream in streams.values():
            stream.gone()
        self.server.closed(self)

    def pause_writing(self) -> None:
        """The peer does not read."""
        self.paused = True

    def resume_writing(self) -> None:
        """The peer reads again."""
        self.paused = False
        if self._deaf and self._transport is not None:
            self._deaf = False
            self._transport.resume_reading()
        self._pump()
        self._wake()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        self._heard = self._loop.time()
        if self._closing:
            return
        try:
            self._take(data)
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        except hpack.BadCompression as error:
            self._fail(frames.COMPRESSION_ERROR, str(error))
        except hpack.HeadTooLarge:
            self._fail(frames.ENHANCE_YOUR_CALM, f"a head has over {hpack.MAX_HEAD_BYTES} bytes")

    # Reading

    def _take(self, data: bytes) -> None:
        """Split bytes into frames. The two kinds that every call has are taken here, without detours."""
        at = 0
        end = len(data)
        if self._left:
            at = min(self._left, end)
            self._left -= at
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
            start = at + 9
            stop = start + (high << 8 | low)
            if stop > end:
                if self._open_frame(kind, flags, number & _MASK, stop - start, data[start:end]):
                    return
                break
            at = stop
            if self._open_head is not None and kind != frames.CONTINUATION:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "a head is interrupted")
            if kind == 1 and flags & 0x2C == 4:  # HEADERS, whole, without padding and priority
                block = data[start:stop]
                head = heads.get(block)
                if head is None or number <= self._last:
                    self._head(number & _MASK, block, ends=bool(flags & 1))
                else:
                    self._open(number & _MASK, head, ends=bool(flags & 1))
            elif kind == 0 and not flags & frames.PADDED:
                self._data(number & _MASK, data[start:stop], stop - start, ends=bool(flags & 1))
            else:
                self._other(kind, flags, number & _MASK, data[start:stop])
        if at < end:
            self._rest = data[at:] if at else data

    def _open_frame(self, kind: int, flags: int, number: int, length: int, came: bytes) -> bool:
        """Look at a frame that has not all come; return whether what came of it is taken.

        Data is passed on as it comes, so that a large frame is not put together again and again.
        """
        if length > FRAME_BYTES:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, f"a frame has {length} bytes")
        if kind != frames.DATA or flags & frames.PADDED or not came or self._open_head is not None:
            return False
        self._left = length - len(came)
        self._left_stream = number
        self._left_ends = bool(flags & frames.END_STREAM)
        self._data(number, came, len(came), ends=False)
        return True

    def _head(self, number: int, block: bytes, *, ends: bool) -> None:
        """Take a head that was not seen before, or trailers."""
        if number % 2 == 0:
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"stream {number} is not a client's to open")
        try:
            if number > self._last:
                head = self._heads.get(block) or self._reader.head(block)
                self._open(number, head, ends=ends)
                return
            self._reader.trailers(block)
        except MalformedHead:
            self._last = max(self._last, number)
            self._refuse(number, frames.PROTOCOL_ERROR)
            return
        stream = self._streams.get(number)
        if stream is None:
            return  # answered meanwhile
        if stream.ended or not ends:
            self._refuse(number, frames.STREAM_CLOSED if stream.ended else frames.PROTOCOL_ERROR)
            return
        self._body(stream, b"", ends=True)

    def _open(self, number: int, head: Head, *, ends: bool) -> None:
        """Begin a call."""
        if not self._greeted or number % 2 == 0:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a head comes before settings, or on a wrong stream")
        self._last = number
        if len(self._streams) >= MAX_STREAMS or self._farewell:
            self.write(frames.reset(number, frames.REFUSED_STREAM))
            self._count_cheap()
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
        if head.plan is None:
            exchange = stream.exchange = Exchange(stream, head)
            if ends:
                exchange.feed(b"", end=True)
            self.server.run(exchange)
        elif ends:
            self._run(stream, b"")

    def _data(self, number: int, chunk: bytes, length: int, *, ends: bool) -> None:
        """Take data; `length` is what it counts against the windows, padding included."""
        self._received += length
        if self._received >= CONNECTION_WINDOW // 2:
            self.write(frames.window_update(0, self._received))
            self._received = 0
        stream = self._streams.get(number)
        if stream is None:
            if number > self._last or not number:
                raise ConnectionFault(frames.PROTOCOL_ERROR, f"stream {number} is not open")
            return  # answered or reset meanwhile
        if stream.ended:
            self._refuse(number, frames.STREAM_CLOSED)
            return
        if not length and not ends:
            self._count_cheap()
        stream.allowed -= length
        if stream.allowed < 0:
            self._refuse(number, frames.FLOW_CONTROL_ERROR)
            return
        if length > len(chunk):
            stream.refill(length - len(chunk))
        self._body(stream, chunk, ends=ends)

    def _body(self, stream: Stream, chunk: bytes, *, ends: bool) -> None:
        """Take a part of a body."""
        stream.ended = ends
        plan = stream.head.plan
        if plan is not None:
            if ends and stream.parts is None:
                self._run(stream, chunk)
                return
            if stream.answered:
                return  # refused; the rest is not needed
            if stream.parts is None:
                stream.parts = []
            stream.parts.append(chunk)
        size = len(chunk)
        stream.held += size
        if not self.server.hold(size):
            self._overfull(stream)
            return
        if plan is None:
            if stream.exchange is not None:
                stream.exchange.feed(chunk, end=ends)
        elif stream.held > plan.limit:
            plan.refuse(stream, too_large(stream.held, plan.limit))
        elif ends:
            body = b"".join(stream.parts or ())
            stream.close()
            self._run(stream, body)
        else:
            stream.refill(size)

    def _run(self, stream: Stream, body: bytes) -> None:
        plan = stream.head.plan
        if plan is None:
            return
        announced = stream.head.content_length
        if announced is not None and announced != len(body):
            self._refuse(stream.id, frames.PROTOCOL_ERROR)
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
            self._refuse(stream.id, frames.ENHANCE_YOUR_CALM)
            return
        plan.refuse(
            stream,
            ResourceExhausted(
                "The gateway holds as many bytes of unfinished requests as it may. Retry.",
                reason=Reason.OVERLOADED,
                retry_after_seconds=1.0,
            ),
        )

    def _other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Take a frame that not every call has."""
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
        elif kind == frames.GOAWAY:
            if number or len(payload) < 8:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "GOAWAY is malformed")
        elif kind == frames.PRIORITY:
            self._count_cheap()
            if not number or len(payload) != 5:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "PRIORITY is malformed")
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a client pushes")
        else:
            self._count_cheap()  # of an extension that we do not know

    def _padded_data(self, flags: int, number: int, payload: bytes) -> None:
        padding = payload[0] if payload else 0
        if not payload or padding >= len(payload):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "padding is longer than its frame")
        chunk = payload[1 : len(payload) - padding]
        if not chunk:
            self._count_cheap()
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
            self._count_cheap()
        if flags & frames.END_HEADERS:
            self._open_head = None
            self._head(number, bytes(block), ends=ends)

    def _window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE is malformed")
        credit = int.from_bytes(payload, "big") & _MASK
        if not number:
            self.window += credit
            if not credit or self.window > frames.MAX_WINDOW:
                code = frames.FLOW_CONTROL_ERROR if credit else frames.PROTOCOL_ERROR
                raise ConnectionFault(code, "the connection's window is wrong")
        else:
            stream = self._streams.get(number)
            if stream is None:
                if number > self._last:
                    raise ConnectionFault(frames.PROTOCOL_ERROR, f"stream {number} is not open")
                return
            stream.window += credit
            if not credit or stream.window > frames.MAX_WINDOW:
                self._refuse(number, frames.FLOW_CONTROL_ERROR if credit else frames.PROTOCOL_ERROR)
                return
        if self._blocked:
            self._pump()
            self._wake()

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) % 6 or (flags & frames.ACK and payload):
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "SETTINGS is malformed")
        if flags & frames.ACK:
            return
        self._greeted = True
        self._count_cheap()
        for key, value in struct.iter_unpack(">HI", payload):
            if key == frames.INITIAL_WINDOW_SIZE:
                if value > frames.MAX_WINDOW:
                    raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "the initial window is too large")
                for stream in self._streams.values():
                    stream.window += value - self._stream_window
                    if stream.window > frames.MAX_WINDOW:
                        raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "a window grows too large")
                self._stream_window = value
            elif key == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_BYTES <= value <= frames.LARGEST_FRAME_BYTES:
                    raise ConnectionFault(frames.PROTOCOL_ERROR, "the frame size is not allowed")
                self.frame_limit = min(value, FRAME_BYTES)
            elif key == frames.ENABLE_PUSH and value > 1:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "ENABLE_PUSH is no yes or no")
            elif key == frames.HEADER_TABLE_SIZE and value < hpack.TABLE_BYTES and self._table:
                self._table = False
                self._table_notice = hpack.NO_TABLE
        self.write(frames.frame(frames.SETTINGS, frames.ACK, 0))
        if self._blocked:
            self._pump()
            self._wake()

    def _reset_by_peer(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "RST_STREAM is malformed")
        if not number or number > self._last:
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"stream {number} is not open")
        self._count_cheap()
        stream = self._streams.pop(number, None)
        if stream is not None:
            self._blocked.pop(number, None)
            stream.gone()
            self._maybe_close()

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) != 8:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "PING is malformed")
        if not flags & frames.ACK:
            self._count_cheap()
            self.write(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _count_cheap(self) -> None:
        self._cheap += 1
        if self._cheap > MAX_CHEAP_FRAMES:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many frames without use")

    # Writing

    def write(self, data: bytes) -> None:
        """Write at the end of this tick."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def write_parts(self, parts: tuple[bytes | memoryview, ...], size: int) -> None:
        """Write what belongs together at the end of this tick; `size` is about its length."""
        out = self._out
        if not out:
            self._loop.call_soon(self._flush)
        out += parts
        if size > JOIN_BYTES:
            self._out_large = True

    def write_block(self, number: int, block: bytes, *, end: bool) -> None:
        """Write a head or trailers, in several frames if one does not hold them."""
        if self._table_notice:
            block, self._table_notice = self._table_notice + block, b""
        kind, flags = frames.HEADERS, frames.END_STREAM if end else 0
        limit = self.frame_limit
        while len(block) > limit:
            self.write(frames.frame(kind, flags, number, block[:limit]))
            block = block[limit:]
            kind, flags = frames.CONTINUATION, 0
        self.write(frames.frame(kind, flags | frames.END_HEADERS, number, block))

    def grpc_blocks(self) -> tuple[bytes, bytes]:
        """Return head and trailers of an answer that is OK, which must be the next that are written."""
        if not self._table:
            notice, self._table_notice = self._table_notice, b""
            return notice + hpack.GRPC_HEAD, hpack.GRPC_OK
        if self._table_filled:
            return hpack.GRPC_NEXT_HEAD, hpack.GRPC_NEXT_OK
        self._table_filled = True
        return hpack.GRPC_FIRST_HEAD, hpack.GRPC_FIRST_OK

    def _flush(self) -> None:
        out = self._out
        self._out = []
        transport = self._transport
        if transport is None or not out:
            return
        if self._out_large:
            self._out_large = False
            transport.writelines(out)
        else:
            transport.write(b"".join(out))
        if self.paused and not self._deaf and transport.get_write_buffer_size() > DEAF_BYTES:
            self._deaf = True
            transport.pause_reading()
        if self._closing and not self._streams:
            transport.close()

    def offer(self, stream: Stream) -> None:
        """Let a stream write what it keeps, in turn with the others that wait."""
        self._blocked[stream.id] = stream
        self._pump()

    def _pump(self) -> None:
        """Write kept data, a frame of each stream in turn, as far as the windows and the socket allow."""
        blocked = self._blocked
        idle = written = 0
        while blocked and idle < len(blocked) and not self.paused:
            number, stream = next(iter(blocked.items()))
            del blocked[number]
            size = stream.pump(min(self.window, self.frame_limit))
            if stream.waiting:
                blocked[number] = stream  # to the end of the row
            if size < 0:
                idle += 1
            else:
                idle = 0
                self.window -= size
                written += size
                if written > JOIN_BYTES:
                    written = 0
                    self._flush()  # so that the socket can say that it is full

    def wait_for_room(self, stream: Stream) -> None:
        """Wake a stream when the peer has taken something."""
        self._roomless.append(stream)

    def _wake(self) -> None:
        waiting, self._roomless = self._roomless, []
        for stream in waiting:
            stream.wake()

    # Ends

    def finish(self, stream: Stream) -> None:
        """Forget a call whose whole answer is written."""
        self._streams.pop(stream.id, None)
        if not stream.ended:
            # The caller need not send the rest (RFC 9113, section 8.1).
            self.write(frames.reset(stream.id, frames.NO_ERROR))
        if stream.held:
            stream.close()
        if self._farewell:
            self._maybe_close()

    def reset(self, stream: Stream, code: int) -> None:
        """End a call with an error of the protocol."""
        self._refuse(stream.id, code)

    def _refuse(self, number: int, code: int) -> None:
        self.write(frames.reset(number, code))
        self._count_cheap()
        stream = self._streams.pop(number, None)
        if stream is not None:
            self._blocked.pop(number, None)
            stream.gone()

    def farewell(self) -> None:
        """Ask the peer to open no more calls here; those that it opens before it knows are served."""
        self.write(frames.goaway(_MASK, frames.NO_ERROR))

    def close(self) -> None:
        """Take no more calls; end when those that are open are answered."""
        if self._farewell:
            return
        self._farewell = True
        self.write(frames.goaway(self._last, frames.NO_ERROR))
        self._maybe_close()

    def _maybe_close(self) -> None:
        if self._farewell and not self._streams:
            self._closing = True
            if self._transport is not None and not self._out:  # else the flush that is due closes it
                self._transport.close()

    def abort(self) -> None:
        """End now."""
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, code: int, why: str) -> None:
        log.warning("an HTTP/2 connection is ended: %s", why, extra={"code": code})
        self._closing = True
        self.write(frames.goaway(self._last, code, why.encode()[:128]))
        streams, self._streams = self._streams, {}
        self._blocked.clear()
        for stream in streams.values():
            stream.gone()

    def tick(self, now: float) -> None:
        """Look after time; called each quarter of a second."""
        self._cheap = max(0, self._cheap - MAX_CHEAP_FRAMES // 4)
        if self._open_head is not None and now - self._head_since > HEAD_SECONDS:
            self._fail(frames.ENHANCE_YOUR_CALM, "a head did not end in time")
        elif not self._greeted and now - self._heard > HEAD_SECONDS:
            self.abort()
        elif now - self._heard > QUIET_SECONDS:
            if not self._asked or self._asked < self._heard:
                self._asked = now
                self.write(frames.frame(frames.PING, 0, 0, _PING))
            elif now - self._asked > PATIENCE_SECONDS:
                self.abort()
        for stream in list(self._streams.values()):
            plan = stream.head.plan
            if (
                plan is not None
                and not stream.ended
                and not stream.answered
                and now - stream.started > plan.timeout
            ):
                plan.refuse(
                    stream, DeadlineExceeded("The deadline passed before the request had come whole.")
                )
