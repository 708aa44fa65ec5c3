"""The sending half of an HTTP/2 connection: windows, and the turns of those who wait for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock_gateway.hotpath.http import frames, hpack
from penstock_gateway.hotpath.http.carrier import Carrier

if TYPE_CHECKING:
    from penstock_gateway.hotpath.http.stream import Stream

# Larger frames save work; smaller ones let small calls pass between those of a large one.
FRAME_BYTES = 1 << 18


class Sending(Carrier):
    """What is sent on one connection.

    Attributes:
        window: Bytes that the peer takes now on the whole connection.
        frame_limit: Bytes of data in one frame at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window = frames.DEFAULT_WINDOW
        # What a new stream may send.
        self._stream_window = frames.DEFAULT_WINDOW
        self.frame_limit = frames.DEFAULT_FRAME_BYTES
        # Streams that could write if the connection could. Those whose own window is used up are not here.
        self._ready: dict[int, Stream] = {}
        self._roomless: dict[int, Stream] = {}
        self._table = True
        self._table_filled = False
        self._table_notice = b""

    # asyncio.Protocol

    def pause_writing(self) -> None:
        """The peer does not read."""
        self.paused = True

    def resume_writing(self) -> None:
        """The peer reads again."""
        self.paused = False
        self._hear()
        self._pump()
        waiting, self._roomless = self._roomless, {}
        for stream in waiting.values():
            stream.wake()

    # For streams

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

    def offer(self, stream: Stream) -> None:
        """Let a stream write what it keeps, in turn with the others that wait."""
        if stream.window > 0:
            self._ready[stream.id] = stream
            self._pump()

    def wait_for_room(self, stream: Stream) -> None:
        """Wake a stream when the peer reads again."""
        self._roomless[stream.id] = stream

    # Writing

    def _forget_table(self) -> None:
        """Use no table from now on, and say so with the next head: the peer keeps a smaller one."""
        if self._table:
            self._table = False
            self._table_notice = hpack.NO_TABLE

    def _pump(self) -> None:
        """Write kept data, a frame of each stream in turn, as far as the windows and the socket allow."""
        ready = self._ready
        while ready and self.window > 0 and not self.paused:
            number = next(iter(ready))
            stream = ready.pop(number)
            size = stream.pump(min(self.window, self.frame_limit))
            self.window -= size
            if stream.waiting and stream.window > 0:
                ready[number] = stream  # to the end of the row
