"""What the frames of an HTTP/2 connection say about the connection: settings, windows, resets, pings."""

from __future__ import annotations

import struct

from penstock_gateway.hotpath.http import frames, hpack
from penstock_gateway.hotpath.http.sending import FRAME_BYTES, Sending
from penstock_gateway.hotpath.http.stream import Stream

MAX_STREAMS = 4096
# Frames that cost the caller nothing, each second: pings, settings, resets, empty data and the like.
MAX_CHEAP_FRAMES = 4000
# A change of all windows costs as much as one cheap frame for each so many streams.
STREAMS_PER_CHEAP_FRAME = 64
# An answer that waits for credit goes on when so much has come: else each few bytes that a caller took
# would come back as a frame that is hardly more than its header (RFC 9113, section 10.5).
WORTHWHILE_BYTES = 1024
# RFC 9113 knows six; extensions a few more.
MAX_SETTINGS = 32
# Calls that ended here before their caller's last frame: what still comes for them is no fault.
_MAX_DISMISSED = 2 * MAX_STREAMS
# A caller that was answered before it had sent all may go on for so long, and send so much: some read
# no answer before, and others take a reset for a failure of the call.
SPARE_SECONDS = 2.0
SPARE_BYTES = 1 << 26
SPARE_CREDIT_BYTES = 1 << 18
_MASK = frames.STREAM_MASK


