"""The queue within one process: the same promises as on Redis, for tests of what stands on it.

    broker = MemoryBroker()
    sender = MemorySender(broker, "gateway-1")
    reader = MemoryReader(broker, queue, "replica-1.1")

The contract tests run on this and on Redis. What it leaves out is the weather: it is never away. It can
lose its data, though: ``broker.lose_data()``.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from penstock.queue.v1.envelope_pb2 import ReplicaStatistics, ReplyHeader, RequestHeader
from penstock_kit.queue import keys
from penstock_kit.queue.ledger import MAX_UNANSWERED, MAX_UNANSWERED_BYTES, Ledger
from penstock_kit.queue.messages import (
    Buffer,
    Request,
    answer_header,
    pack_replies,
    pack_reply,
    part_header,
    unpack_replies,
)
from penstock_kit.queue.ports import Done, Reclaimed
from penstock_kit.queue.reader import LEASE_MILLIS
from penstock_kit.queue.reclaim import MAX_DEAD_LETTERS, Mode, poison_reply
from penstock_kit.queue.shares import Shares
from penstock_kit.queue.statistics import DeadLetter
from penstock_kit.queue.waiting import Waiting

Key = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class _Entry:
    header: bytes
    payload: bytes
    attempt: int


@dataclass(slots=True)
class _Queue:
    entries: dict[Key, _Entry] = field(default_factory=dict)
    # Undelivered, by stream.
    fresh: dict[bytes, deque[Key]] = field(default_factory=dict)
    # Delivered and not acknowledged: by whom. The entry itself may have been deleted.
    pending: dict[Key, str] = field(default_factory=dict)
    # Consumer → time.monotonic() when its lease ends.
    leases: dict[str, float] = field(default_factory=dict)
    consumers: set[str] = field(default_factory=set)
    running: dict[str, Key] = field(default_factory=dict)
    statistics: dict[str, bytes] = field(default_factory=dict)
    shares: dict[str, Shares] = field(default_factory=dict)
    dead: deque[DeadLetter] = field(default_factory=lambda: deque(maxlen=MAX_DEAD_LETTERS))


class MemoryBroker:
    """What Redis is to the others. Usable from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: dict[str, _Queue] = {}
        self._gateways: dict[str, MemorySender] = {}
        self._numbers = itertools.count(1)

    def lose_data(self) -> None:
        """Forget everything, as a Redis that restarts without its data; the senders notice."""
        with self._changed:
            self._queues.clear()
            gateways = list(self._gateways.values())
        for gateway in gateways:
            gateway.from_other_thread(gateway.recover)

    def dead_letters(self, queue: str) -> list[DeadLetter]:
        """The dead letters of a queue, newest first."""
        with self._changed:
            return list(reversed(self._queue(queue).dead))

    def statistics(self, queue: str) -> dict[str, ReplicaStatistics]:
        """The counters that the replicas of a queue published last, by consumer."""
        with self._changed:
            published = self._queue(queue).statistics
            return {consumer: ReplicaStatistics.FromString(data) for consumer, data in published.items()}

    def reclaim(self, queue: str, consumer: str, mode: Mode = Mode.DEAD) -> Reclaimed:
        """Give back what a consumer held; see ``penstock_kit.queue.reclaim``."""
        with self._changed:
            return self._give_back(queue, consumer, mode)

    # For the sender

    def register(self, gateway: str, sender: "MemorySender") -> None:
        """From now on, replies for ``gateway`` go to ``sender``."""
        self._gateways[gateway] = sender

    def unregister(self, gateway: str) -> None:
        """Replies for ``gateway`` are dropped from now on."""
        self._gateways.pop(gateway, None)

    def add(self, queue: str, stream: bytes, header: bytes, payload: bytes, attempt: int = 0) -> bytes:
        """Put an entry at the end of a stream; returns its id."""
        with self._changed:
            entry_id = b"1-%d" % next(self._numbers)
            held = self._queue(queue)
            held.entries[stream, entry_id] = _Entry(header, payload, attempt)
            held.fresh.setdefault(stream, deque()).append((stream, entry_id))
            self._changed.notify_all()
            return entry_id

    def has(self, queue: str, entry: Key) -> bool:
        """Whether an entry is still there."""
        with self._changed:
            return entry in self._queue(queue).entries

    def remove(self, queue: str, entries: Iterable[Key]) -> None:
        """Acknowledge and delete entries."""
        with self._changed:
            held = self._queue(queue)
            for entry in entries:
                held.pending.pop(entry, None)
                held.entries.pop(entry, None)

    # For the reader

    def take(self, queue: str, consumer: str, count: int, seconds: float) -> list[Request]:
        """Hand out up to ``count`` entries to a consumer, waiting for the first one."""
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                held = self._queue(queue)
                if consumer not in held.consumers:
                    held.consumers.add(consumer)
                    held.leases[consumer] = time.monotonic() + LEASE_MILLIS / 1000
                found = self._deliver(queue, consumer, count)
                left = until - time.monotonic()
                if found or left <= 0:
                    return found
                self._changed.wait(left)

    def push(self, gateway: str, item: bytes) -> None:
        """Send replies to a gateway, if it is there."""
        sender = self._gateways.get(gateway)
        if sender is not None:
            sender.from_other_thread(sender.receive, item)

    def is_pending(self, queue: str, entry: Key, consumer: str) -> bool:
        """Whether an entry is with that consumer and wanted."""
        with self._changed:
            held = self._queues.get(queue)
            return held is None or held.pending.get(entry) == consumer

    def mark(self, queue: str, consumer: str, entry: Key | None) -> None:
        """Note which entry a consumer computes alone."""
        with self._changed:
            running = self._queue(queue).running
            if entry is None:
                running.pop(consumer, None)
            else:
                running[consumer] = entry

    def renew(self, queue: str, consumer: str) -> None:
        """Renew a lease."""
        with self._changed:
            self._queue(queue).leases[consumer] = time.monotonic() + LEASE_MILLIS / 1000

    def expire_lease(self, queue: str, consumer: str) -> None:
        """End a lease now: for a test that must not wait."""
        with self._changed:
            self._queue(queue).leases.pop(consumer, None)

    def publish(self, queue: str, consumer: str, statistics: bytes) -> None:
        """Keep a consumer's counters."""
        with self._changed:
            self._queue(queue).statistics[consumer] = statistics

    def reclaim_lost(self, queue: str, but: str) -> Reclaimed:
        """Take back what consumers without a lease hold."""
        with self._changed:
            requeued = poisoned = 0
            for consumer in sorted(self._queue(queue).consumers - {but}):
                result = self._give_back(queue, consumer, Mode.LOST)
                requeued += result.requeued
                poisoned += result.poisoned
            return Reclaimed(requeued, poisoned)

    def depth(self, queue: str) -> int:
        """How many entries a queue has."""
        with self._changed:
            return len(self._queue(queue).entries)

    # With the lock held

    def _queue(self, queue: str) -> _Queue:
        return self._queues.setdefault(queue, _Queue())

    def _deliver(self, queue: str, consumer: str, count: int) -> list[Request]:
        held = self._queue(queue)
        streams = keys.streams(queue)
        found: list[list[Request]] = [[] for _ in streams]
        if sum([bool(held.fresh.get(stream)) for stream in streams]) > 1:
            shares = held.shares.setdefault(consumer, Shares())
            dealt = shares.deal(count)
            for stream, places, requests in zip(streams, dealt, found, strict=True):
                requests += self._pop(held, stream, consumer, places)
            shares.found(dealt, [len(requests) for requests in found])
        for stream, requests in zip(streams, found, strict=True):
            requests += self._pop(held, stream, consumer, count - sum(map(len, found)))
        return [request for requests in found for request in requests]

    def _pop(self, held: _Queue, stream: bytes, consumer: str, count: int) -> list[Request]:
        fresh = held.fresh.get(stream, deque())
        found: list[Request] = []
        while fresh and len(found) < count:
            key = fresh.popleft()
            entry = held.entries.get(key)
            if entry is None:  # removed while it waited
                continue
            held.pending[key] = consumer
            header = RequestHeader.FromString(entry.header)
            found.append(Request(header, entry.payload, entry.attempt, key[1], stream))
        return found

    def _give_back(self, queue: str, consumer: str, mode: Mode) -> Reclaimed:
        held = self._queue(queue)
        if mode is Mode.LOST and held.leases.get(consumer, 0.0) > time.monotonic():
            return Reclaimed()
        requeued = poisoned = 0
        for key in [key for key, holder in held.pending.items() if holder == consumer]:
            del held.pending[key]
            entry = held.entries.pop(key, None)
            if entry is None:
                continue
            if mode is not Mode.LEAVING and entry.attempt and held.running.get(consumer) == key:
                self._bury(queue, consumer, entry)
                poisoned += 1
                continue
            attempt = entry.attempt if mode is Mode.LEAVING else max(entry.attempt, 1)
            self.add(queue, key[0], entry.header, entry.payload, attempt)
            requeued += 1
        held.consumers.discard(consumer)
        held.leases.pop(consumer, None)
        held.running.pop(consumer, None)
        held.statistics.pop(consumer, None)
        return Reclaimed(requeued, poisoned)

    def _bury(self, queue: str, consumer: str, entry: _Entry) -> None:
        header = RequestHeader.FromString(entry.header)
        now = time.time_ns() // 1_000_000
        self._queue(queue).dead.append(DeadLetter(header, entry.payload, entry.attempt, consumer, now))
        self.push(header.gateway, pack_reply(poison_reply(header, queue), b""))


