"""What travels through the queue: a request on its way down, a reply on its way up.

A request is one stream entry with the fields ``h`` (serialized RequestHeader), ``a`` (attempt, decimal)
and ``b`` (payload, opaque here). Replies travel in list items; an item is one or more frames:

    header length (4 bytes, little-endian) · payload length (4 bytes) · ReplyHeader · payload

One item carries all replies that a replica has for one gateway at that moment, so that the gateway wakes
up once for a batch.
"""

import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from penstock.queue.v1.envelope_pb2 import ReplyHeader, RequestHeader

Buffer = bytes | bytearray | memoryview

# How long replies wait for a gateway that is away. After it, the gateway sends the request again.
REPLIES_SECONDS = 60

_LENGTHS = struct.Struct("<II")
FRAME_BYTES = _LENGTHS.size
"""Bytes of a frame beside its header and payload."""


@dataclass(slots=True)
class Request:
    """One request as a replica reads it. Nobody changes it: a frozen one takes twice as long to make.

    Attributes:
        header: what the replica must know beside the payload.
        payload: opaque bytes in ``header.format``.
        attempt: how many replicas died while they held it. From 1 on it is a suspect and must run alone.
        entry_id: id of the stream entry, such as ``b"1718000000000-0"``.
        stream: key of the stream that holds it.
    """

    header: RequestHeader
    payload: bytes
    attempt: int
    entry_id: bytes
    stream: bytes

    @property
    def suspect(self) -> bool:
        """Whether a replica died while it held this request."""
        return self.attempt > 0

    def expired(self, now_unix_micros: int | None = None) -> bool:
        """Whether nobody waits for the answer any more."""
        now = time.time_ns() // 1000 if now_unix_micros is None else now_unix_micros
        return self.header.deadline_unix_micros <= now


@dataclass(slots=True)
class Reply:
    """One reply as a gateway reads it; an error if ``header.code`` is not 0. Nobody changes it either."""

    header: ReplyHeader
    payload: bytes


def part_header(header: ReplyHeader, request: Request, sequence: int) -> ReplyHeader:
    """Fill in the header of a part of a streamed answer: which run of which request, where in it."""
    header.id = request.header.id
    header.run = request.entry_id
    header.attempt = request.attempt
    header.sequence = sequence
    header.more = True
    return header


def answer_header(header: ReplyHeader, request: Request, sequence: int | None) -> ReplyHeader:
    """Fill in the header of an answer, or of the last part of one (``sequence`` is its place then)."""
    if sequence is None:
        header.id = request.header.id
    else:
        part_header(header, request, sequence)
    header.more = False
    return header


def frame(header: ReplyHeader, payload: Buffer) -> tuple[bytes, bytes, Buffer]:
    """Frame one reply without copying its payload: lengths, header, payload."""
    head = header.SerializeToString()
    return _LENGTHS.pack(len(head), len(payload)), head, payload


def frame_result(request: Request, payload: Buffer) -> tuple[bytes, bytes, Buffer]:
    """Frame the only answer of a request that went well, whose header has an id alone."""
    request_id = request.header.id
    length = len(request_id)
    if length >= 0x80:
        return frame(ReplyHeader(id=request_id), payload)
    # Field 1 of ReplyHeader, as protobuf writes it; the most frequent header is not worth a message.
    head = b"\n%c%b" % (length, request_id) if length else b""
    return _LENGTHS.pack(len(head), len(payload)), head, payload


def pack_reply(header: ReplyHeader, payload: Buffer) -> bytes:
    """Write one reply as a list item."""
    return b"".join(frame(header, payload))


def pack_replies(replies: Iterable[tuple[ReplyHeader, Buffer]]) -> bytes:
    """Write several replies as one list item."""
    return b"".join(part for header, payload in replies for part in frame(header, payload))


def unpack_replies(item: bytes) -> list[Reply]:
    """Read all replies of a list item.

    Raises:
        ValueError: the item is cut short or is no item of ours.
    """
    found = []
    at, size = 0, len(item)
    while at < size:
        if size - at < _LENGTHS.size:
            raise ValueError("A reply is cut short.")
        head_length, length = _LENGTHS.unpack_from(item, at)
        start = at + _LENGTHS.size
        middle = start + head_length
        at = middle + length
        if at > size:
            raise ValueError("A reply is cut short.")
        try:
            header = ReplyHeader.FromString(item[start:middle])
        except DecodeError as error:
            raise ValueError("The header of a reply is malformed.") from error
        found.append(Reply(header, item[middle:at]))
    return found


def unpack_reply(item: bytes) -> Reply:
    """Read a list item that holds exactly one reply.

    Raises:
        ValueError: the item is malformed, or holds none or several.
    """
    found = unpack_replies(item)
    if len(found) != 1:
        raise ValueError(f"The item holds {len(found)} replies instead of one.")
    return found[0]
