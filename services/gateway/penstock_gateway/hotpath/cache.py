"""Answers kept for equal requests: bounded in bytes and in time, in this process only.

    ResponseCache          all that the process keeps, under one limit of bytes
      └ Shelf              one deployment: its policy, its answers, its flights, its counters

An answer is found under the key of `canonical`, which names the version by its digest: another version
never finds it. What leaves the routing table takes its answers with it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from penstock.queue.v1.envelope_pb2 import ReplyHeader
from penstock_gateway.domain.statistics import CacheCounters
from penstock_gateway.hotpath.canonical import key_of
from penstock_gateway.hotpath.flights import Flight, Look
from penstock_kit.queue.messages import Reply
from penstock_kit.queue.ports import Sender
from penstock_kit.routing.table import CachePolicy, Table, Target

DEFAULT_LIMIT_BYTES = 256 << 20
# What an answer costs beside its bytes: key, entry, reply, its place in the table (475 bytes measured).
OVERHEAD_BYTES = 600


@lru_cache(maxsize=1024)
def _header(json_length: int) -> ReplyHeader:
    """Return a header that answers share, as it is larger than most. Nobody may change it."""
    return ReplyHeader(json_length=json_length)


class _Entry:
    """One kept answer. `used` is when it was last given away."""

    __slots__ = ("expires", "queue", "reply", "size", "used")

    def __init__(self, reply: Reply, queue: str, size: int, now: float, expires: float) -> None:
        self.reply = reply
        self.queue = queue
        self.size = size
        self.used = now
        self.expires = expires


class Shelf:
    """The answers of one deployment, the longest unused first.

    Args:
        cache: Of the process.
        policy: Of the deployment.

    Attributes:
        bytes: What is kept, with what keeping it costs.
        flights: Computations that equal requests may join, by key and stream of the queue.
        tallies: What was done, by queue.
        evicted: Answers that had to make room.
        skipped: Requests that were too large, or of too odd a form, to be looked up.
    """

    __slots__ = ("_cache", "_entries", "_past", "bytes", "evicted", "flights", "policy", "skipped", "tallies")

    def __init__(self, cache: ResponseCache, policy: CachePolicy) -> None:
        self._cache = cache
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.policy = policy
        self.bytes = 0
        self.flights: dict[tuple[bytes, int], Flight] = {}
        self.tallies: dict[str, CacheCounters] = {}
        self.evicted = 0
        self.skipped = 0
        self._past = CacheCounters()  # of versions that are gone

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def oldest_use(self) -> float:
        """When the answer that is unused for longest was used; infinite if there is none."""
        return next(iter(self._entries.values())).used if self._entries else float("inf")

    def total(self) -> CacheCounters:
        """Return what was done for all versions, those that are gone included."""
        found = CacheCounters()
        for tally in (self._past, *self.tallies.values()):
            found.add(tally)
        return found

    def look(
        self, target: Target, name: str, payload_format: int, json_length: int, payload: bytes, priority: int
    ) -> Look | None:
        """Return what is known of a request; None if it shall be computed like any other.

        Args:
            target: Where it would go.
            name: The model name as the caller wrote it.
            payload_format: How the payload is written.
            json_length: Length of its JSON part, where binary tensors follow it.
            payload: What the caller sent.
            priority: Which stream of the queue it would go to; a request never waits for one that is
                less urgent.
        """
        begun = time.perf_counter_ns()
        found = key_of(target, name, payload_format, json_length, payload)
        if found is None:
            self.skipped += 1
            return None
        key, request_id = found
        tally = self.tallies.get(target.queue)
        if tally is None:
            tally = self.tallies[target.queue] = CacheCounters()
        look = Look(self._cache, self, key, request_id, tally)
        if self.policy.keep:
            look.reply = self.find(key)
            spent = time.perf_counter_ns() - begun
            if look.reply is not None:
                tally.hits += 1
                tally.hit_ns += spent
                tally.last_hit_ms = time.time_ns() // 1_000_000
                return look
            look.lookup_ns = spent
        if self.policy.coalesce:
            look.flight = self.flights.get((key, priority))
        return look

    def find(self, key: bytes) -> Reply | None:
        """Return a kept answer that is not too old."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = self._cache.clock()
        if entry.expires <= now:
            self._drop(key)
            return None
        entry.used = now
        self._entries.move_to_end(key)
        return entry.reply

    def keep(self, key: bytes, queue: str, json_length: int, payload: bytes) -> None:
        """Keep a successful answer; what is unused for longest makes room."""
        policy = self.policy
        if not policy.keep or queue not in self._cache.queues:
            return
        size = len(payload) + OVERHEAD_BYTES
        most = min(policy.max_bytes, self._cache.limit_bytes)
        if size > most:
            return
        if key in self._entries:
            self._drop(key)
        now = self._cache.clock()
        entry = _Entry(Reply(_header(json_length), payload), queue, size, now, now + policy.ttl_seconds)
        self._entries[key] = entry
        self.bytes += size
        self._cache.bytes += size
        self._drop_expired(now)
        while self.bytes > most:
            self.evict()
        self._cache.trim()

    def evict(self) -> None:
        """Drop the answer that is unused for longest."""
        self._drop(next(iter(self._entries)))
        self.evicted += 1

    def follow(self, policy: CachePolicy, queues: Iterable[str]) -> None:
        """Take the policy of now; drop the answers of versions that are gone."""
        if policy.keep != self.policy.keep or policy.ttl_seconds != self.policy.ttl_seconds:
            self.clear()
        self.policy = policy
        here = frozenset(queues)
        if not self.tallies.keys() <= here:
            for key in [key for key, entry in self._entries.items() if entry.queue not in here]:
                self._drop(key)
            for queue in self.tallies.keys() - here:
                self._past.add(self.tallies.pop(queue))
        while self.bytes > policy.max_bytes:
            self.evict()

    def retire(self) -> None:
        """Keep nothing any more, whatever lands yet."""
        self.policy = CachePolicy()
        self.clear()

    def clear(self) -> None:
        """Drop all answers."""
        self._cache.bytes -= self.bytes
        self.bytes = 0
        self._entries.clear()

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.bytes -= entry.size
        self._cache.bytes -= entry.size

    def _drop_expired(self, now: float) -> None:
        """Drop what is too old, from the longest unused on until the first that is not."""
        entries = self._entries
        while entries and next(iter(entries.values())).expires <= now:
            self._drop(next(iter(entries)))