class ConnectionFault(Exception):
    """The peer broke the protocol in a way that ends the connection."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Spared:
    """A caller that was answered and may still send.

    Attributes:
        until: Time of the loop.
        left: Bytes that it may be allowed.
        came: Bytes that came since it was last allowed more.
    """

    __slots__ = ("came", "left", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.left = SPARE_BYTES
        self.came = 0


class Control(Sending):
    """The streams of a connection, and what its peer says about them beside heads and bodies."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[int, Stream] = {}
        self._dismissed: dict[int, None] = {}
        # The highest stream that `_dismissed` had to forget.
        self._forgotten = 0
        # Of those that ended before, the ones that may go on.
        self._spared: dict[int, Spared] = {}
        # The highest stream that the peer opened.
        self._last = 0
        self._greeted = False
        # Frames without use, less those that a peer may send in the time that passed.
        self._cheap = 0
        self._farewell = False

    # Frames

    def _window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE is malformed")
        credit = int.from_bytes(payload, "big") & _MASK
        if not number:
            self.window += credit
            if not credit or self.window > frames.MAX_WINDOW:
                code = frames.FLOW_CONTROL_ERROR if credit else frames.PROTOCOL_ERROR
                raise ConnectionFault(code, "the connection's window is wrong")
            if self._ready:
                first = next(iter(self._ready.values()))
                if self.window >= min(first.pending_bytes, WORTHWHILE_BYTES):
                    self._pump()
            return
        stream = self._streams.get(number)
        if stream is None:
            if self._idle(number):
                raise ConnectionFault(frames.PROTOCOL_ERROR, f"stream {number} is not open")
            return
        stream.window += credit
        if not credit or stream.window > frames.MAX_WINDOW:
            code = frames.FLOW_CONTROL_ERROR if credit else frames.PROTOCOL_ERROR
            self._refuse(number, code, ended=stream.ended)
        elif stream.waiting:
            if stream.window >= min(stream.pending_bytes, WORTHWHILE_BYTES):
                self.offer(stream)
            elif self._stream_window < 2 * WORTHWHILE_BYTES:
                self._cheap += 1
                self.offer(stream)  # its windows are never much larger

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "SETTINGS belong to no stream")
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "SETTINGS is malformed")
        self._cheap += 1
        if flags & frames.ACK:
            return
        if len(payload) > 6 * MAX_SETTINGS:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many settings at once")
        self._greeted = True
        window = self._stream_window
        for key, value in struct.iter_unpack(">HI", payload):
            if key == frames.INITIAL_WINDOW_SIZE:
                if value > frames.MAX_WINDOW:
                    raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "the initial window is too large")
                window = value
            elif key == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_BYTES <= value <= frames.LARGEST_FRAME_BYTES:
                    raise ConnectionFault(frames.PROTOCOL_ERROR, "the frame size is not allowed")
                self.frame_limit = min(value, FRAME_BYTES)
            elif key == frames.ENABLE_PUSH and value > 1:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "ENABLE_PUSH is no yes or no")
            elif key == frames.HEADER_TABLE_SIZE and value < hpack.TABLE_BYTES:
                self._forget_table()
        self.write(frames.frame(frames.SETTINGS, frames.ACK, 0))
        if window != self._stream_window:
            self._set_stream_window(window)

    def _set_stream_window(self, window: int) -> None:
        """Change the windows of all streams, which may become negative (RFC 9113, section 6.9.2)."""
        change = window - self._stream_window
        self._stream_window = window
        self._cheap += len(self._streams) // STREAMS_PER_CHEAP_FRAME
        for stream in self._streams.values():
            stream.window += change
            if stream.window > frames.MAX_WINDOW:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "a window grows too large")
            if stream.window <= 0:
                self._ready.pop(stream.id, None)
            elif stream.waiting:
                self._ready[stream.id] = stream
        self._pump()

    def _reset_by_peer(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "RST_STREAM is malformed")
        if self._idle(number):
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"stream {number} is not open")
        self._cheap += 1
        self._dismissed.pop(number, None)
        self._spared.pop(number, None)
        self._drop(number)
        self._maybe_close()

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "PING belongs to no stream")
        if len(payload) != 8:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "PING is malformed")
        self._cheap += 1
        if not flags & frames.ACK:
            self.write(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _priority(self, number: int, payload: bytes) -> None:
        self._cheap += 1
        if not number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "PRIORITY belongs to a stream")
        if len(payload) != 5:
            if self._idle(number):
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "PRIORITY is malformed")
            stream = self._streams.get(number)
            self._refuse(number, frames.FRAME_SIZE_ERROR, ended=stream is None or stream.ended)

    def _goaway(self, number: int, payload: bytes) -> None:
        """The peer takes no pushes, of which there are none; it goes on with its own calls."""
        if number:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "GOAWAY belongs to no stream")
        if len(payload) < 8:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "GOAWAY is malformed")
        self._cheap += 1

    # Streams

    def _idle(self, number: int) -> bool:
        """Return whether no call was ever begun with a number."""
        return number > self._last or not number % 2

    def _stray(self, number: int, length: int = 0, *, ends: bool) -> None:
        """Look at a frame for a call that is over. It is no fault if its caller may not know that yet."""
        if self._idle(number):
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"stream {number} is not open")
        if number in self._dismissed:
            if ends:
                del self._dismissed[number]
                self._spared.pop(number, None)
            elif length and number in self._spared:
                self._let_go_on(number, self._spared[number], length)
        elif number > self._forgotten:
            raise ConnectionFault(frames.STREAM_CLOSED, f"stream {number} is closed")

    def _spare(self, number: int) -> None:
        """Let a caller that was answered send the rest of its body, as long as that is not long."""
        self._dismiss(number)
        self._spared[number] = Spared(self.now + SPARE_SECONDS)

    def _let_go_on(self, number: int, spared: Spared, length: int) -> None:
        spared.came += length
        if spared.came >= SPARE_CREDIT_BYTES and spared.left >= spared.came:
            self.write(frames.window_update(number, spared.came))
            spared.left -= spared.came
            spared.came = 0

    def _end_spared(self, now: float) -> None:
        """Tell those that went on for too long that nobody needs it (RFC 9113, section 8.1)."""
        for number in [number for number, spared in self._spared.items() if now > spared.until]:
            del self._spared[number]
            self.write(frames.reset(number, frames.NO_ERROR))

    def _dismiss(self, number: int) -> None:
        """Remember that a call ended before its caller's last frame."""
        dismissed = self._dismissed
        if len(dismissed) >= _MAX_DISMISSED:
            oldest = next(iter(dismissed))
            del dismissed[oldest]
            self._spared.pop(oldest, None)
            self._forgotten = max(self._forgotten, oldest)
        dismissed[number] = None

    def reset(self, stream: Stream, code: int) -> None:
        """End a call with an error of the protocol."""
        if stream.id in self._streams:
            self._refuse(stream.id, code, ended=stream.ended)

    def _refuse(self, number: int, code: int, *, ended: bool) -> None:
        """Reset a stream; `ended` if nothing more of its caller can come."""
        self.write(frames.reset(number, code))
        if not ended:
            self._dismiss(number)
        self._drop(number)
        self._maybe_close()
        self._cheap += 1

    def _drop(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            self._ready.pop(number, None)
            self._roomless.pop(number, None)
            stream.gone()

    def _maybe_close(self) -> None:
        if self._farewell and not self._streams and not self._closing:
            self._finish_writing()
