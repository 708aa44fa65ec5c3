"""What a replica writes to Redis when it answers: encoding, and what Redis may say to it. No I/O here."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import hiredis

from penstock.queue.v1.envelope_pb2 import ReplyHeader
from penstock_kit.errors import Code, Reason
from penstock_kit.queue import keys
from penstock_kit.queue.messages import (
    FRAME_BYTES,
    REPLIES_SECONDS,
    Buffer,
    answer_header,
    frame,
    frame_result,
)
from penstock_kit.queue.ports import Done
from penstock_kit.queue.resp import Command, bulk, encode

log = logging.getLogger(__name__)

# Redis refuses strings over 512 MiB by closing the connection.
MAX_REPLY_BYTES = 256 << 20
# Replies for one gateway go into one list item up to this size.
MAX_ITEM_BYTES = 8 << 20

_MULTI = encode("MULTI")
_EXEC = encode("EXEC")
# Redis had no memory for a reply; a transaction is then refused as a whole.
_REFUSED = ("OOM", "EXECABORT")

Key = tuple[bytes, bytes]
"""An entry: its stream, and its id there."""


def encode_answers(
    done: Sequence[Done], parts: Mapping[Key, int], stale: Sequence[Key]
) -> tuple[list[Buffer], int]:
    """Encode answers and the removal of their entries as one transaction, without copying payloads.

    Args:
        done: What is answered.
        parts: Entry → position of the next part, for those whose answer is streamed.
        stale: Other entries to take off the queue.

    Returns:
        The parts of the pipeline, and how many replies it gets; the last is that of EXEC.
    """
    items: dict[str, list[list[Buffer]]] = {}
    sizes: dict[str, int] = {}
    by_stream = _by_stream(stale)
    for request, given, body in done:
        header, payload = given, body
        if len(payload) > MAX_REPLY_BYTES:
            header, payload = _too_large(len(payload)), b""
        stream, entry_id = request.stream, request.entry_id
        try:
            by_stream[stream].append(entry_id)
        except KeyError:
            by_stream[stream] = [entry_id]
        if header is None and not parts:
            framed = frame_result(request, payload)
        else:
            sequence = parts.get((stream, entry_id))
            framed = frame(answer_header(header or ReplyHeader(), request, sequence), payload)
        size = len(framed[1]) + len(payload) + FRAME_BYTES
        gateway = request.header.gateway
        if gateway not in items or sizes[gateway] + size > MAX_ITEM_BYTES:
            items.setdefault(gateway, []).append([])
            sizes[gateway] = 0
        items[gateway][-1] += framed
        sizes[gateway] += size
    out: list[Buffer] = [_MULTI]
    count = 2
    for gateway, lists in items.items():
        push, expire = _to_gateway(gateway)
        for item in lists:
            out.append(b"%b$%d\r\n" % (push, sum(map(len, item))))
            out += item
            out.append(b"\r\n")
        out.append(expire)
        count += len(lists) + 1
    for stream, ids in by_stream.items():
        out.append(_take_off(stream, ids))
        count += 2
    out.append(_EXEC)
    return out, count


def acknowledge(entries: Sequence[Key]) -> list[Command]:
    """The commands that take entries off the queue."""
    commands: list[Command] = []
    for stream, ids in _by_stream(entries).items():
        commands += [("XACK", stream, keys.GROUP, *ids), ("XDEL", stream, *ids)]
    return commands


def refused(replies: Sequence[Any]) -> hiredis.ReplyError | None:
    """Return the error with which Redis refused a transaction as a whole, for want of memory."""
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError) and str(reply).startswith(_REFUSED):
            return reply
    return None


def log_refusals(carried_out: Any) -> None:
    """Log what went wrong within a transaction that was carried out, given EXEC's reply."""
    for reply in carried_out if isinstance(carried_out, list) else [carried_out]:
        if isinstance(reply, hiredis.ReplyError):
            log.error("Redis refused a part of an answer: %s", reply)


def _by_stream(entries: Sequence[Key]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for stream, entry_id in entries:
        found.setdefault(stream, []).append(entry_id)
    return found


@functools.lru_cache(256)
def _to_gateway(gateway: str) -> tuple[bytes, bytes]:
    """The RPUSH of replies to a gateway up to the item, and the EXPIRE that follows it."""
    key = keys.replies(gateway)
    return b"*3\r\n$5\r\nRPUSH\r\n" + bulk(key), encode("EXPIRE", key, REPLIES_SECONDS)


@functools.lru_cache(16)
def _from_stream(stream: bytes) -> tuple[bytes, bytes]:
    """XACK and XDEL of a stream, from behind the number of arguments up to the ids."""
    return b"$4\r\nXACK\r\n" + bulk(stream) + bulk(keys.GROUP), b"$4\r\nXDEL\r\n" + bulk(stream)


def _take_off(stream: bytes, ids: Sequence[bytes]) -> bytes:
    """XACK and XDEL of entries on the wire; the ids, which both have, are encoded once."""
    encoded = b"".join([b"$%d\r\n%b\r\n" % (len(entry_id), entry_id) for entry_id in ids])
    ack, delete = _from_stream(stream)
    count = len(ids)
    return b"*%d\r\n%b%b*%d\r\n%b%b" % (count + 3, ack, encoded, count + 2, delete, encoded)


def _too_large(size: int) -> ReplyHeader:
    return ReplyHeader(
        code=Code.RESOURCE_EXHAUSTED,
        reason=Reason.PAYLOAD_TOO_LARGE,
        message=f"The answer has {size} bytes, over the limit of {MAX_REPLY_BYTES}. Ask for less at once.",
    )