class ResponseCache:
    """The answers that this process keeps, and the computations that requests share.

    Args:
        sender: The gateway's end of the queue.
        limit_bytes: Bytes of answers over all deployments at most.
        clock: Seconds that only grow.

    Attributes:
        bytes: What is kept, with what keeping it costs.
        queues: Queues of the routing table; no other one's answer is kept.
        flights: Computations under way, by queue.
        shelves: By deployment; only those with a policy.
    """

    def __init__(
        self,
        sender: Sender,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sender = sender
        self.limit_bytes = limit_bytes
        self.clock = clock
        self.bytes = 0
        self.queues: frozenset[str] = frozenset()
        self.flights: dict[str, set[Flight]] = {}
        self.shelves: dict[str, Shelf] = {}

    def follow(self, table: Table) -> None:
        """Take a new routing table.

        To be called before the requests in queues that vanished are sent elsewhere: those that share a
        computation are given one of their own each, because they may not go to the same place.
        """
        self.queues = table.queues()
        for queue in self.flights.keys() - self.queues:
            for flight in list(self.flights[queue]):
                flight.scatter()
        wanted: Mapping[str, CachePolicy] = {
            name: route.cache for name, route in table.routes.items() if route.cache is not None
        }
        for name in self.shelves.keys() - wanted.keys():
            self.shelves.pop(name).retire()
        for name, policy in wanted.items():
            shelf = self.shelves.get(name)
            if shelf is None:
                shelf = self.shelves[name] = Shelf(self, policy)
            shelf.follow(policy, (target.queue for target in table.routes[name].targets))

    def trim(self) -> None:
        """Keep to the limit of the process: whatever is unused for longest makes room."""
        while self.bytes > self.limit_bytes:
            min(self.shelves.values(), key=lambda shelf: shelf.oldest_use).evict()

    def tallies(self) -> dict[str, CacheCounters]:
        """Return what was done here, by queue."""
        return {queue: tally for shelf in self.shelves.values() for queue, tally in shelf.tallies.items()}
