"""What can be seen of a queue from outside: its depth, its replicas' counters, its dead letters."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from penstock.queue.v1.envelope_pb2 import CacheStatistics, ReplicaStatistics, RequestHeader
from penstock_kit.queue import keys
from penstock_kit.queue.connection import Connection
from penstock_kit.queue.resp import Command

log = logging.getLogger(__name__)

# Gateways publish every few seconds; one that has not for so long is gone.
CACHE_MILLIS = 10_000
# The hash of a queue whose gateways are all gone goes too.
_CACHE_KEY_SECONDS = 60


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that killed two replicas.

    Attributes:
        header: its header, empty if it is unreadable.
        payload: its payload.
        attempt: how many replicas had died over it before the last one.
        consumer: the replica process that died last.
        buried_unix_millis: when it was kept aside.
    """

    header: RequestHeader
    payload: bytes
    attempt: int
    consumer: str
    buried_unix_millis: int


async def read_statistics(connection: Connection, queue: str) -> dict[str, ReplicaStatistics]:
    """Read the counters that the replicas of a queue published last, by consumer.

    Raises:
        ConnectionLost: Redis is away.
        DeadlineExceeded: Redis does not answer.
    """
    fields = await connection.command("HGETALL", keys.statistics(queue))
    found = {}
    for consumer, data in zip(fields[::2], fields[1::2], strict=True):
        try:
            found[consumer.decode()] = ReplicaStatistics.FromString(data)
        except DecodeError:
            log.error("The statistics of %r in queue %s are unreadable.", consumer, queue)
    return found


async def read_depth(connection: Connection, queue: str) -> int:
    """Count the requests in a queue, those being computed included; raises like ``read_statistics``."""
    return sum(await connection.pipeline([("XLEN", stream) for stream in keys.streams(queue)]))


async def read_depths(connection: Connection, queues: Sequence[str]) -> list[tuple[int, ...]]:
    """Count the requests in several queues, by priority; raises like ``read_statistics``."""
    streams = [stream for queue in queues for stream in keys.streams(queue)]
    lengths = await connection.pipeline([("XLEN", stream) for stream in streams])
    width = len(keys.PRIORITIES)
    return [tuple(lengths[at : at + width]) for at in range(0, len(lengths), width)]


async def publish_cache_statistics(
    connection: Connection, gateway: str, found: Mapping[str, CacheStatistics]
) -> None:
    """Publish what a gateway answered of queues without their replicas; raises like ``read_statistics``.

    Fills in ``update_unix_millis``.
    """
    now = time.time_ns() // 1_000_000
    commands: list[Command] = []
    for queue, statistics in found.items():
        statistics.update_unix_millis = now
        key = keys.cache(queue)
        commands.append(("HSET", key, gateway, statistics.SerializeToString()))
        commands.append(("EXPIRE", key, _CACHE_KEY_SECONDS))
    if commands:
        await connection.pipeline(commands)


async def read_cache_statistics(connection: Connection, queue: str) -> dict[str, CacheStatistics]:
    """Read what gateways answered of a queue without replicas, by gateway; raises like ``read_statistics``.

    What a gateway published that publishes no more is left out.
    """
    fields = await connection.command("HGETALL", keys.cache(queue))
    oldest = time.time_ns() // 1_000_000 - CACHE_MILLIS
    found = {}
    for gateway, data in zip(fields[::2], fields[1::2], strict=True):
        try:
            statistics = CacheStatistics.FromString(data)
        except DecodeError:
            log.error("The statistics of %r in queue %s are unreadable.", gateway, queue)
            continue
        if statistics.update_unix_millis >= oldest:
            found[gateway.decode()] = statistics
    return found


async def dead_letters(connection: Connection, queue: str, limit: int = 100) -> list[DeadLetter]:
    """List the last ``limit`` dead letters of a queue, newest first; raises like ``read_statistics``."""
    entries = await connection.command("XREVRANGE", keys.dead(queue), "+", "-", "COUNT", limit)
    found = []
    for entry_id, flat in entries:
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        try:
            header = RequestHeader.FromString(fields.get(b"h", b""))
        except DecodeError:
            header = RequestHeader()
        found.append(
            DeadLetter(
                header=header,
                payload=fields.get(b"b", b""),
                attempt=int(fields.get(b"a") or 0),
                consumer=fields.get(b"c", b"").decode(),
                buried_unix_millis=int(entry_id.partition(b"-")[0]),
            )
        )
    return found
