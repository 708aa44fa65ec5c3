"""What connections of both versions of HTTP do alike: write, see who does not read, end.

The event loop (uvloop) keeps what is written while it hands out one round of events, and gives it to the
kernel in one call per connection at the end of that round. Nothing is gathered here again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

# Above this, buffers go to the kernel one by one (writev): joining them would copy too much.
JOIN_BYTES = 1 << 17
# A peer that leaves as much unread is not read either: each of its bytes may ask for an answer.
DEAF_BYTES = 1 << 22
# How long a connection that is over is still read from: closed at once, its socket would take back
# what the peer has not read yet.
LINGER_SECONDS = 2.0
# A socket that takes nothing for so long is given up.
STUCK_SECONDS = 60.0


class Carrier(asyncio.Protocol):
    """A connection.

    Attributes:
        paused: Whether the peer does not read.
        unsent: Bytes that wait for the peer, as of the last tick.
        moved: Time of the loop when the socket last took something of them.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self.paused = False
        self._deaf = False
        # The last bytes are being written; after them nothing may be.
        self._closing = False
        self._shut = False
        self._linger_until = 0.0
        self.unsent = 0
        self._in_socket = 0
        self.moved = self._loop.time()

    @property
    def now(self) -> float:
        """Time of the loop."""
        return self._loop.time()

    @property
    def settled(self) -> bool:
        """Whether it is over, and all that was written is on its way."""
        transport = self._transport
        return transport is None or (self._closing and transport.get_write_buffer_size() == 0)

    def write(self, data: bytes) -> None:
        """Write; what is written in one round of events leaves together."""
        transport = self._transport
        if transport is None or self._shut:
            return
        transport.write(data)
        if self.paused:
            self._look_at_backlog(transport)

    def write_parts(self, parts: Sequence[bytes | memoryview], size: int) -> None:
        """Write what belongs together; `size` is about its length."""
        transport = self._transport
        if transport is None or self._shut:
            return
        if size > JOIN_BYTES:
            transport.writelines(parts)
        else:
            transport.write(b"".join(parts))
        if self.paused:
            self._look_at_backlog(transport)

    def _look_at_backlog(self, transport: asyncio.Transport) -> None:
        if not self._deaf and not self._closing and transport.get_write_buffer_size() > DEAF_BYTES:
            self._hush()

    def _hush(self) -> None:
        """Read no more for now."""
        if not self._deaf and self._transport is not None:
            self._deaf = True
            self._transport.pause_reading()

    def _hear(self) -> None:
        """Read again."""
        if self._deaf and self._transport is not None:
            self._deaf = False
            self._transport.resume_reading()

    def _finish_writing(self) -> None:
        """End once what was written has left."""
        self._closing = True
        self._linger_until = self._loop.time() + LINGER_SECONDS
        self._shut_down()

    def _shut_down(self) -> None:
        """Tell the peer that nothing more comes, and read on until it knows."""
        transport = self._transport
        if transport is None or self._shut:
            return
        self._shut = True
        self._hear()
        try:
            if transport.can_write_eof():
                transport.write_eof()
            else:
                transport.close()
        except OSError:  # the peer is gone, and its end is on the way to us
            transport.abort()

    def abort(self) -> None:
        """End now."""
        if self._transport is not None:
            self._transport.abort()

    def _look_at_socket(self, now: float) -> None:
        """Measure what waits in the socket; give up a connection that is over, or takes nothing."""
        transport = self._transport
        if transport is None:
            return
        waiting = transport.get_write_buffer_size()
        if waiting != self._in_socket or not waiting:
            self._in_socket = waiting
            self.moved = now
        self.unsent = waiting
        still = now - self.moved
        if self._closing:
            # What has not left yet has a little longer, as long as it moves.
            spare = STUCK_SECONDS if waiting and still < LINGER_SECONDS else 0.0
            if now > self._linger_until + spare:
                transport.abort()
        elif still > STUCK_SECONDS:
            transport.abort()
