"""gRPC's message frames: five bytes (compressed or not, length) before each message.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import gzip
import zlib

from penstock_kit.errors import Internal, InvalidArgument, Reason, ResourceExhausted

ACCEPTED_ENCODINGS = ("identity", "gzip", "deflate")
# Compressing less costs more time than it saves.
MIN_COMPRESSED_BYTES = 1024
_PREFIX = 5
# Each copies all that is behind it.
_MAX_MEMBERS = 64


def too_large(size: int | str, limit: int) -> ResourceExhausted:
    """Return the error of a message over the limit."""
    return ResourceExhausted(
        f"The message has {size} bytes; this gateway takes at most {limit}. "
        "Send less at once, or have PENSTOCK_MAX_MESSAGE_BYTES raised.",
        reason=Reason.PAYLOAD_TOO_LARGE,
        metadata={"limit_bytes": str(limit)},
    )


def overfull() -> ResourceExhausted:
    """Return the error of a body that there is no memory for."""
    return ResourceExhausted(
        "The gateway holds as many bytes of unfinished requests as it may. Retry.",
        reason=Reason.OVERLOADED,
        retry_after_seconds=1.0,
    )


def inflate(data: bytes, encoding: str, limit: int) -> bytes:
    """Return the decompressed bytes of "gzip" or "deflate" (zlib or bare).

    Raises:
        ResourceExhausted: More than `limit` bytes would come out.
        InvalidArgument: The bytes are not of that encoding.
    """
    window = 16 + zlib.MAX_WBITS if encoding == "gzip" else zlib.MAX_WBITS
    if encoding == "deflate" and data[:1] and data[0] & 0x0F != 8:
        window = -zlib.MAX_WBITS  # some clients send deflate without zlib's wrapper
    parts: list[bytes] = []
    left = limit
    while True:
        decompressor = zlib.decompressobj(window)
        try:
            plain = decompressor.decompress(data, left + 1)
        except zlib.error as error:
            raise InvalidArgument(
                f"The body is announced as {encoding} but is not: {error}.", reason=Reason.MALFORMED_BODY
            ) from None
        if len(plain) > left:
            raise too_large("more", limit)
        if not decompressor.eof:
            raise InvalidArgument(f"The {encoding} body is cut short.", reason=Reason.MALFORMED_BODY)
        left -= len(plain)
        parts.append(plain)
        data = decompressor.unused_data
        if not data:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        # RFC 1952: a gzip file is a row of members, one for each block that the sender compressed.
        if encoding != "gzip" or len(parts) >= _MAX_MEMBERS:
            raise InvalidArgument(f"Bytes follow the {encoding} body.", reason=Reason.MALFORMED_BODY)


def deflate(data: bytes, encoding: str) -> bytes:
    """Return the bytes in "gzip" or "deflate" (zlib); quick rather than small."""
    return gzip.compress(data, 1, mtime=0) if encoding == "gzip" else zlib.compress(data, 1)


def frame(message: bytes, encoding: str = "") -> bytes:
    """Return a message in its frame, compressed if an encoding is given and it pays."""
    if encoding and len(message) >= MIN_COMPRESSED_BYTES:
        message = deflate(message, encoding)
        return b"\x01" + len(message).to_bytes(4, "big") + message
    return b"\x00" + len(message).to_bytes(4, "big") + message


class MessageReader:
    """Puts messages together from chunks that may end anywhere.

    Args:
        encoding: The request's grpc-encoding.
        limit: Bytes of one message at most, before and after decompression.
    """

    __slots__ = ("_buffer", "_encoding", "_limit")

    def __init__(self, encoding: str, limit: int) -> None:
        self._buffer = bytearray()
        self._encoding = encoding
        self._limit = limit

    @property
    def pending(self) -> bool:
        """Whether bytes of an unfinished message (or a further message) are held."""
        return bool(self._buffer)

    @property
    def held(self) -> int:
        """Bytes that are held."""
        return len(self._buffer)

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._buffer += chunk

    def next(self) -> bytes | None:
        """Return the next whole message, or None if it has not all come.

        Raises:
            ResourceExhausted: It is over the limit; told from its prefix, before it has come.
            InvalidArgument: It does not decompress.
            Internal: Its prefix is none of gRPC's, or it is compressed in a call that is not.
        """
        buffer = self._buffer
        if len(buffer) < _PREFIX:
            return None
        compressed = buffer[0]
        size = int.from_bytes(buffer[1:_PREFIX], "big")
        if size > self._limit:
            raise too_large(size, self._limit)
        end = _PREFIX + size
        if len(buffer) < end:
            return None
        message = bytes(memoryview(buffer)[_PREFIX:end])
        del buffer[:end]
        if compressed == 0:
            return message
        return self.decompress(compressed, message)

    def decompress(self, flag: int, message: bytes) -> bytes:
        """Return a compressed message as it was."""
        if flag != 1:
            raise Internal(f"The message's prefix begins with {flag}, which gRPC does not know.")
        if self._encoding not in ("gzip", "deflate"):
            # https://github.com/grpc/grpc/blob/master/doc/compression.md: this very status.
            raise Internal("The message says that it is compressed, but grpc-encoding does not say how.")
        return inflate(message, self._encoding, self._limit)