class MemorySender(Ledger):
    """``ports.Sender`` within one process."""

    def __init__(
        self,
        broker: MemoryBroker,
        gateway_name: str,
        *,
        max_unanswered: int = MAX_UNANSWERED,
        max_unanswered_bytes: int = MAX_UNANSWERED_BYTES,
    ) -> None:
        super().__init__(gateway_name, max_unanswered, max_unanswered_bytes)
        self._broker = broker
        self._started = False

    @property
    def connected(self) -> bool:
        """Whether it was started."""
        return self._started

    async def start(self) -> None:
        """Accept requests."""
        self._open()
        self._started = True
        self._broker.register(self._gateway, self)

    async def stop(self) -> None:
        """Answer what is unanswered with Unavailable."""
        self._broker.unregister(self._gateway)
        self._shut()
        self._started = False

    def from_other_thread(self, function: Callable[..., None], *arguments: bytes) -> None:
        """Call a method of this sender on its loop, soon."""
        if self._started:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(function, *arguments)

    def receive(self, item: bytes) -> None:
        """Take replies, as they come from the broker."""
        for reply in unpack_replies(item):
            self._answer(reply)

    def recover(self) -> None:
        """Send again what the broker lost."""
        for waiting in list(self._waiting.values()):
            key = (waiting.lane.streams[waiting.priority], waiting.entry_id or b"")
            if not waiting.begun and not self._broker.has(waiting.lane.queue, key):
                self._send_again(waiting)

    def _send(self, waiting: Waiting) -> None:
        lane = waiting.lane
        waiting.entry_id = self._broker.add(
            lane.queue, lane.streams[waiting.priority], waiting.header, waiting.payload
        )

    def _take_off(self, gone: Sequence[Waiting]) -> None:
        for waiting in gone:
            if waiting.entry_id is not None:
                stream = waiting.lane.streams[waiting.priority]
                self._broker.remove(waiting.lane.queue, [(stream, waiting.entry_id)])


