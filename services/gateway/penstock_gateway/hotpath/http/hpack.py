"""HTTP/2's header compression (RFC 7541), arranged for callers who send the same head again and again."""

from __future__ import annotations

from collections.abc import Callable

from hpack import Decoder, HPACKError, OversizedHeaderListError

from penstock_gateway.hotpath.http.head import Head, check_trailers, from_fields
from penstock_gateway.hotpath.http.ports import Headers

# Bytes of one head, as RFC 9113 counts them (32 for each field beside its own).
MAX_HEAD_BYTES = 65_536
TABLE_BYTES = 4096
# What is kept of heads: for so many of a connection, none above this length, read or as it came.
_MAX_HEADS = 64
_MAX_KEPT_BYTES = 4096


class HeadTooLarge(Exception):
    """A head over the limit. What it did to the table is unknown: the connection cannot go on."""


class BadCompression(Exception):
    """A block that does not decompress: the connection cannot go on."""


class HeadReader:
    """One direction of one connection: blocks in, heads out.

    A block that leaves the table of the connection as it was means the same when it comes again, until
    another block changes the table. gRPC's clients name their whole head by a few bytes after their first
    call, so that nearly every head is found here instead of read.

    Args:
        complete: Fills in how heads are served.
    """

    __slots__ = ("_complete", "_decoder", "heads")

    def __init__(self, complete: Callable[[Head], None]) -> None:
        self._complete = complete
        self._decoder = Decoder(max_header_list_size=MAX_HEAD_BYTES)
        self._decoder.max_allowed_table_size = TABLE_BYTES
        # Looked at by the connection first: a call for each head costs as much as the look-up.
        self.heads: dict[bytes, Head] = {}

    def head(self, block: bytes) -> Head:
        """Read a block that is not in `heads`.

        Raises:
            MalformedHead: It is no proper head; the connection can go on.
            HeadTooLarge: It is over the limit.
            BadCompression: It cannot be read.
        """
        fields, changed = self._fields(block)
        if changed:
            self.heads.clear()
        head = from_fields(fields)
        self._complete(head)
        size = sum(len(name) + len(value) for name, value in fields)
        if not changed and len(block) + size <= _MAX_KEPT_BYTES:
            if len(self.heads) >= _MAX_HEADS:
                self.heads.clear()
            self.heads[block] = head
        return head

    def trailers(self, block: bytes) -> None:
        """Read the block of a caller's trailers, which nobody here needs, for what it does to the table.

        Raises:
            MalformedHead: They are no proper trailers; the connection can go on.
            HeadTooLarge: They are over the limit.
            BadCompression: They cannot be read.
        """
        fields, changed = self._fields(block)
        if changed:
            self.heads.clear()
        check_trailers(fields)

    def _fields(self, block: bytes) -> tuple[list[tuple[bytes, bytes]], bool]:
        if len(block) > MAX_HEAD_BYTES:
            raise HeadTooLarge
        entries = self._decoder.header_table.dynamic_entries
        before, newest = len(entries), entries[0] if entries else None
        size = self._decoder.header_table_size
        try:
            fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError as error:
            raise HeadTooLarge from error
        except HPACKError as error:
            raise BadCompression(str(error)) from error
        after = entries[0] if entries else None
        changed = len(entries) != before or after is not newest or self._decoder.header_table_size != size
        return fields, changed


def _length(value: int) -> bytes:
    """Return a length of a string (7-bit prefix, no Huffman)."""
    if value < 127:
        return bytes((value,))
    out = bytearray((127,))
    value -= 127
    while value >= 128:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(name: bytes, value: bytes, how: bytes = b"\x00") -> bytes:
    """Return one header as a literal; by default one that is not put into the peer's table."""
    return how + _length(len(name)) + name + _length(len(value)) + value


def status(code: int) -> bytes:
    """Return the pseudo-header of a status."""
    if code == 200:
        return b"\x88"
    return b"\x08\x03%d" % code


def block(headers: Headers) -> bytes:
    """Return headers as a block that needs no table."""
    return b"".join(field(name, value) for name, value in headers)


# An answer of gRPC, for a peer whose table is empty, and those after it. The first puts two entries into
# the peer's table (literal with incremental indexing: 0x40), the others name them (0x80 | index): the
# entry that came last has the index 62.
GRPC_TYPE = b"application/grpc"
GRPC_HEAD = status(200) + field(b"content-type", GRPC_TYPE)
GRPC_OK = field(b"grpc-status", b"0")
GRPC_FIRST_HEAD = status(200) + field(b"content-type", GRPC_TYPE, b"\x40")
GRPC_FIRST_OK = field(b"grpc-status", b"0", b"\x40")
GRPC_NEXT_HEAD = status(200) + b"\xbf"
GRPC_NEXT_OK = b"\xbe"
# Dynamic table size update to 0: the table is not used.
NO_TABLE = b"\x20"
