"""What Redis has of queues: their depths, and what replicas and gateways publish about themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import hiredis

from penstock.queue.v1.envelope_pb2 import BatchingPolicy, CacheStatistics, ReplicaStatistics
from penstock_gateway.domain.statistics import Batch, Batching, CacheCounters, Counters
from penstock_kit.errors import PenstockError, Unavailable
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import Connection
from penstock_kit.queue.statistics import (
    publish_cache_statistics,
    read_cache_statistics,
    read_depths,
    read_statistics,
)

T = TypeVar("T")

_CONNECT_SECONDS = 5.0


class StatisticsReader:
    """A connection of its own to Redis, so that a large answer does not stand in the way of requests.

    It is made when first needed, and anew after a failure.

    Args:
        url: Of Redis.
        gateway: Name of this process.
        tallies: Gives what this process answered without replicas, by queue.
    """

    def __init__(
        self,
        url: str,
        gateway: str = "",
        tallies: Callable[[], Mapping[str, CacheCounters]] = dict,
    ) -> None:
        self._address = Address.parse(url)
        self._gateway = gateway
        self._tallies = tallies
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()

    async def start(self) -> None:
        """Do nothing: the first question connects."""

    async def stop(self) -> None:
        """Close."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def read(self, queue: str) -> list[Counters]:
        """Return the counters of a queue's replicas, and of what gateways answered without them.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        found = await self._ask(lambda connection: read_statistics(connection, queue))
        cached = await self._ask(lambda connection: read_cache_statistics(connection, queue))
        tallies = [to_cache_counters(one) for name, one in cached.items() if name != self._gateway]
        own = self._tallies().get(queue)  # fresher than what was published
        if own is not None:
            tallies.append(own)
        return [to_counters(one) for one in found.values()] + [Counters(cache=one) for one in tallies]

    async def publish(self) -> None:
        """Tell other gateways what this one answered without replicas.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        found = {
            queue: CacheStatistics(
                hit_count=tally.hits,
                joined_count=tally.joined,
                hit_ns=tally.hit_ns,
                miss_count=tally.misses,
                miss_ns=tally.miss_ns,
                last_hit_ms=tally.last_hit_ms,
            )
            for queue, tally in self._tallies().items()
        }
        if found:
            await self._ask(lambda connection: publish_cache_statistics(connection, self._gateway, found))

    async def depths(self, queues: Sequence[str]) -> list[tuple[int, ...]]:
        """Return how many requests each queue holds, by priority, those being computed included.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        return await self._ask(lambda connection: read_depths(connection, queues))

    async def _ask(self, question: Callable[[Connection], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                return await question(await self._connect())
        except (PenstockError, hiredis.ReplyError, OSError, TimeoutError) as error:
            await self.stop()
            raise Unavailable(f"The statistics cannot be read from Redis now: {error}") from error

    async def _connect(self) -> Connection:
        async with self._connecting:
            if self._connection is None or self._connection.closed:
                self._connection = await Connection.connect(self._address, "penstock-gateway:statistics")
            return self._connection


def to_counters(found: ReplicaStatistics) -> Counters:
    """Return the counters of one replica."""
    return Counters(
        success_count=found.success_count,
        failure_count=found.failure_count,
        execution_count=found.execution_count,
        inference_count=found.inference_count,
        success_ns=found.success_ns,
        failure_ns=found.failure_ns,
        queue_ns=found.queue_ns,
        input_ns=found.input_ns,
        compute_ns=found.compute_ns,
        output_ns=found.output_ns,
        last_inference_ms=found.last_inference_ms,
        batches={b.batch_size: Batch(b.count, b.input_ns, b.compute_ns, b.output_ns) for b in found.batches},
        batching=[_to_batching(found.batching)] if found.HasField("batching") else [],
    )


def _to_batching(found: BatchingPolicy) -> Batching:
    return Batching(
        max_rows=found.max_rows,
        objective_ns=found.objective_ns,
        average_rows=found.average_rows,
        average_wait_ns=found.average_wait_ns,
        saturated=found.saturated,
        curve=tuple((point.rows, point.ns) for point in found.curve),
    )


def to_cache_counters(found: CacheStatistics) -> CacheCounters:
    """Return what another gateway answered without replicas."""
    return CacheCounters(
        hits=found.hit_count,
        hit_ns=found.hit_ns,
        joined=found.joined_count,
        misses=found.miss_count,
        miss_ns=found.miss_ns,
        last_hit_ms=found.last_hit_ms,
    )