class MemoryReader:
    """``ports.Reader`` within one process."""

    def __init__(self, broker: MemoryBroker, queue: str, consumer: str) -> None:
        self._broker = broker
        self._queue = queue
        self._consumer = consumer
        self._parts: dict[Key, int] = {}
        self._left = False

    def read(self, max_entries: int, block_ms: int) -> list[Request]:
        """Take up to ``max_entries`` requests, higher priorities first."""
        return (
            [] if self._left else self._broker.take(self._queue, self._consumer, max_entries, block_ms / 1000)
        )

    def finish(self, done: Sequence[Done]) -> None:
        """Answer requests and take them off the queue."""
        replies: dict[str, list[tuple[ReplyHeader, Buffer]]] = {}
        for request, given, payload in done:
            entry = (request.stream, request.entry_id)
            header = answer_header(given or ReplyHeader(), request, self._parts.pop(entry, None))
            replies.setdefault(request.header.gateway, []).append((header, payload))
        for gateway, answers in replies.items():
            self._broker.push(gateway, pack_replies(answers))
        self._broker.remove(self._queue, [(request.stream, request.entry_id) for request, _, _ in done])

    def exchange(self, done: Sequence[Done], max_entries: int, block_ms: int) -> list[Request]:
        """``finish``, then ``read``."""
        self.finish(done)
        return self.read(max_entries, block_ms)

    def push_partial(self, request: Request, header: ReplyHeader, payload: Buffer) -> bool:
        """Send one part of a streamed answer; False if nobody waits for more."""
        entry = (request.stream, request.entry_id)
        sequence = self._parts.get(entry, 0)
        self._parts[entry] = sequence + 1
        self._broker.push(request.header.gateway, pack_reply(part_header(header, request, sequence), payload))
        return self._broker.is_pending(self._queue, entry, self._consumer)

    def abandoned(self, requests: Sequence[Request]) -> list[Request]:
        """Say which of the requests that were read nobody waits for here any more."""
        return [
            one
            for one in requests
            if not self._broker.is_pending(self._queue, (one.stream, one.entry_id), self._consumer)
        ]

    def mark_running(self, request: Request | None) -> None:
        """Say which suspect is computed now; None after it."""
        entry = None if request is None else (request.stream, request.entry_id)
        self._broker.mark(self._queue, self._consumer, entry)

    def heartbeat(self) -> bool:
        """Renew the lease."""
        if not self._left:
            self._broker.renew(self._queue, self._consumer)
        return not self._left

    def publish_statistics(self, statistics: bytes) -> bool:
        """Publish a serialized ReplicaStatistics."""
        self._broker.publish(self._queue, self._consumer, statistics)
        return True

    def reclaim_lost(self) -> Reclaimed:
        """Take back what consumers without a lease hold."""
        return self._broker.reclaim_lost(self._queue, self._consumer)

    def depth(self) -> int:
        """How many requests the queue holds, those being computed included."""
        return self._broker.depth(self._queue)

    def hurry(self) -> None:
        """Nothing to do: this queue is never away."""

    def leave(self) -> None:
        """Give back what was read but not finished, and sign off."""
        if not self._left:
            self._left = True
            self._broker.reclaim(self._queue, self._consumer, Mode.LEAVING)
