"""Bodies of HTTP/1 that come in chunks (RFC 9112, section 7.1).

Read strictly: what one program takes for the end of a body and another does not is how requests are
smuggled past a proxy. Lines end with CR LF and nothing else, sizes are hexadecimal digits and nothing else.
"""

from __future__ import annotations

import re

# The size and extensions of one chunk, or one trailer.
MAX_LINE_BYTES = 1024
# Extensions and trailers carry nothing here, so that a body has no need of many.
MAX_IDLE_BYTES = 16_384
# 2^60 and more is no length.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")


class MalformedChunks(ValueError):
    """A body that breaks the rules."""


class ChunkReader:
    """Takes bytes as they come, gives the body in them.

    Attributes:
        done: Whether the body has ended.
    """

    __slots__ = ("_idle", "_left", "_line", "_trailing", "done")

    def __init__(self) -> None:
        # Of the open chunk: bytes of data, and two of the line's end behind it.
        self._left = 0
        self._line = b""
        self._trailing = False
        self._idle = 0
        self.done = False

    def read(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the part of the body that is in `data`, and what follows the body.

        Raises:
            MalformedChunks: It is no body in chunks.
        """
        parts: list[bytes] = []
        at, end = 0, len(data)
        while at < end and not self.done:
            if self._left > 2:
                part = data[at : at + self._left - 2]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
            elif self._left:
                if data[at] != b"\n\r"[self._left - 1]:
                    raise MalformedChunks("a chunk is longer than its size")
                at += 1
                self._left -= 1
            else:
                at = self._read_line(data, at)
        return (parts[0] if len(parts) == 1 else b"".join(parts)), data[at:]

    def _read_line(self, data: bytes, at: int) -> int:
        """Take a line, or what there is of it; return where it ends."""
        end = data.find(b"\n", at)
        stop = len(data) if end < 0 else end + 1
        line = self._line + data[at:stop]
        if len(line) > MAX_LINE_BYTES:
            raise MalformedChunks(f"a line has over {MAX_LINE_BYTES} bytes")
        if end < 0:
            self._line = line
            return stop
        self._line = b""
        if not line.endswith(b"\r\n"):
            raise MalformedChunks("a line does not end with CR LF")
        line = line[:-2]
        if self._trailing:
            if not line:
                self.done = True
                return stop
            if not _TRAILER.fullmatch(line):
                raise MalformedChunks("a trailer is malformed")
            self._count_idle(len(line) + 2)
            return stop
        match = _SIZE.fullmatch(line)
        if match is None:
            raise MalformedChunks("the size of a chunk is malformed")
        self._count_idle(len(line) - len(match[1]))
        size = int(match[1], 16)
        if size:
            self._left = size + 2
        else:
            self._trailing = True
        return stop

    def _count_idle(self, size: int) -> None:
        self._idle += size
        if self._idle > MAX_IDLE_BYTES:
            raise MalformedChunks(f"extensions and trailers have over {MAX_IDLE_BYTES} bytes")
